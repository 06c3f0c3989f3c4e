"""What a model asks of the kernels: operator calls, routed operations and blocks, with their shapes.

A training step or an inference pass is traced on fake tensors as on a GPU, so it costs no memory and no GPU. A step is
traced three times, with the moment form as the stated default has it, wherever it applies, and nowhere: what a table
may choose is then all seen.
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
from fastres.kernels.folded_conv import Geometry, folded_key, pair_key
from fastres.modules import ResidualBlock
from fastres.routes import fake_model

__all__ = ["Block", "Call", "Convolution", "Spec", "Workload", "convolutions", "schema", "workload"]


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


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


def schema(call: Call) -> list[Any]:
    """The arguments that a call's operator declares."""
    return getattr(getattr(torch.ops, NAMESPACE), call.op).default._schema.arguments


class Convolution(NamedTuple):
    """A folded convolution with a ReLU as an inference pass makes it.

    ``weight`` is the weight's shape, ``add`` whether something is added before the ReLU; with ``x2`` that is the
    downsample's 1x1 convolution of x2, which the block end's product can take in.
    """

    x: Spec
    weight: tuple[int, ...]
    geometry: Geometry
    add: bool
    x2: Spec | None = None
    stride2: int = 1

    @property
    def op(self) -> str:
        """Its operation in ``_tuned.ROUTES``."""
        if self.x2 is not None:
            return "folded_pair"
        plain = self.weight[2:] == (1, 1) and self.geometry == Geometry((1, 1), (0, 0), (1, 1), 1)
        last = self.x.meta.is_contiguous(memory_format=torch.channels_last)
        return "folded_product" if plain and last else "folded_conv"

    @property
    def key(self) -> _tuned.Key:
        if self.x2 is not None:
            return pair_key(self.x.meta, self.x2.meta, self.weight[0], self.stride2)
        return folded_key(self.x.meta, self.weight, self.geometry, self.add)

    @property
    def out(self) -> tuple[int, int, int, int]:
        return self.geometry.out(self.x.shape, self.weight)

    @property
    def bytes(self) -> int:
        """Read and written by one kernel that does it all."""
        y = math.prod(self.out) * self.x.dtype.itemsize
        other = self.x2.bytes if self.x2 is not None else y if self.add else 0
        return self.x.bytes + other + y

    @property
    def name(self) -> str:
        layout = "channels_last" if self.x.meta.is_contiguous(memory_format=torch.channels_last) else "NCHW"
        k, _, h, w = self.weight
        kind = f"{h}x{w} to {k}, stride {self.geometry.stride[0]}"
        more = f", pair with {'x'.join(map(str, self.x2.shape))}" if self.x2 else ", add" if self.add else ""
        groups = f", {self.geometry.groups} groups" if self.geometry.groups > 1 else ""
        return f"{self.op} {'x'.join(map(str, self.x.shape))} {str(self.x.dtype)[6:]} {layout}, {kind}{groups}{more}"


def convolutions(calls: dict[Call, int]) -> dict[Convolution, int]:
    """The folded convolutions that have a choice of routes among a pass's calls, with how often it makes them.

    A block end whose product takes in the downsample's convolution comes as that pair and, for the time that it would
    be apart, as a convolution with an addition.
    """
    found: dict[Convolution, int] = {}
    for call, count in calls.items():
        a = {declared.name: given for declared, given in zip(schema(call), call.args, strict=False)}
        if call.op == "folded_conv" and a["relu"]:
            g = Geometry(a["stride"], a["padding"], a["dilation"], a["groups"])
            made = [Convolution(a["x"], a["weight"].shape, g, a["other"] is not None)]
        elif call.op == "pointwise_end" and a["mean0"] is None and not a["save"]:
            plain = Geometry((1, 1), (0, 0), (1, 1), 1)
            add = a["identity"] is not None or a["x2"] is not None
            made = [Convolution(a["x"], (*a["wf"].shape, 1, 1), plain, add)]
            if a["x2"] is not None:
                made.append(made[0]._replace(x2=a["x2"], stride2=a["stride2"]))
        else:
            continue
        for c in made:
            found[c] = found.get(c, 0) + count
    return found


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
            plain = (tuple(a) if isinstance(a, list) else a for a in args)
            given = tuple(_spec(a) if isinstance(a, Tensor) else a for a in plain)
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


def _step(model: nn.Module, x: Tensor, dtype: torch.dtype, train: bool) -> None:
    """Forward and, in training, backward with a dense gradient of every output."""
    reduced = dtype != torch.float32
    with torch.set_grad_enabled(train), torch.autocast("cpu", dtype if reduced else None, enabled=reduced):
        outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
    if train:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _modes() -> Iterator[str]:
    yield from ("auto", "on", "off")


def workload(
    build: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    channels_last: bool,
    capability: tuple[int, int] = (9, 0),
    train: bool = True,
) -> Workload:
    """Trace one training step, or one inference pass, of which only the calls are noted.

    Args:
        build: makes the model; called under fake tensors.
        shape: [N, C, H, W] of the input.
        dtype: float16 and bfloat16 run under autocast.
        channels_last: memory format of input and weights.
        capability: compute capability of the GPU to decide for.
        train: a training step, else a pass in eval mode without gradients.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    calls: dict[Call, int] = {}
    choices: list[Choice] = []
    counts: dict[Block, int] = {}
    for moments in _modes() if train else ("auto",):
        mode = FakeTensorMode()
        model = fake_model(build, mode, memory).train(train)
        if moments == "auto" and train:
            _watch_blocks(model, {}, counts)
        found = _Calls()
        with mode, _tuned.using(_tuned.EMPTY), _tuned.watch(), functional.assume_gpu(capability):
            x = torch.empty(shape).contiguous(memory_format=memory)
            with functional.moments(moments), functional.record_routes() as log, found:
                _step(model, x, dtype, train)
        for call, count in found.counts.items():
            calls.setdefault(call, count)
        if moments == "off":
            choices = list(log)
    return Workload(calls, choices, counts)
