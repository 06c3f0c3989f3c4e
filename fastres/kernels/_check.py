"""Argument checks with one form of message: operation, argument, what it got, what it wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "KERNEL_DTYPES",
    "PLAIN",
    "check_activation",
    "check_aten",
    "check_like",
    "check_vectors",
    "describe",
    "fail",
]

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # tensors that nobody has redefined
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def describe(value: Any) -> str:
    """A tensor by dtype, shape, stride and device; anything else by type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind, shape, stride = str(value.dtype)[6:], list(value.shape), list(value.stride())
    return f"{kind} tensor of shape {shape}, stride {stride} on {value.device}"


def fail(kind: type[Exception], op: str, argument: str, got: Any, wanted: str) -> Exception:
    """The exception to raise; ``got`` is described when it is not text already."""
    return kind(f"{op}: {argument} is {got if isinstance(got, str) else describe(got)}; wanted {wanted}")


def check_activation(op: str, argument: str, x: Any) -> None:
    """A 4-d real floating activation [N, C, H, W]."""
    if not isinstance(x, Tensor):
        raise fail(TypeError, op, argument, x, "a tensor [N, C, H, W]")
    if x.dim() != 4:
        raise fail(ValueError, op, argument, x, "4 dimensions [N, C, H, W]")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise fail(TypeError, op, argument, x, "float64, float32, float16 or bfloat16")


def check_vectors(
    op: str, names: tuple[str, ...], vectors: tuple[Any, ...], channels: int, device: torch.device
) -> None:
    """Per-channel vectors, or None; one call for all of a norm's, for this runs at every norm of every pass."""
    shape = (channels,)
    for name, v in zip(names, vectors, strict=True):
        if v is None:
            continue
        if type(v) in PLAIN and v.shape == shape and v.device == device and v.dtype.is_floating_point:
            continue
        if not isinstance(v, Tensor):
            raise fail(TypeError, op, name, v, f"a tensor of {channels} values or None")
        if v.dim() != 1 or v.shape[0] != channels:
            raise fail(ValueError, op, name, v, f"shape [{channels}], one value a channel of the input")
        if not v.dtype.is_floating_point:
            raise fail(TypeError, op, name, v, "a floating dtype")
        if v.device != device:
            raise fail(ValueError, op, name, v, f"device {device}, where the input is")


def check_aten(op: str, y: Tensor, bn: Any) -> None:
    """The norm's dtypes against what ATen takes on the CPU; ATen would raise after the first of two norms."""
    if y.device.type != "cpu":
        return
    dtype = y.dtype
    wide = dtype in (torch.float32, torch.float64)
    if wide and all(v is None or v.dtype == dtype for v in bn[:4]):
        return
    first = None
    for name in ("weight", "bias", "running_mean", "running_var"):
        v = getattr(bn, name)
        if v is None:
            continue
        if v.dtype != y.dtype and (wide or v.dtype != torch.float32) or first not in (None, v.dtype):
            wanted = f"{str(y.dtype)[6:]}{'' if wide else ' or float32'}"
            raise fail(TypeError, op, name, v, f"{wanted}, the same in all vectors of the norm (aten route)")
        first = v.dtype


def check_like(op: str, argument: str, t: Any, like: Tensor) -> None:
    """A tensor of the same shape and device as ``like``."""
    if not isinstance(t, Tensor):
        raise fail(TypeError, op, argument, t, f"a tensor of shape {list(like.shape)}")
    if t.shape != like.shape:
        raise fail(ValueError, op, argument, t, f"shape {list(like.shape)}")
    if t.device != like.device:
        raise fail(ValueError, op, argument, t, f"device {like.device}")
    if not t.dtype.is_floating_point:
        raise fail(TypeError, op, argument, t, "a floating dtype")
