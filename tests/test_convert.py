"""fuse_ and unfuse_: what is found, what is left alone, and that nothing a user relies on changes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from fastres import functional as FF
from fastres.convert import FusedForward
from tests.parity import assert_parity, randomize, steps
from tests.plain_resnet import PlainResNet

BACKENDS = ["aten", "reference"]


class Residual(nn.Module):
    """A block as people write them, with names that fastres does not know."""

    def __init__(self, cin: int = 4, cout: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.left = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.left_norm = nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)
        self.right = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.right_norm = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.3)
        self.skip = nn.Sequential()
        if stride != 1 or cin != cout:
            self.skip = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.left_norm(self.left(x)))
        out = self.right_norm(self.right(out))
        out += self.skip(x)
        return F.relu(out)


class Net(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(Residual(), Residual(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.size(0), -1)
        return self.fc(x)


def fused_paths(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, FusedForward)}


def pair() -> tuple[nn.Module, nn.Module]:
    """A fused net and the same as it was."""
    net = randomize(Net())
    plain = copy.deepcopy(net)
    assert fastres.fuse_(net)
    return net, plain


# ------------------------------------------------------------------------------------------------------- what is found


def test_the_report_and_what_it_says():
    net = Net()
    report = fastres.fuse_(net)
    assert fused_paths(net) == {"", "layer.0", "layer.1", "layer.0.skip"}
    assert report.norms == 6 and not report.left
    text = {row.path: row.text for row in report.fused}
    assert text[""] == "conv1+bn1+relu, maxpool"
    assert text["layer.0"] == "left+left_norm+act, right+right_norm, add+relu"
    lines = str(report).splitlines()
    assert lines[0] == "fuse_(Net): 4 modules fused, 0 left, 6 norms replaced"
    assert any("layer.0, layer.1" in line and "Residual" in line for line in lines)
    assert net.layer[0].fused_obstacle() == ""
    again = fastres.fuse_(net)
    assert not again and again.norms == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics(backend, training, layout):
    net, plain = pair()
    inputs, gradients = steps((3, 3, 33, 29), (3, 5, 1, 1), 2)
    with FF.backend(backend):
        assert_parity(
            net.train(training),
            plain.train(training),
            inputs,
            gradients,
            layout=layout,
            call=lambda m, x: m(x)[..., None, None],
        )


def test_the_fused_functions_are_what_runs():
    net, _ = pair()
    with FF.backend("reference"), fastres.record_routes() as log:
        net(torch.randn(2, 3, 32, 32))
    names = {name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm)}
    ends = [choice.op for choice in log]
    assert ends.count("add_relu") == 2 and ends.count("max_pool") == 1 and ends.count("batch_norm") == 2
    assert len(names) == 6


def test_sequential_code():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), nn.Flatten(), nn.Linear(2 * 7 * 7, 3),
    )  # fmt: skip
    plain = copy.deepcopy(randomize(net))
    report = fastres.fuse_(net)
    assert [row.text for row in report.fused] == ["0+1+2, 3, 4+5", "0+1"]
    inputs, gradients = steps((4, 3, 16, 16), (4, 3), 2)
    with FF.backend("reference"):
        assert_parity(net, plain, inputs, gradients)


@pytest.mark.parametrize(
    "options", [dict(depth=18), dict(depth=50, deep_stem=True, avg_down=True), dict(depth=50, se=4)]
)
def test_a_resnet_that_computes_its_names(options):
    net = randomize(PlainResNet(width=4, stem=4, strides=(1, 2), **options))
    plain = copy.deepcopy(net)
    report = fastres.fuse_(net)
    assert report.norms == sum(isinstance(m, _BatchNorm) for m in net.modules())
    assert {type(m).__name__ for m in net.modules() if isinstance(m, FusedForward)} >= {"FusedBlock"}
    inputs, gradients = steps((2, 3, 32, 32), (2, 8 if options["depth"] == 18 else 32, 4, 4), 1)
    with FF.backend("reference"):
        assert_parity(net, plain, inputs, gradients, call=lambda m, x: m(x)[1])


def test_drop_path_draws_the_same_samples():
    class Block(Residual):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.drop = fastres.DropPath(0.5)

        def forward(self, x):
            out = self.right_norm(self.right(self.act(self.left_norm(self.left(x)))))
            return self.act(x + self.drop(out))

    net = randomize(Block())
    plain = copy.deepcopy(net)
    report = fastres.fuse_(net)
    assert "drop+add+act" in str(report)
    inputs, gradients = steps((8, 4, 9, 9), (8, 4, 9, 9), 2)

    def call(m, x):
        torch.manual_seed(3)
        return m(x)

    for backend in BACKENDS:
        with FF.backend(backend):
            assert_parity(copy.deepcopy(net), copy.deepcopy(plain), inputs, gradients, call=call)


# ------------------------------------------------------------------------------------------------ what stays the same


def test_parameters_keys_hooks_and_optimizer_go_on():
    net = randomize(Net())
    keys, tensors = list(net.state_dict()), {id(t) for t in [*net.parameters(), *net.buffers()]}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    net.layer[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    net.layer[1].act.register_forward_hook(lambda m, args, out: seen.append("act"))
    plain = copy.deepcopy(net)
    fastres.fuse_(net)
    assert list(net.state_dict()) == keys
    assert {id(t) for t in [*net.parameters(), *net.buffers()]} == tensors
    assert isinstance(net, Net) and isinstance(net.layer[0], Residual) and isinstance(net.bn1, nn.BatchNorm2d)
    x = torch.randn(2, 3, 32, 32)
    y, z = net(x), plain(x)
    assert torch.equal(y, z)
    assert seen == [torch.Size([2, 8, 4, 4]), "act"] * 2, (
        "hooks are called as before, on a fused module and inside one"
    )
    y.square().sum().backward()
    before = net.layer[0].left.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, net.layer[0].left.weight)


def test_a_hook_on_a_norm_inside_sees_its_output():
    net, plain = pair()
    got = []
    for m in (net, plain):
        m.layer[1].left_norm.register_forward_hook(lambda module, args, out: got.append(out.detach().clone()))
    assert "left_norm has hooks" in net.layer[1].fused_obstacle()
    x = torch.randn(2, 3, 32, 32)
    with FF.backend("reference"):
        net(x)
        plain(x)
    torch.testing.assert_close(got[0], got[1])
    assert (got[0] < 0).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.layer[0], "left_norm", nn.Identity()),
        lambda net: setattr(net.layer[0], "act", nn.LeakyReLU()),
        lambda net: setattr(net, "maxpool", nn.AvgPool2d(2)),
        lambda net: setattr(net, "relu", nn.GELU()),
        lambda net: setattr(net.layer[0], "skip", nn.Conv2d(4, 8, 1, 2)),
        lambda net: net.layer[0].skip.append(nn.Tanh()),
        lambda net: net.layer[1].skip.append(nn.Tanh()),
        lambda net: setattr(net.layer, "1", nn.Tanh()),
        lambda net: nn.SyncBatchNorm.convert_sync_batchnorm(net).eval(),
        lambda net: net.layer[1].left_norm.eval(),
    ],
)
def test_what_is_changed_later_counts(change):
    """The same change before and after fusing gives the same net."""
    net, plain = pair()
    torch.manual_seed(5)
    change(net)
    torch.manual_seed(5)
    change(plain)
    x = torch.randn(2, 3, 32, 32)
    with FF.backend("reference"):
        got = net(x)
    torch.testing.assert_close(got, plain(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_independent(how):
    net, plain = pair()
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(net) and fused_paths(other) == fused_paths(net)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), plain(x))
    fastres.unfuse_(other)
    assert type(other) is Net and fused_paths(net)


def test_unfuse_gives_every_class_back():
    net = nn.Sequential(Net(), nn.SyncBatchNorm(5), fastres.FusedBatchNorm2d(5))
    types = [type(m) for m in net.modules()]
    attributes = [set(m.__dict__) for m in net.modules()]
    fastres.fuse_(net)
    assert [type(m) for m in net.modules()] != types
    assert fastres.unfuse_(net) == 4 + 6 + 1
    assert [type(m) for m in net.modules()] == types, "the net's own fused norm stays"
    assert [set(m.__dict__) for m in net.modules()] == attributes
    assert fastres.unfuse_(net) == 0


def test_synchronised_after_fusing():
    net, plain = pair()
    fastres.convert_sync_batchnorm(net)
    assert isinstance(net.bn1, fastres.FusedSyncBatchNorm)
    assert net.layer[0].fused_obstacle() == ""
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), plain(x))


def test_scripting_is_refused_clearly():
    net, _ = pair()
    with pytest.raises(RuntimeError, match=r"torch.jit.script: FusedNet .* wanted torch.compile"):
        torch.jit.script(net)
    with pytest.raises(RuntimeError, match="torch.jit.script: FusedBatchNorm2d"):
        torch.jit.script(nn.Sequential(fastres.FusedBatchNorm2d(3)))


# ------------------------------------------------------------------------------------------------------ what is left


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.count, self.table = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            0,
            {},
        )
        self.scale = nn.Parameter(torch.ones(1))

    def block(self, x):
        return self.relu(self.bn(self.conv(x)))


class Counts(Base):
    def forward(self, x):
        self.count += 1
        return self.block(x)


class Draws(Base):
    def forward(self, x):
        return self.block(x) if random.random() < 0.5 else x


class LooksAtValues(Base):
    def forward(self, x):
        return self.block(x) if x.mean() > 0 else x


class LooksAtShape(Base):
    def forward(self, x):
        return self.block(x) if x.shape[0] > 1 else x


class LooksAtType(Base):
    def forward(self, x):
        return self.block(x) if isinstance(x, Tensor) else x


class LooksAtMode(Base):
    def forward(self, x):
        return self.block(x) if self.training else x


class LooksAtAChild(Base):
    def forward(self, x):
        return self.block(x) if self.bn.eps > 0 else x


class LooksUp(Base):
    def forward(self, x):
        return self.block(x) if not self.table else x


class ReadsAParameter(Base):
    def forward(self, x):
        return self.block(x) * self.scale


class TwoArguments(Base):
    def forward(self, x, y=None):
        return self.block(x) if y is None else x


class ChangesItsInput(Base):
    def forward(self, x):
        x += 1
        return self.block(x)


class ChangesAnAlias(Base):
    def forward(self, x):
        y = z = self.conv(x)
        z += 1
        return F.relu(self.bn(y)) + z


class MultipliesInPlace(Base):
    def forward(self, x):
        y = self.block(x)
        y *= 2
        return y


class ChangesWhatIsUsedAgain(Base):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        z += 1
        return F.relu(y, inplace=True) + z


class Wrapped(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.block(x)


class Iterates(Base):
    def forward(self, x):
        for m in self.children():
            x = m(x)
        return x


class Pickles(Base):
    def forward(self, x):
        return self.block(x)

    def __getstate__(self):
        return self.__dict__


LEFT = [Counts, Draws, LooksAtValues, LooksAtShape, LooksAtType, LooksAtMode, LooksAtAChild, LooksUp, ReadsAParameter,
        TwoArguments, ChangesItsInput, ChangesAnAlias, MultipliesInPlace,
        ChangesWhatIsUsedAgain, Wrapped, Iterates, Pickles]  # fmt: skip


@pytest.mark.parametrize("cls", LEFT)
def test_left_alone_with_the_reason(cls):
    net = cls()
    before = dict(net.__dict__)
    report = fastres.fuse_(net)
    (row,) = report.left
    assert type(net) is cls and row.kind == cls.__name__ and len(row.text) > 8
    assert row.text in str(report)
    assert type(net.bn) is fastres.FusedBatchNorm2d, "its norm is fused alone"
    assert dict(net.__dict__) == before


def test_norms_of_another_kind_are_left():
    class Mine(nn.BatchNorm2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Mine(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4))
    report = fastres.fuse_(net)
    assert not report and type(net) is nn.Sequential
    assert [(row.path, row.kind) for row in report.left] == [
        ("", "Sequential"),
        ("1", "Mine"),
        ("4", "BatchNorm1d"),
    ]


def test_nothing_to_do_and_no_module():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    report = fastres.fuse_(net)
    assert not report and "the model is as it was" in str(report)
    for function in (fastres.fuse_, fastres.unfuse_, fastres.channels_last_):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is dict; wanted an nn.Module"):
            function({})


def test_constants_are_looked_at_again():
    class Switch(Base):
        def __init__(self):
            super().__init__()
            self.skip = False

        def forward(self, x):
            return x if self.skip else self.block(x)

    net = Switch()
    assert fastres.fuse_(net).fused
    x = torch.randn(2, 4, 3, 3)
    assert not torch.equal(net(x), x)
    net.skip = True
    assert torch.equal(net(x), x) and net.fused_obstacle() == "skip has changed"


# ------------------------------------------------------------------------------------------- who looks in from outside


def sequence() -> nn.Sequential:
    torch.manual_seed(3)
    return randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    )


def test_a_slice_of_a_fused_sequence():
    """Slicing calls the class of the sequence, here the fused one, for a module that has no plan."""
    net = sequence()
    plain = copy.deepcopy(net)
    fastres.fuse_(net)
    part, x = net[:3], torch.randn(2, 3, 6, 6)
    assert "made from a fused module" in part.fused_obstacle() and net.fused_obstacle() == ""
    assert torch.equal(part(x), plain[:3](x))
    report = fastres.fuse_(part)
    assert [row.text for row in report.fused] == ["0+1+2"] and part.fused_obstacle() == ""
    assert torch.equal(part(x), plain[:3](x)) and torch.equal(net(x), plain(x))
    assert fastres.unfuse_(net[3:]) == 2, "the slice itself, and the norm that it shares"
    assert net.fused_obstacle() == "4 is BatchNorm2d" and torch.equal(net(x), plain(x))


def test_fx_sees_the_modules_of_the_original():
    for net in (sequence(), randomize(Net())):
        plain = copy.deepcopy(net)
        fastres.fuse_(net)
        assert inspect.signature(net.forward) == inspect.signature(plain.forward)
        graph, want = torch.fx.symbolic_trace(net), torch.fx.symbolic_trace(plain)
        assert graph.code == want.code
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(graph(x), plain(x))
        for (name, got), buffer in zip(graph.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(got, buffer), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make", [sequence, Net, lambda: fastres.ResNet(50, base_channels=4, stem_channels=4)]
)
def test_jit_trace_records_the_modules(make, backend):
    """Its own check compares two recordings."""
    net = randomize(make()).eval()
    fastres.fuse_(net)
    x, other = torch.randn(2, 2, 3, 32, 32)
    with FF.backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(other), net(other), rtol=1e-4, atol=1e-5)


def test_export_takes_the_names_of_the_original_arguments():
    net = sequence().eval()
    fastres.fuse_(net)
    sizes = {"input": {0: torch.export.Dim("batch", min=1, max=16)}}
    exported = torch.export.export(net, (torch.randn(4, 3, 6, 6),), dynamic_shapes=sizes).module()
    x = torch.randn(9, 3, 6, 6)
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ channels_last


def test_channels_last_switch():
    net, plain = pair()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 32, 32)
    net(x).sum().backward()
    assert fastres.channels_last_(net) is net and fastres.channels_last_(net) is net
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.dim() == 4)
    seen = []
    net.layer[0].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    got = net(x)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen[0])
    plain(x)
    torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-4)
    optimizer.step()
    assert len(net._forward_pre_hooks) == 1
    other = copy.deepcopy(net)
    pickle.loads(pickle.dumps(fastres.channels_last_(Net())))
    fastres.channels_last_(other, False)
    assert not other._forward_pre_hooks and all(p.is_contiguous() for p in other.parameters())
