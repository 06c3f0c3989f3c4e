"""Batch norm with and without ReLU on every route: values, gradients, running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastres import functional as fn
from fastres.kernels import _launch
from fastres.kernels import batch_norm as family
from fastres.kernels._launch import ELEMENTWISE, REDUCTION, Tile
from tests.cases import (
    GPU_SHAPES,
    HALF,
    LAST,
    LAYOUTS,
    NCHW,
    ROUTE_DTYPES,
    ROUTE_SHAPES,
    TILED,
    Acts,
    Norms,
    Problem,
    Route,
    activation,
    compare,
    copy_norm,
    make_norm,
    plain_norm,
    record_launches,
    routes,
    routes_and,
)
from tests.tolerance import assert_close64, poison

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def problem(y: Tensor, relu: bool = True, norm_dtype: torch.dtype | None = None, **norm: Any) -> Problem:
    """z = bn(y), with ReLU unless said otherwise."""

    def plain(a: Acts, n: Norms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        v = plain_norm(a["y"], n["bn"])
        return (v.relu(), v) if relu else (v, torch.ones_like(v))

    kind = norm_dtype or (torch.float64 if y.dtype == torch.float64 else torch.float32)
    return Problem(
        ours=lambda a, n: fn.batch_norm(a["y"], n["bn"], relu),
        plain=plain,
        acts={"y": y},
        norms={"bn": make_norm(y.shape[1], kind, **norm)},
    )


def ramp(y: Tensor) -> Tensor:
    """Images of different means, so that the weight of every chunk of a reduction matters."""
    return y + 3 * torch.arange(y.shape[0], dtype=y.dtype).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------- parity


@layouts
@routes_and("shape", ROUTE_SHAPES)
def test_shapes(route: Route, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    two = shape[0] * shape[2] * shape[3] == 2
    compare(route, problem(activation(shape, layout=layout)), cancels=two)


FORMS: dict[str, dict[str, Any]] = {
    "plain": dict(relu=False),
    "relu": dict(),
    "frozen": dict(relu=False, training=False),
    "frozen-relu": dict(training=False),
    "no-affine": dict(affine=False),
    "frozen-no-affine": dict(affine=False, training=False),
    "no-running": dict(track=False),
    "cumulative": dict(momentum=None),
    "momentum-one": dict(momentum=1.0),
    "eps": dict(eps=0.3),
}


@pytest.mark.parametrize("form", FORMS)
@layouts
@routes_and("dtype", ROUTE_DTYPES)
def test_forms(route: Route, dtype: torch.dtype, layout: torch.memory_format, form: str) -> None:
    compare(route, problem(activation((3, 5, 6, 5), dtype, layout), **FORMS[form]))


@layouts
@routes("gpu")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_large_half(
    route: Route, layout: torch.memory_format, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    compare(route, problem(activation(shape, dtype, layout)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@layouts
@routes()
def test_half_parameters(
    route: Route, layout: torch.memory_format, dtype: torch.dtype, training: bool
) -> None:
    y = activation((3, 5, 6, 5), dtype, layout)
    compare(route, problem(y, norm_dtype=dtype, training=training))


@pytest.mark.parametrize("dy", ["other", "expanded", "strided"])
@pytest.mark.parametrize("training", [True, False])
@layouts
@routes()
def test_strided_gradient(route: Route, layout: torch.memory_format, training: bool, dy: str) -> None:
    compare(route, problem(activation((2, 5, 4, 7), layout=layout), training=training), dy=dy)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@layouts
@routes()
def test_mean_far_from_zero(route: Route, layout: torch.memory_format, dtype: torch.dtype) -> None:
    y = activation((4, 3, 9, 7), dtype, layout, mean=1e3)
    compare(route, problem(y, momentum=1.0), margin=1e-2)


@layouts
@routes()
def test_constant_input(route: Route, layout: torch.memory_format) -> None:
    """The variance is exactly zero, so the output is exactly beta."""
    y = torch.full((3, 4, 5, 7), -1.625).contiguous(memory_format=layout)
    p = problem(y, relu=False, momentum=1.0)
    ours = compare(route, p)
    assert torch.equal(ours["bn.running_var"].cpu(), torch.zeros(4))
    bias = p.norms["bn"].bias
    assert bias is not None
    assert torch.equal(ours["out"].cpu(), bias.view(1, -1, 1, 1).expand_as(y))


@layouts
@routes()
def test_no_gradient_at_exactly_zero(route: Route, layout: torch.memory_format) -> None:
    """ReLU's derivative at zero is zero, as in eager."""
    p = problem(activation((3, 4, 5, 7), layout=layout))
    for v in p.norms["bn"][:2]:
        v.zero_()
    ours = compare(route, p)
    assert not any(ours[k].any() for k in ("out", "d y", "d bn.weight", "d bn.bias"))


@layouts
@routes()
def test_a_constant_has_no_negative_variance(route: Route, layout: torch.memory_format) -> None:
    """Constants whose mean is not exact: the variance is what rounding leaves of zero, and never below it."""
    y = torch.rand(1, 64, 1, 1).expand(3, 64, 7, 5).contiguous(memory_format=layout)
    mean, var = family.batch_norm_stats(y.to(route.device), None, None, 0.0)
    assert (var >= 0).all() and (var <= 1e-13).all()
    assert (mean.cpu() - y[0, :, 0, 0]).abs().max() <= 6e-8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@layouts
@routes()
def test_special_values(route: Route, layout: torch.memory_format, relu: bool, training: bool) -> None:
    """NaN and inf stand where eager has them, in every output and gradient, and only there."""
    y = activation((2, 5, 3, 4), layout=layout)
    y[0, 0, 1, 1], y[1, 1, 0, 2], y[0, 2, 2, 3] = float("inf"), float("nan"), -float("inf")
    ours = compare(route, problem(y, relu, training=training), dy="nan", finite=False)
    assert ours["out"][:, 3].isfinite().all() and ours["out"][:, 1].isnan().any()


@pytest.mark.parametrize("training", [True, False])
@layouts
@routes()
def test_empty_batch(route: Route, layout: torch.memory_format, training: bool) -> None:
    """As in eager: an empty result, zero gradients of the parameters, and the running statistics as they were."""
    y = activation((0, 3, 4, 5), layout=layout)
    p = problem(y, training=training)
    ours = compare(route, p, finite=False)
    assert ours["out"].shape == y.shape and not ours["d bn.weight"].any() and not ours["d bn.bias"].any()
    assert torch.equal(ours["bn.running_mean"].cpu(), p.norms["bn"].running_mean)
    assert torch.equal(ours["bn.running_var"].cpu(), p.norms["bn"].running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
@routes()
def test_running_statistics_over_steps(route: Route, momentum: float | None) -> None:
    first = make_norm(5, momentum=momentum)
    first.num_batches_tracked.zero_()
    ours, eager, ref = (
        copy_norm(first, d, k)
        for d, k in ((route.device, None), (route.device, None), ("cpu", torch.float64))
    )
    for step in range(3):
        y = activation((4, 5, 3, 3), mean=step, std=10.0**-step)
        with fn.backend(route.backend):
            fn.batch_norm(y.to(route.device), ours)
        plain_norm(y.to(route.device), eager)
        plain_norm(y.double(), ref)
        assert int(ours.num_batches_tracked) == step + 1
        for k in ("running_mean", "running_var"):
            assert_close64(f"{k} after step {step}", getattr(ours, k), getattr(eager, k), getattr(ref, k))


@pytest.mark.parametrize("momentum", [1.0, None])
@routes()
def test_the_first_batch_replaces_the_running_variance(route: Route, momentum: float | None) -> None:
    """Nothing of an initial 1 is left in a variance of 1e-8, not even its rounding."""
    p = problem(activation((3, 5, 4, 7), std=1e-4), momentum=momentum)
    assert p.norms["bn"].num_batches_tracked is not None
    p.norms["bn"].num_batches_tracked.zero_()
    compare(route, p)


@layouts
@routes_and("shape", {"reference": [(4, 5, 9, 7)], "interpret": [(4, 5, 9, 7)], "gpu": GPU_SHAPES})
def test_same_bits_every_run(route: Route, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    p = problem(activation(shape, layout=layout))
    state = torch.get_rng_state()
    first = compare(route, p)
    torch.set_rng_state(state)
    second = compare(route, p)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ----------------------------------------------------------------------------------------- how work is divided


def test_every_tile_has_a_shape() -> None:
    for table, column in ((ELEMENTWISE, 2), (REDUCTION, 3)):
        for nhwc in (True, False):
            run = {row[column] for row in TILED if (row[0] == LAST) == nhwc}
            assert run == set(table[nhwc])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shape", "elementwise", "reduction"), TILED)
@routes("interpret", "gpu")
def test_tiles(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    elementwise: Tile,
    reduction: Tile,
    dtype: torch.dtype,
) -> None:
    with record_launches() as seen:
        compare(route, problem(activation(shape, dtype, layout)))
    nhwc = layout == LAST
    expected = {(k, nhwc, reduction.b0, reduction.b1) for k in ("stats_kernel", "reduce_kernel")}
    expected |= {(k, nhwc, elementwise.b0, elementwise.b1) for k in ("act_kernel", "backward_kernel")}
    assert {s for s in seen if not s[0].startswith("merge")} == expected


def test_cut_covers_every_row_once() -> None:
    for layout in (NCHW, LAST):
        for n in (1, 2, 7, 64, 300):
            for c in (1, 3, 64, 1000, 2048):
                for h, w in ((1, 1), (7, 7), (15, 17), (56, 56), (224, 224)):
                    m = _launch.matrix(
                        torch.empty((n, c, h, w), device="meta").contiguous(memory_format=layout)
                    )
                    plan, length = _launch.cut(m), m.rows if m.nhwc else m.n
                    assert (plan.parts - 1) * plan.chunk < length <= plan.parts * plan.chunk
                    assert plan.per_chunk == plan.chunk * (1 if m.nhwc else m.hw)
                    assert not m.nhwc or plan.chunk % plan.tile.b0 == 0
                    assert plan.groups * (plan.tile.b1 if m.nhwc else 1) >= m.c


# Several parts with a partial last one; more parts than one tile of the second stage holds.
PARTS = [
    (LAST, (3, 16, 11, 11), 6),
    (LAST, (5, 17, 7, 7), 4),
    (LAST, (3, 65, 7, 5), 4),
    (LAST, (13, 2, 13, 13), 35),
    (NCHW, (70, 2, 8, 8), 3),
    (NCHW, (50, 2, 10, 10), 3),
    (NCHW, (5, 2, 33, 33), 3),
]


@pytest.mark.parametrize(("layout", "shape", "parts"), PARTS)
@routes("interpret", "gpu")
def test_parts(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "_MIN_TILES", 1)
    y = ramp(activation(shape, layout=layout))
    plan = _launch.cut(_launch.matrix(y))
    length = shape[0] * shape[2] * shape[3] if layout == LAST else shape[0]
    assert plan.parts == parts and length % plan.chunk != 0
    compare(route, problem(y, momentum=1.0))


@layouts
@routes("interpret", "gpu")
def test_first_tile_is_an_outlier(
    route: Route, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor's bound: with T tiles in a chunk the variance loses at most the factor 1 + T to cancellation."""
    monkeypatch.setattr(_launch, "_PROGRAMS", 1)
    shape, tiles = ((20, 2, 8, 8), 20) if layout == LAST else ((40, 2, 32, 32), 20)
    y = activation(shape, layout=layout, mean=1e3)
    y[: shape[0] // tiles] += 100
    plan = _launch.cut(_launch.matrix(y))
    assert plan.parts == 1 and plan.per_chunk == tiles * plan.tile.b0 * (
        1 if layout == LAST else plan.tile.b1
    )
    with poison():
        mean, var = family.batch_norm_stats(y.to(route.device), None, None, 0.0)
    ref = y.double()
    want = ref.var((0, 2, 3), correction=0)
    assert (mean.cpu().double() - ref.mean((0, 2, 3))).abs().max() <= 2e-7 * 1e3
    assert ((var.cpu().double() - want).abs() / want).max() <= (1 + tiles) * 8 * 2.0**-24


@routes_and("shape", {"reference": [(3, 4, 5, 6)], "interpret": [(3, 4, 5, 6)], "gpu": [(2, 64, 4096, 4100)]})
@layouts
def test_last_image_of_a_large_batch(
    route: Route, layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    """On a GPU the second image begins beyond 2^31 values from the first: each is computed as it is alone."""
    bn = copy_norm(make_norm(shape[1], torch.float32), route.device, grad=False)
    y = torch.zeros(shape, dtype=torch.bfloat16, device=route.device).contiguous(memory_format=layout)
    y[-1:] = torch.randn_like(y[-1:])
    mean, var = bn.running_mean, bn.running_var
    act = (mean, var, bn.weight, bn.bias, bn.eps, True)
    z = family.batch_norm_act(y, *act, False, None, None)[-1:]
    assert torch.equal(z, family.batch_norm_act(y[-1:], *act, False, None, None))
    del z
    dy = family.batch_norm_backward(y, y, *act, None, None, None, 0.0)[-1:]
    assert torch.equal(dy, family.batch_norm_backward(y[-1:], y[-1:], *act, None, None, None, 0.0))
    del dy
    sums = family.batch_norm_reduce(y, y, *act)
    for name, value, alone in zip("12", sums, family.batch_norm_reduce(y[-1:], y[-1:], *act), strict=True):
        assert_close64(f"sum {name}", value, alone, alone.double())
    mean, var = family.batch_norm_stats(y, None, None, 0.0)
    n = shape[0]
    alone_mean, alone_var = (v.double() for v in family.batch_norm_stats(y[-1:], None, None, 0.0))
    assert_close64("mean", mean, mean, alone_mean / n)
    assert_close64("var", var, var, alone_var / n + alone_mean**2 * (n - 1) / n**2)
