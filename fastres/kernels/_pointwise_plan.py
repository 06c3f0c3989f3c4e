"""How the products of the moment form are cut into programs, and what they give back and move: configurations, sizes of
partial results, shapes for tracing, bytes for the meter. Their maths is in ``fused_conv_bn_relu``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import _tuned
from fastres.kernels._launch import SHAPES
from fastres.kernels._library import Traffic

__all__ = ["FOLD", "GEMM", "PROLOGUE", "Gemm", "Prologue", "accumulated", "default_tile", "dz_traffic", "empty_read",
           "end_traffic", "fake_dz", "fake_end", "fake_fold", "fake_moments", "fake_p", "fake_weight", "geometry",
           "gram_workspace", "model_tile", "moments_traffic", "p_name", "p_plan", "p_traffic", "p_workspace",
           "precision", "split", "tile"]  # fmt: skip


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
    default = default_tile(kernel, x.element_size(), columns, *others)
    if not _tuned.chosen():
        return default
    return _tuned.product(kernel, x, columns, others[0], _odd(columns, *others), default)


def model_tile(kernel: str, itemsize: int, columns: int, *others: int) -> Gemm:
    """``tile`` without a tuning table."""
    return GEMM[kernel][itemsize == 2][2 if _odd(columns, *others) else int(columns > 64)]


# For launches, which ask for few shapes, often. What torch.compile traces takes the functions themselves: it warns of
# every cache that it meets.
default_tile = functools.lru_cache(SHAPES)(model_tile)


def _odd(*sizes: int) -> bool:
    for size in sizes:  # no generator: every launch comes here
        if size % 16:
            return True
    return False


def precision(x: Tensor) -> str:
    """How fp32 operands enter a product: torch's own switch for convolutions decides; 2-byte types ignore it."""
    return "tf32" if x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32 else "ieee"


def model_split(rows: int, step: int, tiles: int) -> tuple[int, int]:
    """Parts and rows a part of a reduction over ``rows`` in steps, so that parts x tiles programs fill the device."""
    steps = -(-rows // step)
    aim = _PROGRAMS if tiles == 1 else _PROGRAMS_LARGE
    parts = max(1, min(-(-aim // tiles), -(-steps // 4)))
    chunk = -(-steps // parts) * step
    return -(-rows // chunk), chunk


split = functools.lru_cache(SHAPES)(model_split)


class Prologue(NamedTuple):
    """The pending norm and ReLU in front of the product; all None, 0 and False for a plain tensor."""

    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0
    act: bool = False


PROLOGUE = "Tensor? mean0, Tensor? var0, Tensor? gamma0, Tensor? beta0, float eps0, bool act"


def geometry(x: Tensor, stride: int) -> tuple[int, int, tuple[int, int, int, int]]:
    """Rows of the result, its pixels an image, and (HW, OW, H, W) of a 1x1 convolution with this stride."""
    n, _, h, w = x.shape
    oh, ow = (h - 1) // stride + 1, (w - 1) // stride + 1
    return n * oh * ow, oh * ow, (oh * ow, ow, h, w)


def empty_read(x: Tensor, stride: int) -> Tensor:
    """An empty tensor for the pixels of x that a 1x1 convolution of this stride reads."""
    n, c, h, w = x.shape
    size = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def p_name(bits: Tensor | None, act: bool, x2: Tensor | None, keep: Tensor | None) -> str:
    """The configurations of such a call."""
    return "p" if act or not (bits is None and x2 is None and keep is None) else "plain_p"


def _p_grid(t: Gemm, n: int, c: int, c2: int) -> tuple[int, int]:
    """Tiles of the result of the weight-shaped sums of one or two branches."""
    return -(-n // t.m), -(-c // t.n) + -(-c2 // t.n)


def p_plan(t: Gemm, rows: int, n: int, c: int, c2: int) -> tuple[int, int, tuple[int, int]]:
    """Parts, rows a part, and tiles of the result of the weight-shaped sums of one or two branches."""
    grid = _p_grid(t, n, c, c2)
    parts, chunk = split(rows, t.k, grid[0] * grid[1])
    return parts, chunk, grid


# ------------------------------------------------------------------------------------------------- for tracing


def accumulated(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def fake_moments(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    return accumulated(x, c), accumulated(x, c, c), accumulated(x, c)


def fake_fold(weight: Tensor, like: Tensor, mu: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    n, c = weight.shape[:2]
    wcov = accumulated(like, n, c) if mu is not None else accumulated(like, 0, 0)
    return like.new_empty(n, c), accumulated(like, n), accumulated(like, n), accumulated(like, n), wcov


def fake_end(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, _, h, w = x.shape
    n = rest[6].shape[0]
    out = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, x.new_empty((b * h * w, (n + 7) // 8) if rest[-1] else (0, 0), dtype=torch.uint8)


def fake_p(dout: Tensor, bits: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, c, x2 = dout.shape[1], x.shape[1], rest[7]
    g = torch.empty(dout.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    width = n * c + n + (0 if x2 is None else n * x2.shape[1] + n)
    return accumulated(x, width), x.new_empty(0) if bits is None else g


def fake_dz(g: Tensor, wf: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x2 = rest[11]
    sums = (accumulated(x, x.shape[1] if rest[5] else 0) for _ in range(2))
    dx = empty_read(x, rest[15] if x2 is None else 1)
    return dx, *sums, x.new_empty(0) if x2 is None else empty_read(x2, rest[15])


def fake_weight(sums: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(weight), *(torch.empty_like(sums[: weight.shape[0]]) for _ in range(3))


# What the products move: each operand once, however often the cache has to supply it. Arguments as in the schemas.


# -------------------------------------------------------------------------------------------------- for the meter


def _pixels(x: Tensor | None, stride: int) -> Tensor | None:
    """The pixels that a strided 1x1 convolution reads."""
    return x if x is None else x[:, :, ::stride, ::stride]


def gram_workspace(t: Gemm, rows: int, c: int) -> tuple[int, int]:
    """Bytes of the partial results of ``moments``, written and read back, and its flops."""
    tiles = -(-c // t.n) * (-(-c // t.n) + 1) // 2  # the upper triangle
    return 8 * model_split(rows, t.k, tiles)[0] * (tiles * t.n**2 + c), 2 * rows * tiles * t.n**2


def p_workspace(t: Gemm, rows: int, n: int, c: int, c2: int) -> int:
    """Bytes of the partial results of ``p_sums``, written and read back."""
    down, across = _p_grid(t, n, c, c2)
    return 8 * model_split(rows, t.k, down * across)[0] * (n * c + n + (n * c2 + n if c2 else 0))


def moments_traffic(x: Tensor, *a: Any) -> Traffic:
    rows, c, t = geometry(x, a[-1])[0], x.shape[1], tile("gram", x, x.shape[1], x.shape[1])
    return Traffic([_pixels(x, a[-1])], *gram_workspace(t, rows, c))


def end_traffic(x: Tensor, *a: Any) -> Traffic:
    wf, identity, x2, wf2, stride2 = a[6], a[8], a[9], a[10], a[12]
    depth = x.shape[1] + (0 if x2 is None else x2.shape[1])
    flops = 2 * (x.numel() // x.shape[1]) * wf.shape[0] * depth
    return Traffic([x, wf, identity, _pixels(x2, stride2), wf2], flops=flops)


def p_traffic(dout: Tensor, bits: Tensor | None, x: Tensor, *a: Any) -> Traffic:
    x2, stride2 = a[7], a[9]
    n, c, c2 = dout.shape[1], x.shape[1], 0 if x2 is None else x2.shape[1]
    rows = dout.numel() // n
    sums = p_workspace(tile(p_name(bits, a[5], x2, a[10]), x, c, n, c2), rows, n, c, c2)
    read = [_pixels(x, stride2 if x2 is None else 1), _pixels(x2, stride2)]
    return Traffic([dout, bits, *read], sums, 2 * rows * n * (c + c2))


def dz_traffic(g: Tensor, wf: Tensor, x: Tensor, *a: Any) -> Traffic:
    act, b, (wf2, x2, b2, _, _, stride2) = a[5], a[6], a[10:16]
    (n, c), rows, c2 = wf.shape, g.numel() // g.shape[1], 0 if x2 is None else x2.shape[1]
    partials = 8 * 2 * -(-rows // tile("dz", x, c, n, c2).m) * c if act else 0
    mine = _pixels(x, stride2 if x2 is None else 1)
    read = [mine if act or b is not None else None, None if b2 is None else _pixels(x2, stride2)]
    depth = c * (n + (0 if b is None else c)) + c2 * (n + (0 if b2 is None else c2))
    return Traffic([g, wf, b, wf2, b2, *read], partials, 2 * rows * depth)
