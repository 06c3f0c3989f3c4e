"""Gradients of a block where only some are wanted: fine-tuning with frozen stages, weights, norms or inputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import ResNet
from fastres import functional as fn
from fastres.kernels.fused_conv_bn_relu import pointwise_dz
from fastres.modules import Bottleneck
from tests.parity import like, randomize, steps
from tests.plain_resnet import Block
from tests.test_blocks import PAIRS, layer
from tests.tolerance import assert_close64

LAST = torch.channels_last
STAGE = {  # the first block's result is read by the second's branch and identity, masked there
    "two bottlenecks": (
        lambda: layer(Bottleneck, 4, 8, blocks=2, stride=2),
        lambda: nn.Sequential(Block(4, 8, 2, 2), Block(8, 8, 2)),
        4,
    )
}

FORMS = [
    ("on", "save", "cudnn"),
    ("off", "save", "cudnn"),
    ("on", "recompute", "cudnn"),
    ("on", "save", "triton"),
]


def subsets(names: list[str]) -> Iterator[set[str]]:
    """What wants a gradient: all; all but one; one alone; a few at random."""
    yield set(names)
    for name in names:
        yield set(names) - {name}
        yield {name}
    draw = random.Random(3)
    for _ in range(6):
        yield {name for name in names if draw.random() < 0.5}


def gradients(module: nn.Module, x: Tensor, dy: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """The gradients of one step by name, the input's under ``x``."""
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted).grad = None
    x = x.clone(memory_format=torch.preserve_format).requires_grad_("x" in wanted)
    module(x).backward(dy)
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | ({"x": x.grad} if x.grad is not None else {})


def prepared(name: str, n: int, size: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Ours and the plain one with the same weights, an input and a gradient of the output, in float64."""
    make, plain, channels = (PAIRS | STAGE)[name]
    stage = randomize(make()).double().to(memory_format=LAST)
    ours = stage if name in STAGE else stage[0]
    theirs = like(plain(), ours).double()
    shape = (n, channels, size, size)
    (x,), (dy,) = steps(shape, copy.deepcopy(theirs)(torch.zeros(shape).double()).shape, 1)
    return ours, theirs, x.contiguous(memory_format=LAST), dy.contiguous(memory_format=LAST)


@pytest.mark.parametrize("moments, memory, conv3x3", FORMS)
@pytest.mark.parametrize("name", [*PAIRS, *STAGE])
def test_any_subset(name, moments, memory, conv3x3):
    ours, theirs, x, dy = prepared(name, 4, 8)
    names = ["x", *(n for n, _ in ours.named_parameters())]
    with fn.backend("reference"), fn.moments(moments), fn.memory(memory), fn.conv3x3(conv3x3):
        for wanted in subsets(names):
            if not wanted:
                continue
            got, want = gradients(ours, x, dy, wanted), gradients(theirs, x, dy, wanted)
            assert got.keys() == want.keys() == wanted
            for key, value in want.items():
                error = (got[key] - value).abs().max() / value.abs().max().clamp_min(1e-3)
                assert error < 1e-10, f"{key} of {sorted(wanted)}: {error:.2g}"


@pytest.mark.interpret
@pytest.mark.parametrize("moments, memory, conv3x3", FORMS)
@pytest.mark.parametrize("name", ["basic stride", "pytorch", "caffe", "two bottlenecks"])
def test_the_kernels_where_the_input_wants_none(name, moments, memory, conv3x3):
    ours, theirs, x, dy = prepared(name, 4, 8)
    wanted = {n for n, _ in ours.named_parameters()}
    ours, theirs, x, dy = ours.float(), theirs.float(), x.float(), dy.float()
    want = gradients(copy.deepcopy(theirs).double(), x.double(), dy.double(), wanted)
    eager = gradients(theirs, x, dy, wanted)
    with fn.backend("triton"), fn.moments(moments), fn.memory(memory), fn.conv3x3(conv3x3):
        got = gradients(ours, x, dy, wanted)
    assert got.keys() == want.keys()
    scale = max(v.abs().max().item() for v in want.values())
    for key, value in want.items():
        assert_close64(key, got[key], eager[key], value, scale=scale)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_frozen_stages_of_a_network(depth, stages):
    """At shapes where the moment form pays by itself, which small ones do not."""
    options = dict(depth=depth, base_channels=16, stem_channels=16, frozen_stages=stages)
    ours = randomize(ResNet(norm_cfg=dict(type="FusedBN"), **options)).double().to(memory_format=LAST)
    theirs = like(ResNet(norm_cfg=dict(type="BN"), **options), ours).double()
    wanted = {n for n, p in ours.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 96, 96, generator=generator).double().contiguous(memory_format=LAST)
    dy = torch.randn(theirs.eval()(x)[0].shape, generator=generator).double()
    for net in (ours, theirs):
        net.train()
        net.forward = lambda x, forward=net.forward: forward(x)[0]
    with fn.backend("reference"), fn.record_routes() as routes:
        got = gradients(ours, x, dy, wanted)
    assert depth == 18 or stages == 3 or any("moment form" in str(r) for r in routes)
    want = gradients(theirs, x, dy, wanted)
    assert got.keys() == want.keys() == wanted
    for key, value in want.items():
        assert (got[key] - value).abs().max() < 1e-10 * value.abs().max(), key


@pytest.mark.interpret
def test_a_gradient_of_other_pixels_than_were_read_is_refused():
    g, x = (torch.randn(2, c, 4, 4).contiguous(memory_format=LAST) for c in (6, 3))
    plain: tuple[Any, ...] = (None, None, None, None, 0.0, False)
    rest: tuple[Any, ...] = (None,) * 9
    with pytest.raises(ValueError, match=r"g is \[2, 6, 4, 4\]; wanted 8 pixels, as x has at stride 2"):
        pointwise_dz.launch(g, torch.randn(6, 3), x, *plain, *rest, 2)
