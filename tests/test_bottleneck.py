"""A bottleneck as one differentiable function: the same bits as its parts one after the other, and when it is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import functional as fn
from fastres.kernels import bottleneck as fused
from tests.cases import Route, node_names, routes
from tests.launches import on_cpu
from tests.wholes import (
    agree,
    by_parts,
    errors_change_nothing,
    image,
    layer,
    second_derivative_is_refused,
    step,
    taken,
)

LAST = torch.channels_last
BLOCKS: dict[str, dict[str, Any]] = {
    "identity": dict(in_channels=16),
    "downsample": dict(in_channels=8),
    "strided": dict(in_channels=8, stride=2),
    "dilated": dict(in_channels=16, dilation=2),
    "grouped": dict(in_channels=16, groups=2),
    "odd": dict(in_channels=9, out_channels=20, stride=2),
    "one": dict(in_channels=8, out_channels=1, expansion=1),
}


@routes()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits(route: Route, block: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and route.backend == "triton":
        pytest.skip("float64 has no kernel")
    net = layer(**BLOCKS[block]).to(route.device, dtype)
    x = image(BLOCKS[block]["in_channels"], dtype, route.device)
    with fn.backend(route.backend), fn.moments("on"):
        out = net(x)
        assert taken(out)
    agree(route, net, x, torch.randn(out.shape).to(route.device))


@routes()
def test_same_bits_from_block_to_block(route: Route) -> None:
    """Between blocks the result goes on with its sign bits, and the next block applies them in its backward."""
    net = layer(3, in_channels=8, stride=2).to(route.device)
    x = image(8, device=route.device)
    with fn.backend(route.backend), fn.moments("on"):
        found = node_names(net(x))
    assert found == {"_BottleneckBackward", "AccumulateGrad"}
    agree(route, net, x, torch.randn(3, 16, 4, 3).to(route.device))


@routes()
@pytest.mark.parametrize("cached", [False, True])
def test_same_bits_under_autocast(route: Route, cached: bool) -> None:
    """A whole network casts its weights at once, from the second pass on; a layer alone one by one."""
    net: nn.Module = layer(2, in_channels=8, stride=2)
    x = image(8, torch.bfloat16)
    if cached:
        net = fastres.ResNet(50, base_channels=4, stem_channels=8, num_stages=1, strides=(1,), dilations=(1,),
                             out_indices=(0,))  # fmt: skip
        x = torch.randn(2, 3, 48, 48).contiguous(memory_format=LAST)
    net, x = net.to(route.device, memory_format=LAST).train(), x.to(route.device)

    shape = (2, 16, 12, 12) if cached else (3, 16, 4, 3)
    around = lambda: torch.autocast(route.device, torch.bfloat16)  # noqa: E731
    out = agree(route, net, x, torch.randn(shape).to(route.device), around, 2 if cached else 1)
    assert out.dtype == torch.bfloat16


PARTS: dict[str, Callable[[fastres.ResLayer], Any]] = {
    "frozen gamma": lambda net: net[0].bn2.weight.requires_grad_(False),
    "frozen weight": lambda net: net[0].conv2.weight.requires_grad_(False),
    "running statistics": lambda net: net[0].bn1.eval(),
    "skip_nonfinite_stats": lambda net: setattr(net[0].bn3, "skip_nonfinite_stats", True),
    "hook on a convolution": lambda net: net[0].conv2.register_forward_hook(lambda *a: None),
    "a convolution of one's own": lambda net: setattr(
        net[0], "conv2", type("Own", (nn.Conv2d,), {})(4, 4, 3, padding=1, bias=False).to(memory_format=LAST)
    ),
    "padding by name": lambda net: setattr(
        net[0], "conv2", nn.Conv2d(4, 4, 3, padding="same", bias=False).to(memory_format=LAST)
    ),
    "drop path": lambda net: setattr(net[0], "drop_path", fastres.modules.DropPath(0.5)),
}


@pytest.mark.parametrize(
    "why", [*PARTS, "no gradient", "caffe", "nchw", "recompute", "moments off", "consumed"]
)
def test_parts_where_it_is_not_the_usual_case(why: str) -> None:
    net = layer(style="caffe", stride=2) if why == "caffe" else layer()
    net = net.to(memory_format=torch.contiguous_format) if why == "nchw" else net
    x = image()
    if why in PARTS:
        PARTS[why](net)
    if why in ("no gradient", "nchw"):
        x = x.detach() if why == "no gradient" else x.detach().contiguous().requires_grad_()
    modes = (
        fn.memory("recompute" if why == "recompute" else "save"),
        fn.moments("off" if "off" in why else "on"),
    )
    with fn.backend("reference"), modes[0], modes[1]:
        if why == "consumed":
            b = net[0]
            z = fn.conv_bn_relu(x, b.conv1, b.bn1.fused())
            fn.materialize(z)
            z = fn.conv_bn(fn.conv_bn_relu(z, b.conv2, b.bn2.fused()), b.conv3, b.bn3.fused())
            out = fn.add_relu(z, x)
        else:
            out = net(x)
    assert not taken(out)
    out.sum().backward()


def test_a_part_that_is_used_again_updates_no_statistics() -> None:
    net, x = layer()[0], image()
    with fn.backend("reference"), fn.moments("on"):
        z1 = fn.conv_bn_relu(x, net.conv1, net.bn1.fused())
        z2 = fn.conv_bn_relu(z1, net.conv2, net.bn2.fused())
        y3 = fn.conv_bn(z2, net.conv3, net.bn3.fused())
        out = fn.add_relu(y3, x)
        assert taken(out)
        before = [b.clone() for b in net.buffers()]
        found = [fn.materialize(p) for p in (z1, z2, y3)]
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    torch.testing.assert_close((found[2] + x).relu(), out)
    dy = torch.randn(found[0].shape)
    (got,) = torch.autograd.grad(found[0], net.conv1.weight, dy)
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(net.bn1.state_dict())
    (want,) = torch.autograd.grad(plain(net.conv1(x)).relu(), net.conv1.weight, dy)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_from_outside(reentrant: bool) -> None:
    """The second forward saves as many tensors as the first, and moves no statistics."""
    net, x, dy = layer(2), image(), torch.randn(3, 16, 7, 6)
    run = lambda net, leaf: checkpoint(net, leaf, use_reentrant=reentrant)  # noqa: E731
    with fn.backend("reference"), fn.moments("on"):
        plain, ours = copy.deepcopy(net), copy.deepcopy(net)
        for a, b in zip(step(plain, x, dy), step(ours, x, dy, run), strict=True):
            assert torch.equal(a, b)


def test_gradients_of_a_selection() -> None:
    net, x, dy = layer(), image(), torch.randn(3, 16, 7, 6)
    with fn.backend("reference"), fn.moments("on"):
        out = net(x)
        assert taken(out)
        everything = torch.autograd.grad(out, [x, *net.parameters()], dy, retain_graph=True)
        for leaf, whole in zip([x, *net.parameters()], everything, strict=True):
            assert torch.equal(torch.autograd.grad(out, leaf, dy, retain_graph=True)[0], whole)


def test_second_derivative_is_refused() -> None:
    second_derivative_is_refused(layer(), image())


def test_middle_convolution_in_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch chooses the layout of a convolution's result. Whatever it is, statistics are updated once."""
    net, x, dy = layer(2), image(), torch.randn(3, 16, 7, 6)
    with fn.backend("reference"), fn.moments("on"):
        want = step(copy.deepcopy(net), x, dy)
        monkeypatch.setattr(fused, "_convolve", lambda *args: torch.conv2d(*args).contiguous())
        got = step(copy.deepcopy(net), x, dy)
        assert not taken(net(x))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@routes()
@pytest.mark.parametrize("conv", ["conv1", "conv3", "downsample.0"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_is_a_slice_or_turned(route: Route, conv: str, turned: bool) -> None:
    """Its rows lie apart, or its columns do: as eager PyTorch has it, whatever form that takes."""
    nets = [layer(in_channels=8, norm_cfg=dict(type=norm)) for norm in ("BN", "FusedBN")]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        weight = net[0].get_submodule(conv).weight
        if turned:
            weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            weight.data = torch.cat([weight.data, -weight.data], 1)[:, : weight.shape[1]]
        net.to(route.device)
        assert not net[0].get_submodule(conv).weight.is_contiguous()
    x, dy = image(8, device=route.device), torch.randn(3, 16, 7, 6).to(route.device)
    with fn.backend("aten"):
        want = step(nets[0], x, dy)
    with fn.backend(route.backend), fn.moments("on"):
        got = step(nets[1], x, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("what", ["gamma", "running", "one value"])
def test_errors_change_nothing(what: str) -> None:
    errors_change_nothing(layer(stride=2 if what == "one value" else 1), image(), what)


@pytest.mark.aot
@pytest.mark.parametrize("moments", ["on", "off"])
@pytest.mark.parametrize("kind", [fastres.Bottleneck, fastres.BasicBlock])
def test_launches_are_those_of_the_parts(kind: type[nn.Module], moments: str) -> None:
    """With the same arguments: bits that the block before has applied are not read again, say."""
    net, x, found = layer(2, kind, in_channels=8, stride=2), image(8), []
    for way in (nullcontext, by_parts):
        with way(), on_cpu() as log, fn.backend("triton"), fn.moments(moments):
            net(x).backward(torch.randn(3, 16, 4, 3))
        found.append(sorted(map(repr, zip(log, log.arguments, strict=True))))
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_forward_of_an_instance_is_called(backend: str) -> None:
    """Tools put one on a convolution; only the module's own call finds it."""
    net, called = layer(in_channels=8, stride=2), []
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):

            def forward(x: Tensor, conv: nn.Conv2d = conv, name: str = name) -> Tensor:
                called.append(name)
                return nn.Conv2d.forward(conv, x)

            conv.forward = forward
    with fn.backend(backend), fn.moments("on"):
        net(image(8)).sum().backward()
    assert sorted(called) == ["0.conv1", "0.conv2", "0.conv3", "0.downsample.0"]


def test_hooks_for_all_modules_see_convolutions() -> None:
    net, seen = layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(type(m)))
    try:
        z = fn.conv_bn(image(), net[0].conv1, net[0].bn1.fused())
        fn.materialize(z)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d]
