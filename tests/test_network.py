"""A network's inference by programs: it is taken, gives the same bits, and never outlives what it was made from."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import _folding, _network
from fastres import functional as fn
from fastres.kernels import _tape
from fastres.kernels._tape import Kept
from fastres.kernels._triton import INTERPRET
from tests.cases import Route, routes
from tests.parity import randomize
from tests.plain_resnet import PlainResNet
from tests.tolerance import poison

LAST = torch.channels_last
NETS: dict[str, Callable[[], nn.Module]] = {
    "18": lambda: fastres.ResNet(18, base_channels=8, stem_channels=8),
    "50": lambda: fastres.ResNet(50, base_channels=8, stem_channels=8, out_indices=(1, 3)),
    "V1d": lambda: fastres.ResNetV1d(depth=50, base_channels=8, stem_channels=8),
    "CIFAR": lambda: fastres.ResNet_CIFAR(18, base_channels=8, stem_channels=8),
    "SE": lambda: fastres.SEResNet(50, base_channels=8, stem_channels=8),
    "ResNeXt": lambda: fastres.ResNeXt(50, base_channels=8, stem_channels=8, groups=4, width_per_group=4),
    "GN": lambda: fastres.ResNet(18, base_channels=8, stem_channels=8, norm_cfg=dict(type="GN", num_groups=2)),
    "classifier": lambda: fastres.ImageClassifier(
        dict(type="ResNet", depth=18, base_channels=8, stem_channels=8), dict(type="GlobalAveragePooling"),
        dict(type="LinearClsHead", num_classes=7, in_channels=64),
    ),
    "folded": lambda: fastres.fold(randomize(fastres.ResNet(50, base_channels=8, stem_channels=8)).eval()),
    "foreign": lambda: _fused(PlainResNet(depth=50, width=8, stem=8)),
}  # fmt: skip


def _fused(net: nn.Module) -> nn.Module:
    fastres.fuse_(net)
    return net


def network(name: str = "18") -> nn.Module:
    torch.manual_seed(1)
    made = NETS[name]()
    return (made if name == "folded" else randomize(made)).to(memory_format=LAST).eval()


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size).contiguous(memory_format=LAST)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What programs ran, by key."""
    found: list[Any] = []
    call = Kept.__call__

    def counted(self: Kept, key: Any, *args: Any, **kwargs: Any) -> Any:
        ready = isinstance(self._found.get(key), _tape.Program)
        if ready and _tape.writing() and not _tape.noting():
            found.append(key)
        return call(self, key, *args, **kwargs)

    monkeypatch.setattr(Kept, "__call__", counted)
    return found


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for r in result for t in flat(r)]


@torch.no_grad()
def agree(net: nn.Module, x: Tensor) -> None:
    """By programs and without: the same bits in the same strides."""
    ours = flat(net(x))
    with fn.programs("off"):
        theirs = flat(net(x))
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def warm(net: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        net(x)


@routes("interpret", "gpu")
@pytest.mark.parametrize("name", NETS)
def test_same_bits_by_kernels(route: Route, name: str, ran: list[Any]) -> None:
    net, x = network(name).to(route.device), images(1).to(route.device)
    with fn.backend(route.backend):
        warm(net, x)
        ran.clear()
        agree(net, x)
    assert bool(ran) == (name != "GN")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "kind", ["plain", "nchw", "float64", "bf16", "autocast", "winograd", "inference mode"]
)
def test_same_bits_on_a_cpu(name: str, kind: str, ran: list[Any]) -> None:
    net, x = network(name), images()
    context: Any = contextlib.nullcontext
    if kind == "nchw":
        net, x = net.to(memory_format=torch.contiguous_format), x.contiguous()
    if kind in ("float64", "bf16"):
        dtype = torch.float64 if kind == "float64" else torch.bfloat16
        net, x = net.to(dtype), x.to(dtype)
    if kind == "autocast":
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    if kind == "winograd":
        context = lambda: fn.winograd("on")  # noqa: E731
    if kind == "inference mode":
        context = torch.inference_mode
    with context():
        warm(net, x)
        ran.clear()
        for batch in (x, x.neg(), torch.full_like(x, torch.nan), x):
            if not batch.isnan().any():
                agree(net, batch)
            else:
                with torch.no_grad():
                    assert all(t.isnan().any() for t in flat(net(batch)))
    assert bool(ran) == (name != "GN")


def test_made_without_a_value(ran: list[Any]) -> None:
    net, x = network(), images()
    warm(net, x)
    with poison():
        for _ in range(3):
            agree(net, x)
    assert len(ran) == 1  # of its own: the one from before would not have filled anything


@torch.no_grad()
def _optimizer(net: Any) -> None:
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), 0.01).step()


def _data(net: Any) -> None:
    """Seen because of ``eval()``, as docs/INFERENCE.md has it."""
    net.layer1[0].conv1.weight.data.mul_(1.5)
    net.eval()


def _trained(net: Any) -> None:
    net.train()(images().requires_grad_())
    net.eval()


def _part_trained(net: Any) -> None:
    net.layer2.train()(torch.randn(2, 8, 8, 8).contiguous(memory_format=LAST))
    net.layer2.eval()


def _functional_trained(net: Any) -> None:
    """Statistics that move by a function on the norm's tensors, without a word to the module."""
    block = net.layer1[0]
    bn = block.bn1.fused()._replace(training=True)
    with fn.backend("triton" if INTERPRET else "reference"):
        fn.materialize(
            fn.conv_bn_relu(torch.randn(2, 8, 8, 8).contiguous(memory_format=LAST), block.conv1, bn)
        )


def _class(net: Any) -> None:
    net.layer1[0].relu.__class__ = nn.Sigmoid


KEPT: list[Any] = []
CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda net: net.layer1[0].conv1.weight.mul_(1.5),
    "gamma": lambda net: net.layer1[0].bn1.weight.add_(1),
    "running mean": lambda net: net.bn1.running_mean.add_(1),
    "optimizer": _optimizer,
    "data, and eval()": _data,
    "other data": lambda net: setattr(
        net.layer1[0].conv1.weight, "data", net.layer1[0].conv1.weight.data * 2
    ),
    "state dict": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
    "state dict, assigned": lambda net: net.load_state_dict(
        {k: v * 2 for k, v in net.state_dict().items()}, assign=True
    ),
    "another parameter": lambda net: setattr(
        net.layer1[0].conv1, "weight", nn.Parameter(torch.ones(8, 8, 3, 3))
    ),
    "dtype there and back": lambda net: net.bfloat16().float(),
    "layout": lambda net: net.to(memory_format=torch.contiguous_format),
    "step of training": _trained,
    "part of it trained": _part_trained,
    "trained by a function": _functional_trained,
    "eps": lambda net: setattr(net.layer1[0].bn1, "eps", 0.5),
    "stride": lambda net: (
        setattr(net.layer2[0].conv1, "stride", (1, 1))
        or setattr(net.layer2[0].downsample[0], "stride", (1, 1))
    ),
    "another module": lambda net: setattr(net.layer1[1], "conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "another module, the old one kept": lambda net: (
        KEPT.append(net.layer1[1].conv1),
        setattr(net.layer1[1], "conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    ),
    "no module": lambda net: setattr(net, "layer4", nn.Identity()),
    "hook": lambda net: net.layer1[0].conv1.register_forward_hook(lambda m, a, out: out + 1),
    "hook before": lambda net: net.layer1.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "a forward": lambda net: setattr(net.layer1[0], "forward", lambda x: x + 1),
    "another class": _class,
    "outputs": lambda net: setattr(net, "out_indices", (0, 1)),
    "list in place": lambda net: net.res_layers.pop(),
    "training mode of a norm": lambda net: net.layer1[0].bn1.train(),
    "statistics not tracked": lambda net: (
        setattr(net.layer1[0].bn1, "running_mean", None) or setattr(net.layer1[0].bn1, "running_var", None)
    ),
    "forgotten": lambda net: fastres.forget_folded(net.layer1),
}


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_a_network(what: str, times: int) -> None:
    """The first forward after it, and those by which another program would be written."""
    net, x = network(), images()
    warm(net, x)
    with torch.no_grad():
        before = flat(net(x))
    with torch.no_grad() if "train" not in what else contextlib.nullcontext():
        CHANGES[what](net)
    for _ in range(times):
        if "training mode" in what:
            other = copy.deepcopy(net)
            with torch.no_grad(), fn.programs("off"):
                want = flat(other(x))
            with torch.no_grad():
                assert all(map(torch.equal, flat(net(x)), want))
        else:
            agree(net, x)
    with torch.no_grad():
        after = flat(net(x))
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    assert not same or what in ("forgotten", "layout", "dtype there and back")


@pytest.mark.interpret
@pytest.mark.parametrize("what", ["step of training", "part of it trained", "trained by a function"])
def test_kernels_that_change_a_network(what: str, ran: list[Any]) -> None:
    """They update running statistics without PyTorch's knowing."""
    net, x = network(), images(1)
    with fn.backend("triton"):
        warm(net, x)
        agree(net, x)
        assert ran
        with torch.no_grad():
            before = flat(net(x))
        CHANGES[what](net)
        agree(net, x)
        with torch.no_grad():
            assert not torch.equal(before[0], net(x)[0])


SETTINGS: dict[str, Callable[[], Any]] = {
    "backend": lambda: fn.backend("aten"),
    "folding": lambda: fn.folding("off"),
    "winograd": lambda: fn.winograd("on"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings(what: str, ran: list[Any]) -> None:
    net, x = network(), images()
    warm(net, x)
    with torch.no_grad(), SETTINGS[what]():
        net(x)
    assert not ran
    for _ in range(2):
        results = []
        for mode in ("auto", "off"):
            with torch.no_grad(), fn.programs(mode), SETTINGS[what]():
                results.append(flat(net(x)))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "what",
    ["record_routes", "dispatch mode", "profiler", "export", "compile", "deepcopy", "pickle", "hook for all"],
)
def test_whoever_watches_sees_everything(what: str, ran: list[Any]) -> None:
    net, x = network(), images()
    warm(net, x)
    ran.clear()
    with torch.no_grad():
        if what == "record_routes":
            with fn.record_routes() as log:
                net(x)
            assert len(log) > 8
        elif what == "dispatch mode":
            seen: list[Any] = []

            class Mode(torch.utils._python_dispatch.TorchDispatchMode):
                def __torch_dispatch__(
                    self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                ) -> Any:
                    seen.append(func)
                    return func(*args, **(kwargs or {}))

            with Mode():
                net(x)
            assert len(seen) > 8
        elif what == "profiler":
            with torch.profiler.profile() as found:
                net(x)
            assert len(found.events()) > 8
        elif what == "export":
            (a,) = torch.export.export(net, (x,)).module()(x)
            torch.testing.assert_close(a, net(x)[0], rtol=1e-3, atol=1e-3)
            ran.clear()
        elif what == "compile":
            (a,) = torch.compile(net, backend="eager", fullgraph=True)(x)
            torch.testing.assert_close(a, net(x)[0], rtol=1e-3, atol=1e-3)
            ran.clear()
        elif what == "hook for all":
            handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
            try:
                net(x)
            finally:
                handle.remove()
        else:
            other = copy.deepcopy(net) if what == "deepcopy" else pickle.loads(pickle.dumps(net))
            assert other not in _folding.users
            other(x)
    assert not ran


def test_unknown_modules_have_no_programs(ran: list[Any]) -> None:
    """Nobody knows what they do."""

    calls: list[int] = []

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return x * len(calls)

    net, x = network(), images()
    net.layer1.add_module("counts", Counts().eval())
    for _ in range(6):
        with torch.no_grad():
            net(x)
    assert len(calls) == 6 and not ran


def test_a_network_and_its_weights_are_let_go() -> None:
    net, x = network(), images()
    warm(net, x)
    agree(net, x)
    held = [weakref.ref(f.weight) for f in _folding.held(net)]
    (program,) = (p for p in _folding.users[net]._kept._found.values() if isinstance(p, _tape.Program))
    ref, run = weakref.ref(net), weakref.ref(program.run)
    assert held and all(r() is not None for r in held)
    del net, program
    gc.collect()
    assert ref() is None and run() is None and not any(r() is not None for r in held)


def test_training_lets_folded_weights_go() -> None:
    net, x = network(), images()
    warm(net, x)
    held = [weakref.ref(f.weight) for f in _folding.held(net)]
    net.train()(x)[0].sum().backward()
    gc.collect()
    assert held and not any(r() is not None for r in held)


def test_a_network_that_changes_all_the_time_is_signed_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    signed: list[int] = []
    make = _network._Signature.__init__

    def counted(self: Any, modules: Any) -> None:
        signed.append(1)
        make(self, modules)

    monkeypatch.setattr(_network._Signature, "__init__", counted)
    net, x = network(), images(1)
    with torch.no_grad():
        for _ in range(40):
            net.eval()(x)
    assert len(signed) <= 6


def test_sizes_by_turns(ran: list[Any]) -> None:
    net = network()
    for _ in range(4):
        for size in (32, 40, 48):
            agree(net, images(1, size))
    assert len(set(ran)) == 3


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    _folding.forget()
