"""The tuner: measures launch configurations and routes for the shapes of a model, and writes this GPU's table.

For every activation of the model, in the order of the bytes it stands for in a step:

    elementwise tiles   the batch norm's forward and input gradient, timed with each tile that can be launched
    reduction tiles     the batch norm's statistics and gradient sums, the same way
    routes              the whole operation, forward and backward, on the fused operators and on ATen

A configuration is timed only after its results have passed the rule of ``fastres.selfcheck`` on that shape. The default
is replaced only by something faster by more than the spread of both. What is measured is kept as it comes, so a run
that is stopped by its budget, or killed, goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import functional, selfcheck
from fastres._timing import Sample, interleaved
from fastres.functional import Choice
from fastres.kernels import _launch, _tuned
from fastres.kernels import batch_norm as bn_ops
from fastres.kernels._launch import ELEMENTWISE, REDUCTION, Tile, matrix, shape_class

__all__ = ["Job", "Tuner", "jobs", "write_json"]

_KINDS = {"elementwise": ELEMENTWISE, "reduction": REDUCTION}
_ROUTED = ("batch_norm", "add_relu", "max_pool")


class Job(NamedTuple):
    """One thing to measure: tiles of a kind, or routes of an operation, on one activation."""

    what: str  # elementwise, reduction, or the operation whose routes are measured
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    weight: int  # bytes of activation in the model that it stands for

    @property
    def name(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.what} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {layout}"


def jobs(choices: Iterable[Choice]) -> list[Job]:
    """What to measure for a model's decisions, the largest share of the bytes first; one job a shape class."""
    weights: dict[Job, int] = {}
    for c in choices:
        size = c.dtype.itemsize
        for d in c.shape:
            size *= d
        for what in (*_KINDS, c.op):
            if what in _KINDS or what in _ROUTED:
                job = Job(what, c.shape, c.dtype, c.layout != "NCHW", 0)
                weights[job] = weights.get(job, 0) + size
    return sorted((j._replace(weight=w) for j, w in weights.items()), key=lambda j: -j.weight)


def write_json(path: Path, data: Any) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


class _Inputs(NamedTuple):
    y: Tensor
    dz: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor


def _inputs(job: Job, device: torch.device, sets: int) -> list[_Inputs]:
    g = torch.Generator(device).manual_seed(0)
    memory = torch.channels_last if job.channels_last else torch.contiguous_format

    def activation() -> Tensor:
        t = torch.randn(job.shape, generator=g, device=device).to(job.dtype)
        return t.contiguous(memory_format=memory)

    made = []
    for _ in range(sets):
        c = job.shape[1]
        gamma, beta = (torch.randn(c, generator=g, device=device) for _ in range(2))
        y, dz = activation(), activation()
        made.append(_Inputs(y, dz, y.float().mean((0, 2, 3)), y.float().var((0, 2, 3), False), gamma, beta))
    return made


def _count(job: Job, device: torch.device) -> int:
    """Input sets that together exceed the L2 cache twice."""
    if device.type != "cuda":
        return 1
    bytes_ = 2 * job.dtype.itemsize
    for d in job.shape:
        bytes_ *= d
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, -(-2 * cache // max(bytes_, 1))))


def _kernels(kind: str, inputs: list[_Inputs]) -> Callable[[int], tuple[Tensor, ...]]:
    def elementwise(i: int) -> tuple[Tensor, ...]:
        v = inputs[i % len(inputs)]
        norm = (v.mean, v.var, v.gamma, v.beta, 1e-5)
        z = bn_ops.batch_norm_act(v.y, *norm, True, True, None, None)
        return z, bn_ops.batch_norm_backward(v.dz, v.y, *norm, True, None, v.gamma, v.beta, 1e-6)

    def reduction(i: int) -> tuple[Tensor, ...]:
        v = inputs[i % len(inputs)]
        sums = bn_ops.batch_norm_reduce(v.dz, v.y, v.mean, v.var, v.gamma, v.beta, 1e-5, True)
        return *bn_ops.batch_norm_stats(v.y, None, None, 0.0), *sums

    return elementwise if kind == "elementwise" else reduction


def _case(op: str, v: _Inputs) -> selfcheck.Case:
    """The operation of a route, on these inputs."""
    norm = {"bn.weight": v.gamma, "bn.bias": v.beta, "bn.mean": v.mean * 0, "bn.var": v.var * 0 + 1}
    one = {**norm, "y": v.y}
    if op == "add_relu":
        return selfcheck.block_end({**one, "identity": v.dz})
    return selfcheck.stem_pool(one) if op == "max_pool" else selfcheck.bn_relu(one)


def _run(case: selfcheck.Case, tensors: dict[str, Tensor], dz: Tensor, route: str) -> None:
    with functional.backend(route):
        out = case.run(tensors)
    torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad], dz)


class Tuner:
    """Measures jobs and holds the rows of a table.

    Args:
        device: the GPU; a CPU only to try the machinery.
        path: JSON file that keeps what was measured; read again when it exists and is this device's.
        fused: the backend that stands for the fused operators, ``triton`` on a GPU.
    """

    def __init__(self, device: torch.device, path: Path, fused: str = "triton") -> None:
        self.device, self.path, self.fused = device, path, fused
        gpu = device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if gpu else "CPU, a trial of the tuner"
        self.capability = torch.cuda.get_device_capability(device) if gpu else (0, 0)
        self.tiles: list[dict[str, Any]] = []
        self.routes: list[dict[str, Any]] = []
        self.refused: list[str] = []
        if path.exists():
            text = path.read_text()
            _tuned.parse(text, self.gpu, self.capability)  # a foreign or corrupt file is not overwritten
            data = json.loads(text)
            self.tiles, self.routes = data["tiles"], data["routes"]

    def _key(self, job: Job) -> dict[str, Any]:
        memory = torch.channels_last if job.channels_last else torch.contiguous_format
        m = matrix(torch.empty(job.shape, dtype=job.dtype, device="meta").contiguous(memory_format=memory))
        rows, cols = shape_class(m)
        return dict(nhwc=m.nhwc, rows=rows, cols=cols)

    def done(self, job: Job) -> bool:
        """Whether the table has an entry for the job's shape class already."""
        key = self._key(job)
        if job.what in _KINDS:
            return any(r["kind"] == job.what and all(r[k] == v for k, v in key.items()) for r in self.tiles)
        key["itemsize"] = job.dtype.itemsize
        return any(r["op"] == job.what and all(r[k] == v for k, v in key.items()) for r in self.routes)

    def measure(self, job: Job, rounds: int = 15, region: float = 0.01) -> str:
        """Measure one job, keep it, and say in a line what came out."""
        line = self._tile(job, rounds, region) if job.what in _KINDS else self._route(job, rounds, region)
        self.save()
        return line

    def _correct(self, kind: str, v: _Inputs, tile: Tile) -> bool:
        """Whether the kernels with this tile keep the rule on this shape."""
        case = _case("batch_norm", v)
        memory = (
            torch.channels_last
            if v.y.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        result = selfcheck.check(case, v.y.dtype, memory, self.fused, self.device)
        if not result.ok:
            self.refused.append(
                f"{kind} {list(tile)}: {result.error or f'{result.worst:.2f} in {result.what}'}"
            )
        return result.ok

    def _tile(self, job: Job, rounds: int, region: float) -> str:
        key, inputs = self._key(job), _inputs(job, self.device, _count(job, self.device))
        table: _launch.TileKey = (job.what, key["nhwc"], key["rows"], key["cols"])
        tiles = _KINDS[job.what][key["nhwc"]]
        _launch.use_tiles({})
        try:
            default = _launch.default_tile(job.what, matrix(inputs[0].y))
            right = []
            for tile in tiles:
                _launch.use_tiles({table: tile})
                if self._correct(job.what, inputs[0], tile):
                    right.append(tile)
            call = _kernels(job.what, inputs)

            def with_tile(tile: Tile) -> Callable[[int], object]:
                def timed(i: int) -> object:
                    _launch.use_tiles({table: tile})
                    return call(i)

                return timed

            samples = interleaved({str(t): with_tile(t) for t in right}, self.device, rounds, region)
        finally:
            _launch.use_tiles(None)
        best = _faster({t: samples[str(t)] for t in right}, default)
        if best is None:
            return f"{job.name}: no configuration is right"
        timed = {str(list(t)): samples[str(t)].median * 1e6 for t in right}
        self.tiles.append(
            dict(key, kind=job.what, tile=list(best), microseconds=timed, shape=list(job.shape))
        )
        return f"{job.name}: {list(best)}{'' if best != default else ' (the default)'}"

    def _route(self, job: Job, rounds: int, region: float) -> str:
        inputs = _inputs(job, self.device, _count(job, self.device))
        memory = torch.channels_last if job.channels_last else torch.contiguous_format
        cases = [_case(job.what, v) for v in inputs]
        result = selfcheck.check(cases[0], job.dtype, memory, self.fused, self.device)
        if not result.ok:
            self.refused.append(f"{job.name}: {result.error or f'{result.worst:.2f} in {result.what}'}")
        leaves = [selfcheck.leaves(c, job.dtype, memory) for c in cases]
        with torch.no_grad(), functional.backend("aten"):
            dz = torch.randn_like(cases[0].run(selfcheck.leaves(cases[0], job.dtype, memory)))

        def on(route: str) -> Callable[[int], object]:
            return lambda i: _run(cases[i % len(cases)], leaves[i % len(cases)], dz, route)

        routes = ("triton", "aten") if result.ok else ("aten",)
        backends = {"triton": self.fused, "aten": "aten"}
        samples = interleaved({r: on(backends[r]) for r in routes}, self.device, rounds, region)
        best = _faster(samples, "triton") or "aten"
        timed = {r: s.median * 1e6 for r, s in samples.items()}
        row = dict(self._key(job), op=job.what, itemsize=job.dtype.itemsize, route=best)
        self.routes.append(dict(row, microseconds=timed, shape=list(job.shape)))
        return f"{job.name}: {best}, " + ", ".join(f"{r} {us:.1f} us" for r, us in timed.items())

    def run(
        self, todo: list[Job], budget: float, say: Callable[[str], None], **effort: Any
    ) -> tuple[int, int]:
        """Measure what is not in the table yet until the budget, in seconds, is spent: (measured, left)."""
        stop, measured = time.perf_counter() + budget, 0
        open_ = [j for j in todo if not self.done(j)]
        for job in open_:
            if self.done(job):  # an earlier job had the same shape class
                continue
            if time.perf_counter() >= stop:
                break
            say(self.measure(job, **effort))
            measured += 1
        return measured, sum(not self.done(j) for j in todo)

    def save(self) -> None:
        write_json(
            self.path,
            dict(
                schema=_tuned.SCHEMA, gpu=self.gpu, capability=list(self.capability), torch=torch.__version__,
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"), tiles=self.tiles, routes=self.routes,
                refused=self.refused,
            ),
        )  # fmt: skip


def _faster(samples: dict[Any, Sample], default: Any) -> Any:
    """The fastest, unless the default is as fast within the spread; None where there is nothing."""
    if not samples:
        return None
    best = min(samples, key=lambda k: samples[k].median)
    if default in samples and samples[best].high >= samples[default].low:
        return default
    return best
