"""Batch norm in one call: the checks, the running statistics, and the route.

What :mod:`fastres._pending` and :mod:`fastres._block_end` share about a norm is here too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres._routing import (
    BatchNorm,
    choose,
)
from fastres.kernels import batch_norm as bn_ops
from fastres.kernels import conv3x3 as conv_ops
from fastres.kernels._check import check_activation, check_aten, check_vectors
from fastres.kernels._sync import merge_over_group, update_running

__all__ = [
    "Moments",
    "Running",
    "apply_norm",
    "aten_batch_norm",
    "batch_norm",
    "check_bn",
    "check_norm",
    "count_batch",
    "counter",
    "merge_ranks",
    "noted_batch_norm",
    "recomputing",
    "running",
    "statistics_of",
    "tracking",
    "untracked",
]


_VECTORS = BatchNorm._fields[:4]


def check_bn(op: str, y: Tensor, bn: BatchNorm) -> None:
    check_activation(op, "input", y)
    check_norm(op, (y.shape[0], y.shape[1], y.shape[2], y.shape[3]), y.device, bn)


def check_norm(op: str, shape: tuple[int, int, int, int], device: torch.device, bn: BatchNorm) -> None:
    """The norm against an input of this shape, which need not exist."""
    n, c, h, w = shape
    check_vectors(op, _VECTORS, bn[:4], c, device)
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


def recomputing() -> bool:
    """True while autograd runs a backward: a forward there is activation checkpointing's second one."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def untracked(bn: BatchNorm) -> BatchNorm:
    return bn._replace(running_mean=None, running_var=None, num_batches_tracked=None)


def tracking(bn: BatchNorm) -> tuple[BatchNorm, float]:
    """The momentum to use, and the norm with the running statistics to update: its own, copies that ``count_batch``
    still has to look at, or none where they must not be updated.
    """
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return bn, 0.0
    if recomputing():
        return untracked(bn), 0.0
    momentum = bn.momentum
    if momentum is None:
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1) if bn.num_batches_tracked is not None else 0.0
    if bn.skip_nonfinite:
        bn = bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone())
    return bn, momentum


def counter(tracked: BatchNorm) -> Tensor | None:
    """What an operator that updates running statistics is to count the batch in, of a norm that ``tracking`` made."""
    if not tracked.training or tracked.running_mean is None or tracked.skip_nonfinite:
        return None
    return tracked.num_batches_tracked


Running = tuple[Tensor | None, Tensor | None, float, Tensor | None]


def running(tracked: BatchNorm, momentum: float) -> Running:
    """Of what ``tracking`` gave: the running statistics that an operator is to update, the momentum and the counter."""
    return tracked.running_mean, tracked.running_var, momentum, counter(tracked)


def count_batch(bn: BatchNorm, tracked: BatchNorm, counted: bool = False) -> None:
    """Count the batch of a norm of which ``tracking`` made ``tracked``, unless it is ``counted`` (:func:`counter`);
    after its statistics, for they may raise.

    With ``skip_nonfinite`` the updated copies become the running statistics here if every one of them is finite. All
    of it happens on the device: nothing waits for it.
    """
    if counted and not bn.skip_nonfinite:
        return
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


class Moments(NamedTuple):
    """What the fused operators need to know of a norm's statistics."""

    mean: Tensor
    var: Tensor
    values: Tensor | None  # a channel's values over all ranks, where statistics were merged
    group: str | None


def _statistics(
    y: Tensor, partial: conv_ops.Partial | None, mean: Tensor | None, var: Tensor | None, momentum: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and variance of y, from a pass over it or from what its convolution made; updates the running ones."""
    if partial is None:
        return bn_ops.batch_norm_stats(y.detach(), mean, var, momentum, batches)
    return conv_ops.statistics(partial.values, mean, var, momentum, partial.chunk, partial.total, batches)


def statistics_of(y: Tensor, bn: BatchNorm, partial: conv_ops.Partial | None = None) -> Moments:
    """Batch statistics (updating the running ones) or the running statistics themselves."""
    if not bn.training:
        assert bn.running_mean is not None and bn.running_var is not None
        return Moments(bn.running_mean, bn.running_var, None, None)
    tracked, momentum = tracking(bn)
    if bn.group is None:
        mean, var = _statistics(y, partial, *running(tracked, momentum))
        count_batch(bn, tracked, counted=True)
        return Moments(mean, var, None, None)
    mean, var = _statistics(y, partial, None, None, 0.0)
    return merge_ranks(mean, var, y, bn, tracked, momentum)


def merge_ranks(
    mean: Tensor, var: Tensor, y: Tensor, bn: BatchNorm, tracked: BatchNorm, momentum: float
) -> Moments:  # fmt: skip
    """This rank's statistics of y to those of the norm's group; updates the running ones."""
    assert bn.group is not None
    values = y.numel() // max(y.shape[1], 1)
    mean, var, count = merge_over_group(mean, var, values, bn.group.group_name)
    update_running(tracked.running_mean, tracked.running_var, mean, var, count, momentum)
    count_batch(bn, tracked)
    return Moments(mean, var, count, bn.group.group_name)


def aten_batch_norm(y: Tensor, bn: BatchNorm) -> Tensor:
    tracked, momentum = tracking(bn)
    mean, var = tracked.running_mean, tracked.running_var
    if mean is None and bn.training and bn.running_mean is not None and bn.running_var is not None:
        # Recomputed under checkpointing: ATen saves these for backward, and as many tensors must be saved as before.
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
    # What F.batch_norm calls; it would only check again that there is more than one value.
    switch = torch.backends.cudnn.enabled
    z = torch.batch_norm(y, bn.weight, bn.bias, mean, var, bn.training, momentum, bn.eps, switch)
    count_batch(bn, tracked)
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
    return noted_batch_norm(y, bn, relu, "")


def noted_batch_norm(y: Tensor, bn: BatchNorm, relu: bool, note: str) -> Tensor:
    op = "batch_norm"
    check_bn(op, y, bn)
    if choose(op, y, (), (bn,), note) == "aten":
        check_aten(op, y, bn)
        z = aten_batch_norm(y, bn)
        return z.relu_() if relu else z
    return apply_norm(y, bn, statistics_of(y, bn), relu)


def apply_norm(y: Tensor, bn: BatchNorm, s: Moments, relu: bool) -> Tensor:
    """The fused operator, with statistics at hand."""
    return bn_ops.batch_norm_act(
        y, s.mean, s.var, bn.weight, bn.bias, bn.eps, relu, bn.training, s.values, s.group
    )
