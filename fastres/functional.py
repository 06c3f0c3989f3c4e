"""The functions that blocks are written in, and the one place where a route is chosen.

A block names its arithmetic; nothing is computed until a consumer decides how:

    z1 = conv_bn_relu(x, conv1, bn1)                 # Pending: relu(bn1(conv1(x)))
    z2 = conv_bn_relu(z1, conv2, bn2)
    out = add_relu(conv_bn(z2, conv3, bn3), x)       # the block end sees conv3, bn3 and the identity together

Where each part runs is decided in ``_routing``, whose settings are re-exported here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastres._batch_norm import (
    aten_batch_norm,
    batch_norm,
    check_bn,
)
from fastres._block_end import add_relu, add_relu_linked
from fastres._cpu import winograd
from fastres._foldable import inference_layout
from fastres._pending import Linked, Pending, fold_pending, foldable, materialize
from fastres._routing import (
    BACKENDS,
    BatchNorm,
    Choice,
    assume_gpu,
    backend,
    choose,
    conv3x3,
    decide,
    folding,
    get_backend,
    get_folding,
    memory,
    moments,
    moments_pay,
    record_routes,
)
from fastres.kernels import pool as pool_ops
from fastres.kernels._check import check_activation, check_aten
from fastres.kernels._native import native
from fastres.kernels._tape import programs

__all__ = [
    "BACKENDS",
    "BatchNorm",
    "Choice",
    "Linked",
    "Pending",
    "add_relu",
    "add_relu_linked",
    "assume_gpu",
    "backend",
    "batch_norm",
    "conv3x3",
    "conv_bn",
    "conv_bn_relu",
    "folding",
    "get_backend",
    "get_folding",
    "inference_layout",
    "materialize",
    "max_pool",
    "memory",
    "moments",
    "moments_pay",
    "native",
    "programs",
    "record_routes",
    "winograd",
]


def conv_bn(x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm, relu: bool = False) -> Pending:
    """``bn(conv(x))``, pending."""
    return Pending(x, conv, bn, relu)


def conv_bn_relu(x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm) -> Pending:
    """``relu(bn(conv(x)))``, pending."""
    return Pending(x, conv, bn, True)


def max_pool(x: Tensor | Pending | Linked) -> Tensor:
    """3x3 max pooling, stride 2, padding 1, of an activation or of a pending stem (norm and ReLU in the same pass).

    Args:
        x: [N, C, H, W] or pending.

    Returns:
        [N, C, (H + 1) // 2, (W + 1) // 2] in the input's dtype and memory format.
    """
    if not isinstance(x, Pending) or not x.relu or x._z is not None:
        z = materialize(x)
        check_activation("max_pool", "input", z)
        return F.max_pool2d(z, 3, 2, 1)
    op = "max_pool"
    # On a GPU the stem's norm, ReLU and pooling are one pass already; PyTorch's pooling would write indices too.
    folded: Tensor | str = ""
    if foldable(x) and decide(op, materialize(x.x), (), ())[0] == "aten":
        folded = fold_pending(x, True)
    if isinstance(folded, Tensor):
        return F.max_pool2d(folded, 3, 2, 1)
    y, bn = x.raw(), x.bn
    check_bn(op, y, bn)
    if choose(op, y, (), (bn,)) == "aten":
        check_aten(op, y, bn)
        return F.max_pool2d(aten_batch_norm(y, x.once()).relu_(), 3, 2, 1)
    s = x.moments()
    return pool_ops.bn_relu_max_pool(
        y, s.mean, s.var, bn.weight, bn.bias, bn.eps, bn.training, s.values, s.group
    )[0]  # fmt: skip
