"""Trace one step of a network on fake tensors and count every pass over memory that its operators make.

Nothing is computed and nothing is allocated, so batch 256 costs what batch 1 does and the count is exact for the shape
asked for. Routing is that of a GPU (``functional.assume_gpu``): the operators that would run there are what is seen.
Layers are found by the storage of their parameters; what has no parameter belongs to the layer whose result it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.nets import network
from benchmarks.passes import nbytes, passes_of, tensors
from fastres import _folding, functional

__all__ = ["DTYPES", "Owners", "Pass", "Trace", "trace", "trace_call", "trace_model"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Pass(NamedTuple):
    """One kernel of a step. A value is numbered when it is written; an operation in place makes a new one."""

    layer: str
    phase: str  # forward, backward, optimizer
    kernel: str
    kind: str
    reads: tuple[tuple[int, int], ...]  # value, bytes
    writes: tuple[tuple[int, int], ...]
    flops: int
    workspace: int

    @property
    def bytes(self) -> int:
        return self.workspace + sum(b for _, b in self.reads) + sum(b for _, b in self.writes)

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The least time: bytes over bytes a second, or flops over flops a second, whichever is longer."""
        return max(self.bytes / bandwidth, self.flops / peak)


class Trace(NamedTuple):
    passes: list[Pass]
    saved: int  # bytes of activations that the backward holds on to
    assumed: Counter[str]  # operators counted by the general rule: read arguments once, write results once


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Owners:
    """Which layer an operator works for, by the storages of its arguments. No tensor is kept: autograd hands a gradient
    over only if nobody else holds it, and copies it otherwise."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, str] = {}
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            self._of[_storage(t)] = name.rpartition(".")[0].removeprefix("backbone.")

    def adopt_folded(self, model: nn.Module) -> None:
        """Weights that norms were folded into are their convolutions'; call it after the pass that made them."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                for folded in _folding.held(module):
                    self._of.update({_storage(t): name.removeprefix("backbone.") for t in folded})

    def layer(self, given: list[Tensor]) -> str:
        """A per-channel vector names the layer, else the last operand: of a gradient and an activation the latter."""
        known = [(t, self._of[_storage(t)]) for t in given if _storage(t) in self._of]
        vectors = [name for t, name in known if t.dim() == 1]
        return vectors[0] if vectors else known[-1][1] if known else "other"

    def made(self, layer: str, given: list[Tensor], out: Any) -> list[int]:
        """The results of an operator are the layer's: their storages, those of its arguments left out."""
        inputs = {_storage(t) for t in given}
        # New to the step, though perhaps at an address that another storage had before.
        new = [s for t in tensors(out) if (s := _storage(t)) not in inputs]
        self._of.update(dict.fromkeys(new, layer))
        return new


class _Meter(TorchDispatchMode):
    """Numbers values by storage and writes down the passes of every operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self.assumed: Counter[str] = Counter()
        self.phase = "forward"
        self.values: dict[int, int] = {}
        self.count = 0
        self.owners = Owners(model)

    def _value(self, t: Tensor, new: bool) -> int:
        key = _storage(t)
        if new or key not in self.values:
            self.values[key] = self.count
            self.count += 1
        return self.values[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs))
        layer = "optimizer" if self.phase == "optimizer" else self.owners.layer(given)
        out = func(*args, **(kwargs or {}))
        raws, known = passes_of(func, args, kwargs or {}, out)
        for storage in self.owners.made(layer, given, out):
            self.values.pop(storage, None)
        for raw in raws:
            reads = tuple((self._value(t, False), b) for t, b in raw.reads)
            writes = tuple((self._value(t, True), b) for t, b in raw.writes)
            self.passes.append(
                Pass(layer, self.phase, raw.kernel, raw.kind, reads, writes, raw.flops, raw.workspace)
            )
        if raws and not known:
            self.assumed[str(func)] += 1
        return out


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        yield


def _routed(gpu: bool) -> AbstractContextManager[object]:
    return functional.assume_gpu() if gpu else nullcontext()


def trace_call(
    module: nn.Module, inputs: list[Tensor], dtype: torch.dtype, train: bool, gpu: bool = True
) -> list[Pass]:
    """Count a call of a module on fake tensors, in training with its backward; call it under their FakeTensorMode."""
    module.train(train)
    meter = _Meter(module)
    with _routed(gpu), torch.no_grad(), _autocast(dtype):
        if not train:
            module(*inputs)  # folds the norms, once for all calls
    with _routed(gpu), torch.set_grad_enabled(train), meter:
        with _autocast(dtype):
            out = module(*inputs)
        meter.phase = "backward"
        if train:
            given = torch.empty_like(out)
            torch.autograd.grad(out, [*inputs, *module.parameters()], given)
    return [p for p in meter.passes if p.bytes]


def trace_model(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    train: bool,
    target: Tensor | None = None,
    gpu: bool = True,
) -> Trace:
    """Count one step of a model whose parameters, and ``x``, are fake tensors; call it under their FakeTensorMode.

    ``gpu``: routed as on a GPU; else as on the CPU.
    """
    model.train(train)
    meter = _Meter(model)
    saved: dict[int, Tensor] = {}
    parameters = {_storage(p) for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in parameters:
            saved[_storage(t)] = t
        return t

    with _routed(gpu), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if not train:
            with torch.no_grad(), _autocast(dtype):
                model(x)  # folds the norms, once for all passes
            meter.owners.adopt_folded(model)
            with torch.no_grad(), _autocast(dtype), meter:
                model(x)
            return Trace(meter.passes, 0, meter.assumed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the momentum buffers
        optimizer.zero_grad()
        assert target is not None
        with meter:
            with _autocast(dtype):
                loss = torch.nn.functional.cross_entropy(model(x).float(), target)
            meter.phase = "backward"
            loss.backward()
            meter.phase = "optimizer"
            optimizer.step()
    return Trace(meter.passes, sum(nbytes(t) for t in saved.values()), meter.assumed)


def trace(
    name: str, norm: str, batch: int, dtype: str, train: bool, channels_last: bool = True, size: int = 224,
    gpu: bool = True,
) -> Trace:  # fmt: skip
    """Count one training step (with SGD and momentum) or one inference pass of a network at this batch and image size.

    ``dtype`` fp16 and bf16 run under autocast with fp32 parameters, as a training step does.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode():
        model = network(name, norm)
        for p in model.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory)
        x = torch.empty(batch, 3, size, size).contiguous(memory_format=memory)
        return trace_model(model, x, DTYPES[dtype], train, torch.zeros(batch, dtype=torch.long), gpu)
