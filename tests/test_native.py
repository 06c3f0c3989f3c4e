"""The compiled loops: how they are built and found, values beside eager in float64, threads, and where ``auto`` takes
them."""

from __future__ import annotations

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
from fastres.kernels import _native, winograd_native
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
    ours = randomize(fastres.ResLayer(fastres.BasicBlock, 2, 48, 48).to(memory_format=LAST))
    plain = like(nn.Sequential(Block(48, 48), Block(48, 48)), ours)
    x, dy = steps((4, 48, 18, 22), (4, 48, 18, 22), 2)
    with fn.record_routes() as log:
        assert_parity(ours, plain, x, dy, layout=LAST)
    found = {(c.op, c.route, c.reason) for c in log if c.op == "conv"}
    assert found == {("conv", "winograd", "cpu: measured; compiled loops")}


@needs_processor
def test_compiled_in_one_graph(built: str) -> None:
    x, dy = (torch.randn(4, 48, 20, 20).contiguous(memory_format=LAST) for _ in range(2))
    results = []
    torch.manual_seed(0)
    layer = fastres.ResLayer(fastres.BasicBlock, 1, 48, 48).to(memory_format=LAST)
    for model in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        out = model(leaf)
        out.backward(dy)
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the rule


def tiles(channels: int, pixels: int, batch: int = 8, **options: object) -> tuple[int, int]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    x = torch.empty(batch, channels, pixels, pixels, memory_format=LAST)
    return _cpu.winograd_tiles(conv, x, bool(options.get("training", True)))


@needs_processor
def test_auto_takes_what_was_measured(built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu._Setting, "instructions", built)
    assert [tiles(c, p) for c, p in ((64, 56), (128, 28), (256, 14))] == [(4, 4)] * 3
    assert tiles(512, 7) == (0, 4) and tiles(512, 7, 32) == (4, 4) and tiles(512, 7, 1) == (0, 0)
    assert tiles(32, 56) == (0, 0)  # too narrow for tiles of 4
    assert tiles(64, 56, training=False) == (0, 0)
    with fn.winograd("off"):
        assert tiles(64, 56) == (0, 0)
    with fn.winograd("on"):
        assert tiles(512, 7, 1) == (2, 2)
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
