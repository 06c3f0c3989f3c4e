"""Tensors saved for backward that hooks give back in other strides, as offloading to the CPU does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import functional as fn
from tests.cases import Route, routes
from tests.wholes import LAST, by_parts, image, layer, step


def _turn(t: Tensor) -> Tensor:
    """The same values in other strides."""
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.contiguous_format if t.shape[1] > 1 else LAST).clone()
    wide = t.new_empty((*t.shape, 2))[..., 0]
    return wide.copy_(t)


@contextmanager
def turned() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, _turn):
        yield


def stem() -> nn.Module:
    options = dict(depth=18, base_channels=8, stem_channels=8, num_stages=1, strides=(1,), dilations=(1,))
    return fastres.ResNet(**options, out_indices=(0,)).to(memory_format=LAST).train()


def dropping(kind: type[nn.Module], **options: Any) -> nn.Module:
    made = layer(1, kind, **options)
    made[0].drop_path = fastres.modules.DropPath(0.5)
    return made


Form = tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[Callable[[], Any], ...]]
FORMS: dict[str, Form] = {
    "bottlenecks": (lambda: layer(2, in_channels=8, stride=2), lambda: image(8), ()),
    "their parts": (lambda: layer(2, in_channels=8, stride=2), lambda: image(8), (by_parts,)),
    "no moments": (lambda: layer(1, in_channels=8), lambda: image(8), (lambda: fn.moments("off"),)),
    "recomputed": (lambda: layer(1), image, (lambda: fn.memory("recompute"),)),
    "own 3x3": (lambda: layer(1), image, (lambda: fn.conv3x3("triton"),)),
    "drop path": (lambda: dropping(fastres.Bottleneck), image, ()),
    "basic blocks": (
        lambda: layer(2, fastres.BasicBlock, in_channels=8, stride=2), lambda: image(8), (),
    ),
    "their parts, basic": (
        lambda: layer(2, fastres.BasicBlock, in_channels=8, stride=2), lambda: image(8), (by_parts,),
    ),
    "basic, no moments": (
        lambda: dropping(fastres.BasicBlock, in_channels=8, stride=2), lambda: image(8), (lambda: fn.moments("off"),),
    ),
    "stem": (stem, lambda: torch.randn(2, 3, 20, 20).contiguous(memory_format=LAST), ()),
}  # fmt: skip


@routes()
@pytest.mark.parametrize("form", FORMS)
def test_strides_are_put_right(route: Route, form: str) -> None:
    make, tensor, contexts = FORMS[form]
    net, x, results = make().to(route.device), tensor().to(route.device), []
    for way in (None, turned):
        with ExitStack() as stack:
            stack.enter_context(fn.backend(route.backend))
            stack.enter_context(fn.moments("on"))
            for context in (*contexts, *([way] if way else [])):
                stack.enter_context(context())
            torch.manual_seed(0)
            model = copy.deepcopy(net)
            with torch.no_grad():
                shape = copy.deepcopy(net)(x)
            shape = shape[0] if isinstance(shape, tuple) else shape
            torch.manual_seed(1)
            results.append(step(model, x, torch.randn(shape.shape).to(route.device)))
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        # PyTorch's convolutions have saved tensors of their own, and other kernels for other strides.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_winograd() -> None:
    net = nn.Sequential(layer(2, fastres.BasicBlock))
    x, dy, results = image(), torch.randn(3, 16, 7, 6), []
    for way in (None, turned):
        with ExitStack() as stack:
            stack.enter_context(fn.winograd("on"))
            if way:
                stack.enter_context(way())
            results.append(step(copy.deepcopy(net), x, dy))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_offloaded(pinned: bool) -> None:
    net, x, dy = layer(2, in_channels=8, stride=2).cuda(), image(8).cuda(), torch.randn(3, 16, 4, 3).cuda()
    want = step(copy.deepcopy(net), x, dy)
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        got = step(copy.deepcopy(net), x, dy)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
