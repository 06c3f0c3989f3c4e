"""The compiled loops: how they are built and found, values beside eager in float64, threads, and where ``auto`` takes
them."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import _cpu, cli
from fastres import functional as fn
from fastres.kernels import _native, conv_native, winograd_native
from fastres.kernels import winograd as wino
from tests.parity import assert_parity, like, randomize, steps
from tests.plain_resnet import Block
from tests.tolerance import assert_close64, assert_layout, poison

LAST, NCHW = torch.channels_last, torch.contiguous_format
ROOT = Path(__file__).resolve().parent.parent
HERE = torch.backends.cpu.get_cpu_capability()
RUNS = {"AVX2": ("AVX2", "AVX512"), "AVX512": ("AVX512",)}  # what instructions run on which processors
needs_processor = pytest.mark.skipif(HERE not in _native._FLAGS, reason=f"no loops for {HERE}")


@pytest.fixture(scope="module", params=RUNS)
def instructions(request: pytest.FixtureRequest) -> str:
    if HERE not in RUNS[request.param]:
        pytest.skip(f"this processor has {HERE}")
    return request.param


@pytest.fixture(scope="module")
def built(instructions: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Loops with these instructions, built for the test and in use; the user's own are left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRES_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        patch.setattr(_native._Setting, "native", "auto")
        _native.build()
        yield instructions
    _native._loaded.cache_clear()


SHAPES = {  # (B, C, H, W), N
    "even": ((2, 48, 8, 12), 64),
    "odd": ((3, 80, 7, 9), 48),  # panels that are not full
    "line": ((2, 64, 1, 5), 48),
    "pixel": ((4, 48, 1, 1), 112),
    "chunks": ((2, 48, 45, 50), 48),  # of the weight gradient
    "many-weights": ((5, 208, 14, 14), 192),
    "many-weights-chunks": ((18, 192, 15, 13), 192),
}


def convolve(x: Tensor, weight: Tensor, dy: Tensor, ours: bool) -> dict[str, Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = wino.winograd(x, weight, 4, 4) if ours else F.conv2d(x, weight, padding=1)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    return dict(y=y.detach(), dx=dx, dw=dw)


def operands(shape: str, layout: torch.memory_format = LAST) -> tuple[Tensor, Tensor, Tensor]:
    size, n = SHAPES[shape]
    x = torch.randn(size).relu().contiguous(memory_format=LAST)
    weight = (torch.randn(n, size[1], 3, 3) / (3 * size[1] ** 0.5)).contiguous(memory_format=layout)
    return x, weight, torch.randn(size[0], n, *size[2:])


@needs_processor
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw-weight", "channels_last-weight"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(built: str, shape: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = operands(shape, layout)
    eager = convolve(x, weight, dy, False)
    ref = convolve(x.double(), weight.double(), dy.double(), False)
    monkeypatch.setattr(wino, "weights", None)  # nobody else does it
    with poison():
        ours = convolve(x, weight, dy, True)
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name])
    assert_layout(ours["dx"], x)
    assert_layout(ours["dw"], weight)
    assert ours["y"].is_contiguous(memory_format=LAST)


@needs_processor
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("shape", [(4, 256, 14, 14), (2, 64, 56, 56)], ids=str)
def test_error_on_real_sizes(built: str, shape: tuple[int, ...], mean: float) -> None:
    c = shape[1]
    x = (torch.randn(shape) + mean).relu().contiguous(memory_format=LAST)
    weight, dy = torch.randn(c, c, 3, 3) / (3 * c**0.5), torch.randn(shape)
    ours, eager = (convolve(x, weight, dy, ours) for ours in (True, False))
    ref = convolve(x.double(), weight.double(), dy.double(), False)
    for name, t in ref.items():
        assert_close64(name, ours[name], eager[name], t)


@needs_processor
@pytest.mark.parametrize("shape", ["odd", "pixel", "many-weights"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_inference(built: str, shape: str, bias: bool, other: bool, relu: bool) -> None:
    x, weight, dy = operands(shape)
    b = torch.randn(len(weight)) if bias else None
    z = dy.contiguous(memory_format=LAST) if other else None

    def plain(dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x.to(dtype), weight.to(dtype), None if b is None else b.to(dtype), padding=1)
        y = y if z is None else y + z.to(dtype)
        return y.relu() if relu else y

    with poison():
        u = winograd_native.transformed(weight)
        y = winograd_native.convolution(x, None, len(weight), u=u, bias=b, other=z, relu=relu)
    assert_close64("y", y, plain(torch.float32), plain(torch.float64))
    if bias:
        assert b is not None
        b[1] = float("nan")
        y = winograd_native.convolution(x, None, len(weight), u=u, bias=b, other=z, relu=relu)
        assert y[:, 1].isnan().all() and not y[:, 0].isnan().any()  # as PyTorch's ReLU, and nowhere else


@needs_processor
@pytest.mark.parametrize("shape", ["odd", "chunks", "many-weights-chunks"])
def test_same_bits_by_any_number_of_threads(built: str, shape: str) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            found.append(convolve(*operands(shape), True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in other)


@needs_processor
def test_threads_of_python_at_once(built: str) -> None:
    """Each has scratch of its own; sizes change from call to call."""
    cases = [operands(name) for name in ("even", "many-weights", "odd", "chunks")]
    wanted = [convolve(*case, True) for case in cases]
    wrong: list[str] = []

    def work(order: int) -> None:
        for _ in range(3):
            for i in range(len(cases)):
                i = (i * order) % len(cases)
                found = convolve(*cases[i], True)
                wrong.extend(k for k, v in found.items() if not torch.equal(v, wanted[i][k]))

    threads = [threading.Thread(target=work, args=(order,)) for order in (1, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@needs_processor
def test_empty_batch(built: str) -> None:
    x, weight, dy = torch.zeros(0, 48, 4, 4), torch.randn(48, 48, 3, 3), torch.zeros(0, 48, 4, 4)
    x, dy = (t.contiguous(memory_format=LAST) for t in (x, dy))
    with poison():
        found = convolve(x, weight, dy, True)
    assert found["y"].shape == found["dx"].shape == x.shape and not found["dw"].any()


@needs_processor
def test_blocks(built: str) -> None:
    ours = randomize(fastres.ResLayer(fastres.BasicBlock, 2, 64, 64).to(memory_format=LAST))
    plain = like(nn.Sequential(Block(64, 64), Block(64, 64)), ours)
    x, dy = steps((4, 64, 18, 22), (4, 64, 18, 22), 1)
    with fn.record_routes() as log:
        assert_parity(ours, plain, x, dy, layout=LAST)
    found = {(c.op, c.route, c.reason) for c in log if c.op == "conv"}
    assert found == {("conv", "winograd", "cpu: measured; compiled loops")}


@needs_processor
@pytest.mark.parametrize("block", [fastres.BasicBlock, fastres.Bottleneck])
def test_compiled_in_one_graph(built: str, block: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_FEWEST", 0)
    monkeypatch.setattr(_cpu._Setting, "instructions", "AVX512")
    x, dy = (torch.randn(4, 192, 20, 20).contiguous(memory_format=LAST) for _ in range(2))
    results = []
    torch.manual_seed(0)
    layer = fastres.ResLayer(block, 1, 192, 192).to(memory_format=LAST)
    for model in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        with fn.record_routes() as log:
            out = model(leaf)
        assert "aten" not in {c.route for c in log if c.op == "conv"} and any(c.op == "conv" for c in log)
        out.backward(dy)
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ the direct weight gradient

GRADIENTS = {  # (B, C, H, W), N, kernel, stride, padding
    "1x1": ((3, 48, 7, 9), 80, 1, 1, 0),
    "1x1-strided": ((2, 64, 9, 8), 48, 1, 2, 0),
    "3x3": ((2, 80, 6, 7), 64, 3, 1, 1),
    "3x3-strided": ((3, 64, 13, 10), 80, 3, 2, 1),
    "3x3-unpadded": ((2, 48, 5, 6), 48, 3, 1, 0),
    "pixel": ((4, 64, 1, 1), 96, 3, 1, 1),
    "jobs": ((2, 272, 9, 9), 288, 1, 1, 0),
    "parts": ((5, 16, 33, 31), 32, 3, 2, 1),
    "parts-of-many": ((6, 64, 20, 19), 272, 1, 1, 0),
}


def differentiate(
    name: str, layout: torch.memory_format, dtype: torch.dtype, ours: bool
) -> dict[str, Tensor]:
    shape, n, side, stride, padding = GRADIENTS[name]
    torch.manual_seed(3)
    x = torch.randn(shape).relu().contiguous(memory_format=LAST).to(dtype).requires_grad_()
    weight = (torch.randn(n, shape[1], side, side) / (side * shape[1] ** 0.5)).to(dtype)
    weight = weight.contiguous(memory_format=layout).requires_grad_()
    convolution = conv_native.conv if ours else lambda *a: F.conv2d(*a[:2], None, *a[2:])
    y = convolution(x, weight, stride, padding)
    dx, dw = torch.autograd.grad(y, (x, weight), torch.randn(y.shape).to(dtype))
    if ours:
        assert_layout(dw, weight)
    return dict(y=y.detach(), dx=dx, dw=dw)


@needs_processor
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw-weight", "channels_last-weight"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_weight_gradient(built: str, name: str, layout: torch.memory_format) -> None:
    eager, ref = (differentiate(name, layout, dtype, False) for dtype in (torch.float32, torch.float64))
    with poison():
        ours = differentiate(name, layout, torch.float32, True)
    assert torch.equal(ours["y"], eager["y"]) and torch.equal(ours["dx"], eager["dx"])
    assert_close64("dw", ours["dw"], eager["dw"], ref["dw"])


@needs_processor
@pytest.mark.parametrize("name", ["jobs", "parts", "parts-of-many"])
def test_weight_gradient_has_the_same_bits_by_any_number_of_threads(built: str, name: str) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(differentiate(name, LAST, torch.float32, True)["dw"])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_processor
def test_weight_gradient_of_an_empty_batch_and_of_other_channels(built: str) -> None:
    for shape, n in (((0, 48, 4, 4), 48), ((2, 24, 4, 4), 48), ((2, 48, 4, 4), 24)):
        x = torch.randn(shape).contiguous(memory_format=LAST)
        weight = torch.randn(n, shape[1], 1, 1, requires_grad=True)
        dy = torch.randn(shape[0], n, 4, 4)
        (dw,) = torch.autograd.grad(conv_native.conv(x, weight, 1, 0), weight, dy)
        torch.testing.assert_close(dw, torch.einsum("bnhw,bchw->nc", dy, x)[..., None, None])


@needs_processor
def test_operators_with_the_loops(built: str) -> None:
    x, weight, dy = operands("odd")
    bias, u = torch.randn(len(weight)), winograd_native.transformed(weight)
    dy = dy.contiguous(memory_format=LAST)
    calls = {
        "winograd": [(x, weight, False, 4), (dy, weight, True, 4)],
        "winograd_weight": [(x, dy, weight, 4)],
        "winograd_loops": [(x, u, bias, None, False), (x, u, bias, dy, True)],
        "conv_weight_gradient": [(x, dy, weight, 1, 1)],
    }
    for name, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(
                getattr(torch.ops.fastres, name).default, args, test_utils=("test_schema", "test_faketensor")
            )


@needs_processor
def test_a_second_derivative_is_refused(built: str) -> None:
    x = torch.randn(2, 48, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(48, 48, 1, 1, requires_grad=True)
    (g,) = torch.autograd.grad(conv_native.conv(x, weight, 1, 0).square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        g.sum().backward()


@needs_processor
def test_bottlenecks(built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_FEWEST", 0)
    monkeypatch.setattr(_cpu._Setting, "instructions", "AVX512")  # which has the loops for 1x1 too
    monkeypatch.setitem(_cpu._LOOPED_WEIGHTS, "AVX512", 10)
    for name in ("_NATIVE", "_NATIVE_WEIGHTS"):  # the net is small, so that no ReLU is on the edge
        monkeypatch.setattr(_cpu, name, _cpu._Cost((math.inf, 0), (0, 0)))
    ours = randomize(fastres.ResLayer(fastres.Bottleneck, 2, 64, 256, stride=2).to(memory_format=LAST))
    plain = like(nn.Sequential(Block(64, 256, 64, stride=2), Block(256, 256, 64)), ours)
    x, dy = steps((2, 64, 16, 15), (2, 256, 8, 8), 1)
    with fn.record_routes() as log:
        assert_parity(ours, plain, x, dy, layout=LAST)
    found = {c.reason for c in log if c.op == "conv"}
    assert found == {"cpu: measured; weight gradient in compiled loops", "cpu: measured; compiled loops"}


@needs_processor
@pytest.mark.parametrize("change", [
    "fits", "native off", "aten", "few", "eval", "frozen", "5x5", "groups", "dilation", "strides", "paddings", "same",
    "bias", "hook", "nchw", "autocast", "no_grad", "channels", "instructions", "1x1", "1x3",
])  # fmt: skip
def test_which_weight_gradients_are_taken(built: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "5x5": dict(kernel_size=5, padding=2), "groups": dict(groups=2), "dilation": dict(dilation=2),
        "strides": dict(stride=(1, 2)), "paddings": dict(padding=(1, 0)), "same": dict(padding="same"),
        "1x1": dict(kernel_size=1, out_channels=256), "1x3": dict(kernel_size=(1, 3)),
        "bias": dict(bias=True), "channels": dict(out_channels=72),
    }.get(change, {})  # fmt: skip
    conv = nn.Conv2d(**dict(in_channels=64, out_channels=64, kernel_size=3, bias=False) | options)
    shape = (1, 64, 4, 4) if change == "few" else (8, 64, 28, 28)
    x = torch.empty(shape, memory_format=NCHW if change == "nchw" else LAST)
    if change == "hook":
        conv.register_forward_hook(lambda *a: None)
    if change == "frozen":
        conv.requires_grad_(False)
        x.requires_grad_()
    if change == "instructions":
        monkeypatch.setattr(_cpu._Setting, "instructions", "SVE256")
    with (
        fn.native("off" if change == "native off" else "auto"),
        fn.backend("aten" if change == "aten" else "auto"),
        torch.set_grad_enabled(change != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
    ):
        assert _cpu.looped(conv, x, change != "eval") == (change == "fits")
        if change == "1x1":
            monkeypatch.setattr(_cpu._Setting, "instructions", "AVX512")
            assert _cpu.looped(conv, x, True)


# ---------------------------------------------------------------------------------------------- a whole inference


@needs_processor
def test_networks_infer_by_the_loops(built: str) -> None:
    torch.manual_seed(0)
    net = randomize(fastres.ResLayer(fastres.BasicBlock, 2, 64, 64)).to(memory_format=LAST).eval()
    net = nn.Sequential(net)
    plain = like(nn.Sequential(nn.Sequential(Block(64, 64), Block(64, 64))), net).eval()
    with torch.no_grad(), fn.record_routes() as log:
        x = torch.randn(2, 64, 20, 24).contiguous(memory_format=LAST)
        y = net(x)
        assert_close64("y", y, plain(x), plain.double()(x.double()))
    assert {c.route for c in log} == {"winograd"} and all("compiled loops" in c.reason for c in log)
    with torch.no_grad(), fn.native("off"), fn.record_routes() as log:
        net(x)
    assert not any("compiled loops" in c.reason for c in log)
    with torch.no_grad():
        net[0][0].conv1.weight.data[0, 0, 0, 0] = float("nan")
        fastres.forget_folded(net)
        with fn.record_routes() as log:
            assert net(x).isnan().any()
    assert {c.route for c in log} == {"winograd", "folded"}


@needs_processor
def test_programs_run_the_loops(built: str) -> None:
    """A network's inference is recorded at its fourth call and run as a program from then on."""
    torch.manual_seed(0)
    net = randomize(fastres.ResNet(18, stem_channels=64, base_channels=64)).eval().to(memory_format=LAST)
    images = [torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST) for _ in range(7)]
    with torch.no_grad():
        found = [net(x)[-1].clone() for x in images]
        with fn.programs("off"):
            wanted = [net(x)[-1] for x in images]
        with fn.record_routes() as log:
            net(images[0])
    assert sum("compiled loops" in c.reason for c in log) >= 6
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), fn.native("off"):
        off = net(images[6])[-1]
        with fn.programs("off"):
            assert torch.equal(off, net(images[6])[-1])
    assert not torch.equal(off, found[6])


# ----------------------------------------------------------------------------------------------------- the rule


def tiles(channels: int, pixels: int, batch: int = 8, **options: object) -> tuple[int, int]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    x = torch.empty(batch, channels, pixels, pixels, memory_format=LAST)
    return _cpu.winograd_tiles(conv, x, bool(options.get("training", True)))


@needs_processor
def test_auto_takes_what_was_measured(built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu._Setting, "instructions", built)
    assert [tiles(c, p) for c, p in ((64, 56), (128, 28), (256, 14))] == [(4, 4)] * 3
    assert (
        tiles(512, 7) == (0, 4 if built == "AVX2" else 0)
        and tiles(512, 7, 32) == (4, 4)
        and tiles(512, 7, 1) == (0, 0)
    )
    assert tiles(32, 56) == (0, 0)  # too narrow for tiles of 4
    assert tiles(64, 56, training=False) == (0, 0)
    with fn.winograd("off"):
        assert tiles(64, 56) == (0, 0)
    with fn.winograd("on"):
        assert tiles(512, 7, 1) == (2, 2)
        conv = nn.Conv2d(512, 512, 3)
        x = torch.empty(1, 512, 7, 7)
        assert _cpu.measured(conv, x, 2, 2) == "cpu: measured"  # the loops have tiles of 4 alone
        assert _cpu.measured(conv, x, 0, 4) == "cpu: measured; compiled loops; weight gradient only"
    with fn.native("off"):
        assert tiles(56, 56) == tiles(72, 56) == ((4, 4) if built == "AVX2" else (4, 0))
    monkeypatch.setattr(_cpu._Setting, "instructions", "SVE256")
    assert tiles(64, 56) == (0, 0)


@needs_processor
def test_serves(built: str) -> None:
    assert _native.serves(torch.float32, 48, 64)
    assert not _native.serves(torch.float64, 48, 64)
    assert not _native.serves(torch.float32, 48, 56)
    with fn.native("off"):
        assert not _native.serves(torch.float32, 48, 64)
        assert _native.native_obstacle() == "native is 'off'"
    with pytest.raises(ValueError, match="native is 'on'; wanted one of auto, off"), fn.native("on"):
        pass


# ------------------------------------------------------------------------------------------------------ building


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_native._Setting, "native", "auto")
    _native._loaded.cache_clear()
    yield tmp_path / "cache"
    _native._loaded.cache_clear()


@needs_processor
def test_nothing_builds_by_itself(unbuilt: Path) -> None:
    assert _native.native_obstacle() == "the compiled loops are not built: python -m fastres build"
    assert not _native.serves(torch.float32, 64)
    assert tiles(64, 56) == (4, 4)  # by PyTorch's operators, with AVX2
    assert not unbuilt.exists()


@needs_processor
def test_the_command_builds(unbuilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build"]) == 0
    (path,) = unbuilt.iterdir()
    assert capsys.readouterr().out == f"built {path}\n"
    assert _native.serves(torch.float32, 64) and path == _native.built_at()
    assert fastres.environment.environment()["compiled_loops"] == str(path)


@needs_processor
def test_other_sources_need_another_build(
    unbuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _native.build()
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in _native._sources():
        (sources / path.name).write_text(path.read_text() + "\n")
    monkeypatch.setattr(_native, "_SOURCES", sources)
    _native._loaded.cache_clear()
    assert "not built" in _native.native_obstacle()


@needs_processor
@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/nowhere/c++", "no C\\+\\+ compiler: /nowhere/c\\+\\+ not found; CXX names another"),
        ("false", "false failed:"),
    ],
)
def test_building_fails(unbuilt: Path, compiler: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(OSError, match=said):
        _native.build()
    assert not unbuilt.exists() or not list(unbuilt.iterdir())
    assert "not built" in _native.native_obstacle()
    assert cli.main(["build"]) == 1


def test_another_processor(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    said = "the compiled loops are for processors with AVX2 or AVX-512; this one has DEFAULT"
    with pytest.raises(OSError, match=said):
        _native.build()
    assert _native.native_obstacle() == said and not _native.serves(torch.float32, 64)


@needs_processor
def test_a_broken_build_is_not_used(unbuilt: Path) -> None:
    unbuilt.mkdir()
    _native.built_at().write_bytes(b"not a library")
    assert "invalid ELF header" in _native.native_obstacle() or "file too short" in _native.native_obstacle()


@needs_processor
def test_under_sanitizers(instructions: str, tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers see no fault, and values agree with plain loops."""
    flags = [
        f for f in (*_native._COMMON, *_native._FLAGS[instructions]) if f not in ("-O3", "-fPIC", "-shared")
    ]
    sources = [str(p) for p in _native._sources() if p.suffix == ".cpp"]
    command = ["c++", *flags, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [str(ROOT / "tests" / "native_loops.cpp"), *sources, "-o", str(tmp_path / "loops")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "loops"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "agree\n"), done.stdout + done.stderr


def test_fresh_process_finds_what_was_built(built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if built != HERE:
        pytest.skip("a fresh process goes by the processor")
    monkeypatch.setenv("FASTRES_NATIVE", "auto")
    code = "from fastres.kernels import _native; print(repr(_native.native_obstacle()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "''\n", done.stdout + done.stderr
