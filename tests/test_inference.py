"""Inference on every route: values against eager eval mode, what must not be overwritten, special values, layouts."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from fastres import _cpu, _folding, _inference, functional
from fastres._registry import MODELS
from fastres.kernels import folded_conv
from fastres.kernels._triton import INTERPRET
from fastres.kernels.winograd import Steps
from tests.cases import Route
from tests.parity import randomize
from tests.tolerance import assert_close64, assert_layout, poison

NCHW, LAST = torch.contiguous_format, torch.channels_last
plain_process = pytest.mark.skipif(
    INTERPRET, reason="the CPU operators are the kernels under TRITON_INTERPRET"
)
ROUTES = [
    pytest.param(Route("auto", "cpu"), id="onednn", marks=plain_process),
    pytest.param(Route("aten", "cpu"), id="aten", marks=plain_process),
    pytest.param(Route("reference", "cpu"), id="reference", marks=plain_process),
    pytest.param(Route("triton", "cpu"), id="interpret", marks=pytest.mark.interpret),
    pytest.param(Route("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]
AUTO = Route("auto", "cpu")
every_route = pytest.mark.parametrize("route", ROUTES)


def bottleneck(kind, **options):
    return fastres.ResLayer(fastres.Bottleneck, 2, 16, 64, norm_cfg=dict(type=kind), **options)


def basic(kind, **options):
    return fastres.ResLayer(fastres.BasicBlock, 2, 16, 32, norm_cfg=dict(type=kind), **options)


BLOCKS = {
    "basic": lambda k: basic(k, stride=2),
    "bottleneck": lambda k: bottleneck(k, stride=2),
    "same size": lambda k: fastres.ResLayer(fastres.Bottleneck, 1, 16, 16, norm_cfg=dict(type=k)),
    "caffe": lambda k: bottleneck(k, stride=2, style="caffe"),
    "dilated": lambda k: bottleneck(k, dilation=2),
    "pooled shortcut": lambda k: bottleneck(k, stride=2, avg_down=True),
    "grouped": lambda k: bottleneck(k, stride=2, groups=4, mid_channels=16),
    "drop path": lambda k: basic(k, drop_path_rate=0.5),
    "se": lambda k: fastres.ResLayer("SEBottleneck", 2, 16, 64, stride=2, norm_cfg=dict(type=k)),
    "odd channels": lambda k: fastres.ResLayer(fastres.Bottleneck, 1, 9, 20, stride=2, norm_cfg=dict(type=k)),
}


def pair(make, dtype=torch.float32, device="cpu"):
    """The network on fused norms, the same on PyTorch's, and that in float64."""
    ours = randomize(make("FusedBN")).to(device, dtype).eval()
    plain = make("BN").to(device, dtype).eval()
    plain.load_state_dict(ours.state_dict())
    return ours, plain, copy.deepcopy(plain).double()


def last(out):
    return out[-1] if isinstance(out, tuple) else out


def assert_like_eager(make, x, route=AUTO, dtype=None, twice=True):
    dtype = dtype or x.dtype
    ours, plain, ref = pair(make, dtype, route.device)
    x = x.to(route.device)
    kept = x.clone(memory_format=torch.preserve_format)
    with torch.no_grad(), functional.record_routes() as log:
        eager, want = last(plain(x)), last(ref(x.double()))
        with functional.backend(route.backend), poison():
            got = last(ours(x))
            again = last(ours(x)) if twice else got
    assert torch.equal(x, kept), "the input was changed"
    assert torch.equal(got, again)
    assert_layout(got, eager)
    assert_close64("inference", got, eager, want, dtype)
    assert log and all("norm folded" in c.reason or c.op in ("max_pool", "layout") or not c.key for c in log)
    return log


@every_route
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, layout, route, randn):
    size = (2, 9 if name == "odd channels" else 16, 9, 7)
    if route.device == "cuda":
        size = (8, size[1], 33, 31)
    if route.backend == "triton" and route.device == "cpu" and name in ("grouped", "drop path", "dilated"):
        size = (1, size[1], 5, 4)
    log = assert_like_eager(BLOCKS[name], randn(*size, layout=layout), route)
    used = {c.route for c in log if c.op != "add_relu"}
    if route.backend == "auto" and layout == LAST and name != "se":
        assert used == {"onednn"}
    if route.backend == "triton" and layout == LAST and "basic" not in name and name != "drop path":
        assert "triton" in used


@every_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_reduced_nets(dtype, route, randn):
    """`.half()` and `.bfloat16()`: parameters, statistics and activations in 16 bits."""
    assert_like_eager(BLOCKS["bottleneck"], randn(2, 16, 9, 7, dtype=dtype, layout=LAST), route)


@plain_process
def test_float64(randn):
    log = assert_like_eager(BLOCKS["bottleneck"], randn(2, 16, 9, 7, dtype=torch.float64, layout=LAST))
    assert {c.reason for c in log} == {"norm folded; oneDNN has no float64"}


@every_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(dtype, route, randn):
    """Folded in float32, then cast: the weight is rounded once, as eager's convolution rounds it."""
    ours, plain, ref = pair(BLOCKS["bottleneck"], device=route.device)
    x = randn(2, 16, 9, 7, layout=LAST).to(route.device)
    with torch.no_grad():
        want = ref(x.double())
        with torch.autocast(route.device, dtype):
            eager = plain(x)
            with functional.backend(route.backend):
                got, again = ours(x), ours(x)
    assert got.dtype == eager.dtype == dtype and torch.equal(got, again)
    assert_close64("autocast", got, eager, want, dtype)


NETS = {
    "resnet18": dict(type="ResNet", depth=18),
    "resnet50": dict(type="ResNet", depth=50),
    "v1d": dict(type="ResNetV1d", depth=50),
    "cifar": dict(type="ResNet_CIFAR", depth=18),
    "resnext": dict(type="ResNeXt", depth=50),
    "se": dict(type="SEResNet", depth=50),
    "dilated caffe": dict(
        type="ResNet", depth=50, style="caffe", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)
    ),
}


def build(name, **options):
    return lambda kind: MODELS.build(
        dict(NETS[name], stem_channels=16, base_channels=16, norm_cfg=dict(type=kind), **options)
    )


@plain_process
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", [n for n in NETS if n != "resnext"])
def test_networks(name, layout, randn):
    """NCHW images run in channels_last inside and come out in NCHW."""
    log = assert_like_eager(build(name), randn(2, 3, 45, 38, layout=layout))
    assert any(c.op == "layout" for c in log) == (layout == NCHW)
    assert {c.route for c in log if c.op.startswith("conv_bn")} == {"onednn"}


@plain_process
def test_every_output_comes_back_in_the_layout_of_the_images(randn):
    net = randomize(build("resnet18", out_indices=(0, 1, 2, 3))("FusedBN")).eval()
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        assert all(out.is_contiguous() for out in net(x))
        assert all(out.is_contiguous(memory_format=LAST) for out in net(x.contiguous(memory_format=LAST)))


@plain_process
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "v1d", "cifar"])
def test_an_image_that_is_not_finite_does_not_come_out_finite(name, value, randn):
    """oneDNN's ReLU swallows NaN; the identity must carry it past."""
    net = randomize(build(name)("FusedBN")).eval()
    x = randn(2, 3, 32, 32, layout=LAST)
    x[0, 0, 5, 5] = value
    with torch.no_grad():
        out = net(x)[-1]
    assert not out[0].isfinite().all() and out[1].isfinite().all()


@plain_process
@pytest.mark.parametrize("fixed", [False, True])
def test_finite_images_end_in_fused_relus_only(fixed, randn):
    net = randomize(build("resnet18")("FusedBN")).eval()
    net = fastres.fold(net) if fixed else net
    x, bad = randn(2, 3, 32, 32, layout=LAST), randn(2, 3, 32, 32, layout=LAST)
    bad[1, 2, 3, 4] = float("nan")

    def passes(x: torch.Tensor) -> int:
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            net(x)
        return sum(e.count for e in p.key_averages() if e.key == "aten::relu_")

    passes(x)  # the first call in a process also tries oneDNN's operators
    assert passes(x) == 0 < passes(bad) and passes(x) == 0
    with torch.no_grad():
        assert net(bad)[-1][1].isnan().any() and net(x)[-1].isfinite().all()


@plain_process
def test_a_weight_that_is_not_finite_does_not_come_out_finite(randn):
    net = randomize(build("resnet18")("FusedBN")).eval()
    with torch.no_grad():
        net.layer2[0].conv2.weight[0, 0, 0, 0] = float("nan")
        with functional.record_routes() as log:
            out = net(randn(1, 3, 32, 32, layout=LAST))[-1]
        assert out.isnan().any()
        assert [c.route for c in log if "not finite" in c.reason] == ["folded"]
        net.layer2[0].conv2.weight[0, 0, 0, 0] = 1.0
        assert net(randn(1, 3, 32, 32, layout=LAST))[-1].isfinite().all()


class Strange(fastres.BasicBlock):
    """Somebody's block, which makes a NaN of finite values."""

    def forward(self, x):
        return super().forward(x) * torch.zeros(()).log() * 0


@plain_process
@pytest.mark.parametrize("how", ["se", "user", "hook", "norm", "padding_mode"])
def test_nan_made_inside_a_network_comes_out(how, randn):
    if how == "se":
        net = fastres.SEResNet(depth=50, base_channels=8, stem_channels=8)
        net.layer1[0].se_layer.conv2.conv.bias.data.fill_(float("nan"))
    else:
        net = fastres.ResNet(18, base_channels=8, stem_channels=8)
    net = randomize(net) if how != "se" else net
    net = net.to(memory_format=LAST).eval()
    block = net.layer1[0]
    if how == "user":
        net.layer1[0] = Strange(8, 8).to(memory_format=LAST).eval()
    elif how == "hook":
        block.conv1.register_forward_hook(lambda m, i, o: o * float("nan"))
    elif how == "norm":
        net.layer1[0] = fastres.BasicBlock(8, 8, norm_cfg=dict(type="GN", num_groups=2)).eval()
        net.layer1[0].conv1.weight.data[0] = float("nan")
    elif how == "padding_mode":
        block.conv1.padding_mode = "reflect"
        block.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
        block.conv1.weight.data[0] = float("nan")
    with torch.no_grad():
        assert net(randn(1, 3, 32, 32, layout=LAST))[-1].isnan().any()


@plain_process
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("kind", ["plain", "other", "relu", "all"])
def test_winograd_of_a_folded_weight(size, kind, randn):
    conv = nn.Conv2d(24, 16, 3, padding=1, bias=kind == "all")
    norm = randomize(fastres.FusedBatchNorm2d(16)).eval()
    x, other = (randn(3, c, size, size, layout=LAST) for c in (24, 16))
    relu, extra = kind in ("relu", "all"), other if kind in ("other", "all") else None
    results = []
    for dtype, mode in ((torch.float64, "off"), (torch.float32, "off"), (torch.float32, "on")):
        a, b = copy.deepcopy(conv).to(dtype), copy.deepcopy(norm).to(dtype)
        with torch.no_grad(), functional.winograd(mode), functional.record_routes() as log:
            z = _inference.convolve(
                x.to(dtype), a, b.fused(), relu, None if extra is None else extra.to(dtype)
            )
        assert [c.route for c in log] == [
            {"on": "winograd", "off": "onednn"}[mode] if dtype != torch.float64 else "folded"
        ]
        results.append(z)
    want, eager, got = results
    assert got.stride() == eager.stride()
    assert_close64("winograd", got, eager, want, torch.float32)


QUICK = ("plain", "1x1", "groups", "same", "uneven", "bias", "no statistics", "hook", "forward", "reflect", "subclass",
         "nchw", "double", "bf16", "autocast", "aten", "off", "no onednn", "other", "other nchw", "other broadcast",
         "channels", "empty", "small", "inference", "parametrized")  # fmt: skip


@plain_process
@pytest.mark.parametrize("what", QUICK)
def test_the_quick_way_is_the_usual_one(what, randn, monkeypatch):
    """The layer that ``_quick`` makes is the one that ``_layer`` and ``decide_folded`` would: same route, same bits."""
    kernel, options = 3, dict(padding=1, bias=what == "bias")
    if what == "1x1":
        kernel, options = 1, dict(stride=2)
    elif what in ("groups", "same", "uneven", "reflect"):
        extra = {"groups": dict(groups=4), "reflect": dict(padding_mode="reflect")}
        options |= extra.get(what, dict(padding="same"))
    conv = nn.Conv2d(64, 64, 2 if what == "uneven" else kernel, **options)
    norm = randomize(fastres.FusedBatchNorm2d(64, track_running_stats=what != "no statistics")).eval()
    x, other = randn(2, 64, 12, 12, layout=LAST), None
    context = contextlib.nullcontext()
    if what == "hook":
        conv.register_forward_hook(lambda *a: None)
    elif what == "forward":
        conv.forward = lambda x: x
    elif what == "subclass":
        conv.__class__ = type("Mine", (nn.Conv2d,), {})
    elif what == "nchw":
        x = x.contiguous()
    elif what == "double":
        conv, norm, x = conv.double(), norm.double(), x.double()
    elif what == "bf16":
        conv, norm, x = conv.bfloat16(), norm.bfloat16(), x.bfloat16()
    elif what == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif what == "aten":
        context = functional.backend("aten")
    elif what == "off":
        context = functional.winograd("off")
    elif what == "no onednn":
        context = torch.backends.mkldnn.flags(enabled=False)
    elif what.startswith("other"):
        other = randn(2, 64, 12, 12, layout=NCHW if what == "other nchw" else LAST)
        other = other[:1] if what == "other broadcast" else other
    elif what == "channels":
        x = x[:, :32].contiguous(memory_format=LAST)
    elif what == "empty":
        x = x[:0]
    elif what == "small":
        conv.padding = (0, 0)
        x = x[:, :, :2].contiguous(memory_format=LAST)
    elif what == "inference":
        with torch.inference_mode():
            norm.running_mean = norm.running_mean.clone()
    elif what == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(conv)
    quick, taken, found = _inference._quick, [], []
    with torch.no_grad(), context:
        for way in (lambda *a: None, lambda *a: taken.append(quick(*a)) or taken[-1]):
            monkeypatch.setattr(_inference, "_quick", way)
            with functional.record_routes() as log:
                found.append((_inference.convolve(x, conv, norm.fused(), True, other), log))
    (usual, log), (got, log2) = found
    assert log == log2
    assert torch.equal(got, usual) if isinstance(usual, torch.Tensor) else got == usual
    ours = ["plain", "1x1", "groups", "bias", "off", "other", "inference"]
    ours += ["bf16"] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (taken[0] is not None) == (what in ours)


@plain_process
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    "shape", [(1, 48, 5, 6), (1, 64, 28, 28), (3, 64, 30, 28), (5, 96, 29, 31), (2, 128, 56, 56)], ids=str
)
def test_winograd_packed(shape, tile, monkeypatch):
    """Few rows and many, steps of which the last is short, cut tiles; the bias is larger than what it is added to."""
    monkeypatch.setattr(_cpu, "_tile", lambda *a: tile)
    conv = nn.Conv2d(shape[1], 64, 3, padding=1)
    nn.init.normal_(conv.bias, std=10)
    x = torch.randn(shape).contiguous(memory_format=LAST)
    with torch.no_grad(), functional.record_routes() as log:
        got = _inference.convolve(x, conv, None, True)
        again = _inference.convolve(x, conv, None, True)
        with functional.folding("off"):
            eager = conv(x).relu()
        want = copy.deepcopy(conv).double()(x.double()).relu()
    assert [c.route for c in log] == ["winograd"] * 2
    assert got.stride() == eager.stride() and torch.equal(got, again)
    assert_close64("winograd", got, eager, want)


@plain_process
def test_packings_are_few(randn, monkeypatch):
    """However many sizes come, a weight is folded once for each packing that oneDNN wants, and always has the right one
    (the wrong one gives the same values, much later)."""
    name = torch.ops.mkldnn._get_mkldnn_serialized_md

    def winograd_folded(x, f, tile, other, relu):
        steps = Steps(x, tile)
        rows = [1, steps.products * 64, steps.images * steps.tiles + 1, 1]
        plain = torch.zeros(f.weight.shape)
        wanted = torch.ops.mkldnn._reorder_convolution_weight(
            plain, [0, 0], [1, 1], [1, 1], steps.products, rows
        )
        assert torch.equal(name(f.weight), name(wanted))
        return winograd(x, f, tile, other, relu)

    winograd = _inference.winograd_folded
    monkeypatch.setattr(_inference, "winograd_folded", winograd_folded)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    norm = randomize(fastres.FusedBatchNorm2d(64)).eval()
    with torch.no_grad(), functional.winograd("on"):
        for pixels in range(8, 60, 3):
            _inference.convolve(randn(1, 64, pixels, pixels, layout=LAST), conv, norm.fused(), True)
        count = _folding.count(conv)
        assert count <= 4  # two tiles, two packings
        made = _folding.held(conv)
        _inference.convolve(randn(1, 64, 20, 20, layout=LAST), conv, norm.fused(), True)
        assert all(a is b for a, b in zip(made, _folding.held(conv), strict=True))


PACKED = {  # weight, geometry, images: oneDNN wants two or three layouts of these 1x1 weights
    "wide": ((512, 2048, 1, 1), dict(), (1, 2, 7, 10, 14)),
    "strided": ((512, 256, 1, 1), dict(stride=2), (1, 8, 16, 28, 40)),
    "stem": ((64, 3, 7, 7), dict(stride=2, padding=3), (1, 2, 9, 20, 32)),
    "3x3": ((64, 64, 3, 3), dict(padding=1, stride=2), (1, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)),
    "grouped": ((64, 4, 3, 3), dict(padding=1, groups=16), (1, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)),
}


@plain_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("what", PACKED)
def test_every_size_gets_the_packing_that_it_wants(what, dtype, randn, monkeypatch):
    """A weight in the wrong one gives the same values, up to 700 times later: a network that has seen images of one
    size, or one image, would be slow with others. One in the right one is folded once."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this processor")
    size, options, pixels = PACKED[what]
    conv = nn.Conv2d(size[1] * options.get("groups", 1), size[0], size[2], bias=False, **options).to(dtype)
    norm = randomize(fastres.FusedBatchNorm2d(size[0])).eval().to(dtype)
    right, used = _inference.onednn_conv, []

    def onednn_conv(x, f, g, *rest):
        fresh = folded_conv.pack(
            folded_conv.Folded(torch.zeros(size, dtype=dtype), f.bias), g, tuple(x.shape)
        )
        assert folded_conv.layout_name(f.weight) == folded_conv.layout_name(fresh.weight)
        used.append(f.weight)
        return right(x, f, g, *rest)

    monkeypatch.setattr(_inference, "onednn_conv", onednn_conv)
    with torch.no_grad(), functional.winograd("off"):
        for n in (*pixels, *pixels):
            for batch in (1, 2):
                x = randn(batch, conv.in_channels, n, n, dtype=dtype, layout=LAST)
                _inference.convolve(x, conv, norm.fused(), True)
    names = {folded_conv.layout_name(w) for w in used}
    assert len({id(w) for w in used}) == len(names) == _folding.count(conv) <= 4
    assert len(used) == 4 * len(pixels)


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="has several layouts of it"
)
def test_the_name_of_a_layout_has_no_chance_in_it():
    """oneDNN's description has bytes that nobody sets; of a 3x3 weight they hold what the stack held before."""
    weight, g = (128, 128, 3, 3), folded_conv.Geometry((1, 1), (1, 1), (1, 1), 1)
    names = {folded_conv.packing(torch.empty(1, 128, n, n), weight, g) for n in range(3, 40, 4)}
    assert len(names) == 1  # with AVX-512 one layout for all sizes


@plain_process
def test_winograd_where_it_was_measured(randn):
    net = randomize(fastres.ResNet(18, out_indices=(3,))).eval()
    for batch, expected in (
        (1, {64: 4, 128: 4, 256: 2}),
        (8, {64: 4, 128: 4, 256: 4, 512: 4}),
    ):
        x = randn(batch, 3, 224, 224, layout=LAST)
        with torch.no_grad(), functional.record_routes() as log:
            net(x)
        found = [c for c in log if c.route == "winograd"]
        assert {c.shape[1]: int(c.reason.split("tiles of ")[1][0]) for c in found} == expected
        assert len(found) == 3 * len(expected) + 1  # four of 64 channels


@plain_process
def test_both_tiles_of_one_weight(randn):
    """A batch of another size may take the other tiles: both forms of the weight are kept."""
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    norm = randomize(fastres.FusedBatchNorm2d(256)).eval()
    with torch.no_grad():
        for batch in (2, 8, 2, 8):
            x = randn(batch, 256, 14, 14, layout=LAST)
            with functional.record_routes() as log:
                got = _inference.convolve(x, conv, norm.fused(), True)
            assert f"tiles of {2 if batch == 2 else 4}x" in log[0].reason
            with functional.winograd("off"):
                eager = _inference.convolve(x, conv, norm.fused(), True)
            a, b = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
            assert_close64("winograd", got, eager, b(a(x.double())).relu())
    assert _folding.count(conv) == 3


@plain_process
def test_one_channel_before_an_nchw_identity(randn):
    """One channel lies in both layouts, and the block end's product wants everything in channels_last."""
    block = randomize(fastres.Bottleneck(4, 4)).eval()
    x = randn(3, 4, 2, 3)
    with torch.no_grad(), functional.backend("reference"):
        got = block(x)
    assert_layout(got, x)
    with torch.no_grad():
        want = copy.deepcopy(block).double()(x.double())
        assert_close64("out", got, block(x), want)


def test_relu_alone_keeps_nan(randn):
    conv, norm = nn.Conv2d(4, 8, 3), fastres.FusedBatchNorm2d(8).eval()
    x = randn(1, 4, 5, 5, layout=LAST)
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        first = functional.conv_bn_relu(x, conv, norm.fused())
        second = functional.conv_bn_relu(first, nn.Conv2d(8, 8, 1), norm.fused())
        assert second.tensor()[0, :, 0, 0].isnan().all()


@plain_process
def test_the_pending_identity_is_not_overwritten(randn):
    """The addition in place takes a tensor that nobody else can have."""
    conv, norm = nn.Conv2d(8, 8, 1), fastres.FusedBatchNorm2d(8).eval()
    x = randn(2, 8, 5, 5, layout=LAST)
    with torch.no_grad():
        identity = functional.conv_bn(x, conv, norm.fused())
        out = functional.add_relu(functional.conv_bn(x, conv, norm.fused()), identity)
        again = functional.add_relu(functional.conv_bn(x, conv, norm.fused()), identity)
        assert torch.equal(out, again)
        assert torch.equal(identity.tensor(), functional.conv_bn(x, conv, norm.fused()).tensor())
        kept = identity.tensor().clone()
        functional.add_relu(functional.conv_bn(x, conv, norm.fused()), identity)
        assert torch.equal(identity.tensor(), kept)


@plain_process
def test_other_norms_stay(randn):
    """GroupNorm, a user's norm and frozen norms, alone and in part of a net."""
    net = fastres.ResNet(
        18, base_channels=16, stem_channels=16, norm_cfg=dict(type="GN", num_groups=4)
    ).eval()
    x = randn(2, 3, 32, 32)
    with torch.no_grad(), functional.record_routes() as log:
        net(x)
    assert log == []

    def make(kind):
        net = build("resnet18")(kind)
        net.layer2[0].bn2 = nn.GroupNorm(4, 32)
        net.layer3[1].bn1 = nn.InstanceNorm2d(64, affine=True, track_running_stats=True)
        return net

    ours, plain, ref = pair(make)
    with torch.no_grad():
        assert_close64("partly replaced", ours(x)[0], plain(x)[0], ref(x.double())[0])


@plain_process
def test_batches_and_sizes_share_the_weight(randn):
    ours, plain, ref = pair(BLOCKS["bottleneck"])
    for n, h, w in ((1, 1, 1), (2, 9, 7), (5, 32, 16), (1, 33, 1)):
        x = randn(n, 16, h, w, layout=LAST)
        with torch.no_grad():
            assert_close64(f"{n}x{h}x{w}", ours(x), plain(x), ref(x.double()))
    # Seven convolutions; oneDNN may want another packing for few pixels.
    assert 7 <= fastres._folding.count(ours) <= 14


@plain_process
def test_empty_and_wrong_inputs_are_as_before(randn):
    ours, plain, _ = pair(BLOCKS["basic"])
    with torch.no_grad():
        assert ours(randn(0, 16, 8, 8)).shape == plain(randn(0, 16, 8, 8)).shape
        with pytest.raises(ValueError, match="16 channels"):
            ours(randn(2, 3, 8, 8))
        with pytest.raises(TypeError, match="float64"):
            ours(randn(2, 16, 8, 8, dtype=torch.float64))
        conv, norm = ours[0].conv1, ours[0].bn1.fused()
        with pytest.raises(ValueError, match="identity"):
            functional.add_relu(functional.conv_bn(randn(2, 16, 8, 8), conv, norm), randn(2, 32, 3, 3))


# ---------------------------------------------------------------------------------------------- when oneDNN is amiss


@pytest.fixture
def untried():
    folded_conv._onednn_trial.cache_clear()
    yield
    folded_conv._onednn_trial.cache_clear()


def routes_and_values(randn):
    ours, plain, ref = pair(BLOCKS["bottleneck"])
    x = randn(2, 16, 9, 7, layout=LAST)
    with torch.no_grad(), functional.record_routes() as log:
        assert_close64("inference", ours(x), plain(x), ref(x.double()))
    return {c.route for c in log}, {c.reason for c in log}


@plain_process
@pytest.mark.parametrize("operator", ["pack", "layout_name", "onednn_conv"])
def test_an_operator_that_is_missing_or_changed_is_not_used(operator, randn, monkeypatch, untried):
    def broken(*args):
        raise RuntimeError("mkldnn::_reorder_convolution_weight() expected 7 arguments")

    monkeypatch.setattr(folded_conv, operator, broken)
    used, why = routes_and_values(randn)
    assert used == {"folded"} and "failed when it was tried: RuntimeError" in why.pop()


@plain_process
def test_an_operator_that_differs_is_not_used(randn, monkeypatch, untried):
    right = folded_conv.onednn_conv
    monkeypatch.setattr(folded_conv, "onednn_conv", lambda *a: right(*a) * 1.01)
    used, why = routes_and_values(randn)
    assert used == {"folded"} and "differed from PyTorch's" in why.pop()


@plain_process
def test_an_addition_that_overwrites_is_not_used(randn, monkeypatch, untried):
    right = folded_conv.onednn_conv

    def overwriting(x, f, g, relu, other, own, inner):
        return right(x, f, g, relu, other, other is not None, inner)

    monkeypatch.setattr(folded_conv, "onednn_conv", overwriting)
    used, why = routes_and_values(randn)
    assert used == {"folded"} and "changed its operand" in why.pop()


@plain_process
def test_onednn_switched_off(randn):
    with torch.backends.mkldnn.flags(enabled=False):
        used, why = routes_and_values(randn)
    assert used == {"folded"} and "switched off" in why.pop()


@plain_process
def test_onednn_refuses_gradients(randn):
    conv = nn.Conv2d(4, 4, 1)
    g = folded_conv.geometry(conv)
    x = randn(1, 4, 3, 3, layout=LAST).requires_grad_()
    f = folded_conv.pack(folded_conv.Folded(conv.weight.detach(), conv.bias.detach()), g, (1, 4, 3, 3))
    with pytest.raises(AssertionError):
        folded_conv.onednn_conv(x, f, g, False, None, False, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_reduced_precision_on_a_cpu_says_what_is_faster(dtype):
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    why = folded_conv.onednn_obstacle(dtype)
    assert why == "" if supported else "float32 is faster" in why


# ------------------------------------------------------------------------------------------------- as on a GPU


def gpu_routes(name, layout=LAST, batch=8):
    from fastres.routes import routes

    return routes(
        lambda: MODELS.build(dict(NETS[name], norm_cfg=dict(type="FusedBN"))), (batch, 3, 64, 64), torch.bfloat16,
        layout == LAST, False, (9, 0),
    )  # fmt: skip


def test_a_gpu_runs_one_kernel_a_convolution():
    found = gpu_routes("resnet50")
    assert all("norm folded" in r.choice.reason or r.choice.op == "max_pool" for r in found)
    assert {r.choice.route for r in found} == {"triton", "cudnn"}
    assert sum(r.choice.route == "cudnn" for r in found) == 16  # the 3x3s
    assert all(r.layer for r in found)
    by_layer = {r.layer: r.choice for r in found}
    assert "in the block end's product" in by_layer["layer1.0.downsample.1"].reason
    found = gpu_routes("resnet18")
    assert {r.choice.route for r in found if r.choice.op.endswith("add_relu")} == {"cudnn"}


def test_nchw_on_a_gpu_is_cudnn():
    found = gpu_routes("resnet50", NCHW)
    assert {r.choice.route for r in found if r.choice.op != "max_pool"} == {"cudnn"}


@plain_process
def test_operators_are_well_registered(randn):
    from torch.library import opcheck

    x, w, b = randn(2, 8, 9, 7, layout=LAST), randn(6, 4, 3, 3), randn(6)
    y = torch.nn.functional.conv2d(x, w, b, 2, 1, 1, 2)
    for other in (None, torch.randn_like(y)):
        args = (x, w, b, other, [2, 2], [1, 1], [1, 1], 2, True)
        opcheck(folded_conv.folded_conv.op, args, test_utils=("test_schema", "test_faketensor"))
        want = y if other is None else y + other
        assert torch.allclose(folded_conv.folded_conv(*args), want.relu(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ the permanent copy


@plain_process
@pytest.mark.parametrize("kind", ["FusedBN", "BN"])
@pytest.mark.parametrize("name", [n for n in NETS if n != "resnext"])
def test_fold_gives_a_copy_without_batch_norms(name, kind, randn):
    ours, plain, ref = pair(build(name))
    source = ours if kind == "FusedBN" else plain
    before = {k: v.clone() for k, v in source.state_dict().items()}
    copied = fastres.fold(source)
    assert not any(isinstance(m, _BatchNorm | nn.Identity) for m in copied.modules())
    assert not any("running" in k or "bn" in k for k in copied.state_dict())
    assert not any(p.requires_grad for p in copied.parameters())
    x = randn(2, 3, 45, 38)
    with torch.no_grad():
        eager, want = plain(x)[-1], ref(x.double())[-1]
        assert_close64("folded", copied(x)[-1], eager, want)
        with functional.folding("off"):
            assert_close64("folded, plain operators", copied(x)[-1], eager, want)
        assert_layout(copied(x)[-1], eager)
        randomize(source, 3)
        assert_close64("shares nothing", copied(x)[-1], eager, want)
    randomize(source, 7)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    twin = copy.deepcopy(copied)
    with torch.no_grad():
        assert torch.equal(twin(x)[-1], copied(x)[-1])


class Foreign(nn.Module):
    """Somebody else's block and head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=True), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.tail = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.tail(x)


@plain_process
@pytest.mark.parametrize("fused", [False, True])
def test_fold_of_a_foreign_model(fused, randn):
    net = randomize(Foreign()).eval()
    ref, x = copy.deepcopy(net).double(), randn(2, 3, 9, 7, layout=LAST)
    with torch.no_grad():
        eager = net(x)
        if fused:
            fastres.fuse_(net)
            assert_close64("fused", net(x), eager, ref(x.double()))
        copied = fastres.fold(net)
        assert_close64("folded", copied(x), eager, ref(x.double()))
    assert not any(isinstance(m, _BatchNorm) for m in copied.modules())
    assert type(copied) is Foreign


def test_fold_says_what_it_cannot():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"fold: 2 \(BatchNorm2d\) cannot be folded; wanted strict=False"):
        fastres.fold(net)
    assert isinstance(fastres.fold(net, strict=False)[2], nn.BatchNorm2d)
    with pytest.raises(TypeError, match="wanted an nn.Module"):
        fastres.fold(3)


# ------------------------------------------------------------------------------------------------------- the head


@plain_process
@pytest.mark.slow
def test_the_same_class_for_every_digit_of_the_test_set():
    """A classifier trained for some steps: head outputs by the rule, and the same top-1 on all held-out digits."""
    load_digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)

    def make(kind):
        backbone = dict(
            type="ResNet_CIFAR",
            depth=18,
            in_channels=1,
            stem_channels=8,
            base_channels=8,
            norm_cfg=dict(type=kind),
        )
        head = dict(type="LinearClsHead", num_classes=10, in_channels=64)
        return fastres.build_classifier(
            dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head)
        )

    ours = make("FusedBN").train()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9)
    for step in range(60):
        part = slice(step % 22 * 64, step % 22 * 64 + 64)
        ours(images[part], labels[part])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = make("BN").eval()
    plain.load_state_dict(ours.state_dict())
    ours.eval()
    held_out, answers = images[1440:], labels[1440:]
    with torch.no_grad():
        eager, scores, copied = plain(held_out), ours(held_out), fastres.fold(ours)(held_out)
        want = plain.double()(held_out.double())
    assert float((eager.argmax(1) == answers).float().mean()) > 0.5, (
        "nothing was learnt: the test says little"
    )
    for name, got in (("live", scores), ("folded", copied)):
        assert_close64(name, got, eager, want)
        assert torch.equal(got.argmax(1), eager.argmax(1))
