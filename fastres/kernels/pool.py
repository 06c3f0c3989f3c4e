"""The stem's end: batch norm, ReLU and 3x3 stride 2 padding 1 max pooling in one pass, forward and backward.

forward     z = relu(a (y - mean) + beta), rounded to the storage type;  out = max over the window of z
            tap = 3 r + s of the first position that holds the maximum (NaN wins), one byte a window
backward    dz at pixel (h, w) = sum of dout over the at most four windows whose tap points at it
            g = dz [z > 0],  then the sums and dy of ``batch_norm``
saved       y, taps, per-channel vectors; z never exists
rounding    z is rounded before it is compared, so the winner is the one that pooling a stored z would pick
traffic     forward R y, W out, taps (a quarter of y each). Backward R dout, taps, y for the sums, then again with
            W dy: the windows of a pixel are gathered, so there are no atomics and no stored dz.
source      the stem of K. He et al., arXiv:1512.03385, table 1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastres import reference
from fastres.kernels import _jit as J
from fastres.kernels._aot import Case, launches
from fastres.kernels._launch import (
    ELEMENTWISE,
    REDUCTION,
    Matrix,
    cut,
    elementwise,
    like,
    matrix,
    on,
    partial_bytes,
)
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_sums, workspace
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import over_group
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton
from fastres.kernels.batch_norm import reduction_arguments

__all__ = ["aot_cases", "bn_relu_max_pool"]


@triton.jit
def pixel_of(row, col, W, HW, C, NHWC: tl.constexpr):
    """Plane offset helper: the pixel index within its image and the index of the image (NHWC) or plane (NCHW)."""
    if NHWC:
        return row % HW, row // HW
    else:
        return col, row


@triton.jit
def windows(plane, h, w, ch, H, W, C, NHWC: tl.constexpr):
    """Offset of value (h, w) of a [H, W] map: ``plane`` counts images in channels_last and (n, c) planes in NCHW."""
    at = (plane.to(tl.int64) * H + h) * W + w
    if NHWC:
        return at * C + ch
    else:
        return at


@triton.jit
def pool_kernel(
    y_ptr, out_ptr, taps_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ROWS, COLS, C, H, W, OH, OW,
    AFFINE: tl.constexpr, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """The maximum of relu(bn(y)) over each window, and its tap. ROWS and COLS are of the output's matrix."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, 1, NHWC, B0, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    row = (tl.program_id(0) * B0 + tl.arange(0, B0))[:, None]
    col = (tl.program_id(1) * B1 + tl.arange(0, B1))[None, :]
    pixel, plane = pixel_of(row, col, OW, OH * OW, C, NHWC)
    h0 = (pixel // OW) * 2 - 1
    w0 = (pixel % OW) * 2 - 1
    best = tl.full((B0, B1), float("-inf"), tl.float32)
    tap = tl.zeros((B0, B1), tl.int32)
    for k in range(0, 9):
        h = h0 + k // 3
        w = w0 + k % 3
        inside = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        y = tl.load(y_ptr + windows(plane, h, w, ch, H, W, C, NHWC), mask=inside, other=0.0).to(tl.float32)
        v = J.relu((y - mean) * (gamma * rstd) + beta)
        v = J.round_to(v, out_ptr.dtype.element_ty).to(tl.float32)
        wins = inside & ((v > best) | (v != v))
        best = tl.where(wins, v, best)
        tap = tl.where(wins, k, tap)
    tl.store(out_ptr + off, J.round_to(best, out_ptr.dtype.element_ty), mask=ok)
    tl.store(taps_ptr + off, tap.to(tl.uint8), mask=ok)


@triton.jit
def gather(dout_ptr, taps_ptr, row, col, ok, ch, C, H, W, OH, OW, NHWC: tl.constexpr):
    """dz at a tile of input pixels: the gradient of each window that this pixel won."""
    pixel, plane = pixel_of(row, col, W, H * W, C, NHWC)
    h = pixel // W
    w = pixel % W
    dz = tl.where(ok, 0.0, 0.0)
    for k in range(0, 4):
        oh = h // 2 + k // 2
        ow = w // 2 + k % 2
        r = h - 2 * oh + 1
        s = w - 2 * ow + 1
        inside = ok & (r >= 0) & (s >= 0) & (oh < OH) & (ow < OW)
        at = windows(plane, oh, ow, ch, OH, OW, C, NHWC)
        tap = tl.load(taps_ptr + at, mask=inside, other=255).to(tl.int32)
        won = inside & (tap == 3 * r + s)
        dz += tl.load(dout_ptr + at, mask=won, other=0.0).to(tl.float32)
    return dz


@triton.jit
def pool_reduce_kernel(
    dout_ptr, taps_ptr, y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, p1_ptr, p2_ptr, LENGTH, C, HW, CHUNK,
    H, W, OH, OW, AFFINE: tl.constexpr, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Program (p, j): sum g and sum g xhat of its channels over chunk p of the input's pixels."""
    p = tl.program_id(0)
    start = p * CHUNK
    stop = tl.minimum(start + CHUNK, LENGTH)
    ch, ch_ok = J.reduction_channel(C, NHWC, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    s1 = tl.zeros((B0, B1), tl.float32)
    s2 = tl.zeros((B0, B1), tl.float32)
    for t in range(0, J.reduction_steps(CHUNK, HW, NHWC, B0, B1)):
        row, col, off, ok, image = J.reduction_tile(t, start, stop, C, HW, NHWC, B0, B1)
        g = gather(dout_ptr, taps_ptr, row, col, ok, ch, C, H, W, OH, OW, NHWC)
        centred = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean
        g = tl.where(J.passes(centred * (gamma * rstd) + beta), g, 0.0)
        s1 += g
        s2 += tl.where(ok, g * (centred * rstd), 0.0)
    tl.store(p1_ptr + p * C + ch, J.column_sum(s1, NHWC), mask=ch_ok)
    tl.store(p2_ptr + p * C + ch, J.column_sum(s2, NHWC), mask=ch_ok)


@triton.jit
def pool_backward_kernel(
    dout_ptr, taps_ptr, y_ptr, dy_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, s1_ptr, s2_ptr, eps, scale,
    ROWS, COLS, C, H, W, OH, OW, AFFINE: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """dy = a (g - scale s1 - xhat scale s2), or a g with running statistics, with g gathered from the windows."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, 1, NHWC, B0, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    row = (tl.program_id(0) * B0 + tl.arange(0, B0))[:, None]
    col = (tl.program_id(1) * B1 + tl.arange(0, B1))[None, :]
    g = gather(dout_ptr, taps_ptr, row, col, ok, ch, C, H, W, OH, OW, NHWC)
    centred = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean
    g = tl.where(J.passes(centred * (gamma * rstd) + beta), g, 0.0)
    if BATCH:
        s1 = tl.load(s1_ptr + ch, mask=ch_ok, other=0.0) * scale
        s2 = tl.load(s2_ptr + ch, mask=ch_ok, other=0.0) * scale
        g = g - s1 - centred * (rstd * s2)
    tl.store(dy_ptr + off, J.round_to(g * (gamma * rstd), dy_ptr.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------------- launchers


def _outputs(y: Tensor) -> tuple[Tensor, Tensor, Matrix]:
    """out and taps in the layout of ``y``, and the matrix that they are, read the way y's is."""
    m = matrix(y)
    n, c, h, w = y.shape
    oh, ow = (h + 1) // 2, (w + 1) // 2
    out = torch.empty((n, c, oh, ow), dtype=y.dtype, device=y.device, memory_format=like(y, m))
    om = (
        Matrix(n * oh * ow, c, n, c, oh * ow, True)
        if m.nhwc
        else Matrix(n * c, oh * ow, n, c, oh * ow, False)
    )
    return out, torch.empty_like(out, dtype=torch.uint8), om


def _pool(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, taps, m = _outputs(y)
    if out.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(pool_kernel, grid)(
                y, out, taps, mean, var, gamma, beta, eps, m.rows, m.cols, m.c, *y.shape[2:], *out.shape[2:],
                AFFINE=gamma is not None, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return out, taps


def _pool_reduce(
    dout: Tensor, taps: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m = matrix(y)
    if y.numel() == 0:
        return tuple(torch.zeros(2, m.c, dtype=torch.float32, device=y.device).unbind(0))  # type: ignore[return-value]
    plan = cut(m)
    tile = plan.tile
    partial = workspace(plan.parts, 2, m.c, y.device)
    with on(y):
        launch(pool_reduce_kernel, (plan.parts, plan.groups))(
            dout.contiguous(memory_format=like(y, m)), taps, y, mean, var, gamma, beta, eps, partial[0], partial[1],
            *reduction_arguments(m, plan), *y.shape[2:], *dout.shape[2:], AFFINE=gamma is not None, NHWC=m.nhwc,
            B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
        )  # fmt: skip
        return merge_sums(partial)  # type: ignore[return-value]


def _pool_backward(
    dout: Tensor, taps: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float, s1: Tensor | None, s2: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    m = matrix(y)
    dy = torch.empty_like(y)
    if y.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(pool_backward_kernel, grid)(
                dout.contiguous(memory_format=like(y, m)), taps, y, dy, mean, var, gamma, beta, s1, s2, eps, scale,
                m.rows, m.cols, m.c, *y.shape[2:], *dout.shape[2:], AFFINE=gamma is not None, BATCH=s1 is not None,
                NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return dy


# ------------------------------------------------------------------------------------------------- registration


def _fake_pair(dout: Tensor, taps: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty(y.shape[1], dtype=kind), y.new_empty(y.shape[1], dtype=kind)


pool_reduce = register(
    "bn_relu_max_pool_reduce(Tensor dout, Tensor taps, Tensor y, Tensor mean, Tensor var, Tensor? gamma,"
    " Tensor? beta, float eps) -> (Tensor, Tensor)",
    reference=reference.max_pool_reduce,
    triton=_pool_reduce,
    fake=_fake_pair,
    traffic=lambda dout, taps, y, *_: Traffic([dout, taps, y], partial_bytes(y, 2)),
)
pool_backward = register(
    "bn_relu_max_pool_backward(Tensor dout, Tensor taps, Tensor y, Tensor mean, Tensor var, Tensor? gamma,"
    " Tensor? beta, float eps, Tensor? s1, Tensor? s2, Scalar scale) -> Tensor",
    reference=reference.max_pool_backward,
    triton=_pool_backward,
    fake=lambda dout, taps, y, *rest: torch.empty_like(y),
    traffic=lambda dout, taps, y, *_: Traffic([dout, taps, y]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mean, var, gamma, beta, ctx.eps, ctx.training, count, ctx.group = inputs
    store(ctx, y, mean, var, gamma, beta, count, output[1])


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    y, mean, var, gamma, beta, count, taps = recall(ctx)
    need_y, need_gamma, need_beta = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    sum_g: Any = None
    sum_gx: Any = None
    dy = None
    if need_gamma or need_beta or (ctx.training and need_y):
        sum_g, sum_gx = pool_reduce(dout, taps, y, mean, var, gamma, beta, ctx.eps)
    if need_y:
        (s1, s2), scale = (None, None), 0.0
        if ctx.training:
            (s1, s2), scale = over_group((sum_g, sum_gx), y, count, ctx.group)
        dy = pool_backward(dout, taps, y, mean, var, gamma, beta, ctx.eps, s1, s2, scale)
    dgamma = sum_gx.to(gamma.dtype) if need_gamma else None
    dbeta = sum_g.to(beta.dtype) if need_beta else None
    return dy, None, None, dgamma, dbeta, None, None, None, None


bn_relu_max_pool = register(
    "bn_relu_max_pool(Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, bool training,"
    " Tensor? count, str? group) -> (Tensor, Tensor)",
    reference=reference.bn_relu_max_pool,
    triton=_pool,
    fake=lambda y, *rest: _outputs(y)[:2],
    backward=_backward,
    setup_context=_setup,
    traffic=lambda y, *_: Traffic([y]),  # the windows overlap; a line stays in cache for its three rows
)


def aot_cases() -> Iterator[Case]:
    """Every launch that can be chosen."""
    taps = {"taps_ptr": "*u8"}
    yield from launches(pool_kernel, ELEMENTWISE, dict(AFFINE=True), types=taps)
    yield from launches(pool_backward_kernel, ELEMENTWISE, dict(AFFINE=True, BATCH=True), types=taps)
    yield from launches(pool_reduce_kernel, REDUCTION, dict(AFFINE=True), types=taps)
