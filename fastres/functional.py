"""The functions that blocks are written in, and the one place where a route is chosen.

A block names its arithmetic; nothing is computed until a consumer decides how:

    z1 = conv_bn_relu(x, conv1, bn1)                 # Pending: relu(bn1(conv1(x)))
    z2 = conv_bn_relu(z1, conv2, bn2)
    out = add_relu(conv_bn(z2, conv3, bn3), x)       # the block end sees conv3, bn3 and the identity together

Where each part runs is decided in ``_routing``, whose settings are re-exported here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import _cpu, _folding, _inference
from fastres._convolution import own_geometry
from fastres._cpu import winograd
from fastres._inference import inference_layout
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
    own_conv3x3,
    recomputes,
    record,
    record_routes,
    transformed,
)
from fastres.kernels import batch_norm as bn_ops
from fastres.kernels import block_end as moment_form
from fastres.kernels import conv3x3 as conv_ops
from fastres.kernels import pool as pool_ops
from fastres.kernels import residual_add_relu as end_ops
from fastres.kernels._check import check_activation, check_aten, check_like, check_vector, fail
from fastres.kernels._sync import merge_over_group, update_running
from fastres.kernels.block_start import block_start, start_conv
from fastres.kernels.recomputed_conv import recomputed_conv
from fastres.kernels.winograd import winograd as winograd_conv

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
    "record_routes",
    "winograd",
]

# ------------------------------------------------------------------------------------------------------ pending


class Pending:
    """``relu(bn(conv(x)))`` (or without ReLU), not evaluated yet: its consumer decides how.

    Each part is evaluated at most once, so the running statistics are updated once however many consumers there are.
    """

    __slots__ = ("_moments", "_partial", "_raw", "_tracked", "_y", "_z", "bn", "conv", "relu", "x")

    def __init__(self, x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm, relu: bool) -> None:
        self.x, self.conv, self.bn, self.relu = x, conv, bn, relu
        self._y: Tensor | None = None
        self._z: Tensor | None = None
        # What _z was made of, where that is at hand without a gradient of its own.
        self._raw: Tensor | None = None
        self._moments: _Moments | None = None
        self._partial: conv_ops.Partial | None = None  # of the statistics, where the convolution made them
        self._tracked = False
        if not torch.compiler.is_compiling() and (
            bn.training or torch.is_grad_enabled() and _wants(*_own(conv))
        ):
            _folding.trained(conv)

    def raw(self) -> Tensor:
        """The convolution's output, before the norm."""
        if self._y is None:
            x, conv, own = self.x, self.conv, _conv3x3(self)
            if own is not None:
                self._y, self._partial = own
            elif isinstance(x, Pending) and x._raw is not None and recomputes() and _plain_conv(conv):
                self._y = _conv_keeping_raw(x, conv)
            else:
                self._y = _convolve(conv, materialize(x), self.bn)
        return self._y

    def tensor(self) -> Tensor:
        """The activation itself."""
        if self._z is None:
            folded = _folded(self, self.relu)
            if isinstance(folded, Tensor):
                self._z = folded
                return folded
            y, s = self.raw(), self._moments
            if s is None and self._partial is not None:
                _check_bn("batch_norm", y, self.bn)
                s = self.moments()
            if s is not None:
                self._z = _apply(y, self.bn, s, self.relu)
            else:
                self._z = _batch_norm(y, self.once(), self.relu, folded)
        return self._z

    def moments(self) -> _Moments:
        """The norm's statistics, for a consumer that applies the norm itself (fused routes)."""
        if self._moments is None:
            y = self.raw()
            self._moments = _moments(y, self.once(), self._partial)
        return self._moments

    def once(self) -> BatchNorm:
        """The norm, with its running statistics for the first who asks: a second evaluation must not update them."""
        first, self._tracked = not self._tracked, True
        return self.bn if first or not self.bn.training else _untracked(self.bn)


class Linked:
    """The output of a block that nothing but the next block will see: the gradient of ``out`` must come back with the
    block's last ReLU applied, which the next block does in passing (``kernels/block_start.py``)."""

    __slots__ = ("_tensor", "bits", "out")

    def __init__(self, out: Tensor, bits: Tensor) -> None:
        self.out, self.bits = out, bits
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """For whoever does not apply that ReLU: the same values, with a gradient like any other."""
        if self._tensor is None:
            self._tensor = moment_form.unmasked(self.out, self.bits)
        return self._tensor


def _convolve(conv: nn.Module, x: Tensor, bn: BatchNorm) -> Tensor:
    """The module called, or its form on a CPU."""
    products, weights = _cpu.winograd_parts(conv, x, bn.training)
    if not weights:
        return conv(x)
    assert isinstance(conv, nn.Conv2d)
    record("conv", x, "winograd", "cpu: measured" + ("" if products else "; weight gradient only"), (bn,))
    return winograd_conv(x, conv.weight, products)


def _plain_conv(conv: nn.Module) -> bool:
    """Whether a module is exactly a convolution that nothing else watches or changes."""
    return (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not (conv._forward_hooks or conv._forward_pre_hooks)
        and not (conv._backward_hooks or conv._backward_pre_hooks)
    )


def _conv_keeping_raw(x: Pending, conv: nn.Module) -> Tensor:
    assert isinstance(conv, nn.Conv2d) and x._raw is not None
    s, bn = x.moments(), x.bn
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return recomputed_conv(
        x.tensor(), conv.weight, x._raw, s.mean, s.var, bn.weight, bn.bias, bn.eps, geometry
    )


def materialize(x: Tensor | Pending | Linked) -> Tensor:
    """A tensor, whether it was one, was pending or was on its way to the next block."""
    return x.tensor() if isinstance(x, Pending | Linked) else x


def conv_bn(x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm, relu: bool = False) -> Pending:
    """``bn(conv(x))``, pending."""
    return Pending(x, conv, bn, relu)


def conv_bn_relu(x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm) -> Pending:
    """``relu(bn(conv(x)))``, pending."""
    return Pending(x, conv, bn, True)


# ---------------------------------------------------------------------------------------------------- inference


def _own(conv: nn.Module) -> tuple[Tensor | None, ...]:
    return conv._parameters.get("weight"), conv._parameters.get("bias")


def _wants(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _foldable(p: Pending) -> bool:
    """Whether a norm may be folded: it uses running statistics, and no gradient is wanted of anything before it."""
    if p.bn.training or p._y is not None or p._moments is not None or _inference.off():
        return False
    if not torch.is_grad_enabled():
        return True
    q: Tensor | Pending | Linked = p
    while isinstance(q, Pending):
        if q.bn.training or _wants(*_own(q.conv), q.bn.weight, q.bn.bias):
            return False
        q = q.x
    return isinstance(q, Tensor) and not q.requires_grad


def _fits(bn: BatchNorm) -> _inference.Check:
    def check(shape: tuple[int, ...], x: Tensor) -> None:
        n, c, h, w = shape
        _check_norm("batch_norm", (n, c, h, w), x.device, bn)
        check_aten("batch_norm", x, bn)

    return check


def _folded(
    p: Pending, relu: bool, other: Tensor | None = None, own: bool = False, inner: bool = False
) -> Tensor | str:
    """The pending convolution with its norm folded in, or why not; empty where folding is no question."""
    if not _foldable(p):
        return ""
    x = materialize(p.x)
    z = _inference.convolve(x, p.conv, p.bn, relu, other, own, _fits(p.bn), inner)
    return f"not folded: {z}" if isinstance(z, str) else z


def _folded_end(branch: Pending, identity: Tensor | Pending, keep: Tensor | None) -> Tensor | str:
    """The block end in one convolution, or why not."""
    if keep is not None or not _foldable(branch):
        return ""
    _fold_inner(branch.x, _carried(branch, identity))
    if not isinstance(identity, Pending):
        if not isinstance(identity, Tensor) or torch.is_grad_enabled() and identity.requires_grad:
            return ""
        return _folded(branch, True, identity)
    if identity._z is not None or not _foldable(identity):
        return ""
    x, x2, bn, bn2 = materialize(branch.x), materialize(identity.x), branch.bn, identity.bn
    both = _inference.convolve_pair(x, branch.conv, bn, _fits(bn), x2, identity.conv, bn2, _fits(bn2))
    if isinstance(both, Tensor):
        return both
    other = _folded(identity, False)  # not kept by the Pending: it will be overwritten
    own = isinstance(other, Tensor)
    return _folded(branch, True, other if isinstance(other, Tensor) else identity.tensor(), own)


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
        z = _folded(p, p.relu, inner=carried)
        p._z = z if isinstance(z, Tensor) else None


# -------------------------------------------------------------------------------------------------- batch norm


def _check_bn(op: str, y: Tensor, bn: BatchNorm) -> None:
    check_activation(op, "input", y)
    _check_norm(op, (y.shape[0], y.shape[1], y.shape[2], y.shape[3]), y.device, bn)


def _check_norm(op: str, shape: tuple[int, int, int, int], device: torch.device, bn: BatchNorm) -> None:
    """The norm against an input of this shape, which need not exist."""
    n, c, h, w = shape
    for name, v in (
        ("weight", bn.weight),
        ("bias", bn.bias),
        ("running_mean", bn.running_mean),
        ("running_var", bn.running_var),
    ):
        check_vector(op, name, v, c, device)
    if (bn.weight is None) != (bn.bias is None):
        raise ValueError(f"{op}: one of weight and bias is None; wanted both or neither")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{op}: one of running_mean and running_var is None; wanted both or neither")
    if not bn.training and bn.running_mean is None:
        raise ValueError(f"{op}: running_mean is None; wanted running statistics where training is False")
    if bn.training and bn.group is None and n * h * w == 1:
        raise ValueError(
            f"{op}: input has shape {list(shape)}; wanted more than 1 value per channel when training"
        )


def _recomputing() -> bool:
    """True while autograd runs a backward: a forward there is activation checkpointing's second one."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _untracked(bn: BatchNorm) -> BatchNorm:
    return bn._replace(running_mean=None, running_var=None, num_batches_tracked=None)


def _tracking(bn: BatchNorm) -> tuple[BatchNorm, float]:
    """The momentum to use, and the norm with the running statistics to update: its own, copies that ``_count`` still
    has to look at, or none where they must not be updated.
    """
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return bn, 0.0
    if _recomputing():
        return _untracked(bn), 0.0
    momentum = bn.momentum
    if momentum is None:
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1) if bn.num_batches_tracked is not None else 0.0
    if bn.skip_nonfinite:
        bn = bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone())
    return bn, momentum


def _count(bn: BatchNorm, tracked: BatchNorm) -> None:
    """Count the batch of a norm of which ``_tracking`` made ``tracked``; after its statistics, for they may raise.

    With ``skip_nonfinite`` the updated copies become the running statistics here if every one of them is finite. All
    of it happens on the device: nothing waits for it.
    """
    if not bn.training or tracked.running_mean is None or tracked.running_var is None:
        return
    seen: Tensor | int = 1
    if bn.skip_nonfinite and bn.running_mean is not None and bn.running_var is not None:
        with torch.no_grad():
            seen = tracked.running_mean.isfinite().all() & tracked.running_var.isfinite().all()
            bn.running_mean.copy_(torch.where(seen, tracked.running_mean, bn.running_mean))
            bn.running_var.copy_(torch.where(seen, tracked.running_var, bn.running_var))
    if bn.num_batches_tracked is not None and tracked.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(seen)


class _Moments(NamedTuple):
    """What the fused operators need to know of a norm's statistics."""

    mean: Tensor
    var: Tensor
    values: Tensor | None  # a channel's values over all ranks, where statistics were merged
    group: str | None


def _statistics(
    y: Tensor, partial: conv_ops.Partial | None, mean: Tensor | None, var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of y, from a pass over it or from what its convolution made; updates the running ones."""
    if partial is None:
        return bn_ops.batch_norm_stats(y.detach(), mean, var, momentum)
    return conv_ops.statistics(partial.values, mean, var, momentum, partial.chunk, partial.total)


def _moments(y: Tensor, bn: BatchNorm, partial: conv_ops.Partial | None = None) -> _Moments:
    """Batch statistics (updating the running ones) or the running statistics themselves."""
    if not bn.training:
        assert bn.running_mean is not None and bn.running_var is not None
        return _Moments(bn.running_mean, bn.running_var, None, None)
    tracked, momentum = _tracking(bn)
    running_mean, running_var = tracked.running_mean, tracked.running_var
    if bn.group is None:
        mean, var = _statistics(y, partial, running_mean, running_var, momentum)
        _count(bn, tracked)
        return _Moments(mean, var, None, None)
    mean, var = _statistics(y, partial, None, None, 0.0)
    return _merged(mean, var, y, bn, tracked, momentum)


def _merged(
    mean: Tensor, var: Tensor, y: Tensor, bn: BatchNorm, tracked: BatchNorm, momentum: float
) -> _Moments:  # fmt: skip
    """This rank's statistics of y to those of the norm's group; updates the running ones."""
    assert bn.group is not None
    values = y.numel() // max(y.shape[1], 1)
    mean, var, count = merge_over_group(mean, var, values, bn.group.group_name)
    update_running(tracked.running_mean, tracked.running_var, mean, var, count, momentum)
    _count(bn, tracked)
    return _Moments(mean, var, count, bn.group.group_name)


def _aten_batch_norm(y: Tensor, bn: BatchNorm) -> Tensor:
    tracked, momentum = _tracking(bn)
    mean, var = tracked.running_mean, tracked.running_var
    if mean is None and bn.training and bn.running_mean is not None and bn.running_var is not None:
        # Recomputed under checkpointing: ATen saves these for backward, and as many tensors must be saved as before.
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
    z = F.batch_norm(y, mean, var, bn.weight, bn.bias, bn.training, momentum, bn.eps)
    _count(bn, tracked)
    return z


def batch_norm(y: Tensor, bn: BatchNorm, relu: bool = False) -> Tensor:
    """Batch norm, with ReLU if asked.

    Args:
        y: [N, C, H, W], float32, float16 or bfloat16 (float64 on the aten and reference routes).
        bn: the norm.
        relu: apply ReLU to the result in the same pass.

    Returns:
        [N, C, H, W] in y's dtype and strides.

    Raises:
        TypeError, ValueError: naming the argument, before the running statistics are touched.
    """
    return _batch_norm(y, bn, relu, "")


def _batch_norm(y: Tensor, bn: BatchNorm, relu: bool, note: str) -> Tensor:
    op = "batch_norm"
    _check_bn(op, y, bn)
    if choose(op, y, (), (bn,), note) == "aten":
        check_aten(op, y, bn)
        z = _aten_batch_norm(y, bn)
        return z.relu_() if relu else z
    return _apply(y, bn, _moments(y, bn), relu)


def _apply(y: Tensor, bn: BatchNorm, s: _Moments, relu: bool) -> Tensor:
    """The fused operator, with statistics at hand."""
    return bn_ops.batch_norm_act(
        y, s.mean, s.var, bn.weight, bn.bias, bn.eps, relu, bn.training, s.values, s.group
    )


# -------------------------------------------------------------------------------------------------- convolution


def _conv3x3(p: Pending) -> tuple[Tensor, conv_ops.Partial | None] | None:
    """The 3x3 convolution of a pending input by this package's kernels, where they were asked for and serve: the output
    and its partial statistics. The input's norm and ReLU are applied while loading."""
    if not own_conv3x3() or getattr(p.conv, "kernel_size", None) != (3, 3):
        return None
    front = p.x if isinstance(p.x, Pending) and p.x.relu and p.x._z is None else None
    if front is not None and front.bn.group is not None and front.bn.training:
        front = None  # its gradient needs sums over the group between the two halves of a backward
    x = materialize(p.x) if front is None else front.raw()
    if x.dim() != 4 or not x.numel() or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    geometry = own_geometry(p.conv, x)
    if geometry is None:
        return None
    route, reason = decide("conv3x3", x, (), (p.bn,))
    if route == "aten":
        return None
    prologue = conv_ops.Prologue()
    if front is not None:
        _check_bn("batch_norm", x, front.bn)
        s, bn = front.moments(), front.bn
        prologue = conv_ops.Prologue(s.mean, s.var, bn.weight, bn.bias, bn.eps, True)
    record("conv3x3", x, route, f"{reason}; own 3x3 kernels", (p.bn,))
    assert isinstance(p.conv, nn.Conv2d)
    batch = front is not None and front.bn.training
    return conv_ops.conv3x3(x, p.conv.weight, geometry, prologue, batch, p.bn.training)


# --------------------------------------------------------------------------------------------------- block end


def _check_keep(op: str, keep: Tensor | None, x: Tensor) -> None:
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


def _pointwise(conv: nn.Module, c: int, dtype: torch.dtype) -> bool:
    """Whether a module is exactly a 1x1 convolution of this input that nothing else watches or changes."""
    return (
        _plain_conv(conv)
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.padding == (0, 0)
        and conv.stride[0] == conv.stride[1]
        and conv.groups == 1
        and conv.in_channels == c
        and conv.weight.shape[1] == c
        and (conv.weight.dtype == dtype or torch.is_autocast_enabled(conv.weight.device.type))
    )


def _operand(p: Pending) -> Tensor | str:
    """The tensor that the moment form of a pending convolution would read, or why there is none."""
    if p._y is not None:
        return "the convolution has been evaluated"
    if transformed():
        return "inside a transform of torch.func"
    source = p.x.out if isinstance(p.x, Linked) else p.x
    if isinstance(source, Pending):
        source = source.tensor() if source._z is not None or not source.relu else source.raw()
    device = source.device.type
    if source.dim() != 4 or not source.numel() or not source.is_contiguous(memory_format=torch.channels_last):
        return "input is not channels_last"
    if torch.is_autocast_enabled(device) and source.dtype != torch.get_autocast_dtype(device):
        return "input is not in autocast's dtype"
    if not _pointwise(p.conv, source.shape[1], source.dtype):
        return "not a plain 1x1 convolution"
    return source


def _start(branch: Pending, identity: Tensor | Pending | Linked) -> Tensor | None:
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
    _check_norm("batch_norm", (n, conv.out_channels, h, w), x.device, root.bn)
    record("batch_norm", x, route, f"{reason}; block start", (root.bn,))
    stride = 1
    if isinstance(identity, Pending):
        assert isinstance(identity.conv, nn.Conv2d)
        stride = identity.conv.stride[0]
    bn = root.once()
    tracked, momentum = _tracking(bn)
    grouped = bn.training and bn.group is not None
    running: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
    if bn.training and not grouped:
        running = tracked.running_mean, tracked.running_var, momentum
    y, mean, var = start_conv(x.detach(), conv.weight.detach(), bn.training, *running)
    if not bn.training:
        s = _moments(y, bn)
    elif grouped:
        s = _merged(mean, var, y, bn, tracked, momentum)
    else:
        s = _Moments(mean, var, None, None)
        _count(bn, tracked)
    root._moments, root._raw = s, y
    root._z, read = block_start(
        x, conv.weight, bn.weight, bn.bias, y, s.mean, s.var, s.values, bits,
        eps=bn.eps, batch=bn.training, group=s.group, stride=stride,
    )  # fmt: skip
    return read


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
    tracked, momentum = _tracking(bn)
    folded = moment_form.fold_branch(b, tracked.running_mean, tracked.running_var, momentum)
    _count(bn, tracked)
    return folded


def _moment_form(
    branch: Pending, identity: Tensor | Pending, keep: Tensor | None, name: str, read: Tensor | None, linked: bool
) -> Tensor | Linked | str:  # fmt: skip
    """The block end without the last convolution's output; or why not, where it does not apply or does not pay."""
    op, conv = "add_relu", branch.conv
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        return ""
    x = _operand(branch)
    other = _operand(identity) if isinstance(identity, Pending) else identity
    if isinstance(x, str) or isinstance(other, str):
        return f"no moment form: {x if isinstance(x, str) else other}"
    (n, c, h, w), out = x.shape, conv.out_channels
    if other.dtype != x.dtype or not other.is_contiguous(memory_format=torch.channels_last):
        return "no moment form: the identity has another dtype or layout"
    if n * h * w < 4 * max(c, other.shape[1] if isinstance(identity, Pending) else 0):
        return "no moment form: fewer than four rows a channel"
    kind = "pair_end" if isinstance(identity, Pending) else "block_end"
    if not moments_pay(n * h * w, out, c, kind, x.element_size()):
        return "moment form: off, or does not pay by the model or the tuning table"
    route, reason = decide(kind, x, (), (branch.bn,))
    if route == "aten":
        return ""
    _check_norm(op, (n, out, h, w), x.device, branch.bn)
    _check_keep(op, keep, x)
    second = folded2 = None
    if isinstance(identity, Pending):
        assert isinstance(identity.conv, nn.Conv2d)
        size = [(d - 1) // identity.conv.stride[0] + 1 for d in other.shape[2:]]
        if [other.shape[0], identity.conv.out_channels, *size] != [n, out, h, w]:
            raise fail(ValueError, op, "identity", other, f"a downsample to shape {[n, out, h, w]}")
        _check_norm(op, (n, out, h, w), x.device, identity.bn)
    elif other.shape != (n, out, h, w):
        raise fail(ValueError, op, name, other, f"shape {[n, out, h, w]}")
    if isinstance(branch.x, Pending) and branch.x._z is None:
        _check_bn("batch_norm", x, branch.x.bn)
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
        _check_keep(op, keep, branch)
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
    read = _start(branch, identity)
    if read is None:
        _open_below(branch)
        identity = _opened(identity)
    elif not isinstance(identity, Pending):
        identity = read
    assert not isinstance(identity, Linked)
    out = _moment_form(branch, identity, keep, name, read, linked)
    if not isinstance(out, str):
        return out
    bn = branch.bn
    id_bn = identity.bn if isinstance(identity, Pending) else None
    y = branch.raw()
    _check_bn(op, y, bn)
    _check_keep(op, keep, y)
    other = identity.raw() if isinstance(identity, Pending) else identity
    check_activation(op, name, other)
    check_like(op, name, other, y)
    if id_bn is not None:
        _check_bn(op, other, id_bn)
    if choose(op, y, (other,), (bn,) if id_bn is None else (bn, id_bn), unfolded or out) == "aten":
        check_aten(op, y, bn)
        if id_bn is not None:
            check_aten(op, other, id_bn)
        z = _aten_batch_norm(y, branch.once())
        if keep is not None:
            z = z * keep.to(z.dtype).view(-1, 1, 1, 1)
        if isinstance(identity, Pending):
            other = _aten_batch_norm(other, identity.once())
        return _sum_relu(z, other, own=True)
    s = branch.moments()
    mine = (y, s.mean, s.var, bn.weight, bn.bias, bn.eps, bn.training, s.values, s.group)
    save = torch.is_grad_enabled()
    if id_bn is None or not isinstance(identity, Pending):
        return end_ops.bn_add_relu(*mine, other, keep, save)[0]
    t = identity.moments()
    theirs = (other, t.mean, t.var, id_bn.weight, id_bn.bias, id_bn.eps, id_bn.training, t.values, t.group)
    return end_ops.bn_add_bn_relu(*mine, *theirs, keep, save)[0]


# -------------------------------------------------------------------------------------------------------- pool


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
    if _foldable(x) and decide(op, materialize(x.x), (), ())[0] == "aten":
        folded = _folded(x, True)
    if isinstance(folded, Tensor):
        return F.max_pool2d(folded, 3, 2, 1)
    y, bn = x.raw(), x.bn
    _check_bn(op, y, bn)
    if choose(op, y, (), (bn,)) == "aten":
        check_aten(op, y, bn)
        return F.max_pool2d(_aten_batch_norm(y, x.once()).relu_(), 3, 2, 1)
    s = x.moments()
    return pool_ops.bn_relu_max_pool(
        y, s.mean, s.var, bn.weight, bn.bias, bn.eps, bn.training, s.values, s.group
    )[0]  # fmt: skip
