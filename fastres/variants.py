"""Variants of ResNet: V1c, V1d, the CIFAR stem, ResNeXt and SE-ResNet.

Sources: T. He et al., "Bag of Tricks for Image Classification", arXiv:1812.01187 (V1c, V1d); S. Xie et al., "Aggregated
Residual Transformations", arXiv:1611.05431 (ResNeXt); J. Hu et al., "Squeeze-and-Excitation Networks",
arXiv:1709.01507 (SE).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastres._registry import MODELS
from fastres.functional import Pending, add_relu, conv_bn, conv_bn_relu, materialize
from fastres.initialize import BaseModule, InitCfg
from fastres.models import ConvModule, ResNet
from fastres.modules import Bottleneck

__all__ = [
    "ResNeXt",
    "ResNeXtBottleneck",
    "ResNetV1c",
    "ResNetV1d",
    "ResNet_CIFAR",
    "SEBottleneck",
    "SELayer",
    "SEResNet",
]


@MODELS.register_module()
class ResNetV1c(ResNet):
    """ResNet with a deep stem. Arguments by keyword, as :class:`ResNet`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


@MODELS.register_module()
class ResNetV1d(ResNet):
    """ResNet with a deep stem and average pooling in the downsample shortcuts. By keyword, as :class:`ResNet`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=True, **kwargs)


@MODELS.register_module()
class ResNet_CIFAR(ResNet):
    """ResNet for small images: the stem is a 3x3 convolution of stride 1, without pooling.

    Args:
        depth: as :class:`ResNet`.
        deep_stem: False.
        **kwargs: as :class:`ResNet`.
    """

    stem_stride = 1

    def __init__(self, depth: int, deep_stem: bool = False, **kwargs: Any) -> None:
        assert not deep_stem, (
            "ResNet_CIFAR: deep_stem is True; wanted False: there is no deep stem for small images"
        )
        super().__init__(depth, deep_stem=False, **kwargs)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        self._make_conv1(in_channels, stem_channels, kernel_size=3, stride=1, padding=1)

    def _pool(self, z: Tensor | Pending) -> Tensor:
        return materialize(z)


@MODELS.register_module()
class ResNeXtBottleneck(Bottleneck):
    """Bottleneck with a grouped 3x3 of ``groups * width_per_group * mid // base_channels`` channels.

    Args:
        in_channels, out_channels: channels of input and output.
        base_channels: middle channels of the first stage's blocks in a plain ResNet.
        groups: of the 3x3.
        width_per_group: channels of a group in the first stage.
        expansion, **kwargs: as :class:`fastres.modules.Bottleneck`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int = 64,
        groups: int = 32,
        width_per_group: int = 4,
        expansion: int = 4,
        **kwargs: Any,
    ) -> None:
        mid = out_channels // expansion
        if groups != 1:
            assert mid % base_channels == 0, (
                f"ResNeXtBottleneck: {mid} middle channels; wanted a multiple of base_channels, {base_channels}"
            )
            mid = groups * width_per_group * mid // base_channels
        super().__init__(in_channels, out_channels, expansion, groups=groups, mid_channels=mid, **kwargs)
        self.groups, self.width_per_group = groups, width_per_group


_ARCH = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@MODELS.register_module()
class ResNeXt(ResNet):
    """ResNeXt 50, 101, 152.

    Args:
        depth: 50, 101 or 152.
        groups, width_per_group: as :class:`ResNeXtBottleneck`; the defaults are 32x4d.
        **kwargs: as :class:`ResNet`.
    """

    arch_settings = {depth: (ResNeXtBottleneck, blocks) for depth, blocks in _ARCH.items()}

    def __init__(self, depth: int, groups: int = 32, width_per_group: int = 4, **kwargs: Any) -> None:
        # Not on self yet: nn.Module.__init__ comes first, and the stages are made inside it.
        self.block_options = dict(groups=groups, width_per_group=width_per_group)
        super().__init__(depth, **kwargs)
        self.groups, self.width_per_group = groups, width_per_group

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """One stage of grouped blocks."""
        return super().make_res_layer(base_channels=self.base_channels, **self.block_options, **kwargs)


class SELayer(BaseModule):
    """Squeeze and excitation: scale each channel by a factor made of all channels' means.

    Args:
        channels: channels of input and output.
        ratio: channels over hidden channels; those are rounded to a multiple of 8, down by a tenth at most.
        conv_cfg: config of the two 1x1 convolutions.
        init_cfg: as :class:`fastres.initialize.BaseModule`.
    """

    def __init__(
        self,
        channels: int,
        ratio: int = 16,
        conv_cfg: dict[str, Any] | None = None,
        init_cfg: InitCfg | None = None,
    ) -> None:
        super().__init__(init_cfg)
        wanted = channels // ratio
        hidden = max(8, (wanted + 4) // 8 * 8)
        hidden += 8 if hidden < 0.9 * wanted else 0
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = ConvModule(channels, hidden, 1, conv_cfg=conv_cfg)
        self.conv2 = ConvModule(hidden, channels, 1, conv_cfg=conv_cfg, act_cfg=dict(type="Sigmoid"))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same."""
        return x * self.conv2(self.conv1(self.global_avgpool(x)))


@MODELS.register_module()
class SEBottleneck(Bottleneck):
    """Bottleneck with a squeeze-and-excitation layer after its last norm.

    Args:
        in_channels, out_channels: channels of input and output.
        se_ratio: ``ratio`` of :class:`SELayer`.
        **kwargs: as :class:`fastres.modules.Bottleneck`.
    """

    def __init__(self, in_channels: int, out_channels: int, se_ratio: int = 16, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.se_layer = SELayer(out_channels, ratio=se_ratio, conv_cfg=self.conv_cfg)

    def _fused(self, x: Tensor) -> Tensor:
        z = conv_bn_relu(x, self.conv1, self.norm1.fused())
        z = conv_bn_relu(z, self.conv2, self.norm2.fused())
        branch = self.se_layer(materialize(conv_bn(z, self.conv3, self.norm3.fused())))
        return add_relu(branch, self._identity(x), self._keep(x))

    def _eager(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        return self._add(self.se_layer(self.norm3(self.conv3(out))), x)


@MODELS.register_module()
class SEResNet(ResNet):
    """SE-ResNet 50, 101, 152.

    Args:
        depth: 50, 101 or 152.
        se_ratio: ``ratio`` of :class:`SELayer`.
        **kwargs: as :class:`ResNet`.
    """

    arch_settings = {depth: (SEBottleneck, blocks) for depth, blocks in _ARCH.items()}

    def __init__(self, depth: int, se_ratio: int = 16, **kwargs: Any) -> None:
        self.block_options = dict(se_ratio=se_ratio)
        super().__init__(depth, **kwargs)
        self.se_ratio = se_ratio

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """One stage of SE blocks."""
        return super().make_res_layer(**self.block_options, **kwargs)
