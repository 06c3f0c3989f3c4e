"""Winograd's form of a 3x3 convolution, stride 1, padding 1, by tiles of 4x4: compiled loops, ``csrc/winograd.cpp``.

forward     Y = A^T [ (B^T d B) . (G g G^T) ] A; dx and dg as ``winograd``, with its points of interpolation; in
            inference + bias + other and ReLU, which keeps NaN
saved       as ``winograd``
rounding    float32; sums of 16 to 64 terms, then of those; weights transformed in double
traffic     R x, the weight, other; W y: a thread takes 12 tiles through all three steps in its own cache; with many
            channels all threads take some hundred tiles through each step in the cache that they share
source      as ``winograd``

Repeatable bit for bit, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastres.kernels._library import Traffic, register
from fastres.kernels._native import library

__all__ = ["TILE", "convolution", "folded", "transformed", "weight_gradient"]

TILE = 4
_Taps = ctypes.c_int64 * 9


def _weights(weight: Tensor, turned: bool) -> tuple[Any, ...]:
    """Address and strides of [N, C, 3, 3]; turned: of the input gradient's, by 180 degrees and transposed."""
    of_n, of_c, of_y, of_x = weight.stride()
    taps = [y * of_y + x * of_x for y in range(3) for x in range(3)]
    if turned:
        return weight.data_ptr(), of_c, of_n, _Taps(*reversed(taps))
    return weight.data_ptr(), of_n, of_c, _Taps(*taps)


def _check(status: int, what: str) -> None:
    if status:
        raise MemoryError(f"winograd: no memory for the scratch of {what}")


def transformed(weight: Tensor) -> Tensor:
    """G g G^T of a weight [N, C, 3, 3] as :func:`convolution` takes it."""
    n, c = weight.shape[:2]
    u = torch.empty(library().fastres_winograd_size(c, n), dtype=weight.dtype)
    library().fastres_winograd_weights(*_weights(weight, False), c, n, u.data_ptr(), torch.get_num_threads())
    return u


def convolution(
    x: Tensor, weight: Tensor | None, results: int, *, turned: bool = False, u: Tensor | None = None,
    bias: Tensor | None = None, other: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(conv2d(x, weight, bias, padding=1) + other).

    Args:
        x: [B, C, H, W], float32, channels_last.
        weight: [N, C, 3, 3], or with ``turned`` [C, N, 3, 3], of whose convolution this is the input gradient; or
        u: what :func:`transformed` made of it.
        results: N.
        bias: [N], contiguous.
        other: as the result.
        relu: end in a ReLU.

    Returns:
        [B, N, H, W], channels_last.
    """
    b, c, h, w = x.shape
    y = torch.empty((b, results, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    weights = (None, 0, 0, None) if weight is None else _weights(weight, turned)
    status = library().fastres_winograd(
        x.data_ptr(), None if u is None else u.data_ptr(), *weights, y.data_ptr(),
        None if bias is None else bias.data_ptr(), None if other is None else other.data_ptr(), relu,
        b, h, w, c, results, torch.get_num_threads(),
    )  # fmt: skip
    _check(status, f"a convolution of {tuple(x.shape)} to {results} channels")
    return y


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """dg of a weight [N, C, 3, 3], in its layout, from x [B, C, H, W] and dy [B, N, H, W], both channels_last."""
    dw = torch.empty_like(weight)
    if not x.numel():
        return dw.zero_()
    b, c, h, w = x.shape
    status = library().fastres_winograd_gradient(
        x.data_ptr(), dy.data_ptr(), *_weights(dw, False), b, h, w, c, len(dw), torch.get_num_threads()
    )
    _check(status, f"the weight gradient of {tuple(x.shape)} to {len(dw)} channels")
    return dw


def _folded(x: Tensor, u: Tensor, bias: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    return convolution(x, None, len(bias), u=u, bias=bias, other=other, relu=relu)


def _fake(x: Tensor, u: Tensor, bias: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    b, _, h, w = x.shape
    return torch.empty((b, len(bias), h, w), dtype=x.dtype, memory_format=torch.channels_last)


# An operator, so that whoever records what a network calls sees it.
folded = register(
    "winograd_loops(Tensor x, Tensor u, Tensor bias, Tensor? other, bool relu) -> Tensor",
    reference=_folded,
    triton=_folded,
    fake=_fake,
    differentiable=False,
    traffic=lambda x, u, bias, other, relu: Traffic(
        [x, u, other], flops=2 * x.numel() * 36 // 16 * len(bias)
    ),
)
