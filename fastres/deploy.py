"""A permanent copy of a model without batch norms, for deployment.

    net = fastres.fold(model)                    # eval mode, no gradients, no batch norm, nothing shared with model

The live model needs none of this: in eval mode without gradients its norms are folded by themselves. The copy is for
what looks at a model's modules and operators: ``torch.compile``, ``torch.export``, ONNX, quantisers. Its convolutions
have a bias and know what follows them, so its graph is convolutions, additions and ReLUs, and where it runs eagerly it
takes the same fused routes as the live model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastres._foldable import inference_layout
from fastres._fusable import hooked, relu_obstacle
from fastres._inference import conv_add_relu
from fastres._matching import make_plan
from fastres._network import run
from fastres._norm import FusedNorm
from fastres._reading import NotUnderstood
from fastres.convert import FusedForward, unfuse_
from fastres.kernels.folded_conv import fold as folded_weight
from fastres.models import ConvModule, ResNet
from fastres.modules import BasicBlock, Bottleneck, ResidualBlock
from fastres.variants import ResNet_CIFAR, ResNeXtBottleneck, SEBottleneck

__all__ = ["FoldedBlock", "FoldedConv2d", "FoldedResNet", "fold"]

_BLOCKS = (BasicBlock, Bottleneck, ResNeXtBottleneck, SEBottleneck)
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, FusedNorm.forward)


class FoldedConv2d(nn.Conv2d):
    """A convolution with its norm folded in, and what follows: ``relu(conv(x) + other)``.

    Args:
        conv: the convolution.
        norm: the batch norm behind it, with running statistics; None for none.
        relu: end in a ReLU.
    """

    is_plain_convolution = True

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm | None = None, relu: bool = False) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, True, conv.padding_mode, device="meta",
        )  # fmt: skip
        n, dtype = norm, conv.weight.dtype
        mean, var = (None, None) if n is None else (n.running_mean, n.running_var)
        gamma, beta, eps = (None, None, 0.0) if n is None else (n.weight, n.bias, n.eps)
        with torch.no_grad():
            weight, bias = folded_weight(conv.weight, conv.bias, gamma, beta, mean, var, eps, dtype, dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.relu = relu
        self.inner = False  # inside a residual branch, see kernels/folded_conv.py

    def forward(self, input: Tensor, other: Tensor | None = None, own: bool = False) -> Tensor:
        """[N, C, H, W], and what is added to the result; ``own``: that may be overwritten."""
        return conv_add_relu(input, self, self.relu, other, own, self.inner)

    def extra_repr(self) -> str:
        """torch's, and ``relu=True`` where it is."""
        return super().extra_repr() + (", relu=True" if self.relu else "")


class FoldedBlock(nn.Module):
    """A residual block of :class:`FoldedConv2d`: ``conv1``, ``conv2``, perhaps ``conv3``; the last one adds."""

    def __init__(
        self, convs: list[FoldedConv2d], downsample: nn.Module | None, se_layer: nn.Module | None
    ) -> None:
        super().__init__()
        self.count = len(convs)
        end = downsample[0] if isinstance(downsample, nn.Sequential) and len(downsample) == 1 else downsample
        carried = end is None or isinstance(end, FoldedConv2d) and end.stride == (1, 1)
        for i, conv in enumerate(convs, 1):
            conv.inner = i < self.count and se_layer is None and carried
            self.add_module(f"conv{i}", conv)
        self.downsample, self.se_layer = downsample, se_layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the block's output."""
        z = x
        for i in range(1, self.count):
            z = self._modules[f"conv{i}"](z)  # type: ignore[misc]
        last = self._modules[f"conv{self.count}"]
        assert isinstance(last, FoldedConv2d)
        identity, own = x, False
        if self.downsample is not None:
            identity = self.downsample(x)
            end = self.downsample[-1] if isinstance(self.downsample, nn.Sequential) else self.downsample
            own = isinstance(end, FoldedConv2d) and not hooked(end) and not hooked(self.downsample)
        if self.se_layer is not None:
            return torch.relu(self.se_layer(last(z)) + identity)
        return last(z, identity, own)


class FoldedResNet(nn.Module):
    """The backbone: stem, pooling where there is one, stages; the attributes that necks and heads look at."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        if net.deep_stem:
            self.stem = net.stem
        else:
            self.conv1 = FoldedConv2d(net.conv1, net.norm1, relu=True)  # type: ignore[arg-type]
        self.maxpool = None if isinstance(net, ResNet_CIFAR) else net.maxpool
        for name in net.res_layers:
            self.add_module(name, net._modules[name])
        self.deep_stem, self.res_layers, self.out_indices = (
            net.deep_stem,
            list(net.res_layers),
            net.out_indices,
        )
        self.depth, self.num_stages, self.feat_dim = net.depth, net.num_stages, net.feat_dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [N, in_channels, H, W] to one feature map for each of ``out_indices``."""
        return run(self, x, self._forward)

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inner = inference_layout(x)
        nchw = inner is not x
        x = self.stem(inner) if self.deep_stem else self.conv1(inner)
        x = x if self.maxpool is None else self.maxpool(x)
        outs = []
        for i, name in enumerate(self.res_layers):
            x = self._modules[name](x)  # type: ignore[misc]
            if i in self.out_indices:
                outs.append(x.contiguous() if nchw else x)
        return tuple(outs)


def _pair(conv: Any, norm: Any) -> bool:
    """Whether a norm can be folded into the convolution before it, and neither does more than its class."""
    return (
        type(conv) is nn.Conv2d
        and isinstance(norm, _BatchNorm)
        and type(norm).forward in _FORWARDS
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and not hooked(conv)
        and not hooked(norm)
    )


def _act(norm: Any) -> bool:
    return bool(getattr(norm, "relu", False))


def _block(block: ResidualBlock) -> nn.Module | None:
    """A block of ours, folded whole; None where a part of it is not what it was built as."""
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"norm{i}")) for i in range(1, block.convs + 1)]
    plain = (
        type(block) in _BLOCKS
        and not hooked(block)
        and not relu_obstacle(block.relu)
        and not hooked(block.drop_path)
    )
    if not plain or not all(_pair(c, n) and not _act(n) for c, n in pairs):
        return None
    se_layer = getattr(block, "se_layer", None)
    convs = [FoldedConv2d(c, n, i < len(pairs)) for i, (c, n) in enumerate(pairs, 1)]
    convs[-1].relu = se_layer is None
    return FoldedBlock(convs, block.downsample, se_layer)


def _stem_module(module: ConvModule) -> nn.Module | None:
    norm = module._modules.get(module.norm_name) if module.norm_name else None
    if hooked(module) or not _pair(module.conv, norm) or _act(norm):
        return None
    relu = module.activate is not None and not relu_obstacle(module.activate)
    conv = FoldedConv2d(module.conv, norm, relu)  # type: ignore[arg-type]
    if relu or module.activate is None:
        return conv
    return nn.Sequential(conv, module.activate)


def _resnet(net: ResNet) -> nn.Module | None:
    ours = type(net).forward in (ResNet.forward, ResNet_CIFAR.forward) and not hooked(net)
    if not ours or (not net.deep_stem and not (_pair(net.conv1, net.norm1) and not relu_obstacle(net.relu))):
        return None
    return FoldedResNet(net)


def _by_plan(module: nn.Module) -> None:
    """Fold the pairs in somebody else's module; its forward goes on, with an identity where the norm was."""
    try:
        steps = make_plan(module).steps
    except NotUnderstood:
        return
    used = Counter(name for step in steps for name in (step.conv, step.norm, step.name) if name)
    for step in steps:
        conv, norm = module._modules.get(step.conv), module._modules.get(step.norm)
        once = used[step.conv] == used[step.norm] == 1
        if step.kind == "norm" and once and _pair(conv, norm):
            module._modules[step.conv] = FoldedConv2d(conv, norm, _act(norm))  # type: ignore[arg-type]
            module._modules[step.norm] = nn.Identity()
    if type(module) is nn.Sequential and not hooked(module):
        for name in [n for n, m in module._modules.items() if type(m) is nn.Identity]:
            del module._modules[name]


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        module._modules[name] = _fold(child)
    new: nn.Module | None = None
    if isinstance(module, ResidualBlock):
        new = _block(module)
    elif isinstance(module, ConvModule):
        new = _stem_module(module)
    elif isinstance(module, ResNet):
        new = _resnet(module)
    if new is not None:
        return new
    if any(isinstance(child, _BatchNorm) for child in module.children()):
        _by_plan(module)
    return module


def _left(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield f"{path or '(model)'} ({type(module).__name__})"


def fold(model: nn.Module, strict: bool = True) -> nn.Module:
    """A copy of ``model`` with every batch norm folded into the convolution before it.

    Args:
        model: any module; one of ours, one that :func:`fastres.fuse_` has changed, torchvision's, timm's. It is left as
            it is.
        strict: a batch norm that cannot be folded (nothing but a convolution may stand before it, and it needs running
            statistics) is an error; else it stays in the copy. Other norms always stay.

    Returns:
        The copy, in eval mode, its parameters without gradients. Parts of ours are :class:`FoldedResNet`,
        :class:`FoldedBlock` and :class:`FoldedConv2d`; somebody else's modules keep their forward and have an
        ``nn.Identity`` where the norm was.

    Raises:
        TypeError: not a module. ValueError: with ``strict``, norms that cannot be folded; named.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: model is {type(model).__name__}; wanted an nn.Module")
    new = copy.deepcopy(model).eval()
    if any(isinstance(m, FusedForward) for m in new.modules()):
        unfuse_(new)
    new = _fold(new).eval().requires_grad_(False)
    if strict and (left := list(_left(new))):
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise ValueError(f"fold: {shown} cannot be folded; wanted strict=False to leave them in")
    return new
