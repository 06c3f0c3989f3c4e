"""The fused norms alone, drop path, and the conversion to synchronised norms."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from fastres import functional as FF
from fastres._registry import build_norm_layer, infer_abbr
from fastres.modules import DropPath, FusedBatchNorm2d, FusedSyncBatchNorm, convert_sync_batchnorm
from tests.parity import assert_parity, randomize, steps

NORMS = [FusedBatchNorm2d, FusedSyncBatchNorm]
BACKENDS = ["aten", "reference"]


class WithReLU(nn.Module):
    """torch's norm and a ReLU, with the norm's own keys."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.relu(self.norm(x))


@pytest.mark.parametrize(
    ("ours", "torchs"), [(FusedBatchNorm2d, nn.BatchNorm2d), (FusedSyncBatchNorm, nn.SyncBatchNorm)]
)
def test_it_is_torchs_norm(ours, torchs):
    a, b = ours(5, 1e-3, 0.2), torchs(5, 1e-3, 0.2)
    assert isinstance(a, torchs)
    assert list(a.state_dict()) == list(b.state_dict())
    assert repr(a) == repr(b).replace(torchs.__name__, ours.__name__)
    assert repr(ours(5, relu=True)).endswith("relu=True)")
    wanted = list(inspect.signature(torchs).parameters.values())
    got = inspect.signature(ours).parameters
    for p in wanted:
        if p.kind is p.POSITIONAL_OR_KEYWORD:
            assert got[p.name].default == p.default
    assert list(got)[: len(wanted) - sum(p.kind is p.KEYWORD_ONLY for p in wanted)] == [
        p.name for p in wanted if p.kind is not p.KEYWORD_ONLY
    ]
    b.load_state_dict(randomize(a).state_dict())
    a.load_state_dict(b.state_dict())


@pytest.mark.parametrize("name", ["FusedBN", "FusedSyncBN"])
def test_it_is_registered(name):
    label, norm = build_norm_layer(dict(type=name, momentum=0.3, requires_grad=False), 4, postfix=2)
    assert label == "bn2" and norm.momentum == 0.3 and not norm.weight.requires_grad
    assert infer_abbr(type(norm)) == "bn"
    with pytest.raises(TypeError, match="momentun"):
        build_norm_layer(dict(type=name, momentun=0.3), 4)


CASES = {
    "default": {},
    "cumulative": dict(momentum=None),
    "eps": dict(eps=0.1),
    "momentum 1": dict(momentum=1.0),
    "no affine": dict(affine=False),
    "no running": dict(track_running_stats=False),
    "neither": dict(affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("relu", [False, True], ids=["bn", "bn+relu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("route", BACKENDS)
def test_parity(route, training, case, relu, layout):
    ours = randomize(FusedBatchNorm2d(5, relu=relu, **CASES[case])).train(training)
    plain = nn.BatchNorm2d(5, **CASES[case]).train(training)
    plain.load_state_dict(ours.state_dict())
    x, dy = steps((3, 5, 4, 3), (3, 5, 4, 3), 3)

    def call(m, t):
        y = m(t)
        return torch.relu(y) if relu and m is not ours else y

    with FF.backend(route):
        assert_parity(ours, plain, x, dy, layout=layout, call=call)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parity_in_other_dtypes(route, dtype, layout):
    ours = randomize(FusedBatchNorm2d(5))
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(ours.state_dict())
    x, dy = steps((3, 5, 4, 3), (3, 5, 4, 3), 2)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy, dtype=dtype, layout=layout)


@pytest.mark.parametrize("route", BACKENDS)
def test_momentum_none_counts(route):
    ours, plain = FusedBatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    with FF.backend(route):
        for i in range(3):
            x = torch.randn(2, 3, 4, 4) + i
            ours(x), plain(x)
    assert int(ours.num_batches_tracked) == 3
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_track_running_stats_switched_off_later():
    """torch uses batch statistics then, and leaves the buffers alone; in eval mode it uses the buffers."""
    ours, plain = randomize(FusedBatchNorm2d(3)), nn.BatchNorm2d(3)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 4)
    for m in (ours, plain):
        m.track_running_stats = False
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_mean, plain.running_mean) and int(ours.num_batches_tracked) == 0
    assert torch.equal(ours.eval()(x), plain.eval()(x))


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch has no bias="
)
@pytest.mark.parametrize("route", BACKENDS)
def test_without_bias(route):
    ours, plain = FusedBatchNorm2d(3, bias=False), nn.BatchNorm2d(3, bias=False)
    assert ours.bias is None
    x, dy = steps((2, 3, 4, 4), (2, 3, 4, 4), 2)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy)


def test_an_empty_batch_is_as_in_torch():
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    ours, plain = FusedBatchNorm2d(3, relu=True).eval(), nn.BatchNorm2d(3).eval()
    assert ours(x).shape == plain(x).shape
    ours(x).sum().backward()
    assert x.grad.shape == x.shape
    with FF.backend("reference"):
        ours.train()(x)
    assert ours.running_mean.isfinite().all()


BAD = {
    "three dimensions": (torch.randn(3, 4, 4), ValueError, "4 dimensions"),
    "channels": (torch.randn(2, 4, 4, 4), ValueError, "weight"),
    "integers": (torch.ones(2, 3, 4, 4, dtype=torch.int64), TypeError, "input"),
    "complex": (torch.ones(2, 3, 4, 4, dtype=torch.complex64), TypeError, "input"),
    "no tensor": ([1.0], TypeError, "input"),
    "one value": (torch.randn(1, 3, 1, 1), ValueError, "more than 1 value"),
}


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(norm, case, route):
    x, error, words = BAD[case]
    m = randomize(norm(3))
    before = copy.deepcopy(m.state_dict())
    with FF.backend(route), pytest.raises(error, match=words) as caught:
        m(x)
    assert "batch_norm" in str(caught.value) and "wanted" in str(caught.value)
    for name, t in m.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("norm", NORMS)
def test_copies(norm):
    m = randomize(norm(3, momentum=None, relu=True)).eval()
    x = torch.randn(2, 3, 4, 4)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert type(other) is norm and other.relu and torch.equal(other(x), m(x))


def test_a_torch_norm_given_our_class():
    """As integrations do it: no attribute of ours on the instance."""
    m = randomize(nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(m)(x)
    m.__class__ = FusedBatchNorm2d
    assert torch.equal(m(x), expected) and "relu" not in repr(m)


@pytest.mark.parametrize("route", BACKENDS)
def test_compile(route):
    m = randomize(FusedBatchNorm2d(3, relu=True))
    twin = copy.deepcopy(m)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    dy = torch.randn(2, 3, 4, 4)
    with FF.backend(route):
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
        (dx,) = torch.autograd.grad(compiled(x), x, dy)
        (expected,) = torch.autograd.grad(twin(x), x, dy)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(m.running_var, twin.running_var)
    assert int(m.num_batches_tracked) == 1


@pytest.mark.parametrize("route", BACKENDS)
def test_autocast_keeps_the_convolutions_dtype(route):
    m = randomize(FusedBatchNorm2d(4))
    conv = nn.Conv2d(3, 4, 1)
    with torch.autocast("cpu", torch.bfloat16), FF.backend(route):
        y = m(conv(torch.randn(2, 3, 4, 4)))
    assert y.dtype == torch.bfloat16 and m.running_mean.dtype == torch.float32
    y.float().sum().backward()
    assert m.weight.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ synchronised


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        FusedBatchNorm2d(4, relu=True),
        nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.GroupNorm(2, 4),
    )


def test_conversion_keeps_everything():
    model = randomize(net())
    model[2][0].eval()
    keys, first = list(model.state_dict()), model[1]
    plain = copy.deepcopy(model)
    converted = convert_sync_batchnorm(model, process_group="group")
    assert converted is model and list(model.state_dict()) == keys
    norms = [model[1], model[2][0], model[2][1]]
    assert all(type(m) is FusedSyncBatchNorm and m.process_group == "group" for m in norms)
    assert norms[0].weight is first.weight and norms[0].running_mean is first.running_mean and norms[0].relu
    assert [m.training for m in norms] == [True, False, True]
    assert not norms[1].affine and not norms[2].track_running_stats
    assert type(model[3]) is nn.GroupNorm
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), plain(x))  # no process group is initialised: as without
    assert torch.equal(model[1].running_var, plain[1].running_var)


def test_conversion_of_a_norm_itself_and_of_other_kinds():
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(3))) is FusedSyncBatchNorm
    ours = FusedSyncBatchNorm(3)
    assert convert_sync_batchnorm(ours) is ours
    sync = nn.SyncBatchNorm(3, process_group="group")
    assert convert_sync_batchnorm(sync).process_group == "group"
    assert type(convert_sync_batchnorm(nn.BatchNorm1d(3))) is nn.SyncBatchNorm
    assert (
        type(FusedSyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))[0])
        is FusedSyncBatchNorm
    )


def test_torchs_conversion_gives_torchs_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    assert type(model[1]) is nn.SyncBatchNorm


@pytest.mark.parametrize("route", BACKENDS)
def test_synchronised_norm_without_a_group_is_the_fused_norm(route):
    ours, plain = randomize(FusedSyncBatchNorm(3)), nn.BatchNorm2d(3)
    plain.load_state_dict(ours.state_dict())
    x, dy = steps((2, 3, 4, 4), (2, 3, 4, 4), 2)
    with FF.backend(route):
        assert_parity(ours, plain, x, dy)


# --------------------------------------------------------------------------------------------------------- drop path


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    m = DropPath(0.25)
    x = torch.ones(4000, 2, 1, 1)
    y = m(x)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(4 / 3))}
    assert torch.equal(y[:, 0], y[:, 1])
    assert abs(float(y.mean()) - 1) < 0.03
    assert m.eval()(x) is x and m.keep(x) is None
    assert DropPath(0.0)(x) is x


def test_drop_path_makes_the_same_draws_both_ways():
    m = DropPath(0.4)
    x = torch.randn(64, 3, 2, 2)
    torch.manual_seed(3)
    y = m(x)
    torch.manual_seed(3)
    keep = m.keep(x)
    assert keep.shape == (64,) and keep.dtype == torch.float32
    torch.testing.assert_close(y, x * keep.view(-1, 1, 1, 1))
    torch.manual_seed(3)
    assert torch.equal(m(x.bfloat16()) == 0, y == 0)


def test_drop_path_makes_the_draws_of_mmcls():
    torch.manual_seed(3)
    expected = (0.6 + torch.rand(16, 1, 1, 1)).floor().flatten() / 0.6
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.4).keep(torch.zeros(16, 3, 2, 2)), expected)


@pytest.mark.parametrize("probability", [-0.1, 1.0, 2])
def test_drop_path_refuses(probability):
    with pytest.raises(ValueError, match="drop_prob"):
        DropPath(probability)
    assert repr(DropPath(0.1)) == "DropPath(drop_prob=0.1)"
