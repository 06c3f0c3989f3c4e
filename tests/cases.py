"""One comparison, described once and run on every route: our functions, eager PyTorch and PyTorch in float64.

A test names a problem (activations, norms, our function, the plain one) and `compare` does the rest: values, the
gradients of every activation and parameter, running statistics, strides, on outputs poisoned with NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastres import functional as fn
from fastres.functional import BatchNorm, Pending
from fastres.kernels._launch import Tile
from fastres.kernels._triton import INTERPRET
from tests.tolerance import assert_close64, assert_layout, poison

HALF = (torch.float16, torch.bfloat16)
NCHW, LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = [pytest.param(NCHW, id="nchw"), pytest.param(LAST, id="channels_last")]


def graph(out: Tensor) -> set[Any]:
    """All nodes of the autograd graph behind ``out``."""
    seen, todo = {out.grad_fn}, [out.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def node_names(out: Tensor) -> set[str]:
    return {type(node).__name__ for node in graph(out)}


class Route(NamedTuple):
    backend: str
    device: str


_REFERENCE = pytest.mark.skipif(INTERPRET, reason="the CPU operators are the kernels under TRITON_INTERPRET")
_ROUTES = {
    "reference": (Route("reference", "cpu"), _REFERENCE),
    "interpret": (Route("triton", "cpu"), pytest.mark.interpret),
    "gpu": (Route("triton", "cuda"), pytest.mark.gpu),
}


def routes(*names: str) -> pytest.MarkDecorator:
    """Parametrize ``route``: the plain-torch operators, the kernels interpreted, the kernels on a GPU; default all."""
    chosen = names or tuple(_ROUTES)
    return pytest.mark.parametrize(
        "route", [pytest.param(_ROUTES[n][0], id=n, marks=_ROUTES[n][1]) for n in chosen]
    )


def routes_and(name: str, table: dict[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrize ``route`` and another argument together, with values of its own for each route."""
    rows = [
        pytest.param(_ROUTES[r][0], v, id=f"{r}-{label(v)}", marks=_ROUTES[r][1])
        for r, values in table.items()
        for v in values
    ]
    return pytest.mark.parametrize(("route", name), rows)


def label(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


ROUTE_DTYPES = {
    "reference": (torch.float64, torch.float32, *HALF),
    "interpret": (torch.float32, *HALF),
    "gpu": (torch.float32, *HALF),
}
# Odd sizes, one channel, one image, one pixel, one value a row; larger ones for a GPU.
SHAPES = [(2, 1, 7, 7), (3, 3, 5, 4), (5, 65, 1, 1), (1, 3, 7, 7), (2, 3, 1, 1), (1, 4, 1, 2), (2, 17, 3, 5)]
GPU_SHAPES = [(8, 64, 56, 56), (5, 65, 113, 59), (32, 512, 7, 7), (3, 2048, 7, 7), (1, 3, 224, 224)]
ROUTE_SHAPES = {"reference": SHAPES, "interpret": SHAPES, "gpu": SHAPES + GPU_SHAPES}

# Layout, shape, and the elementwise and the reduction tile that it is cut with: rows and columns end inside a tile, and
# there are several of them where that is cheap. tests/test_batch_norm.py holds this list against the tables.
TILED = [
    (LAST, (3, 16, 7, 7), Tile(64, 16, 4), Tile(64, 16, 4)),
    (LAST, (3, 3, 7, 7), Tile(64, 16, 4), Tile(64, 16, 4)),
    (LAST, (2, 17, 7, 7), Tile(64, 32, 4), Tile(64, 32, 4)),
    (LAST, (2, 33, 7, 5), Tile(64, 64, 8), Tile(32, 64, 4)),
    (LAST, (2, 130, 5, 5), Tile(32, 128, 8), Tile(32, 64, 4)),
    (NCHW, (34, 2, 7, 7), Tile(64, 64, 8), Tile(32, 64, 4)),
    (NCHW, (9, 2, 9, 9), Tile(16, 256, 8), Tile(8, 256, 4)),
    (NCHW, (3, 2, 33, 33), Tile(4, 512, 4), Tile(2, 1024, 4)),
]


# ------------------------------------------------------------------------------------------------------- inputs


def activation(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = NCHW,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    grid: float = 0.0,
) -> Tensor:
    """Normal numbers; with ``grid`` rounded to its multiples, which makes exact ties."""
    x = torch.randn(shape, dtype=torch.float64) * std
    if grid:
        x = (x / grid).round().clamp(-4, 4) * grid
    return (x + mean).to(dtype).contiguous(memory_format=layout)


def make_norm(
    c: int,
    dtype: torch.dtype = torch.float32,
    *,
    affine: bool = True,
    track: bool = True,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> BatchNorm:
    """Random parameters of magnitude 0.5 to 1.5 and both signs; the second channel's gamma is zero."""

    def away(n: int) -> Tensor:
        sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
        return (sign * (0.5 + torch.rand(n, dtype=torch.float64))).to(dtype)

    weight, bias = (away(c), away(c).flip(0)) if affine else (None, None)
    if weight is not None and c > 2:
        weight[1] = 0
    mean, var = (away(c), away(c).abs()) if track else (None, None)
    count = torch.tensor(3) if track else None
    return BatchNorm(weight, bias, mean, var, count, momentum, eps, training)


def copy_norm(
    bn: BatchNorm, device: Any = None, dtype: torch.dtype | None = None, grad: bool = True
) -> BatchNorm:
    """A copy that shares nothing, moved; weight and bias are leaves that want gradients."""

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.detach().clone().to(device=device, dtype=dtype if t.is_floating_point() else None)

    new = bn._replace(**{k: copy(getattr(bn, k)) for k in bn._fields[:5]})
    for p in (new.weight, new.bias):
        if p is not None:
            p.requires_grad_(grad)
    return new


def copy_act(x: Tensor, device: Any = None, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
    """A copy in the same strides, a leaf that wants a gradient."""
    return torch.empty_like(x, device=device, dtype=dtype).copy_(x.detach()).requires_grad_(grad)


def pending(y: Tensor, bn: BatchNorm, relu: bool = False) -> Pending:
    """The norm of a tensor as the functions see it behind a convolution."""
    return Pending(y, nn.Identity(), bn, relu)


def gradient(kind: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """A random output gradient: ``dense``, in the ``other`` layout, ``expanded`` over pixels, ``strided``,
    or with one ``nan``."""
    n, c, h, w = shape
    if kind == "nan":
        dense = activation(shape, dtype, layout)
        dense[0, -1, 0, 0] = float("nan")
        return dense
    if kind == "expanded":
        return torch.randn(n, c, 1, 1, dtype=torch.float64).to(dtype).expand(shape)
    if kind == "strided":
        return torch.randn(n, c, h, 2 * w, dtype=torch.float64).to(dtype)[..., ::2]
    if kind == "other":
        layout = NCHW if layout == LAST else LAST
    return activation(shape, dtype, layout)


# -------------------------------------------------------------------------------------------------- plain torch


def plain_norm(y: Tensor, bn: BatchNorm) -> Tensor:
    """``torch.nn.BatchNorm2d`` with these parameters and buffers, which it updates as eager PyTorch does."""
    module = nn.BatchNorm2d(
        y.shape[1], bn.eps, bn.momentum, bn.weight is not None, bn.running_mean is not None
    ).train(bn.training)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    given = {k: getattr(bn, k) for k in names if getattr(bn, k) is not None}
    return torch.func.functional_call(module, given, (y,))


Acts = dict[str, Tensor]
Norms = dict[str, BatchNorm]


class Problem(NamedTuple):
    """What is compared. ``plain(acts, norms, dtype)`` gives the output and the value whose sign the ReLU asks for."""

    ours: Callable[[Acts, Norms], Tensor]
    plain: Callable[[Acts, Norms, torch.dtype], tuple[Tensor, Tensor]]
    acts: Acts
    norms: Norms
    shift: str = "y"  # the activation that is moved where a value is too close to the ReLU's kink


def evaluate(
    call: Callable[[Acts, Norms], Tensor], acts: Acts, norms: Norms, dout: Tensor
) -> dict[str, Tensor]:
    """Output, gradients of all activations and parameters, and the buffers afterwards."""
    out = call(acts, norms)
    leaves = dict(acts)
    for key, bn in norms.items():
        leaves |= {f"{key}.{k}": getattr(bn, k) for k in ("weight", "bias") if getattr(bn, k) is not None}
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    result = {"out": out.detach()} | {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}
    for key, bn in norms.items():
        for k in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(bn, k) is not None:
                result[f"{key}.{k}"] = getattr(bn, k)
    return result


def off_the_kink(p: Problem, margin: float) -> Problem:
    """The problem with no value closer to zero than ``margin`` before its ReLU: there the sign is a matter of rounding,
    and with it a whole gradient value."""
    dtype, acts = p.acts["y"].dtype, dict(p.acts)
    for _ in range(20):
        with torch.no_grad():
            wide = {k: v.double() for k, v in acts.items()}
            norms = {k: copy_norm(b, dtype=torch.float64) for k, b in p.norms.items()}
            before = p.plain(wide, norms, dtype)[1]
        near = (before.abs() < margin) & (before != 0)
        if not near.any():
            return p._replace(acts=acts)
        step = 0.5 * float(wide[p.shift].std())
        acts[p.shift] = torch.where(near, acts[p.shift] + step, acts[p.shift]).to(dtype)
    raise AssertionError("values stay at the kink of the ReLU; choose other numbers")


def compare(
    route: Route,
    p: Problem,
    *,
    dy: str = "dense",
    margin: float = 1e-4,
    cancels: bool = False,
    finite: bool = True,
    chained: bool = False,
) -> dict[str, Tensor]:
    """Hold ours against eager and float64 by the rule of tests/tolerance.py; returns our results.

    ``cancels``: gradients of activations vanish in exact arithmetic (two values a channel), so their floor is that of
    their terms. ``finite`` False: inputs with NaN or inf; running statistics are then compared for being finite only.
    ``chained``: float32 results are made from intermediates in the activations' dtype, whose floor then applies.
    """
    y = p.acts["y"]
    dtype, layout = y.dtype, NCHW if y.is_contiguous() else LAST
    if finite:
        p = off_the_kink(p, margin)

    def inputs(device: str, kind: torch.dtype | None) -> tuple[Acts, Norms]:
        acts = {k: copy_act(v, device, kind) for k, v in p.acts.items()}
        return acts, {k: copy_norm(b, device, kind) for k, b in p.norms.items()}

    def plain(device: str, kind: torch.dtype | None, dout: Tensor) -> dict[str, Tensor]:
        acts, norms = inputs(device, kind)
        return evaluate(lambda a, n: p.plain(a, n, dtype)[0], acts, norms, dout)

    with torch.no_grad():
        shape = p.plain(*inputs("cpu", None), dtype)[0].shape
    dout = gradient(dy, shape, dtype, layout).to(route.device)
    ref, eager = plain("cpu", torch.float64, dout.cpu().double()), plain(route.device, None, dout)
    acts, norms = inputs(route.device, None)
    kept = {k: v.detach().clone() for k, v in acts.items()}
    with fn.backend(route.backend), poison():
        ours = evaluate(p.ours, acts, norms, dout)

    scales = {}
    if cancels:  # |gamma| is at most 1.5
        for k, v in p.acts.items():
            rstd = v.double().var((0, 2, 3), correction=0).add(1e-5).rsqrt()
            scales[f"d {k}"] = 1.5 * float(rstd.max()) * float(dout.abs().max())
    if finite:
        for (
            name
        ) in ours:  # a sum of many random terms may be small by chance; eager's is made in float64 on a CPU
            if name.endswith((".weight", ".bias")) and ours[name].dtype not in HALF:
                scales[name] = float(dout.double().norm()) / shape[1] ** 0.5
            if name.endswith("running_mean"):  # and so may a mean of values of either sign
                scales[name] = float(y.double().std(correction=0))
    for k, v in acts.items():
        assert torch.equal(v.detach().nan_to_num(), kept[k].nan_to_num()), f"input {k} was changed"
        assert_layout(ours[f"d {k}"], v, f"d {k}")
    assert_layout(
        ours["out"], torch.empty(shape, dtype=dtype, device=route.device, memory_format=layout), "out"
    )
    for name, value in ours.items():
        running = "running" in name
        if "num_batches" in name:
            assert int(value) == int(eager[name]), f"{name}: {int(value)}, eager {int(eager[name])}"
        elif running and not finite:
            assert torch.equal(value.isfinite().cpu(), ref[name].isfinite()), name
        else:
            kind = dtype if chained else value.dtype
            assert_close64(name, value, eager[name], ref[name], kind, scales.get(name, 0.0))
    return ours


@contextmanager
def record_launches() -> Iterator[set[tuple[str, bool | None, int, int]]]:
    """Kernel, layout (None where it has none) and tile of every launch inside the block."""
    from fastres.kernels.batch_norm import act_kernel

    kind, seen = type(act_kernel), set()
    run = kind.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add((self.fn.__name__, kwargs.get("NHWC"), kwargs["B0"], kwargs["B1"]))
        return run(self, *args, **kwargs)

    kind.run = recorded
    try:
        yield seen
    finally:
        kind.run = run
