"""A convolution with its batch norm folded in, and the identity's addition and the ReLU behind it: inference.

    fold        a = gamma / sqrt(var + eps),  Wf = a W,  bias = beta + a (b - mean)      running statistics, b a bias
    forward     y = relu(conv(x, Wf) + bias + other)                                     ReLU and other where wanted
    rounding    Wf and bias are made in fp32 (fp64 for float64) and rounded once; y is rounded once where one kernel
                does it all, as often as in eager PyTorch elsewhere
    traffic     R x, Wf, other, W y; eager reads and writes y once more for the norm, the addition and the ReLU each
    source      the textbook folding of an affine map into a linear one

Four ways to run it, chosen in ``fastres._routing``:

    triton      1x1, channels_last: the block end's product of ``fused_conv_bn_relu``, which has this very epilogue
    cudnn       everything else on a GPU: cuDNN's convolution with bias, addition and ReLU, through the operator below
    onednn      float CPU tensors in channels_last: oneDNN's convolution on a weight packed once
    folded      PyTorch's convolution with the folded weight, then addition and ReLU in place

Which of the three on a GPU is faster depends on the shape: a tuning table may say so (``folded_key``, ``pair_key``).

What oneDNN's operators need care in. They drop gradients without a word, so they run where none is wanted. The
addition in place overwrites ``other``, so it is used on tensors this package made. Their ReLU turns NaN into 0, unlike
PyTorch's: it is fused where a network's images and weights have been found to be finite; else inside a residual branch
only, where the identity carries every NaN past it, and elsewhere it is a pass of its own, in place, so that a NaN that
goes in comes out. Packed weights can be neither
copied nor pickled, so they live outside the modules (``fastres._folding``). The operators are private to PyTorch: they
are tried once against its convolution before they are used, and not used where they are missing or differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastres.kernels import _tuned
from fastres.kernels._library import Traffic, register

__all__ = ["Folded", "Geometry", "aten_conv", "cudnn_obstacle", "fold", "folded_conv", "folded_key", "geometry",
           "onednn_conv", "onednn_obstacle", "pack", "pair_key"]  # fmt: skip

LAST = torch.channels_last


class Geometry(NamedTuple):
    """Where a 2d convolution reads."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape of the result from those of input and weight; below 1 where the input is too small."""
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x[2:], self.padding, self.dilation, weight[2:], self.stride, strict=True)
        )
        return x[0], weight[0], h, w


def folded_key(x: Tensor, weight: Sequence[int], g: Geometry, add: bool) -> _tuned.Key:
    """Shape class of a folded convolution with a ReLU; ``weight`` is the weight's shape, ``add``: with an addition."""
    n, k, h, w = g.out(x.shape, weight)
    last = x.is_contiguous(memory_format=LAST)
    return (
        int(last), _tuned.log2(max(n * h * w, 1)), k, x.shape[1], *weight[2:], g.stride[0], g.dilation[0], g.groups,
        int(add), x.element_size(),
    )  # fmt: skip


def pair_key(x: Tensor, x2: Tensor, channels: int, stride2: int) -> _tuned.Key:
    """Shape class of a block end that has the downsample's 1x1 convolution of x2 in its product, in channels_last."""
    rows = max(x.numel() // x.shape[1], 1)
    return _tuned.log2(rows), channels, x.shape[1], x2.shape[1], stride2, x.element_size()


class Folded(NamedTuple):
    """A weight with its norm folded in, packed for its route, and the bias."""

    weight: Tensor
    bias: Tensor


def geometry(conv: nn.Conv2d) -> Geometry | None:
    """The convolution's, with padding in numbers; None where ``same`` pads the two sides differently."""
    padding = conv.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = (total[0] // 2, total[1] // 2)
    assert not isinstance(padding, str)
    return Geometry(conv.stride, padding, conv.dilation, conv.groups)


def fold(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None,
    var: Tensor | None, eps: float, dtype: torch.dtype, bias_dtype: torch.dtype,
) -> Folded:  # fmt: skip
    """Weight [N, C, kh, kw] and bias [N] of the convolution and its norm in one; without statistics the convolution's.

    Args:
        weight, bias: the convolution's.
        gamma, beta, mean, var, eps: the norm's, [N]; mean and var None where there is no norm.
        dtype, bias_dtype: of the results. The arithmetic is in float32, float64 where the weight is.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.detach().to(wide)
    shift = w.new_zeros(w.shape[0]) if bias is None else bias.detach().to(wide)
    if mean is not None and var is not None:
        a = torch.rsqrt(var.detach().to(wide) + eps)
        a = a if gamma is None else a * gamma.detach().to(wide)
        w, shift = w * a.view(-1, 1, 1, 1), (shift - mean.detach().to(wide)) * a
        shift = shift if beta is None else shift + beta.detach().to(wide)
    # Strides are kept. A copy where nothing was folded: the cache must not hold a parameter's own storage.
    return Folded(w.to(dtype, copy=mean is None), shift.to(bias_dtype))


def _after(y: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    """Addition and ReLU on a tensor that is ours."""
    y = y if other is None else y.add_(other)
    return y.relu_() if relu else y


def aten_conv(x: Tensor, f: Folded, g: Geometry, relu: bool, other: Tensor | None) -> Tensor:
    """relu(conv(x) + other) by PyTorch's convolution; any device, dtype and layout."""
    return _after(F.conv2d(x, f.weight, f.bias, *g), other, relu)


# ------------------------------------------------------------------------------------------------------- oneDNN


def pack(f: Folded, g: Geometry, shape: tuple[int, ...]) -> Folded:
    """The weight in oneDNN's own layout for an input of this shape. It serves other inputs as well, but where oneDNN
    wants another layout for them (:func:`packing`) it packs anew at each call, with 1x1 weights by a loop that takes up
    to 700 times as long as the convolution."""
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        f.weight, g.padding, g.stride, g.dilation, g.groups, list(shape)
    )
    return Folded(packed, f.bias)


# Bytes of oneDNN's description of a tensor that nobody sets: they lie between its 32-bit and its 64-bit fields.
_HOLES = {772: ((108, 112), (316, 320), (420, 424))}


def layout_name(packed: Tensor) -> bytes:
    """Names the layout of a packed weight."""
    described = bytearray(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    for first, last in _HOLES.get(len(described), ()):
        described[first:last] = bytes(last - first)
    return bytes(described)


def packing(x: Tensor, weight: Sequence[int], g: Geometry) -> bytes:
    """Names the layout that oneDNN wants a weight of this shape in for a convolution of x [B, C, H, W]; a layer keeps
    one weight for each name, two or three for all sizes of images."""
    return _packing(tuple(weight), g, tuple(x.shape), x.dtype, torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _packing(
    weight: tuple[int, ...], g: Geometry, shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> bytes:
    """By packing a weight of zeros: PyTorch has no other way to ask."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        return layout_name(pack(Folded(torch.zeros(weight, dtype=dtype), torch.empty(0)), g, shape).weight)


def onednn_conv(
    x: Tensor, f: Folded, g: Geometry, relu: bool, other: Tensor | None, own: bool, inner: bool
) -> Tensor:  # fmt: skip
    """relu(conv(x) + other) by oneDNN, in channels_last.

    Args:
        x: [N, C, H, W], float32 or what oneDNN supports here, channels_last.
        f: packed by :func:`pack`.
        g, relu: the convolution's geometry; whether to end in a ReLU.
        other: of the result's shape, dtype and layout, or None.
        own: ``other`` is this package's and may be overwritten; it is then the result.
        inner: the ReLU may turn NaN into 0; it is then part of the convolution.
    """
    assert not (torch.is_grad_enabled() and (x.requires_grad or other is not None and other.requires_grad))
    where = (g.padding, g.stride, g.dilation, g.groups)
    # With groups PyTorch adds after the convolution, and cannot add with a ReLU in 16 bits (seen in 2.11 and 2.13).
    fused = relu and inner and (other is None or g.groups == 1)
    if other is not None and not own and other.shape[2:] == (1, 1):
        other, own = other.clone(), True  # torch 2.11 refuses a sum of single pixels that is not in place
    if other is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, *f, *where, "relu" if fused else "none", [], "")
    else:
        add: tuple[Any, ...] = ("add", 1.0, "relu" if fused else None, [], "")
        if own:
            y = torch.ops.mkldnn._convolution_pointwise_(other, x, *f, *where, *add)
        else:
            y = torch.ops.mkldnn._convolution_pointwise(x, other, *f, *where, *add)
    return y.relu_() if relu and not fused else y


def onednn_obstacle(dtype: torch.dtype) -> str:
    """Why oneDNN's fused convolution cannot serve this dtype here; empty where it was tried and agrees."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "oneDNN is not in this build of PyTorch, or is switched off"
    return _dtype_obstacle(dtype) or _onednn_trial(dtype)


@functools.cache
def _dtype_obstacle(dtype: torch.dtype) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        if supported is None or not supported():
            return f"oneDNN has no {name} on this processor, where float32 is faster"
    elif dtype != torch.float32:
        return f"oneDNN has no {str(dtype)[6:]}"
    return ""


_TRIALS = (Geometry((1, 1), (1, 1), (1, 1), 1), Geometry((2, 2), (2, 2), (2, 2), 2))


@functools.cache
def _onednn_trial(dtype: torch.dtype) -> str:
    """Call every form of the operators once against PyTorch's convolution."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for g in _TRIALS:
            x = torch.randn(2, 16, 9, 7, generator=generator).to(dtype).contiguous(memory_format=LAST)
            w = torch.randn(24, 16 // g.groups, 3, 3, generator=generator).to(dtype)
            f = Folded(w, torch.randn(24, generator=generator).to(dtype))
            plain = F.conv2d(x.float(), w.float(), f.bias.float(), *g)
            other = torch.randn(plain.shape, generator=generator).to(dtype).contiguous(memory_format=LAST)
            kept = other.clone(memory_format=torch.preserve_format)
            try:
                packed = pack(f, g, tuple(x.shape))
                layout_name(packed.weight)
                found = [
                    (onednn_conv(x, packed, g, False, None, False, False), plain),
                    (onednn_conv(x, packed, g, True, None, False, True), plain.relu()),
                    (onednn_conv(x, packed, g, True, other, False, False), (plain + other).relu()),
                ]
                if not torch.equal(other, kept):
                    return "oneDNN's addition changed its operand when it was tried"
                found.append((onednn_conv(x, packed, g, True, other, False, True), found[-1][1]))
                if not torch.equal(other, kept):
                    return "oneDNN's addition changed its operand when it was tried"
                found.append((onednn_conv(x, packed, g, True, other, True, False), found[-1][1]))
                found.append((onednn_conv(x, packed, g, True, kept, True, True), found[-1][1]))
            except Exception as error:  # private operators: an interface that has changed raises anything
                return f"oneDNN's fused convolution failed when it was tried: {type(error).__name__}"
            bound = (1e-4 if dtype == torch.float32 else 0.1) * float(plain.abs().max())
            for y, wanted in found:
                if y.stride() != wanted.stride() or not float((y.float() - wanted).abs().max()) <= bound:
                    return "oneDNN's fused convolution differed from PyTorch's when it was tried"
    return ""


# -------------------------------------------------------------------------------------------------------- cuDNN


def _cudnn(x: Tensor, f: Folded, g: Geometry, other: Tensor | None) -> Tensor:
    if other is None:
        return torch.ops.aten.cudnn_convolution_relu(x, *f, *g)
    return torch.ops.aten.cudnn_convolution_add_relu(x, f.weight, other, 1.0, f.bias, *g)


@functools.cache
def cudnn_obstacle(dtype: torch.dtype, device: torch.device) -> str:
    """Why cuDNN's convolution with bias, addition and ReLU cannot serve here; empty where it was tried and agrees."""
    if not torch.backends.cudnn.is_available() or torch.version.hip:
        return "there is no cuDNN"
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for memory in (torch.contiguous_format, LAST):
            x = (
                torch.randn(2, 64, 9, 7, generator=generator)
                .to(device, dtype)
                .contiguous(memory_format=memory)
            )
            w = (
                torch.randn(64, 64, 3, 3, generator=generator)
                .to(device, dtype)
                .contiguous(memory_format=memory)
            )
            f = Folded(w, torch.randn(64, generator=generator).to(device, dtype))
            plain = aten_conv(x, f, _TRIALS[0], False, None)
            other = torch.randn(plain.shape, generator=generator).to(device, dtype)
            other = other.contiguous(memory_format=memory)
            try:
                found = [_cudnn(x, f, _TRIALS[0], None), _cudnn(x, f, _TRIALS[0], other)]
            except RuntimeError as error:
                return f"cuDNN's fused convolution failed when it was tried: {str(error).splitlines()[0]}"
            bound = 0.05 * float(plain.abs().max())
            for y, wanted in zip(found, (plain.relu(), (plain + other).relu()), strict=True):
                if not float((y - wanted).abs().max()) <= bound:
                    return "cuDNN's fused convolution differed from PyTorch's when it was tried"
    return ""


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    g = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return aten_conv(x, Folded(weight, bias), g, relu, other)


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    g, f = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups), Folded(weight, bias)
    if not x.is_cuda or not relu or cudnn_obstacle(x.dtype, x.device):
        return aten_conv(x, f, g, relu, other)
    return _cudnn(x, f, g, other)


def _out(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    g = Geometry(tuple(rest[2]), tuple(rest[3]), tuple(rest[4]), rest[5])
    last = x.is_contiguous(memory_format=LAST) and not x.is_contiguous()
    last = last or weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous()
    memory = LAST if last else torch.contiguous_format
    return torch.empty(g.out(x.shape, weight.shape), dtype=x.dtype, device=x.device, memory_format=memory)


def _traffic(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, *rest: Any) -> Traffic:
    stride, padding, relu = rest[0], rest[1], rest[4]
    point = weight.shape[2:] == (1, 1) and not any(padding)
    read = x[:, :, :: stride[0], :: stride[1]] if point else x
    y = _out(x, weight, bias, other, *rest)
    # Without a ReLU there is no fused form: PyTorch adds the bias, and another operand, in passes of their own.
    extra = 0 if relu else (2 + (0 if other is None else 2)) * y.numel() * y.element_size()
    flops = 2 * (y.numel() // y.shape[1]) * weight.numel()
    return Traffic([read, weight, other], extra, flops)


folded_conv = register(
    "folded_conv(Tensor x, Tensor weight, Tensor bias, Tensor? other, int[] stride, int[] padding, int[] dilation,"
    " int groups, bool relu) -> Tensor",
    reference=_reference,
    triton=_fused,
    traffic=_traffic,
    fake=_out,
    differentiable=False,
)
