"""A folded 3x3 convolution, stride 1, padding 1, in Winograd's form on a CPU: inference, by oneDNN.

forward     as ``winograd``: Y = A^T [ (B^T d B) . (G g G^T) ] A, then + bias + other, ReLU
weight      G g G^T is made once and packed once: the (tile + 2)^2 matrix products are one 1x1 convolution of as many
            groups, whose pixels are the tiles. With AVX-512 that runs at twice the rate of PyTorch's batched product
packing     oneDNN wants another packing for few rows than for many, and where it gets the wrong one it packs anew at
            each call, which takes up to 50 times as long as the products. ``winograd_packing`` asks it which one it
            wants, so that a layer keeps two at most, however many sizes of images come
bias        a row of the products that every sum of the last transform takes in
rounding    float32 throughout; see ``winograd`` for the points of interpolation
traffic     R x, the weight (1.8 or 4 times as large as the direct form's), other; W y; the patches stay in the cache
source      as ``winograd``
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastres.kernels.folded_conv import Folded, layout_name
from fastres.kernels.winograd import Steps, table, weights

__all__ = ["winograd_folded", "winograd_fold", "winograd_packing"]


def _rows(steps: Steps) -> int:
    """Rows of the products: the tiles of a step, and one that gives the bias its place."""
    return steps.images * steps.tiles + 1


def _where(groups: int) -> tuple[Any, ...]:
    return [0, 0], [1, 1], [1, 1], groups


def _pack(u: Tensor, groups: int, rows: int) -> Tensor:
    """A grouped 1x1 weight in oneDNN's own layout for so many rows."""
    return torch.ops.mkldnn._reorder_convolution_weight(u, *_where(groups), [1, groups * u.shape[1], rows, 1])


@functools.lru_cache(maxsize=1024)
def _packing(n: int, c: int, groups: int, rows: int) -> bytes:
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        return layout_name(_pack(torch.zeros(groups * n, c, 1, 1), groups, rows))


def winograd_packing(x: Tensor, n: int, tile: int) -> bytes:
    """Name of the layout that oneDNN wants the weight of a convolution of x [B, C, H, W] to n channels in."""
    steps = Steps(x, tile)
    return _packing(n, x.shape[1], steps.products, _rows(steps))


def winograd_fold(f: Folded, x: Tensor, tile: int) -> Folded:
    """A folded weight [N, C, 3, 3] as :func:`winograd_folded` takes it for tiles of ``tile`` and inputs like x."""
    steps = Steps(x, tile)
    u = weights(f.weight, tile, turned=False).reshape(-1, f.weight.shape[1], 1, 1)
    return Folded(_pack(u, steps.products, _rows(steps)), f.bias)


def winograd_folded(x: Tensor, f: Folded, tile: int, other: Tensor | None, relu: bool) -> Tensor:
    """relu(conv2d(x, weight, bias, padding=1) + other), without gradients.

    Args:
        x: [B, C, H, W], channels_last, float32.
        f: from :func:`winograd_fold`, for this tile and :func:`winograd_packing`.
        tile: 2 or 4.
        other: [B, N, H, W], or None.
        relu: end in a ReLU.
    """
    steps, n = Steps(x, tile), len(f.bias)
    rows, groups = _rows(steps), steps.products
    parts = []
    for first, count in steps:
        images = (count, steps.h, steps.w)
        patches = table("patches", tile, images, x.dtype, rows)(steps.rows(x, first, count))
        patches = patches.view(1, rows, 1, -1).permute(0, 3, 1, 2)
        products = torch.ops.mkldnn._convolution_pointwise(
            patches, f.weight, None, *_where(groups), "none", [], ""
        )
        products = products.permute(0, 2, 3, 1).view(-1, n)
        products[-groups] = f.bias
        parts.append(table("biased", tile, images, x.dtype, rows)(products))
    y = steps.joined(parts, n)
    y = y if other is None else y.add_(other)
    return y.relu_() if relu else y
