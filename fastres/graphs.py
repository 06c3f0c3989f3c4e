"""Inference from CUDA graphs: one launch instead of some hundred, which is what small batches wait for.

    runner = fastres.GraphRunner(net)            # net in eval mode on a GPU
    scores = runner(images)                      # captures once for each shape, dtype and layout, then replays
    print(runner)                                # what it holds

A graph has the addresses of its tensors built in. So the runner copies its input into the graph's own, returns copies
of the graph's outputs, keeps alive the folded weights that the graph reads, and captures anew when a parameter or
buffer of the model is another tensor, lies elsewhere or was changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastres import _folding
from fastres.kernels._check import fail

__all__ = ["Captured", "GraphRunner", "Held"]


class Captured(Protocol):
    """A captured forward pass."""

    inputs: Tensor
    outputs: Any
    bytes: int

    def replay(self) -> None:
        """Compute ``outputs`` from what ``inputs`` holds."""


class Held(NamedTuple):
    """One graph of a runner."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    bytes: int  # of device memory that the capture took, 0 where it found room in the pool
    replays: int


class _CudaGraph:
    """A forward pass captured on the current CUDA device."""

    def __init__(self, model: nn.Module, x: Tensor, pool: Any) -> None:
        self.inputs = x.clone(memory_format=torch.preserve_format)
        before = torch.cuda.memory_reserved(x.device)
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(3):  # cuDNN chooses, kernels are compiled, weights are folded
                model(self.inputs)
        torch.cuda.current_stream(x.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.outputs = model(self.inputs)
        self.bytes = torch.cuda.memory_reserved(x.device) - before

    def replay(self) -> None:
        self._graph.replay()


class _Slot:
    def __init__(self, captured: Captured, weights: list[Any]) -> None:
        self.captured, self.weights, self.replays = captured, weights, 0


class GraphRunner:
    """Runs a model in eval mode from CUDA graphs, one for each input shape, dtype and layout.

    Args:
        model: in eval mode; one argument, an image batch [N, C, H, W]; outputs are tensors in tuples, lists or dicts.
        most: graphs to hold; the one that was used longest ago goes first.
        capture: makes a :class:`Captured` from model and input; default CUDA's.
    """

    def __init__(
        self, model: nn.Module, most: int = 8, capture: Callable[[nn.Module, Tensor], Captured] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise fail(TypeError, "GraphRunner", "model", model, "an nn.Module")
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"GraphRunner: most is {most!r}; wanted an integer of at least 1")
        self.model, self.most = model, most
        self._capture = capture
        self._pool: Any = None
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()
        self._state: tuple[Any, ...] = ()
        self.captures = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """The model's output for ``x``, in tensors of its own.

        Raises:
            TypeError, ValueError: not a 4-d tensor on a CUDA device; the model is in training mode.
        """
        self._check(x)
        state = self._now()
        if state != self._state:
            self.clear()
            self._state = state
        key = (x.shape, x.dtype, x.stride(), x.device)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._captured(x)
            while len(self._slots) > self.most:
                self._slots.popitem(last=False)
        self._slots.move_to_end(key)
        slot.captured.inputs.copy_(x)
        slot.captured.replay()
        slot.replays += 1
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, slot.captured.outputs)

    def _check(self, x: Any) -> None:
        op = "GraphRunner"
        if not isinstance(x, Tensor):
            raise fail(TypeError, op, "input", x, "a tensor [N, C, H, W]")
        if x.dim() != 4 or not x.numel():
            raise fail(ValueError, op, "input", x, "4 dimensions [N, C, H, W], none of them empty")
        if self._capture is None and not x.is_cuda:
            raise fail(ValueError, op, "input", x, "a CUDA device: there are no graphs elsewhere")
        if any(m.training for m in self.model.modules()):
            raise ValueError(f"{op}: the model, or a part of it, is in training mode; wanted model.eval()")
        if x.requires_grad:
            raise ValueError(f"{op}: input requires grad; wanted none, a graph has no backward")

    def _now(self) -> tuple[Any, ...]:
        """What the graphs depend on besides their inputs."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)

    def _captured(self, x: Tensor) -> _Slot:
        self.captures += 1
        if self._capture is not None:
            return _Slot(self._capture(self.model, x), _folding.held(self.model))
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(x.device):
            return _Slot(_CudaGraph(self.model, x, self._pool), _folding.held(self.model))

    def clear(self) -> None:
        """Let go of every graph and its memory."""
        self._slots.clear()
        self._pool = None

    @property
    def held(self) -> list[Held]:
        """The graphs held, the one used longest ago first."""
        found = []
        for (shape, dtype, stride, _), slot in self._slots.items():
            empty = torch.empty(shape, device="meta").as_strided(shape, stride)
            layout = "channels_last" if empty.is_contiguous(memory_format=torch.channels_last) else "strided"
            layout = "NCHW" if empty.is_contiguous() else layout
            found.append(Held(tuple(shape), dtype, layout, slot.captured.bytes, slot.replays))
        return found

    def __repr__(self) -> str:
        lines = [
            f"GraphRunner({type(self.model).__name__}): {len(self._slots)} of at most {self.most} graphs"
        ]
        for h in self.held:
            size = "x".join(map(str, h.shape))
            lines.append(
                f"  {size} {str(h.dtype)[6:]} {h.layout}: {h.replays} replays, {h.bytes / 2**20:.1f} MiB"
            )
        return "\n".join(lines)
