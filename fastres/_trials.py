"""Inputs for an operator's call, and whether what it computes is right: the tuner's judge.

An operator is held against its plain-torch implementation in float64; it may be at most twice as far from that as the
same implementation is in the dtype under test, plus the floor of ``fastres.selfcheck``. Masks may differ in as many
bytes as that implementation's do, twice, and one in a thousand: there a sum lies within rounding of zero.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastres import functional, selfcheck
from fastres._workload import Call, Spec
from fastres.kernels._library import NAMESPACE, REFERENCES

__all__ = ["block_outcome", "block_ratio", "inputs", "outcome", "ratio", "references"]

# Results that an implementation may choose: the anchor that sums are taken about.
_FREE = {"pointwise_moments": (2,)}
_CENTRE = 4  # of a 3x3 window: the one tap that never points outside the image


def _tensor(name: str, spec: Spec, g: torch.Generator, device: torch.device) -> Tensor:
    shape, stride, dtype = spec
    if 0 in stride:
        stride = torch.empty(shape, device="meta").stride()
    t = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if name == "taps":
        return t.fill_(_CENTRE)
    if dtype == torch.uint8:
        return t.random_(0, 256, generator=g)
    if not dtype.is_floating_point:
        return t.fill_(1)
    t.normal_(generator=g)
    if "var" in name:
        return t.abs_().add_(0.5)
    if name.startswith("anchor"):
        return t.zero_()
    if name.startswith("w") and len(shape) > 1:  # a weight: results of the size of its inputs
        return t.mul_(max(t[0].numel(), 1) ** -0.5)
    return t.mul_(0.2) if "mean" in name else t


def _schema(call: Call) -> list[Any]:
    return getattr(getattr(torch.ops, NAMESPACE), call.op).default._schema.arguments


def inputs(call: Call, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of a call. What it would update in place is None where it may be."""
    g = torch.Generator(device).manual_seed(seed)
    made = []
    for argument, given in zip(_schema(call), call.args, strict=False):
        updated = argument.alias_info is not None and argument.alias_info.is_write
        optional = isinstance(argument.type, torch.OptionalType)
        if isinstance(given, Spec):
            made.append(None if updated and optional else _tensor(argument.name, given, g, device))
        else:
            made.append(given)
    return tuple(made)


def _bound(call: Call, out: Any) -> list[Tensor]:
    """The results that are defined by the operator's formula."""
    results = [out] if isinstance(out, Tensor) else list(out)
    return [t for i, t in enumerate(results) if i not in _FREE.get(call.op, ())]


def outcome(call: Call, args: tuple[Any, ...]) -> list[Tensor]:
    """The operator's results."""
    return _bound(call, getattr(getattr(torch.ops, NAMESPACE), call.op).default(*args))


def references(call: Call, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The plain-torch results, in the dtype of the arguments and in float64."""

    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return tuple(_bound(call, REFERENCES[call.op](*given)) for given in (args, wide))  # type: ignore[return-value]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _differing(a: Tensor, b: Tensor) -> float:
    return float((a != b).float().mean()) if a.numel() else 0.0


def ratio(ours: list[Tensor], plain: list[Tensor], wide: list[Tensor], dtype: torch.dtype) -> float:
    """The largest error of the results as a part of what is allowed; infinite where shapes or NaNs differ."""
    worst = 0.0
    for got, other, ref in zip(ours, plain, wide, strict=True):
        if got.dtype.is_floating_point:
            precision = dtype if got.dtype.itemsize >= dtype.itemsize else got.dtype
            worst = max(worst, selfcheck.worst_ratio(got, other, ref, precision))
        elif got.shape != ref.shape:
            return float("inf")
        else:
            worst = max(worst, _differing(got, ref) / (2 * _differing(other, ref) + 1e-3))
    return worst


def block_outcome(block: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Result and gradients of a training pass of a block, under autocast for 2-byte types."""
    reduced = dtype in (torch.float16, torch.bfloat16)
    leaf = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype if reduced else None, enabled=reduced):
        out = block(leaf)
    g = torch.Generator(x.device).manual_seed(1)
    dz = torch.empty_like(out).normal_(generator=g)
    named = dict(block.named_parameters())
    grads = torch.autograd.grad(out, [leaf, *named.values()], dz)
    return {"result": out.detach(), **dict(zip(["input", *named], grads, strict=True))}


def block_ratio(block: nn.Module, x: Tensor, dtype: torch.dtype, fused: str) -> tuple[float, str]:
    """A block on the fused operators beside eager PyTorch and float64: the largest error and where it is."""
    with functional.backend("aten"):
        eager = block_outcome(copy.deepcopy(block), x, dtype)
        ref = _in_double(block, x, eager)
    with functional.backend(fused):
        ours = block_outcome(copy.deepcopy(block), x, dtype)
    found = {k: selfcheck.worst_ratio(ours[k], eager[k], ref[k], dtype) for k in ref}
    name = max(found, key=lambda k: found[k])
    return found[name], name


def _in_double(block: nn.Module, x: Tensor, eager: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``block_outcome`` in float64, from the very gradient that the eager pass saw."""
    wide = copy.deepcopy(block).double()
    leaf = x.detach().double().requires_grad_()
    out = wide(leaf)
    g = torch.Generator(x.device).manual_seed(1)
    dz = torch.empty_like(eager["result"]).normal_(generator=g).double()
    named = dict(wide.named_parameters())
    grads = torch.autograd.grad(out, [leaf, *named.values()], dz)
    return {"result": out.detach(), **dict(zip(["input", *named], grads, strict=True))}
