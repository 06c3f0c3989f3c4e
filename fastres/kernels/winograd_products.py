"""The (tile + 2)^2 matrix products of Winograd's form, [tiles, C] [C, N] each, by oneDNN: one 1x1 convolution.

products    as many groups as there are products; its pixels are the tiles, so patches lie as [tiles, products, C]. With
            AVX-512 it runs at 280 to 450 GFLOP/s where PyTorch's batched product runs at 190
packing     oneDNN wants another layout of the weight for few tiles than for many, and where it gets the wrong one it
            packs anew at each call, which takes up to 50 times as long as the products. ``packing`` asks it which
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastres.kernels.folded_conv import layout_name, onednn_obstacle

__all__ = ["pack", "packing", "products", "products_serve"]


def products_serve(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype in float32. torch.compile takes it as a constant."""
    return dtype == torch.float32 and not onednn_obstacle(dtype)


setattr(products_serve, "_dynamo_marked_constant", True)  # noqa: B010  (functions have no such attribute to mypy)


def _where(groups: int) -> tuple[Any, ...]:
    return [0, 0], [1, 1], [1, 1], groups


def pack(u: Tensor, rows: int) -> Tensor:
    """Matrices [products, N, C] in oneDNN's own layout, for so many tiles."""
    groups, n, c = u.shape
    weight = u.reshape(groups * n, c, 1, 1)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *_where(groups), [1, groups * c, rows, 1])


@functools.lru_cache(maxsize=1024)
def packing(groups: int, n: int, c: int, rows: int) -> bytes:
    """Name of the layout that :func:`pack` gives such matrices."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        return layout_name(pack(torch.zeros(groups, n, c), rows))


def products(patches: Tensor, packed: Tensor, n: int, groups: int) -> Tensor:
    """Patches [tiles * products, C] times packed matrices [products, N, C], transposed: [tiles * products, N]."""
    images = patches.view(1, len(patches) // groups, 1, -1).permute(0, 3, 1, 2)
    y = torch.ops.mkldnn._convolution_pointwise(images, packed, None, *_where(groups), "none", [], "")
    return y.permute(0, 2, 3, 1).view(-1, n)
