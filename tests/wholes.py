"""Blocks as one differentiable function beside their parts: what the tests of both kinds share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import _block_end
from fastres import functional as fn
from tests.cases import Route, node_names
from tests.tolerance import poison

LAST = torch.channels_last


def layer(blocks: int = 1, kind: type[nn.Module] = fastres.Bottleneck, **options: Any) -> fastres.ResLayer:
    torch.manual_seed(4)
    options = dict(in_channels=16, out_channels=16) | options
    made = fastres.ResLayer(kind, blocks, **options)
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    return made.to(memory_format=LAST).train()


def image(c: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    x = torch.randn(3, c, 7, 6).to(device, dtype).contiguous(memory_format=LAST)
    return x.requires_grad_()


@contextmanager
def by_parts() -> Iterator[None]:
    """Blocks are evaluated part by part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_block_end, "whole", lambda *args: None)
        yield


def taken(out: Tensor) -> bool:
    """Whether the last block was evaluated as one."""
    return bool({"_BottleneckBackward", "_BasicBlockBackward"} & set(node_names(out)))


def step(net: nn.Module, x: Tensor, dy: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output, gradients and buffers after one step."""
    leaf = x.detach().requires_grad_()
    out = (run or (lambda net, leaf: net(leaf)))(net, leaf)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dy.to(out.dtype))
    return [out.detach(), leaf.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def agree(
    route: Route, net: nn.Module, x: Tensor, dy: Tensor, around: Any = nullcontext, passes: int = 1
) -> Tensor:
    """The whole and the parts give the same bits and routes, and the whole saves no more; the output. ``passes``:
    the last one counts."""
    results, logs, saved = [], [], []
    for way in (nullcontext, by_parts):
        model, sizes = copy.deepcopy(net), {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            way(),
            fn.backend(route.backend),
            fn.moments("on"),
            fn.record_routes() as log,
            poison(),
            around(),
        ):
            for _ in range(passes - 1):
                model(x)
                model.load_state_dict(net.state_dict())
                log.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                results.append(step(model, x, dy))
        logs.append([(c.op, c.shape, c.dtype, c.layout, c.route, c.reason) for c in log])
        saved.append(sum(sizes.values()))
    assert logs[0] == logs[1]
    assert 0.9 * saved[1] < saved[0] <= saved[1]
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)
    return results[0][0]


def errors_change_nothing(net: nn.Module, x: Tensor, what: str) -> None:
    """A last norm that does not fit: ``gamma`` or ``running`` of another size, or ``one value`` a channel."""
    if what == "one value":
        x = x[:1, :, :1, :1].detach().contiguous(memory_format=LAST).requires_grad_()
    if what == "gamma":
        net[0].last_norm.weight = nn.Parameter(torch.ones(3))  # type: ignore[index]
    if what == "running":
        net[0].last_norm.running_var = torch.ones(3)  # type: ignore[index]
    before = copy.deepcopy(net.state_dict())
    with fn.backend("reference"), fn.moments("on"), pytest.raises(ValueError):
        net(x)
    now = net.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in now)


def second_derivative_is_refused(net: nn.Module, x: Tensor) -> None:
    """Of a net that is one node a block."""
    with fn.backend("reference"), fn.moments("on"):
        out = net(x)
        assert taken(out)
        (dx,) = torch.autograd.grad(out, x, torch.randn(out.shape), create_graph=True)
        with pytest.raises(NotImplementedError, match="a second derivative through the fused kernels"):
            dx.sum().backward()
