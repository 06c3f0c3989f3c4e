"""Winograd's form of 3x3 convolutions on a CPU: values, gradients, where it applies, and blocks that take it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import _cpu
from fastres import functional as fn
from fastres.kernels import winograd as wino
from fastres.kernels.folded_conv import Geometry
from tests.parity import assert_parity, like, randomize, steps
from tests.plain_resnet import Block
from tests.tolerance import assert_close64, assert_layout, poison

LAST, NCHW = torch.channels_last, torch.contiguous_format
SHAPES = {  # (B, C, H, W), N
    "even": ((2, 8, 6, 8), 12),
    "odd": ((3, 5, 7, 9), 4),
    "odd-line": ((2, 3, 1, 5), 3),
    "pixel": ((4, 6, 1, 1), 2),
    "one-channel": ((2, 1, 4, 3), 1),
    "many": ((11, 7, 6, 5), 10),
}


def convolve(x: Tensor, weight: Tensor, dy: Tensor, how: str) -> dict[str, Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    if how == "eager":
        y = F.conv2d(x, weight, padding=1)
    else:
        tile = int(how[-1])
        y = wino.winograd(x, weight, tile if "products" in how else 0, tile)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    return dict(y=y.detach(), dx=dx, dw=dw)


# In float32 tiles of 4 are for layers of many channels, below: where few are summed, the direct form is too exact.
@pytest.mark.parametrize(
    ("how", "dtype"),
    [("products 2", torch.float32), ("weights 2", torch.float32),
     *((f"{what} {tile}", torch.float64) for what in ("products", "weights") for tile in (2, 4))],
)  # fmt: skip
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw-weight", "channels_last-weight"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(
    shape: str, layout: torch.memory_format, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wino, "_ROWS", 20)  # several steps, the last one short
    size, n = SHAPES[shape]
    x = torch.randn(size, dtype=dtype).contiguous(memory_format=LAST)
    weight = torch.randn(n, size[1], 3, 3, dtype=dtype).contiguous(memory_format=layout)
    dy = torch.randn(size[0], n, *size[2:], dtype=dtype)
    with poison():
        ours = convolve(x, weight, dy, how)
    eager, ref = (
        convolve(*(t.to(kind) for t in (x, weight, dy)), "eager") for kind in (dtype, torch.float64)
    )
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name])
    assert_layout(ours["dx"], x)
    assert_layout(ours["dw"], weight)
    assert ours["y"].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("batch", [1, 5, 9])
def test_products(batch: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's, which may want other packings for a last step that is shorter, and PyTorch's where it has none."""
    monkeypatch.setattr(wino, "_ROWS", 60)
    assert wino.products_serve(torch.float32) and not wino.products_serve(torch.float64)
    taken = []
    products = wino.products
    monkeypatch.setattr(wino, "products", lambda *a: taken.append(len(a[0])) or products(*a))
    if not by_onednn:
        monkeypatch.setattr(wino, "products_serve", lambda dtype: False)
    x = torch.randn(batch, 64, 20, 19).contiguous(memory_format=LAST)
    weight, dy = torch.randn(80, 64, 3, 3) / 24, torch.randn(batch, 80, 20, 19)
    with poison():
        ours = convolve(x, weight, dy, "products 4")
    assert bool(taken) == by_onednn
    eager, ref = (
        convolve(*(t.to(kind) for t in (x, weight, dy)), "eager") for kind in (x.dtype, torch.float64)
    )
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name])


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("shape", [(4, 256, 14, 14), (2, 64, 29, 27), (3, 48, 6, 11)], ids=str)
def test_error_on_real_sizes(shape: tuple[int, ...], mean: float, tile: int) -> None:
    """As many products a value as in a ResNet: by tiles of 2, no more than eager's error, without the factor of two."""
    c = shape[1]
    x = (torch.randn(shape) + mean).relu().contiguous(memory_format=LAST)
    weight, dy = torch.randn(c, c, 3, 3) / (3 * c**0.5), torch.randn(shape)
    ours, eager = (convolve(x, weight, dy, how) for how in (f"products {tile}", "eager"))
    ref = convolve(x.double(), weight.double(), dy.double(), "eager")
    for name, t in ref.items():
        assert_close64(name, ours[name], eager[name], t)
        if tile == 2:
            size = 1e-6 * float(t.abs().max())
            assert float((ours[name] - t).abs().max()) <= float((eager[name] - t).abs().max()) + size, name


@pytest.mark.parametrize("tile", [2, 4])
def test_repeats_bitwise(tile: int) -> None:
    x = torch.randn(8, 64, 14, 14).contiguous(memory_format=LAST)
    weight, dy = torch.randn(64, 64, 3, 3), torch.randn(8, 64, 14, 14)
    first, second = (convolve(x, weight, dy, f"products {tile}") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("tile", [2, 4])
def test_gradcheck_and_second_derivative(tile: int) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(wino.winograd, (x, weight, tile, tile))
    (g,) = torch.autograd.grad(wino.winograd(x, weight, tile, tile).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        g.sum().backward()


# ------------------------------------------------------------------------------------------------------ in a net


def stage() -> fastres.ResLayer:
    return randomize(fastres.ResLayer(fastres.BasicBlock, 2, 8, 8).to(memory_format=LAST))


def test_blocks_by_the_rule() -> None:
    ours = stage()
    plain = like(nn.Sequential(Block(8, 8), Block(8, 8)), ours)
    x, dy = steps((4, 8, 6, 7), (4, 8, 6, 7), 2)
    with fn.winograd("on"), fn.record_routes() as log:
        assert_parity(ours, plain, x, dy, layout=LAST)
    assert {c.route for c in log if c.op == "conv"} == {"winograd"}


def test_without_the_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu._Setting, "instructions", "AVX512")
    ours = randomize(fastres.ResLayer(fastres.BasicBlock, 1, 96, 96).to(memory_format=LAST))
    plain = like(nn.Sequential(Block(96, 96)), ours)
    x, dy = steps((4, 96, 28, 28), (4, 96, 28, 28), 1)
    monkeypatch.setattr(wino, "weight_gradient", None)
    with fn.record_routes() as log:
        assert_parity(ours, plain, x, dy, layout=LAST)
    assert {(c.route, c.reason) for c in log if c.op == "conv"} == {
        ("winograd", "cpu: measured; weight gradient direct")
    }


def test_compiled_in_one_graph() -> None:
    x, dy = (torch.randn(4, 8, 6, 7).contiguous(memory_format=LAST) for _ in range(2))
    results = []
    with fn.winograd("on"):
        for model in (stage(), torch.compile(stage(), backend="aot_eager", fullgraph=True)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = model(leaf)
            out.backward(dy)
            results.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_auto_takes_what_was_measured() -> None:
    def parts(
        channels: int, pixels: int, dtype: torch.dtype = torch.float32, training: bool = True
    ) -> tuple[int, int]:
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
        x = torch.empty(8, channels, pixels, pixels, dtype=dtype, memory_format=LAST)
        return _cpu.winograd_tiles(conv, x, training)

    assert [parts(*p) for p in ((64, 56), (128, 28), (256, 14), (512, 7))] == [(4, 4), (4, 4), (2, 2), (2, 2)]
    assert parts(32, 56) == parts(512, 3) == parts(256, 14, torch.float64) == (0, 0)
    assert parts(256, 14, training=False) == (0, 0)


def test_auto_knows_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512 the weight gradient is faster by the direct form."""
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    x = torch.empty(8, 128, 28, 28, memory_format=LAST)
    g = Geometry((1, 1), (1, 1), (1, 1), 1)
    for instructions, trained, folded in (("AVX2", (4, 4), 4), ("AVX512", (4, 0), 4), ("SVE256", (0, 0), 0)):
        monkeypatch.setattr(_cpu._Setting, "instructions", instructions)
        assert _cpu.winograd_tiles(conv, x, True) == trained
        assert _cpu.folded_tile(conv.weight.shape, g, tuple(x.shape), torch.float32) == folded
        with fn.winograd("on"):
            assert _cpu.winograd_tiles(conv, x, True) == (4, 4)
            assert _cpu.folded_tile(conv.weight.shape, g, tuple(x.shape), torch.float32) == 4


def test_auto_needs_onednn_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    x = torch.empty(8, 128, 28, 28, memory_format=LAST)
    monkeypatch.setattr(_cpu, "products_serve", lambda dtype: False)
    assert _cpu.winograd_tiles(conv, x, True) == (4, 4)
    monkeypatch.setattr(_cpu._Setting, "instructions", "AVX512")
    assert _cpu.winograd_tiles(conv, x, True) == (0, 0)


# --------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    "change",
    ["off", "aten", "stride", "dilation", "groups", "bias", "hook", "no_grad", "autocast", "nchw", "reflect",
     "no gradient", "subclass", "forward", "global hook"],
)  # fmt: skip
def test_winograd_stays_away(change: str, request: pytest.FixtureRequest) -> None:
    options = {"stride": dict(stride=2), "dilation": dict(dilation=2), "groups": dict(groups=2),
               "reflect": dict(padding_mode="reflect")}.get(change, {})  # fmt: skip
    kind = type("Other", (nn.Conv2d,), {}) if change == "subclass" else nn.Conv2d
    conv = kind(4, 4, 3, padding=1, bias=change == "bias", **options)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=NCHW if change == "nchw" else LAST)
    with fn.winograd("on"):
        assert _cpu.winograd_tiles(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), x.to(memory_format=LAST), False
        )[0]
    if change == "hook":
        conv.register_forward_hook(lambda *a: None)
    if change == "forward":
        conv.forward = lambda x: F.conv2d(x, conv.weight, padding=1)  # as some packages attach adapters
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
        request.addfinalizer(handle.remove)
    if change == "no gradient":
        conv.requires_grad_(False)
    with (
        fn.winograd("off" if change == "off" else "on"),
        fn.backend("aten" if change == "aten" else "auto"),
        torch.set_grad_enabled(change != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
    ):
        assert _cpu.winograd_tiles(conv, x, True) == (0, 0)


def test_unknown_mode() -> None:
    with (
        pytest.raises(ValueError, match="winograd is 'maybe'; wanted one of auto, on, off"),
        fn.winograd("maybe"),
    ):
        pass
