"""A widening 1x1 convolution, its batch norm, the identity and the ReLU of a block as one matrix product.

For y = z W^T, z [M, C] and W [N, C], the batch statistics of y follow from the mean mu and the covariance S of z, and
so does the whole backward: y [M, N], the widest tensor of the block, is never formed, forward or backward.

    moments     mu = mean z,  S = cov z                      z = relu(bn(x)), formed while loading, or a tensor
    fold        mean y = W mu,  var y = diag(W S W^T),  a = gamma rstd,  Wf = a W,  bias = beta - Wf mu
    forward     out = relu(keep (z Wf^T + bias) + identity)
                a downsample branch (x2, W2) joins the same product over [z | x2], both norms folded
    backward    g = dout [out > 0]                           also the gradient of a plain identity
                dbeta = sum keep g,  P = (keep g)^T (z - mu),  da = rowsum(P W) = sum keep g (y - mean y)
                dgamma = da rstd,  dvar = -da gamma rstd^3 / 2
                dW = a P + 2 dvar (W S)
                dz = keep g Wf + (z - mu) B - (a dbeta) W / M,  B = 2 / M W^T diag(dvar) W
                then through z = relu(bn(x)): mask z > 0, sums of that norm, its input gradient
    frozen      with running statistics a and bias come from them, S is not needed, and B = 0
    saved       x, one bit a value of out, and matrices the size of the weight
    rounding    Wf and B are rounded once. The bias uses Wf as rounded, so the mean of out is exact; B multiplies
                z - mu, rounded, so rounding B moves no mean of dz. The sums of (z - s)(z - s)^T and g (z - s)^T are
                taken about an anchor s for which z - s is exact in the storage type (0, or near the mean where that
                is far from 0), in fp32.
    limits      var y = diag(W S W^T) loses digits where it is far below |W|^2 |S|, as with fewer rows than channels;
                the functions ask for four rows a channel at least
    traffic     R x (Gram), R x, identity, W out, bits; backward R dout, bits, x, W g, then R g, x, W dz, then the
                norm's own R dz, x, W dx. dout arrives masked from the next block where ``block_start`` follows; then
                it is g, and neither bits are read nor g written. A downsample branch is made in the same launches.
                With y kept, y would add a write and two reads forward, two reads of y and dy written and read twice.
    source      own derivation: the batch norm of a linear map depends on its input through two moments only

Every reduction is two-stage in a fixed order. The kernels are in ``_pointwise`` and ``_pointwise_backward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import reference_pointwise as reference
from fastres.kernels import _pointwise as fwd
from fastres.kernels import _pointwise_backward as bwd
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels._launch import MERGE, channels_last, on
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_sums
from fastres.kernels._pointwise_plan import (
    FOLD,
    PROLOGUE,
    accumulated,
    empty_read,
    geometry,
    p_name,
    p_plan,
    precision,
    split,
    tile,
)
from fastres.kernels._tape import launch

__all__ = ["correction", "fold", "moments", "p_sums", "pointwise_dz", "pointwise_end", "weight_gradient"]


def _rows(x: Tensor, op: str) -> Tensor:
    if not channels_last(x):
        raise ValueError(f"{op}: input has stride {list(x.stride())}; wanted channels_last")
    return x


def _columns(weight: Tensor, op: str) -> int:
    """C of a weight [N, C, 1, 1], which kernels read as rows of C values."""
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight has stride {list(weight.stride())}; wanted a contiguous one")
    return weight.shape[1]


# ---------------------------------------------------------------------------------------------------- launchers


def _moments(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, stride: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _rows(x, "moments")
    c = x.shape[1]
    rows, _, shape = geometry(x, stride)
    t = tile("gram", x, c, c)
    across = -(-c // t.n)
    tiles = across * (across + 1) // 2
    parts, chunk = split(rows, t.k, tiles)
    width = tiles * t.n**2 + c
    partial = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    mu, anchor, cov = partial.new_empty(c), partial.new_empty(c), partial.new_empty(c, c)
    prec = "tf32x3" if precision(x) == "tf32" else "ieee"  # S is squared into var: keep fp32's digits
    with on(x):
        launch(fwd.gram_kernel, (parts, across, across))(
            x, mean, var, gamma, beta, eps, partial, anchor, rows, c, chunk, width, *shape, ACT=act,
            AFFINE=gamma is not None, STRIDE=stride, PREC=prec, BM=t.k, BC=t.n, num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip
        launch(fwd.cov_kernel, (c, -(-c // MERGE.b1)))(
            partial, anchor, mu, cov, parts, c, width, 1.0 / rows, GC=t.n, BP=MERGE.b0, BC=MERGE.b1,
            num_warps=MERGE.warps,
        )  # fmt: skip
    return mu, cov, anchor


def _fold(
    weight: Tensor, like: Tensor, mu: Tensor | None, cov: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, mean: Tensor | None, var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, count: int, batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, c = weight.shape[0], _columns(weight, "pointwise_fold")
    batch = mu is not None
    wf = torch.empty(n, c, dtype=like.dtype, device=weight.device)
    bias = torch.empty(n, dtype=torch.float32, device=weight.device)
    new_mean, new_var = bias.new_empty(n), bias.new_empty(n)
    wcov = bias.new_empty((n, c) if batch else (0, 0))
    with on(weight):
        launch(fwd.fold_kernel, (-(-n // FOLD.m),))(
            weight, mu, cov, gamma, beta, eps, running_mean, running_var, batches, momentum, count / max(count - 1, 1),
            wf, bias, new_mean if batch else mean, new_var if batch else var, wcov, n, c, AFFINE=gamma is not None,
            BATCH=batch, RUNNING=running_mean is not None, COUNT=batches is not None, BN=FOLD.m, BC=FOLD.n,
            num_warps=FOLD.warps,
        )  # fmt: skip
    if not batch and mean is not None and var is not None:
        new_mean.copy_(mean)
        new_var.copy_(var)
    return wf, bias, new_mean, new_var, wcov


def _end(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, wf: Tensor, bias: Tensor, identity: Tensor | None, x2: Tensor | None, wf2: Tensor | None,
    bias2: Tensor | None, stride2: int, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, c, h, w = _rows(x, "pointwise_end").shape
    n, rows = wf.shape[0], b * h * w
    out = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bits = torch.empty((rows, (n + 7) // 8) if save else (0, 0), dtype=torch.uint8, device=x.device)
    t = tile("end", x, n, c if x2 is None or x2.shape[1] % 16 == 0 else 1)
    with on(x):
        launch(fwd.pointwise_end_kernel, (-(-rows // t.m) * -(-n // t.n),))(
            x, mean, var, gamma, beta, eps, wf, bias, None if identity is None else _rows(identity, "pointwise_end"),
            None if x2 is None else _rows(x2, "pointwise_end"), wf2, bias2, keep, out, bits, rows, n, c,
            c if x2 is None else x2.shape[1], (n + 7) // 8, h * w, w, *(x if x2 is None else x2).shape[2:],
            ACT=act, AFFINE=gamma is not None, IDENTITY=identity is not None, PAIR=x2 is not None, STRIDE2=stride2,
            KEEP=keep is not None, BITS=save, PREC=precision(x), BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip
    return out, bits


def _p_sums(
    dout: Tensor, bits: Tensor | None, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, anchor: Tensor | None, x2: Tensor | None, anchor2: Tensor | None,
    stride2: int, keep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dout = dout.contiguous(memory_format=torch.channels_last)
    n, c, c2 = dout.shape[1], x.shape[1], 0 if x2 is None else x2.shape[1]
    rows, _, shape = geometry(x if x2 is None else x2, stride2)
    t = tile(p_name(bits, act, x2, keep), x, c, n, c2)
    parts, chunk, grid = p_plan(t, rows, n, c, c2)
    width = n * c + n + (n * c2 + n if c2 else 0)
    partial = torch.empty(1, parts, width, dtype=torch.float32, device=x.device)
    g = x.new_empty(0) if bits is None else torch.empty_like(dout)
    with on(x):
        launch(bwd.p_kernel, (parts, grid[0], grid[1]))(
            dout, bits, g, x, mean, var, gamma, beta, eps, anchor, x2, anchor2, keep, partial, rows, n, c, c2, chunk,
            width, (n + 7) // 8, *shape, ACT=act, AFFINE=gamma is not None, ANCHOR=anchor is not None,
            MASK=bits is not None, KEEP=keep is not None, PAIR=x2 is not None, STRIDE2=stride2, PREC=precision(x),
            BM=t.k, BN=t.m, BC=t.n, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        (sums,) = merge_sums(partial)
    return sums, g


def _weight_gradient(
    sums: Tensor, weight: Tensor, wcov: Tensor, anchor: Tensor, mu: Tensor, mean: Tensor, var: Tensor,
    gamma: Tensor | None, eps: float, batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, c = weight.shape[0], _columns(weight, "pointwise_weight")
    dw = torch.empty_like(weight)
    dgamma, dvar, adb = sums.new_empty(n), sums.new_empty(n), sums.new_empty(n)
    with on(weight):
        launch(bwd.weight_kernel, (-(-n // FOLD.m),))(
            sums, weight, wcov, anchor, mu, mean, var, gamma, eps, dw, dgamma, dvar, adb, n, c,
            AFFINE=gamma is not None, BATCH=batch, BN=FOLD.m, BC=FOLD.n, num_warps=FOLD.warps,
        )  # fmt: skip
    return dw, dgamma, dvar, adb


def _correction(weight: Tensor, dvar: Tensor, adb: Tensor, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    n, c = weight.shape[0], _columns(weight, "pointwise_correction")
    b, shift = like.new_empty(c, c), dvar.new_empty(c)
    blocks = -(-c // FOLD.n)
    with on(weight):
        launch(bwd.correction_kernel, (blocks, blocks))(
            weight, dvar, adb, b, shift, n, c, 1.0 / count, BN=FOLD.k, BC=FOLD.n, num_warps=FOLD.warps
        )
    return b, shift


def _dz(
    g: Tensor, wf: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, b: Tensor | None, shift: Tensor | None, mu: Tensor | None,
    keep: Tensor | None, wf2: Tensor | None, x2: Tensor | None, b2: Tensor | None, shift2: Tensor | None,
    mu2: Tensor | None, stride2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = g.contiguous(memory_format=torch.channels_last)
    n, c = wf.shape
    c2 = 0 if x2 is None else x2.shape[1]
    rows, _, shape = geometry(x if x2 is None else x2, stride2)
    if g.numel() != rows * n:  # the stride is that of x2, or without it of x; the kernel would read past x
        read = "x2" if x2 is not None else "x"
        raise ValueError(
            f"pointwise_dz: g is {list(g.shape)}; wanted {rows} pixels, as {read} has at stride {stride2}"
        )
    dx = empty_read(x, stride2 if x2 is None else 1)
    dx2 = x.new_empty(0) if x2 is None else empty_read(x2, stride2)
    t = tile("dz", x, c, n, c2)
    parts = -(-rows // t.m)
    partial = torch.empty((2, parts, c) if act else (2, 0, 0), dtype=torch.float32, device=x.device)
    p1, p2 = partial.unbind(0)
    with on(x):
        launch(bwd.dz_kernel, (parts * (-(-c // t.n) + -(-c2 // t.n)),))(
            g, wf, x, mean, var, gamma, beta, eps, b, shift, mu, keep, dx, p1, p2, wf2, x2, b2, shift2,
            mu2, dx2, rows, n, c, c2, *shape, ACT=act, AFFINE=gamma is not None, BATCH=b is not None,
            KEEP=keep is not None, PAIR=x2 is not None, BATCH2=b2 is not None, STRIDE2=stride2, PREC=precision(x),
            BM=t.m, BC=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        s1, s2 = merge_sums(partial) if act else partial.new_empty(2, 0).unbind(0)
    return dx, s1, s2, dx2


# ------------------------------------------------------------------------------------------------- registration


moments = register(
    f"pointwise_moments(Tensor x, {PROLOGUE}, int stride) -> (Tensor, Tensor, Tensor)",
    reference=reference.pointwise_moments,
    triton=_moments,
    traffic=plan.moments_traffic,
    fake=lambda x, *rest: (
        accumulated(x, x.shape[1]),
        accumulated(x, x.shape[1], x.shape[1]),
        accumulated(x, x.shape[1]),
    ),
    differentiable=False,
)
fold = register(
    "pointwise_fold(Tensor weight, Tensor like, Tensor? mu, Tensor? cov, Tensor? gamma, Tensor? beta, float eps,"
    " Tensor? mean, Tensor? var, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, SymInt count,"
    " Tensor(c!)? batches=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointwise_fold,
    triton=_fold,
    traffic=lambda weight, like, mu, cov, *_: Traffic([weight, cov]),
    fake=plan.fake_fold,
    differentiable=False,
)
pointwise_end = register(
    f"pointwise_end(Tensor x, {PROLOGUE}, Tensor wf, Tensor bias, Tensor? identity, Tensor? x2, Tensor? wf2,"
    " Tensor? bias2, int stride2, Tensor? keep, bool save) -> (Tensor, Tensor)",
    reference=reference.pointwise_end,
    triton=_end,
    traffic=plan.end_traffic,
    fake=plan.fake_end,
)
# Of the two below: stride2 is that of x2, or where there is none that of x.
p_sums = register(
    f"pointwise_p(Tensor dout, Tensor? bits, Tensor x, {PROLOGUE}, Tensor? anchor, Tensor? x2, Tensor? anchor2,"
    " int stride2, Tensor? keep) -> (Tensor, Tensor)",
    reference=reference.pointwise_p,
    triton=_p_sums,
    traffic=plan.p_traffic,
    fake=plan.fake_p,
)
weight_gradient = register(
    "pointwise_weight(Tensor sums, Tensor weight, Tensor wcov, Tensor anchor, Tensor mu, Tensor mean, Tensor var,"
    " Tensor? gamma, float eps, bool batch) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointwise_weight,
    triton=_weight_gradient,
    traffic=lambda sums, weight, wcov, *_: Traffic([weight, wcov]),
    fake=plan.fake_weight,
)
correction = register(
    "pointwise_correction(Tensor weight, Tensor dvar, Tensor adb, Tensor like, SymInt count)"
    " -> (Tensor, Tensor)",
    reference=reference.pointwise_correction,
    triton=_correction,
    traffic=lambda weight, *_: Traffic([weight, weight]),
    fake=lambda weight, dvar, adb, like, count: (
        like.new_empty(weight.shape[1], weight.shape[1]), dvar.new_empty(weight.shape[1])
    ),
)  # fmt: skip
pointwise_dz = register(
    f"pointwise_dz(Tensor g, Tensor wf, Tensor x, {PROLOGUE}, Tensor? b, Tensor? shift, Tensor? mu, Tensor? keep,"
    " Tensor? wf2, Tensor? x2, Tensor? b2, Tensor? shift2, Tensor? mu2, int stride2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointwise_dz,
    triton=_dz,
    traffic=plan.dz_traffic,
    fake=plan.fake_dz,
)
