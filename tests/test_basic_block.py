"""A block of two 3x3 convolutions as one differentiable function: the same bits as its parts, and when it is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastres
from fastres import functional as fn
from fastres.kernels import basic_block as fused
from tests.cases import Route, node_names, routes
from tests.wholes import (
    LAST,
    agree,
    errors_change_nothing,
    image,
    layer,
    second_derivative_is_refused,
    step,
    taken,
)

BLOCKS: dict[str, dict[str, Any]] = {
    "identity": dict(in_channels=16),
    "downsample": dict(in_channels=8),
    "strided": dict(in_channels=8, stride=2),
    "dilated": dict(in_channels=16, dilation=2),
    "odd": dict(in_channels=9, out_channels=21, stride=2),
    "one": dict(in_channels=8, out_channels=1),
}


def stage(blocks: int = 1, **options: Any) -> fastres.ResLayer:
    return layer(blocks, fastres.BasicBlock, **options)


@routes()
@pytest.mark.parametrize("moments", ["on", "off"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits(route: Route, block: str, dtype: torch.dtype, moments: str) -> None:
    """With a downsample in its moment form, or its convolution by PyTorch."""
    if dtype == torch.float64 and route.backend == "triton":
        pytest.skip("float64 has no kernel")
    if moments == "off" and "down" not in block and "stride" not in BLOCKS[block]:
        pytest.skip("has no downsample")
    net = stage(**BLOCKS[block]).to(route.device, dtype)
    x = image(BLOCKS[block]["in_channels"], dtype, route.device)
    around = lambda: fn.moments(moments)  # noqa: E731
    with fn.backend(route.backend), around():
        out = net(x)
        assert taken(out)
    agree(route, net, x, torch.randn(out.shape).to(route.device), around)


@routes()
@pytest.mark.parametrize("moments", ["on", "off"])
@pytest.mark.parametrize("cached", [False, True])
def test_same_bits_under_autocast(route: Route, cached: bool, moments: str) -> None:
    """A whole network casts its weights at once, from the second pass on; a layer alone one by one."""
    net: nn.Module = stage(2, in_channels=8, stride=2)
    x = image(8, torch.bfloat16)
    if cached:
        net = fastres.ResNet(18, base_channels=8, stem_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1),
                             out_indices=(1,))  # fmt: skip
        x = torch.randn(2, 3, 32, 32).contiguous(memory_format=LAST)
    net, x = net.to(route.device, memory_format=LAST).train(), x.to(route.device)
    shape = (2, 16, 4, 4) if cached else (3, 16, 4, 3)

    def around() -> Any:
        stack = torch.autocast(route.device, torch.bfloat16)
        return _both(stack, fn.moments(moments))

    out = agree(route, net, x, torch.randn(shape).to(route.device), around, 2 if cached else 1)
    assert out.dtype == torch.bfloat16


class _both:
    """Two contexts as one."""

    def __init__(self, *contexts: Any) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for c in self.contexts:
            c.__enter__()

    def __exit__(self, *error: Any) -> None:
        for c in reversed(self.contexts):
            c.__exit__(*error)


PARTS: dict[str, Callable[[fastres.ResLayer], Any]] = {
    "frozen gamma": lambda net: net[0].bn2.weight.requires_grad_(False),
    "frozen weight": lambda net: net[0].conv1.weight.requires_grad_(False),
    "running statistics": lambda net: net[0].bn1.eval(),
    "skip_nonfinite_stats": lambda net: setattr(net[0].bn2, "skip_nonfinite_stats", True),
    "hook on a convolution": lambda net: net[0].conv2.register_forward_hook(lambda *a: None),
    "drop path": lambda net: setattr(net[0], "drop_path", fastres.modules.DropPath(0.5)),
    "own 3x3": lambda net: None,
    "no gradient": lambda net: None,
    "nchw": lambda net: net.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("why", PARTS)
def test_parts_where_it_is_not_the_usual_case(why: str) -> None:
    net, x = stage(), image()
    PARTS[why](net)
    x = x.detach() if why == "no gradient" else x
    x = x.detach().contiguous().requires_grad_() if why == "nchw" else x
    with fn.backend("reference"), fn.conv3x3("triton" if why == "own 3x3" else "cudnn"):
        out = net(x)
    assert not taken(out)
    out.sum().backward()


def test_a_stage_is_one_node_a_block() -> None:
    with fn.backend("reference"), fn.moments("on"):
        names = node_names(stage(3, in_channels=8, stride=2)(image(8)))
    assert names == {"_BasicBlockBackward", "AccumulateGrad"}


@pytest.mark.parametrize("in_channels", [16, 8])
def test_second_derivative_is_refused(in_channels: int) -> None:
    second_derivative_is_refused(stage(in_channels=in_channels), image(in_channels))


@pytest.mark.parametrize("at", ["conv1", "conv2", "downsample"])
def test_a_convolution_in_another_layout(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """PyTorch chooses the layout of a convolution's result. Whatever it is, statistics are updated once."""
    net, x, dy = stage(2, in_channels=8), image(8), torch.randn(3, 16, 7, 6)
    order, calls = ["conv1", "conv2", "downsample"], []

    def convolve(*args: Any) -> torch.Tensor:
        calls.append(1)
        y = torch.conv2d(*args)
        return y.contiguous() if order[(len(calls) - 1) % 3] == at else y

    with fn.backend("reference"), fn.moments("off"):
        want = step(copy.deepcopy(net), x, dy)
        monkeypatch.setattr(fused, "_convolve", convolve)
        got = step(copy.deepcopy(net), x, dy)
    assert calls
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["gamma", "running", "one value"])
def test_errors_change_nothing(what: str) -> None:
    errors_change_nothing(stage(stride=2 if what == "one value" else 1), image(), what)
