"""Statistics and gradient sums of a batch norm over a process group: one collective forward, one backward.

The collectives are the functional ones, which torch.compile can trace; groups travel by name, as operators' arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["merge_over_group", "over_group", "update_running"]


def merge_over_group(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merge (count, mean, M2) of every rank, in rank order.

    Args:
        mean, var: [C], this rank's statistics; anything where the rank has no values.
        count: values a channel has on this rank.
        group: name of the process group (a str; recent torch calls it GroupName).

    Returns:
        mean and biased var [C] over all ranks, and the count of values a channel, a scalar tensor.
    """
    from torch.distributed import _functional_collectives as collectives

    c = mean.shape[0]
    row = torch.cat([mean, var * count, mean.new_full((1,), float(count))])
    # torch 2.13 renamed it, and warns of the old name.
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    rows = collectives.wait_tensor(gather(row.unsqueeze(0), 0, group))
    means, m2, counts = rows[:, :c], rows[:, c : 2 * c], rows[:, 2 * c :]
    total = counts.sum()
    divisor = total.clamp(min=1)
    first = means[:1]
    merged = first + (counts * (means - first)).sum(0, keepdim=True) / divisor
    var = (m2 + counts * (means - merged).square()).sum(0) / divisor
    return merged[0], var, total


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:  # fmt: skip
    """Move the running statistics [C], where there are any, towards the merged mean and (made unbiased) var."""
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def over_group(
    sums: tuple[Tensor, ...], y: Tensor, count: Tensor | None, group: Any
) -> tuple[tuple[Tensor, ...], float]:
    """The sums that the gradient of y needs, and the factor 1 / M still to be applied to them.

    With a group they are summed over its ranks in one collective and divided by ``count``, the values a channel has on
    all ranks together; without one they are returned as they are, with M = N H W of this rank.
    """
    if group is None or count is None:
        values = y.numel() // max(y.shape[1], 1)
        return sums, 1.0 / max(values, 1)
    from torch.distributed import _functional_collectives as collectives

    total = collectives.wait_tensor(collectives.all_reduce(torch.stack(sums), "sum", group))
    return tuple((total / count.clamp(min=1)).unbind(0)), 1.0
