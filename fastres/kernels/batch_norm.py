"""Batch normalisation of a dense activation, with optional ReLU, forward and backward.

    statistics  mean_c = sum y / M,  var_c = sum (y - mean)^2 / M,  M = N H W
                running <- (1 - momentum) running + momentum (mean, var M / (M - 1))
    forward     z = relu(a (y - mean) + beta),  a = gamma rstd,  rstd = 1 / sqrt(var + eps)
    backward    g = dz [z > 0],  xhat = (y - mean) rstd
                dbeta = sum g,  dgamma = sum g xhat
                dy = a (g - dbeta / M - xhat dgamma / M)   with batch statistics
                dy = a g                                   with running statistics
    saved       y and the per-channel vectors. The ReLU's mask is recomputed from y, so neither z nor a mask is kept.
    rounding    y as stored is what is measured. All arithmetic is fp32; z and dy are rounded once, when stored.
    traffic     statistics R y; forward R y W z; backward R dz, y (sums) then R dz, y, W dy.

Statistics are two-stage and in a fixed order. A first-stage program takes one chunk of each channel and sums y - s and
(y - s)^2 about an anchor s, the mean of its first tile. With B rows in that tile and T tiles in the chunk, the sum of
squares about s exceeds the one about the chunk's mean by at most the factor 1 + T, whatever the data are, so the
cancellation in M2 = sum (y - s)^2 - n (mean - s)^2 is bounded. The second stage merges (count, mean, M2) about the
grand mean (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979). Batch normalisation: S. Ioffe and C. Szegedy, arXiv:1502.03167.
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
    Cut,
    Matrix,
    cut,
    elementwise,
    like,
    matrix,
    on,
    partial_bytes,
)
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_stats, merge_sums, workspace
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import over_group
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton

__all__ = ["aot_cases", "batch_norm_act", "batch_norm_backward", "batch_norm_reduce", "batch_norm_stats"]


@triton.jit
def stats_kernel(
    y_ptr, mean_ptr, m2_ptr, LENGTH, C, HW, CHUNK, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr
):
    """Program (p, j): mean and M2 of its channels over chunk p, to row p of the [parts, C] workspaces."""
    p = tl.program_id(0)
    start = p * CHUNK
    stop = tl.minimum(start + CHUNK, LENGTH)
    ch, ch_ok = J.reduction_channel(C, NHWC, B1)
    row, col, off, ok, image = J.reduction_tile(0, start, stop, C, HW, NHWC, B0, B1)
    first = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32)
    seen = J.column_sum(ok.to(tl.float32), NHWC)
    anchor = J.column_sum(first, NHWC) / tl.maximum(seen, 1.0)
    s = tl.zeros((B0, B1), tl.float32)
    q = tl.zeros((B0, B1), tl.float32)
    for t in range(0, J.reduction_steps(CHUNK, HW, NHWC, B0, B1)):
        row, col, off, ok, image = J.reduction_tile(t, start, stop, C, HW, NHWC, B0, B1)
        v = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32)
        d = tl.where(ok, v - anchor, 0.0)
        s += d
        q += d * d
    count = ((stop - start) * (1 if NHWC else HW)).to(tl.float32)
    shift = J.column_sum(s, NHWC) / count
    m2 = J.column_sum(q, NHWC) - shift * shift * count
    tl.store(mean_ptr + p * C + ch, anchor + shift, mask=ch_ok)
    tl.store(m2_ptr + p * C + ch, tl.where(m2 < 0, 0.0, m2), mask=ch_ok)


@triton.jit
def act_kernel(
    y_ptr, z_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ROWS, COLS, C, IMAGE,
    RELU: tl.constexpr, AFFINE: tl.constexpr, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """z = relu(a (y - mean) + beta)."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, IMAGE, NHWC, B0, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    v = (tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean) * (gamma * rstd) + beta
    if RELU:
        v = J.relu(v)
    tl.store(z_ptr + off, J.round_to(v, z_ptr.dtype.element_ty), mask=ok)


@triton.jit
def reduce_kernel(
    dz_ptr, y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, p1_ptr, p2_ptr, eps, LENGTH, C, HW, CHUNK,
    RELU: tl.constexpr, AFFINE: tl.constexpr, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Program (p, j): sum g and sum g xhat of its channels over chunk p."""
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
        g = tl.load(dz_ptr + off, mask=ok, other=0.0).to(tl.float32)
        centred = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean
        if RELU:
            g = tl.where(J.passes(centred * (gamma * rstd) + beta), g, 0.0)
        s1 += g
        s2 += tl.where(ok, g * (centred * rstd), 0.0)
    tl.store(p1_ptr + p * C + ch, J.column_sum(s1, NHWC), mask=ch_ok)
    tl.store(p2_ptr + p * C + ch, J.column_sum(s2, NHWC), mask=ch_ok)


@triton.jit
def backward_kernel(
    dz_ptr, y_ptr, dy_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, keep_ptr, s1_ptr, s2_ptr, eps, scale,
    ROWS, COLS, C, IMAGE, RELU: tl.constexpr, AFFINE: tl.constexpr, KEEP: tl.constexpr, BATCH: tl.constexpr,
    NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """dy = a (g - scale s1 - xhat scale s2), or a g with running statistics; g = keep_n dz [z > 0]."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, IMAGE, NHWC, B0, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    g = tl.load(dz_ptr + off, mask=ok, other=0.0).to(tl.float32)
    if KEEP:
        g *= tl.load(keep_ptr + image, mask=image * IMAGE < ROWS, other=0.0).to(tl.float32)
    y = g
    if RELU or BATCH:
        y = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32)
    dy = J.norm_gradient(g, y, mean, rstd, gamma, beta, s1_ptr, s2_ptr, scale, ch, ch_ok, RELU, BATCH)
    tl.store(dy_ptr + off, J.round_to(dy, dy_ptr.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------------- launchers


def reduction_arguments(m: Matrix, plan: Cut) -> tuple[int, int, int, int]:
    """LENGTH, C, HW, CHUNK of a first-stage kernel."""
    return (m.rows if m.nhwc else m.n), m.c, m.hw, plan.chunk


def _stats(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    m = matrix(y)
    total = m.n * m.hw
    if total == 0 or m.c == 0:
        if batches is not None:
            batches.add_(1)
        mean, var = torch.zeros(2, m.c, dtype=torch.float32, device=y.device).unbind(0)
        return mean, var
    plan = cut(m)
    tile = plan.tile
    pmean = torch.empty(plan.parts, m.c, dtype=torch.float32, device=y.device)
    pm2 = torch.empty_like(pmean)
    with on(y):
        launch(stats_kernel, (plan.parts, plan.groups))(
            y, pmean, pm2, *reduction_arguments(m, plan),
            NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
        )  # fmt: skip
        return merge_stats(pmean, pm2, total, plan.per_chunk, running_mean, running_var, momentum, batches)


def _act(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, relu: bool,
    training: bool, count: Tensor | None, group: str | None,
) -> Tensor:  # fmt: skip
    m = matrix(y)
    z = torch.empty_like(y)
    if y.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(act_kernel, grid)(
                y, z, mean, var, gamma, beta, eps, m.rows, m.cols, m.c, m.image, RELU=relu,
                AFFINE=gamma is not None, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return z


def _reduce(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    m = matrix(y)
    if y.numel() == 0:
        return tuple(torch.zeros(2, m.c, dtype=torch.float32, device=y.device).unbind(0))  # type: ignore[return-value]
    plan = cut(m)
    tile = plan.tile
    partial = workspace(plan.parts, 2, m.c, y.device)
    p1, p2 = partial.unbind(0)
    with on(y):
        launch(reduce_kernel, (plan.parts, plan.groups))(
            dz.contiguous(memory_format=like(y, m)), y, mean, var, gamma, beta, p1, p2, eps,
            *reduction_arguments(m, plan), RELU=relu, AFFINE=gamma is not None, NHWC=m.nhwc,
            B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
        )  # fmt: skip
        return merge_sums(partial)  # type: ignore[return-value]


def _backward(
    dz: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    relu: bool, keep: Tensor | None, s1: Tensor | None, s2: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    m = matrix(y)
    dy = torch.empty_like(y)
    if y.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(backward_kernel, grid)(
                dz.contiguous(memory_format=like(y, m)), y, dy, mean, var, gamma, beta, keep, s1, s2, eps, scale,
                m.rows, m.cols, m.c, m.image, RELU=relu, AFFINE=gamma is not None, KEEP=keep is not None,
                BATCH=s1 is not None, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return dy


# ------------------------------------------------------------------------------------------------- registration


def _pair(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    c = y.shape[1]
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty(c, dtype=kind), y.new_empty(c, dtype=kind)


batch_norm_stats = register(
    "batch_norm_stats(Tensor y, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum,"
    " Tensor(c!)? batches=None) -> (Tensor, Tensor)",
    reference=reference.batch_norm_stats,
    triton=_stats,
    fake=_pair,
    differentiable=False,
    traffic=lambda y, *_: Traffic([y], partial_bytes(y, 2)),
)
batch_norm_reduce = register(
    "batch_norm_reduce(Tensor dz, Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, bool relu)"
    " -> (Tensor, Tensor)",
    reference=reference.batch_norm_reduce,
    triton=_reduce,
    fake=lambda dz, y, *rest: _pair(y),
    traffic=lambda dz, y, *_: Traffic([dz, y], partial_bytes(y, 2)),
)
batch_norm_backward = register(
    "batch_norm_backward(Tensor dz, Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
    " bool relu, Tensor? keep, Tensor? s1, Tensor? s2, Scalar scale) -> Tensor",
    reference=reference.batch_norm_backward,
    triton=_backward,
    fake=lambda dz, y, *rest: torch.empty_like(y),
    # Without ReLU (a[5]) and batch statistics (a[7]) y is not read.
    traffic=lambda dz, y, *a: Traffic([dz, y if a[5] or a[7] is not None else None]),
)


def in_dtype(value: Tensor, like: Tensor) -> Tensor:
    """A gradient in the dtype of what it is of."""
    return value if value.dtype == like.dtype else value.to(like.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    y, mean, var, gamma, beta, ctx.eps, ctx.relu, ctx.training, count, ctx.group = inputs
    store(ctx, y, mean, var, gamma, beta, count)


def _act_backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    y, mean, var, gamma, beta, count = recall(ctx)
    need_y, need_gamma, need_beta = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    sum_g: Any = None
    sum_gx: Any = None
    if need_gamma or need_beta or (ctx.training and need_y):
        sum_g, sum_gx = batch_norm_reduce(dz, y, mean, var, gamma, beta, ctx.eps, ctx.relu)
    dy = None
    if need_y:
        s1 = s2 = None
        scale = 0.0
        if ctx.training:
            (s1, s2), scale = over_group((sum_g, sum_gx), y, count, ctx.group)
        dy = batch_norm_backward(dz, y, mean, var, gamma, beta, ctx.eps, ctx.relu, None, s1, s2, scale)
    dgamma = in_dtype(sum_gx, gamma) if need_gamma else None
    dbeta = in_dtype(sum_g, beta) if need_beta else None
    return dy, None, None, dgamma, dbeta, None, None, None, None, None


batch_norm_act = register(
    "batch_norm_act(Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, bool relu,"
    " bool training, Tensor? count, str? group) -> Tensor",
    reference=reference.batch_norm_act,
    triton=_act,
    fake=lambda y, *rest: torch.empty_like(y),
    backward=_act_backward,
    setup_context=_setup,
    traffic=lambda y, *_: Traffic([y]),
)


# ---------------------------------------------------------------------------------------- ahead-of-time compilation


def aot_cases() -> Iterator[Case]:
    """Every launch that can be chosen."""
    forward = dict(RELU=True, AFFINE=True)
    yield from launches(stats_kernel, REDUCTION)
    yield from launches(reduce_kernel, REDUCTION, forward)
    yield from launches(act_kernel, ELEMENTWISE, forward)
    yield from launches(backward_kernel, ELEMENTWISE, dict(forward, KEEP=True, BATCH=True))
