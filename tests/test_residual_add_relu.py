"""The end of a residual block on every route: relu(keep bn(y) + identity), the identity a tensor or itself a norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastres import functional as fn
from fastres import reference
from fastres.kernels import _launch
from fastres.kernels import residual_add_relu as family
from fastres.kernels._launch import Tile
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
    pending,
    plain_norm,
    record_launches,
    routes,
    routes_and,
)
from tests.tolerance import poison

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def keep_of(n: int, kind: torch.dtype = torch.float32) -> Tensor:
    """Drop path's factors: 0, 1 and 1 / keep probability."""
    return torch.tensor([1.25, 0.0, 1.0])[torch.arange(n) % 3].to(kind)


def problem(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = NCHW,
    *,
    keep: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
    second: dict[str, Any] | None = None,
    **norm: Any,
) -> Problem:
    """``add``: no norm; ``identity``: a norm on the branch; ``pair``: on both; ``swapped``: on the identity."""
    y, x = activation(shape, dtype, layout), activation(shape, dtype, layout)
    vector = norm_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    norms = {} if kind == "add" else {"bn": make_norm(shape[1], vector, **norm)}
    if kind == "pair":
        norms["bn2"] = make_norm(shape[1], vector, **(norm if second is None else second))
        norms["bn2"] = norms["bn2"]._replace(eps=2e-3)

    def ours(a: Acts, n: Norms) -> Tensor:
        branch: Any = a["y"] if kind in ("add", "swapped") else pending(a["y"], n["bn"])
        identity: Any = a["x"]
        if kind in ("pair", "swapped"):
            identity = pending(a["x"], n["bn2" if kind == "pair" else "bn"])
        return fn.add_relu(branch, identity, None if keep is None else keep.to(a["y"].device))

    def plain(a: Acts, n: Norms, _: torch.dtype) -> tuple[Tensor, Tensor]:
        v = a["y"] if kind in ("add", "swapped") else plain_norm(a["y"], n["bn"])
        if keep is not None:
            v = v * keep.to(v).view(-1, 1, 1, 1)
        if kind in ("pair", "swapped"):
            v = v + plain_norm(a["x"], n["bn2" if kind == "pair" else "bn"])
        else:
            v = v + a["x"]
        return v.relu(), v

    return Problem(ours, plain, {"y": y, "x": x}, norms, shift="x")


KINDS = ("add", "identity", "pair", "swapped")


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", ["identity", "pair"])
@layouts
@routes_and("shape", ROUTE_SHAPES)
def test_shapes(route: Route, layout: torch.memory_format, kind: str, shape: tuple[int, ...]) -> None:
    two = shape[0] * shape[2] * shape[3] == 2
    compare(route, problem(kind, shape, layout=layout), cancels=two)


FORMS: dict[str, dict[str, Any]] = {
    "train": dict(),
    "frozen": dict(training=False),
    "no-affine": dict(affine=False),
    "frozen-no-affine": dict(affine=False, training=False),
    "no-running": dict(track=False),
    "cumulative": dict(momentum=None),
}


@pytest.mark.parametrize("keep", [False, True], ids=["whole", "keep"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["identity", "pair"])
@layouts
@routes()
def test_forms(route: Route, layout: torch.memory_format, kind: str, form: str, keep: bool) -> None:
    factor = keep_of(4) if keep else None
    compare(route, problem(kind, (4, 3, 5, 6), layout=layout, keep=factor, **FORMS[form]))


@pytest.mark.parametrize("keep", [None, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", KINDS)
@routes()
def test_keep(route: Route, kind: str, keep: torch.dtype | None) -> None:
    factor = None if keep is None else keep_of(5, keep)
    compare(route, problem(kind, (5, 3, 3, 5), keep=factor, layout=LAST))


@pytest.mark.parametrize("kind", KINDS)
@layouts
@routes_and("dtype", ROUTE_DTYPES)
def test_dtypes(route: Route, dtype: torch.dtype, layout: torch.memory_format, kind: str) -> None:
    compare(route, problem(kind, (4, 5, 3, 5), dtype, layout, keep=keep_of(4)))


@pytest.mark.parametrize("dtype", HALF)
@layouts
@routes()
def test_one_rounding_to_nearest(route: Route, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """A sum of two 16-bit values is exact in float32, so the stored one is PyTorch's to the bit."""
    a, b = (activation((4, 5, 9, 7), dtype, layout).to(route.device) for _ in range(2))
    with fn.backend(route.backend), poison():
        assert torch.equal(fn.add_relu(a, b), (a.float() + b.float()).to(dtype).relu())


@pytest.mark.parametrize("kind", ["identity", "pair"])
@pytest.mark.parametrize("dtype", HALF)
@routes()
def test_half_parameters(route: Route, dtype: torch.dtype, kind: str) -> None:
    compare(route, problem(kind, (4, 5, 3, 5), dtype, norm_dtype=dtype))


@pytest.mark.parametrize("first", [True, False], ids=["train", "frozen"])
@routes()
def test_one_norm_frozen(route: Route, first: bool) -> None:
    """Batch statistics in one branch, running statistics in the other."""
    p = problem("pair", (4, 5, 3, 5), training=first, second=dict(training=not first), keep=keep_of(4))
    compare(route, p)


@pytest.mark.parametrize("first", [True, False])
@routes()
def test_one_norm_affine(route: Route, first: bool) -> None:
    compare(route, problem("pair", (4, 5, 3, 5), affine=first, second=dict(affine=not first)))


@pytest.mark.parametrize("dy", ["other", "expanded", "strided"])
@pytest.mark.parametrize("kind", ["add", "identity", "pair"])
@layouts
@routes()
def test_strided_gradient(route: Route, layout: torch.memory_format, kind: str, dy: str) -> None:
    compare(route, problem(kind, (2, 5, 4, 7), layout=layout), dy=dy)


@pytest.mark.parametrize("kind", ["identity", "pair"])
@layouts
@routes()
def test_mean_far_from_zero(route: Route, layout: torch.memory_format, kind: str) -> None:
    p = problem(kind, (4, 3, 9, 7), layout=layout)
    p.acts["y"].add_(1e3)
    compare(route, p, margin=1e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@layouts
@routes()
def test_special_values(route: Route, layout: torch.memory_format, kind: str, training: bool) -> None:
    p = problem(kind, (2, 5, 3, 4), layout=layout, **({} if kind == "add" else dict(training=training)))
    y, x = p.acts["y"], p.acts["x"]
    y[0, 0, 1, 1], y[1, 1, 0, 2], x[0, 2, 2, 3] = float("inf"), float("nan"), -float("inf")
    x[1, 0, 0, 0], y[1, 0, 0, 0] = float("nan"), 1.0
    ours = compare(route, p, dy="nan", finite=False)
    assert ours["out"][:, 3].isfinite().all() and ours["out"][:, 1].isnan().any()


@pytest.mark.parametrize("kind", ["add", "identity", "pair"])
@layouts
@routes()
def test_no_gradient_at_exactly_zero(route: Route, layout: torch.memory_format, kind: str) -> None:
    """ReLU's derivative at zero is zero, as in eager: a branch of 0.5 and an identity of -0.5."""
    p = problem(kind, (3, 4, 5, 7), layout=layout)
    p.acts["y"].fill_(0.5)
    p.acts["x"].fill_(-0.5)
    for bn, value in zip(p.norms.values(), (0.5, -0.5), strict=False):
        assert bn.weight is not None and bn.bias is not None
        bn.weight.zero_()
        bn.bias.fill_(value)
    ours = compare(route, p)
    assert not any(v.any() for k, v in ours.items() if k == "out" or k.startswith("d "))


@pytest.mark.parametrize("kind", KINDS)
@layouts
@routes()
def test_empty_batch(route: Route, layout: torch.memory_format, kind: str) -> None:
    p = problem(kind, (0, 3, 4, 5), layout=layout, keep=keep_of(0))
    ours = compare(route, p, finite=False)
    for name, bn in p.norms.items():
        assert torch.equal(ours[f"{name}.running_mean"].cpu(), bn.running_mean)
        assert torch.equal(ours[f"{name}.running_var"].cpu(), bn.running_var)
        assert not ours[f"d {name}.weight"].any()


@pytest.mark.parametrize("kind", ["identity", "pair"])
@layouts
@routes("gpu")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_large_half(
    route: Route, layout: torch.memory_format, dtype: torch.dtype, shape: tuple[int, ...], kind: str
) -> None:
    compare(route, problem(kind, shape, dtype, layout, keep=keep_of(shape[0])))


@pytest.mark.parametrize("kind", ["identity", "pair"])
@layouts
@routes_and("shape", {"reference": [(4, 5, 9, 7)], "interpret": [(4, 5, 9, 7)], "gpu": GPU_SHAPES})
def test_same_bits_every_run(
    route: Route, layout: torch.memory_format, shape: tuple[int, ...], kind: str
) -> None:
    p = problem(kind, shape, layout=layout, keep=keep_of(shape[0]))
    state = torch.get_rng_state()
    first = compare(route, p)
    torch.set_rng_state(state)
    second = compare(route, p)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ------------------------------------------------------------------------------------------- sign bits, operators


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 17])
@layouts
@routes("interpret", "gpu")
def test_bits(route: Route, layout: torch.memory_format, columns: int) -> None:
    """One bit a value in memory order, set where the gradient passes; the padding of a row's last byte is zero."""
    shape = (2, columns, 3, 3) if layout == LAST else (3, 2, 1, columns)
    a, b = (activation(shape, layout=layout).to(route.device) for _ in range(2))
    a[0, 0, 0, 0], a[-1, -1, -1, -1] = float("nan"), -b[-1, -1, -1, -1]  # NaN passes, exactly zero does not
    with poison():
        out, bits = family.add_relu(a, b, True)
    want = reference.pack_bits(~((a + b) <= 0).cpu(), a.cpu())
    assert bits.dtype == torch.uint8 and torch.equal(bits.cpu(), want)
    assert torch.equal(reference.unpack_bits(bits.cpu(), a.cpu()), ~((a + b) <= 0).cpu())
    bn = copy_norm(make_norm(shape[1]), route.device, grad=False)
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias + 5, 1e-5, False, None, None)
    with poison():  # where a row ends bn(0) + 0 would pass
        bn_bits = family.bn_add_relu(a, *norm, b, None, True)[1]
    assert torch.equal(bn_bits, reference.bn_add_relu(a, *norm, b, None, True)[1])
    dout = activation(shape, layout=layout).to(route.device)
    with poison():
        g = family.masked(dout, bits, a)
    assert torch.equal(g, torch.where((a + b) <= 0, 0, dout)) and g.stride() == a.stride()


def calls(n: int = 2) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each forward operator and its arguments, but for ``save``."""
    y, x = (activation((n, 3, 4, 4)).requires_grad_() for _ in range(2))
    bn, bn2 = (copy_norm(make_norm(3)) for _ in range(2))
    one = (y, bn.running_mean, bn.running_var, bn.weight, bn.bias, 1e-5, False, None, None)
    two = (x, bn2.running_mean, bn2.running_var, bn2.weight, bn2.bias, 1e-5, False, None, None)
    return {
        "add_relu": (family.add_relu, (y, x)),
        "bn_add_relu": (family.bn_add_relu, (*one, x, None)),
        "bn_add_bn_relu": (family.bn_add_bn_relu, (*one, *two, None)),
    }


@pytest.mark.parametrize("op", ["add_relu", "bn_add_relu", "bn_add_bn_relu"])
@routes("reference", "interpret")
def test_without_saving(route: Route, op: str) -> None:
    """save=False makes the same output without bits; its backward says what is wrong instead of using none."""
    call, args = calls()[op]
    out, bits = call(*args, False)
    assert bits.numel() == 0 and torch.equal(out, call(*args, True)[0])
    with pytest.raises(RuntimeError, match=rf"fastres::{op}: .*save=False.*needs save=True"):
        out.backward(torch.randn_like(out))


@routes("reference", "interpret")
def test_without_grad_nothing_is_saved(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    op = family.bn_add_relu
    monkeypatch.setattr(family, "bn_add_relu", lambda *a: saved.append(a[-1]) or op(*a))
    p = problem("identity", (2, 3, 4, 4))
    with fn.backend(route.backend):
        p.ours(p.acts, p.norms)
        with torch.no_grad():
            p.ours(p.acts, p.norms)
    assert saved == [True, False]


# ----------------------------------------------------------------------------------------- how work is divided


@pytest.mark.parametrize("kind", ["add", "identity", "pair"])
@pytest.mark.parametrize(("layout", "shape", "elementwise", "reduction"), TILED)
@routes("interpret", "gpu")
def test_tiles(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    elementwise: Tile,
    reduction: Tile,
    kind: str,
) -> None:
    with record_launches() as seen:
        compare(route, problem(kind, shape, torch.bfloat16, layout, keep=keep_of(shape[0])))
    nhwc = layout == LAST
    expected = {("end_kernel", nhwc, elementwise.b0, elementwise.b1)}
    if kind == "add":
        expected.add(("masked_kernel", None, elementwise.b0, elementwise.b1))
    else:
        backward = "end_pair_backward_kernel" if kind == "pair" else "backward_kernel"
        expected.add((backward, nhwc, elementwise.b0, elementwise.b1))
        expected.add(("end_reduce_kernel", nhwc, reduction.b0, reduction.b1))
    assert {s for s in seen if not s[0].startswith(("merge", "stats"))} == expected


@pytest.mark.parametrize("kind", ["identity", "pair"])
@pytest.mark.parametrize(
    ("layout", "shape", "parts"),
    [
        (LAST, (3, 16, 11, 11), 6),
        (LAST, (3, 65, 7, 5), 4),
        (NCHW, (70, 2, 8, 8), 3),
        (NCHW, (5, 2, 33, 33), 3),
    ],
)
@routes("interpret", "gpu")
def test_parts(
    route: Route,
    layout: torch.memory_format,
    shape: tuple[int, ...],
    parts: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "_MIN_TILES", 1)
    p = problem(kind, shape, layout=layout, keep=keep_of(shape[0]))
    plan = _launch.cut(_launch.matrix(p.acts["y"]))
    length = shape[0] * shape[2] * shape[3] if layout == LAST else shape[0]
    assert plan.parts == parts and length % plan.chunk != 0
    compare(route, p)
