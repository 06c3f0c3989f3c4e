"""What a function keeps for its backward, given back as it lay.

``torch.autograd.graph.saved_tensors_hooks`` may give a tensor back in other strides: ``save_on_cpu(pin_memory=True)``
does so with channels_last. PyTorch's operators read by strides; kernels read as their forward did, so the strides are
put right here. That costs a look at the hooks in forward, and a copy where a hook has changed them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["through_hooks", "recall", "store"]

_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def through_hooks() -> bool:
    """Whether tensors that are saved now go through hooks."""
    return _hooks(True) is not None


def store(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``."""
    ctx.save_for_backward(*tensors)
    ctx.lay = None
    if not torch.compiler.is_compiling() and through_hooks():
        ctx.lay = [None if t is None else t.stride() for t in tensors]


def recall(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors`` in the strides in which they were saved."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if ctx.lay is None:
        return tensors
    return tuple(
        t if t is None or t.stride() == s else _as(t, s) for t, s in zip(tensors, ctx.lay, strict=True)
    )


def _as(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
