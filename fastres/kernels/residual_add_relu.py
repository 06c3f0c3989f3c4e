"""The end of a residual block: batch norm of the branch, addition of the identity, ReLU; forward and backward.

    forward     out = relu(keep_n bn(y) + identity)          bn(y) = a (y - mean) + beta,  a = gamma rstd
                identity a tensor, or itself bn'(x') of a downsample branch; keep_n an optional factor of each sample
                (stochastic depth, arXiv:1603.09382)
    backward    g = dout [out > 0]                           also the gradient of a plain identity
                dbeta = sum keep g,  dgamma = sum keep g xhat,  xhat = (y - mean) rstd
                dy = a (keep g - dbeta / M - xhat dgamma / M),  and the same without keep for the downsample branch
    saved       y (and x' with a downsample branch), per-channel vectors, and the sign of out as one bit a value
    rounding    all arithmetic is fp32; out, g and the gradients are rounded once, when stored. bn(y) itself is never
                stored, so one rounding less than in the sequence of separate operators
    traffic     forward R y, identity, W out, bits. Backward with a plain identity: R dout, bits, y, W g with all sums
                in the same pass, then R g, y, W dy. With a downsample branch: R dout, bits, y, x' for the four sums,
                then R dout, bits, y, x', W dy, dx'; g is not stored.
    source      K. He et al., arXiv:1512.03385, figure 5, for the block

``add_relu`` is the same end without norms. Reductions are two-stage in a fixed order, as in ``batch_norm``.
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
    same_layout,
)
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_sums, workspace
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import over_group
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton
from fastres.kernels.batch_norm import batch_norm_backward, reduction_arguments

__all__ = ["add_relu", "aot_cases", "bn_add_bn_relu", "bn_add_relu", "masked"]


@triton.jit
def end_kernel(
    y_ptr, id_ptr, out_ptr, bits_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, eps2, keep_ptr, ROWS, COLS, C, IMAGE, BYTES,
    NORM: tl.constexpr, AFFINE: tl.constexpr, AFFINE2: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr,
    NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """out = relu(keep bn(y) + identity) and its sign bits; NORM norms: 0 none, 1 the branch's, 2 both."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, IMAGE, NHWC, B0, B1)
    v = tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32)
    if NORM > 0:
        mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
        gamma, beta = J.load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE)
        v = (v - mean) * (gamma * rstd) + beta
    if KEEP:
        v *= tl.load(keep_ptr + image, mask=image * IMAGE < ROWS, other=0.0).to(tl.float32)
    other = tl.load(id_ptr + off, mask=ok, other=0.0).to(tl.float32)
    if NORM > 1:
        mean, rstd = J.load_moments(mean2_ptr, var2_ptr, eps2, ch, ch_ok)
        gamma, beta = J.load_affine(gamma2_ptr, beta2_ptr, ch, ch_ok, AFFINE2)
        other = (other - mean) * (gamma * rstd) + beta
    v += other
    tl.store(out_ptr + off, J.round_to(J.relu(v), out_ptr.dtype.element_ty), mask=ok)
    if BITS:
        bit_off, bit_ok = J.bit_tile(ROWS, BYTES, B0, B1)
        tl.store(bits_ptr + bit_off, J.pack_bits(J.passes(v) & ok, B0, B1), mask=bit_ok)


@triton.jit
def masked_kernel(
    dout_ptr, bits_ptr, g_ptr, ROWS, COLS, BYTES, B0: tl.constexpr, B1: tl.constexpr
):  # fmt: skip
    """g = dout where the bit is set."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, COLS, ROWS, True, B0, B1)
    bit_off, bit_ok = J.bit_tile(ROWS, BYTES, B0, B1)
    live = J.unpack_bits(tl.load(bits_ptr + bit_off, mask=bit_ok, other=0), B0, B1)
    g = tl.load(dout_ptr + off, mask=ok, other=0.0)
    tl.store(g_ptr + off, tl.where(live, g, 0.0).to(g_ptr.dtype.element_ty), mask=ok)


@triton.jit
def end_reduce_kernel(
    dout_ptr, bits_ptr, y_ptr, id_ptr, g_ptr, mean_ptr, var_ptr, eps, mean2_ptr, var2_ptr, eps2, keep_ptr,
    part_ptr, STRIDE, LENGTH, C, HW, CHUNK, BYTES, PAIR: tl.constexpr, KEEP: tl.constexpr, NHWC: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Sums of the branch's norm (and, PAIR, of the downsample's) over chunk p; without PAIR it also stores g."""
    p = tl.program_id(0)
    start = p * CHUNK
    stop = tl.minimum(start + CHUNK, LENGTH)
    ch, ch_ok = J.reduction_channel(C, NHWC, B1)
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    if PAIR:
        mean2, rstd2 = J.load_moments(mean2_ptr, var2_ptr, eps2, ch, ch_ok)
        s3 = tl.zeros((B0, B1), tl.float32)
        s4 = tl.zeros((B0, B1), tl.float32)
    s1 = tl.zeros((B0, B1), tl.float32)
    s2 = tl.zeros((B0, B1), tl.float32)
    for t in range(0, J.reduction_steps(CHUNK, HW, NHWC, B0, B1)):
        row, col, off, ok, image = J.reduction_tile(t, start, stop, C, HW, NHWC, B0, B1)
        byte = tl.load(bits_ptr + row.to(tl.int64) * BYTES + col // 8, mask=ok, other=0).to(tl.int32)
        live = ((byte >> (col % 8)) & 1) != 0
        g = tl.where(live, tl.load(dout_ptr + off, mask=ok, other=0.0).to(tl.float32), 0.0)
        xhat = (tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean) * rstd
        if PAIR:
            xhat2 = (tl.load(id_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean2) * rstd2
            s3 += g
            s4 += tl.where(ok, g * xhat2, 0.0)
        else:
            tl.store(g_ptr + off, J.round_to(g, g_ptr.dtype.element_ty), mask=ok)
        if KEEP:
            g *= tl.load(keep_ptr + image, mask=image * (HW if NHWC else 1) < LENGTH, other=0.0).to(
                tl.float32
            )
        s1 += g
        s2 += tl.where(ok, g * xhat, 0.0)
    at = part_ptr + p * C + ch
    tl.store(at, J.column_sum(s1, NHWC), mask=ch_ok)
    tl.store(at + STRIDE, J.column_sum(s2, NHWC), mask=ch_ok)
    if PAIR:
        tl.store(at + 2 * STRIDE, J.column_sum(s3, NHWC), mask=ch_ok)
        tl.store(at + 3 * STRIDE, J.column_sum(s4, NHWC), mask=ch_ok)


@triton.jit
def normal_gradient(g, x_ptr, off, ok, mean_ptr, var_ptr, gamma_ptr, eps, s1_ptr, s2_ptr, scale, ch, ch_ok,
                    AFFINE: tl.constexpr, BATCH: tl.constexpr):  # fmt: skip
    """a (g - scale s1 - xhat scale s2), or a g with running statistics."""
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, ch, ch_ok)
    gamma, beta = J.load_affine(gamma_ptr, gamma_ptr, ch, ch_ok, AFFINE)
    if BATCH:
        xhat = (tl.load(x_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean) * rstd
        s1 = tl.load(s1_ptr + ch, mask=ch_ok, other=0.0) * scale
        s2 = tl.load(s2_ptr + ch, mask=ch_ok, other=0.0) * scale
        g = g - s1 - xhat * s2
    return g * (gamma * rstd)


@triton.jit
def end_pair_backward_kernel(
    dout_ptr, bits_ptr, y_ptr, id_ptr, dy_ptr, did_ptr, mean_ptr, var_ptr, gamma_ptr, eps, s1_ptr, s2_ptr, scale,
    mean2_ptr, var2_ptr, gamma2_ptr, eps2, s3_ptr, s4_ptr, scale2, keep_ptr, ROWS, COLS, C, IMAGE, BYTES,
    AFFINE: tl.constexpr, AFFINE2: tl.constexpr, BATCH: tl.constexpr, BATCH2: tl.constexpr, KEEP: tl.constexpr,
    NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Both norms' input gradients in one pass over dout and its bits."""
    off, ok, ch, ch_ok, image = J.elementwise_tile(ROWS, COLS, C, IMAGE, NHWC, B0, B1)
    bit_off, bit_ok = J.bit_tile(ROWS, BYTES, B0, B1)
    live = J.unpack_bits(tl.load(bits_ptr + bit_off, mask=bit_ok, other=0), B0, B1)
    g = tl.where(live, tl.load(dout_ptr + off, mask=ok, other=0.0).to(tl.float32), 0.0)
    d = normal_gradient(g, id_ptr, off, ok, mean2_ptr, var2_ptr, gamma2_ptr, eps2, s3_ptr, s4_ptr, scale2, ch, ch_ok,
                        AFFINE2, BATCH2)  # fmt: skip
    tl.store(did_ptr + off, J.round_to(d, did_ptr.dtype.element_ty), mask=ok)
    if KEEP:
        g *= tl.load(keep_ptr + image, mask=image * IMAGE < ROWS, other=0.0).to(tl.float32)
    d = normal_gradient(g, y_ptr, off, ok, mean_ptr, var_ptr, gamma_ptr, eps, s1_ptr, s2_ptr, scale, ch, ch_ok,
                        AFFINE, BATCH)  # fmt: skip
    tl.store(dy_ptr + off, J.round_to(d, dy_ptr.dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------------------------------- launchers


def _bits(y: Tensor, m: Matrix) -> Tensor:
    return torch.empty(m.rows, m.bytes, dtype=torch.uint8, device=y.device)


def _no_bits(y: Tensor) -> Tensor:
    return torch.empty(0, 0, dtype=torch.uint8, device=y.device)


def _end(
    y: Tensor, other: Tensor, first: tuple[Any, ...], second: tuple[Any, ...], keep: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    m = matrix(y)
    out = torch.empty_like(y)
    bits = _bits(y, m) if save else _no_bits(y)
    if y.numel():
        tile, grid = elementwise(m)
        none = (None, None, None, None, 0.0)
        with on(y):
            launch(end_kernel, grid)(
                y, same_layout(other, m), out, bits, *(first or none), *(second or none), keep,
                m.rows, m.cols, m.c, m.image, m.bytes, NORM=bool(first) + bool(second),
                AFFINE=bool(first) and first[2] is not None, AFFINE2=bool(second) and second[2] is not None,
                KEEP=keep is not None, BITS=save, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return out, bits


def _bn_add_relu(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None, identity: Tensor, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _end(y, identity, (mean, var, gamma, beta, eps), (), keep, save)


def _bn_add_bn_relu(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None, x: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None,
    beta2: Tensor | None, eps2: float, training2: bool, count2: Tensor | None, group2: str | None,
    keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _end(y, x, (mean, var, gamma, beta, eps), (mean2, var2, gamma2, beta2, eps2), keep, save)


def _add_relu(a: Tensor, b: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return _end(a, b, (), (), None, save)


def _masked(dout: Tensor, bits: Tensor, y: Tensor) -> Tensor:
    m = matrix(y)
    g = torch.empty_like(y)
    if y.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(masked_kernel, grid)(
                dout.contiguous(memory_format=like(y, m)), bits, g, m.rows, m.cols, m.bytes,
                B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return g


def _end_reduce(
    dout: Tensor, bits: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float, x: Tensor | None,
    mean2: Tensor | None, var2: Tensor | None, eps2: float, keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    m = matrix(y)
    pair = x is not None
    g = y.new_empty(0) if pair else torch.empty_like(y)
    if y.numel() == 0:
        s = torch.zeros(4, m.c, dtype=torch.float32, device=y.device).unbind(0)
        return g, s[0], s[1], s[2][: m.c * pair], s[3][: m.c * pair]
    plan = cut(m)
    tile = plan.tile
    partial = workspace(plan.parts, 4 if pair else 2, m.c, y.device)
    with on(y):
        launch(end_reduce_kernel, (plan.parts, plan.groups))(
            dout.contiguous(memory_format=like(y, m)), bits, y, None if x is None else same_layout(x, m), g,
            mean, var, eps, mean2, var2, eps2, keep, partial, plan.parts * m.c, *reduction_arguments(m, plan), m.bytes,
            PAIR=pair, KEEP=keep is not None, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
        )  # fmt: skip
        sums = merge_sums(partial)
    s3, s4 = sums[2:] if pair else partial.new_empty(2, 0).unbind(0)
    return g, sums[0], sums[1], s3, s4


def _end_pair_backward(
    dout: Tensor, bits: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float,
    s1: Tensor | None, s2: Tensor | None, scale: float, x: Tensor, mean2: Tensor, var2: Tensor,
    gamma2: Tensor | None, eps2: float, s3: Tensor | None, s4: Tensor | None, scale2: float, keep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m = matrix(y)
    dy, dx = torch.empty_like(y), torch.empty_like(x)
    if y.numel():
        tile, grid = elementwise(m)
        with on(y):
            launch(end_pair_backward_kernel, grid)(
                dout.contiguous(memory_format=like(y, m)), bits, y, same_layout(x, m), dy, dx, mean, var, gamma, eps,
                s1, s2, scale, mean2, var2, gamma2, eps2, s3, s4, scale2, keep, m.rows, m.cols, m.c, m.image, m.bytes,
                AFFINE=gamma is not None, AFFINE2=gamma2 is not None, BATCH=s1 is not None, BATCH2=s3 is not None,
                KEEP=keep is not None, NHWC=m.nhwc, B0=tile.b0, B1=tile.b1, num_warps=tile.warps,
            )  # fmt: skip
    return dy, dx


# ------------------------------------------------------------------------------------------------- registration


def _fake_end(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    m = matrix(y)
    save = rest[-1]
    return torch.empty_like(y), y.new_empty((m.rows, m.bytes) if save else (0, 0), dtype=torch.uint8)


def _fake_reduce(dout: Tensor, bits: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    c, x = y.shape[1], rest[3]
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    g = torch.empty_like(y) if x is None else y.new_empty(0)
    return g, *(y.new_empty(c if i < 2 or x is not None else 0, dtype=kind) for i in range(4))


masked = register(
    "masked(Tensor dout, Tensor bits, Tensor y) -> Tensor",
    reference=reference.masked,
    triton=_masked,
    fake=lambda dout, bits, y: torch.empty_like(y),
    traffic=lambda dout, bits, y: Traffic([dout, bits]),
)
end_reduce = register(
    "bn_add_relu_reduce(Tensor dout, Tensor bits, Tensor y, Tensor mean, Tensor var, float eps, Tensor? x,"
    " Tensor? mean2, Tensor? var2, float eps2, Tensor? keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.bn_add_relu_reduce,
    triton=_end_reduce,
    fake=_fake_reduce,
    traffic=lambda dout, bits, y, mean, var, eps, x, *_: Traffic(
        [dout, bits, y, x], partial_bytes(y, 2 if x is None else 4)
    ),
)
end_pair_backward = register(
    "bn_add_bn_relu_backward(Tensor dout, Tensor bits, Tensor y, Tensor mean, Tensor var, Tensor? gamma, float eps,"
    " Tensor? s1, Tensor? s2, Scalar scale, Tensor x, Tensor mean2, Tensor var2, Tensor? gamma2, float eps2,"
    " Tensor? s3, Tensor? s4, Scalar scale2, Tensor? keep) -> (Tensor, Tensor)",
    reference=reference.bn_add_bn_relu_backward,
    triton=_end_pair_backward,
    fake=lambda dout, bits, y, *rest: (torch.empty_like(y), torch.empty_like(rest[7])),
    # Without batch statistics (a[4], a[12]) a norm's input is not read.
    traffic=lambda dout, bits, y, *a: Traffic(
        [dout, bits, y if a[4] is not None else None, a[7] if a[12] is not None else None]
    ),
)


def _setup_one(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mean, var, gamma, beta, ctx.eps, ctx.training, count, ctx.group, identity, keep, ctx.saved = inputs
    store(ctx, y, mean, var, gamma, beta, count, keep, output[1])


def _needs_bits(ctx: Any, op: str) -> None:
    if not ctx.saved:
        raise RuntimeError(
            f"fastres::{op}: called with save=False, which keeps no mask; backward needs save=True"
        )


def _backward_one(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    _needs_bits(ctx, "bn_add_relu")
    y, mean, var, gamma, beta, count, keep, bits = recall(ctx)
    need_y, need_gamma, need_beta = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    sum_g: Any = None
    sum_gx: Any = None
    dy = dgamma = dbeta = None
    if need_gamma or need_beta or (ctx.training and need_y):
        g, sum_g, sum_gx, _, _ = end_reduce(dout, bits, y, mean, var, ctx.eps, None, None, None, 0.0, keep)
        dgamma = sum_gx.to(gamma.dtype) if need_gamma else None
        dbeta = sum_g.to(beta.dtype) if need_beta else None
    else:
        g = masked(dout, bits, y)
    if need_y:
        (s1, s2), scale = (None, None), 0.0
        if ctx.training:
            (s1, s2), scale = over_group((sum_g, sum_gx), y, count, ctx.group)
        dy = batch_norm_backward(g, y, mean, var, gamma, beta, ctx.eps, False, keep, s1, s2, scale)
    grads: list[Tensor | None] = [None] * 12
    grads[0], grads[3], grads[4] = dy, dgamma, dbeta
    grads[9] = g if ctx.needs_input_grad[9] else None
    return tuple(grads)


def _setup_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mean, var, gamma, beta, ctx.eps, ctx.training, count, ctx.group = inputs[:9]
    x, mean2, var2, gamma2, beta2, ctx.eps2, ctx.training2, count2, ctx.group2 = inputs[9:18]
    keep, ctx.saved = inputs[18:]
    store(
        ctx, y, mean, var, gamma, beta, count, x, mean2, var2, gamma2, beta2, count2, keep, output[1]
    )  # fmt: skip


def _backward_pair(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    _needs_bits(ctx, "bn_add_bn_relu")
    y, mean, var, gamma, beta, count, x, mean2, var2, gamma2, beta2, count2, keep, bits = recall(ctx)
    need = ctx.needs_input_grad
    _, g1, gx1, g2, gx2 = end_reduce(dout, bits, y, mean, var, ctx.eps, x, mean2, var2, ctx.eps2, keep)
    dy = dx = None
    if need[0] or need[9]:
        (s1, s2), scale, (s3, s4), scale2 = (None, None), 0.0, (None, None), 0.0
        if ctx.training and ctx.training2 and ctx.group is not None and ctx.group == ctx.group2:
            (s1, s2, s3, s4), scale = over_group((g1, gx1, g2, gx2), y, count, ctx.group)
            scale2 = scale
        else:
            if ctx.training:
                (s1, s2), scale = over_group((g1, gx1), y, count, ctx.group)
            if ctx.training2:
                (s3, s4), scale2 = over_group((g2, gx2), x, count2, ctx.group2)
        dy, dx = end_pair_backward(
            dout, bits, y, mean, var, gamma, ctx.eps, s1, s2, scale, x, mean2, var2, gamma2, ctx.eps2, s3, s4, scale2,
            keep,
        )  # fmt: skip
    grads: list[Tensor | None] = [None] * 20
    grads[0], grads[9] = (dy if need[0] else None), (dx if need[9] else None)
    for i, value, like_ in ((3, gx1, gamma), (4, g1, beta), (12, gx2, gamma2), (13, g2, beta2)):
        grads[i] = value.to(like_.dtype) if need[i] else None
    return tuple(grads)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.saved = inputs[2]
    store(ctx, output[1], output[0])


def _backward_add(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    _needs_bits(ctx, "add_relu")
    bits, out = recall(ctx)
    g = masked(dout, bits, out)
    return (g if ctx.needs_input_grad[0] else None), (g if ctx.needs_input_grad[1] else None), None


_NORM = "Tensor {0}, Tensor mean{1}, Tensor var{1}, Tensor? gamma{1}, Tensor? beta{1}, float eps{1}, bool training{1}, Tensor? count{1}, str? group{1}"  # noqa: E501
bn_add_relu = register(
    f"bn_add_relu({_NORM.format('y', '')}, Tensor identity, Tensor? keep, bool save) -> (Tensor, Tensor)",
    reference=reference.bn_add_relu,
    triton=_bn_add_relu,
    fake=_fake_end,
    backward=_backward_one,
    setup_context=_setup_one,
    traffic=lambda y, *a: Traffic([y, a[8]]),  # a[8]: the identity
)
bn_add_bn_relu = register(
    f"bn_add_bn_relu({_NORM.format('y', '')}, {_NORM.format('x', '2')}, Tensor? keep, bool save) -> (Tensor, Tensor)",
    reference=reference.bn_add_bn_relu,
    triton=_bn_add_bn_relu,
    fake=_fake_end,
    backward=_backward_pair,
    setup_context=_setup_pair,
    traffic=lambda y, *a: Traffic([y, a[8]]),  # a[8]: the downsample convolution's output
)
add_relu = register(
    "add_relu(Tensor a, Tensor b, bool save) -> (Tensor, Tensor)",
    reference=reference.add_relu,
    triton=_add_relu,
    fake=_fake_end,
    backward=_backward_add,
    setup_context=_setup_add,
    traffic=lambda a, b, save: Traffic([a, b]),
)


def aot_cases() -> Iterator[Case]:
    """Every launch that can be chosen."""
    bits = {"bits_ptr": "*u8"}
    both = dict(AFFINE=True, AFFINE2=True, KEEP=True)
    yield from launches(
        end_kernel, ELEMENTWISE, *(dict(both, NORM=n, BITS=True) for n in (0, 1, 2)), types=bits
    )
    yield from launches(
        end_pair_backward_kernel, ELEMENTWISE, dict(both, BATCH=True, BATCH2=True), types=bits
    )
    yield from launches(masked_kernel, ELEMENTWISE, types=bits, layout=False)
    yield from launches(
        end_reduce_kernel, REDUCTION, *(dict(KEEP=True, PAIR=pair) for pair in (False, True)), types=bits
    )
