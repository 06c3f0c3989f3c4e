"""Convolutions with their norms folded in, for :mod:`fastres.functional` where no gradient is wanted.

:func:`convolve` and :func:`convolve_pair` give the result, or say in words why the convolution and the norm have to run
one after the other. Nothing here changes a module; folded weights are kept by :mod:`fastres._folding`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastres import _folding
from fastres._cpu import folded_tile, rule
from fastres._foldable import fake, finite, off, plain_tensor, unseen
from fastres._routing import (
    PREPACKED,
    BatchNorm,
    decide_folded,
    decide_pair,
    prepacks,
    record,
    recording,
)
from fastres.kernels import _tuned
from fastres.kernels import fused_conv_bn_relu as pointwise_ops
from fastres.kernels.folded_conv import (
    Folded,
    Geometry,
    aten_conv,
    fold,
    folded_conv,
    folded_key,
    geometry,
    onednn_conv,
    pack,
    packing,
    pair_key,
)
from fastres.kernels.winograd_folded import winograd_fold, winograd_folded, winograd_packing

__all__ = ["Check", "conv_add_relu", "convolve", "convolve_pair", "for_product", "product", "run"]

LAST = torch.channels_last
Check = Callable[
    [tuple[int, ...], Tensor], None
]  # of a norm against the convolution's output shape and input


class _Layer(NamedTuple):
    """A convolution that can be folded, on its input."""

    x: Tensor
    conv: nn.Conv2d
    bn: BatchNorm | None
    geometry: Geometry
    out: tuple[int, int, int, int]
    pointwise: bool
    check: Check | None

    def folded(self, route: str, tile: int = 0) -> Folded:
        """The folded weight, kept from the last time; ``tile`` is the side of Winograd's tiles."""
        x, conv, bn = self.x, self.conv, self.bn
        own: Any = conv._parameters
        if bn is None:
            sources = _folding.Sources(own["weight"], own["bias"], None, None, None, None, None, 0.0)
        else:
            sources = _folding.Sources(
                own["weight"], own["bias"], bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked,
                bn.eps, bn.modes,
            )  # fmt: skip

        def make() -> Folded:
            if self.check is not None:
                self.check(self.out, x)
            bias_dtype = torch.promote_types(x.dtype, torch.float32) if route == "triton" else x.dtype
            f = fold(*sources[:6], sources.eps, x.dtype, bias_dtype)
            if route == "triton":
                return for_product(f)
            if route not in _PACKED or fake(x) or not isfinite(f.weight.sum() + f.bias.sum()):
                return f
            if route == "winograd":
                return winograd_fold(f, x, tile)
            return pack(f, self.geometry, tuple(x.shape))

        layout = b""
        if route in _PACKED and not fake(x):
            n = conv.out_channels
            layout = winograd_packing(x, n, tile) if tile else packing(x, own["weight"].shape, self.geometry)
        return _folding.get(conv, (route, tile, layout, x.dtype), sources, make)


_PACKED = ("onednn", "winograd")  # routes that take a weight in a form of their own


def for_product(f: Folded) -> Folded:
    """The weight [N, C, 1, 1] as the matrix that the block end's product reads; its bias is as wide as sums."""
    return Folded(f.weight.reshape(f.weight.shape[:2]).contiguous(), f.bias)


def _conv_obstacle(conv: nn.Module, bn: BatchNorm | None) -> str:
    """Why a norm cannot be folded into this convolution."""
    if type(conv) is not nn.Conv2d and not getattr(type(conv), "is_plain_convolution", False):
        return f"the convolution is {type(conv).__name__}"
    if (
        conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
        or "forward" in conv.__dict__ or _has_any_global_hook()
    ):  # fmt: skip
        return "the convolution has hooks"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode}"
    weight = conv._parameters.get("weight")
    if type(weight) is not nn.Parameter and (weight is None or type(weight) is Tensor or not fake(weight)):
        return "the weight is no plain parameter"
    if bn is not None:
        if bn.running_mean is None or bn.running_var is None:
            return "there are no running statistics"
        if bn.num_batches_tracked is None:
            return "nothing counts the updates of the running statistics (num_batches_tracked)"
    return ""


def _layer(x: Tensor, conv: nn.Module, bn: BatchNorm | None, check: Check | None) -> _Layer | str:
    if why := _conv_obstacle(conv, bn):
        return why
    assert isinstance(conv, nn.Conv2d)
    g = geometry(conv)
    if g is None:
        return "padding differs between two sides"
    if not plain_tensor(x):
        return f"the input is {type(x).__name__}"
    if x.dim() != 4 or x.shape[1] != conv.in_channels or not x.numel() or x.device != conv.weight.device:
        return "the input does not fit"  # the convolution itself will tell
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x if x.dtype == torch.float64 else x.to(dtype)
    elif x.dtype != conv.weight.dtype:
        return "the input does not fit"
    if x.dtype == torch.float64 and conv.weight.dtype != torch.float64:
        return "the input does not fit"
    out = g.out(x.shape, conv.weight.shape)
    if min(out) < 1:
        return "the input does not fit"
    pointwise = conv.kernel_size == (1, 1) and g.padding == (0, 0) and g.groups == 1
    return _Layer(x, conv, bn, g, out, pointwise, check)


class _Plan(NamedTuple):
    """What depends on a convolution's shapes alone: where it reads, its result's shape, Winograd's tiles."""

    geometry: Geometry
    out: tuple[int, int, int, int]
    tile: int


@functools.lru_cache(maxsize=2048)
def _plan(
    stride: Any, padding: Any, dilation: Any, groups: int, weight: torch.Size, x: torch.Size, dtype: torch.dtype,
    rule: tuple[str, ...],
) -> _Plan | None:  # fmt: skip
    """None where the input does not fit or the padding is a word; ``weight`` and ``x`` are shapes, ``rule`` is what
    ``folded_tile`` goes by besides."""
    if not isinstance(padding, tuple) or len(x) != 4 or x[1] != weight[1] * groups or 0 in x:
        return None
    g = Geometry(stride, padding, dilation, groups)
    out = g.out(x, weight)
    return None if min(out) < 1 else _Plan(g, out, folded_tile(weight, g, out, dtype))


def _quick(
    x: Tensor, conv: nn.Module, bn: BatchNorm | None, other: Tensor | None, check: Check | None
) -> tuple[_Layer, int] | None:
    """The layer for oneDNN and Winograd's tiles, where there is nothing out of the ordinary: what ``_layer`` and
    ``decide_folded`` would find, in a third of the time, which counts at batch 1. None: ask them."""
    if type(x) is not Tensor or type(conv) is not nn.Conv2d or not prepacks(x):
        return None
    own = conv.__dict__
    weight = own["_parameters"].get("weight")
    if (
        type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.device != x.device
        or own["padding_mode"] != "zeros" or "bias" not in own["_parameters"]
        or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own or _has_any_global_hook()
    ):  # fmt: skip
        return None
    if bn is not None and (
        bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None
    ):
        return None
    where = own["stride"], own["padding"], own["dilation"], own["groups"]
    plan = _plan(*where, weight.shape, x.shape, x.dtype, rule())
    if plan is None or other is not None and not (
        type(other) is Tensor and other.shape == plan.out and other.dtype == x.dtype and prepacks(other)
    ):  # fmt: skip
        return None
    return _Layer(x, conv, bn, plan.geometry, plan.out, False, check), plan.tile


def _wants_channels_last(x: Tensor, conv: nn.Conv2d) -> bool:
    """As in PyTorch: the result is in channels_last where the weight is, whatever the input."""
    weight = conv.weight
    return (
        not x.is_contiguous(memory_format=LAST)
        and weight.is_contiguous(memory_format=LAST)
        and not weight.is_contiguous()
    )


def convolve(
    x: Tensor, conv: nn.Module, bn: BatchNorm | None, relu: bool, other: Tensor | None = None, own: bool = False,
    check: Check | None = None, inner: bool = False,
) -> Tensor | str:  # fmt: skip
    """``bn(conv(x))``, plus ``other``, with ReLU, as one convolution; or why not.

    Args:
        x: [N, C, H, W]. No gradient must be wanted.
        conv: the convolution.
        bn: the norm behind it, on running statistics; None for none.
        relu: end in a ReLU.
        other: what is added before the ReLU.
        own: ``other`` may be overwritten.
        check: raises where the norm does not fit; called before anything is made.
        inner: it is inside a residual branch, where the ReLU may turn NaN into 0 (as it may after finite ``images``).
    """
    try:
        quick = _quick(x, conv, bn, other, check)
        if quick is not None:
            return _onednn(*quick, PREPACKED, relu, other, own, inner)
        return _convolve(x, conv, bn, relu, other, own, check, inner)
    except _folding.Untracked:
        return "parameters made in inference mode do not tell when they change"


def _convolve(
    x: Tensor, conv: nn.Module, bn: BatchNorm | None, relu: bool, other: Tensor | None, own: bool, check: Check | None,
    inner: bool,
) -> Tensor | str:  # fmt: skip
    layer = _layer(x, conv, bn, check)
    if isinstance(layer, str):
        return layer
    x = layer.x
    if _wants_channels_last(x, layer.conv):
        layer = layer._replace(x=(x := x.contiguous(memory_format=LAST)))
    if other is not None and (
        other.shape != layer.out or other.device != x.device or not plain_tensor(other)
    ):
        return "the identity does not fit"
    if other is not None and other.dtype != x.dtype:
        return "the identity has another dtype"
    others = () if other is None else (other,)
    # One channel lies in both layouts: what is added must lie in channels_last as well.
    in_layout = other is None or _last(other)
    pointwise = layer.pointwise and relu and layer.geometry.stride == (1, 1) and in_layout
    key: _tuned.Key = ()
    if relu and _tuned.routed():
        key = folded_key(x, layer.conv.weight.shape, layer.geometry, other is not None)
    route, reason = decide_folded(_name(relu, other), x, others, pointwise, key)
    if route == "onednn" and not fake(x):
        tile = folded_tile(layer.conv.weight.shape, layer.geometry, layer.out, x.dtype)
        return _onednn(layer, tile, reason, relu, other, own, inner)
    f = layer.folded("triton" if route == "reference" and pointwise and _last(x) else route)
    _record(layer, route, reason, relu, other)
    return run(route, x, f, layer.geometry, relu, other)


def _name(relu: bool, other: Tensor | None) -> str:
    return "conv_bn" + ("_add" if other is not None else "") + ("_relu" if relu else "")


def _record(layer: _Layer, route: str, reason: str, relu: bool, other: Tensor | None) -> None:
    if recording():
        bns = () if layer.bn is None else (layer.bn,)
        record(_name(relu, other), layer.x, route, f"norm folded; {reason}" if bns else reason, bns)


def _onednn(
    layer: _Layer, tile: int, reason: str, relu: bool, other: Tensor | None, own: bool, inner: bool
) -> Tensor:  # fmt: skip
    """By oneDNN or Winograd's form, or by PyTorch's convolution where the weight is not finite."""
    x, g, route = layer.x, layer.geometry, "winograd" if tile else "onednn"
    f = layer.folded(route, tile)
    if not (f.weight.is_mkldnn or f.weight.dim() == 1):
        unseen()
        _record(layer, "folded", "the weight is not finite", relu, other)
        return run("folded", x, f, g, relu, other)
    if tile:
        how = "; compiled loops" if f.weight.dim() == 1 else ""
        _record(
            layer, route, f"CPU: 3x3 by tiles of {tile}x{tile}, weight transformed once{how}", relu, other
        )
        return winograd_folded(x, f, tile, other, relu)
    _record(layer, route, reason, relu, other)
    return onednn_conv(x, f, g, relu, other, own, inner or finite())


def run(route: str, x: Tensor, f: Folded, g: Geometry, relu: bool, other: Tensor | None) -> Tensor:
    """``relu(conv(x) + other)`` on a route of ``decide_folded`` other than oneDNN's, from the weight for that route."""
    if f.weight.dim() == 2:
        return product(x, f, other)
    if route in ("cudnn", "reference"):
        return folded_conv(x, *f, other, *g, relu)
    with torch.autocast(x.device.type, enabled=False):
        return aten_conv(x, f, g, relu, other)


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST)


def product(
    x: Tensor,
    f: Folded,
    other: Tensor | None,
    x2: Tensor | None = None,
    f2: Folded | None = None,
    stride2: int = 1,
) -> Tensor:
    """``relu(conv(x) + other)``, or ``relu(conv(x) + conv2(x2))``, by one product; weights of ``for_product``."""
    two = (None, None) if f2 is None else tuple(f2)
    return pointwise_ops.pointwise_end(
        x, None, None, None, None, 0.0, False, *f, other, x2, *two, stride2, None, False
    )[0]


def convolve_pair(
    x: Tensor, conv: nn.Module, bn: BatchNorm, check: Check, x2: Tensor, conv2: nn.Module, bn2: BatchNorm, check2: Check
) -> Tensor | str:  # fmt: skip
    """``relu(bn(conv(x)) + bn2(conv2(x2)))`` as one product, where both are 1x1 convolutions on a GPU; or why not."""
    if prepacks(x):
        return "not on a CPU"
    first, second = _layer(x, conv, bn, check), _layer(x2, conv2, bn2, check2)
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else second  # type: ignore[return-value]
    stride2 = second.geometry.stride
    if not (
        first.pointwise and second.pointwise and first.geometry.stride == (1, 1) and stride2[0] == stride2[1]
    ):
        return "no pair of 1x1 convolutions"
    if first.out != second.out or first.x.dtype != second.x.dtype or not (_last(first.x) and _last(second.x)):
        return "no pair of 1x1 convolutions in channels_last"
    route, reason = decide_folded("conv_bn_add_relu", first.x, (), True)
    if route not in ("triton", "reference"):
        return reason
    channels = first.conv.out_channels
    if _tuned.routed() and not decide_pair(pair_key(first.x, second.x, channels, stride2[0])):
        return "two convolutions are faster on this GPU by the tuning table"
    try:
        weight, weight2 = first.folded("triton"), second.folded("triton")
    except _folding.Untracked:
        return "parameters made in inference mode do not tell when they change"
    record("conv_bn_add_relu", first.x, route, f"norm folded; {reason}; with the downsample's", (bn,))
    record("conv_bn", second.x, route, f"norm folded; {reason}; in the block end's product", (bn2,))
    return product(first.x, weight, None, second.x, weight2, stride2[0])


def conv_add_relu(
    x: Tensor,
    conv: nn.Module,
    relu: bool,
    other: Tensor | None = None,
    own: bool = False,
    inner: bool = False,
) -> Tensor:
    """``conv(x)``, plus ``other``, with ReLU: fused where no gradient is wanted, else PyTorch's operators.

    Args:
        x: [N, C, H, W].
        conv: a convolution without norm, called as a function of its parameters, not as a module.
        relu, other, own, inner: as :func:`convolve`.
    """
    given = (x, other, conv._parameters.get("weight"), conv._parameters.get("bias"))
    plain = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if not (plain or off()):
        z = convolve(x, conv, None, relu, other, own, inner=inner)
        if isinstance(z, Tensor):
            return z
        unseen()
    assert isinstance(conv, nn.Conv2d)
    y = conv._conv_forward(x, conv.weight, conv.bias)
    y = y if other is None else y + other
    return torch.relu(y) if relu else y
