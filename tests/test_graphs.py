"""The CUDA-graph runner: what it captures, when again, and what it holds; the capture itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastres
from fastres import GraphRunner
from tests.parity import randomize


class Recorded:
    """Stands for a captured graph: replaying runs the model on the graph's own input, into the same outputs."""

    bytes = 3 << 20

    def __init__(self, model, x):
        self.model, self.inputs = model, x.clone()
        self.outputs = model(self.inputs)

    def replay(self):
        with torch.no_grad():
            for old, new in zip(self.outputs, self.model(self.inputs), strict=True):
                old.copy_(new)


@pytest.fixture
def net():
    return randomize(fastres.ResNet(18, base_channels=8, stem_channels=8, out_indices=(2, 3))).eval()


@pytest.fixture
def runner(net):
    return GraphRunner(net, most=2, capture=Recorded)


def plain(net, x):
    with torch.no_grad():
        return net(x)


def test_one_capture_for_each_shape_dtype_and_layout(net, runner, randn):
    a, b = randn(1, 3, 32, 32), randn(1, 3, 32, 32)
    for x in (a, b, a):
        for got, want in zip(runner(x), plain(net, x), strict=True):
            assert torch.equal(got, want)
    assert runner.captures == 1
    runner(randn(2, 3, 32, 32))
    runner(a.contiguous(memory_format=torch.channels_last))
    assert runner.captures == 3


def test_outputs_are_copies(runner, randn):
    first = runner(randn(1, 3, 32, 32))
    kept = [t.clone() for t in first]
    runner(randn(1, 3, 32, 32))
    assert all(torch.equal(t, k) for t, k in zip(first, kept, strict=True))


def test_the_number_held_is_bounded_and_told(runner, randn):
    for n in (1, 2, 1, 3):
        runner(randn(n, 3, 32, 32))
    assert [h.shape[0] for h in runner.held] == [1, 3]
    assert "2 of at most 2 graphs" in repr(runner) and "1x3x32x32 float32 NCHW: 2 replays, 3.0 MiB" in repr(
        runner
    )
    runner.clear()
    assert runner.held == []


@pytest.mark.parametrize("change", ["in place", "load", "data", "buffer", "new"])
def test_changed_parameters_are_captured_anew(net, runner, randn, change):
    x = randn(1, 3, 32, 32)
    before = runner(x)
    with torch.no_grad():
        if change == "in place":
            net.conv1.weight.mul_(2)
        elif change == "load":
            net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})
        elif change == "data":
            net.conv1.weight.data = net.conv1.weight.data * 2
        elif change == "buffer":
            net.bn1.running_mean.add_(1)
        else:
            net.conv1.weight = nn.Parameter(net.conv1.weight * 2)
    after = runner(x)
    assert runner.captures == 2 and not torch.equal(before[0], after[0])
    assert torch.equal(after[0], plain(net, x)[0])


def test_folded_weights_live_as_long_as_the_graph(net, runner, randn):
    runner(randn(1, 3, 32, 32))
    (slot,) = runner._slots.values()
    assert len(slot.weights) == 20
    fastres.forget_folded(net)
    assert len(slot.weights) == 20


def test_bad_input(net, randn):
    runner = GraphRunner(net, capture=Recorded)
    with pytest.raises(ValueError, match="CUDA device"):
        GraphRunner(net)(randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="GraphRunner: input is list"):
        runner([1])
    with pytest.raises(ValueError, match="4 dimensions"):
        runner(randn(3, 8, 8))
    with pytest.raises(ValueError, match="training mode"):
        net.layer1.train()
        runner(randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="most is 0"):
        GraphRunner(net, most=0)
    with pytest.raises(TypeError, match="model is int"):
        GraphRunner(3)
    assert runner.captures == 0


@pytest.mark.gpu
def test_real_graphs(net, randn):
    net = net.cuda().to(memory_format=torch.channels_last)
    runner = GraphRunner(net)
    for n in (1, 4, 1):
        x = randn(n, 3, 64, 64, device="cuda", layout=torch.channels_last)
        for got, want in zip(runner(x), plain(net, x), strict=True):
            assert torch.equal(got, want)
    net.conv1.weight.data.mul_(2)
    with torch.no_grad():
        net.conv1.weight.mul_(1)
    assert torch.equal(runner(x)[0], plain(net, x)[0])
    assert runner.captures == 3
