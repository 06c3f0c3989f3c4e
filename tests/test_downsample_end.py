"""The end of a block of 3x3 convolutions with its downsample in moment form: values, gradients, where it applies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import functional as fn
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels import downsample_end as family
from fastres.kernels import fused_conv_bn_relu as products
from fastres.kernels._library import Operator
from fastres.kernels.batch_norm import batch_norm_stats
from fastres.kernels.block_end import Branch, fold_branch
from tests.parity import assert_parity, like, randomize, steps
from tests.plain_resnet import Block
from tests.tolerance import assert_close64, assert_layout, poison

LAST = torch.channels_last
routes = pytest.mark.parametrize(
    "route",
    [
        pytest.param("cpu", id="reference"),
        pytest.param("cpu", id="interpret", marks=pytest.mark.interpret),
        pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)
KEEP = torch.tensor([1.25, 0.0, 1.0, 1.25])


class End(nn.Module):
    """relu(keep bn(y) + bn2(conv(x)))."""

    def __init__(
        self, c: int, n: int, stride: int = 2, frozen: bool = False, frozen2: bool = False, affine: bool = True,
        affine2: bool = True, gamma: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(c, n, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(n, affine=affine, eps=2e-3).train(not frozen)
        self.bn2 = nn.BatchNorm2d(n, affine=affine2).train(not frozen2)
        with torch.no_grad():
            for m in (self.bn, self.bn2):
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 1.5)
                if m.affine:
                    m.weight.uniform_(-0.5, 1.5)
                    m.bias.normal_(std=0.5)
            if gamma is not None:
                self.bn2.weight.fill_(gamma)

    def plain(self, y: Tensor, x: Tensor, keep: Tensor | None, relu: bool = True) -> Tensor:
        v = self.bn(y)
        if keep is not None:
            v = v * keep.to(v).view(-1, 1, 1, 1)
        v = v + self.bn2(self.conv(x))
        return v.relu() if relu else v

    def ours(self, y: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
        bn, bn2, stride = self.bn, self.bn2, self.conv.stride[0]
        mean, var = bn.running_mean, bn.running_var
        if bn.training:
            mean, var = batch_norm_stats(y.detach(), mean, var, 0.1)
        read = x[:, :, ::stride, ::stride] if stride > 1 else None
        second = Branch(x, self.conv.weight, bn2.weight, bn2.bias, bn2.eps, bn2.training, stride, read=read)
        folded = fold_branch(second, bn2.running_mean, bn2.running_var, 0.1)
        branch = family.Normed(y, mean, var, bn.weight, bn.bias, bn.eps, bn.training)
        return family.downsample_end(branch, second, folded, keep)


def inputs(end: End, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    b, h, w = shape
    c, n, s = end.conv.in_channels, end.conv.out_channels, end.conv.stride[0]
    y = torch.randn(b, n, h, w, dtype=torch.float64) * 1.5 + 0.5
    x = torch.randn(b, c, h * s, (w - 1) * s + 1, dtype=torch.float64) + mean
    return tuple(t.to(dtype).contiguous(memory_format=LAST) for t in (y, x))  # type: ignore[return-value]


def step(call: Callable[..., Tensor], end: End, y: Tensor, x: Tensor, keep: Any, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:  # fmt: skip # noqa: E501
    y, x = (t.detach().to(dtype).requires_grad_() for t in (y, x))
    out = call(y, x, keep)
    out.backward(dy.to(dtype))
    found = {"out": out.detach(), "dy": y.grad, "dx": x.grad}
    found |= {f"d{k}": p.grad for k, p in end.named_parameters()}
    return found | {k: b.clone() for k, b in end.named_buffers() if b.is_floating_point()}


def compare(
    route: str, end: End, shape: tuple[int, ...], dtype: torch.dtype, keep: bool = False, mean: float = 0.0,
    x: Tensor | None = None, scale: float = 0.0,
) -> None:  # fmt: skip
    y, given = inputs(end, shape, dtype, mean)
    x = given if x is None else x.to(dtype).contiguous(memory_format=LAST)
    factor = KEEP[torch.arange(shape[0]) % 4] if keep else None
    dy = torch.randn(y.shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # parameters, as under autocast
    state = {k: v.clone() for k, v in end.state_dict().items()}

    def fresh(kind: torch.dtype, device: str = "cpu") -> End:
        end.load_state_dict(state)
        end.zero_grad()
        return end.to(device, kind)

    v = fresh(torch.float64).plain(y.double(), x.double(), factor, relu=False).detach()
    clear = v.abs() > (0.05 if dtype.itemsize == 2 else 1e-4) * v.abs().max()
    dy = dy * clear  # nothing near the ReLU's kink: a flip there is nobody's error
    net = fresh(wide, route)
    moved = [t.to(route) for t in (y, x, dy)]
    with poison():
        kept = None if factor is None else factor.to(route)
        ours = step(net.ours, net, moved[0], moved[1], kept, moved[2], dtype)
    net = fresh(torch.float64)
    ref = step(net.plain, net, y, x, factor, dy, torch.float64)
    net = fresh(dtype)
    eager = step(net.plain, net, y, x, factor, dy, dtype)
    end.to(torch.float32).load_state_dict(state)
    assert ours.keys() == ref.keys()
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name], dtype, scale)
    for name, t in (("out", y), ("dy", y), ("dx", x)):
        assert_layout(ours[name].cpu(), t, name)


# ------------------------------------------------------------------------------------------------------- parity

OPTIONS: dict[str, dict[str, Any]] = {
    "train": dict(),
    "dense": dict(stride=1),
    "frozen": dict(frozen=True),
    "frozen-downsample": dict(frozen2=True),
    "frozen-both": dict(frozen=True, frozen2=True, stride=1),
    "no-affine": dict(affine=False),
    "no-affine-downsample": dict(affine2=False),
    "zero-gamma": dict(gamma=0.0),
    "negative-gamma": dict(gamma=-2.0),
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("keep", [False, True], ids=["whole", "keep"])
@pytest.mark.parametrize("options", OPTIONS)
@routes
def test_options(
    route: str, options: str, keep: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float64 and "reference" not in request.node.name:
        pytest.skip("float64 has no kernel")
    compare(route, End(12, 21, **OPTIONS[options]), (4, 5, 6), dtype, keep)


SHAPES = {  # (B, H, W), C, N, stride: every tile, remainders of each, several parts
    "narrow": ((2, 8, 8), 32, 64, 2),
    "wide": ((3, 7, 9), 80, 144, 1),
    "square-tiles": ((2, 16, 8), 64, 128, 2),
    "odd": ((3, 8, 7), 65, 130, 3),
    "one-channel": ((2, 3, 5), 1, 7, 3),
    "one-pixel": ((70, 1, 1), 16, 32, 1),
    "parts": ((3, 19, 7), 16, 32, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
@routes
def test_shapes(route: str, shape: str, dtype: torch.dtype) -> None:
    size, c, n, stride = SHAPES[shape]
    compare(route, End(c, n, stride), size, dtype, scale=1.0 if c == 1 else 0.0)


def test_every_tile_is_tried() -> None:
    for kernel in ("down", "plain_p"):
        seen = {
            plan.tile(kernel, torch.empty(0, dtype=dtype), *((n, c) if kernel == "down" else (c, n)))
            for _, c, n, _ in SHAPES.values()
            for dtype in (torch.float32, torch.bfloat16)
        }
        assert seen == {t for tiles in plan.GEMM[kernel].values() for t in tiles}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mean", [10.0, 100.0])
@routes
def test_far_means(route: str, mean: float, dtype: torch.dtype) -> None:
    compare(route, End(16, 48), (4, 6, 5), dtype, mean=mean)


@pytest.mark.parametrize("kind", ["constant", "dead", "one-hot", "copies"])
@routes
def test_inputs_of_less_than_full_rank(route: str, kind: str) -> None:
    x = torch.randn(4, 16, 8, 9).relu()
    if kind == "constant":
        x[:, ::3] = 0.75
    elif kind == "dead":
        x[:, 5:] = 0.0
    elif kind == "one-hot":
        x = torch.zeros_like(x).scatter_(1, torch.randint(0, 16, (4, 1, 8, 9)), 1.0)
    else:
        x[:, 8:] = x[:, :8]
    compare(route, End(16, 32), (4, 4, 5), torch.float32, x=x)


@pytest.mark.parametrize("gamma", [1e-4, 1e3])
@routes
def test_gamma(route: str, gamma: float) -> None:
    compare(route, End(16, 32, gamma=gamma), (4, 4, 5), torch.float32)


@pytest.mark.parametrize("options", ["train", "dense", "frozen", "frozen-downsample", "no-affine"])
def test_gradcheck(options: str) -> None:
    end = End(3, 5, **OPTIONS[options]).double()
    y, x = (t.requires_grad_() for t in inputs(end, (2, 3, 3), torch.float64))
    keep = torch.tensor([1.25, 0.5])
    run = lambda y, x, *_: end.ours(y, x, keep)  # noqa: E731
    assert torch.autograd.gradcheck(run, (y, x, *end.parameters()), eps=1e-6, atol=1e-6)
    for leaf in (y, x):
        with pytest.raises(NotImplementedError, match="second derivative"):
            (g,) = torch.autograd.grad(run(y, x).square().sum(), leaf, create_graph=True)
            g.sum().backward()


@routes
def test_same_bits_every_run(route: str) -> None:
    end = End(16, 32).to(route)
    y, x = (t.to(route) for t in inputs(end, (3, 9, 8), torch.float32))
    dy, keep = torch.randn(y.shape, device=route), KEEP[:3].to(route)
    state = {k: v.clone() for k, v in end.state_dict().items()}
    runs = []
    for _ in range(2):
        end.load_state_dict(state)
        end.zero_grad()
        runs.append(step(end.ours, end, y, x, keep, dy, torch.float32))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


# Of each leaf alone: the operators that its gradient needs, with batch statistics and with running ones.
_SUMS, _P, _DZ, _DY = "end_reduce", "p_sums", "pointwise_dz", "batch_norm_backward"
ASKED = {
    "y": ({_SUMS, _DY}, {"masked", _DY}),
    "bn.weight": ({_SUMS}, {_SUMS}),
    "x": ({_SUMS, _P, _DZ}, {"masked", _DZ}),
    "conv.weight": ({_SUMS, _P}, {"masked", _P}),
    "bn2.bias": ({_SUMS, _P}, {"masked", _P}),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "running"])
@pytest.mark.parametrize("wanted", ASKED)
@routes
def test_only_what_is_asked(route: str, wanted: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(8, 16, frozen=frozen, frozen2=frozen).requires_grad_(False).to(route)
    y, x = (t.to(route) for t in inputs(end, (4, 3, 3), torch.float32))
    leaf = {"y": y, "x": x}[wanted] if wanted in ("y", "x") else end.get_parameter(wanted)
    twin = copy.deepcopy(end).double().cpu()
    leaf.requires_grad_()
    called = set()

    def watch(module: Any, name: str) -> None:
        operator = getattr(module, name)

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *a: called.add(name) or call(*a)

        monkeypatch.setattr(module, name, Operator(watched(operator.op), watched(operator.launch), None))

    for module, name in (
        (family, _SUMS), (family, "masked"), (family, _DY), (products, _P), (products, _DZ),
    ):  # fmt: skip
        watch(module, name)
    dy = torch.randn(y.shape, device=route)
    (g,) = torch.autograd.grad(end.ours(y, x, None), leaf, dy)
    known = ASKED[wanted][frozen]
    # The branch's own sums are for its norm alone, with this process's statistics.
    assert called - {_SUMS, "masked"} == known - {_SUMS, "masked"}
    assert len(called & {_SUMS, "masked"}) == 1 and (_SUMS in called) == (wanted == "bn.weight" or (wanted == "y" and not frozen))  # fmt: skip # noqa: E501
    a, b = y.detach().double().cpu(), x.detach().double().cpu()
    leaf64 = {"y": a, "x": b}[wanted] if wanted in ("y", "x") else twin.get_parameter(wanted)
    leaf64.requires_grad_()
    (ref,) = torch.autograd.grad(twin.plain(a, b, None), leaf64, dy.double().cpu())
    assert_close64(wanted, g, g, ref)


def test_other_layouts_are_refused() -> None:
    """By the launcher, before anything is launched; the reference operators take any strides."""
    y, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 6, 6).contiguous(memory_format=LAST)
    v, w = torch.ones(4), torch.randn(4, 4)
    with pytest.raises(ValueError, match="downsample_end: y has stride .* wanted channels_last"):
        family._end(y, v, v, None, None, 1e-5, x, w, v, 2, None, True)
    with pytest.raises(ValueError, match="downsample_end: x has stride .* wanted channels_last"):
        family._end(
            y.contiguous(memory_format=LAST), v, v, None, None, 1e-5, x.contiguous(), w, v, 2, None, True
        )


# --------------------------------------------------------------------------------------------------------- the fork


@pytest.mark.parametrize("create_graph", [False, True])
def test_fork_adds_to_the_gradient_it_gets(create_graph: bool) -> None:
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=LAST).requires_grad_()
    whole, read = family.fork(x, 2)
    assert torch.equal(whole, x) and torch.equal(read, x[:, :, ::2, ::2])
    d = torch.randn(x.shape).contiguous(memory_format=LAST)
    e, before = torch.randn(read.shape), d.clone()
    (g,) = torch.autograd.grad((whole, read), x, (d, e), create_graph=create_graph)
    want = before.clone()
    want[:, :, ::2, ::2] += e
    assert torch.equal(g, want)
    assert torch.equal(d, before if create_graph else want)  # in place, but for a graph of gradients


def test_fork_with_one_gradient() -> None:
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    d, e = torch.randn(x.shape), torch.randn(2, 3, 3, 2)
    assert torch.equal(torch.autograd.grad(family.fork(x, 2)[0], x, d)[0], d)
    (g,) = torch.autograd.grad(family.fork(x, 2)[1], x, e)
    assert torch.equal(g[:, :, ::2, ::2], e) and float(g.abs().sum()) == pytest.approx(float(e.abs().sum()))


# ------------------------------------------------------------------------------------------------------- in a block


def pair(stride: int = 2, pooled: bool = False, **options: Any) -> tuple[fastres.ResidualBlock, nn.Module]:
    ours = randomize(
        fastres.ResLayer(fastres.BasicBlock, 1, 5, 7, stride=stride, avg_down=pooled, **options)
    )[0]
    return ours, like(Block(5, 7, stride=stride, avg_down=pooled), ours)


def reasons(block: nn.Module, x: Tensor, mode: str = "on", backend: str = "reference") -> str:
    with fn.backend(backend), fn.moments(mode), fn.record_routes() as log:
        block(x)
    return [c.reason for c in log if c.op == "add_relu"][-1]


def batch(n: int = 3, h: int = 7, w: int = 6, c: int = 5) -> Tensor:
    return torch.randn(n, c, h, w).contiguous(memory_format=LAST).requires_grad_()


BLOCKS = {
    "strided": dict(),
    "dense": dict(stride=1),
    "pooled": dict(pooled=True),
    "checkpointed": dict(with_cp=True),
}
FROZEN = {
    "train": (),
    "bn1": ("bn1",),
    "bn2": ("bn2",),
    "downsample": ("downsample",),
    "all": ("bn1", "bn2", "downsample"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", BLOCKS)
def test_block_parity(kind: str, frozen: str, dtype: torch.dtype) -> None:
    ours, plain = pair(**BLOCKS[kind])
    for m in (ours, plain):
        for name in FROZEN[frozen]:
            m.get_submodule(name).eval()
    assert reasons(copy.deepcopy(ours), batch()).endswith("; downsample in moment form")
    x, dy = steps((3, 5, 7, 6), copy.deepcopy(plain)(batch()).shape, 2)
    with fn.backend("reference"), fn.moments("on"):
        record = assert_parity(ours, plain, x, dy, dtype, LAST)
    counted = record["step 1 buffer bn1.num_batches_tracked"]
    assert int(counted) == (0 if frozen in ("bn1", "all") else 2)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "fixed", ["input", "conv1", "conv2", "bn2", "downsample", "downsample.0", "downsample.1", "conv1 conv2"]
)
def test_block_with_parts_that_want_no_gradient(fixed: str, kind: str) -> None:
    ours, plain = pair(**BLOCKS[kind])
    x, found = batch().requires_grad_(fixed != "input"), []
    dy = torch.randn(plain(x).shape)
    plain = like(plain, ours)
    for block, value in ((ours, x), (plain, x), (copy.deepcopy(plain).double(), x.double())):
        for name in () if fixed == "input" else fixed.split():
            block.get_submodule(name).requires_grad_(False)
        value = value.detach().requires_grad_(fixed != "input")
        with fn.backend("reference"), fn.moments("on"):
            block(value).backward(dy.to(value.dtype))
        found.append({"input": value.grad} | {n: p.grad for n, p in block.named_parameters()})
    ours_, eager, ref = found
    for name, value in ref.items():
        assert (ours_[name] is None) == (value is None), name
        if value is not None:
            assert_close64(name, ours_[name], eager[name], value, scale=float(dy.abs().max()))
            assert_layout(ours_[name], x if name == "input" else ours.get_parameter(name).detach(), name)


def test_block_with_drop_path() -> None:
    """Dropped samples of the branch, in ours as the pending form drops them."""
    ours, _ = pair(drop_path_rate=0.5)
    x, results = batch(n=6), []
    for mode in ("on", "off"):
        block, leaf = (
            copy.deepcopy(ours),
            x.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
        )
        torch.manual_seed(5)
        with fn.backend("reference"), fn.moments(mode):
            out = block(leaf)
        out.backward(torch.ones_like(out) * torch.arange(7.0).view(-1, 1, 1))
        results.append([out.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_block_under_autocast() -> None:
    """bfloat16 activations and float32 parameters, gradients in the parameters' dtype."""
    ours, plain = pair()
    x = batch().detach().bfloat16()
    dy = torch.randn(plain(x.float()).shape).bfloat16()
    plain, found = like(plain, ours), []
    for block, auto in ((ours, True), (plain, True), (copy.deepcopy(plain).double(), False)):
        value = (x if auto else x.double()).requires_grad_()
        with fn.backend("reference"), fn.moments("on"), torch.autocast("cpu", torch.bfloat16, enabled=auto):
            with fn.record_routes() as log:
                out = block(value)
        out.backward(dy.to(out.dtype))
        found.append(
            {"out": out.detach(), "dx": value.grad} | {n: p.grad for n, p in block.named_parameters()}
        )
        value = value.detach()
        if block is ours:
            assert [c.reason for c in log if c.op == "add_relu"][-1].endswith("; downsample in moment form")
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
        x = x.detach()
    for name, ref in found[2].items():
        assert_close64(name, found[0][name], found[1][name], ref, torch.bfloat16, scale=float(found[2]["dx"].abs().max()))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_compiles_without_a_break(stride: int, dynamic: bool) -> None:
    ours, _ = pair(stride)
    twin = copy.deepcopy(ours)
    call = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 4):
        x, y = batch(n), None
        y = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with fn.backend("reference"), fn.moments("on"):
            a, b = ours(x), call(y)
        dy = torch.randn(a.shape)
        a.backward(dy)
        b.backward(dy)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(ours.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_reasons() -> None:
    ours, _ = pair()
    x = batch()
    assert reasons(ours, x).endswith("; downsample in moment form")
    assert "does not pay" in reasons(ours, x, "off") and "does not pay" in reasons(ours, x, "auto")
    assert "cpu: ATen is the measured default" in reasons(ours, x, "on", "auto")
    assert "input is not channels_last" in reasons(ours, x.detach().contiguous().requires_grad_())
    assert "fewer than four rows a channel" in reasons(ours, batch(1))
    handle = ours.downsample[0].register_forward_hook(lambda *a: None)
    assert "not a plain 1x1" in reasons(ours, x)
    handle.remove()
    handle = ours.conv1.register_forward_pre_hook(lambda *a: None)
    assert "its input's gradient has other parts" in reasons(ours, x)
    with torch.no_grad():  # no gradient, no fork
        assert reasons(ours, x).endswith("; downsample in moment form")
    handle.remove()
    one = fastres.ResLayer(fastres.BasicBlock, 1, 5, 1, stride=2)[0]
    assert "one channel" in reasons(one, x)


def test_branch_of_another_shape_is_refused_as_ever() -> None:
    ours, _ = pair()
    ours.conv2 = nn.Conv2d(7, 7, 3, bias=False)
    before = {k: v.clone() for k, v in ours.bn2.state_dict().items()}
    with fn.backend("reference"), fn.moments("on"), pytest.raises(ValueError, match="add_relu: identity"):
        ours(batch())
    assert all(torch.equal(v, before[k]) for k, v in ours.bn2.state_dict().items())


def test_the_downsample_output_is_not_kept() -> None:
    kept: dict[str, dict[int, int]] = {}
    ours, _ = pair()
    for mode in ("on", "off"):
        storages: dict[int, int] = {}
        alive = []

        def pack(t: Tensor, storages: dict[int, int] = storages, alive: list[Tensor] = alive) -> Tensor:
            alive.append(t)
            if t.dim() == 4 and t.shape[1] == 7 and t.shape[2] > 1 and not isinstance(t, nn.Parameter):
                storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with fn.backend("reference"), fn.moments(mode):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                ours(batch())
        kept[mode] = storages
    assert len(kept["off"]) - len(kept["on"]) == 1  # y1, z1, y2 and without the moment form y'


@routes
def test_block_on_the_kernels(route: str, request: pytest.FixtureRequest) -> None:
    """Two strides, odd sizes and a frozen downsample, through fork and convolutions."""
    backend = "reference" if "reference" in request.node.name else "triton"
    for stride, frozen in ((2, False), (1, False), (2, True)):
        ours, plain = pair(stride)
        x = batch(2, 5, 6)
        dy, found = torch.randn(plain(x).shape), []
        plain = like(plain, ours)
        for block in (ours, plain, copy.deepcopy(plain).double()):
            block.downsample.train(not frozen)
            kind = next(block.parameters()).dtype
            device = route if block is ours else "cpu"
            block.to(device)
            value = x.detach().to(device, kind).requires_grad_()
            with fn.backend(backend), fn.moments("on"), poison():
                out = block(value)
                out.backward(dy.to(device, kind))
            found.append(
                {"out": out.detach(), "dx": value.grad} | {n: p.grad for n, p in block.named_parameters()}
            )
        for name, ref in found[2].items():
            assert_close64(name, found[0][name], found[1][name], ref, scale=float(found[2]["dx"].abs().max()))
