"""A folded 3x3 convolution, stride 1, padding 1, in Winograd's form on a CPU: inference, by oneDNN or compiled loops.

forward     as ``winograd``: Y = A^T [ (B^T d B) . (G g G^T) ] A, then + bias + other, ReLU
weight      G g G^T is made once and packed once (``winograd_products``); a layer keeps two packings at most, however
            many sizes of images come. Where the compiled loops serve they take one of their own (``winograd_native``)
bias        a row of the products that every sum of the last transform takes in
rounding    float32 throughout; see ``winograd`` for the points of interpolation
traffic     R x, the weight (1.8 or 4 times as large as the direct form's), other; W y; the patches stay in the cache
source      as ``winograd``
"""

from __future__ import annotations

from torch import Tensor

from fastres.kernels import _native, winograd_native
from fastres.kernels.folded_conv import Folded
from fastres.kernels.winograd import Steps, table, weights
from fastres.kernels.winograd_products import pack, packing, products

__all__ = ["winograd_folded", "winograd_fold", "winograd_packing"]


_LOOPS = b"compiled loops"


def _rows(steps: Steps) -> int:
    """Rows of the products: the tiles of a step, and one that gives the bias its place."""
    return steps.images * steps.tiles + 1


def winograd_packing(x: Tensor, n: int, tile: int) -> bytes:
    """Name of the layout that the weight of a convolution of x [B, C, H, W] to n channels is wanted in."""
    if tile == winograd_native.TILE and _native.serves(x.dtype, x.shape[1], n):
        return _LOOPS
    steps = Steps(x, tile)
    return packing(steps.products, n, x.shape[1], _rows(steps))


def winograd_fold(f: Folded, x: Tensor, tile: int) -> Folded:
    """A folded weight [N, C, 3, 3] as :func:`winograd_folded` takes it for tiles of ``tile`` and inputs like x."""
    if winograd_packing(x, len(f.bias), tile) == _LOOPS:
        return Folded(winograd_native.transformed(f.weight), f.bias)
    return Folded(pack(weights(f.weight, tile, turned=False), _rows(Steps(x, tile))), f.bias)


def winograd_folded(x: Tensor, f: Folded, tile: int, other: Tensor | None, relu: bool) -> Tensor:
    """relu(conv2d(x, weight, bias, padding=1) + other), without gradients.

    Args:
        x: [B, C, H, W], channels_last, float32.
        f: from :func:`winograd_fold`, for this tile and :func:`winograd_packing`.
        tile: 2 or 4.
        other: [B, N, H, W], or None.
        relu: end in a ReLU.
    """
    if f.weight.dim() == 1:
        return winograd_native.folded(x, *f, other, relu)
    steps, n = Steps(x, tile), len(f.bias)
    rows, groups = _rows(steps), steps.products
    parts = []
    for first, count in steps:
        images = (count, steps.h, steps.w)
        patches = table("patches", tile, images, x.dtype, rows)(steps.rows(x, first, count))
        found = products(patches, f.weight, n, groups)
        found[-groups] = f.bias
        parts.append(table("biased", tile, images, x.dtype, rows)(found))
    y = steps.joined(parts, n)
    y = y if other is None else y.add_(other)
    return y.relu_() if relu else y
