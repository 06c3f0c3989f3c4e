"""What the tuner runs, calls, operations, folded convolutions and blocks on random inputs, and whether it is right.

An operator is held against its plain-torch implementation in float64; it may be at most twice as far from that as the
same implementation is in the dtype under test, plus the floor of ``fastres.selfcheck``. Masks may differ in as many
bytes as that implementation's do, twice, and one in a thousand: there a sum lies within rounding of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres import _inference, functional, selfcheck
from fastres._jobs import Route
from fastres._workload import Call, Convolution, Spec, schema
from fastres.kernels import _tuned
from fastres.kernels._library import NAMESPACE, REFERENCES
from fastres.kernels.folded_conv import Folded, Geometry, cudnn_obstacle

__all__ = ["Operands", "block_outcome", "block_ratio", "case", "folded_references", "inputs", "operands", "outcome",
           "ratio", "references", "step", "ways"]  # fmt: skip

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


def inputs(call: Call, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of a call. What it would update in place is None where it may be."""
    g = torch.Generator(device).manual_seed(seed)
    made = []
    for argument, given in zip(schema(call), call.args, strict=False):
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


@contextmanager
def _eager_precision() -> Iterator[None]:
    """Matrix products in the precision that PyTorch's own convolutions have, by the switch that rules ours too: a
    reference that stands for eager's convolution must not be more exact than it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def references(call: Call, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The plain-torch results, in the dtype of the arguments and in float64."""

    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with _eager_precision():
        return tuple(_bound(call, REFERENCES[call.op](*given)) for given in (args, wide))  # type: ignore[return-value]


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


# ------------------------------------------------------------------------------------------------------ operations


def case(r: Route, device: torch.device, seed: int) -> selfcheck.Case:
    """The operation of a route on random inputs, with batch statistics."""
    g = torch.Generator(device).manual_seed(seed)
    memory = torch.channels_last if r.channels_last else torch.contiguous_format

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    c = r.shape[1]
    norm = {"bn.weight": rand(c), "bn.bias": rand(c), "bn.mean": rand(c) * 0, "bn.var": rand(c) * 0 + 1}
    one = {**norm, "y": rand(*r.shape).to(r.dtype).contiguous(memory_format=memory)}
    if r.op == "add_relu":
        other = rand(*r.shape).to(r.dtype).contiguous(memory_format=memory)
        return selfcheck.block_end({**one, "identity": other})
    return selfcheck.stem_pool(one) if r.op == "max_pool" else selfcheck.bn_relu(one)


def step(case: selfcheck.Case, tensors: dict[str, Tensor], dz: Tensor, route: str) -> None:
    """Forward and backward of an operation on a backend."""
    with functional.backend(route):
        out = case.run(tensors)
    torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad], dz)


# ---------------------------------------------------------------------------------------------- folded convolutions


class Operands(NamedTuple):
    """Of a folded convolution, and of the downsample's where it is a pair."""

    x: Tensor
    folded: Folded
    other: Tensor | None
    x2: Tensor | None
    folded2: Folded | None


def _down(c: Convolution) -> Geometry:
    return Geometry((c.stride2, c.stride2), (0, 0), (1, 1), 1)


def operands(c: Convolution, device: torch.device, seed: int = 0) -> Operands:
    """Random operands of a folded convolution."""
    g, dtype = torch.Generator(device).manual_seed(seed), c.x.dtype
    last = c.x.meta.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if last else torch.contiguous_format

    def made(name: str, *shape: int) -> Tensor:
        stride = torch.empty(shape, device="meta", memory_format=memory).stride()
        return _tensor(name, Spec(shape, stride, dtype), g, device)

    def weights(*shape: int) -> Folded:
        return Folded(made("weight", *shape), torch.randn(shape[0], generator=g, device=device).to(dtype))

    x, x2 = (_tensor("x", s, g, device) if s is not None else None for s in (c.x, c.x2))
    assert x is not None
    other = made("other", *c.out) if c.add and x2 is None else None
    folded2 = None if x2 is None else weights(c.weight[0], x2.shape[1], 1, 1)
    return Operands(x, weights(*c.weight), other, x2, folded2)


def ways(c: Convolution, o: Operands) -> dict[str, Callable[[], Tensor]]:
    """Every route of a folded convolution as a function; of a pair, the two convolutions on the routes of the table."""

    def matrix(f: Folded) -> Folded:
        return _inference.for_product(Folded(f.weight, f.bias.float()))

    x, g = o.x, c.geometry
    if o.x2 is not None and o.folded2 is not None:
        x2, down, first, second = o.x2, o.folded2, matrix(o.folded), matrix(o.folded2)
        main = _tuned.route("folded_product", c._replace(x2=None).key, "triton")
        alone = first if main == "triton" else o.folded

        def apart() -> Tensor:
            other = _inference.run("cudnn", x2, down, _down(c), False, None)
            return _inference.run(main, x, alone, g, True, other)

        return {
            "pair": lambda: _inference.product(x, first, None, x2, second, c.stride2),
            "separate": apart,
        }
    given = {n: matrix(o.folded) if n == "triton" else o.folded for n in _tuned.ROUTES[c.op]}
    if x.is_cuda and cudnn_obstacle(x.dtype, x.device):
        del given["cudnn"]
    return {n: lambda n=n, f=f: _inference.run(n, x, f, g, True, o.other) for n, f in given.items()}  # type: ignore[misc]


def folded_references(c: Convolution, o: Operands) -> tuple[Tensor, Tensor]:
    """Result by PyTorch's convolution, addition and ReLU, in the dtype of the operands and in float64."""

    def compute(dtype: torch.dtype) -> Tensor:
        def conv(x: Tensor, f: Folded, g: Geometry) -> Tensor:
            return nn.functional.conv2d(x.to(dtype), f.weight.to(dtype), f.bias.to(dtype), *g)

        y = conv(o.x, o.folded, c.geometry)
        if o.x2 is not None and o.folded2 is not None:
            y = y + conv(o.x2, o.folded2, _down(c))
        return torch.relu(y if o.other is None else y + o.other.to(dtype))

    return compute(o.x.dtype), compute(torch.float64)


# ---------------------------------------------------------------------------------------------------------- blocks


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
