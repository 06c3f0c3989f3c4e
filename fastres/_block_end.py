"""The end of a residual block, and its start, which is evaluated together with it: which form they take, and taking it.

In order: folded into one convolution where no gradient is wanted (``_inference``); the moment form of the last 1x1
convolution, after a joint start of the block where that applies; else norm, addition and ReLU in one pass, or ATen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import _inference
from fastres._basic_block import whole_basic_block
from fastres._batch_norm import aten_batch_norm, check_bn
from fastres._bottleneck import whole_bottleneck
from fastres._moment_forms import check_keep, downsample_end, moment_end, start
from fastres._pending import Linked, Pending, fits_norm, fold_pending, foldable, materialize
from fastres._routing import choose, fuses
from fastres.kernels import residual_add_relu as end_ops
from fastres.kernels._check import check_activation, check_aten, check_like

__all__ = ["add_relu", "add_relu_linked"]


def _sum_relu(branch: Tensor, identity: Tensor, own: bool) -> Tensor:
    """relu(branch + identity); in place on the branch where it is ours."""
    same = branch.dtype == identity.dtype  # asked first: export would put promote_types into the graph
    if own and (same or branch.dtype == torch.promote_types(branch.dtype, identity.dtype)):
        return branch.add_(identity).relu_()
    return (branch + identity).relu_()


def _add_relu_tensors(branch: Tensor, identity: Tensor, keep: Tensor | None) -> Tensor:
    op = "add_relu"
    check_activation(op, "branch", branch)
    check_activation(op, "identity", identity)
    check_like(op, "identity", identity, branch)
    route = choose(op, branch, (identity,), ())
    if keep is not None:
        branch = branch * keep.to(branch.dtype).view(-1, 1, 1, 1)
    if route == "aten":
        return _sum_relu(branch, identity, own=keep is not None)
    return end_ops.add_relu(branch, identity, torch.is_grad_enabled())[0]


def _folded_end(branch: Pending, identity: Tensor | Pending, keep: Tensor | None) -> Tensor | str:
    """The block end in one convolution, or why not."""
    if keep is not None or not foldable(branch):
        return ""
    _fold_inner(branch.x, _carried(branch, identity))
    if not isinstance(identity, Pending):
        if not isinstance(identity, Tensor) or torch.is_grad_enabled() and identity.requires_grad:
            return ""
        return fold_pending(branch, True, identity)
    if identity._z is not None or not foldable(identity):
        return ""
    x, x2, bn, bn2 = materialize(branch.x), materialize(identity.x), branch.bn, identity.bn
    both = _inference.convolve_pair(x, branch.conv, bn, fits_norm(bn), x2, identity.conv, bn2, fits_norm(bn2))
    if isinstance(both, Tensor):
        return both
    other = fold_pending(identity, False)  # not kept by the Pending: it will be overwritten
    own = isinstance(other, Tensor)
    return fold_pending(branch, True, other if isinstance(other, Tensor) else identity.tensor(), own)


def _carried(branch: Pending, identity: Tensor | Pending) -> bool:
    """Whether every NaN of the block's input reaches its end by the identity: a strided shortcut skips pixels."""
    root: Tensor | Pending | Linked = branch
    while isinstance(root, Pending):
        root = root.x
    if isinstance(identity, Pending):
        return identity.x is root and getattr(identity.conv, "stride", None) == (1, 1)
    return identity is root


def _fold_inner(p: Tensor | Pending | Linked, carried: bool) -> None:
    """Evaluate what lies inside a residual branch."""
    if isinstance(p, Pending) and p._z is None:
        _fold_inner(p.x, carried)
        z = fold_pending(p, p.relu, inner=carried)
        p._z = z if isinstance(z, Tensor) else None


def _open_below(p: Pending) -> None:
    """Replace a link that pending parts read: whoever reads it will not apply the block's ReLU."""
    while isinstance(p.x, Pending):
        p = p.x
    p.x = materialize(p.x)


def _opened(p: Tensor | Pending | Linked) -> Tensor | Pending:
    if isinstance(p, Pending):
        _open_below(p)
        return p
    return materialize(p)


def _served(branch: Pending) -> bool:
    """Whether a form of fused operators alone is worth asking for: they serve this device, or a process group."""
    x: Tensor | Pending | Linked = branch
    while isinstance(x, Pending):
        if x.bn.group is not None:
            return True
        x = x.x
    x = x.out if isinstance(x, Linked) else x
    return not isinstance(x, Tensor) or fuses(x)


def whole(branch: Pending, identity: Tensor | Pending | Linked, linked: bool) -> Tensor | Linked | None:
    """The block as one differentiable function, where that serves; else None."""
    found = whole_bottleneck(branch, identity, linked)
    return whole_basic_block(branch, identity) if found is None else found


def add_relu(
    branch: Tensor | Pending, identity: Tensor | Pending | Linked, keep: Tensor | None = None
) -> Tensor:
    """The end of a residual block: ``relu(keep_n * branch + identity)``.

    Args:
        branch: [N, C, H, W], or the pending last convolution and norm of the branch (without ReLU).
        identity: the same, or the pending downsample convolution and norm, or the output of the block before.
        keep: [N] factor of each sample's branch (drop path: 0 or 1 / keep probability), or None.

    Returns:
        [N, C, H, W] in the branch's dtype and strides.

    Raises:
        TypeError, ValueError: naming the argument, before any running statistics of this call are touched.
    """
    return materialize(_add_relu(branch, identity, keep, False))


def add_relu_linked(
    branch: Tensor | Pending, identity: Tensor | Pending | Linked, keep: Tensor | None = None
) -> Tensor | Linked:  # fmt: skip
    """As :func:`add_relu`, for a result that nothing but the next block's functions will see."""
    return _add_relu(branch, identity, keep, torch.is_grad_enabled())


def _add_relu(
    branch: Tensor | Pending, identity: Tensor | Pending | Linked, keep: Tensor | None, linked: bool
) -> Tensor | Linked:  # fmt: skip
    op, name = "add_relu", "identity"
    if isinstance(branch, Pending) and branch.relu or isinstance(identity, Pending) and identity.relu:
        raise ValueError("add_relu: a pending operand has a ReLU of its own; wanted conv_bn without ReLU")
    if not isinstance(branch, Pending):
        identity = _opened(identity)
        check_activation(op, "branch", branch)
        check_keep(op, keep, branch)
        if not isinstance(identity, Pending):
            return _add_relu_tensors(branch, identity, keep)
        if keep is not None:
            branch = branch * keep.to(branch.dtype).view(-1, 1, 1, 1)
        # A sum: the pending one takes the branch's part.
        branch, identity, keep, name = identity, branch, None, "branch"
    unfolded = ""
    if not isinstance(identity, Linked):  # which has a gradient
        folded = _folded_end(branch, identity, keep)
        if isinstance(folded, Tensor):
            return folded
        unfolded = folded
    out: Tensor | Linked | str = ""
    served = _served(branch)
    one = whole(branch, identity, linked) if served and keep is None else None
    if one is not None:
        return one
    read = start(branch, identity) if served else None
    if read is None:
        _open_below(branch)
        identity = _opened(identity)
    elif not isinstance(identity, Pending):
        identity = read
    assert not isinstance(identity, Linked)
    if served:
        out = moment_end(branch, identity, keep, name, read, linked)
        if out == "" and isinstance(identity, Pending):
            out = downsample_end(branch, identity, keep, read)
    if not isinstance(out, str):
        return out
    bn = branch.bn
    id_bn = identity.bn if isinstance(identity, Pending) else None
    y = branch.raw()
    check_bn(op, y, bn)
    check_keep(op, keep, y)
    other = identity.raw() if isinstance(identity, Pending) else identity
    check_activation(op, name, other)
    check_like(op, name, other, y)
    if id_bn is not None:
        check_bn(op, other, id_bn)
    if choose(op, y, (other,), (bn,) if id_bn is None else (bn, id_bn), unfolded or out) == "aten":
        check_aten(op, y, bn)
        if id_bn is not None:
            check_aten(op, other, id_bn)
        z = aten_batch_norm(y, branch.once())
        if keep is not None:
            z = z * keep.to(z.dtype).view(-1, 1, 1, 1)
        if isinstance(identity, Pending):
            other = aten_batch_norm(other, identity.once())
        return _sum_relu(z, other, own=True)
    s = branch.moments()
    mine = (y, s.mean, s.var, bn.weight, bn.bias, bn.eps, bn.training, s.values, s.group)
    save = torch.is_grad_enabled()
    if id_bn is None or not isinstance(identity, Pending):
        return end_ops.bn_add_relu(*mine, other, keep, save)[0]
    t = identity.moments()
    theirs = (other, t.mean, t.var, id_bn.weight, id_bn.bias, id_bn.eps, id_bn.training, t.values, t.group)
    return end_ops.bn_add_bn_relu(*mine, *theirs, keep, save)[0]
