"""Batch norm, ReLU and 3x3 stride 2 max pooling of the stem on every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional as fn
from fastres import reference
from fastres.kernels import _launch
from fastres.kernels import pool as family
from fastres.kernels._launch import Tile
from tests.cases import (
    HALF,
    LAST,
    LAYOUTS,
    NCHW,
    ROUTE_DTYPES,
    Acts,
    Norms,
    Problem,
    Route,
    activation,
    compare,
    copy_norm,
    make_norm,
    pending,
    plain_norm,
    record_launches,
    routes,
    routes_and,
)
from tests.tolerance import assert_close64, poison

layouts = pytest.mark.parametrize("layout", LAYOUTS)
GRID = 0.5  # values on a grid tie exactly or differ by more than a rounding, so every dtype finds the same winners


def problem(y: Tensor, norm_dtype: torch.dtype | None = None, **norm: Any) -> Problem:
    """max_pool(relu(bn(y))). The plain one pools the activation as it would be stored, so that ties fall alike."""

    def plain(a: Acts, n: Norms, stored: torch.dtype) -> tuple[Tensor, Tensor]:
        v = plain_norm(a["y"], n["bn"])
        z = v.relu()
        z = z + (z.detach().to(stored).to(z.dtype) - z.detach()).nan_to_num(0.0, 0.0, 0.0)
        return F.max_pool2d(z, 3, 2, 1), v

    kind = norm_dtype or (torch.float64 if y.dtype == torch.float64 else torch.float32)
    return Problem(
        ours=lambda a, n: fn.max_pool(pending(a["y"], n["bn"], relu=True)),
        plain=plain,
        acts={"y": y},
        norms={"bn": make_norm(y.shape[1], kind, **norm)},
    )


# Odd and even sides, maps smaller than a window, one pixel, one channel, one image.
SHAPES = [(2, 1, 7, 7), (3, 3, 6, 5), (5, 65, 1, 1), (1, 3, 8, 8), (2, 3, 2, 2), (1, 4, 1, 2), (2, 17, 3, 4)]
GPU_SHAPES = [(4, 64, 112, 112), (3, 65, 57, 31), (1, 7, 224, 224)]
ROUTE_SHAPES = {"reference": SHAPES, "interpret": SHAPES, "gpu": SHAPES + GPU_SHAPES}


@layouts
@routes_and("shape", ROUTE_SHAPES)
def test_shapes(route: Route, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    compare(route, problem(activation(shape, layout=layout, grid=GRID)))


FORMS: dict[str, dict[str, Any]] = {
    "train": dict(),
    "frozen": dict(training=False),
    "no-affine": dict(affine=False),
    "frozen-no-affine": dict(affine=False, training=False),
    "no-running": dict(track=False),
    "cumulative": dict(momentum=None),
}


@pytest.mark.parametrize("form", FORMS)
@layouts
@routes_and("dtype", ROUTE_DTYPES)
def test_forms(route: Route, dtype: torch.dtype, layout: torch.memory_format, form: str) -> None:
    compare(route, problem(activation((3, 5, 7, 6), dtype, layout, grid=GRID), **FORMS[form]))


@layouts
@routes_and("dtype", ROUTE_DTYPES)
def test_without_ties(route: Route, dtype: torch.dtype, layout: torch.memory_format) -> None:
    compare(route, problem(activation((2, 5, 9, 8), dtype, layout)))


@pytest.mark.parametrize("dtype", HALF)
@routes()
def test_half_parameters(route: Route, dtype: torch.dtype) -> None:
    compare(route, problem(activation((3, 5, 7, 6), dtype, LAST, grid=GRID), norm_dtype=dtype))


@pytest.mark.parametrize("dy", ["other", "expanded", "strided"])
@pytest.mark.parametrize("training", [True, False])
@layouts
@routes()
def test_strided_gradient(route: Route, layout: torch.memory_format, training: bool, dy: str) -> None:
    compare(route, problem(activation((2, 5, 6, 7), layout=layout, grid=GRID), training=training), dy=dy)


@layouts
@routes()
def test_mean_far_from_zero(route: Route, layout: torch.memory_format) -> None:
    y = activation((4, 3, 9, 7), layout=layout, grid=GRID, mean=1e3)
    compare(route, problem(y, momentum=1.0), margin=1e-2)


@pytest.mark.parametrize("training", [True, False])
@layouts
@routes()
def test_special_values(route: Route, layout: torch.memory_format, training: bool) -> None:
    y = activation((2, 5, 6, 6), layout=layout, grid=GRID)
    y[0, 0, 1, 1], y[1, 1, 0, 2], y[0, 2, 2, 3] = float("inf"), float("nan"), -float("inf")
    y[1, 1, 1, 1] = float("nan")  # two in one window: the last one wins
    ours = compare(route, problem(y, training=training), dy="nan", finite=False)
    assert ours["out"][:, 3].isfinite().all() and ours["out"][:, 1].isnan().any()


@layouts
@routes()
def test_no_gradient_at_exactly_zero(route: Route, layout: torch.memory_format) -> None:
    p = problem(activation((3, 4, 5, 7), layout=layout))
    for v in p.norms["bn"][:2]:
        v.zero_()
    ours = compare(route, p)
    assert not any(ours[k].any() for k in ("out", "d y", "d bn.weight", "d bn.bias"))


@pytest.mark.parametrize("training", [True, False])
@layouts
@routes()
def test_empty_batch(route: Route, layout: torch.memory_format, training: bool) -> None:
    p = problem(activation((0, 3, 6, 5), layout=layout), training=training)
    ours = compare(route, p, finite=False)
    assert ours["out"].shape == (0, 3, 3, 3) and not ours["d bn.weight"].any()
    assert torch.equal(ours["bn.running_var"].cpu(), p.norms["bn"].running_var)


@layouts
@routes_and("shape", {"reference": [(3, 5, 9, 7)], "interpret": [(3, 5, 9, 7)], "gpu": GPU_SHAPES})
def test_same_bits_every_run(route: Route, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    p = problem(activation(shape, layout=layout, grid=GRID))
    state = torch.get_rng_state()
    first = compare(route, p)
    torch.set_rng_state(state)
    second = compare(route, p)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 2, 1, 3), (2, 2, 5, 1)])
@layouts
@routes()
def test_taps(route: Route, layout: torch.memory_format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The winner of each window is PyTorch's: the first of equals, the last NaN. In bf16 values differ by less than a
    rounding, so that what is equal when stored is not before."""
    bn = copy_norm(make_norm(shape[1], training=False), route.device, grad=False)
    if dtype == torch.bfloat16:
        bn = bn._replace(weight=bn.weight * 0.01, bias=bn.bias.abs())
    y = activation(shape, dtype, layout, grid=GRID).to(route.device)
    y[0, 0, 0, 0] = y[0, -1, -1, -1] = float("nan")
    stats = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    with poison():
        out, taps = family.bn_relu_max_pool(y, *stats, False, None, None)
    z = reference.batch_norm_act(y, *stats, True, False, None, None)
    want, at = F.max_pool2d(z.contiguous(), 3, 2, 1, return_indices=True)
    assert_close64("out", out, want, want.double())
    oh, ow = want.shape[2:]
    row = 2 * torch.arange(oh, device=y.device).view(-1, 1) - 1 + taps.long() // 3
    col = 2 * torch.arange(ow, device=y.device) - 1 + taps.long() % 3
    assert torch.equal(row * shape[3] + col, at)


# ----------------------------------------------------------------------------------------- how work is divided

# Layout, shape, tile of the output's and of the input's elementwise pass, tile of the reduction.
TILES = [
    (LAST, (2, 16, 7, 12), Tile(64, 16, 4), Tile(64, 16, 4), Tile(64, 16, 4)),
    (LAST, (2, 17, 7, 7), Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 32, 4)),
    (LAST, (2, 33, 7, 5), Tile(64, 64, 8), Tile(64, 64, 8), Tile(32, 64, 4)),
    (LAST, (2, 130, 5, 5), Tile(32, 128, 8), Tile(32, 128, 8), Tile(32, 64, 4)),
    (NCHW, (34, 2, 7, 7), Tile(64, 64, 8), Tile(64, 64, 8), Tile(32, 64, 4)),
    (NCHW, (9, 2, 14, 14), Tile(64, 64, 8), Tile(16, 256, 8), Tile(8, 256, 4)),
    (NCHW, (9, 2, 17, 18), Tile(16, 256, 8), Tile(4, 512, 4), Tile(2, 1024, 4)),
    (NCHW, (2, 1, 65, 67), Tile(4, 512, 4), Tile(4, 512, 4), Tile(2, 1024, 4)),
]


def test_every_tile_has_a_shape() -> None:
    for column, table in ((2, _launch.ELEMENTWISE), (3, _launch.ELEMENTWISE), (4, _launch.REDUCTION)):
        for nhwc in (True, False):
            assert {row[column] for row in TILES if (row[0] == LAST) == nhwc} == set(table[nhwc])


@pytest.mark.parametrize(("layout", "shape", "output", "input_", "reduction"), TILES)
@routes("interpret", "gpu")
def test_tiles(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    output: Tile,
    input_: Tile,
    reduction: Tile,
) -> None:
    with record_launches() as seen:
        compare(route, problem(activation(shape, torch.bfloat16, layout, grid=GRID)))
    nhwc = layout == LAST
    assert {s for s in seen if s[0].startswith("pool")} == {
        ("pool_kernel", nhwc, output.b0, output.b1),
        ("pool_backward_kernel", nhwc, input_.b0, input_.b1),
        ("pool_reduce_kernel", nhwc, reduction.b0, reduction.b1),
    }


@pytest.mark.parametrize(
    ("layout", "shape", "parts"),
    [
        (LAST, (3, 16, 11, 11), 6),
        (LAST, (3, 65, 7, 5), 4),
        (NCHW, (70, 2, 8, 8), 3),
        (NCHW, (5, 1, 33, 33), 3),
    ],
)
@routes("interpret", "gpu")
def test_parts(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "_MIN_TILES", 1)
    p = problem(activation(shape, layout=layout, grid=GRID))
    plan = _launch.cut(_launch.matrix(p.acts["y"]))
    length = shape[0] * shape[2] * shape[3] if layout == LAST else shape[0]
    assert plan.parts == parts and length % plan.chunk != 0
    compare(route, p)


# ------------------------------------------------------------------------------------- what is not a fused stem


@routes()
@pytest.mark.parametrize("kind", ["tensor", "pending without ReLU", "evaluated"])
def test_plain_pool(route: Route, kind: str) -> None:
    """A tensor, a norm without ReLU, and an activation that exists already are pooled as they are."""

    def call(a: Acts, n: Norms) -> Tensor:
        if kind == "tensor":
            return fn.max_pool(a["y"])
        p = pending(a["y"], n["bn"], relu=kind == "evaluated")
        if kind == "evaluated":
            fn.materialize(p)
        return fn.max_pool(p)

    def plain(a: Acts, n: Norms, _: torch.dtype) -> tuple[Tensor, Tensor]:
        v = a["y"] if kind == "tensor" else plain_norm(a["y"], n["bn"])
        z = v.relu() if kind == "evaluated" else v
        return F.max_pool2d(z, 3, 2, 1), v

    y = activation((2, 5, 7, 6), grid=GRID)
    norms = {} if kind == "tensor" else {"bn": make_norm(5)}
    compare(route, Problem(call, plain, {"y": y}, norms))
