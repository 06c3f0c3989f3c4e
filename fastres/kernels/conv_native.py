"""A convolution whose weight gradient on a CPU is made by compiled loops (``csrc/gradient.cpp``).

forward     PyTorch's convolution; 1x1 or 3x3, any stride and padding
backward    dw[n][c][tap] = sum over pixels p of dy[p][n] x[q(p, tap)][c], in the loops; dx is PyTorch's
saved       x and the weight, as the convolution itself
rounding    float32; sums of 32 or 64 pixels, then of those
traffic     R x and dy, W dw: each thread copies the part that it multiplies into its own cache

oneDNN's weight gradients of 1x1 and of strided convolutions in channels_last are its slowest products: 150 to 360
GFLOP/s with AVX-512 where these loops make 320 to 420 (docs/CPU.md). Repeatable bit for bit, whatever the number of
threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastres.kernels._library import Traffic, register
from fastres.kernels._native import library, serves
from fastres.kernels._saved import recall, store

__all__ = ["conv", "input_gradient", "weight_gradient"]


def _aten(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, which: int) -> Tensor:
    s, p, mask = [stride] * 2, [padding] * 2, [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, s, p, [1, 1], False, [0, 0], 1, mask)[
        which
    ]


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """PyTorch's gradient of x."""
    return _aten(dy, x, weight, stride, padding, 0)


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    n, c, side, _ = weight.shape
    if not serves(x.dtype, n, c) or not x.numel():
        return _aten(dy, x, weight, stride, padding, 1)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dw = torch.empty_like(weight)
    of_n, of_c, of_y, of_x = dw.stride()
    taps = (ctypes.c_int64 * side**2)(*[i * of_y + j * of_x for i in range(side) for j in range(side)])
    b, _, h, w = x.shape
    sizes = (b, h, w, c, *dy.shape[2:], n, side, stride, padding, torch.get_num_threads())
    at = (x.data_ptr(), dy.data_ptr(), dw.data_ptr())
    if library().fastres_conv_gradient(*at, of_n, of_c, taps, *sizes):
        raise MemoryError(
            f"conv_weight_gradient: no memory for the scratch of {tuple(x.shape)} to {n} channels"
        )
    return dw


weight_gradient = register(
    "conv_weight_gradient(Tensor x, Tensor dy, Tensor weight, int stride, int padding) -> Tensor",
    reference=_weight_gradient,
    triton=_weight_gradient,
    fake=lambda x, dy, weight, stride, padding: torch.empty_like(weight),
    traffic=lambda x, dy, weight, *_: Traffic([x, dy], flops=2 * dy[:, 0].numel() * weight.numel()),
)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        store(ctx, x, weight)
        ctx.geometry = stride, padding
        return torch.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = recall(ctx)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(x, dy, weight, *ctx.geometry)
        if ctx.needs_input_grad[0]:  # last: the norm below finds it in the cache
            dx = input_gradient(dy, x, weight, *ctx.geometry)
        return dx, dw, None, None


def conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``conv2d(x, weight, None, stride, padding)``, differentiable once.

    Args:
        x: [B, C, H, W], channels_last, float32.
        weight: [N, C, 1, 1] or [N, C, 3, 3], of the same dtype.
        stride, padding: of both axes.

    Returns:
        [B, N, H', W'], as PyTorch's.
    """
    return _Conv.apply(x, weight, stride, padding)
