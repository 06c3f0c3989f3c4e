"""Under autocast: the weights of a network cast in one launch, instead of one a layer.

The first forward of a network casts layer by layer and notes which weights that was; the ones after cast all of those
at once, before the first layer. Each weight keeps a gradient of its own, cast back when it arrives, so gradient hooks
and the buckets of DistributedDataParallel see them in the order they always have. Nothing is kept between forwards but
weak references to those weights, outside of the modules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastres._batch_norm import recomputing
from fastres._routing import fuses, transformed
from fastres.kernels._library import applied

__all__ = ["cast_weight", "low_weight", "weight_casts"]


class _Forward(threading.local):
    """What is in force in this thread: the casts made, by the weights' identity, and the weights asked for."""

    made: dict[int, Tensor] | None = None
    asked: dict[int, Tensor] | None = None


_now = _Forward()
_wanted: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], ...]] = WeakKeyDictionary()


class _Cast(torch.autograd.Function):
    """A cast that has been made already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return low

    @staticmethod
    def backward(ctx: Any, dlow: Tensor) -> tuple[Tensor, None]:
        return dlow.to(ctx.dtype), None


_cast = applied(_Cast)


@contextmanager
def weight_casts(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Around the forward of a network of ``x``, where that is a fused one under autocast that will be trained."""
    if (
        torch.compiler.is_compiling()  # which has its own way of fusing casts
        or not torch.is_autocast_enabled(x.device.type)
        or not torch.is_grad_enabled()
        or not fuses(x)
        or transformed()
        or recomputing()
    ):
        yield
        return
    dtype = torch.get_autocast_dtype(x.device.type)
    weights = [w for r in _wanted.get(net, ()) if (w := r()) is not None and _castable(w, x.device, dtype)]
    before = _now.made, _now.asked
    _now.made, _now.asked = {}, {}
    if weights:
        lows = [torch.empty_like(w, dtype=dtype, requires_grad=False) for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(lows, weights)
        _now.made = {id(w): low for w, low in zip(weights, lows, strict=True)}
    try:
        yield
        _wanted[net] = tuple(ref(w) for w in _now.asked.values())
    finally:
        _now.made, _now.asked = before


def _castable(weight: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device == device
        and weight.dtype != dtype
        and weight.is_floating_point()
    )


def _made(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if _now.made is None or _now.asked is None or not _castable(weight, device, dtype):
        return None
    _now.asked[id(weight)] = weight
    low = _now.made.get(id(weight))
    return low if low is not None and low.dtype == dtype else None


def low_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the dtype of ``x``, without a gradient."""
    low = _made(weight, x.device, x.dtype)
    if low is not None:
        return low
    return weight.detach() if weight.dtype == x.dtype else weight.detach().to(x.dtype)


def cast_weight(weight: Tensor, device: torch.device) -> Tensor | None:
    """A weight in autocast's dtype, differentiable, where it has been cast already; else None: autocast will do it."""
    low = None
    if _now.made is not None and torch.is_autocast_enabled(device.type):
        low = _made(weight, device, torch.get_autocast_dtype(device.type))
    return None if low is None else _cast(weight, low)
