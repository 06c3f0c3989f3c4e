"""The tuner: measures launch configurations and routes for the shapes of a model, and writes this GPU's table.

From traced training steps and inference passes (``fastres._workload``), in this order, and in each part the largest
share first:

    kernels       for every shape class that a kernel is launched on, each configuration that may be launched there, on
                  the operator calls that reach it
    operations    batch norm, block end and pooling, forward and backward, on the fused operators and on ATen
    convolutions  of inference, with the norm folded in: the block end's product, cuDNN's fused convolution, and a plain
                  one with its addition and ReLU behind it
    pairs         a block end of inference with the downsample's convolution in its product, and as two convolutions
    blocks        a residual block forward and backward, with each of the routes that it asks for (the moment form or
                  the pending form at its end, joint gradients or autograd's at its start)

So routes are compared with kernels as they are then launched. Whatever is timed has passed the tolerance rule against
float64 on that shape before. The default is replaced only by something faster by more than the spread of both. What is
measured is kept as it comes, so a run that is stopped by its budget, or killed, goes on where it stopped.

Nothing in the package tunes unless this is called, and it refuses inside the capture of a CUDA graph.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres import _trials, functional, selfcheck
from fastres._jobs import Job, Route, Site
from fastres._timing import Sample, interleaved
from fastres._workload import Block, Call, Convolution
from fastres.kernels import _tuned
from fastres.kernels._tuned import Key, Lookup, Table

__all__ = ["Tuner", "write_json"]

_CHECKED = 16  # images a block is checked on at most: float64 takes four times the memory


def write_json(path: Path, data: Any) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def _sets(bytes_: int, device: torch.device) -> int:
    """Input sets that together exceed the L2 cache twice."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, -(-2 * cache // max(bytes_, 1))))


def _faster(samples: Mapping[Any, Sample], default: Any) -> Any:
    """The fastest, unless the default is as fast within the spread; None where there is nothing."""
    if not samples:
        return None
    best = min(samples, key=lambda k: samples[k].median)
    if default in samples and samples[best].high >= samples[default].low:
        return default
    return best


def _total(samples: Iterable[tuple[Sample, int]]) -> Sample:
    """Time of several calls, each as often as a step makes it."""
    parts = list(samples)
    median, low, high, least = (sum(s[i] * n for s, n in parts) for i in range(4))
    return Sample(median, low, high, least, min(s.rounds for s, _ in parts), min(s.calls for s, _ in parts))


class Tuner:
    """Measures jobs and holds the rows of a table.

    Args:
        device: the GPU; a CPU only to try the machinery.
        path: JSON file that keeps what was measured; read again when it exists and is this device's.
        fused: the backend that stands for the fused operators, ``triton`` on a GPU and in Triton's interpreter.
        rounds, region, warmup: of the timing (``fastres._timing``).
    """

    def __init__(
        self, device: torch.device, path: Path, fused: str = "triton", rounds: int = 15, region: float = 0.01,
        warmup: int = 3,
    ) -> None:  # fmt: skip
        self.device, self.path, self.fused = device, path, fused
        self.timing: dict[str, Any] = dict(device=device, rounds=rounds, region=region, warmup=warmup)
        gpu = device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(device) if gpu else "CPU, a trial of the tuner"
        self.capability = torch.cuda.get_device_capability(device) if gpu else (0, 0)
        self.configs: list[dict[str, Any]] = []
        self.routes: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self.tried: list[str] = []  # jobs of which nothing could be timed
        if path.exists():
            text = path.read_text()
            _tuned.parse(text, self.gpu, self.capability)  # a foreign or corrupt file is not overwritten
            data = json.loads(text)
            self.configs, self.routes = data["configs"], data["routes"]
            self.refused, self.tried = data["refused"], data["tried"]

    def table(self) -> Table:
        """The choices made so far."""
        return _tuned.parse(json.dumps(self._data()), self.gpu, self.capability, str(self.path))

    # ------------------------------------------------------------------------------------------- what there is

    def sites(self, calls: dict[Call, int]) -> list[Job]:
        """Run every call once to see which kernels it launches on which shape classes; the largest share first."""
        found: dict[tuple[str, Key], Site] = {}
        for call, count in calls.items():
            with _tuned.using(_tuned.EMPTY), _tuned.watch() as asked:
                _trials.outcome(call, _trials.inputs(call, self.device))
            for item in dict.fromkeys(asked):
                site = found.setdefault(
                    (item.name, item.key), Site(item.name, item.key, tuple(item.default), {})
                )
                site.calls[call] = count
        made = [
            Job("kernel", f"{s.kernel} {list(s.key)}", s, sum(c.bytes * n for c, n in s.calls.items()))
            for s in found.values()
        ]
        return sorted(made, key=lambda j: -j.weight)

    def _has(self, lookups: Iterable[tuple[str, Key]]) -> bool:
        rows = {(r["op"], tuple(r["key"])) for r in self.routes}
        return all(item in rows for item in lookups)

    def done(self, job: Job) -> bool:
        """Whether the table has what the job would find, or nothing came of it before."""
        if job.name in self.tried:
            return True
        if job.what == "kernel":
            key = (job.subject.kernel, list(job.subject.key))
            return any((r["kernel"], r["key"]) == key for r in self.configs)
        if job.what != "block":
            return self._has([(job.subject.op, job.subject.key)])
        return any(job.name == r.get("block") for r in self.routes)

    # --------------------------------------------------------------------------------------------- measuring

    def run(
        self, todo: list[Job], budget: float, say: Callable[[str], None], model: nn.Module | None = None
    ) -> tuple[int, int]:
        """Measure what is not in the table yet until the budget, in seconds, is spent: (measured, left).

        ``model`` is where blocks are taken from. RuntimeError while a CUDA graph is being captured.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("fastres tune: a CUDA graph is being captured; tune before or after")
        stop, measured = time.perf_counter() + budget, 0
        for job in todo:
            if self.done(job):
                continue
            if time.perf_counter() >= stop:
                break
            with _tuned.using(self.table()):
                if job.what == "kernel":
                    line = self._kernel(job)
                elif job.what == "operation":
                    line = self._operation(job)
                elif job.what == "block":
                    assert model is not None
                    line = self._block(job, model)
                else:
                    line = self._convolution(job)
            if not self.done(job):
                self.tried.append(job.name)
            self.save()
            say(line)
            measured += 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return measured, sum(not self.done(j) for j in todo)

    def _refuse(self, what: str, worst: float, why: str = "") -> None:
        self.refused.append(f"{what}: {why or f'{worst:.2f} of the allowed error'}")

    def _kernel(self, job: Job) -> str:
        site: Site = job.subject
        base = _tuned.active()

        def forced(config: tuple[int, ...]) -> Table:
            return base._replace(configs={**base.configs, (site.kernel, site.key): config})

        right = list(_tuned.candidates(site.kernel, site.key))
        for call in site.calls:
            args = _trials.inputs(call, self.device)
            dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.dim() == 4)
            plain, wide = _trials.references(call, args)
            for config in list(right):
                worst, why = float("inf"), ""
                try:
                    with _tuned.using(forced(config)):
                        worst = _trials.ratio(_trials.outcome(call, args), plain, wide, dtype)
                except (
                    Exception
                ) as error:  # a configuration that cannot be launched here must not end the run
                    why = f"{type(error).__name__}: {error}"
                if not worst <= 1.0:
                    right.remove(config)
                    self._refuse(f"{job.name} {list(config)} in {call.name}", worst, why)
            del args, plain, wide
        times: dict[tuple[int, ...], list[tuple[Sample, int]]] = {c: [] for c in right}
        for call, count in site.calls.items():
            given = [_trials.inputs(call, self.device, i) for i in range(_sets(call.bytes, self.device))]
            timed = {str(c): _timed(forced(c), call, given) for c in right}
            with _tuned.using(base):
                found = interleaved(timed, **self.timing)
            for c in right:
                times[c].append((found[str(c)], count))
        samples = {c: _total(s) for c, s in times.items() if s}
        best = _faster(samples, site.default)
        if best is None:
            return f"{job.name}: no configuration is right"
        self.configs.append(
            dict(
                kernel=site.kernel, key=list(site.key), config=list(best), default=list(site.default),
                microseconds={str(list(c)): s.median * 1e6 for c, s in samples.items()},
                calls=[c.name for c in site.calls],
            )
        )  # fmt: skip
        return f"{job.name}: {list(best)}{'' if best != site.default else ' (the default)'}"

    def _operation(self, job: Job) -> str:
        r: Route = job.subject
        memory = torch.channels_last if r.channels_last else torch.contiguous_format
        cases = [_trials.case(r, self.device, i) for i in range(_sets(r.bytes, self.device))]
        result = selfcheck.check(cases[0], r.dtype, memory, self.fused, self.device)
        if not result.ok:
            self._refuse(f"{job.name} in {result.what}", result.worst, result.error)
        leaves = [selfcheck.leaves(c, r.dtype, memory) for c in cases]
        with torch.no_grad(), functional.backend("aten"):
            dz = torch.randn_like(cases[0].run(selfcheck.leaves(cases[0], r.dtype, memory)))

        def on(route: str) -> Callable[[int], object]:
            return lambda i: _trials.step(cases[i % len(cases)], leaves[i % len(cases)], dz, route)

        backends = {"triton": self.fused, "aten": "aten"}
        names = _tuned.ROUTES[r.op] if result.ok else ("aten",)
        samples = interleaved({n: on(backends[n]) for n in names}, **self.timing)
        best = _faster(samples, "triton") or "aten"
        timed = {n: s.median * 1e6 for n, s in samples.items()}
        self.routes.append(
            dict(op=r.op, key=list(r.key), route=best, microseconds=timed, shape=list(r.shape))
        )
        return f"{job.name}: {best}, " + ", ".join(f"{n} {us:.1f} us" for n, us in timed.items())

    @torch.no_grad()
    def _convolution(self, job: Job) -> str:
        """A folded convolution, or a pair of them, on each of its routes."""
        c: Convolution = job.subject
        sets = [_trials.operands(c, self.device, i) for i in range(_sets(c.bytes, self.device))]
        plain, wide = _trials.folded_references(c, sets[0])
        made = [_trials.ways(c, operands) for operands in sets]
        right = []
        for name, way in made[0].items():
            worst, why = float("inf"), ""
            try:
                worst = _trials.ratio([way()], [plain], [wide], c.x.dtype)
            except Exception as error:  # a route that does not exist here must not end the run
                why = f"{type(error).__name__}: {error}"
            if worst <= 1.0:
                right.append(name)
            else:
                self._refuse(f"{job.name} {name}", worst, why)
        del plain, wide

        def on(name: str) -> Callable[[int], object]:
            return lambda i: made[i % len(made)][name]()

        samples = interleaved({n: on(n) for n in right}, **self.timing)
        best = _faster(samples, _tuned.ROUTES[c.op][0])
        if best is None:
            return f"{job.name}: no route is right"
        timed = {n: s.median * 1e6 for n, s in samples.items()}
        self.routes.append(dict(op=c.op, key=list(c.key), route=best, microseconds=timed, convolution=c.name))
        return f"{job.name}: {best}, " + ", ".join(f"{n} {us:.1f} us" for n, us in timed.items())

    def _block(self, job: Job, model: nn.Module) -> str:
        """Choose each route that the block asks for in turn, the others as chosen so far."""
        subject: Block = job.subject
        base = _tuned.active()
        block = copy.deepcopy(model.get_submodule(subject.name)).to(self.device).train()
        x = _trials._tensor("x", subject.input, torch.Generator(self.device).manual_seed(0), self.device)
        few = x[: max(1, min(x.shape[0], _CHECKED))].clone(memory_format=torch.preserve_format)
        dtype = subject.input.dtype
        asked, few_asked = self._asked(block, x, dtype), self._asked(block, few, dtype)
        if not asked:
            return f"{job.name}: no choice"
        chosen = {item.name: item.default for item in asked}
        timed: dict[str, dict[str, float]] = {}

        def table(routes: dict[str, str]) -> Table:
            forced = {(i.name, i.key): routes[i.name] for i in (*asked, *few_asked) if i.name in routes}
            return base._replace(routes={**base.routes, **forced})

        for item in asked:
            tables = {}
            for name in _tuned.ROUTES[item.name]:
                with _tuned.using(table({**chosen, item.name: name})):
                    worst, what = _trials.block_ratio(block, few, dtype, self.fused)
                if worst <= 1.0:
                    tables[name] = table({**chosen, item.name: name})
                else:
                    self._refuse(f"{job.name}, {item.name} {name} in {what}", worst)

            def on(name: str, tables: dict[str, Table] = tables) -> Callable[[int], object]:
                def once(i: int) -> object:
                    _tuned.reset(tables[name])
                    with functional.backend(self.fused):
                        return _trials.block_outcome(block, x, dtype)

                return once

            with _tuned.using(base):
                samples = interleaved({n: on(n) for n in tables}, **self.timing)
            best = _faster(samples, item.default)
            if best is None:
                continue
            chosen[item.name] = best
            timed[item.name] = {n: s.median * 1e6 for n, s in samples.items()}
            self.routes.append(
                dict(
                    op=item.name,
                    key=list(item.key),
                    route=best,
                    microseconds=timed[item.name],
                    block=job.name,
                )
            )
        return f"{job.name}: " + ", ".join(
            f"{op} {chosen[op]} ({', '.join(f'{n} {us:.1f} us' for n, us in t.items())})"
            for op, t in timed.items()
        )

    def _asked(self, block: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Lookup]:
        """The routes that a block asks for, without those of plain activations, which are operations."""
        with _tuned.using(_tuned.EMPTY), _tuned.watch() as seen, functional.backend(self.fused):
            _trials.block_outcome(block, x, dtype)
        wanted = [
            i
            for i in seen
            if i.name in _tuned.ROUTES and i.name not in ("batch_norm", "add_relu", "max_pool")
        ]
        return list({(i.name, i.key): i for i in wanted}.values())

    # ---------------------------------------------------------------------------------------------- keeping

    def _data(self) -> dict[str, Any]:
        return dict(
            schema=_tuned.SCHEMA, gpu=self.gpu, capability=list(self.capability), torch=torch.__version__,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"), configs=self.configs, routes=self.routes,
            refused=self.refused, tried=self.tried,
        )  # fmt: skip

    def save(self) -> None:
        write_json(self.path, self._data())


def _timed(table: Table, call: Call, given: list[tuple[Any, ...]]) -> Callable[[int], object]:
    """A call as a function of its number, with a table in force; the caller puts the old one back."""

    def once(i: int) -> object:
        _tuned.reset(table)
        return _trials.outcome(call, given[i % len(given)])

    return once
