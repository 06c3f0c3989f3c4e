"""What each operator of a step moves through device memory, as a list of passes.

A pass is one kernel: the values it reads, the values it writes, each once, and its floating-point operations. The
rules hold for CUDA's kernels: a few ATen operators make several passes and are listed here; every other operator is
one pass that reads its tensor arguments and writes its results; an operator that only makes a view makes none. The
operators of fastres are counted from what they declare where they are registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels._library import NAMESPACE, TRAFFIC, Traffic

__all__ = ["EXTERN", "POINTWISE", "REDUCTION", "Raw", "nbytes", "passes_of", "tensors"]

EXTERN, POINTWISE, REDUCTION = "extern", "pointwise", "reduction"
_BN_FORWARD = {"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "_batch_norm_with_update"}
_BN_FORWARD |= {"_native_batch_norm_legit_no_training", "_batch_norm_no_update"}
_BN_BACKWARD = {"native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward"}
# Elementwise operators as torch.compile fuses them into their neighbours. What is not here is a kernel of its own.
_POINTWISE = {
    "relu", "relu_", "add", "add_", "mul", "mul_", "threshold_backward", "div", "div_", "sub", "clone", "sigmoid",
    "sigmoid_backward", "expand",
}  # fmt: skip
_WRITE_ONLY = {"zero_", "fill_", "copy_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like"}
# Host-side or without a kernel.
_FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "device",
    "_record_function_enter_new",
    "lift_fresh",
}
_FREE |= {"_RecordFunction", "_record_function_exit", "detach_"}


class Raw(NamedTuple):
    """One kernel of an operator, before it is placed in a step."""

    kernel: str
    kind: str
    reads: list[tuple[Tensor, int]]  # tensor and bytes read of it
    writes: list[tuple[Tensor, int]]
    flops: int = 0
    workspace: int = 0


def nbytes(t: Tensor) -> int:
    """Bytes that a tensor's values occupy; an expanded dimension is one value."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride != 0 else min(size, 1)
    return n


def _sized(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor, int]]:
    return [(t, nbytes(t)) for t in tensors if isinstance(t, Tensor) and t.numel()]


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _touched(x: Tensor, weight: Tensor, stride: Iterable[int], padding: Iterable[int]) -> int:
    """Bytes of a convolution's input that are read: a strided 1x1 skips rows and columns."""
    part = 1
    if all(k == 1 for k in weight.shape[2:]) and not any(padding):
        for s in stride:
            part *= s
    return nbytes(x) // part


def _conv(args: tuple[Any, ...], out: Tensor) -> list[Raw]:
    x, w, bias, stride, padding = args[:5]
    flops = 2 * (out.numel() // out.shape[1]) * w.numel()
    reads = [(x, _touched(x, w, stride, padding)), *_sized([w, bias])]
    return [Raw("convolution", EXTERN, reads, _sized([out]), flops)]


def _conv_backward(args: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> list[Raw]:
    dy, x, w, _, stride, padding = args[:6]
    flops = 2 * (dy.numel() // dy.shape[1]) * w.numel()
    kernels = []
    if out[0] is not None:
        kernels.append(Raw("dgrad", EXTERN, _sized([dy, w]), _sized([out[0]]), flops))
    if out[1] is not None:
        reads = [*_sized([dy]), (x, _touched(x, w, stride, padding))]
        kernels.append(Raw("wgrad", EXTERN, reads, _sized([out[1]]), flops))
    if len(out) > 2 and out[2] is not None:
        kernels.append(Raw("bias gradient", REDUCTION, _sized([dy]), _sized([out[2]])))
    return kernels


def _bn(name: str, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> list[Raw]:
    x = args[0]
    batch = "no_training" not in name and "no_update" not in name and bool(args[5])
    vectors = _sized(v for v in args[1:5] if isinstance(v, Tensor))
    apply = Raw("bn apply", POINTWISE, [*_sized([x]), *vectors], _sized([out[0]]))
    stats = Raw("bn statistics", REDUCTION, _sized([x]), _sized(out[1:3]))
    return [stats, apply] if batch else [apply]


def _bn_backward(name: str, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> list[Raw]:
    # cudnn_batch_norm_backward takes its input first, the others the gradient; a pass over both is the same.
    dz, y = args[0], args[1]
    batch = bool(args[7]) if name != "cudnn_batch_norm_backward" else True
    kernels = []
    if batch or any(t is not None for t in out[1:3]):
        sums = [t for t in out[1:3] if t is not None]
        kernels.append(Raw("bn backward reduce", REDUCTION, _sized([dz, y]), _sized(sums)))
    if out[0] is not None:
        kernels.append(
            Raw("bn backward apply", POINTWISE, _sized([dz, y] if batch else [dz]), _sized([out[0]]))
        )
    return kernels


def _matmul(name: str, args: tuple[Any, ...], out: Tensor) -> list[Raw]:
    a = args[1] if name == "addmm" else args[0]
    return [Raw(name, EXTERN, _sized(tensors(args)), _sized([out]), 2 * out.numel() * a.shape[-1])]


def _fastres(name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> tuple[list[Raw], bool]:
    declared: Callable[..., Traffic] | None = TRAFFIC.get(name)
    given = tensors(args)
    vectors = [t for t in given if t.dim() == 1]
    traffic = declared(*args) if declared else Traffic([t for t in given if t.dim() > 1])
    raw = Raw(
        name, EXTERN, _sized([*traffic.reads, *vectors]), _sized(outputs), traffic.flops, traffic.workspace
    )
    return [raw], declared is not None


def passes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[list[Raw], bool]:
    """The passes of one dispatched operator, and whether they follow from a rule or declaration of its own."""
    name = func.__name__.split(".")[0]
    outputs = tensors(out)
    if func.namespace == NAMESPACE:
        return _fastres(name, args, outputs)
    if name in _FREE or func.namespace in ("prim", "profiler"):
        return [], True
    if name == "convolution":
        return _conv(args, out), True
    if name == "convolution_backward":
        return _conv_backward(args, out), True
    if name in _BN_FORWARD:
        return _bn(name, args, out), True
    if name in _BN_BACKWARD:
        return _bn_backward(name, args, out), True
    if name in ("mm", "addmm", "bmm"):
        return _matmul(name, args, out), True
    if name == "max_pool2d_with_indices_backward":  # the input is an argument but is not read
        return [Raw("pool backward", EXTERN, _sized([args[0], args[-1]]), _sized([out]))], True
    schema = func._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return [], True  # a view
    inputs = tensors((args, kwargs))
    mutated = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutated += tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    written = {id(t): t for t in [*mutated, *outputs]}
    unread = {id(t) for t in mutated} if name in _WRITE_ONLY else set()
    kind = POINTWISE if name in _POINTWISE else EXTERN
    reads = _sized(t for t in inputs if id(t) not in unread)
    return [Raw(name, kind, reads, _sized(written.values()))], False
