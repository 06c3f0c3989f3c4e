"""Winograd's form of a 3x3 convolution, stride 1, padding 1, on a CPU: sums of rows and products of ATen or oneDNN.

Where the compiled loops were built (``winograd_native``) and serve, the operators take those.

A tile of m x m results takes 9 m^2 multiplications a channel pair directly and (m + 2)^2 here: 36 and 16 for m = 2,
144 and 36 for m = 4.

    forward     Y = A^T [ (B^T d B) . (G g G^T) ] A         d: patch of the input, g: the 3x3 weights, Y: m x m
                the sum over input channels turns the products . into (m + 2)^2 matrix products [tiles, C] [C, N],
                oneDNN's (``winograd_products``) where it has them
    backward    dx  the same with the weights turned by 180 degrees and transposed
                dg = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G
    transforms  of activations: each row of the result is a weighted sum of a few rows [C] of the operand, by a table
                that depends on the image's size alone. ``embedding_bag`` is that sum, in one pass and with its terms in
                registers; padding, cut tiles and the layout of the result are all in the table
    saved       x and the weight, as the convolution itself
    rounding    float32 throughout. The products' sums are 9 times shorter than the direct form's. With m = 2 the
                transforms only add and the form is the more exact of the two. With m = 4 it depends on the points of
                interpolation: 0, +-3/4, +-11/8 lose five times less than the usual 0, +-1, +-2 (docs/CPU.md)
    traffic     the transformed patches are (m + 2)^2 / m^2 times the input; they are made for a few images at a time,
                so that they stay in the cache
    source      A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308; matrices for
                given points by A. Toom's and S. Cook's interpolation

Sums are taken in a fixed order: two runs agree bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import _native, winograd_native
from fastres.kernels._library import Traffic, register
from fastres.kernels._saved import recall, store
from fastres.kernels.conv_native import input_gradient
from fastres.kernels.conv_native import weight_gradient as direct_weights
from fastres.kernels.winograd_products import pack, packing, products, products_serve

__all__ = ["Steps", "dense", "table", "weights", "winograd"]

_POINTS = {2: (0, 1, -1), 4: (0, Fraction(3, 4), Fraction(-3, 4), Fraction(11, 8), Fraction(-11, 8))}
_ROWS = 400  # tiles of a step, about: rows of its matrix products


class _Matrices(NamedTuple):
    """Float64: A [k, m], G [k, 3], B^T [k, k] of tiles of m, where k = m + 2."""

    a: Tensor
    g: Tensor
    bt: Tensor


class _Bags(NamedTuple):
    """Weighted sums of rows: result i sums values[j] * rows[columns[j]] over offsets[i] <= j < offsets[i + 1]."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, C] to [results, C]."""
        return torch.embedding_bag(
            rows, self.columns, self.offsets, mode=0, per_sample_weights=self.values, include_last_offset=True
        )[0]


def _times(polynomial: list[Fraction], root: Fraction) -> list[Fraction]:
    """Coefficients, lowest first, times (x - root)."""
    return [
        low - root * c for low, c in zip([Fraction(0), *polynomial], [*polynomial, Fraction(0)], strict=True)
    ]


@functools.cache
def _matrices(tile: int) -> _Matrices:
    points = [Fraction(p) for p in _POINTS[tile]]  # and infinity, last in each matrix

    def others(p: Fraction) -> list[Fraction]:
        return [q for q in points if q != p]

    last = [Fraction(0)]
    a = [[p**i for i in range(tile)] for p in points] + [last * (tile - 1) + [Fraction(1)]]
    g = [[p**i / prod(p - q for q in others(p)) for i in range(3)] for p in points] + [
        last * 2 + [Fraction(1)]
    ]
    bt = [functools.reduce(_times, others(p), [Fraction(1)]) + last for p in points]
    bt.append(functools.reduce(_times, points, [Fraction(1)]))
    wide = [[[float(v) for v in row] for row in matrix] for matrix in (a, g, bt)]
    return _Matrices(*(torch.tensor(m, dtype=torch.float64, device="cpu") for m in wide))


@functools.lru_cache(maxsize=64)
def _taps(tile: int, turned: bool, n: int, dtype: torch.dtype) -> _Bags:
    """The transform of n rows a tap to n rows a product."""
    with torch.inference_mode(False), torch.device("cpu"):
        g = _matrices(tile).g
        g = g.flip(1) if turned else g
        spots = torch.kron(g, g)
        product, tap = spots.nonzero().unbind(1)
        counts = product.bincount(minlength=len(spots))
        # Bag (product, i) takes row i of each of its taps.
        bags = torch.arange(len(spots)).repeat_interleave(n), torch.arange(n).repeat(len(spots))
        per_bag = counts[bags[0]]
        offsets = torch.zeros(len(per_bag) + 1, dtype=torch.int32)
        offsets[1:] = per_bag.cumsum(0)
        first = counts.cumsum(0) - counts
        term = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(per_bag)
        term += first[bags[0]].repeat_interleave(per_bag)
        columns = tap[term] * n + bags[1].repeat_interleave(per_bag)
        return _Bags(offsets, columns.int(), spots[product, tap][term].to(dtype))


def weights(weight: Tensor, tile: int, turned: bool) -> Tensor:
    """[N, C, 3, 3] to [(tile + 2)^2, N, C], or turned by 180 degrees and transposed to [(tile + 2)^2, C, N]."""
    rows = (weight.permute(2, 3, 1, 0) if turned else weight.permute(2, 3, 0, 1)).contiguous()
    out, of = rows.shape[2:]
    return _taps(tile, turned, out, weight.dtype)(rows.view(9 * out, of)).view(-1, out, of)


def _along(kind: str, tile: int, size: int) -> Tensor:
    """One axis: [(tile + 2) tiles, size] from the pixels of a line to the patches of its tiles, through B^T, or to its
    tiles, through A. ``outputs`` goes the other way by the same numbers as ``gradients``."""
    m = _matrices(tile)
    tiles = -(-size // tile)
    matrix, before = (m.bt, 1) if kind == "patches" else (m.a, 0)  # a patch begins a pixel before its tile
    line = torch.zeros(tile + 2, tiles, tiles * tile + 2, dtype=torch.float64, device="cpu")
    for i in range(tiles):
        line[:, i, i * tile : i * tile + matrix.shape[1]] = matrix
    return line.view((tile + 2) * tiles, -1)[:, before : before + size]


@functools.lru_cache(maxsize=64)
def table(kind: str, tile: int, shape: tuple[int, int, int], dtype: torch.dtype, padded: int = 0) -> _Bags:
    """The transform of images [B, H, W] whose rows are pixels on one side and [(tile + 2)^2, B, tiles] on the other, or
    [padded, (tile + 2)^2] with tiles as ``B, tiles``, the others empty.

    Args:
        kind: ``patches`` (B^T d B), ``gradients`` (A dY A^T), ``outputs`` (A^T M A) or ``biased``, which takes in one
            more row, behind the others.
        tile: m.
        shape: B, H, W.
        dtype: of the values.
        padded: 0, or B tiles at least, more for ``biased``, whose row is then the first one of the last.
    """
    b, h, w = shape
    k, down, across = tile + 2, -(-h // tile), -(-w // tile)
    with torch.inference_mode(False), torch.device("cpu"):
        lines = [_along(kind, tile, size) for size in (h, w)]
        (i, y), (j, x) = (line.nonzero().unbind(1) for line in lines)
        values = (lines[0][i, y][:, None] * lines[1][j, x]).flatten().repeat(b)
        image = torch.arange(b)[:, None, None]
        i, y = i[:, None], y[:, None]
        # Of pair (i, j) of spots: which product it is in, and where there.
        place = (i // down * k + j // across, (i % down) * across + j % across)
        if padded:
            spots = ((image * (down * across) + place[1]) * (k * k) + place[0]).flatten()
        else:
            spots = ((place[0] * b + image) * (down * across) + place[1]).flatten()
        pixels = ((image * h + y) * w + x).flatten()
        count, inner = b * h * w, k * k * (padded or b * down * across)
        rows, columns = (pixels, spots) if kind in ("outputs", "biased") else (spots, pixels)
        if kind == "biased":
            rows, columns = (
                torch.cat((rows, torch.arange(count))),
                torch.cat((columns, torch.full((count,), inner - k * k if padded else inner))),
            )
            values = torch.cat((values, values.new_ones(count)))
        results = count if kind in ("outputs", "biased") else inner
        order = rows.argsort(stable=True)
        offsets = torch.zeros(results + 1, dtype=torch.int32)
        offsets[1:] = rows.bincount(minlength=results).cumsum(0)
        return _Bags(offsets, columns[order].int(), values[order].to(dtype))


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class Steps:
    """The images of a channels_last batch [B, C, H, W], a few at a time, as rows of C."""

    def __init__(self, like: Tensor, tile: int) -> None:
        self.b, _, self.h, self.w = like.shape
        self.tile, self.products = tile, (tile + 2) ** 2
        self.tiles = -(-self.h // tile) * -(-self.w // tile)
        steps = -(-self.b // max(1, _ROWS // self.tiles))
        self.images = -(-self.b // steps)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First image and number of images of each step."""
        for i in range(0, self.b, self.images):
            yield i, min(self.images, self.b - i)

    def rows(self, x: Tensor, first: int, count: int) -> Tensor:
        """[count H W, C]: the pixels of these images."""
        return x[first : first + count].permute(0, 2, 3, 1).reshape(-1, x.shape[1])

    def joined(self, parts: list[Tensor], channels: int) -> Tensor:
        """[B, channels, H, W] from the rows of the steps."""
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return dense(y.view(self.b, self.h, self.w, channels).permute(0, 3, 1, 2))

    def __call__(self, kind: str, x: Tensor, first: int, count: int) -> Tensor:
        """[(tile + 2)^2, tiles, C]: ``patches`` or ``gradients`` of these images."""
        bags = table(kind, self.tile, (count, self.h, self.w), x.dtype)
        return bags(self.rows(x, first, count)).view(self.products, -1, x.shape[1])


def _product(x: Tensor, weight: Tensor, backward: bool, tile: int) -> Tensor:
    x = dense(x)
    if tile == winograd_native.TILE and _native.serves(x.dtype, *weight.shape[:2]):
        return winograd_native.convolution(x, weight, weight.shape[1 if backward else 0], turned=backward)
    u = weights(weight, tile, turned=backward)
    by_onednn, packed = products_serve(x.dtype), {}
    groups, n, c = u.shape
    steps, parts = Steps(x, tile), []
    for first, count in steps:
        images, rows = (count, steps.h, steps.w), count * steps.tiles
        if by_onednn:
            name = packing(groups, n, c, rows)  # a shorter last step may want another
            if name not in packed:
                packed[name] = pack(u, rows)
            patches = table("patches", tile, images, x.dtype, rows)(steps.rows(x, first, count))
            found = products(patches, packed[name], n, groups)
            parts.append(table("outputs", tile, images, x.dtype, rows)(found))
        else:
            found = torch.bmm(steps("patches", x, first, count), u.transpose(1, 2))
            parts.append(table("outputs", tile, images, x.dtype)(found.view(-1, n)))
    return steps.joined(parts, n)


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, tile: int) -> Tensor:
    x, dy = dense(x), dense(dy)
    n, c = weight.shape[:2]
    if tile == winograd_native.TILE and _native.serves(x.dtype, n, c):
        return winograd_native.weight_gradient(x, dy, weight)
    steps = Steps(x, tile)
    sums = x.new_zeros(steps.products, n, c)
    for first, count in steps:
        sums.baddbmm_(steps("gradients", dy, first, count).transpose(1, 2), steps("patches", x, first, count))
    g = _matrices(tile).g.to(x)
    taps = (torch.kron(g, g).t() @ sums.view(-1, n * c)).view(3, 3, n, c)
    return torch.empty_like(weight).copy_(taps.permute(2, 3, 0, 1))


def _fake(x: Tensor, weight: Tensor, backward: bool, tile: int) -> Tensor:
    b, _, h, w = x.shape
    n = weight.shape[1 if backward else 0]
    return torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _flops(x: Tensor, weight: Tensor, tile: int) -> int:
    """Of the products: (tile + 2)^2 for a tile and a pair of channels, in place of 9 tile^2."""
    return 2 * (tile + 2) ** 2 * (x.numel() // x.shape[1]) * weight[..., 0, 0].numel() // tile**2


product = register(
    "winograd(Tensor x, Tensor weight, bool backward, int tile) -> Tensor",
    reference=_product,
    triton=_product,
    fake=_fake,
    traffic=lambda x, weight, backward, tile: Traffic([x, weight], flops=_flops(x, weight, tile)),
)
weight_gradient = register(
    "winograd_weight(Tensor x, Tensor dy, Tensor weight, int tile) -> Tensor",
    reference=_weight_gradient,
    triton=_weight_gradient,
    fake=lambda x, dy, weight, tile: torch.empty_like(weight),
    traffic=lambda x, dy, weight, tile: Traffic([x, dy], flops=_flops(x, weight, tile)),
)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tile: int, weights: int) -> Tensor:
        store(ctx, x, weight)
        ctx.tiles = tile, weights
        return product(x, weight, False, tile) if tile else torch.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = recall(ctx)
        tile, weights = ctx.tiles
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(x, dy, weight, weights) if weights else direct_weights(x, dy, weight, 1, 1)
        if ctx.needs_input_grad[0]:  # last: the norm below finds it in the cache
            dx = product(dy, weight, True, tile) if tile else input_gradient(dy, x, weight, 1, 1)
        return dx, dw, None, None


def winograd(x: Tensor, weight: Tensor, tile: int, weights: int) -> Tensor:
    """``conv2d(x, weight, padding=1)``, differentiable once.

    Args:
        x: [B, C, H, W], channels_last, float32 or float64.
        weight: [N, C, 3, 3], of the same dtype.
        tile: 2 or 4: forward and dx by tiles of that size; 0: by PyTorch's convolution.
        weights: the same for the weight gradient.

    Returns:
        [B, N, H, W], channels_last.
    """
    return _Winograd.apply(x, weight, tile, weights)
