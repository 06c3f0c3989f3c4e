"""Image classification around a backbone: `ImageClassifier`, `GlobalAveragePooling`, `LinearClsHead` and losses.

Config keys, defaults and state-dict keys (``backbone.*``, ``head.fc.*``; the neck has none) are those of mmcls:

    MODELS.build(dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=50),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=1000, in_channels=2048,
                  loss=dict(type='CrossEntropyLoss'), topk=(1, 5))))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres._registry import MODELS
from fastres.initialize import BaseModule, InitCfg

__all__ = [
    "CrossEntropyLoss",
    "GlobalAveragePooling",
    "ImageClassifier",
    "LabelSmoothLoss",
    "LinearClsHead",
    "accuracy",
    "topk_correct",
]

NORMAL = dict(type="Normal", layer="Linear", std=0.01)
Features = Tensor | tuple[Tensor, ...]


def topk_correct(scores: Tensor, labels: Tensor, topk: Sequence[int] = (1,)) -> Tensor:
    """How many rows have their label among the k highest scores, for every k.

    Args:
        scores: [N, classes], any float dtype.
        labels: [N], integer.
        topk: each k >= 1; a k of at least the number of classes counts every row.

    Returns:
        [len(topk)] int64, on the device of ``scores``; no synchronisation. A row of NaN is never right.

    Raises:
        ValueError: wrong shapes, or a k below 1.
    """
    _check_scores("topk_correct", scores, labels)
    if not topk or min(topk) < 1:
        raise ValueError(f"topk_correct: topk: got {tuple(topk)}, wanted one or more integers >= 1")
    order = scores.topk(min(max(topk), scores.shape[1]), dim=1).indices
    usable = ~scores.isnan().any(dim=1, keepdim=True)
    hits = (order == labels[:, None]) & usable
    return torch.stack([hits[:, :k].any(dim=1).sum() for k in topk])


def accuracy(scores: Tensor, labels: Tensor, topk: int | Sequence[int] = 1) -> Tensor | list[Tensor]:
    """Top-k accuracy in percent: a scalar for an int ``topk``, else one for every k. Arguments as `topk_correct`."""
    several = [topk] if isinstance(topk, int) else list(topk)
    percent = topk_correct(scores, labels, several) * (100.0 / max(len(labels), 1))
    return percent[0] if isinstance(topk, int) else list(percent)


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Softmax cross entropy of logits [N, classes] and class indices [N], in float32 or wider.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        reduction: 'mean', 'sum' or 'none'.
        loss_weight: factor on the loss.
        class_weight: one weight for each class.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{name}: label_smoothing: got {label_smoothing}, wanted a number in [0, 1]")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{name}: reduction: got {reduction!r}, wanted 'mean', 'sum' or 'none'")
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.loss_weight = loss_weight
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        _check_scores(type(self).__name__, scores, labels)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        weight = None if self.class_weight is None else self.class_weight.to(scores.dtype)
        loss = F.cross_entropy(
            scores, labels, weight=weight, reduction=self.reduction, label_smoothing=self.label_smoothing
        )
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, loss_weight={self.loss_weight}"


@MODELS.register_module()
class LabelSmoothLoss(CrossEntropyLoss):
    """mmcls' name for cross entropy with label smoothing, in its mode 'original' (Szegedy et al. 2016, section 7).

    Args:
        label_smooth_val: the smoothing.
        num_classes: accepted as mmcls does; not needed.
        mode: 'original' or None, the same.
        reduction, loss_weight: as `CrossEntropyLoss`.
    """

    def __init__(
        self,
        label_smooth_val: float,
        num_classes: int | None = None,
        mode: str | None = "original",
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        if mode not in ("original", None):
            raise ValueError(f"LabelSmoothLoss: mode: got {mode!r}, wanted 'original'")
        super().__init__(label_smooth_val, reduction, loss_weight)


@MODELS.register_module()
class GlobalAveragePooling(nn.Module):
    """Mean over the pixels: [N, C, H, W] to [N, C]; of every tensor where it gets a tuple."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        if dim not in (1, 2, 3):
            raise AssertionError(f"GlobalAveragePooling: dim: got {dim!r}, wanted 1, 2 or 3")
        self.dim = dim

    def forward(self, x: Features) -> Features:
        if isinstance(x, tuple):
            return tuple(self._pool(t) for t in x)
        return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        if x.dim() != self.dim + 2:
            raise ValueError(
                f"GlobalAveragePooling: x: got shape {tuple(x.shape)}, wanted {self.dim + 2} dimensions"
            )
        return x.mean(dim=tuple(range(2, x.dim())))


@MODELS.register_module()
class LinearClsHead(BaseModule):
    """A linear layer on pooled features, its loss and its accuracy.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        init_cfg: what ``init_weights()`` does; None keeps torch's own initialisation. See `fastres.initialize`.
        loss: config of the loss; default `CrossEntropyLoss`.
        topk: which accuracies to report.
        cal_acc: whether `loss` adds ``accuracy_top-k`` entries in percent.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        init_cfg: InitCfg | None = NORMAL,
        loss: Mapping[str, Any] | None = None,
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
    ) -> None:
        super().__init__(init_cfg)
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"LinearClsHead: {name}: got {value!r}, wanted an integer >= 1")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or not all(isinstance(k, int) and k >= 1 for k in self.topk):
            raise AssertionError(f"LinearClsHead: topk: got {topk!r}, wanted one or more integers >= 1")
        self.cal_acc = cal_acc
        self.compute_loss = MODELS.build(dict(loss or dict(type="CrossEntropyLoss")))
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, feats: Features) -> Tensor:
        """Logits [N, classes] of features [N, C]; of the last ones where it gets a tuple."""
        x = feats[-1] if isinstance(feats, tuple) else feats
        if x.dim() != 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"LinearClsHead: features: got shape {tuple(x.shape)}, wanted [N, {self.in_channels}]"
            )
        return self.fc(x)

    def loss(self, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``{'loss': scalar}`` and, with ``cal_acc``, ``{'accuracy_top-k': percent}``; arguments as `topk_correct`."""
        losses = {"loss": self.compute_loss(scores, labels)}
        if self.cal_acc:
            percents = topk_correct(scores.detach(), labels, self.topk) * (100.0 / max(len(labels), 1))
            losses.update({f"accuracy_top-{k}": p for k, p in zip(self.topk, percents, strict=True)})
        return losses


@MODELS.register_module()
class ImageClassifier(BaseModule):
    """Backbone, optional neck, optional head. ``init_weights()`` initialises all of them.

    Args:
        backbone: config or module; returns a tuple of feature maps.
        neck: config or module, such as `GlobalAveragePooling`.
        head: config or module, such as `LinearClsHead`.
        init_cfg: for the whole, beside what the parts have; usually a Pretrained checkpoint.

    Raises:
        ValueError: the head expects another number of channels than the backbone gives.
    """

    neck: Any  # absent, not None, where there is none, as in mmcls
    head: Any

    def __init__(
        self,
        backbone: Mapping[str, Any] | nn.Module,
        neck: Mapping[str, Any] | nn.Module | None = None,
        head: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: InitCfg | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.backbone = _module(backbone)
        if neck is not None:
            self.neck = _module(neck)
        if head is not None:
            self.head = _module(head)
        self._check_channels()

    @property
    def with_neck(self) -> bool:
        return hasattr(self, "neck")

    @property
    def with_head(self) -> bool:
        return hasattr(self, "head")

    def extract_feat(self, img: Tensor, stage: str = "neck") -> Features:
        """Features after the ``'backbone'`` (a tuple of maps) or after the ``'neck'`` if there is one."""
        if stage not in ("backbone", "neck"):
            raise ValueError(
                f"ImageClassifier.extract_feat: stage: got {stage!r}, wanted 'backbone' or 'neck'"
            )
        x = self.backbone(img)
        return self.neck(x) if stage == "neck" and self.with_neck else x

    def forward(self, img: Tensor, gt_label: Tensor | None = None) -> Any:
        """Logits [N, classes] of images [N, C, H, W], or the losses of `LinearClsHead.loss` where labels are given."""
        if gt_label is not None:
            if not self.with_head:
                raise ValueError("ImageClassifier: gt_label: labels were given, but the model has no head")
            _check_labels("ImageClassifier", "gt_label", gt_label, len(img))
        feats = self.extract_feat(img)
        if not self.with_head:
            return feats
        scores = self.head(feats)
        return scores if gt_label is None else self.head.loss(scores, gt_label)

    @torch.no_grad()
    def predict(self, img: Tensor) -> Tensor:
        """Class probabilities [N, classes] in float32 or wider. Does not switch to eval mode."""
        scores = self(img)
        return (scores if scores.dtype == torch.float64 else scores.float()).softmax(dim=1)

    def _check_channels(self) -> None:
        backbone, head = self.backbone, getattr(self, "head", None)
        wanted, got = getattr(head, "in_channels", None), getattr(backbone, "feat_dim", None)
        stages = getattr(backbone, "num_stages", None)
        last = stages is not None and max(getattr(backbone, "out_indices", (-1,))) == stages - 1
        if last and wanted is not None and got is not None and wanted != got:
            raise ValueError(
                f"ImageClassifier: head.in_channels: got {wanted}, wanted {got}, "
                f"the channels of the backbone's last stage ({type(backbone).__name__})"
            )


def _module(spec: Mapping[str, Any] | nn.Module) -> nn.Module:
    return spec if isinstance(spec, nn.Module) else MODELS.build(spec)


def _check_scores(operation: str, scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(
            f"{operation}: scores: got {scores.dtype} of shape {tuple(scores.shape)}, wanted floats [N, classes]"
        )
    _check_labels(operation, "labels", labels, len(scores))


def _check_labels(operation: str, argument: str, labels: Tensor, count: int) -> None:
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"{operation}: {argument}: got {labels.dtype} of shape {tuple(labels.shape)}, wanted integers [{count}]"
        )
