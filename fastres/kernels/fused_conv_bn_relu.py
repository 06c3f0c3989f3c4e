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

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import reference
from fastres.kernels import _pointwise as fwd
from fastres.kernels import _pointwise_backward as bwd
from fastres.kernels import _tuned
from fastres.kernels._launch import MERGE, SHAPES, channels_last, on
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_sums

__all__ = ["GEMM", "Gemm", "Prologue", "correction", "default_tile", "fold", "gram_workspace", "moments", "p_sums",
           "p_workspace", "pointwise_dz", "pointwise_end", "precision", "tile", "weight_gradient"]  # fmt: skip


class Gemm(NamedTuple):
    """Tile of a product's result, its depth, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By kernel, then by storage (True: 2 bytes). For 2 bytes: up to 64 result columns, more, and sizes that are no multiple
# of 16, where nothing wide can be loaded and a large tile would spill.
GEMM: dict[str, dict[bool, tuple[Gemm, ...]]] = {
    "gram": {True: (Gemm(64, 64, 64, 8, 2), Gemm(128, 128, 32, 8, 2), Gemm(64, 64, 32, 4, 2))},
    # The last one only by a tuning table: at 126 registers a multiprocessor holds two programs of it.
    "end": {
        True: (
            Gemm(128, 64, 64, 4, 3),
            Gemm(128, 128, 64, 8, 3),
            Gemm(64, 64, 32, 4, 2),
            Gemm(128, 64, 64, 8, 3),
        )
    },
    # A depth of 64 spills with a downsample branch on GPUs before Hopper, and at 128 x 128 with Triton 3.6.0.
    "p": {True: (Gemm(128, 64, 32, 8, 2), Gemm(128, 128, 32, 8, 2), Gemm(64, 64, 32, 8, 2))},
    # ``p_sums`` of a plain input, with nothing to mask or scale: 128 x 64 spills in fp16 on Blackwell.
    "plain_p": {True: (Gemm(64, 64, 32, 8, 2), Gemm(128, 128, 32, 8, 2), Gemm(64, 64, 32, 8, 2))},
    "dz": {True: (Gemm(128, 64, 64, 4, 3), Gemm(128, 128, 64, 8, 3), Gemm(64, 32, 32, 4, 2))},
    # of ``downsample_end``, whose epilogue has a norm: it spills on Blackwell with more values a thread
    "down": {True: (Gemm(128, 64, 64, 8, 3), Gemm(64, 128, 64, 8, 3), Gemm(64, 64, 32, 4, 2))},
    # of ``block_start``
    "start": {True: (Gemm(128, 64, 64, 4, 3), Gemm(128, 128, 64, 8, 3), Gemm(64, 64, 32, 4, 2))},
    "dgrad": {True: (Gemm(128, 64, 64, 8, 3), Gemm(128, 128, 64, 8, 3), Gemm(64, 32, 32, 4, 2))},
}
for _table in GEMM.values():
    _table[False] = (Gemm(64, 64, 32, 4, 2),) * 2 + (_table[True][2],)
_tuned.products(GEMM)
FOLD = Gemm(16, 32, 32, 8, 2)
# First-stage programs to aim at: two a multiprocessor of an H100 or H200, or one where every program makes a large
# tile of sums, for those are written and read back.
_PROGRAMS, _PROGRAMS_LARGE = 264, 132


def tile(kernel: str, x: Tensor, columns: int, *others: int) -> Gemm:
    """The configuration of a product with this many result columns; ``others`` are the other channel counts.

    The tuning table chooses among the tested ones; without it the first, or the second for more than 64 columns.
    """
    odd = _odd(columns, *others)
    default = default_tile(kernel, x.element_size(), columns, *others)
    return _tuned.product(kernel, x, columns, others[0], odd, default)


def default_tile(kernel: str, itemsize: int, columns: int, *others: int) -> Gemm:
    """``tile`` without a tuning table."""
    return GEMM[kernel][itemsize == 2][2 if _odd(columns, *others) else int(columns > 64)]


def _odd(*sizes: int) -> bool:
    for size in sizes:  # no generator: every launch comes here
        if size % 16:
            return True
    return False


def precision(x: Tensor) -> str:
    """How fp32 operands enter a product: torch's own switch for convolutions decides; 2-byte types ignore it."""
    return "tf32" if x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32 else "ieee"


@functools.lru_cache(SHAPES)
def split(rows: int, step: int, tiles: int) -> tuple[int, int]:
    """Parts and rows a part of a reduction over ``rows`` in steps, so that parts x tiles programs fill the device."""
    steps = -(-rows // step)
    aim = _PROGRAMS if tiles == 1 else _PROGRAMS_LARGE
    parts = max(1, min(-(-aim // tiles), -(-steps // 4)))
    chunk = -(-steps // parts) * step
    return -(-rows // chunk), chunk


class Prologue(NamedTuple):
    """The pending norm and ReLU in front of the product; all None, 0 and False for a plain tensor."""

    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0
    act: bool = False


_PROLOGUE = "Tensor? mean0, Tensor? var0, Tensor? gamma0, Tensor? beta0, float eps0, bool act"


def _geometry(x: Tensor, stride: int) -> tuple[int, int, tuple[int, int, int, int]]:
    """Rows of the result, its pixels an image, and (HW, OW, H, W) of a 1x1 convolution with this stride."""
    n, _, h, w = x.shape
    oh, ow = (h - 1) // stride + 1, (w - 1) // stride + 1
    return n * oh * ow, oh * ow, (oh * ow, ow, h, w)


def _read(x: Tensor, stride: int) -> Tensor:
    """An empty tensor for the pixels of x that a 1x1 convolution of this stride reads."""
    n, c, h, w = x.shape
    size = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _rows(x: Tensor, op: str) -> Tensor:
    if not channels_last(x):
        raise ValueError(f"{op}: input has stride {list(x.stride())}; wanted channels_last")
    return x


# ---------------------------------------------------------------------------------------------------- launchers


def _moments(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, stride: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _rows(x, "moments")
    c = x.shape[1]
    rows, _, shape = _geometry(x, stride)
    t = tile("gram", x, c, c)
    across = -(-c // t.n)
    tiles = across * (across + 1) // 2
    parts, chunk = split(rows, t.k, tiles)
    width = tiles * t.n**2 + c
    partial = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    mu, anchor, cov = partial.new_empty(c), partial.new_empty(c), partial.new_empty(c, c)
    prec = "tf32x3" if precision(x) == "tf32" else "ieee"  # S is squared into var: keep fp32's digits
    with on(x):
        fwd.gram_kernel[(parts, across, across)](
            x, mean, var, gamma, beta, eps, partial, anchor, rows, c, chunk, width, *shape, ACT=act,
            AFFINE=gamma is not None, STRIDE=stride, PREC=prec, BM=t.k, BC=t.n, num_warps=t.warps,
            num_stages=t.stages,
        )  # fmt: skip
        fwd.cov_kernel[(c, -(-c // MERGE.b1))](
            partial, anchor, mu, cov, parts, c, width, 1.0 / rows, GC=t.n, BP=MERGE.b0, BC=MERGE.b1,
            num_warps=MERGE.warps,
        )  # fmt: skip
    return mu, cov, anchor


def _fold(
    weight: Tensor, like: Tensor, mu: Tensor | None, cov: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, mean: Tensor | None, var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, count: int, batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, c = weight.shape[:2]
    batch = mu is not None
    wf = torch.empty(n, c, dtype=like.dtype, device=weight.device)
    bias = torch.empty(n, dtype=torch.float32, device=weight.device)
    new_mean, new_var = bias.new_empty(n), bias.new_empty(n)
    wcov = bias.new_empty((n, c) if batch else (0, 0))
    with on(weight):
        fwd.fold_kernel[(-(-n // FOLD.m),)](
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
        fwd.pointwise_end_kernel[(-(-rows // t.m) * -(-n // t.n),)](
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
    rows, _, shape = _geometry(x if x2 is None else x2, stride2)
    t = tile(_p_name(bits, act, x2, keep), x, c, n, c2)
    parts, chunk, grid = _p_plan(t, rows, n, c, c2)
    width = n * c + n + (n * c2 + n if c2 else 0)
    partial = torch.empty(1, parts, width, dtype=torch.float32, device=x.device)
    g = x.new_empty(0) if bits is None else torch.empty_like(dout)
    with on(x):
        bwd.p_kernel[(parts, grid[0], grid[1])](
            dout, bits, g, x, mean, var, gamma, beta, eps, anchor, x2, anchor2, keep, partial, rows, n, c, c2, chunk,
            width, (n + 7) // 8, *shape, ACT=act, AFFINE=gamma is not None, ANCHOR=anchor is not None,
            MASK=bits is not None, KEEP=keep is not None, PAIR=x2 is not None, STRIDE2=stride2, PREC=precision(x),
            BM=t.k, BN=t.m, BC=t.n, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        (sums,) = merge_sums(partial)
    return sums, g


def _p_name(bits: Tensor | None, act: bool, x2: Tensor | None, keep: Tensor | None) -> str:
    """The configurations of such a call."""
    return "p" if act or not (bits is None and x2 is None and keep is None) else "plain_p"


def _p_plan(t: Gemm, rows: int, n: int, c: int, c2: int) -> tuple[int, int, tuple[int, int]]:
    """Parts, rows a part, and tiles of the result of the weight-shaped sums of one or two branches."""
    grid = (-(-n // t.m), -(-c // t.n) + -(-c2 // t.n))
    parts, chunk = split(rows, t.k, grid[0] * grid[1])
    return parts, chunk, grid


def _weight_gradient(
    sums: Tensor, weight: Tensor, wcov: Tensor, anchor: Tensor, mu: Tensor, mean: Tensor, var: Tensor,
    gamma: Tensor | None, eps: float, batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, c = weight.shape[:2]
    dw = torch.empty_like(weight)
    dgamma, dvar, adb = sums.new_empty(n), sums.new_empty(n), sums.new_empty(n)
    with on(weight):
        bwd.weight_kernel[(-(-n // FOLD.m),)](
            sums, weight, wcov, anchor, mu, mean, var, gamma, eps, dw, dgamma, dvar, adb, n, c,
            AFFINE=gamma is not None, BATCH=batch, BN=FOLD.m, BC=FOLD.n, num_warps=FOLD.warps,
        )  # fmt: skip
    return dw, dgamma, dvar, adb


def _correction(weight: Tensor, dvar: Tensor, adb: Tensor, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    n, c = weight.shape[:2]
    b, shift = like.new_empty(c, c), dvar.new_empty(c)
    blocks = -(-c // FOLD.n)
    with on(weight):
        bwd.correction_kernel[(blocks, blocks)](
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
    rows, _, shape = _geometry(x if x2 is None else x2, stride2)
    dx = _read(x, stride2 if x2 is None else 1)
    dx2 = x.new_empty(0) if x2 is None else _read(x2, stride2)
    t = tile("dz", x, c, n, c2)
    parts = -(-rows // t.m)
    partial = torch.empty((2, parts, c) if act else (2, 0, 0), dtype=torch.float32, device=x.device)
    p1, p2 = partial.unbind(0)
    with on(x):
        bwd.dz_kernel[(parts * (-(-c // t.n) + -(-c2 // t.n)),)](
            g, wf, x, mean, var, gamma, beta, eps, b, shift, mu, keep, dx, p1, p2, wf2, x2, b2, shift2,
            mu2, dx2, rows, n, c, c2, *shape, ACT=act, AFFINE=gamma is not None, BATCH=b is not None,
            KEEP=keep is not None, PAIR=x2 is not None, BATCH2=b2 is not None, STRIDE2=stride2, PREC=precision(x),
            BM=t.m, BC=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        s1, s2 = merge_sums(partial) if act else partial.new_empty(2, 0).unbind(0)
    return dx, s1, s2, dx2


# ------------------------------------------------------------------------------------------------- registration


def _f32(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_fold(weight: Tensor, like: Tensor, mu: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    n, c = weight.shape[:2]
    wcov = _f32(like, n, c) if mu is not None else _f32(like, 0, 0)
    return like.new_empty(n, c), _f32(like, n), _f32(like, n), _f32(like, n), wcov


def _fake_end(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, _, h, w = x.shape
    n = rest[6].shape[0]
    out = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, x.new_empty((b * h * w, (n + 7) // 8) if rest[-1] else (0, 0), dtype=torch.uint8)


def _fake_p(dout: Tensor, bits: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, c, x2 = dout.shape[1], x.shape[1], rest[7]
    g = torch.empty(dout.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    width = n * c + n + (0 if x2 is None else n * x2.shape[1] + n)
    return _f32(x, width), x.new_empty(0) if bits is None else g


def _fake_dz(g: Tensor, wf: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x2 = rest[11]
    sums = (_f32(x, x.shape[1] if rest[5] else 0) for _ in range(2))
    dx = _read(x, rest[15] if x2 is None else 1)
    return dx, *sums, x.new_empty(0) if x2 is None else _read(x2, rest[15])


def _fake_weight(sums: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(weight), *(torch.empty_like(sums[: weight.shape[0]]) for _ in range(3))


# What the products move: each operand once, however often the cache has to supply it. Arguments as in the schemas.


def _pixels(x: Tensor | None, stride: int) -> Tensor | None:
    """The pixels that a strided 1x1 convolution reads."""
    return x if x is None else x[:, :, ::stride, ::stride]


def gram_workspace(t: Gemm, rows: int, c: int) -> tuple[int, int]:
    """Bytes of the partial results of ``moments``, written and read back, and its flops."""
    tiles = -(-c // t.n) * (-(-c // t.n) + 1) // 2  # the upper triangle
    return 8 * split(rows, t.k, tiles)[0] * (tiles * t.n**2 + c), 2 * rows * tiles * t.n**2


def p_workspace(t: Gemm, rows: int, n: int, c: int, c2: int) -> int:
    """Bytes of the partial results of ``p_sums``, written and read back."""
    return 8 * _p_plan(t, rows, n, c, c2)[0] * (n * c + n + (n * c2 + n if c2 else 0))


def _moments_traffic(x: Tensor, *a: Any) -> Traffic:
    rows, c, t = _geometry(x, a[-1])[0], x.shape[1], tile("gram", x, x.shape[1], x.shape[1])
    return Traffic([_pixels(x, a[-1])], *gram_workspace(t, rows, c))


def _end_traffic(x: Tensor, *a: Any) -> Traffic:
    wf, identity, x2, wf2, stride2 = a[6], a[8], a[9], a[10], a[12]
    depth = x.shape[1] + (0 if x2 is None else x2.shape[1])
    flops = 2 * (x.numel() // x.shape[1]) * wf.shape[0] * depth
    return Traffic([x, wf, identity, _pixels(x2, stride2), wf2], flops=flops)


def _p_traffic(dout: Tensor, bits: Tensor | None, x: Tensor, *a: Any) -> Traffic:
    x2, stride2 = a[7], a[9]
    n, c, c2 = dout.shape[1], x.shape[1], 0 if x2 is None else x2.shape[1]
    rows = dout.numel() // n
    sums = p_workspace(tile(_p_name(bits, a[5], x2, a[10]), x, c, n, c2), rows, n, c, c2)
    read = [_pixels(x, stride2 if x2 is None else 1), _pixels(x2, stride2)]
    return Traffic([dout, bits, *read], sums, 2 * rows * n * (c + c2))


def _dz_traffic(g: Tensor, wf: Tensor, x: Tensor, *a: Any) -> Traffic:
    act, b, (wf2, x2, b2, _, _, stride2) = a[5], a[6], a[10:16]
    (n, c), rows, c2 = wf.shape, g.numel() // g.shape[1], 0 if x2 is None else x2.shape[1]
    partials = 8 * 2 * -(-rows // tile("dz", x, c, n, c2).m) * c if act else 0
    mine = _pixels(x, stride2 if x2 is None else 1)
    read = [mine if act or b is not None else None, None if b2 is None else _pixels(x2, stride2)]
    depth = c * (n + (0 if b is None else c)) + c2 * (n + (0 if b2 is None else c2))
    return Traffic([g, wf, b, wf2, b2, *read], partials, 2 * rows * depth)


moments = register(
    f"pointwise_moments(Tensor x, {_PROLOGUE}, int stride) -> (Tensor, Tensor, Tensor)",
    reference=reference.pointwise_moments,
    triton=_moments,
    traffic=_moments_traffic,
    fake=lambda x, *rest: (_f32(x, x.shape[1]), _f32(x, x.shape[1], x.shape[1]), _f32(x, x.shape[1])),
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
    fake=_fake_fold,
    differentiable=False,
)
pointwise_end = register(
    f"pointwise_end(Tensor x, {_PROLOGUE}, Tensor wf, Tensor bias, Tensor? identity, Tensor? x2, Tensor? wf2,"
    " Tensor? bias2, int stride2, Tensor? keep, bool save) -> (Tensor, Tensor)",
    reference=reference.pointwise_end,
    triton=_end,
    traffic=_end_traffic,
    fake=_fake_end,
)
# Of the two below: stride2 is that of x2, or where there is none that of x.
p_sums = register(
    f"pointwise_p(Tensor dout, Tensor? bits, Tensor x, {_PROLOGUE}, Tensor? anchor, Tensor? x2, Tensor? anchor2,"
    " int stride2, Tensor? keep) -> (Tensor, Tensor)",
    reference=reference.pointwise_p,
    triton=_p_sums,
    traffic=_p_traffic,
    fake=_fake_p,
)
weight_gradient = register(
    "pointwise_weight(Tensor sums, Tensor weight, Tensor wcov, Tensor anchor, Tensor mu, Tensor mean, Tensor var,"
    " Tensor? gamma, float eps, bool batch) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointwise_weight,
    triton=_weight_gradient,
    traffic=lambda sums, weight, wcov, *_: Traffic([weight, wcov]),
    fake=_fake_weight,
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
    f"pointwise_dz(Tensor g, Tensor wf, Tensor x, {_PROLOGUE}, Tensor? b, Tensor? shift, Tensor? mu, Tensor? keep,"
    " Tensor? wf2, Tensor? x2, Tensor? b2, Tensor? shift2, Tensor? mu2, int stride2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointwise_dz,
    triton=_dz,
    traffic=_dz_traffic,
    fake=_fake_dz,
)
