"""The block end in its moment form as one differentiable function, composed of the operators of fused_conv_bn_relu.

    out = relu(keep bn3(conv3(relu(bn2(x)))) + identity)          identity a tensor, or bn'(conv'(x2)) of a downsample

The statistics of all norms are computed before (``moments``, ``fold``) and enter as constants; their gradient is part
of the formulas here, as in ``batch_norm``: gradients of x, W and the affine parameters are the full ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels.batch_norm import batch_norm_backward

__all__ = ["Branch", "Folded", "block_end", "fold_branch"]


class Folded(NamedTuple):
    """A convolution with its norm folded in, and what its backward needs."""

    wf: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    wcov: Tensor
    mu: Tensor
    anchor: Tensor


class Branch(NamedTuple):
    """A 1x1 convolution and the norm behind it, with the norm and ReLU pending in front of it (``act``)."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    batch: bool  # batch statistics (else running ones)
    stride: int
    # The norm in front: statistics, affine parameters, eps, and whether the statistics are of this batch.
    mean0: Tensor | None = None
    var0: Tensor | None = None
    gamma0: Tensor | None = None
    beta0: Tensor | None = None
    eps0: float = 0.0
    batch0: bool = False
    # The view of x that was read, where that is strided: what the gradient is of.
    read: Tensor | None = None

    @property
    def act(self) -> bool:
        return self.mean0 is not None

    @property
    def rows(self) -> int:
        """Pixels of the result, over the batch."""
        n, _, h, w = self.x.shape
        return n * ((h - 1) // self.stride + 1) * ((w - 1) // self.stride + 1)

    @property
    def options(self) -> tuple[Any, ...]:
        """What is no tensor: eps, batch, stride, rows, eps0, batch0."""
        return self.eps, self.batch, self.stride, self.rows, self.eps0, self.batch0

    @property
    def prologue(self) -> tuple[Any, ...]:
        return self.mean0, self.var0, self.gamma0, self.beta0, self.eps0, self.act


def fold_branch(
    b: Branch, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Folded:  # fmt: skip
    """Fold the norm into the weight: from the moments of this batch (updating the running statistics, where given), or
    from the running statistics."""
    with torch.no_grad():
        if not b.batch:
            wf, bias, mean, var, wcov = ops.fold(
                b.weight, b.x, None, None, b.gamma, b.beta, b.eps, running_mean, running_var, None, None, 0.0, b.rows
            )  # fmt: skip
            zero = bias.new_zeros(b.x.shape[1])
            return Folded(wf, bias, mean, var, wcov, zero, zero)
        mu, cov, anchor = ops.moments(b.x, *b.prologue, b.stride)
        wf, bias, mean, var, wcov = ops.fold(
            b.weight, b.x, mu, cov, b.gamma, b.beta, b.eps, None, None, running_mean, running_var, momentum, b.rows
        )  # fmt: skip
        return Folded(wf, bias, mean, var, wcov, mu, anchor)


class _BlockEnd(torch.autograd.Function):
    """Differentiable in x, W, gamma, beta of both branches, the norm in front, and a plain identity."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma0: Tensor | None, beta0: Tensor | None, weight: Tensor, gamma: Tensor | None,
        beta: Tensor | None, identity: Tensor | None, x2: Tensor | None, weight2: Tensor | None,
        gamma2: Tensor | None, beta2: Tensor | None, keep: Tensor | None, mean0: Tensor | None, var0: Tensor | None,
        first: tuple[Any, ...], second: tuple[Any, ...] | None, base2: Tensor | None, save: bool,
        *folded: Tensor | None,
    ) -> Tensor:  # fmt: skip
        stride2 = 1 if second is None else second[2]
        x2 = x2 if base2 is None else base2
        out, bits = ops.pointwise_end(
            x, mean0, var0, gamma0, beta0, first[4], mean0 is not None, folded[0], folded[1], identity, x2, folded[7],
            folded[8], stride2, keep, save,
        )  # fmt: skip
        if save:
            ctx.save_for_backward(
                bits, keep, x, mean0, var0, gamma0, beta0, weight, gamma, *folded[:7], x2, weight2, gamma2, *folded[7:]
            )  # fmt: skip
            ctx.first, ctx.second = first, second
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        bits, keep, x, mean0, var0, gamma0, beta0, weight, gamma, *rest = ctx.saved_tensors
        folded, (x2, weight2, gamma2), folded2 = rest[:7], rest[7:10], rest[10:]
        act = mean0 is not None
        prologue = (mean0, var0, gamma0, beta0, ctx.first[4], act)
        need = ctx.needs_input_grad
        g, dz, s1, s2, dw, dgamma, dbeta = _branch(
            dout, bits, x, prologue, weight, gamma, folded, keep, ctx.first, need[0] or need[1] or need[2]
        )
        dx = dz
        if act and need[0]:
            scale = 1.0 / (x.numel() // x.shape[1])
            sums = (s1, s2) if ctx.first[5] else (None, None)
            dx = batch_norm_backward(
                dz, x, mean0, var0, gamma0, beta0, ctx.first[4], False, None, *sums, scale
            )
        grads: list[Tensor | None] = [None] * len(need)
        grads[0] = dx if need[0] else None
        for i, value, like in ((1, s2, gamma0), (2, s1, beta0), (4, dgamma, gamma), (5, dbeta, gamma)):
            grads[i] = value.to(like.dtype) if need[i] and like is not None else None
        grads[3] = dw if need[3] else None
        grads[6] = g if need[6] else None
        if ctx.second is not None:
            _, dx2, _, _, dw2, dgamma2, dbeta2 = _branch(
                g, None, x2, ops.Prologue(), weight2, gamma2, folded2, None, ctx.second, need[7]
            )
            grads[7], grads[8] = (dx2 if need[7] else None), (dw2 if need[8] else None)
            for i, value in ((9, dgamma2), (10, dbeta2)):
                grads[i] = value.to(gamma2.dtype) if need[i] and gamma2 is not None else None
        return tuple(grads)


def _branch(
    dout: Tensor, bits: Tensor | None, x: Tensor, prologue: tuple[Any, ...], weight: Tensor, gamma: Tensor | None,
    folded: list[Tensor], keep: Tensor | None, options: tuple[Any, ...], need_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """g, dz, the sums of the norm in front, dW, dgamma and dbeta of one branch."""
    wf, _, mean, var, wcov, mu, anchor = folded
    eps, batch, stride, rows = options[:4]
    sums, g = ops.p_sums(dout, bits, x, *prologue, anchor, keep, stride)
    g = dout if bits is None else g
    dw, dgamma, dvar, adb = ops.weight_gradient(sums, weight, wcov, anchor, mu, mean, var, gamma, eps, batch)
    n = weight.shape[0]
    dz = s1 = s2 = dgamma
    if need_x:
        b, shift = ops.correction(weight, dvar, adb, mu, x, rows) if batch else (None, None)
        dz, s1, s2 = ops.pointwise_dz(g, wf, x, *prologue, b, shift, keep, stride)
    return g, dz, s1, s2, dw, dgamma, sums[sums.shape[0] - n :]


def block_end(
    branch: Branch, folded: Folded, identity: Tensor | None, second: Branch | None, folded2: Folded | None,
    keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """relu(keep branch + identity), or with ``second`` the downsample branch as identity.

    Args:
        branch, folded: the branch and its folded form; stride 1.
        identity: [N, Cout, H, W] in channels_last, or None with ``second``.
        second, folded2: a downsample branch, a plain 1x1 convolution of any stride, or None; with a stride its
            ``read`` is the view of its input that receives the gradient.
        keep: [N] factor of each sample's branch, or None.

    Returns:
        [N, Cout, H, W], channels_last, in the dtype of ``branch.x``.
    """
    two: tuple[Any, ...] = (None,) * 4
    base2 = None
    if second is not None:
        read = second.x if second.read is None else second.read
        two = (read, second.weight, second.gamma, second.beta)
        base2 = None if second.read is None else second.x.detach()
    return _BlockEnd.apply(
        branch.x, branch.gamma0, branch.beta0, branch.weight, branch.gamma, branch.beta, identity, *two, keep,
        branch.mean0, branch.var0, branch.options, None if second is None else second.options, base2,
        torch.is_grad_enabled(), *folded, *((None,) * 7 if folded2 is None else folded2),
    )  # fmt: skip
