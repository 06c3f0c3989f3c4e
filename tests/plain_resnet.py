"""A ResNet from torch.nn alone, written without a look at fastres: the reference for whole blocks and nets.

Only the names of its parameters are chosen to agree, so that one's state dict loads into the other.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Squeeze(nn.Module):
    """Squeeze-and-excitation with ``hidden`` channels in the middle."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, hidden, 1)))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, channels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.conv1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv2(s))


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, or of 1x1, 3x3, 1x1 where ``mid`` differs from ``cout``."""

    def __init__(
        self,
        cin: int,
        cout: int,
        mid: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        caffe: bool = False,
        avg_down: bool = False,
        groups: int = 1,
        squeeze: int = 0,
    ) -> None:
        super().__init__()
        if mid is None:
            shapes = [(cin, cout, 3, stride, dilation, 1), (cout, cout, 3, 1, 1, 1)]
        else:
            s1, s2 = (stride, 1) if caffe else (1, stride)
            shapes = [(cin, mid, 1, s1, 1, 1), (mid, mid, 3, s2, dilation, groups), (mid, cout, 1, 1, 1, 1)]
        self.count = len(shapes)
        for i, (a, b, k, s, d, g) in enumerate(shapes, 1):
            conv = nn.Conv2d(a, b, k, s, padding=d * (k // 2), dilation=d, groups=g, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride != 1 or cin != cout:
            pool = (
                [nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)]
                if avg_down and stride > 1
                else []
            )
            conv = nn.Conv2d(cin, cout, 1, 1 if pool else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(cout))
        self.se_layer = Squeeze(cout, squeeze) if squeeze else None

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for i in range(1, self.count + 1):
            z = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(z))
            if i < self.count:
                z = torch.relu(z)
        if self.se_layer is not None:
            z = self.se_layer(z)
        return torch.relu(z + (x if self.downsample is None else self.downsample(x)))


class PlainResNet(nn.Module):
    """Stem and stages; returns the outputs of all stages.

    ``width`` is the first stage's middle channels; ``group_width`` > 0 makes it a ResNeXt with ``groups`` groups;
    ``se`` > 0 is the squeeze ratio.
    """

    def __init__(
        self,
        depth: int,
        width: int = 64,
        stem: int = 64,
        in_channels: int = 3,
        strides: tuple[int, ...] = (1, 2, 2, 2),
        dilations: tuple[int, ...] = (1, 1, 1, 1),
        caffe: bool = False,
        deep_stem: bool = False,
        avg_down: bool = False,
        cifar: bool = False,
        groups: int = 1,
        group_width: int = 0,
        se: int = 0,
    ) -> None:
        super().__init__()
        self.pool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.deep = deep_stem
        if deep_stem:
            shapes = [(in_channels, stem // 2, 2), (stem // 2, stem // 2, 1), (stem // 2, stem, 1)]
            self.stem = nn.Sequential(
                *[
                    nn.Sequential(
                        OrderedDict(
                            conv=nn.Conv2d(a, b, 3, s, 1, bias=False),
                            bn=nn.BatchNorm2d(b),
                            activate=nn.ReLU(),
                        )
                    )
                    for a, b, s in shapes
                ]
            )
        else:
            k, s, p = (3, 1, 1) if cifar else (7, 2, 3)
            self.conv1 = nn.Conv2d(in_channels, stem, k, s, p, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
        cin = stem
        for i, (blocks, stride, dilation) in enumerate(zip(BLOCKS[depth], strides, dilations, strict=False)):
            inner = width * 2**i
            cout = inner if depth < 50 else 4 * inner
            mid = None if depth < 50 else groups * group_width * inner // width if group_width else inner
            layers = []
            for j in range(blocks):
                squeeze = max(8, round(cout / se / 8) * 8) if se else 0
                layers.append(
                    Block(cin, cout, mid, stride if j == 0 else 1, dilation, caffe, avg_down, groups, squeeze)
                )
                cin = cout
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.stages = len(strides)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.pool(self.stem(x) if self.deep else torch.relu(self.bn1(self.conv1(x))))
        outs = []
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
            outs.append(x)
        return tuple(outs)
