"""The start of a residual block: the first 1x1 convolution, its norm and ReLU, and the identity.

    forward     y = x W^T with mean and var of y as stored, from the product's epilogue;  z = relu(bn(y))
                identity = x, or the pixels of x that a strided 1x1 downsample reads
    backward    s1 = sum g, s2 = sum g xhat,  g = dz [z > 0]
                dy = a (g - s1 / M - xhat s2 / M)                    formed while loading, stored once
                dx = [x > 0] (dy W + didentity)                      both added and masked in the product's epilogue;
                                                                     a strided didentity only where it was read
                dW = dy^T x                                          two-stage, in a fixed order
    mask        where x is the output of a block (``bits``), its gradient leaves here with that block's ReLU applied:
                it is that block's g. Without bits dx is not masked.
    saved       x and W, in the dtype of x, as the convolution alone; y, the vectors, and the bits
    rounding    y as stored is what is measured; dy and dx are rounded once. Eager rounds dy W and then the sum.
    traffic     forward R x, W y (z is the norm's own pass); backward R dz, y (sums), R dz, y, didentity, bits,
                W dy, dx, then R dy, x. Left to autograd: a pass more for statistics, dy read once more, dy W
                written and read for the sum, and the sum read and written for the mask, over the network's widest
                tensor.
    source      own derivation; batch normalisation as in ``batch_norm``

Two outputs make autograd hand both gradients to one backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastres import reference_pointwise as reference
from fastres.kernels import _jit as J
from fastres.kernels._aot import STORAGE, Case, signature
from fastres.kernels._launch import on
from fastres.kernels._library import Traffic, applied, register, unwatched
from fastres.kernels._merge import merge_stats
from fastres.kernels._pointwise import product
from fastres.kernels._pointwise_plan import GEMM, precision, tile
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import over_group
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton
from fastres.kernels.batch_norm import batch_norm_act, batch_norm_backward, batch_norm_reduce, in_dtype
from fastres.kernels.fused_conv_bn_relu import p_sums

__all__ = ["aot_cases", "block_start", "dgrad", "gradients", "odd_cases", "start_conv"]


@triton.jit
def conv_kernel(
    x_ptr, w_ptr, y_ptr, pmean_ptr, pm2_ptr, M, N, C,
    STATS: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, C] W^T; with STATS row pm of the workspaces gets mean and M2 of the stored tile."""
    across = tl.cdiv(N, BN)
    pm = tl.program_id(0) // across
    rows = pm * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    ok_m, ok_n, wide = (rows < M)[:, None], n < N, rows.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    acc = product(
        acc, x_ptr, x_ptr, x_ptr, x_ptr, x_ptr, 0.0, w_ptr, wide, ok_m, n, ok_n, C, False, False, PREC, BK
    )
    y = J.round_to(acc, y_ptr.dtype.element_ty)
    ok = ok_m & ok_n[None, :]
    tl.store(y_ptr + wide * N + n[None, :], y, mask=ok)
    if STATS:
        v = tl.where(ok, y.to(tl.float32), 0.0)
        count = tl.minimum(M - pm * BM, BM).to(tl.float32)
        mean = tl.sum(v, 0) / count
        d = tl.where(ok, v - mean[None, :], 0.0)
        tl.store(pmean_ptr + pm * N + n, mean, mask=ok_n)
        tl.store(pm2_ptr + pm * N + n, tl.sum(d * d, 0), mask=ok_n)


@triton.jit
def dy_tile(
    g_ptr, y_ptr, dy_ptr, at, k, ok_m, first, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, s1_ptr, s2_ptr, scale, C,
    AFFINE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """dy at columns k, rounded; stored where ``first``."""
    ok = ok_m & (k < C)[None, :]
    g = tl.load(g_ptr + at + k[None, :], mask=ok, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at + k[None, :], mask=ok, other=0.0).to(tl.float32)
    ch, ch_ok = k[None, :], (k < C)[None, :]
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
    dy = J.norm_gradient(g, y, mean, rstd, gamma, beta, s1_ptr, s2_ptr, scale, ch, ch_ok, True, BATCH)
    dy = J.round_to(tl.where(ok, dy, 0.0), g_ptr.dtype.element_ty)
    tl.store(dy_ptr + at + k[None, :], dy, mask=ok & first)
    return dy


@triton.jit
def dgrad_kernel(
    g_ptr, y_ptr, dy_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, s1_ptr, s2_ptr, scale, w_ptr, did_ptr, bits_ptr,
    dx_ptr, M, N, C, BYTES, HW, OW, H2, W2,
    AFFINE: tl.constexpr, BATCH: tl.constexpr, SUM: tl.constexpr, MASK: tl.constexpr, STRIDE: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = [x > 0] (dy [M, C] W + didentity), W [C, N]; with STRIDE didentity is [.., H2, W2] and has the pixels
    (STRIDE i, STRIDE j) of dx's images of HW pixels, OW a line. dy is carried through the loop, as z in ``product``."""
    across = tl.cdiv(N, BN)
    j = tl.program_id(0) % across
    rows = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    n = j * BN + tl.arange(0, BN)
    ok_m, ok_n, wide = (rows < M)[:, None], n < N, rows.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    dy = dy_tile(g_ptr, y_ptr, dy_ptr, wide * C, k, ok_m, j == 0, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, s1_ptr,
                 s2_ptr, scale, C, AFFINE, BATCH)  # fmt: skip
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_ptr + k[:, None] * N + n[None, :], mask=(k < C)[:, None] & ok_n[None, :], other=0.0)
        acc = J.dot(dy, w, acc, PREC)
        dy = dy_tile(g_ptr, y_ptr, dy_ptr, wide * C, k + BK, ok_m, j == 0, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                     s1_ptr, s2_ptr, scale, C, AFFINE, BATCH)  # fmt: skip
    ok = ok_m & ok_n[None, :]
    if SUM:
        source, hit = wide, ok
        if STRIDE > 1:
            h = (rows % HW) // OW
            w = (rows % HW) % OW
            hit = ok & ((h % STRIDE == 0) & (w % STRIDE == 0))[:, None]
            source = (((rows // HW).to(tl.int64) * H2 + h // STRIDE) * W2 + w // STRIDE)[:, None]
        acc += tl.load(did_ptr + source * N + n[None, :], mask=hit, other=0.0).to(tl.float32)
    if MASK:
        byte = tl.load(bits_ptr + wide * BYTES + n[None, :] // 8, mask=ok, other=0).to(tl.int32)
        acc = tl.where(((byte >> (n[None, :] % 8)) & 1) != 0, acc, 0.0)
    tl.store(dx_ptr + wide * N + n[None, :], J.round_to(acc, dx_ptr.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------------- launchers


def _stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, C, 1, 1] as kernels read it: rows of C values of this type."""
    return weight if weight.dtype == dtype and weight.is_contiguous() else weight.to(dtype).contiguous()


def _conv(
    x: Tensor,
    weight: Tensor,
    stats: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = x.shape
    n, rows = weight.shape[0], b * h * w
    y = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    t = tile("start", x, n, c)
    parts = -(-rows // t.m)
    pmean = torch.empty(parts if stats else 0, n, dtype=torch.float32, device=x.device)
    pm2 = torch.empty_like(pmean)
    with on(x):
        launch(conv_kernel, (parts * -(-n // t.n),))(
            x, _stored(weight, x.dtype), y, pmean, pm2, rows, n, c, STATS=stats, PREC=precision(x),
            BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if not stats:
            return y, pmean.view(-1), pm2.view(-1)
        return y, *merge_stats(pmean, pm2, rows, t.m, running_mean, running_var, momentum, batches)


def _dgrad(
    dz: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    s1: Tensor | None, s2: Tensor | None, scale: float, weight: Tensor, did: Tensor | None, bits: Tensor | None,
    x: Tensor, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dz = dz.contiguous(memory_format=torch.channels_last)
    c, n = weight.shape[:2]
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    b, _, height, width = x.shape
    rows = b * height * width
    small = (1, 1)
    if did is not None:
        did = did.contiguous(memory_format=torch.channels_last)
        small = (did.shape[2], did.shape[3])
    t = tile("dgrad", x, n, c)
    with on(x):
        launch(dgrad_kernel, (-(-rows // t.m) * -(-n // t.n),))(
            dz, y, dy, mean, var, gamma, beta, eps, s1, s2, scale, _stored(weight, x.dtype), did, bits, dx,
            rows, n, c, (n + 7) // 8, height * width, width, *small, AFFINE=gamma is not None, BATCH=s1 is not None,
            SUM=did is not None, MASK=bits is not None, STRIDE=stride, PREC=precision(x), BM=t.m, BN=t.n, BK=t.k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dx, dy


# ------------------------------------------------------------------------------------------------- registration


def _fake_conv(x: Tensor, weight: Tensor, stats: bool, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, _, h, w = x.shape
    n = weight.shape[0]
    y = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = (x.new_empty(n if stats else 0, dtype=kind) for _ in range(2))
    return y, mean, var


def _conv_traffic(x: Tensor, weight: Tensor, stats: bool, *rest: Any) -> Traffic:
    n, c = weight.shape[:2]
    rows = x.numel() // c
    partials = 8 * 2 * -(-rows // tile("start", x, n, c).m) * n if stats else 0
    return Traffic([x, weight], partials, 2 * rows * n * c)


start_conv = register(
    "block_start_conv(Tensor x, Tensor weight, bool stats, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " float momentum, Tensor(c!)? batches=None) -> (Tensor, Tensor, Tensor)",
    reference=reference.block_start_conv,
    triton=_conv,
    fake=_fake_conv,
    traffic=_conv_traffic,
    differentiable=False,
)
dgrad = register(
    "block_start_dgrad(Tensor dz, Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
    " Tensor? s1, Tensor? s2, Scalar scale, Tensor weight, Tensor? did, Tensor? bits, Tensor x, int stride)"
    " -> (Tensor, Tensor)",
    reference=reference.block_start_dgrad,
    triton=_dgrad,
    traffic=lambda dz, y, mean, var, gamma, beta, eps, s1, s2, scale, weight, did, bits, *_: Traffic(
        [dz, y, weight, did, bits], flops=2 * dz.numel() * weight.shape[1]
    ),
    fake=lambda dz, y, *rest: (torch.empty_like(rest[11]), torch.empty_like(y)),
)


class _BlockStart(torch.autograd.Function):
    """z and the identity, differentiable in x, W, gamma and beta; y and its statistics are given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, low: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor,
        mean: Tensor, var: Tensor, count: Tensor | None, bits: Tensor | None, eps: float, batch: bool,
        group: str | None, stride: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        store(ctx, x, low, gamma, beta, y, mean, var, count, bits)
        ctx.dtype = weight.dtype
        ctx.eps, ctx.batch, ctx.group, ctx.stride = eps, batch, group, stride
        act = batch_norm_act.at(unwatched(y, mean, var, gamma, beta))
        z = act(y, mean, var, gamma, beta, eps, True, batch, count, group)
        return z, x[:, :, ::stride, ::stride]

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, did: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        x, low, gamma, beta, y, mean, var, count, bits = recall(ctx)
        if dz is None:
            dz = torch.zeros_like(y)
        dx, dw, dgamma, dbeta = gradients(
            dz, did, x, low, gamma, beta, y, mean, var, count, bits, ctx.eps, ctx.batch, ctx.group, ctx.stride,
            unwatched(dz, gamma, beta, mean, var), need[0], need[1], need[3] or need[4],
        )  # fmt: skip
        dw = None if dw is None else dw.to(ctx.dtype)
        return dx, dw, None, dgamma if need[3] else None, dbeta if need[4] else None, *(None,) * 9


def gradients(
    dz: Tensor, did: Tensor | None, x: Tensor, low: Tensor, gamma: Tensor | None, beta: Tensor | None,
    y: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, bits: Tensor | None, eps: float, batch: bool,
    group: str | None, stride: int, fast: bool, need_x: bool = True, need_w: bool = True, need_affine: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The backward of a block's start: gradients of x, of W in the accumulators' type, of gamma and beta; None where
    not needed. ``fast``: what ``unwatched`` says."""
    norm = (y, mean, var, gamma, beta, eps)
    sums: Any = (None, None)
    totals: Any = (None, None)
    scale = 0.0
    if batch or need_affine:
        sums = batch_norm_reduce.at(fast)(dz, *norm, True)
    if batch:
        totals, scale = over_group(sums, y, count, group)
    dx = dw = dgamma = dbeta = None
    if need_x:
        dx, dy = dgrad.at(fast)(dz, *norm, *totals, scale, low, did, bits, x, stride)
    else:
        dy = batch_norm_backward.at(fast)(dz, *norm, True, None, *totals, scale)
    if need_w:
        flat, _ = p_sums.at(fast)(dy, None, x, *(None,) * 4, 0.0, False, None, None, None, 1, None)
        dw = flat.as_strided(low.shape, (low.shape[1], 1, 1, 1))  # a slice and a view of it would be two
    if need_affine and gamma is not None and beta is not None:
        dgamma, dbeta = in_dtype(sums[1], gamma), in_dtype(sums[0], beta)
    return dx, dw, dgamma, dbeta


_block_start = applied(_BlockStart)


def block_start(
    x: Tensor, weight: Tensor, low: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor, mean: Tensor,
    var: Tensor, count: Tensor | None = None, bits: Tensor | None = None, *, eps: float = 1e-5, batch: bool = True,
    group: str | None = None, stride: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The activation after the first convolution and norm, and the identity of a block.

    Args:
        x: [B, Cin, H, W], channels_last, float32, float16 or bfloat16 (float64 on the CPU).
        weight: [Cout, Cin, 1, 1], any floating dtype.
        low: the weight in x's dtype, without a gradient.
        gamma, beta: [Cout], or None.
        y, mean, var: the convolution's output and its statistics, from ``start_conv``; or running statistics.
        count, group: values a channel over the process group that the statistics were merged over, and its name.
        bits: sign bits of x, where its gradient is wanted with the ReLU that made x applied.
        eps, batch: of the norm; whether mean and var are of this batch.
        stride: of the 1x1 downsample that will read the identity; 1 for a plain identity.

    Returns:
        z [B, Cout, H, W] and the view x[:, :, ::stride, ::stride]; to be used in place of x for the identity.
    """
    return _block_start(x, weight, low, gamma, beta, y, mean, var, count, bits, eps, batch, group, stride)


def _cases(which: tuple[int, ...]) -> Iterator[Case]:
    for storage in STORAGE:
        types = {"w_ptr": f"*{storage}", "bits_ptr": "*u8"}
        options = dict(AFFINE=True, BATCH=True, SUM=True, MASK=True)
        for name, kernel, flags in (
            ("start", conv_kernel, dict(STATS=True)),
            ("dgrad", dgrad_kernel, dict(options, STRIDE=1)),
            ("dgrad", dgrad_kernel, dict(options, STRIDE=2)),
        ):
            aligned = [a for a in kernel.arg_names if a.endswith("_ptr") or a in ("N", "C")]
            for t in dict.fromkeys(GEMM[name][storage != "fp32"][i] for i in which):
                yield Case(
                    f"{name}{flags.get('STRIDE', '')}-{storage}-{t.m}x{t.n}x{t.k}", kernel,
                    signature(kernel, storage, types), dict(flags, PREC="tf32", BM=t.m, BN=t.n, BK=t.k),
                    dict(num_warps=t.warps, num_stages=t.stages), aligned,
                )  # fmt: skip


def aot_cases() -> Iterator[Case]:
    """Every launch on sizes that are multiples of 16."""
    return _cases((0, 1))


def odd_cases() -> Iterator[Case]:
    """Every launch on other sizes."""
    return _cases((2,))
