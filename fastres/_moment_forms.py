"""The moment forms of a residual block: when they apply, when they pay, and what a pending block gives their kernels.

A block's start (its first 1x1 convolution, evaluated together with the identity), its end by the moments of what the
last 1x1 convolution reads, and an end whose downsample alone is in that form. Each says why where it does not apply.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres._batch_norm import (
    Moments,
    Running,
    check_bn,
    check_norm,
    count_batch,
    counter,
    merge_ranks,
    running,
    statistics_of,
    tracking,
)
from fastres._casts import low_weight
from fastres._pending import Linked, Pending, materialize, plain_conv, pointwise
from fastres._routing import (
    BatchNorm,
    decide,
    downsample_pays,
    moments_pay,
    own_conv3x3,
    record,
    transformed,
)
from fastres.kernels import block_end as moment_form
from fastres.kernels import downsample_end as downsample_form
from fastres.kernels._check import fail
from fastres.kernels._launch import channels_last
from fastres.kernels.block_start import block_start, start_conv

__all__ = ["check_keep", "downsample_end", "moment_end", "start"]


def check_keep(op: str, keep: Tensor | None, x: Tensor) -> None:
    if keep is None:
        return
    if not isinstance(keep, Tensor):
        raise fail(TypeError, op, "keep", keep, "a tensor [N] or None")
    if keep.dtype.is_complex:
        raise fail(TypeError, op, "keep", keep, "real factors")
    if keep.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: keep requires grad; wanted a constant, for it gets no gradient")
    if keep.dim() != 1 or keep.shape[0] != x.shape[0]:
        raise fail(ValueError, op, "keep", keep, f"shape [{x.shape[0]}], one factor a sample")
    if keep.device != x.device:
        raise fail(ValueError, op, "keep", keep, f"device {x.device}")


def _operand(p: Pending) -> Tensor | str:
    """The tensor that the moment form of a pending convolution would read, or why there is none."""
    if p._y is not None:
        return "the convolution has been evaluated"
    if transformed():
        return "inside a transform of torch.func"
    source = p.x.out if isinstance(p.x, Linked) else p.x
    if isinstance(source, Pending):
        source = source.tensor() if source._z is not None or not source.relu else source.raw()
    if not isinstance(source, Tensor):
        return "input is no tensor"  # the convolution will tell
    device = source.device.type
    if source.dim() != 4 or not source.numel() or not channels_last(source):
        return "input is not channels_last"
    if torch.is_autocast_enabled(device) and source.dtype != torch.get_autocast_dtype(device):
        return "input is not in autocast's dtype"
    if not pointwise(p.conv, source.shape[1], source.dtype):
        return "not a plain 1x1 convolution"
    return source


def start(branch: Pending, identity: Tensor | Pending | Linked) -> Tensor | None:
    """Evaluate a block's first 1x1 convolution, norm and ReLU together with the identity, where both read the same
    tensor and a gradient will come back through both; what stands for the identity then, or None.
    """
    root = branch
    while isinstance(root.x, Pending):
        root = root.x
    conv, source = root.conv, identity.x if isinstance(identity, Pending) else identity
    if root is branch or root.x is not source or not root.relu or root._y is not None or root._z is not None:
        return None
    if own_conv3x3():  # which applies the first norm itself
        return None
    x, bits = (source.out, source.bits) if isinstance(source, Linked) else (source, None)
    if not (torch.is_grad_enabled() and x.requires_grad) or isinstance(_operand(root), str):
        return None
    if conv.stride != (1, 1) or (isinstance(identity, Pending) and isinstance(_operand(identity), str)):
        return None
    assert isinstance(conv, nn.Conv2d)
    n, _, h, w = x.shape
    route, reason = decide("block_start", x, (), (root.bn,))
    pays = moments_pay(n * h * w, x.shape[1], conv.out_channels, "block_start", x.element_size())
    if route == "aten" or not pays:
        return None
    check_norm("batch_norm", (n, conv.out_channels, h, w), x.device, root.bn)
    record("batch_norm", x, route, f"{reason}; block start", (root.bn,))
    stride = 1
    if isinstance(identity, Pending):
        assert isinstance(identity.conv, nn.Conv2d)
        stride = identity.conv.stride[0]
    bn = root.once()
    tracked, momentum = tracking(bn)
    grouped = bn.training and bn.group is not None
    mine: Running = (None, None, 0.0, None)
    if bn.training and not grouped:
        mine = running(tracked, momentum)
    low = low_weight(conv.weight, x)
    y, mean, var = start_conv(x.detach(), low, bn.training, *mine)
    if not bn.training:
        s = statistics_of(y, bn)
    elif grouped:
        s = merge_ranks(mean, var, y, bn, tracked, momentum)
    else:
        s = Moments(mean, var, None, None)
        count_batch(bn, tracked, counted=True)
    root._moments, root._raw = s, y
    root._z, read = block_start(
        x, conv.weight, low, bn.weight, bn.bias, y, s.mean, s.var, s.values, bits,
        eps=bn.eps, batch=bn.training, group=s.group, stride=stride,
    )  # fmt: skip
    return read


def _branch(p: Pending, x: Tensor, read: Tensor | None = None) -> moment_form.Branch:
    conv, bn = p.conv, p.bn
    assert isinstance(conv, nn.Conv2d)
    stride = conv.stride[0]
    group = bn.group.group_name if bn.training and bn.group is not None else None
    mine = (x, conv.weight, bn.weight, bn.bias, bn.eps, bn.training, stride, group)
    if not isinstance(p.x, Pending) or p.x._z is not None:
        read = x[:, :, ::stride, ::stride] if read is None and stride > 1 else read
        return moment_form.Branch(*mine, read=read)
    s, bn0 = p.x.moments(), p.x.bn
    return moment_form.Branch(
        *mine, s.mean, s.var, bn0.weight, bn0.bias, bn0.eps, bn0.training, s.values, s.group
    )


def _fold(b: moment_form.Branch, bn: BatchNorm) -> moment_form.Folded:
    tracked, momentum = tracking(bn)
    merged = b.group is not None
    batches = None if merged else counter(tracked)
    folded = moment_form.fold_branch(b, tracked.running_mean, tracked.running_var, momentum, batches)
    count_batch(bn, tracked, counted=not merged)
    return folded


def moment_end(
    branch: Pending, identity: Tensor | Pending, keep: Tensor | None, name: str, read: Tensor | None, linked: bool
) -> Tensor | Linked | str:  # fmt: skip
    """The block end without the last convolution's output; or why not, where it does not apply or does not pay."""
    op, conv = "add_relu", branch.conv
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        return ""
    x = _operand(branch)
    if isinstance(identity, Pending) and isinstance(identity.x, Pending):
        identity.x = identity.x.tensor()  # the second branch of the product has no norm in front
    other = _operand(identity) if isinstance(identity, Pending) else identity
    if isinstance(x, str) or isinstance(other, str):
        return f"no moment form: {x if isinstance(x, str) else other}"
    (n, c, h, w), out = x.shape, conv.out_channels
    if other.dtype != x.dtype or not channels_last(other):
        return "no moment form: the identity has another dtype or layout"
    if n * h * w < 4 * max(c, other.shape[1] if isinstance(identity, Pending) else 0):
        return "no moment form: fewer than four rows a channel"
    kind = "pair_end" if isinstance(identity, Pending) else "block_end"
    if not moments_pay(n * h * w, out, c, kind, x.element_size()):
        return "moment form: off, or does not pay by the model or the tuning table"
    route, reason = decide(kind, x, (), (branch.bn,))
    if route == "aten":
        return ""
    check_norm(op, (n, out, h, w), x.device, branch.bn)
    check_keep(op, keep, x)
    second = folded2 = None
    if isinstance(identity, Pending):
        assert isinstance(identity.conv, nn.Conv2d)
        size = [(d - 1) // identity.conv.stride[0] + 1 for d in other.shape[2:]]
        if [other.shape[0], identity.conv.out_channels, *size] != [n, out, h, w]:
            raise fail(ValueError, op, "identity", other, f"a downsample to shape {[n, out, h, w]}")
        check_norm(op, (n, out, h, w), x.device, identity.bn)
    elif other.shape != (n, out, h, w):
        raise fail(ValueError, op, name, other, f"shape {[n, out, h, w]}")
    if isinstance(branch.x, Pending) and branch.x._z is None:
        check_bn("batch_norm", x, branch.x.bn)
    record(op, x, route, f"{reason}; moment form", (branch.bn,))
    first = _branch(branch, x)
    folded = _fold(first, branch.once())
    if isinstance(identity, Pending):
        second = _branch(identity, other, read)
        folded2 = _fold(second, identity.once())
    linked = linked and out > 1  # with one channel the mask's bytes depend on how the layout is read
    result, bits = moment_form.block_end(
        first, folded, None if second else other, second, folded2, keep, linked
    )
    return Linked(result, bits) if linked else result


def downsample_end(
    branch: Pending, identity: Pending, keep: Tensor | None, read: Tensor | None
) -> Tensor | str:  # fmt: skip
    """The block end without the downsample convolution's output, where the last convolution is no 1x1; or why not."""
    identity.x = materialize(identity.x)
    x, conv, root = _operand(identity), identity.conv, branch
    if isinstance(x, str):
        return f"no moment form of the downsample: {x}"
    while isinstance(root.x, Pending):
        root = root.x
    assert isinstance(conv, nn.Conv2d)
    stride, out = conv.stride[0], conv.out_channels
    b, c, h, w = x.shape
    shape = (b, out, (h - 1) // stride + 1, (w - 1) // stride + 1)
    forked = read is None and stride > 1 and torch.is_grad_enabled() and x.requires_grad
    if out == 1 or b * shape[2] * shape[3] < 4 * c:
        return "no moment form of the downsample: fewer than four rows a channel, or one channel"
    if forked and (root.x is not x or root._y is not None or not plain_conv(root.conv)):
        return "no moment form of the downsample: its input's gradient has other parts than the first convolution's"
    if not downsample_pays(x, out, stride, identity.bn.training, forked):
        return "moment form: off, or does not pay by the model or the tuning table"
    route, reason = decide("downsample_end", x, (), (branch.bn, identity.bn))
    if route == "aten":
        return ""
    check_norm("add_relu", shape, x.device, identity.bn)
    if forked:
        root.x, read = downsample_form.fork(x, stride)
    y, bn = branch.raw(), branch.bn
    check_bn("add_relu", y, bn)
    check_keep("add_relu", keep, y)
    if tuple(y.shape) != shape or y.dtype != x.dtype or not channels_last(y):
        return "no moment form of the downsample: the branch has another shape, dtype or layout"
    record("add_relu", y, route, f"{reason}; downsample in moment form", (bn,))
    s = branch.moments()
    first = downsample_form.Normed(
        y, s.mean, s.var, bn.weight, bn.bias, bn.eps, bn.training, s.values, s.group
    )
    second = _branch(identity, x, read)
    return downsample_form.downsample_end(first, second, _fold(second, identity.once()), keep)
