"""The modules that are timed as operations and blocks; ``kind`` is the norm's name, ``BN`` (eager) or ``FusedBN``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BlockEnd", "BnRelu", "Conv3x3", "MomentEnd", "Shortcut", "StemPool"]


def _norm(kind: str, channels: int) -> nn.Module:
    from fastres import FusedBatchNorm2d

    return nn.BatchNorm2d(channels) if kind == "BN" else FusedBatchNorm2d(channels)


class BnRelu(nn.Module):
    """relu(bn(y))."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = _norm(kind, channels), kind

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "BN":
            return torch.relu_(self.norm(y))
        from fastres import functional

        return functional.batch_norm(y, self.norm.fused(), relu=True)


class BlockEnd(nn.Module):
    """relu(bn(y) + identity)."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.norm, self.kind, self.conv = _norm(kind, channels), kind, nn.Identity()

    def forward(self, y: Tensor, identity: Tensor) -> Tensor:
        if self.kind == "BN":
            return torch.relu_(self.norm(y).add_(identity))
        from fastres import functional

        return functional.add_relu(functional.conv_bn(y, self.conv, self.norm.fused()), identity)


class Conv3x3(nn.Module):
    """relu(bn2(conv(relu(bn1(y))))), conv a 3x3 of as many channels."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.kind = _norm(kind, channels), _norm(kind, channels), kind
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "BN":
            return torch.relu_(self.norm2(self.conv(torch.relu_(self.norm1(y)))))
        from fastres import functional as f

        z = f.conv_bn_relu(y, nn.Identity(), self.norm1.fused())
        return f.conv_bn_relu(z, self.conv, self.norm2.fused()).tensor()


class StemPool(nn.Module):
    """maxpool(relu(bn(y)))."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.norm, self.kind, self.conv = _norm(kind, channels), kind, nn.Identity()

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "BN":
            return torch.max_pool2d(torch.relu_(self.norm(y)), 3, 2, 1)
        from fastres import functional

        return functional.max_pool(functional.conv_bn_relu(y, self.conv, self.norm.fused()))


class Shortcut(nn.Module):
    """A block of fastres, ``BasicBlock`` or ``Bottleneck``."""

    def __init__(self, name: str, channels_in: int, channels_out: int, stride: int, kind: str) -> None:
        super().__init__()
        import fastres

        layer = fastres.ResLayer(
            getattr(fastres, name), 1, channels_in, channels_out, stride=stride, norm_cfg=dict(type=kind)
        )
        self.block = layer[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class MomentEnd(nn.Module):
    """relu(bn3(conv3(relu(bn2(y)))) + x), conv3 a widening 1x1; with ``down`` bn(conv(x)) instead of x."""

    def __init__(self, channels: int, wide: int, down: int, stride: int, kind: str) -> None:
        super().__init__()
        self.norm2, self.norm3, self.kind = _norm(kind, channels), _norm(kind, wide), kind
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.conv, self.norm = None, None
        if down:
            self.conv, self.norm = nn.Conv2d(down, wide, 1, stride, bias=False), _norm(kind, wide)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        if self.kind == "BN":
            out = self.norm3(self.conv3(torch.relu_(self.norm2(y))))
            identity = x if self.conv is None else self.norm(self.conv(x))  # type: ignore[misc]
            return torch.relu_(out.add_(identity))
        from fastres import functional as f

        z = f.conv_bn_relu(y, nn.Identity(), self.norm2.fused())
        branch = f.conv_bn(z, self.conv3, self.norm3.fused())
        return f.add_relu(branch, x if self.conv is None else f.conv_bn(x, self.conv, self.norm.fused()))
