"""Train a module for a few steps and record everything a difference could show in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.tolerance import assert_close64

Record = dict[str, Tensor]


def randomize(module: nn.Module, seed: int = 7) -> nn.Module:
    """Parameters and running statistics as after some training: no zeros, no ones, gains of either sign."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if not t.is_floating_point():
                continue
            r = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
            if name.endswith("running_var"):
                t.copy_(1 + r.abs())
            elif t.dim() > 1:
                t.copy_(r * (2 / t[0].numel()) ** 0.5)
            else:
                t.copy_(r * 0.3 + (1 if name.endswith("weight") else 0))
    return module


def like(reference: nn.Module, module: nn.Module) -> nn.Module:
    """``reference`` with the weights of ``module``; every key must fit."""
    reference.load_state_dict(module.state_dict(), strict=True)
    return reference.train(module.training)


def train_steps(
    module: nn.Module,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float = 0.05,
    record_gradients: bool = True,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Record:
    """One SGD step for each input and output gradient; all values, gradients and buffers by name."""
    record: Record = {}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr) if parameters else None
    for i, (x, dy) in enumerate(zip(inputs, gradients, strict=True)):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = call(module, x) if call else module(x)
        record[f"step {i} output"] = y.detach()
        y.backward(dy)
        if record_gradients:
            record[f"step {i} input gradient"] = x.grad
            for name, p in module.named_parameters():
                if p.grad is not None:
                    record[f"step {i} gradient of {name}"] = p.grad.clone()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        for name, t in module.named_buffers():
            record[f"step {i} buffer {name}"] = t.detach().clone()
    return record


def steps(shape: Sequence[int], out: Sequence[int], count: int, seed: int = 11) -> tuple[list, list]:
    """``count`` inputs and output gradients in float64, as lists."""
    g = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(tuple(shape), generator=g, dtype=torch.float64) for _ in range(count)],
        [torch.randn(tuple(out), generator=g, dtype=torch.float64) for _ in range(count)],
    )


def cast(tensors: Sequence[Tensor], dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    return [t.to(dtype).contiguous(memory_format=layout) for t in tensors]


def assert_parity(
    ours: nn.Module,
    plain: nn.Module,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    lr: float = 0.05,
    record_gradients: bool = True,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Record:
    """The rule of ``tests.tolerance`` for everything :func:`train_steps` records.

    ``plain`` has the weights of ``ours`` and runs in ``dtype`` (eager) and in float64 (reference), from the same
    rounded inputs and weights. Returns our record.

    Eager's error is a draw: another thread count or layout sums in another order, and the error of one tensor then
    moves by several times. Where the first eager run leaves no room, three more that are the same mathematics (the
    batch reversed, the other layout) say how large eager's error may be.
    """
    ours.to(dtype)
    eager = plain.to(dtype)
    reference, spare = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    x, dy = cast(inputs, dtype, layout), cast(gradients, dtype, layout)
    options = dict(lr=lr, record_gradients=record_gradients, call=call)
    got = train_steps(ours, x, dy, **options)
    other = train_steps(eager, x, dy, **options)
    want = train_steps(reference, [t.double() for t in x], [t.double() for t in dy], **options)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    draws = [other]
    for name, value in want.items():
        if not value.is_floating_point():
            assert torch.equal(got[name], value), f"{name}: {got[name]}, reference {value}"
            continue
        # A gradient that cancels to nothing is held against the size of the others of its step.
        scale = _scale(name, want)
        try:
            assert_close64(name, got[name], other[name], value.double(), dtype, scale=scale)
        except AssertionError:
            if len(draws) == 1:
                draws += _other_orders(spare, x, dy, options)
            worst = max((d[name] for d in draws), key=lambda t: float((t.double() - value).abs().max()))
            assert_close64(name, got[name], worst, value.double(), dtype, scale=scale)
    return got


def _other_orders(
    eager: nn.Module, x: Sequence[Tensor], dy: Sequence[Tensor], options: dict[str, Any]
) -> list[Record]:
    """The records of eager runs that sum in other orders: the batch reversed, the other layout, and both."""
    records = []
    for reverse, layout in ((True, None), (False, other := _other_layout(x[0])), (True, other)):
        inputs, gradients = ([t.flip(0) if reverse else t for t in ts] for ts in (x, dy))
        if layout is not None:
            inputs, gradients = cast(inputs, x[0].dtype, layout), cast(gradients, x[0].dtype, layout)
        record = train_steps(copy.deepcopy(eager), inputs, gradients, **options)
        if reverse:
            per_sample = ("output", "input gradient")
            record = {k: v.flip(0) if k.endswith(per_sample) else v for k, v in record.items()}
        records.append(record)
    return records


def _other_layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous() else torch.contiguous_format


def _scale(name: str, want: Record) -> float:
    if "gradient of" not in name:
        return 0.0
    step = name.split(" gradient")[0]
    return float(want[f"{step} input gradient"].abs().max())
