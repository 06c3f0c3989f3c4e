"""The networks that are measured, by name, each on eager norms or on fused ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Classifier", "network", "train_step"]

NETWORKS: dict[str, dict[str, Any]] = {
    **{f"resnet{d}": dict(type="ResNet", depth=d) for d in (18, 34, 50, 101, 152)},
    "resnetv1d50": dict(type="ResNetV1d", depth=50),
    "resnext50": dict(type="ResNeXt", depth=50),
}


class Classifier(nn.Module):
    """Backbone, mean over the pixels, linear layer: [N, 3, H, W] to [N, classes]."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int = 1000) -> None:
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def network(name: str, norm: str = "FusedBN", classes: int = 1000) -> Classifier:
    """A network of ``NETWORKS`` with ``norm`` as its norm layers: ``BN`` is eager PyTorch, ``FusedBN`` fastres.

    KeyError for an unknown name.
    """
    from fastres.registry import MODELS

    if name not in NETWORKS:
        raise KeyError(f"network: name is {name!r}; wanted one of {', '.join(NETWORKS)}")
    backbone = MODELS.build(dict(NETWORKS[name], norm_cfg=dict(type=norm)))
    return Classifier(backbone, backbone.feat_dim, classes)


def train_step(model: nn.Module, x: Tensor, target: Tensor, autocast: Any) -> Tensor:
    """Forward, cross entropy and backward; returns the loss."""
    with autocast:
        loss = torch.nn.functional.cross_entropy(model(x), target)
    loss.backward()
    return loss
