"""A convolution that keeps the raw input of the norm and ReLU before it, and forms its own input again in backward.

forward     y2 = conv(z, W),  z = relu(bn(y))             PyTorch's convolution; z is not saved
backward    z formed again, then dz and dW as ever
saved       y and the vectors of the norm, which the norm's own backward keeps anyway, and W
traffic     backward R y, W z more than a convolution that keeps z
rounding    z is formed by the same kernel twice: the same bits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.kernels._saved import recall, store
from fastres.kernels.batch_norm import batch_norm_act

__all__ = ["recomputed_conv"]


class _RecomputedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None,
        beta: Tensor | None, eps: float, geometry: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        store(ctx, weight, y, mean, var, gamma, beta)
        ctx.eps, ctx.geometry = eps, geometry
        stride, padding, dilation, groups = geometry
        return torch.nn.functional.conv2d(z, weight.to(z.dtype), None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, dy2: Tensor) -> tuple[Tensor | None, ...]:
        weight, y, mean, var, gamma, beta = recall(ctx)
        stride, padding, dilation, groups = ctx.geometry
        need = ctx.needs_input_grad[:2]
        z = batch_norm_act(y, mean, var, gamma, beta, ctx.eps, True, False, None, None)
        dz, dw, _ = torch.ops.aten.convolution_backward(
            dy2, z, weight.to(z.dtype), None, stride, padding, dilation, False, [0, 0], groups, [*need, False]
        )
        return dz, dw.to(weight.dtype) if need[1] else None, *(None,) * 7


def recomputed_conv(
    z: Tensor, weight: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float, geometry: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """conv(z) with z = relu(bn(y)) at hand, keeping y for backward instead of z.

    Args:
        z, y: [N, C, H, W], dense. The gradient goes to z alone.
        weight: [Cout, C / groups, kh, kw], any floating dtype.
        mean, var, gamma, beta, eps: of the norm, vectors [C].
        geometry: stride, padding, dilation, groups of the convolution.

    Returns:
        The convolution's output, in z's dtype.
    """
    vectors = (None if v is None else v.detach() for v in (mean, var, gamma, beta))
    return _RecomputedConv.apply(z, weight, y.detach(), *vectors, eps, geometry)
