"""Residual blocks and layers, in the terms of mmcls: ``BasicBlock``, ``Bottleneck``, ``ResLayer``.

Sources: K. He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; dilation and ``multi_grid``:
L.-C. Chen et al., arXiv:1706.05587; ``avg_down``: T. He et al., arXiv:1812.01187.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres._fusable import hooked
from fastres._norm import DropPath, FusedBatchNorm2d, FusedSyncBatchNorm, convert_sync_batchnorm
from fastres._registry import MODELS, build_conv_layer, build_norm_layer
from fastres._residual import ResidualBlock, norm_property
from fastres.functional import Linked, Pending, add_relu, add_relu_linked, conv_bn, conv_bn_relu, materialize
from fastres.initialize import InitCfg

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DropPath",
    "FusedBatchNorm2d",
    "FusedSyncBatchNorm",
    "ResLayer",
    "ResidualBlock",
    "convert_sync_batchnorm",
    "get_expansion",
]

FUSED_BN = dict(type="FusedBN")
RELU = dict(type="ReLU", inplace=True)


# ------------------------------------------------------------------------------------------------------------ blocks


def get_expansion(block: Any, expansion: int | None = None) -> int:
    """Output channels of a block over its middle channels: ``expansion`` if given, else the block's own ``expansion``,
    else 1 for a :class:`BasicBlock` and 4 for a :class:`Bottleneck`.

    AssertionError for less than 1; TypeError for another type, or a block that does not tell."""
    if isinstance(expansion, int) and not isinstance(expansion, bool):
        assert expansion > 0, f"get_expansion: expansion is {expansion}; wanted at least 1"
        return expansion
    if expansion is not None:
        raise TypeError(f"get_expansion: expansion is {expansion!r}; wanted an int or None")
    if hasattr(block, "expansion"):
        return block.expansion
    for base, value in ((BasicBlock, 1), (Bottleneck, 4)):
        if isinstance(block, type) and issubclass(block, base):
            return value
    raise TypeError(f"get_expansion: {block!r} has no attribute 'expansion'; wanted one, or expansion=")


@MODELS.register_module()
class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and the shortcut (ResNet-18, 34).

    Args:
        in_channels, out_channels: channels of input and output.
        expansion: 1.
        stride: of the first convolution.
        dilation: of the first convolution.
        downsample: module for the shortcut, or None.
        style: unused; both styles are one here.
        with_cp: checkpoint: recompute the block in the backward pass.
        conv_cfg, norm_cfg, act_cfg: layer configs.
        drop_path_rate: probability of dropping the branch of a sample in training.
        init_cfg: as :class:`fastres.initialize.BaseModule`.
    """

    convs = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int = 1,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: str = "pytorch",
        with_cp: bool = False,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = FUSED_BN,
        drop_path_rate: float = 0.0,
        act_cfg: dict[str, Any] = RELU,
        init_cfg: InitCfg | None = None,
    ) -> None:
        assert expansion == 1, f"BasicBlock: expansion is {expansion}; wanted 1"
        first = dict(in_channels=in_channels, out_channels=out_channels, kernel_size=3, stride=stride)
        first |= dict(padding=dilation, dilation=dilation)
        second = dict(in_channels=out_channels, out_channels=out_channels, kernel_size=3, padding=1)
        super().__init__(
            in_channels, out_channels, expansion, stride, dilation, downsample, style, with_cp, conv_cfg, norm_cfg,
            drop_path_rate, act_cfg, init_cfg, (first, second),
        )  # fmt: skip

    def _fused(self, x: Tensor) -> Tensor:
        z = conv_bn_relu(x, self.conv1, self.norm1.fused())
        return add_relu(conv_bn(z, self.conv2, self.norm2.fused()), self._identity(x), self._keep(x))

    def _eager(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        return self._add(self.norm2(self.conv2(out)), x)


@MODELS.register_module()
class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution and the shortcut (ResNet-50, 101, 152).

    Args:
        in_channels, out_channels: channels of input and output; out_channels a multiple of ``expansion``.
        expansion: output channels over middle channels.
        stride: of the 3x3 (style ``pytorch``) or of the first 1x1 (style ``caffe``).
        dilation: of the 3x3.
        groups, mid_channels: of the 3x3; default 1 and out_channels // expansion.
        downsample, with_cp, conv_cfg, norm_cfg, drop_path_rate, act_cfg, init_cfg: as :class:`BasicBlock`.
    """

    convs = 3
    conv3: nn.Module
    norm3: Any = norm_property(3)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int = 4,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: str = "pytorch",
        with_cp: bool = False,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = FUSED_BN,
        drop_path_rate: float = 0.0,
        act_cfg: dict[str, Any] = RELU,
        init_cfg: InitCfg | None = None,
        *,
        groups: int = 1,
        mid_channels: int | None = None,
    ) -> None:
        assert style in ("pytorch", "caffe"), f"Bottleneck: style is {style!r}; wanted 'pytorch' or 'caffe'"
        assert out_channels % expansion == 0, (
            f"Bottleneck: out_channels is {out_channels}; wanted a multiple of expansion, {expansion}"
        )
        mid = out_channels // expansion if mid_channels is None else mid_channels
        strides = (1, stride) if style == "pytorch" else (stride, 1)
        first = dict(in_channels=in_channels, out_channels=mid, kernel_size=1, stride=strides[0])
        second = dict(in_channels=mid, out_channels=mid, kernel_size=3, stride=strides[1])
        second |= dict(padding=dilation, dilation=dilation)
        if groups != 1:
            second["groups"] = groups
        third = dict(in_channels=mid, out_channels=out_channels, kernel_size=1)
        super().__init__(
            in_channels, out_channels, expansion, stride, dilation, downsample, style, with_cp, conv_cfg, norm_cfg,
            drop_path_rate, act_cfg, init_cfg, (first, second, third),
        )  # fmt: skip
        self.conv1_stride, self.conv2_stride = strides

    def _fused(self, x: Tensor) -> Tensor:
        return add_relu(self._branch(x), self._identity(x), self._keep(x))

    def _branch(self, x: Tensor | Linked) -> Pending:
        z = conv_bn_relu(x, self.conv1, self.norm1.fused())
        z = conv_bn_relu(z, self.conv2, self.norm2.fused())
        return conv_bn(z, self.conv3, self.norm3.fused())

    def links(self) -> bool:
        """Whether ``chained`` may be called in place of the module."""
        plain = type(self)._fused is Bottleneck._fused and type(self).forward is ResidualBlock.forward
        return plain and not self.with_cp and not hooked(self) and not self.fused_obstacle()

    def chained(self, x: Tensor | Linked, linked: bool) -> Tensor | Linked:
        """As the module, between blocks: takes what the block before gives; with ``linked`` nothing but the next block
        will see the result."""
        self._check(x.out if isinstance(x, Linked) else x)
        end = add_relu_linked if linked else add_relu
        return end(self._branch(x), self._identity(x), self._keep(x))

    def _eager(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        return self._add(self.norm3(self.conv3(out)), x)


class ResLayer(nn.Sequential):
    """One stage: ``num_blocks`` blocks, the first with the stage's stride and, where needed, a downsample shortcut.

    Args:
        block: the block class, or the name of one registered in ``MODELS``.
        num_blocks: number of blocks.
        in_channels, out_channels: channels of the stage's input and output.
        expansion: as :func:`get_expansion`.
        stride: of the first block.
        avg_down: downsample by average pooling before the 1x1 convolution, instead of a strided one.
        conv_cfg, norm_cfg: layer configs.
        drop_path_rate: one rate, or one for each block.
        contract_dilation: halve the first block's dilation (mmseg).
        multi_grid: each block's dilation, instead of ``dilation`` (mmseg).
        **kwargs: for every block (``dilation``, ``style``, ``with_cp``, ``act_cfg``, ...).

    Raises:
        AssertionError: a list of another length than ``num_blocks``.
    """

    def __init__(
        self,
        block: type[nn.Module] | str,
        num_blocks: int,
        in_channels: int,
        out_channels: int,
        expansion: int | None = None,
        stride: int = 1,
        avg_down: bool = False,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = FUSED_BN,
        drop_path_rate: float | Sequence[float] = 0.0,
        *,
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        block_class = MODELS._resolve(block, "ResLayer")
        rates = (
            [drop_path_rate] * num_blocks if isinstance(drop_path_rate, int | float) else list(drop_path_rate)
        )
        assert len(rates) == num_blocks, (
            f"ResLayer: {len(rates)} drop path rates; wanted {num_blocks}, one a block"
        )
        dilation = kwargs.pop("dilation", 1)
        dilations = [dilation] * num_blocks if multi_grid is None else list(multi_grid)
        assert len(dilations) == num_blocks, (
            f"ResLayer: multi_grid is {multi_grid}; wanted {num_blocks} dilations"
        )
        if multi_grid is None and contract_dilation and dilation > 1:
            dilations[0] = dilation // 2
        self.block = block_class
        self.expansion = get_expansion(block_class, expansion)
        layers = []
        for i in range(num_blocks):
            options = dict(kwargs)
            if i == 0:
                options["downsample"] = _downsample(
                    in_channels, out_channels, stride, avg_down, conv_cfg, norm_cfg
                )
            # Left out where they say nothing, so that a user's block need not know them.
            if dilations[i] != 1:
                options["dilation"] = dilations[i]
            if rates[i] > 0:
                options["drop_path_rate"] = rates[i]
            layers.append(
                block_class(
                    in_channels=in_channels if i == 0 else out_channels,
                    out_channels=out_channels,
                    expansion=self.expansion,
                    stride=stride if i == 0 else 1,
                    conv_cfg=conv_cfg,
                    norm_cfg=norm_cfg,
                    **options,
                )
            )
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] through the blocks, one after the other."""
        return materialize(self.chained(x, False))

    def chained(self, x: Tensor | Linked, linked: bool) -> Tensor | Linked:
        """As the module, between stages: see :meth:`Bottleneck.chained`."""
        last = len(self) - 1
        for i, block in enumerate(self):
            if isinstance(block, Bottleneck) and block.links():
                x = block.chained(x, linked or i < last)
            else:
                x = block(materialize(x))
        return x


def _downsample(
    in_channels: int,
    out_channels: int,
    stride: int,
    avg_down: bool,
    conv_cfg: dict[str, Any] | None,
    norm_cfg: dict[str, Any],
) -> nn.Module | None:
    """[average pooling], 1x1 convolution and norm where the shortcut changes shape, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    pool = avg_down and stride != 1
    conv = build_conv_layer(
        conv_cfg, in_channels, out_channels, kernel_size=1, stride=1 if pool else stride, bias=False
    )
    layers: list[nn.Module] = [conv, build_norm_layer(norm_cfg, out_channels)[1]]
    if pool:
        layers.insert(0, nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
    return nn.Sequential(*layers)
