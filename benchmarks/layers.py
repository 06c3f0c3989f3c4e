"""Where the time of a step goes, layer by layer, as measured: a profile whose operators are told whose they are.

Every operator of a step is run inside a range named after its layer and phase, by the rule of the byte meter
(``benchmarks.meter.Owners``), so that measured and counted stand beside each other. On a GPU a range's time is that of
the kernels launched in it, on the CPU that of the operator. Compiled code has no layers and is not measured so.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.meter import DTYPES, Owners
from benchmarks.nets import network, train_step
from benchmarks.passes import tensors
from fastres._timing import synchronize

__all__ = ["layers_ms"]

_RANGE = "layer of a step: "
Times = dict[str, dict[str, float]]  # layer -> phase -> milliseconds


class _Ranges(TorchDispatchMode):
    """Runs every operator in a range of the profiler."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owners, self.optimizer = Owners(model), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs))
        if self.optimizer:
            layer = phase = "optimizer"
        else:
            layer = self.owners.layer(given)
            phase = "forward" if torch._C._current_graph_task_id() < 0 else "backward"
        with record_function(f"{_RANGE}{layer} {phase}"):
            out = func(*args, **(kwargs or {}))
        self.owners.made(layer, given, out)
        return out


def _ranges(p: Any, device: torch.device) -> Times:
    found: Times = {}
    for e in p.events():
        if e.device_type != DeviceType.CPU or not e.name.startswith(_RANGE):
            continue
        layer, phase = e.name.removeprefix(_RANGE).rsplit(" ", 1)
        ms = (e.device_time_total if device.type == "cuda" else e.cpu_time_total) / 1e3
        phases = found.setdefault(layer, {})
        phases[phase] = phases.get(phase, 0.0) + ms
    return found


class _Step:
    """A training step of a network in channels_last, with SGD and momentum."""

    def __init__(self, name: str, norm: str, batch: int, size: int, dtype: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = network(name, norm).to(device).to(memory_format=torch.channels_last).train()
        x = torch.randn(batch, 3, size, size, device=device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.dtype, self.device = DTYPES[dtype], device

    def __call__(self, ranges: _Ranges | None = None) -> None:
        reduced = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced)
        train_step(self.model, self.x, self.target, autocast)
        if ranges is not None:
            ranges.optimizer = True
        self.optimizer.step()
        self.optimizer.zero_grad()


def layers_ms(
    name: str, norms: list[str], batch: int, size: int, dtype: str, device: torch.device, steps: int = 3
) -> dict[str, Times]:  # fmt: skip
    """Milliseconds of every layer and phase of a training step, by norm; medians over ``steps``, taken in turn.

    Args:
        name, norms: of ``benchmarks.nets.network``.
        batch, size: images, and pixels along a side.
        dtype: a key of ``DTYPES``; fp16 and bf16 run under autocast.
        device: where it runs.
        steps: profiled steps of each, after two that are not.
    """
    ready = {norm: _Step(name, norm, batch, size, dtype, device) for norm in norms}
    for step in ready.values():
        for _ in range(2):
            step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    taken: dict[str, list[Times]] = {norm: [] for norm in norms}
    for _ in range(steps):
        for norm, step in ready.items():
            synchronize(device)
            with profile(activities=activities, acc_events=True) as p, _Ranges(step.model) as ranges:
                step(ranges)
                synchronize(device)
            taken[norm].append(_ranges(p, device))
    return {norm: _medians(found) for norm, found in taken.items()}


def _medians(taken: list[Times]) -> Times:
    return {
        layer: {phase: statistics.median(t.get(layer, {}).get(phase, 0.0) for t in taken) for phase in phases}
        for layer, phases in taken[0].items()
    }
