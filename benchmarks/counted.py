"""The bytes and flops of a timed call, counted from its operators: what a row's time is to be seen against."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import NAMES, Case
from benchmarks.meter import DTYPES, Pass, trace, trace_call
from benchmarks.nets import NETWORKS
from benchmarks.plans import compiled
from fastres import functional

__all__ = ["counted"]


def _passes(case: Case, name: str, dtype: str, train: bool, gpu: bool) -> list[Pass]:
    a = NAMES[name]
    if case.network:
        batch, size = case.shapes[0][0], case.shapes[0][-1]
        return trace(case.name, a.norm, batch, dtype, train, a.channels_last, size, gpu).passes
    memory = torch.channels_last if a.channels_last else torch.contiguous_format
    with FakeTensorMode():
        module = case.build(a.norm)
        for p in module.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory)
        xs = [torch.empty(s, dtype=DTYPES[dtype]).contiguous(memory_format=memory) for s in case.shapes]
        return trace_call(module, [x.requires_grad_(train) for x in xs], DTYPES[dtype], train, gpu)


def counted(case: Case, name: str, dtype: str, train: bool, device: torch.device) -> dict[str, Any]:
    """``bytes``, ``flops`` and ``kernels`` of one call of an alternative; of torch.compile by the model of ``plans``.
    Empty where it is not known: other packages' networks, and fastres's operators regrouped by torch.compile."""
    a = NAMES[name]
    if (
        a.norm not in ("BN", "FusedBN")
        or (a.how and a.norm != "BN")
        or (case.network and case.name not in NETWORKS)
    ):
        return {}
    with functional.conv3x3("triton" if a.own3x3 else "cudnn"):
        passes = _passes(case, name, dtype, train, device.type == "cuda")
    passes = compiled(passes) if a.how else passes
    return dict(bytes=sum(p.bytes for p in passes), flops=sum(p.flops for p in passes), kernels=len(passes))
