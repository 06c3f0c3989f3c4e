"""The operators as PyTorch sees them: registration, fake tensors, autograd formulas, compilation, export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fastres import functional as fn
from fastres.functional import BatchNorm
from fastres.kernels import batch_norm, fused_conv_bn_relu, pool, residual_add_relu
from tests.cases import LAST, LAYOUTS, NCHW, Route, activation, copy_norm, make_norm, pending, routes
from tests.tolerance import poison

FAMILIES = (batch_norm, pool, residual_add_relu)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def registered() -> dict[str, OpOverload]:
    """Every operator that the three families define."""
    ops = {v.op for m in FAMILIES for v in vars(m).values() if isinstance(getattr(v, "op", None), OpOverload)}
    return {op.name().removeprefix("fastres::").removesuffix(".default"): op for op in ops}


def samples(
    dtype: torch.dtype, device: torch.device, layout: torch.memory_format, grad: bool
) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each operator: with and without affine parameters, batch statistics, keep."""
    vector = torch.float64 if dtype == torch.float64 else torch.float32

    def act(*shape: int) -> Tensor:
        return activation(shape or (2, 3, 5, 4), dtype, layout).to(device).requires_grad_(grad)

    def vectors(n: int) -> list[Tensor]:
        return [(0.5 + torch.rand(3, dtype=torch.float64)).to(device, vector) for _ in range(n)]

    def norm(affine: bool = True) -> tuple[Tensor, ...]:
        mean, var, gamma, beta = vectors(4)
        return (mean, var, gamma.requires_grad_(grad), beta.requires_grad_(grad)) if affine else (mean, var)

    y, x, keep = act(), act(), torch.tensor([0.0, 1.25], device=device, dtype=vector)
    none, rest = (None, None), (True, None, None)
    bits = residual_add_relu.add_relu(y, x, True)[1].detach()
    out, taps = pool.bn_relu_max_pool(y, *norm(), 1e-5, *rest)
    dout, taps = torch.randn_like(out).detach(), taps.detach()
    s = vectors(4)
    one, two = (y, *norm(), 1e-5, *rest), (x, *norm(), 1e-3, *rest)
    bare = (y, *norm(False), *none, 1e-5, False, None, None)
    plain = y.detach()
    return {
        "batch_norm_stats": [(plain, *vectors(2), 0.1), (plain, *none, 0.0)],
        "batch_norm_act": [(*one[:6], relu, *rest) for relu in (True, False)]
        + [(*bare[:6], True, *bare[6:])],
        "batch_norm_reduce": [(x, y, *norm(), 1e-5, True), (x, y, *norm(False), *none, 1e-5, False)],
        "batch_norm_backward": [
            (x, y, *norm(), 1e-5, True, keep, *s[:2], 0.1),
            (x, y, *norm(False), *none, 1e-5, False, None, *none, 0.0),
        ],
        "bn_relu_max_pool": [one, bare],
        "bn_relu_max_pool_reduce": [(dout, taps, y, *norm(), 1e-5)],
        "bn_relu_max_pool_backward": [
            (dout, taps, y, *norm(), 1e-5, *s[:2], 0.1),
            (dout, taps, y, *norm(False), *none, 1e-5, *none, 0.0),
        ],
        "add_relu": [(y, x, True), (y, x, False)] if not grad else [(y, x, True)],
        "masked": [(x, bits, y)],
        "bn_add_relu": [(*one, x, keep, True), (*bare, x, None, True)],
        "bn_add_bn_relu": [(*one, *two, keep, True), (*bare, *two, None, True)],
        "bn_add_relu_reduce": [
            (x, bits, y, *vectors(2), 1e-5, None, None, None, 0.0, keep),
            (x, bits, y, *vectors(2), 1e-5, x, *vectors(2), 1e-3, None),
        ],
        "bn_add_bn_relu_backward": [
            (x, bits, y, *vectors(3), 1e-5, *s[:2], 0.1, x, *vectors(3), 1e-3, *s[2:], 0.1, keep),
            (x, bits, y, *vectors(2), None, 1e-5, *none, 0.0, x, *vectors(2), None, 1e-3, *none, 0.0, None),
        ],
    }


def test_every_operator_has_samples() -> None:
    assert set(samples(torch.float32, torch.device("cpu"), NCHW, False)) == set(registered())


@pytest.mark.parametrize("name", sorted(registered()))
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float64, LAST), (torch.bfloat16, NCHW)])
def test_opcheck(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Schema (nothing undeclared is changed or aliased), autograd registration, fake tensors, AOT dispatch."""
    differentiable = name in (
        "add_relu",
        "batch_norm_act",
        "bn_add_bn_relu",
        "bn_add_relu",
        "bn_relu_max_pool",
    )
    for grad in (False, True) if differentiable else (False,):
        for args in samples(dtype, torch.device("cpu"), layout, grad)[name]:
            torch.library.opcheck(registered()[name], args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(registered()))
@layouts
def test_opcheck_gpu(name: str, layout: torch.memory_format) -> None:
    for args in samples(torch.bfloat16, torch.device("cuda"), layout, False)[name]:
        torch.library.opcheck(registered()[name], args)


# ------------------------------------------------------------------------------------------- autograd formulas


class Function:
    """A function of one, two or no norms as gradcheck wants it: tensors in, tensor out, running statistics aside."""

    def __init__(self, call: Callable[..., Tensor], acts: int, norms: tuple[dict[str, Any], ...]) -> None:
        self.call, self.acts = call, acts
        self.norms = [copy_norm(make_norm(3, torch.float64, **n)) for n in norms]
        for bn in self.norms:
            if bn.weight is not None:  # with a gamma of zero all values tie, and the pool has no derivative
                bn.weight.data[1] = 0.7

    def leaves(self, layout: torch.memory_format) -> list[Tensor]:
        acts = [activation((2, 3, 4, 5), torch.float64, layout).requires_grad_() for _ in range(self.acts)]
        return acts + [p for bn in self.norms for p in (bn.weight, bn.bias) if p is not None]

    def __call__(self, *leaves: Tensor) -> Tensor:
        acts, rest = leaves[: self.acts], list(leaves[self.acts :])
        norms = [self.fresh(bn, rest) for bn in self.norms]
        return self.call(*acts, *norms)

    @staticmethod
    def fresh(bn: BatchNorm, rest: list[Tensor]) -> BatchNorm:
        new = copy_norm(bn)
        return new if bn.weight is None else new._replace(weight=rest.pop(0), bias=rest.pop(0))


KEEP = torch.tensor([0.0, 1.25], dtype=torch.float64)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "bn": lambda y, bn: fn.batch_norm(y, bn),
    "bn_relu": lambda y, bn: fn.batch_norm(y, bn, relu=True),
    "pool": lambda y, bn: fn.max_pool(pending(y, bn, relu=True)),
    "add": lambda y, x: fn.add_relu(y, x),
    "add_keep": lambda y, x: fn.add_relu(y, x, KEEP),
    "end": lambda y, x, bn: fn.add_relu(pending(y, bn), x),
    "end_keep": lambda y, x, bn: fn.add_relu(pending(y, bn), x, KEEP),
    "end_swapped": lambda y, x, bn: fn.add_relu(y, pending(x, bn), KEEP),
    "pair": lambda y, x, bn, bn2: fn.add_relu(pending(y, bn), pending(x, bn2)),
    "pair_keep": lambda y, x, bn, bn2: fn.add_relu(pending(y, bn), pending(x, bn2), KEEP),
}


def function(name: str, *norms: dict[str, Any]) -> Function:
    acts = 1 if name in ("bn", "bn_relu", "pool") else 2
    count = 0 if name.startswith("add") else 2 if name.startswith("pair") else 1
    return Function(FUNCTIONS[name], acts, (norms or ({}, {}))[:count])


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("name", FUNCTIONS)
@layouts
@routes("reference")
def test_gradcheck(
    route: Route, layout: torch.memory_format, name: str, training: bool, affine: bool
) -> None:
    """All gradients of the registered formulas against finite differences in float64, statistics included."""
    f = function(name, dict(training=training, affine=affine), dict(training=training, affine=affine))
    with fn.backend(route.backend):
        assert torch.autograd.gradcheck(f, f.leaves(layout), eps=1e-6, atol=1e-6)


@routes("reference")
@pytest.mark.parametrize("first", [True, False])
def test_gradcheck_with_one_norm_frozen(route: Route, first: bool) -> None:
    f = function("pair_keep", dict(training=first), dict(training=not first))
    with fn.backend(route.backend):
        assert torch.autograd.gradcheck(f, f.leaves(NCHW), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@routes("reference", "interpret", "gpu")
def test_only_what_is_asked_for(route: Route, name: str) -> None:
    """Any subset of the inputs may want gradients: those wanted are the ones that all together give."""
    f = function(name)
    kind = torch.float64 if route.backend == "reference" else torch.float32

    f.norms = [copy_norm(bn, route.device, kind) for bn in f.norms]
    leaves = [t.detach().to(route.device, kind) for t in f.leaves(LAST)]
    with fn.backend(route.backend), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "KEEP", KEEP.to(route.device))
        out = f(*(t.requires_grad_() for t in leaves))
        dout = torch.randn_like(out)
        full = torch.autograd.grad(out, leaves, dout)
        for i, t in enumerate(leaves):
            alone = [v.detach().requires_grad_(v is t) for v in leaves]
            assert torch.equal(torch.autograd.grad(f(*alone), alone[i], dout)[0], full[i]), i
            rest = [v.detach().requires_grad_(v is not t) for v in leaves]
            if len(rest) > 1:
                wanted = [v for v in rest if v.requires_grad]
                others = [g for j, g in enumerate(full) if j != i]
                for ours, g in zip(torch.autograd.grad(f(*rest), wanted, dout), others, strict=True):
                    assert torch.equal(ours, g), i


@pytest.mark.parametrize("name", FUNCTIONS)
@routes("reference", "interpret")
def test_second_derivative_is_refused(route: Route, name: str) -> None:
    """Not computed, and not silently zero: an error that names the operator and the way out."""
    f = function(name)
    if route.backend == "triton":
        f.norms = [copy_norm(bn, dtype=torch.float32) for bn in f.norms]
    kind = torch.float32 if route.backend == "triton" else torch.float64
    leaves = [t.detach().to(kind).requires_grad_() for t in f.leaves(NCHW)]
    with fn.backend(route.backend):
        out = f(*leaves)
        first = torch.autograd.grad(out, leaves, torch.randn_like(out), create_graph=True)
        with pytest.raises(
            NotImplementedError, match=r"fastres::\w+: a second derivative .*backend\('aten'\)"
        ):
            first[0].square().sum().backward()


@pytest.mark.parametrize("name", ["bn_relu", "pool", "add_keep", "end_keep", "pair"])
def test_second_derivative_on_the_aten_route(name: str) -> None:
    f = function(name)
    with fn.backend("aten"):
        assert torch.autograd.gradgradcheck(f, f.leaves(NCHW), atol=1e-5)


# ------------------------------------------------------------------------------------------ compilation, export


class Net(nn.Module):
    """Stem, a block with a downsample branch and one without, on the functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4, 4, 4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))

    def bn(self, i: int) -> BatchNorm:
        m = self.norms[i]
        return BatchNorm(
            m.weight,
            m.bias,
            m.running_mean,
            m.running_var,
            m.num_batches_tracked,
            m.momentum,
            m.eps,
            m.training,
        )

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = fn.max_pool(fn.conv_bn_relu(x, c[0], self.bn(0)))
        z = fn.conv_bn_relu(x, c[1], self.bn(1))
        x = fn.add_relu(fn.conv_bn(z, c[2], self.bn(2)), fn.conv_bn(x, c[3], self.bn(3)))
        return fn.add_relu(fn.conv_bn(x, c[4], self.bn(4)), x)


def run(net: nn.Module, model: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> list[Tensor]:
    net.zero_grad()
    out = model(x)
    out.backward(dout)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [out.detach(), *grads, *(b.detach().clone() for b in net.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_compile_fullgraph(backend: str, training: bool) -> None:
    """One graph, the same numbers, running statistics included; twice, so that the second call finds them updated."""
    torch._dynamo.reset()
    nets = [Net().double().train(training) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    compiled = torch.compile(nets[1], backend="aot_eager", fullgraph=True)
    with fn.backend(backend):
        for _ in range(2):
            x = activation((2, 3, 9, 8), torch.float64)
            dout = torch.randn(2, 4, 5, 4, dtype=torch.float64)
            want, got = run(nets[0], nets[0], x, dout), run(nets[1], compiled, x, dout)
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def hold_compiled(device: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Inductor's code around the operators, which must keep their strides, against the same functions in eager mode."""
    torch._dynamo.reset()
    nets = [Net().to(device, memory_format=LAST) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    compiled = torch.compile(nets[1], fullgraph=True)
    x, dout = activation((4, 3, 17, 16), layout=LAST).to(device), torch.randn(4, 4, 9, 8).to(device)
    with fn.backend(backend), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        want, got = run(nets[0], nets[0], x, dout), run(nets[1], compiled, x, dout)
    for a, b in zip(want, got, strict=True):
        assert float((a.double() - b.double()).abs().max()) <= tolerance * float(a.abs().max().clamp(min=1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ on the CPU")
def test_compile_with_inductor() -> None:
    hold_compiled("cpu", "reference", torch.float32, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_compile_with_inductor_gpu(dtype: torch.dtype, tolerance: float) -> None:
    hold_compiled("cuda", "triton", dtype, tolerance)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_export_in_eval_mode(backend: str) -> None:
    net = Net().double().eval()
    x = activation((2, 3, 9, 8), torch.float64)
    with fn.backend(backend):
        program = torch.export.export(net, (x,))
        ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-12, atol=1e-12)
    assert any("fastres" in o for o in ops) == (backend == "reference")


# ---------------------------------------------------------------------------------------------- argument details


@routes("interpret", "gpu")
@layouts
def test_strided_vectors(route: Route, layout: torch.memory_format) -> None:
    """Parameters, statistics and keep may be strided or expanded views; strided running statistics are updated."""
    device = route.device
    y, x = (activation((2, 3, 4, 5), layout=layout).to(device) for _ in range(2))
    wide = torch.rand(3, 5, device=device) + 0.5
    mean, var, gamma, beta = wide.unbind(1)[:4]
    keep = torch.tensor([1.25], device=device).expand(2)

    def both(op: Any, *args: Any) -> None:
        dense = [a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
        with poison():
            results, wanted = op(*args), op(*dense)
        for a, b in zip(results, wanted, strict=True):
            assert torch.equal(a, b)

    assert not mean.is_contiguous() and not keep.is_contiguous()
    both(batch_norm.batch_norm_act, y, mean, var, gamma, beta, 1e-5, True, True, None, None)
    both(batch_norm.batch_norm_reduce, x, y, mean, var, gamma, beta, 1e-5, True)
    both(batch_norm.batch_norm_backward, x, y, mean, var, gamma, beta, 1e-5, True, keep, mean, var, 0.1)
    one = (y, mean, var, gamma, beta, 1e-5, True, None, None)
    both(residual_add_relu.bn_add_relu, *one, x, keep, True)
    both(residual_add_relu.bn_add_bn_relu, *one, x, *one[1:], keep, True)
    both(pool.bn_relu_max_pool, *one)
    running = torch.rand(3, 2, device=device)
    dense_mean, dense_var = (r.contiguous() for r in running.unbind(1))
    batch_norm.batch_norm_stats(y, *running.unbind(1), 0.1)
    batch_norm.batch_norm_stats(y, dense_mean, dense_var, 0.1)
    assert torch.equal(running, torch.stack([dense_mean, dense_var], 1))


@routes()
def test_one_value_a_channel(route: Route) -> None:
    """What a rank of a process group may have: its own mean, no variance, and a running variance that stays finite."""
    y, mean, var = activation((1, 3, 1, 1)).to(route.device), *torch.ones(2, 3, device=route.device)
    with poison():
        got = batch_norm.batch_norm_stats(y, mean, var, 0.1)
    assert torch.equal(got[0], y.flatten()) and not got[1].any()
    torch.testing.assert_close(var, torch.full_like(var, 0.9))


@routes()
def test_folding_replaces_the_running_variance(route: Route) -> None:
    """With a momentum of one nothing of an initial 1 is left in a variance of 1e-8, not even its rounding."""
    x = activation((2, 16, 5, 5), layout=LAST, std=1e-4).to(route.device)
    w = torch.randn(32, 16, 1, 1).to(route.device)
    mean, var = torch.full((32,), 1e3, device=route.device), torch.ones(32, device=route.device)
    mu, cov, _ = fused_conv_bn_relu.moments(x, None, None, None, None, 0.0, False, 1)
    none = (None, None)
    fused_conv_bn_relu.fold(w, x, mu, cov, *none, 1e-5, *none, mean, var, 1.0, 50)
    y = torch.nn.functional.conv2d(x.double(), w.double())
    torch.testing.assert_close(var.double(), y.var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), y.mean((0, 2, 3)), rtol=1e-4, atol=1e-9)


@pytest.mark.aot
def test_sizes_of_one_compile() -> None:
    """Triton makes a size of one a constant, with other methods than a run-time value has."""
    from tests.aot import build, cases, is_odd

    seen = set()
    for family in ("batch_norm", "pool", "residual_add_relu"):
        for case in cases(family):
            kind = (case.name.split("-")[0], case.constants.get("NHWC"))
            if kind in seen or not (is_odd(case) or case.name.startswith("merge")):
                continue
            seen.add(kind)
            sizes = [n for n, t in case.signature.items() if t == "i32" and n not in case.constants]
            assert sizes, case.name
            build(case._replace(constants={**case.constants, **dict.fromkeys(sizes, 1)}), 90)
    assert len(seen) >= 20
