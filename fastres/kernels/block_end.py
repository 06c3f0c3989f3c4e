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
from fastres.kernels._library import applied, unwatched
from fastres.kernels._saved import recall, store
from fastres.kernels._sync import merge_over_group, over_group, update_running
from fastres.kernels.batch_norm import batch_norm_backward, in_dtype
from fastres.kernels.residual_add_relu import masked

__all__ = ["Branch", "Folded", "block_end", "fold", "fold_branch", "gradients", "unmasked"]


class Folded(NamedTuple):
    """A convolution with its norm folded in, and what its backward needs."""

    wf: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    wcov: Tensor
    mu: Tensor
    anchor: Tensor
    # Where statistics were merged over a group: this rank's mean of y less the merged one, and the values a channel.
    drift: Tensor | None = None
    values: Tensor | None = None

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """What backward reads of it, in its place; without a process group."""
        return self.wf, None, self.mean, self.var, self.wcov, self.mu, self.anchor


class Branch(NamedTuple):
    """A 1x1 convolution and the norm behind it, with the norm and ReLU pending in front of it (``act``)."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    batch: bool  # batch statistics (else running ones)
    stride: int
    group: str | None = None  # name of the process group that statistics are merged over
    # The norm in front: statistics, affine parameters, eps, whether the statistics are of this batch, count and group.
    mean0: Tensor | None = None
    var0: Tensor | None = None
    gamma0: Tensor | None = None
    beta0: Tensor | None = None
    eps0: float = 0.0
    batch0: bool = False
    count0: Tensor | None = None
    group0: str | None = None
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
    def options(self) -> _Options:
        return _Options(self.eps, self.batch, self.stride, self.group, self.eps0, self.batch0, self.group0)

    @property
    def prologue(self) -> tuple[Any, ...]:
        return self.mean0, self.var0, self.gamma0, self.beta0, self.eps0, self.act


class _Options(NamedTuple):
    """What of a branch is no tensor. Nothing here may depend on the batch: torch.compile passes it as constants."""

    eps: float
    batch: bool
    stride: int
    group: str | None
    eps0: float
    batch0: bool
    group0: str | None


def fold_branch(
    b: Branch, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    batches: Tensor | None = None,
) -> Folded:  # fmt: skip
    """Fold the norm into the weight: from the moments of this batch (updating the running statistics, where given, and
    without a group counting the batch in ``batches``), or from the running statistics."""
    with torch.no_grad():
        vectors = b.gamma, b.beta, b.mean0, b.var0, b.gamma0, b.beta0, running_mean, running_var
        return fold(b, running_mean, running_var, momentum, batches, unwatched(b.x, b.weight, *vectors))


def fold(
    b: Branch, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, batches: Tensor | None,
    fast: bool,
) -> Folded:  # fmt: skip
    """``fold_branch`` where gradients are off; ``fast``: what ``unwatched`` says of x, the weight and the vectors."""
    norm, rows, launch = (b.gamma, b.beta, b.eps), b.rows, ops.fold.at(fast)
    if not b.batch:
        wf, bias, mean, var, wcov = launch(
            b.weight, b.x, None, None, *norm, running_mean, running_var, None, None, 0.0, rows
        )  # fmt: skip
        zero = bias.new_zeros(b.x.shape[1])
        return Folded(wf, bias, mean, var, wcov, zero, zero)
    mu, cov, anchor = ops.moments.at(fast)(b.x, *b.prologue, b.stride)
    if b.group is None:
        wf, bias, mean, var, wcov = launch(
            b.weight, b.x, mu, cov, *norm, None, None, running_mean, running_var, momentum, rows,
            batches,
        )  # fmt: skip
        return Folded(wf, bias, mean, var, wcov, mu, anchor)
    _, _, mine, var, wcov = launch(b.weight, b.x, mu, cov, *norm, None, None, None, None, 0.0, rows)
    mean, var, count = merge_over_group(mine, var, rows, b.group)
    wf, _, mean, var, _ = launch(b.weight, b.x, None, None, *norm, mean, var, None, None, 0.0, rows)
    update_running(running_mean, running_var, mean, var, count, momentum)
    # As in the kernel: with the rounded weight, so that the mean of the output is exact on every rank.
    a = torch.rsqrt(var + b.eps) if b.gamma is None else b.gamma.to(var.dtype) * torch.rsqrt(var + b.eps)
    bias = a * (mine - mean) - wf.to(var.dtype) @ mu
    bias = bias if b.beta is None else bias + b.beta.to(var.dtype)
    return Folded(wf, bias, mean, var, wcov, mu, anchor, mine - mean, count)


_FOLDED = len(Folded._fields)


class _BlockEnd(torch.autograd.Function):
    """Differentiable in x, W, gamma, beta of both branches, the norm in front, and a plain identity. Returns out and
    its sign bits; with ``given_masked`` the gradient of out has been through the ReLU's mask already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma0: Tensor | None, beta0: Tensor | None, weight: Tensor, gamma: Tensor | None,
        beta: Tensor | None, identity: Tensor | None, x2: Tensor | None, weight2: Tensor | None,
        gamma2: Tensor | None, beta2: Tensor | None, keep: Tensor | None, mean0: Tensor | None, var0: Tensor | None,
        count0: Tensor | None, first: _Options, second: _Options | None, base2: Tensor | None, save: bool,
        given_masked: bool, *folded: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        stride2 = 1 if second is None else second.stride
        x2 = x2 if base2 is None else base2
        fast = unwatched(x, gamma0, beta0, mean0, var0)
        out, bits = ops.pointwise_end.at(fast)(
            x, mean0, var0, gamma0, beta0, first.eps0, mean0 is not None, folded[0], folded[1], identity, x2,
            folded[_FOLDED], folded[_FOLDED + 1], stride2, keep, save,
        )  # fmt: skip
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        if save:
            store(
                ctx, None if given_masked else bits, keep, x, mean0, var0, gamma0, beta0, count0, weight, gamma, x2,
                weight2, gamma2, *folded,
            )  # fmt: skip
            ctx.first, ctx.second = first, second
        return out, bits

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(need)
        if dout is None:
            return tuple(grads)
        bits, keep, x, mean0, var0, gamma0, beta0, count0, weight, gamma, x2, weight2, gamma2, *rest = recall(
            ctx
        )
        fast = unwatched(dout, gamma0, beta0, mean0, var0, gamma, gamma2)
        found = gradients(
            dout, bits, keep, x, mean0, var0, gamma0, beta0, count0, weight, gamma, Folded(*rest[:_FOLDED]), ctx.first,
            x2, weight2, gamma2, Folded(*rest[_FOLDED:]), ctx.second, fast, need[0] or need[1] or need[2] or need[7],
            need[0], need[7],
        )  # fmt: skip
        grads[0:3] = found.x, found.gamma0, found.beta0
        grads[3:7] = found.weight, found.gamma, found.beta, found.identity
        grads[7:11] = found.x2, found.weight2, found.gamma2, found.beta2
        return tuple(d if needed else None for d, needed in zip(grads, need, strict=True))


class Gradients(NamedTuple):
    """Of a block end: of its result with the ReLU applied, which is the plain identity's, and of all that it reads."""

    identity: Tensor
    x: Tensor | None
    gamma0: Tensor | None
    beta0: Tensor | None
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    x2: Tensor | None
    weight2: Tensor | None
    gamma2: Tensor | None
    beta2: Tensor | None


def gradients(
    dout: Tensor, bits: Tensor | None, keep: Tensor | None, x: Tensor, mean0: Tensor | None, var0: Tensor | None,
    gamma0: Tensor | None, beta0: Tensor | None, count0: Tensor | None, weight: Tensor, gamma: Tensor | None,
    one: Folded, first: _Options, x2: Tensor | None, weight2: Tensor | None, gamma2: Tensor | None, two: Folded,
    second: _Options | None, fast: bool, need_front: bool = True, need_x: bool = True, need_x2: bool = True,
) -> Gradients:  # fmt: skip
    """The backward of a block end; ``bits`` None where dout has been through the ReLU's mask already, ``fast`` what
    ``unwatched`` says. What is not needed (of the product's input; of x; of x2) is None."""
    act = mean0 is not None
    prologue = (mean0, var0, gamma0, beta0, first.eps0, act)
    stride2 = 1 if second is None else second.stride
    sums, g = ops.p_sums.at(fast)(dout, bits, x, *prologue, one.anchor, x2, two.anchor, stride2, keep)
    g = dout if bits is None else g
    mine = weight.numel() + weight.shape[0]
    totals1: _Sums = None
    totals2: _Sums = None
    if one.drift is not None or two.drift is not None:
        local1 = _local(sums[:mine], weight, one, first)
        local2 = None if second is None or weight2 is None else _local(sums[mine:], weight2, two, second)
        totals1, totals2 = _reduced(local1, one, first, local2, two, second)
    rows = dout.shape[0] * dout.shape[2] * dout.shape[3]
    dw, dgamma, dbeta, b, shift = _matrices(
        sums if second is None else sums[:mine], weight, gamma, one, first, x, totals1, rows, fast
    )
    other: tuple[Any, ...] = (None,) * 5
    of2: tuple[Tensor | None, ...] = (None,) * 3
    if second is not None and weight2 is not None:
        dw2, dgamma2, dbeta2, b2, shift2 = _matrices(
            sums[mine:], weight2, gamma2, two, second, x, totals2, rows, fast
        )
        of2 = dw2, *_affine(dgamma2, dbeta2, gamma2)
        if need_x2:
            other = (two.wf, x2, b2, shift2, two.mu)
    dz = s1 = s2 = dx2 = dx = None
    if need_front:
        # Without a second branch the stride would be the first one's.
        dz, s1, s2, dx2 = ops.pointwise_dz.at(fast)(
            g, one.wf, x, *prologue, b, shift, one.mu, keep, *other, stride2 if need_x2 else 1
        )
        dx = dz
        if act and need_x:
            totals: Any = (None, None)
            scale = 0.0
            if first.batch0:
                totals, scale = over_group((s1, s2), x, count0, first.group0)
            dx = batch_norm_backward.at(fast)(
                dz, x, mean0, var0, gamma0, beta0, first.eps0, False, None, *totals, scale
            )
    return Gradients(g, dx, *_affine(s2, s1, gamma0), dw, *_affine(dgamma, dbeta, gamma), dx2, *of2)


def _affine(
    dgamma: Tensor | None, dbeta: Tensor | None, gamma: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of gamma and beta, which are summed in fp32."""
    if dgamma is None or dbeta is None or gamma is None:
        return None, None
    return in_dtype(dgamma, gamma), in_dtype(dbeta, gamma)


class _Unmasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, bits: Tensor) -> Tensor:
        store(ctx, out, bits)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        out, bits = recall(ctx)
        return masked(dout, bits, out), None


_unmask = applied(_Unmasked)
_block_end = applied(_BlockEnd)


def unmasked(out: Tensor, bits: Tensor) -> Tensor:
    """The ``given_masked`` result of a block end for whoever knows nothing of that: it masks the gradient."""
    return _unmask(out, bits)


_Sums = tuple[Tensor, ...] | None


def _local(sums: Tensor, weight: Tensor, f: Folded, o: _Options) -> _Sums:
    """Where statistics were merged over a group: this rank's sum g and sum g xhat, with d = (this rank's mean of y) -
    mean: sum g (y - mean) = rowsum(P W) + d sum g."""
    if f.drift is None:
        return None
    sum_g = sums[weight.numel() :]
    da = (_centred(sums, weight, f) * weight.flatten(1).to(sums.dtype)).sum(1) + sum_g * f.drift
    return sum_g, da * torch.rsqrt(f.var + o.eps)


def _centred(sums: Tensor, weight: Tensor, f: Folded) -> Tensor:
    """P = sum g (z - mu)^T of this rank."""
    p, sum_g = sums[: weight.numel()].view(weight.flatten(1).shape), sums[weight.numel() :]
    return p + sum_g.unsqueeze(1) * (f.anchor - f.mu)


def _reduced(
    a: _Sums, f: Folded, o: _Options, b: _Sums, f2: Folded, o2: _Options | None
) -> tuple[_Sums, _Sums]:  # fmt: skip
    """Both branches' sums over the ranks, divided by the values a channel: one collective where the group is one, as
    in ``residual_add_relu``, for a rank may have to take that form."""
    like = f.mean
    if a is not None and b is not None and o2 is not None and o.group == o2.group:
        total, _ = over_group((*a, *b), like, f.values, o.group)
        return total[:2], total[2:]
    return (
        None if a is None else over_group(a, like, f.values, o.group)[0],
        None if b is None or o2 is None else over_group(b, like, f2.values, o2.group)[0],
    )


def _matrices(
    sums: Tensor, weight: Tensor, gamma: Tensor | None, f: Folded, o: _Options, like: Tensor, totals: _Sums, rows: int,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dW, dgamma, dbeta of one branch from its sums, and B and c of its dz (None with running statistics)."""
    dbeta = sums[weight.numel() :]
    if totals is None:
        dw, dgamma, dvar, adb = ops.weight_gradient.at(fast)(
            sums, weight, f.wcov, f.anchor, f.mu, f.mean, f.var, gamma, o.eps, o.batch
        )
    else:
        dw, dgamma, dvar, adb = _over_ranks(sums, weight, gamma, f, o, totals, rows)
    b, shift = ops.correction.at(fast)(weight, dvar, adb, like, rows) if o.batch else (None, None)
    return dw, dgamma, dbeta, b, shift


def _over_ranks(
    sums: Tensor, weight: Tensor, gamma: Tensor | None, f: Folded, o: _Options, totals: tuple[Tensor, ...], rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``weight_gradient`` where statistics were merged over a group. With G = sum g / M and X = sum g xhat / M over all
    ranks, M_l pixels on this one, and d as in ``_local``,

        dvar = -M_l X gamma rstd^2 / 2,   q = a M_l G - 2 dvar d
        dW = a P + 2 dvar W S + (a sum g - q) mu^T,   and q stands for a dbeta in dz
    """
    local = _local(sums, weight, f, o)
    assert local is not None and f.drift is not None
    sum_g, dgamma = local
    rstd = torch.rsqrt(f.var + o.eps)
    scale = torch.ones_like(rstd) if gamma is None else gamma.to(rstd.dtype)
    dvar = -0.5 * rows * totals[1] * scale * rstd**2
    q = scale * rstd * rows * totals[0] - 2 * dvar * f.drift
    dw = (scale * rstd).unsqueeze(1) * _centred(sums, weight, f) + (2 * dvar).unsqueeze(1) * f.wcov
    dw += torch.outer(scale * rstd * sum_g - q, f.mu)
    return dw.view(weight.shape).to(weight.dtype), dgamma, dvar, q


def block_end(
    branch: Branch, folded: Folded, identity: Tensor | None, second: Branch | None, folded2: Folded | None,
    keep: Tensor | None, given_masked: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(keep branch + identity), or with ``second`` the downsample branch as identity.

    Args:
        branch, folded: the branch and its folded form; stride 1.
        identity: [N, Cout, H, W] in channels_last, or None with ``second``.
        second, folded2: a downsample branch, a plain 1x1 convolution of any stride, or None; with a stride its
            ``read`` is the view of its input that receives the gradient.
        keep: [N] factor of each sample's branch, or None.
        given_masked: the gradient of the result will be zero where the result is: whoever uses it sees to that.

    Returns:
        out [N, Cout, H, W], channels_last, in the dtype of ``branch.x``; and its sign bits, a row of bytes a pixel
        (empty where no gradient is recorded).
    """
    two: tuple[Any, ...] = (None,) * 4
    base2 = None
    if second is not None:
        read = second.x if second.read is None else second.read
        two = (read, second.weight, second.gamma, second.beta)
        base2 = None if second.read is None else second.x.detach()
    return _block_end(
        branch.x, branch.gamma0, branch.beta0, branch.weight, branch.gamma, branch.beta, identity, *two, keep,
        branch.mean0, branch.var0, branch.count0, branch.options, None if second is None else second.options, base2,
        torch.is_grad_enabled(), given_masked, *folded, *((None,) * _FOLDED if folded2 is None else folded2),
    )  # fmt: skip
