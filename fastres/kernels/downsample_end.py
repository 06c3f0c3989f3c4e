"""The end of a block of 3x3 convolutions with a downsample, without the downsample convolution's output.

    forward     out = relu(keep_n bn(y) + x Wf^T + bias)     y: raw output of the last 3x3; x: the pixels that the
                strided 1x1 downsample reads. Wf and bias are its convolution with its norm folded in, from the moments
                of x (``fused_conv_bn_relu``: ``moments``, ``fold``), so that y' = x W^T [M, N] is never formed
    backward    g = dout [out > 0]
                of bn: dbeta = sum keep g, dgamma = sum keep g xhat, dy as in ``batch_norm``
                of the downsample: P = g^T (x - mu), then dW', dgamma', dbeta' and dx = g Wf + (x - mu) B - ... as in
                ``fused_conv_bn_relu``, at the pixels that were read
    fork        dx is of the pixels that the downsample read. It is added in place to the gradient that the block's
                first convolution makes of all of x (``fork``), where autograd would make one of all pixels of it too
    saved       y, x, per-channel vectors, one bit a value of out, and matrices the size of the weight
    rounding    as in ``fused_conv_bn_relu``; out is rounded once
    traffic     with T the bytes of out, X those of x at the pixels read and F of all of x: forward R x (Gram), R y, x,
                W out, bits; backward R dout, bits, y, W g (sums), R g, x (P), R g, x, W dx, R g, y, W dy, and R dx,
                R W the pixels read (fork): 10 T + 8 X. With y' kept: 15 T + 2 X + 4 F, as autograd writes dx for all
                pixels, and reads and writes F to add it.
    source      own derivation; block of K. He et al., arXiv:1512.03385, figure 5

The two norms' sums, dy and dx are made by the operators of ``residual_add_relu``, ``fused_conv_bn_relu`` and
``batch_norm``; the one kernel here is the forward's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import reference_pointwise as reference
from fastres.kernels import _jit as J
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels._aot import STORAGE, Case, signature
from fastres.kernels._launch import channels_last, on
from fastres.kernels._library import Traffic, applied, register, unwatched
from fastres.kernels._pointwise import product, source_rows
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import over_group
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton
from fastres.kernels.batch_norm import batch_norm_backward
from fastres.kernels.block_end import Branch, Folded, _local, _matrices, _Options, _Sums
from fastres.kernels.residual_add_relu import end_reduce, masked

__all__ = ["Normed", "aot_cases", "downsample_end", "end", "fork", "odd_cases", "saving"]


@triton.jit
def downsample_end_kernel(
    y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, x_ptr, w_ptr, bias_ptr, keep_ptr, out_ptr, bits_ptr,
    M, N, C, BYTES, HW, OW, H, W,
    AFFINE: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = relu(keep bn(y) + x Wf^T + bias) and its sign bits, with x at the pixels that a strided 1x1 reads."""
    across = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    ok_m, ok_n, wide = (rows < M)[:, None], n < N, rows.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    source = source_rows(rows, HW, OW, H, W, STRIDE)[:, None]
    acc = product(
        acc, x_ptr, x_ptr, x_ptr, x_ptr, x_ptr, 0.0, w_ptr, source, ok_m, n, ok_n, C, False, False, PREC, BK
    )
    acc += tl.load(bias_ptr + n, mask=ok_n, other=0.0)[None, :]
    off = wide * N + n[None, :]
    ok = ok_m & ok_n[None, :]
    mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, n[None, :], ok_n[None, :])
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, n[None, :], ok_n[None, :], AFFINE)
    v = (tl.load(y_ptr + off, mask=ok, other=0.0).to(tl.float32) - mean) * (gamma * rstd) + beta
    if KEEP:
        v *= tl.load(keep_ptr + rows // HW, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    acc += v
    tl.store(out_ptr + off, J.round_to(J.relu(acc), out_ptr.dtype.element_ty), mask=ok)
    if BITS:
        byte = (tl.program_id(0) % across) * (BN // 8) + tl.arange(0, BN // 8)
        bits = J.pack_bits(J.passes(acc) & ok, BM, BN)
        tl.store(bits_ptr + wide * BYTES + byte[None, :], bits, mask=ok_m & (byte < BYTES)[None, :])


def _end(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, x: Tensor,
    wf: Tensor, bias: Tensor, stride: int, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    for name, given in (("y", y), ("x", x)):
        if not channels_last(given):
            raise ValueError(
                f"downsample_end: {name} has stride {list(given.stride())}; wanted channels_last"
            )
    (n, c), hw = wf.shape, y.shape[2] * y.shape[3]
    rows = y.shape[0] * hw
    out = torch.empty_like(y)
    bits = torch.empty((rows, (n + 7) // 8) if save else (0, 0), dtype=torch.uint8, device=y.device)
    t = plan.tile("down", x, n, c)
    with on(y):
        launch(downsample_end_kernel, (-(-rows // t.m) * -(-n // t.n),))(
            y, mean, var, gamma, beta, eps, x, wf, bias, keep, out, bits, rows, n, c, (n + 7) // 8, hw, y.shape[3],
            *x.shape[2:], AFFINE=gamma is not None, KEEP=keep is not None, BITS=save, STRIDE=stride,
            PREC=plan.precision(x), BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out, bits


def _fake_end(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, n, h, w = y.shape
    size = (b * h * w, (n + 7) // 8) if rest[-1] else (0, 0)
    return torch.empty_like(y), y.new_empty(size, dtype=torch.uint8)


def _traffic(y: Tensor, *a: Any) -> Traffic:
    x, wf, stride = a[5], a[6], a[8]
    return Traffic([y, x[:, :, ::stride, ::stride], wf], flops=2 * y.numel() * wf.shape[1])


end = register(
    "downsample_end(Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, Tensor x, Tensor wf,"
    " Tensor bias, int stride, Tensor? keep, bool save) -> (Tensor, Tensor)",
    reference=reference.downsample_end,
    triton=_end,
    traffic=_traffic,
    fake=_fake_end,
)


# -------------------------------------------------------------------------------------------- differentiable


_PLAIN = plan.Prologue()  # no norm in front of the downsample


class Normed(NamedTuple):
    """The branch: its last convolution's output, and the norm behind it with its statistics."""

    y: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    batch: bool  # batch statistics (else running ones)
    values: Tensor | None = None  # a channel's, where statistics were merged over the group of this name
    group: str | None = None


class _DownsampleEnd(torch.autograd.Function):
    """Differentiable in y, x, W and the affine parameters of both norms."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor | None, beta: Tensor | None, x: Tensor, weight: Tensor,
        gamma2: Tensor | None, beta2: Tensor | None, keep: Tensor | None, mean: Tensor, var: Tensor,
        count: Tensor | None, eps: float, batch: bool, group: str | None, second: _Options, base: Tensor | None,
        save: bool, *folded: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x = x if base is None else base
        out, bits = end.at(unwatched(y, mean, var, gamma, beta))(
            y, mean, var, gamma, beta, eps, x, folded[0], folded[1], second.stride, keep, save
        )
        ctx.set_materialize_grads(False)
        if save:
            store(ctx, bits, keep, y, mean, var, gamma, beta, count, x, weight, gamma2, *folded)
            ctx.eps, ctx.batch, ctx.group, ctx.second = eps, batch, group, second
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(need)
        if dout is None:
            return tuple(grads)
        bits, keep, y, mean, var, gamma, beta, count, x, weight, gamma2, *rest = recall(ctx)
        o, f = ctx.second, Folded(*rest)
        fast = unwatched(dout, mean, var, gamma, gamma2)
        # As where y' is formed: what either gradient needs of the other ranks is asked for in one collective.
        need_y, need_x, input_grad = need[0], need[3], need[0] or need[3] or need[4]
        shared = input_grad and ctx.batch and o.batch and ctx.group is not None and ctx.group == o.group
        s1 = s2 = None
        if need[1] or need[2] or (ctx.batch and (need_y or ctx.group is not None)):
            g, s1, s2, _, _ = end_reduce.at(fast)(
                dout, bits, y, mean, var, ctx.eps, None, None, None, 0.0, keep
            )
        else:
            g = masked.at(fast)(dout, bits, y)
        sums: Tensor | None = None
        local: _Sums = None
        if any(need[4:7]) or (o.batch and (need_x or shared)):
            sums, _ = ops.p_sums.at(fast)(g, None, x, *_PLAIN, f.anchor, None, None, o.stride, None)
            local = _local(sums, weight, f, o)
        first: Any = (None, None)
        scale, second = 0.0, None
        if shared and local is not None and s1 is not None and s2 is not None:
            totals, scale = over_group((s1, s2, *local), y, count, ctx.group)
            first, second = totals[:2], totals[2:]
        elif input_grad:
            if ctx.batch and s1 is not None and s2 is not None:
                first, scale = over_group((s1, s2), y, count, ctx.group)
            if local is not None:
                second, _ = over_group(local, y, f.values, o.group)
        if need_y:
            grads[0] = batch_norm_backward.at(fast)(
                g, y, mean, var, gamma, beta, ctx.eps, False, keep, *first, scale
            )
        b = shift = dgamma2 = dbeta2 = None
        if sums is not None:
            rows = dout.shape[0] * dout.shape[2] * dout.shape[3]
            grads[4], dgamma2, dbeta2, b, shift = _matrices(sums, weight, gamma2, f, o, x, second, rows, fast)
        if need_x:
            none = (None,) * 6  # of keep and of a second branch
            grads[3] = ops.pointwise_dz.at(fast)(g, f.wf, x, *_PLAIN, b, shift, f.mu, *none, o.stride)[0]
        for i, value, like in ((1, s2, gamma), (2, s1, beta), (5, dgamma2, gamma2), (6, dbeta2, gamma2)):
            grads[i] = value.to(like.dtype) if value is not None and like is not None else None
        return tuple(d if needed else None for d, needed in zip(grads, need, strict=True))


_downsample_end = applied(_DownsampleEnd)


def downsample_end(branch: Normed, second: Branch, folded: Folded, keep: Tensor | None) -> Tensor:
    """relu(keep bn(y) + downsample).

    Args:
        branch: y is [N, Cout, H, W], channels_last, with more than one channel.
        second, folded: the downsample, a plain 1x1 convolution of any stride without a norm in front, and its folded
            form; with a stride its ``read`` is the view of its input that receives the gradient.
        keep: [N] factor of each sample's branch, or None.

    Returns:
        [N, Cout, H, W], channels_last, in the dtype of y.
    """
    b, base = branch, None if second.read is None else second.x.detach()
    return _downsample_end(
        b.y, b.gamma, b.beta, second.x if second.read is None else second.read, second.weight, second.gamma,
        second.beta, keep, b.mean, b.var, b.values, b.eps, b.batch, b.group, second.options, base,
        torch.is_grad_enabled(), *folded,
    )  # fmt: skip


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.stride = stride
        return x.view_as(x), x[:, :, ::stride, ::stride]

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dread: Tensor | None) -> tuple[Tensor | None, None]:
        if dread is None:
            return dx, None
        if dx is None:
            dx = torch.zeros_like(ctx.saved_tensors[0])
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            dx = dx.clone()
        dx[:, :, :: ctx.stride, :: ctx.stride].add_(dread)
        return dx, None


_fork = applied(_Fork)


def fork(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """x, and the view x[:, :, ::stride, ::stride] of the pixels that a strided 1x1 convolution reads.

    The gradient of the second is added in place to that of the first, so the first may only be given to an operator
    that makes its gradient afresh and shows it to nobody else, as a convolution does.
    """
    return _fork(x, stride)


# ------------------------------------------------------------------------------------------------- what it saves


def saving(rows: int, n: int, c: int, full: int, itemsize: int, batch: bool, forked: bool) -> tuple[int, int]:
    """Bytes that a training step saves by this form, less than none where it costs some, and the flops that it adds.

    Args:
        rows: pixels of the result, over the batch.
        n, c: channels of the result and of the downsample's input.
        full: bytes of the whole of that input.
        itemsize: bytes of a value.
        batch: the downsample's norm uses batch statistics.
        forked: its stride skips pixels, and the input's gradient goes through ``fork``.
    """
    wide, read = itemsize * rows * n, itemsize * rows * c
    saved = (5 if batch else 3) * wide - (2 if batch else 0) * read
    if forked:  # written, and read twice and written to be added, for all pixels and not only for those read
        saved += 4 * (full - read)
    # Matrices the size of the weight and of the covariance.
    saved -= 24 * n * c + 12 * c * c if batch else 8 * n * c
    saved -= plan.p_workspace(plan.model_tile("plain_p", itemsize, c, n, 0), rows, n, c, 0)
    if not batch:
        return saved, 0
    workspace, flops = plan.gram_workspace(plan.model_tile("gram", itemsize, c, c), rows, c)
    return saved - workspace, flops + 2 * rows * c * c


# ---------------------------------------------------------------------------------------- ahead-of-time compilation


def _cases(which: tuple[int, ...]) -> Iterator[Case]:
    k = downsample_end_kernel
    aligned = [a for a in k.arg_names if a.endswith("_ptr") or a in ("N", "C")]
    flags = dict(AFFINE=True, KEEP=True, BITS=True, PREC="tf32")
    for storage in STORAGE:
        for t in dict.fromkeys(plan.GEMM["down"][storage != "fp32"][i] for i in which):
            for stride in (1, 2):
                yield Case(
                    f"down{stride}-{storage}-{t.m}x{t.n}x{t.k}", k, signature(k, storage, {"bits_ptr": "*u8"}),
                    dict(flags, STRIDE=stride, BM=t.m, BN=t.n, BK=t.k),
                    dict(num_warps=t.warps, num_stages=t.stages), aligned,
                )  # fmt: skip


def aot_cases() -> Iterator[Case]:
    """Every launch on sizes that are multiples of 16."""
    return _cases((0, 1))


def odd_cases() -> Iterator[Case]:
    """Every launch on other sizes."""
    return _cases((2,))
