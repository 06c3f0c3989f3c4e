"""A 3x3 convolution that applies a pending batch norm and ReLU while loading and makes the next norm's statistics.

    forward     z = relu(a (x - mean) + beta), zero outside the image, or z = x
                y[n, h, w] = sum over taps (r, s) of z[n, S h - P + D r, S w - P + D s] W[r, s]^T
                with stride S, padding P, dilation D
                partial mean and M2 of every tile of pixels of y as stored, merged into mean and variance of y
    backward    dz[n, i, j] = sum of dy[n, h, w] W[r, s] over the taps with S h - P + D r = i and S w - P + D s = j
                g = dz [z > 0] and the sums of the norm in front, sum g and sum g xhat; then ``batch_norm``'s dx
                dW[r, s] = sum over pixels of dy^T z[.., S h - P + D r, S w - P + D s]
    saved       x, W and per-channel vectors; z never exists, forward or backward
    rounding    z is rounded to the storage type before the product, as when it is stored; sums are fp32; y, dz, dW are
                rounded once
    traffic     forward R x, W y; backward R dy, x, W dz and R dy, x, and the norm's own R dz, x, W dx. With cuDNN's
                convolution z would be written and read twice more, and y read once for its statistics.
    order       two-stage reductions in a fixed order; nothing depends on the size of the GPU

A candidate beside cuDNN's convolution, which is the default: no GPU has measured this one. All is one loop over taps
and channels (``_conv3x3``). With a stride the pixels of dz are taken in the classes of their remainders, as each class
is reached by the same taps. Weights are read as [N, 3, 3, C]: in place if they are channels_last, else from a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import reference_conv as reference
from fastres.kernels import _conv3x3 as K
from fastres.kernels._aot import STORAGE, Case, signature
from fastres.kernels._launch import on
from fastres.kernels._library import Traffic, register
from fastres.kernels._merge import merge_stats, merge_sums
from fastres.kernels._pointwise_plan import PROLOGUE, Gemm, Prologue, precision, split
from fastres.kernels._saved import recall, store
from fastres.kernels._tape import launch
from fastres.kernels.batch_norm import batch_norm_backward

__all__ = [
    "TILES",
    "Geometry",
    "Partial",
    "Prologue",
    "aot_cases",
    "conv3x3",
    "odd_cases",
    "statistics",
    "tile",
]

# By kernel, then by storage (True: 2 bytes): up to 64 result columns, more, and sizes that are no multiple of 16.
TILES: dict[str, dict[bool, tuple[Gemm, Gemm, Gemm]]] = {
    "forward": {True: (Gemm(128, 64, 64, 8, 3), Gemm(128, 128, 64, 8, 3), Gemm(64, 64, 32, 4, 2))},
    # Triton 3.6.0 serialises wgmma of dgrad with 8 warps at 64 columns, and of a plain wgrad with 128 columns.
    "dgrad": {True: (Gemm(128, 128, 64, 8, 3), Gemm(128, 128, 64, 8, 3), Gemm(64, 64, 32, 4, 2))},
    "wgrad": {True: (Gemm(64, 64, 64, 4, 3), Gemm(64, 64, 64, 4, 3), Gemm(64, 64, 32, 4, 2))},
}
for _table in TILES.values():
    _table[False] = (Gemm(64, 64, 32, 4, 2),) * 3
TILES["forward"][False] = (Gemm(64, 64, 32, 4, 2),) * 2 + (
    Gemm(64, 64, 32, 8, 2),
)  # 4 warps spill on odd sizes
TILES["dgrad"][False] = (Gemm(64, 64, 32, 8, 2),) * 2 + (Gemm(64, 64, 32, 4, 2),)  # 4 warps spill on sm_100


class Geometry(NamedTuple):
    """Stride, padding and dilation, the same along both sides of the image."""

    stride: int
    padding: int
    dilation: int

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the result."""
        reach = 2 * self.padding - 2 * self.dilation - 1
        return (h + reach) // self.stride + 1, (w + reach) // self.stride + 1

    @property
    def flags(self) -> dict[str, int]:
        return dict(STRIDE=self.stride, DIL=self.dilation, PAD=self.padding)


class Partial(NamedTuple):
    """Statistics of a convolution's output in parts: mean and M2 of every ``chunk`` of its ``total`` pixels."""

    values: Tensor
    chunk: int
    total: int


def tile(kernel: str, x: Tensor, columns: int, other: int) -> Gemm:
    """The configuration for this many result columns; ``other`` is the other channel count."""
    odd = columns % 16 != 0 or other % 16 != 0
    return TILES[kernel][x.element_size() == 2][2 if odd else int(columns > 64)]


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype of ``x`` as [N, 3, 3, C] in memory."""
    return weight.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- launchers


def _forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, weight: Tensor, stride: int, padding: int, dilation: int, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, c, h, w), n = x.shape, weight.shape[0]
    g = Geometry(stride, padding, dilation)
    oh, ow = g.size(h, w)
    y, rows = _empty(x, b, n, oh, ow), b * oh * ow
    t = tile("forward", x, n, c)
    tiles = -(-rows // t.m)
    partial = torch.empty((2, tiles, n) if chunk else (2, 0, 0), dtype=torch.float32, device=x.device)
    with on(x):
        launch(K.forward3x3_kernel, (tiles * -(-n // t.n),))(
            x, mean, var, gamma, beta, eps, _taps(weight, x), y, partial[0], partial[1], rows, n, c, h, w, oh, ow,
            ACT=act, AFFINE=gamma is not None, STATS=chunk > 0, **g.flags, PREC=precision(x),
            BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return y, partial


def _statistics(
    partial: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, chunk: int, total: int,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with on(partial):
        pmean, pm2 = partial.unbind(0)
        return merge_stats(pmean, pm2, total, chunk, running_mean, running_var, momentum, batches)


def _dgrad(
    dy: Tensor, weight: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, stride: int, padding: int, dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, c, h, w), (n, oh, ow) = x.shape, dy.shape[1:]
    g, t = Geometry(stride, padding, dilation), tile("dgrad", x, c, n)
    dz = _empty(x, b, c, h, w)
    tiles, classes = -(-b * -(-h // stride) * -(-w // stride) // t.m), stride * stride
    partial = torch.empty((2, tiles * classes, c) if act else (2, 0, 0), dtype=torch.float32, device=x.device)
    with on(x):
        launch(K.dgrad3x3_kernel, (tiles * -(-c // t.n), classes))(
            dy.contiguous(memory_format=torch.channels_last), _taps(weight, x), x, mean, var, gamma, beta, eps, dz,
            partial[0], partial[1], b, n, c, h, w, oh, ow, ACT=act, AFFINE=gamma is not None, **g.flags,
            STEP=stride // math.gcd(stride, dilation), PREC=precision(x), BM=t.m, BC=t.n, BK=t.k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        s1, s2 = merge_sums(partial) if act else partial.new_empty(2, 0).unbind(0)
    return dz, s1, s2


def _wgrad(
    dy: Tensor, weight: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, stride: int, padding: int, dilation: int,
) -> Tensor:  # fmt: skip
    (_, c, h, w), (b, n, oh, ow) = x.shape, dy.shape
    g, t, rows = Geometry(stride, padding, dilation), tile("wgrad", x, c, n), b * oh * ow
    down, across = -(-n // t.m), 9 * -(-c // t.n)
    parts, chunk = split(rows, t.k, down * across)
    partial = torch.empty(1, parts, 9 * n * c, dtype=torch.float32, device=x.device)
    with on(x):
        launch(K.wgrad3x3_kernel, (parts, down, across))(
            dy.contiguous(memory_format=torch.channels_last), x, mean, var, gamma, beta, eps, partial, rows, n, c,
            chunk, h, w, oh, ow, ACT=act, AFFINE=gamma is not None, **g.flags, PREC=precision(x),
            BM=t.k, BN=t.m, BC=t.n, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        (dw,) = merge_sums(partial)
    return torch.empty_like(weight).copy_(dw.view(n, 3, 3, c).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------- registration


def _f32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight, chunk = rest[6], rest[10]
    size = Geometry(*rest[7:10]).size(x.shape[2], x.shape[3])
    y = _empty(x, x.shape[0], weight.shape[0], *size)
    parts = (y.numel() // weight.shape[0] + chunk - 1) // chunk if chunk else 0
    return y, _f32(x, 2, parts, weight.shape[0] if chunk else 0)


def _fake_dgrad(dy: Tensor, weight: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1] if rest[5] else 0
    return _empty(x, *x.shape), _f32(x, c), _f32(x, c)


def _flops(y: Tensor, weight: Tensor) -> int:
    return 2 * (y.numel() // y.shape[1]) * weight.numel()


def _forward_traffic(x: Tensor, *a: Any) -> Traffic:
    weight, chunk = a[6], a[10]
    oh, ow = Geometry(*a[7:10]).size(x.shape[2], x.shape[3])
    rows, n = x.shape[0] * oh * ow, weight.shape[0]
    partials = 2 * 4 * -(-rows // chunk) * n if chunk else 0  # written here, which is no output to its reader
    return Traffic([x, weight], partials, 2 * rows * weight.numel())


def _dgrad_traffic(dy: Tensor, weight: Tensor, x: Tensor, *a: Any) -> Traffic:
    act, stride = a[5], a[6]
    b, c, h, w = x.shape
    tiles = -(-b * -(-h // stride) * -(-w // stride) // tile("dgrad", x, c, dy.shape[1]).m)
    partials = 2 * 2 * 4 * tiles * stride**2 * c if act else 0
    return Traffic([dy, weight, x if act else None], partials, _flops(dy, weight))


def _wgrad_traffic(dy: Tensor, weight: Tensor, x: Tensor, *a: Any) -> Traffic:
    t, n, c = tile("wgrad", x, x.shape[1], dy.shape[1]), dy.shape[1], x.shape[1]
    parts = split(dy.numel() // n, t.k, -(-n // t.m) * 9 * -(-c // t.n))[0]
    return Traffic([dy, x], 2 * 4 * parts * weight.numel(), _flops(dy, weight))


forward = register(
    f"conv3x3_forward(Tensor x, {PROLOGUE}, Tensor weight, int stride, int padding, int dilation, int chunk)"
    " -> (Tensor, Tensor)",
    reference=reference.conv3x3_forward,
    triton=_forward,
    fake=_fake_forward,
    traffic=_forward_traffic,
)
statistics = register(
    "conv3x3_statistics(Tensor partial, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, int chunk,"
    " int total, Tensor(c!)? batches=None) -> (Tensor, Tensor)",
    reference=reference.conv3x3_statistics,
    triton=_statistics,
    fake=lambda partial, *rest: (partial.new_empty(partial.shape[2]), partial.new_empty(partial.shape[2])),
    differentiable=False,
    traffic=lambda partial, *_: Traffic([partial]),
)
_BACKWARD = f"Tensor dy, Tensor weight, Tensor x, {PROLOGUE}, int stride, int padding, int dilation"
dgrad = register(
    f"conv3x3_dgrad({_BACKWARD}) -> (Tensor, Tensor, Tensor)",
    reference=reference.conv3x3_dgrad,
    triton=_dgrad,
    fake=_fake_dgrad,
    traffic=_dgrad_traffic,
)
wgrad = register(
    f"conv3x3_wgrad({_BACKWARD}) -> Tensor",
    reference=reference.conv3x3_wgrad,
    triton=_wgrad,
    fake=lambda dy, weight, *rest: torch.empty_like(weight),
    traffic=_wgrad_traffic,
)


class _Conv3x3(torch.autograd.Function):
    """Differentiable in x, W and the affine parameters of the norm in front; the statistics' gradient of that norm is
    part of it (``batch0``), that of the next norm is part of whoever applies it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma0: Tensor | None, beta0: Tensor | None, weight: Tensor, mean0: Tensor | None,
        var0: Tensor | None, eps0: float, batch0: bool, geometry: tuple[int, int, int], chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prologue = (mean0, var0, gamma0, beta0, eps0, mean0 is not None)
        y, partial = forward(x, *prologue, weight, *geometry, chunk)
        store(ctx, x, gamma0, beta0, weight, mean0, var0)
        ctx.options = (eps0, batch0, geometry)
        ctx.mark_non_differentiable(partial)
        return y, partial

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, gamma0, beta0, weight, mean0, var0 = recall(ctx)
        eps0, batch0, geometry = ctx.options
        act, need = mean0 is not None, ctx.needs_input_grad
        args = (dy, weight, x, mean0, var0, gamma0, beta0, eps0, act, *geometry)
        dx = s1 = s2 = None
        if need[0] or need[1] or need[2]:
            dx, s1, s2 = dgrad(*args)
        if act and need[0]:
            sums, scale = (s1, s2) if batch0 else (None, None), 1.0 / (x.numel() // x.shape[1])
            dx = batch_norm_backward(dx, x, mean0, var0, gamma0, beta0, eps0, False, None, *sums, scale)
        return (
            dx if need[0] else None,
            s2.to(gamma0.dtype) if need[1] and s2 is not None else None,
            s1.to(beta0.dtype) if need[2] and s1 is not None else None,
            wgrad(*args) if need[3] else None,
            *(None,) * 6,
        )


def conv3x3(
    x: Tensor, weight: Tensor, geometry: Geometry, front: Prologue, batch0: bool, stats: bool
) -> tuple[Tensor, Partial | None]:
    """The convolution of x, or of relu(bn(x)), and the partial statistics of its output.

    Args:
        x: [B, C, H, W], channels_last, float32, float16 or bfloat16 (float64 on the CPU), not empty.
        weight: [N, C, 3, 3], any floating dtype.
        geometry: stride 1 or 2, padding, dilation.
        front: the pending norm and ReLU in front; ``Prologue()`` for none.
        batch0: whether that norm's statistics are of this batch, so that its gradient has their terms.
        stats: make the statistics of the result.

    Returns:
        y [B, N, OH, OW], channels_last; and what ``statistics`` makes the mean and variance of, or None.
    """
    chunk = tile("forward", x, weight.shape[0], weight.shape[1]).m if stats else 0
    y, values = _Conv3x3.apply(
        x, front.gamma, front.beta, weight, front.mean, front.var, front.eps, batch0, tuple(geometry), chunk
    )
    return y, Partial(values, chunk, y.numel() // y.shape[1]) if stats else None


# ---------------------------------------------------------------------------------------- ahead-of-time compilation


def _cases(which: tuple[int, ...]) -> Iterator[Case]:
    """Each kernel with everything in front and behind, at stride 1; plain at stride 2; and with a dilation."""
    heavy, plain = dict(ACT=True, AFFINE=True, PREC="tf32"), dict(ACT=False, AFFINE=False, PREC="tf32")
    one, two, wide = (g.flags for g in (Geometry(1, 1, 1), Geometry(2, 1, 1), Geometry(1, 2, 2)))
    for storage in STORAGE:
        for kernel, name, sizes, more in (
            (
                K.forward3x3_kernel,
                "forward",
                ("BM", "BN", "BK"),
                [dict(STATS=s) for s in (True, True, False)],
            ),
            (K.dgrad3x3_kernel, "dgrad", ("BM", "BC", "BK"), [dict(STEP=s) for s in (1, 2, 1)]),
            (K.wgrad3x3_kernel, "wgrad", ("BN", "BC", "BM"), [{}] * 3),
        ):
            types = {"w_ptr": f"*{storage}"}
            aligned = [a for a in kernel.arg_names if a.endswith("_ptr") or a in ("N", "C")]
            for t in dict.fromkeys(TILES[name][storage != "fp32"][i] for i in which):
                for i, flags in enumerate((heavy | one, plain | two, heavy | wide)):
                    yield Case(
                        f"{name}{i or ''}-{storage}-{t.m}x{t.n}x{t.k}", kernel, signature(kernel, storage, types),
                        dict(flags, **more[i], **dict(zip(sizes, t[:3], strict=True))),
                        dict(num_warps=t.warps, num_stages=t.stages), aligned,
                    )  # fmt: skip


def aot_cases() -> Iterator[Case]:
    """Every launch on sizes that are multiples of 16."""
    return _cases((0, 1))


def odd_cases() -> Iterator[Case]:
    """Every launch on other sizes."""
    return _cases((2,))
