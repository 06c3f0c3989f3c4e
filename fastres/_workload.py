"""What a model's training step asks of the kernels: operator calls, routed operations and blocks, with their shapes.

The step is traced on fake tensors as on a GPU, so it costs no memory and no GPU. It is traced three times, with the
moment form as the stated default has it, wherever it applies, and nowhere: what a table may choose is then all seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres import functional
from fastres.functional import Choice
from fastres.kernels import _tuned
from fastres.kernels._library import NAMESPACE
from fastres.modules import ResidualBlock
from fastres.routes import fake_model

__all__ = ["Block", "Call", "Spec", "Workload", "workload"]


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Call(NamedTuple):
    """An operator of this package on arguments of these shapes; what is no tensor is given as it was."""

    op: str
    args: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.args if isinstance(a, Spec))

    @property
    def name(self) -> str:
        largest = max((a for a in self.args if isinstance(a, Spec)), key=lambda s: s.bytes)
        return f"{self.op} {'x'.join(map(str, largest.shape))} {str(largest.dtype)[6:]}"


class Block(NamedTuple):
    """A residual block by its name in the model, and the input that it gets."""

    name: str
    input: Spec


class Workload(NamedTuple):
    """Calls and activations with how often a step makes them, blocks once for each set of choices that they ask for;
    of the calls, those that the stated defaults make come first."""

    calls: dict[Call, int]
    choices: list[Choice]
    blocks: dict[Block, int]


def _spec(t: Tensor) -> Spec:
    return Spec(tuple(t.shape), tuple(t.stride()), t.dtype)


class _Calls(TorchDispatchMode):
    """Counts this package's operators by the shapes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Call, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            given = tuple(_spec(a) if isinstance(a, Tensor) else a for a in args)
            call = Call(func.__name__.split(".")[0], given)
            self.counts[call] = self.counts.get(call, 0) + 1
        return func(*args, **(kwargs or {}))


def _watch_blocks(model: nn.Module, seen: dict[tuple[Any, ...], Block], counts: dict[Block, int]) -> None:
    """Note every block's input and, by the choices that it asks for, which blocks are alike."""
    start: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            start[name] = len(_tuned._State.watching or [])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            asked = tuple(
                (item.name, item.key)
                for item in (_tuned._State.watching or [])[start[name] :]
                if item.name in _tuned.ROUTES
            )
            block = seen.setdefault((type(module).__name__, asked), Block(name, _spec(args[0])))
            counts[block] = counts.get(block, 0) + 1

        return hook

    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after(name))


def _step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward with a dense gradient of every output."""
    reduced = dtype != torch.float32
    with torch.autocast("cpu", dtype if reduced else None, enabled=reduced):
        outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _modes() -> Iterator[str]:
    yield from ("auto", "on", "off")


def workload(
    build: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    channels_last: bool,
    capability: tuple[int, int] = (9, 0),
) -> Workload:
    """Trace one training step.

    Args:
        build: makes the model; called under fake tensors.
        shape: [N, C, H, W] of the input.
        dtype: float16 and bfloat16 run under autocast.
        channels_last: memory format of input and weights.
        capability: compute capability of the GPU to decide for.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    calls: dict[Call, int] = {}
    choices: list[Choice] = []
    counts: dict[Block, int] = {}
    for moments in _modes():
        mode = FakeTensorMode()
        model = fake_model(build, mode, memory).train()
        if moments == "auto":
            _watch_blocks(model, {}, counts)
        found = _Calls()
        with mode, _tuned.using(_tuned.EMPTY), _tuned.watch(), functional.assume_gpu(capability):
            x = torch.empty(shape).contiguous(memory_format=memory)
            with functional.moments(moments), functional.record_routes() as log, found:
                _step(model, x, dtype)
        for call, count in found.counts.items():
            calls.setdefault(call, count)
        if moments == "off":
            choices = list(log)
    return Workload(calls, choices, counts)
