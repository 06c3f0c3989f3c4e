"""What a tuner measures: kernels on shape classes, operations, folded convolutions and blocks of a traced workload."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fastres._workload import Call, Workload, convolutions
from fastres.kernels._launch import matrix, tile_key
from fastres.kernels._tuned import Key

__all__ = ["KINDS", "Job", "Route", "Site", "jobs", "shares"]

# In the order in which they are measured: routes with kernels as they are then launched, and what is made of several
# convolutions after each of them.
KINDS = ("kernel", "operation", "convolution", "pair", "block")


class Job(NamedTuple):
    """One thing to measure: ``what`` is one of ``KINDS``."""

    what: str
    name: str
    subject: Any  # a Site, a Route, a Convolution (of kinds convolution and pair) or a Block
    weight: float  # bytes that it stands for; after ``shares`` a part of its workload's


class Site(NamedTuple):
    """A kernel on a shape class: its default, and the calls that launch it with how often a step makes them."""

    kernel: str
    key: Key
    default: tuple[int, ...]
    calls: dict[Call, int]


class Route(NamedTuple):
    """An operation on an activation."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def key(self) -> Key:
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        m = matrix(torch.empty(self.shape, dtype=self.dtype, device="meta").contiguous(memory_format=memory))
        return (*tile_key(m), self.dtype.itemsize)

    @property
    def bytes(self) -> int:
        """Read and written by one pass."""
        return 2 * math.prod(self.shape) * self.dtype.itemsize


def jobs(work: Workload) -> list[Job]:
    """Operations, folded convolutions and blocks of a workload, of each kind the largest first; kernels are found by
    launching (``Tuner.sites``)."""
    weights: dict[Route, int] = {}
    for c in work.choices:
        if c.op in ("batch_norm", "add_relu", "max_pool"):
            r = Route(c.op, c.shape, c.dtype, c.layout != "NCHW")
            weights[r] = weights.get(r, 0) + math.prod(c.shape) * c.dtype.itemsize
    found = [
        Job("operation", f"{r.op} {'x'.join(map(str, r.shape))} {str(r.dtype)[6:]} "
            f"{'channels_last' if r.channels_last else 'NCHW'}", r, w)
        for r, w in weights.items()
    ]  # fmt: skip
    found += [
        Job("convolution" if c.x2 is None else "pair", c.name, c, n * c.bytes)
        for c, n in convolutions(work.calls).items()
    ]
    found += [
        Job("block", f"{b.name} on {'x'.join(map(str, b.input.shape))} {str(b.input.dtype)[6:]} "
            f"stride {b.input.stride[1]}", b, n * b.input.bytes)
        for b, n in work.blocks.items()
    ]  # fmt: skip
    return sorted(found, key=_order)


def _order(job: Job) -> tuple[int, float]:
    return KINDS.index(job.what), -job.weight


def shares(*workloads: list[Job]) -> list[Job]:
    """The jobs of several workloads in one list, in the order of ``KINDS``, and by the share that each has among the
    jobs of its kind in its own step: so a small batch's first shapes come before a large one's last. A kernel that
    several of them launch on one shape class is one job, on the calls of all."""
    found: dict[str, Job] = {}
    for todo in workloads:
        sums = {kind: sum(j.weight for j in todo if j.what == kind) or 1.0 for kind in KINDS}
        for job in todo:
            job = job._replace(weight=job.weight / sums[job.what])
            if (before := found.get(job.name)) is not None:
                job = job._replace(weight=max(job.weight, before.weight))
                if job.what == "kernel":
                    calls = {**before.subject.calls, **job.subject.calls}
                    job = job._replace(subject=job.subject._replace(calls=calls))
            found[job.name] = job
    return sorted(found.values(), key=_order)
