"""The ResNet backbone, with the arguments, attributes and state-dict keys of mmcls.

    backbone = ResNet(depth=50)                                  # norm_cfg=dict(type="FusedBN"): the fused norm
    backbone = ResNet(depth=50, norm_cfg=dict(type="BN"))        # eager PyTorch, the reference
    (features,) = backbone(images)                               # [N, 3, H, W] -> ([N, 2048, H / 32, W / 32],)

Keys are also those of torchvision's resnet18 ... resnet152, less ``fc.*``. Variants are in :mod:`fastres.variants`.
Source: K. He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastres._calling import listed, suggest
from fastres._casts import weight_casts
from fastres._fusable import check_input, check_values, hooked, norm_obstacle, observed, relu_obstacle
from fastres._network import run
from fastres._registry import MODELS, build_activation_layer, build_conv_layer, build_norm_layer
from fastres.functional import Linked, Pending, conv_bn_relu, inference_layout, materialize, max_pool
from fastres.initialize import BaseModule, InitCfg, constant_init
from fastres.modules import RELU, BasicBlock, Bottleneck, ResidualBlock, ResLayer, get_expansion

__all__ = ["ConvModule", "ResNet"]

FUSED_BN = dict(type="FusedBN", requires_grad=True)
INIT = (
    dict(type="Kaiming", layer=["Conv2d"]),
    dict(type="Constant", val=1, layer=["_BatchNorm", "GroupNorm"]),
)


class ConvModule(nn.Module):
    """Convolution, norm and activation under mmcv's names: ``conv``, ``bn`` (or what the norm's name is), ``activate``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: of the convolution, which has a bias where there is no
            norm.
        conv_cfg, norm_cfg, act_cfg: layer configs; no norm or activation where they are None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = RELU,
    ) -> None:
        super().__init__()
        self.conv = build_conv_layer(
            conv_cfg,
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            bias=norm_cfg is None,
        )
        self.norm_name = ""
        if norm_cfg is not None:
            self.norm_name, norm = build_norm_layer(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None if act_cfg is None else build_activation_layer(act_cfg)

    def fused_obstacle(self) -> str:
        """Why the norm and activation have to be called as modules, in words; empty where they are fused."""
        if not self.norm_name or self.activate is None:
            return "no norm" if not self.norm_name else "no activation"
        if obstacle := norm_obstacle(self._modules[self.norm_name]):  # type: ignore[arg-type]
            return f"{self.norm_name} {obstacle}"
        if obstacle := relu_obstacle(self.activate):
            return f"activate {obstacle}"
        return observed()

    def pending(self, x: Tensor | Pending) -> Tensor | Pending:
        """The output, not evaluated yet where it can be fused with what comes next."""
        if self.fused_obstacle():
            x = self.conv(materialize(x))
            if self.norm_name:
                x = self._modules[self.norm_name](x)  # type: ignore[misc]
            return x if self.activate is None else self.activate(x)
        return conv_bn_relu(x, self.conv, self._modules[self.norm_name].fused())  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        return materialize(self.pending(x))


@MODELS.register_module()
class ResNet(BaseModule):
    """ResNet backbone: stem and up to four stages of residual blocks.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the images.
        stem_channels: channels after the stem.
        base_channels: middle channels of the first stage's blocks.
        expansion: a block's output channels over its middle channels; default the block's own.
        num_stages: number of stages, 1 to 4.
        strides, dilations: of each stage.
        out_indices: the stages whose outputs are returned, 0 being the first.
        style: ``pytorch`` (stride on a Bottleneck's 3x3) or ``caffe`` (on its first 1x1).
        deep_stem: three 3x3 convolutions instead of the 7x7.
        avg_down: average pooling before the 1x1 of a downsample shortcut, instead of a stride.
        frozen_stages: freeze the stem (0) and stages up to this one (1 to 4): eval mode, no gradients. -1 freezes none.
        conv_cfg, norm_cfg: layer configs. ``norm_cfg=dict(type="BN")`` is eager PyTorch.
        norm_eval: keep every batch norm in eval mode during training.
        with_cp: checkpoint: recompute each block in the backward pass.
        zero_init_residual: ``init_weights`` zeroes the last norm of each block, not where a checkpoint is loaded.
        init_cfg: what ``init_weights`` does; see :mod:`fastres.initialize`.
        drop_path_rate: drop path of the last block; it rises linearly from 0 at the first.
        act_cfg: the activation, for stem and blocks.
        block: another block class than the depth's, or the name of one registered in ``MODELS``.
        pretrained: short for ``init_cfg=dict(type="Pretrained", checkpoint=pretrained)`` (mmdet, mmseg).
        contract_dilation: halve the dilation of each stage's first block (mmseg).
        multi_grid: dilation of each block of the last stage (mmseg).

    Raises:
        KeyError: unknown depth. TypeError: unknown arguments, with the near matches; no list where one is wanted.
        AssertionError: num_stages, strides, dilations, out_indices or frozen_stages out of range.
        ValueError: ``dcn`` or ``plugins`` (mmdet), which are not supported.

    Example:
        >>> import torch
        >>> net = ResNet(depth=18, out_indices=(1, 3), frozen_stages=1).eval()
        >>> [list(y.shape) for y in net(torch.randn(1, 3, 64, 64))]
        [[1, 128, 8, 8], [1, 512, 2, 2]]
    """

    arch_settings: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }
    stem_stride = 4  # stem convolution and pooling together

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int = 64,
        base_channels: int = 64,
        expansion: int | None = None,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (3,),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = FUSED_BN,
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        init_cfg: InitCfg | None = INIT,
        drop_path_rate: float = 0.0,
        *,
        act_cfg: dict[str, Any] = RELU,
        block: type[nn.Module] | str | None = None,
        pretrained: Any = None,
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
        **unknown: Any,
    ) -> None:
        op = type(self).__name__
        _refuse(op, unknown)
        if pretrained is not None:
            assert init_cfg is INIT or not init_cfg, (
                f"{op}: pretrained and init_cfg given; wanted one of them"
            )
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        super().__init__(init_cfg)
        if depth not in self.arch_settings:
            raise KeyError(f"{op}: depth is {depth!r}; wanted one of {listed(list(self.arch_settings))}")
        assert 1 <= num_stages <= 4, f"{op}: num_stages is {num_stages}; wanted 1 to 4"
        for name, values in (("strides", strides), ("dilations", dilations), ("out_indices", out_indices)):
            if not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
                raise TypeError(f"{op}: {name} is {values!r}; wanted a tuple or list of int")
            assert name == "out_indices" or len(values) == num_stages, (
                f"{op}: {name} is {values}; wanted num_stages = {num_stages} values"
            )
        assert out_indices and min(out_indices) >= 0 and max(out_indices) < num_stages, (
            f"{op}: out_indices is {out_indices}; wanted 0 to {num_stages - 1}"
        )
        assert -1 <= frozen_stages <= num_stages, (
            f"{op}: frozen_stages is {frozen_stages}; wanted -1 to {num_stages}"
        )
        self.depth = depth
        self.in_channels, self.stem_channels, self.base_channels = in_channels, stem_channels, base_channels
        self.num_stages, self.strides, self.dilations, self.out_indices = (
            num_stages,
            strides,
            dilations,
            out_indices,
        )
        self.style, self.deep_stem, self.avg_down, self.frozen_stages = (
            style,
            deep_stem,
            avg_down,
            frozen_stages,
        )
        self.conv_cfg, self.norm_cfg, self.act_cfg = conv_cfg, norm_cfg, act_cfg
        self.norm_eval, self.with_cp, self.zero_init_residual = norm_eval, with_cp, zero_init_residual
        arch_block, stage_blocks = self.arch_settings[depth]
        self.block: Any = arch_block if block is None else MODELS._resolve(block, op)
        self.stage_blocks = stage_blocks[:num_stages]
        self.expansion = get_expansion(self.block, expansion)

        self._make_stem_layer(in_channels, stem_channels)

        total = sum(self.stage_blocks)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        options: dict[str, Any] = {} if act_cfg is RELU else {"act_cfg": act_cfg}
        self.res_layers: list[str] = []
        channels, out_channels = stem_channels, base_channels * self.expansion
        for i, num_blocks in enumerate(self.stage_blocks):
            layer = self.make_res_layer(
                block=self.block,
                num_blocks=num_blocks,
                in_channels=channels,
                out_channels=out_channels,
                expansion=self.expansion,
                stride=strides[i],
                dilation=dilations[i],
                style=style,
                avg_down=avg_down,
                with_cp=with_cp,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                drop_path_rate=[rates.pop(0) for _ in range(num_blocks)],
                contract_dilation=contract_dilation,
                multi_grid=multi_grid if i == num_stages - 1 else None,
                **options,
            )
            self.res_layers.append(f"layer{i + 1}")
            self.add_module(self.res_layers[-1], layer)
            channels, out_channels = out_channels, out_channels * 2
        self.feat_dim = channels
        self._freeze_stages()

    @property
    def norm1(self) -> nn.Module:
        """The norm after conv1 of a plain stem."""
        return self._modules[self.norm1_name]  # type: ignore[return-value]

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Build one stage; a subclass may add to the arguments."""
        return ResLayer(**kwargs)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        configs: dict[str, Any] = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        if self.deep_stem:
            half = stem_channels // 2
            self.stem = nn.Sequential(
                ConvModule(in_channels, half, 3, stride=2, padding=1, **configs),
                ConvModule(half, half, 3, padding=1, **configs),
                ConvModule(half, stem_channels, 3, padding=1, **configs),
            )
        else:
            self._make_conv1(in_channels, stem_channels, kernel_size=7, stride=2, padding=3)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _make_conv1(self, in_channels: int, stem_channels: int, **geometry: int) -> None:
        self.conv1 = build_conv_layer(self.conv_cfg, in_channels, stem_channels, bias=False, **geometry)
        self.norm1_name, norm = build_norm_layer(self.norm_cfg, stem_channels, postfix=1)
        self.add_module(self.norm1_name, norm)
        self.relu = build_activation_layer(self.act_cfg)

    # ------------------------------------------------------------------------------------------------------ forward

    def stem_obstacle(self) -> str:
        """Why norm, activation or pooling of the stem are called as modules, in words; empty where they are fused."""
        if self.deep_stem:
            return next((f"stem.{i} {o}" for i, m in enumerate(self.stem) if (o := m.fused_obstacle())), "")  # type: ignore[operator]
        if obstacle := norm_obstacle(self.norm1):
            return f"{self.norm1_name} {obstacle}"
        if obstacle := relu_obstacle(self.relu):
            return f"relu {obstacle}"
        return observed()

    def _stem(self, x: Tensor) -> Tensor | Pending:
        """The stem before its pooling."""
        if self.deep_stem:
            if type(self.stem) is not nn.Sequential or hooked(self.stem):
                return self.stem(x)
            z: Tensor | Pending = x
            for module in self.stem:
                plain = type(module) is ConvModule and not hooked(module)
                z = module.pending(z) if plain else module(materialize(z))  # type: ignore[operator]
            return z
        if self.stem_obstacle():
            return self.relu(self.norm1(self.conv1(x)))
        return conv_bn_relu(x, self.conv1, self.norm1.fused())  # type: ignore[operator]

    def _pool(self, z: Tensor | Pending) -> Tensor:
        pool = self.maxpool
        # Anything else than the pooling that was built is called as a module.
        if type(pool) is nn.MaxPool2d and not hooked(pool) and not observed():
            geometry = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            if geometry == (3, 2, 1, 1) and not pool.ceil_mode and not pool.return_indices:
                return max_pool(z)
        return pool(materialize(z))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [N, in_channels, H, W] to one feature map for each of ``out_indices``.

        Raises:
            TypeError, ValueError: naming the argument, before any running statistics change.
        """
        self._check(x)
        with weight_casts(self, x):
            return run(self, x, self._evaluate)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, ...]:
        inner = self._inner(x)
        outs = self._stages(self._pool(self._stem(inner)))
        return outs if inner is x else tuple(out.contiguous() for out in outs)

    def _inner(self, x: Tensor) -> Tensor:
        """The images in the layout that the network runs in: channels_last where inference on NCHW gains by it."""
        return x if self.training or self.stem_obstacle() else inference_layout(x)

    def _stages(self, x: Tensor) -> tuple[Tensor, ...]:
        outs: list[Tensor] = []
        last = len(self.res_layers) - 1
        between: Tensor | Linked = x
        for i, name in enumerate(self.res_layers):
            layer = self._modules[name]
            if type(layer) is ResLayer and not hooked(layer) and not observed():
                between = layer.chained(between, linked=i < last and i not in self.out_indices)
            else:
                between = layer(materialize(between))  # type: ignore[misc]
            if i in self.out_indices:
                outs.append(materialize(between))
        return tuple(outs)

    def _check(self, x: Any) -> None:
        op = type(self).__name__
        first = getattr(self.stem[0], "conv", self.stem[0]) if self.deep_stem else self.conv1
        check_input(op, x, first)
        if self.training and x.shape[0] == 1:
            stride = self.stem_stride
            for i, name in enumerate(self.res_layers):
                stride *= self.strides[i]
                check_values(op, x, stride, self._modules[name], f"{name}.")  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------ freezing and initialising

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            frozen: list[nn.Module] = [self.stem] if self.deep_stem else [self.conv1, self.norm1]
            frozen += [getattr(self, name) for name in self.res_layers[: self.frozen_stages]]
            for module in frozen:
                module.eval()
                for parameter in module.parameters():
                    parameter.requires_grad = False

    def train(self, mode: bool = True) -> ResNet:
        """As ``nn.Module.train``, but frozen stages, and with ``norm_eval`` every batch norm, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Apply ``init_cfg``, then ``zero_init_residual``."""
        first = not self.is_init
        super().init_weights()
        if first and self.zero_init_residual and not self.loads_checkpoint:
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    constant_init(module.last_norm, 0)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer number of a parameter and number of layers, for layer-wise learning rates.

        The stem is 0; stages 1 and 4 are one layer each; in stages 2 and 3 two and three blocks are a layer (depth 152:
        four); what is not below ``prefix``, as a head, comes last.
        """
        second, third = (4, 4) if self.depth == 152 else (2, 3)
        sizes = (self.stage_blocks[0], second, third, 3)[: len(self.stage_blocks)]
        groups = [-(-blocks // size) for blocks, size in zip(self.stage_blocks, sizes, strict=True)]
        last = 1 + sum(groups)
        if not param_name.startswith(prefix):
            return last, last + 1
        stage, _, rest = param_name.removeprefix(prefix).removeprefix(".").partition(".")
        if stage not in self.res_layers:
            return 0, last + 1
        i = self.res_layers.index(stage)
        return 1 + sum(groups[:i]) + int(rest.split(".", 1)[0]) // sizes[i], last + 1


_UNSUPPORTED = ("dcn", "plugins", "stage_with_dcn")  # mmdet's and mmseg's, allowed where they are off


def _refuse(op: str, unknown: dict[str, Any]) -> None:
    """ValueError for what mmdet has and fastres has not; TypeError for other unknown arguments."""
    for key, value in unknown.items():
        if key not in _UNSUPPORTED:
            known = ResNet.__init__.__annotations__
            raise TypeError(f"{op}: unknown argument {key!r}{suggest(key, known)}")
        if value and not (isinstance(value, tuple | list) and not any(value)):
            raise ValueError(f"{op}: {key} is {value!r}; wanted None: {key} is not supported")
