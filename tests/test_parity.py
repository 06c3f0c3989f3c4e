"""Whole nets against the plain ResNet of ``tests.plain_resnet``, over several training steps.

In float32 values and running statistics are held to the rule of ``tests.tolerance``. Gradients of a whole net are not:
where rounding decides the sign of one pre-activation they differ at once, and eager's own do so between two layouts. So
gradients are compared in float64, where no sign is in doubt and every term of the mathematics still shows.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fastres import functional as FF
from fastres.models import ResNet
from fastres.modules import ResidualBlock
from fastres.variants import ResNet_CIFAR, ResNetV1c, ResNetV1d, ResNeXt, SEResNet
from tests.parity import assert_parity, like, randomize, steps, train_steps
from tests.plain_resnet import PlainResNet
from tests.tolerance import FACTOR

OURS = dict(stem_channels=8, base_channels=8)
PLAIN = dict(stem=8, width=8)
NETS = {
    "18": (lambda **o: ResNet(18, **OURS, **o), lambda: PlainResNet(18, **PLAIN)),
    "34": (lambda **o: ResNet(34, **OURS, **o), lambda: PlainResNet(34, **PLAIN)),
    "50": (lambda **o: ResNet(50, **OURS, **o), lambda: PlainResNet(50, **PLAIN)),
    "101": (lambda **o: ResNet(101, **OURS, **o), lambda: PlainResNet(101, **PLAIN)),
    "152": (lambda **o: ResNet(152, **OURS, **o), lambda: PlainResNet(152, **PLAIN)),
    "caffe": (
        lambda **o: ResNet(50, style="caffe", **OURS, **o),
        lambda: PlainResNet(50, caffe=True, **PLAIN),
    ),
    "dilated": (
        lambda **o: ResNet(50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **OURS, **o),
        lambda: PlainResNet(50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **PLAIN),
    ),
    "v1c": (lambda **o: ResNetV1c(depth=50, **OURS, **o), lambda: PlainResNet(50, deep_stem=True, **PLAIN)),
    "v1d": (
        lambda **o: ResNetV1d(depth=50, **OURS, **o),
        lambda: PlainResNet(50, deep_stem=True, avg_down=True, **PLAIN),
    ),
    "cifar": (lambda **o: ResNet_CIFAR(18, **OURS, **o), lambda: PlainResNet(18, cifar=True, **PLAIN)),
    "resnext": (
        lambda **o: ResNeXt(50, groups=2, width_per_group=3, **OURS, **o),
        lambda: PlainResNet(50, groups=2, group_width=3, **PLAIN),
    ),
    "se": (lambda **o: SEResNet(50, se_ratio=4, **OURS, **o), lambda: PlainResNet(50, se=4, **PLAIN)),
}
ROUTES = ["aten", "reference"]


def last(model, x):
    return model(x)[-1]


def pair(name, **options):
    """Ours and plain with the same weights. The branches are weak, as training makes them: a net of 50 full-strength
    random blocks multiplies every rounding by 1e6, and says nothing."""
    ours, plain = NETS[name]
    model = randomize(ours(**options))
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, ResidualBlock):
                m.last_norm.weight *= 0.2
    return model, like(plain(), model)


def data(plain, count, size=64):
    """Large enough that the last stage's norms see 32 values a channel: with four, eager itself is 1 % off."""
    x = torch.zeros(8, 3, size, size, dtype=plain.layer1[0].conv1.weight.dtype)
    with torch.no_grad():
        shape = copy.deepcopy(plain).eval()(x)[-1].shape
    return steps(x.shape, shape, count)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NETS)
def test_values_and_running_statistics(name, route):
    ours, plain = pair(name)
    x, dy = data(plain, 1)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy, record_gradients=False, call=last)


@pytest.mark.parametrize("name", NETS)
def test_gradients_over_several_steps(name):
    """In float64, on the fused operators' plain-torch implementation: every value and gradient, three steps."""
    ours, plain = (m.double() for m in pair(name))
    x, dy = data(plain, 3)
    with FF.backend("reference"):
        got = train_steps(ours, x, dy, lr=1e-4, call=last)
    want = train_steps(plain, x, dy, lr=1e-4, call=last)
    assert got.keys() == want.keys()
    for name, t in want.items():
        # The deepest net is 2e-13 off; a missing term of a gradient shows from 1e-3 upwards.
        step = name.split(" gradient of")[0]
        size = max(float(t.abs().max()), float(want.get(f"{step} input gradient", t).abs().max()))
        assert float((got[name] - t).abs().max()) <= 1e-11 * size, name


@pytest.mark.parametrize("name", ["18", "50", "v1d"])
def test_the_aten_route_is_eager_bit_for_bit(name, layout):
    ours, plain = (m.to(memory_format=layout) for m in pair(name))
    x, dy = ([t.float().contiguous(memory_format=layout) for t in ts] for ts in data(plain, 3))
    with FF.backend("aten"):
        got = train_steps(ours, x, dy, lr=1e-3, call=last)
    want = train_steps(plain, x, dy, lr=1e-3, call=last)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["18", "50"])
def test_evaluation(name, route, layout):
    ours, plain = (m.eval() for m in pair(name))
    x, dy = data(plain, 1, size=65)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy, layout=layout, record_gradients=False, call=last)


@pytest.mark.parametrize("name", ["18", "se"])
def test_type_bn_is_eager(name):
    ours, plain = pair(name, norm_cfg=dict(type="BN"))
    assert "FusedBatchNorm" not in repr(ours)
    x, dy = ([t.float() for t in ts] for ts in data(plain, 2))
    got, want = (train_steps(m, x, dy, lr=1e-3, call=last) for m in (ours, plain))
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-5, atol=1e-5, msg=name)


def test_float32_gradients_beside_eagers_own_error():
    """One step: the whole gradient's distance from float64, in norm, against eager's distance."""
    ours, plain = pair("18")
    x, dy = data(plain, 1, size=64)
    reference = copy.deepcopy(plain).double()
    x32, dy32 = [t.float() for t in x], [t.float() for t in dy]
    with FF.backend("reference"):
        got = train_steps(ours, x32, dy32, call=last)
    other = train_steps(plain, x32, dy32, call=last)
    want = train_steps(reference, [t.double() for t in x32], [t.double() for t in dy32], call=last)

    def distance(record):
        names = [n for n in want if "gradient" in n]
        far = sum(float((record[n].double() - want[n]).square().sum()) for n in names)
        return (far / sum(float(want[n].square().sum()) for n in names)) ** 0.5

    assert distance(got) <= FACTOR * distance(other) + 1e-5, (distance(got), distance(other))


@pytest.mark.interpret
def test_a_net_on_the_kernels(layout):
    """Stem, pool, block ends with and without downsample, backward: every kernel of a training step."""
    model = ResNet(18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,), **OURS)
    model = randomize(model)
    plain = like(PlainResNet(18, strides=(1, 2), dilations=(1, 1), **PLAIN), model)
    x, dy = data(plain, 1, size=16)
    x, dy = [t[:3] for t in x], [t[:3] for t in dy]
    with FF.backend("triton"), FF.record_routes() as log:
        assert_parity(model, plain, x, dy, layout=layout, record_gradients=False, call=last)
    assert {c.route for c in log} == {"triton"} and {c.op for c in log} == {
        "max_pool",
        "batch_norm",
        "add_relu",
    }
