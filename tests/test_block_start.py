"""The start of a block: the first convolution's and the identity's gradient meet in one product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from fastres import functional as fn
from fastres.kernels.block_start import block_start
from tests.tolerance import assert_close64, assert_layout, poison

LAST = torch.channels_last
routes = pytest.mark.parametrize(
    "route",
    [
        pytest.param("cpu", id="reference"),
        pytest.param("cpu", id="interpret", marks=pytest.mark.interpret),
        pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)
SHAPES = {  # (B, Cin, H, W), Cout: every tile, remainders, one line, one pixel
    "wide": ((2, 144, 9, 7), 48),
    "narrow": ((2, 64, 5, 4), 16),
    "odd": ((3, 65, 7, 5), 21),
    "line": ((2, 32, 1, 6), 16),
    "pixel": ((5, 32, 1, 1), 16),
    "one-channel": ((2, 1, 4, 4), 1),
}


def gradients(x: Tensor, weight: Tensor, stride: int, dy: Tensor, did: Tensor, plain: bool) -> list[Tensor]:
    x, weight = (
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
        weight.detach().requires_grad_(),
    )
    if plain:
        y, identity = F.conv2d(x, weight.to(x.dtype)), x[:, :, ::stride, ::stride]
    else:
        y, identity = block_start(x, weight, stride)
    return [y.detach(), identity.detach(), *torch.autograd.grad((y, identity), (x, weight), (dy, did))]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@routes
def test_parity(
    route: str, shape: str, stride: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    if dtype == torch.float64 and "reference" not in request.node.name:
        pytest.skip("float64 has no kernel")
    size, c = SHAPES[shape]
    x = torch.randn(size, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(c, size[1], 1, 1, dtype=torch.float64) / size[1] ** 0.5
    weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    dy = torch.randn(size[0], c, *size[2:]).to(dtype)
    did = torch.randn(x[:, :, ::stride, ::stride].shape).to(dtype)
    with poison():
        ours = gradients(
            *(t.to(route) for t in (x, weight)), stride, dy.to(route), did.to(route), plain=False
        )
    eager = gradients(x, weight, stride, dy, did, plain=True)
    rounded = weight.to(dtype).double()  # the convolution's operand, as eager casts it
    ref = gradients(x.double(), rounded, stride, dy.double(), did.double(), plain=True)
    for name, a, b, r in zip(("y", "identity", "dx", "dweight"), ours, eager, ref, strict=True):
        assert_close64(name, a, b, r, dtype)
    assert_layout(ours[2].cpu(), x)


@pytest.mark.parametrize("missing", ["y", "identity"])
@pytest.mark.parametrize("stride", [1, 2])
@routes
def test_one_gradient_missing(route: str, stride: int, missing: str) -> None:
    x = torch.randn(2, 16, 5, 6, device=route).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(8, 16, 1, 1, device=route)
    y, identity = block_start(x, weight, stride)
    out = identity if missing == "y" else y
    d = torch.randn(out.shape, device=route)
    (dx,) = torch.autograd.grad(out, x, d)
    wide = x.detach().double().requires_grad_()
    out64 = wide[:, :, ::stride, ::stride] if missing == "y" else F.conv2d(wide, weight.double())
    (ref,) = torch.autograd.grad(out64, wide, d.double())
    assert_close64("dx", dx, ref.float(), ref)


def test_only_the_weight_is_asked() -> None:
    x = torch.randn(2, 16, 5, 6).contiguous(memory_format=LAST)
    weight = torch.randn(8, 16, 1, 1, requires_grad=True)
    y, _ = block_start(x, weight)
    d = torch.randn(y.shape)
    (dw,) = torch.autograd.grad(y, weight, d)
    (ref,) = torch.autograd.grad(F.conv2d(x, weight), weight, d)
    torch.testing.assert_close(dw, ref)


def test_gradcheck() -> None:
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    for stride in (1, 2):
        assert torch.autograd.gradcheck(lambda a, b, s=stride: block_start(a, b, s), (x, weight))


# ------------------------------------------------------------------------------------------------- in a block


@contextmanager
def fused(mode: str = "on") -> Iterator[None]:
    with fn.backend("reference"), fn.moments(mode):
        yield


def names(out: Tensor) -> set[str]:
    """Names of all nodes of the autograd graph behind ``out``."""
    seen, todo = {out.grad_fn}, [out.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return {type(n).__name__ for n in seen}


def stage(stride: int, **options: object) -> tuple[fastres.ResLayer, Tensor]:
    torch.manual_seed(3)
    layer = fastres.ResLayer(fastres.Bottleneck, 2, 32, 64, stride=stride, **options)
    x = torch.randn(4, 32, 9, 10).contiguous(memory_format=LAST)
    return layer.to(memory_format=LAST), x.requires_grad_()


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_use_it_and_agree(stride: int) -> None:
    layer, x = stage(stride)
    dy = torch.randn(4, 64, *(9, 10) if stride == 1 else (5, 5))
    results = []
    for kind, mode in ((torch.float64, "off"), (torch.float32, "off"), (torch.float32, "on")):
        net, leaf = layer.to(kind), x.detach().to(kind).requires_grad_()
        net.zero_grad()
        with fused(mode):
            out = net(leaf)
        assert ("_BlockStartBackward" in names(out)) == (mode == "on")
        out.backward(dy.to(kind))
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())])
        # One sum of gradients fewer a block is the point: the two uses of a block's input have one gradient.
    for i, (ref, eager, ours) in enumerate(zip(*results, strict=True)):
        assert_close64(f"result {i}", ours, eager, ref, scale=1e-2)


@pytest.mark.parametrize("why", ["off", "caffe", "no gradient", "hook", "avg_down", "nchw"])
def test_blocks_leave_it(why: str) -> None:
    options = {"caffe": dict(style="caffe"), "avg_down": dict(avg_down=True)}.get(why, {})
    layer, x = stage(2, **options)
    block = layer[0]
    if why == "hook":
        block.conv1.register_forward_hook(lambda *a: None)
    if why == "no gradient":
        x = x.detach()
    if why == "nchw":
        x = x.detach().contiguous().requires_grad_()
    with fused("off" if why == "off" else "on"):
        out = block(x)
    assert "_BlockStartBackward" not in names(out)
