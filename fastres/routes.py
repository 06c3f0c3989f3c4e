"""Which route every layer of a model takes, and why, from a traced pass on fake tensors: nothing is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres import functional
from fastres.functional import Choice

__all__ = ["Route", "fake_model", "routes"]


class Route(NamedTuple):
    """A routing decision and the layer it was taken for (empty where no norm names it)."""

    layer: str
    choice: Choice


def fake_model(build: Any, mode: FakeTensorMode, memory: torch.memory_format) -> nn.Module:
    """A model whose parameters have shape, dtype and layout but no values."""
    with mode:
        model = build()
        for p in model.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory)
    return model


def routes(
    build: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    train: bool = True,
    capability: tuple[int, int] | None = None,
) -> list[Route]:
    """The decisions of one forward pass.

    Args:
        build: makes the model; called under fake tensors.
        shape: [N, C, H, W] of the input.
        dtype: float16 and bfloat16 run under autocast.
        channels_last: memory format of input and weights.
        train: training mode, else eval.
        capability: compute capability of the GPU to decide for, whether or not there is one; None: the CPU.
    """
    mode = FakeTensorMode()
    memory = torch.channels_last if channels_last else torch.contiguous_format
    model = fake_model(build, mode, memory).train(train)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        for v in (getattr(module, "weight", None), getattr(module, "running_mean", None)):
            if isinstance(v, Tensor):
                names.setdefault(id(v), name)
    with mode:
        x = torch.empty(shape).contiguous(memory_format=memory)
        reduced = dtype != torch.float32
        with (
            functional.record_routes() as log,
            torch.autocast("cpu", dtype if reduced else None, enabled=reduced),
        ):
            with torch.set_grad_enabled(train):
                if capability is None:
                    model(x)
                else:
                    with functional.assume_gpu(capability):
                        model(x)
    return [Route(names.get(c.key, ""), c) for c in log]
