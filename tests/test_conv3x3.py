"""The 3x3 convolution, a pending norm in front and statistics behind: values, all gradients, and where it applies."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import functional as fn
from fastres.kernels import conv3x3 as family
from tests import cases
from tests.cases import (
    HALF,
    LAST,
    NCHW,
    ROUTE_DTYPES,
    Acts,
    Norms,
    Problem,
    Route,
    activation,
    make_norm,
    pending,
    plain_norm,
    routes,
    routes_and,
)
from tests.tolerance import assert_close64, poison

compare = functools.partial(
    cases.compare, chained=True
)  # the convolution's output and dz are stored in between


def module(weight: Tensor, stride: int = 1, padding: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A plain convolution whose weight is this very tensor."""
    n, c = weight.shape[:2]
    conv = nn.Conv2d(c, n, 3, stride, padding, dilation, bias=False, device="meta")
    del conv._parameters["weight"]
    conv.weight = weight
    return conv


def problem(
    shape: tuple[int, ...], n: int, dtype: torch.dtype = torch.float32, *, front: bool = True, mean: float = 0.0,
    weights: torch.memory_format = LAST, before: dict[str, Any] | None = None, after: dict[str, Any] | None = None,
    **geometry: int,
) -> Problem:  # fmt: skip
    """bn(conv(relu(bn0(y)))), or bn(conv(y)) without ``front``."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    c = shape[1]
    norms = {"bn0": make_norm(c, kind, **before or {})} if front else {}
    norms["bn"] = make_norm(n, kind, **after or {})
    w = activation((n, c, 3, 3), dtype, weights, std=1 / (3 * c**0.5))

    def ours(a: Acts, k: Norms) -> Tensor:
        z: Any = pending(a["y"], k["bn0"], relu=True) if front else a["y"]
        with fn.conv3x3("triton"), fn.record_routes() as log:
            out = fn.conv_bn(z, module(a["w"], **geometry), k["bn"]).tensor()
        assert [r.op for r in log if "own 3x3" in r.reason] == ["conv3x3"]
        return out

    def plain(a: Acts, k: Norms, _: torch.dtype) -> tuple[Tensor, Tensor]:
        v = plain_norm(a["y"], k["bn0"]) if front else a["y"].new_ones(a["y"].shape)
        z = v.relu() if front else a["y"]
        g = dict(dict(padding=1), **geometry)
        return plain_norm(F.conv2d(z, a["w"], **g), k["bn"]), v

    return Problem(ours, plain, {"y": activation(shape, dtype, LAST, mean=mean), "w": w}, norms)


# ---------------------------------------------------------------------------------------------------------- values

GEOMETRIES = {
    "plain": {},
    "stride": dict(stride=2),
    "dilation": dict(padding=2, dilation=2),
    "stride-dilation": dict(stride=2, padding=2, dilation=2),
    "far-dilation": dict(stride=2, padding=3, dilation=3),
    "no-padding": dict(padding=0),
    "wide-padding": dict(padding=3),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("front", [True, False], ids=["pending", "tensor"])
@routes_and("dtype", ROUTE_DTYPES)
def test_geometries(route: Route, dtype: torch.dtype, front: bool, geometry: str) -> None:
    compare(route, problem((2, 5, 7, 6), 6, dtype, front=front, **GEOMETRIES[geometry]))


SHAPES = {  # (B, C, H, W), N: every tile, several of them, remainders of each, one line, one pixel, one channel
    "aligned-narrow": ((3, 64, 7, 7), 32),
    "aligned-wide": ((2, 80, 9, 9), 144),
    "odd": ((2, 65, 6, 5), 67),
    "line": ((2, 16, 1, 9), 16),
    "pixel": ((5, 16, 1, 1), 16),
    "one-channel": ((2, 1, 4, 5), 1),
    "parts": ((3, 16, 13, 17), 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@routes()
def test_shapes(route: Route, shape: str, stride: int, dtype: torch.dtype) -> None:
    size, n = SHAPES[shape]
    compare(route, problem(size, n, dtype, stride=stride))


def test_every_tile_is_tried() -> None:
    seen = set()
    for (_, c, _, _), n in SHAPES.values():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(0, dtype=dtype)
            seen |= {
                (k, family.tile(k, x, a, b))
                for k, a, b in (("forward", n, c), ("dgrad", c, n), ("wgrad", c, n))
            }
    assert seen == {(k, t) for k, table in family.TILES.items() for ts in table.values() for t in ts}


NORMS: dict[str, dict[str, dict[str, Any]]] = {
    "frozen-front": dict(before=dict(training=False)),
    "frozen-behind": dict(after=dict(training=False)),
    "frozen": dict(before=dict(training=False), after=dict(training=False)),
    "no-affine": dict(before=dict(affine=False), after=dict(affine=False)),
    "momentum-one": dict(before=dict(momentum=1.0), after=dict(momentum=1.0)),
    "cumulative": dict(after=dict(momentum=None)),
    "no-running": dict(before=dict(track=False), after=dict(track=False)),
    "eps": dict(before=dict(eps=0.3)),
}


@pytest.mark.parametrize("norms", NORMS)
@routes()
def test_norms(route: Route, norms: str) -> None:
    compare(route, problem((2, 5, 5, 6), 6, **NORMS[norms]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("weights", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dy", ["dense", "other", "expanded", "strided"])
@routes()
def test_layouts_of_weights_and_gradients(
    route: Route, dy: str, weights: torch.memory_format, stride: int
) -> None:
    """The convolution alone, so that its own gradient comes in these strides."""

    def ours(a: Acts, _: Norms) -> Tensor:
        return family.conv3x3(a["y"], a["w"], family.Geometry(stride, 1, 1), family.Prologue(), False, False)[
            0
        ]

    def plain(a: Acts, _: Norms, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        return F.conv2d(a["y"], a["w"], None, stride, 1), torch.ones(1)

    acts = {"y": activation((2, 5, 4, 7), layout=LAST), "w": activation((6, 5, 3, 3), layout=weights)}
    compare(route, Problem(ours, plain, acts, {}), dy=dy)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@routes()
def test_mean_far_from_zero(route: Route, dtype: torch.dtype) -> None:
    """Of the input in front of its norm, and of the output, which the partial statistics must bear."""
    p = problem((3, 4, 9, 7), 5, dtype, mean=1e3, after=dict(momentum=1.0))
    assert p.norms["bn0"].bias is not None
    p.norms["bn0"].bias.add_(30)
    compare(route, p, margin=1e-2)


@routes()
def test_padding_is_zero_behind_the_norm(route: Route) -> None:
    """A norm that maps 0 far from 0: what lies outside the image must not go through it."""
    p = problem((2, 3, 3, 3), 4)
    bn0 = p.norms["bn0"]
    assert bn0.bias is not None
    bn0.bias.fill_(7.0)
    compare(route, p)


@routes()
def test_special_values(route: Route) -> None:
    """NaN stands where eager has it and nowhere else."""
    p = problem((2, 5, 5, 6), 6, before=dict(training=False), after=dict(training=False))
    p.acts["y"][1, 2, 0, 5] = float("nan")
    ours = compare(route, p, finite=False)
    assert ours["out"].isnan().any() and ours["out"][0].isfinite().all()


@routes()
def test_same_bits_every_run(route: Route) -> None:
    p, state = problem((3, 16, 9, 7), 16, stride=2), torch.get_rng_state()
    first = compare(route, p)
    torch.set_rng_state(state)
    second = compare(route, p)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@routes()
def test_statistics_are_those_of_the_stored_output(route: Route) -> None:
    x, w = (
        activation((3, 16, 11, 9), torch.bfloat16, LAST, mean=2),
        activation((24, 16, 3, 3), torch.bfloat16, LAST),
    )
    x, w = x.to(route.device), w.to(route.device)
    with poison():
        y, partial = family.conv3x3(x, w, family.Geometry(1, 1, 1), family.Prologue(), False, True)
        assert partial is not None and partial.total == 3 * 11 * 9 and partial.values.shape[1] > 1
        mean, var = family.statistics(partial.values, None, None, 0.0, partial.chunk, partial.total)
    v = y.double()
    assert_close64("mean", mean, v.mean((0, 2, 3)).float(), v.mean((0, 2, 3)).cpu())
    assert_close64("var", var, v.var((0, 2, 3), correction=0).float(), v.var((0, 2, 3), correction=0).cpu())


@pytest.mark.parametrize("wanted", ["y", "w", "gamma0", "beta0"])
@routes()
def test_only_what_is_asked(route: Route, wanted: str) -> None:
    p = problem((2, 5, 5, 4), 6)
    dout = activation((2, 6, 5, 4), layout=LAST)

    def gradient(ours: bool, dtype: torch.dtype | None, device: str) -> Tensor:
        acts = {k: v.to(device, dtype or v.dtype) for k, v in p.acts.items()}
        norms = {k: b._replace(**{f: t.to(device, dtype or t.dtype) if t.is_floating_point() else t.clone()
                                  for f in b._fields[:5] if (t := getattr(b, f)) is not None})
                 for k, b in p.norms.items()}  # fmt: skip
        bn0 = norms["bn0"]
        leaf = {**acts, "gamma0": bn0.weight, "beta0": bn0.bias}[wanted].detach().clone().requires_grad_()
        norms["bn0"] = (
            bn0._replace(**{"weight" if wanted == "gamma0" else "bias": leaf}) if "0" in wanted else bn0
        )
        acts |= {} if "0" in wanted else {wanted: leaf}
        out = p.ours(acts, norms) if ours else p.plain(acts, norms, dout.dtype)[0]
        return torch.autograd.grad(out, leaf, dout.to(out))[0]

    with fn.backend(route.backend):
        ours = gradient(True, None, route.device)
    assert_close64(wanted, ours, gradient(False, None, "cpu"), gradient(False, torch.float64, "cpu"))


@pytest.mark.parametrize("geometry", ["plain", "stride", "stride-dilation"])
@pytest.mark.parametrize("frozen", [False, True])
@routes("reference")
def test_gradcheck(route: Route, frozen: bool, geometry: str) -> None:
    p = problem((2, 2, 4, 5), 3, torch.float64, before=dict(training=not frozen), **GEOMETRIES[geometry])
    leaves = [*p.acts.values(), p.norms["bn0"].weight, p.norms["bn0"].bias, p.norms["bn"].weight]

    def run(y: Tensor, w: Tensor, gamma0: Tensor, beta0: Tensor, gamma: Tensor) -> Tensor:
        bn0, bn = (copy.deepcopy(b) for b in p.norms.values())
        return p.ours(
            {"y": y, "w": w},
            {"bn0": bn0._replace(weight=gamma0, bias=beta0), "bn": bn._replace(weight=gamma)},
        )

    with fn.backend(route.backend):
        assert torch.autograd.gradcheck(run, [t.detach().clone().requires_grad_() for t in leaves], atol=1e-6)
        with pytest.raises(NotImplementedError, match="second derivative"):
            y, *rest = (t.detach().clone().requires_grad_() for t in leaves)
            (g,) = torch.autograd.grad(run(y, *rest).square().sum(), y, create_graph=True)
            g.sum().backward()


# ------------------------------------------------------------------------------------------------------- in blocks


def block(kind: str) -> nn.Module:
    net = {
        "basic": lambda: fastres.BasicBlock(8, 8, norm_cfg=dict(type="FusedBN")),
        "basic-dilated": lambda: fastres.BasicBlock(8, 8, dilation=2, norm_cfg=dict(type="FusedBN")),
        "bottleneck": lambda: fastres.Bottleneck(16, 16, norm_cfg=dict(type="FusedBN")),
        "bottleneck-strided": lambda: fastres.Bottleneck(
            16, 16, stride=2, norm_cfg=dict(type="FusedBN"),
            downsample=nn.Sequential(nn.Conv2d(16, 16, 1, 2, bias=False), fastres.FusedBatchNorm2d(16)),
        ),
    }[kind]().to(memory_format=LAST)  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return net


@pytest.mark.parametrize("moments", ["on", "off"])
@pytest.mark.parametrize("kind", ["basic", "basic-dilated", "bottleneck", "bottleneck-strided"])
@routes()
def test_blocks(route: Route, kind: str, moments: str) -> None:
    """A whole block through the kernels: output, all gradients and running statistics beside eager's."""
    net = block(kind)
    x = activation((3, net.conv1.in_channels, 6, 6), layout=LAST)
    dout = torch.randn(net.eval()(x).shape)

    def step(backend: str, mode: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        m = copy.deepcopy(net).train().to(device, dtype)
        leaf = x.detach().to(device, dtype).requires_grad_()
        with fn.backend(backend), fn.moments(moments), fn.conv3x3(mode), fn.record_routes() as log:
            out = m(leaf)
            out.backward(dout.to(device, dtype))
        ours = [r for r in log if r.op == "conv3x3"]
        assert len(ours) == (0 if mode == "cudnn" else 2 if "basic" in kind else 1)
        grads = {k: p.grad for k, p in m.named_parameters()}
        return {"out": out.detach(), "dx": leaf.grad, **grads, **dict(m.named_buffers())}

    with poison():
        ours = step(route.backend, "triton", route.device, torch.float32)
    eager = step("aten", "cudnn", "cpu", torch.float32)
    ref = step("aten", "cudnn", "cpu", torch.float64)
    for name, value in ours.items():
        if value.is_floating_point():
            assert_close64(name, value, eager[name], ref[name])
        else:
            assert int(value) == int(ref[name])


@routes("reference", "interpret")
def test_the_activation_in_front_is_not_kept(route: Route) -> None:
    """Saved for backward are the raw input, the weight and vectors: z is formed again."""
    p, sizes = problem((2, 16, 8, 8), 4, after=dict(training=False, affine=False)), []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().data_ptr())
        return t

    for t in p.acts.values():
        t.requires_grad_()
    with fn.backend(route.backend), fn.conv3x3("triton"):
        convolution = fn.conv_bn(
            pending(p.acts["y"], p.norms["bn0"], relu=True), module(p.acts["w"]), p.norms["bn"]
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            convolution.raw()
    big = {s for s, t in zip(sizes, sizes, strict=True) if t == p.acts["y"].untyped_storage().data_ptr()}
    assert big == {p.acts["y"].untyped_storage().data_ptr()} and len(sizes) <= 6


# ------------------------------------------------------------------------------------------------ where it applies


def routed(conv: nn.Module, x: Tensor, backend: str = "reference", mode: str = "triton") -> int:
    with fn.backend(backend), fn.conv3x3(mode), fn.record_routes() as log:
        fn.conv_bn(x, conv, make_norm(conv.out_channels)).tensor()
    return len([r for r in log if r.op == "conv3x3"])


def test_where_it_applies() -> None:
    x = activation((2, 4, 6, 6), layout=LAST)
    good = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    assert routed(good, x) == 1
    assert routed(good, x, mode="cudnn") == 0 and routed(good, x, backend="aten") == 0
    assert routed(good, x.contiguous()) == 0
    for other in (
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, stride=3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 4, 5, padding=2, bias=False),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    ):
        assert routed(other, x) == 0
    for watch in (good.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = watch(lambda *a: None)
        assert routed(good, x) == 0
        handle.remove()
    good.forward = lambda x: x  # as some packages attach adapters
    assert routed(good, x) == 0


def test_unknown_mode() -> None:
    with (
        pytest.raises(ValueError, match="conv3x3 is 'fast'; wanted one of cudnn, triton"),
        fn.conv3x3("fast"),
    ):
        pass


@routes("reference", "interpret")
def test_bad_norm_changes_nothing(route: Route) -> None:
    """The norm behind is checked before its running statistics are touched, as on the other routes."""
    p = problem((2, 5, 4, 4), 6)
    bn = p.norms["bn"]
    wrong = bn._replace(weight=torch.ones(7))
    before = bn.running_mean.clone()
    with fn.backend(route.backend), pytest.raises(ValueError, match="batch_norm: weight.*wanted shape"):
        p.ours(p.acts, p.norms | {"bn": wrong})
    assert torch.equal(bn.running_mean, before)
