"""The moment form of a block end on every route: values, all gradients, running statistics, and where it applies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import functional as fn
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels import _tuned
from fastres.kernels import fused_conv_bn_relu as family
from tests.tolerance import assert_close64, assert_layout, poison

LAST = torch.channels_last
ROUTES = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", id="interpret", marks=pytest.mark.interpret),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
routes = pytest.mark.parametrize("route", ROUTES)


@contextmanager
def on(route: str) -> Iterator[torch.device]:
    """The device and the settings of a route."""
    with fn.backend("triton" if route == "cuda" else route), fn.moments("on"):
        yield torch.device("cuda" if route == "cuda" else "cpu")


def norm(
    channels: int, training: bool = True, affine: bool = True, gamma: float | None = None
) -> nn.BatchNorm2d:
    m = nn.BatchNorm2d(channels, affine=affine).train(training)
    with torch.no_grad():
        m.running_mean.normal_(std=0.3)
        m.running_var.uniform_(0.5, 1.5)
        if affine:
            m.weight.uniform_(-0.5, 1.5) if gamma is None else m.weight.fill_(gamma)
            m.bias.normal_(std=0.5)
    return m


def of(m: nn.BatchNorm2d) -> fn.BatchNorm:
    return fn.BatchNorm(
        m.weight, m.bias, m.running_mean, m.running_var, m.num_batches_tracked, m.momentum, m.eps, m.training
    )


class Given(nn.Module):
    """Stands for the 3x3 convolution: its output is the leaf ``y``."""

    def forward(self, y: Tensor) -> Tensor:
        return y


class End(nn.Module):
    """A block end: [pending norm and ReLU] -> 1x1 -> norm -> (+ identity | downsample) -> ReLU."""

    def __init__(
        self, c: int, n: int, c2: int = 0, stride: int = 1, act: bool = True, frozen: bool = False,
        frozen0: bool = False, affine: bool = True, gamma: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bn0 = norm(c, not frozen0, affine) if act else None
        self.conv, self.bn = nn.Conv2d(c, n, 1, bias=False), norm(n, not frozen, affine, gamma)
        self.conv2 = nn.Conv2d(c2, n, 1, stride, bias=False) if c2 else None
        self.bn2 = norm(n, not frozen, affine) if c2 else None

    def plain(self, y: Tensor, other: Tensor, keep: Tensor | None, relu: bool = True) -> Tensor:
        z = y if self.bn0 is None else self.bn0(y).relu()
        v = self.bn(self.conv(z))
        if keep is not None:
            v = v * keep.to(v).view(-1, 1, 1, 1)
        v = v + (other if self.conv2 is None else self.bn2(self.conv2(other)))
        return v.relu() if relu else v

    def forward(self, y: Tensor, other: Tensor, keep: Tensor | None) -> Tensor:
        z: Any = y if self.bn0 is None else fn.conv_bn_relu(y, Given(), of(self.bn0))
        identity: Any = other if self.conv2 is None else fn.conv_bn(other, self.conv2, of(self.bn2))
        return fn.add_relu(fn.conv_bn(z, self.conv, of(self.bn)), identity, keep)


def inputs(shape: tuple[int, ...], end: End, dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    b, _, h, w = shape
    y = torch.randn(shape, dtype=torch.float64) * 1.5 + mean
    if end.conv2 is None:
        other = torch.randn(b, end.conv.out_channels, h, w, dtype=torch.float64)
    else:
        s = end.conv2.stride[0]
        other = torch.randn(b, end.conv2.in_channels, h * s, (w - 1) * s + 1, dtype=torch.float64) + mean
    return y.to(dtype).contiguous(memory_format=LAST), other.to(dtype).contiguous(memory_format=LAST)


def off_the_kink(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a pre-activation is clear of 0 by more than rounding moves it: ReLU flips are nobody's error."""
    return v.detach().abs() > (0.05 if dtype.itemsize == 2 else 1e-4) * v.abs().max()


def step(
    end: End, how: str, y: Tensor, other: Tensor, keep: Tensor | None, dy: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:  # fmt: skip
    """One forward and backward; every tensor that comes out of it."""
    y, other = (t.detach().to(dtype).requires_grad_() for t in (y, other))
    out = end(y, other, keep) if how == "ours" else end.plain(y, other, keep)
    out.backward(dy.to(dtype))
    found = {"out": out.detach(), "dy": y.grad, "dother": other.grad}
    found |= {f"d{k}": p.grad for k, p in end.named_parameters()}
    return found | {k: b.clone() for k, b in end.named_buffers() if b.is_floating_point()}


def compare(route: str, end: End, shape: tuple[int, ...], dtype: torch.dtype, keep: bool = False, mean: float = 0.0,
            data: tuple[Tensor, Tensor] | None = None, scale: float = 0.0) -> None:  # fmt: skip
    y, other = data or inputs(shape, end, dtype, mean)
    factor = torch.tensor([1.25, 0.0, 1.0, 1.25])[torch.arange(shape[0]) % 4] if keep else None
    dy = torch.randn(shape[0], end.conv.out_channels, *shape[2:]).to(dtype)
    wide64 = copy.deepcopy(end).double()
    if end.bn0 is not None:  # the inner ReLU: move its inputs away from the kink
        v = wide64.bn0(y.double()).detach()
        slope = 1.0 if end.bn0.weight is None else wide64.bn0.weight.detach().view(1, -1, 1, 1)
        step_ = (
            torch.where(off_the_kink(v, dtype), 0.0, torch.where(v < 0, -0.2, 0.2) * v.abs().max()) / slope
        )
        y = (y.double() + step_.clamp(-3, 3)).to(dtype).contiguous(memory_format=LAST)
    v = wide64.plain(y.double(), other.double(), None if factor is None else factor.double(), relu=False)
    dy = dy * off_the_kink(v, dtype)  # the outer one: no gradient near it
    state = {k: v.clone() for k, v in end.state_dict().items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # parameters, as under autocast

    def fresh(kind: torch.dtype, device: torch.device) -> End:
        end.load_state_dict(state)
        end.zero_grad()
        return end.to(device, kind)

    with on(route) as device, poison(), fn.record_routes() as log:
        assert wide == dtype or dtype != torch.float64
        net = fresh(wide, device)
        moved = [t.to(device) for t in (y, other, dy)]
        with torch.autocast(device.type, dtype, enabled=dtype != wide):
            ours = step(
                net, "ours", moved[0], moved[1], None if keep is False else factor.to(device), moved[2], dtype
            )
    assert [c.reason.endswith("; moment form") for c in log if c.op == "add_relu"] == [True], log
    cpu = torch.device("cpu")
    ref = step(fresh(torch.float64, cpu), "plain", y, other, factor, dy, torch.float64)
    eager = step(fresh(dtype, cpu), "plain", y, other, factor, dy, dtype)
    end.to(torch.float32).load_state_dict(state)
    assert ours.keys() == ref.keys()
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name], dtype, scale)
    assert_layout(ours["out"].cpu(), torch.empty_like(ref["out"], dtype=dtype, memory_format=LAST))
    assert_layout(ours["dy"].cpu(), y)
    assert_layout(ours["dother"].cpu(), other)


OPTIONS = {
    "identity": dict(),
    "plain": dict(act=False),
    "pair": dict(c2=20),
    "pair-strided": dict(c2=24, stride=2),
    "pair-plain": dict(c2=24, stride=2, act=False),
    "frozen": dict(frozen=True),
    "frozen-all": dict(frozen=True, frozen0=True, c2=16, stride=2),
    "frozen-before": dict(frozen0=True),
    "no-affine": dict(affine=False, c2=16),
    "zero-gamma": dict(gamma=0.0),
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("keep", [False, True], ids=["whole", "keep"])
@pytest.mark.parametrize("options", OPTIONS)
@routes
def test_options(route: str, options: str, keep: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and route != "reference":
        pytest.skip("float64 has no kernel")
    compare(route, End(12, 40, **OPTIONS[options]), (4, 12, 5, 6), dtype, keep)


SHAPES = {  # (B, C, H, W), N, C2: every tile, remainders of each, several parts
    "aligned-narrow": ((2, 32, 8, 8), 64, 16),
    "aligned-wide": ((4, 80, 9, 9), 144, 48),
    "square-tiles": ((2, 128, 16, 16), 128, 64),
    "odd": ((5, 65, 8, 7), 130, 70),
    "one-channel": ((2, 1, 3, 5), 7, 3),
    "one-pixel": ((70, 16, 1, 1), 32, 16),
    "parts": ((3, 16, 19, 21), 32, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("pair", [False, True], ids=["identity", "pair"])
@pytest.mark.parametrize("shape", SHAPES)
@routes
def test_shapes(route: str, shape: str, pair: bool, dtype: torch.dtype) -> None:
    size, n, c2 = SHAPES[shape]
    compare(route, End(size[1], n, c2 if pair else 0), size, dtype, scale=1.0 if size[1] == 1 else 0.0)


BY_TABLE = {"end": plan.GEMM["end"][True][3:]}  # what no rule chooses


@pytest.mark.parametrize("pair", [False, True], ids=["identity", "pair"])
@routes
def test_configurations_that_only_a_table_chooses(
    route: str, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def product(kernel: str, x: Tensor, columns: int, other: int, odd: bool, default: Any) -> Any:
        if not odd and kernel in BY_TABLE:
            asked.append(kernel)
        return BY_TABLE[kernel][0] if not odd and kernel in BY_TABLE else default

    assert all(len(ts) == 1 for ts in BY_TABLE.values())
    monkeypatch.setattr(_tuned, "chosen", lambda: True)
    monkeypatch.setattr(_tuned, "product", product)
    compare(route, End(16, 80, 16 if pair else 0), (3, 16, 7, 9), torch.bfloat16)
    assert route == "reference" or set(asked) == set(BY_TABLE)


def test_every_tile_is_tried() -> None:
    seen = set()
    for (_, c, _, _), n, c2 in SHAPES.values():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(0, dtype=dtype)
            for second in (0, c2):
                seen |= {("gram", plan.tile("gram", x, d, d)) for d in (c, second) if d}
                seen |= {
                    (k, plan.tile(k, x, *sizes))
                    for k, sizes in (("end", (n, c)), ("p", (c, n, second)), ("dz", (c, n, second)))
                }
    mine = ("gram", "end", "p", "dz")
    seen |= {(k, t) for k in mine for t in BY_TABLE.get(k, ())}
    assert seen == {(k, t) for k in mine for ts in plan.GEMM[k].values() for t in ts}


@routes
def test_parts_are_merged(route: str) -> None:
    assert plan.split(3 * 19 * 21, 64, 1)[0] > 1
    assert plan.split(3 * 19 * 21, 32, 1)[0] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mean", [10.0, 100.0])
@routes
def test_far_means(route: str, mean: float, dtype: torch.dtype) -> None:
    """z with mean / std up to 70: the moments are taken about an anchor."""
    compare(route, End(16, 48, c2=16, act=False), (4, 16, 6, 5), dtype, mean=mean)


def degenerate(kind: str) -> Tensor:
    z = torch.randn(4, 16, 4, 5).relu()
    if kind == "constant":
        z[:, ::3] = 0.75
    elif kind == "dead":
        z[:, 5:] = 0.0
    elif kind == "one-hot":
        z = torch.zeros_like(z).scatter_(1, torch.randint(0, 16, (4, 1, 4, 5)), 1.0)
    elif kind == "copies":
        z[:, 8:] = z[:, :8]
    return z.contiguous(memory_format=LAST)


@pytest.mark.parametrize("kind", ["constant", "dead", "one-hot", "copies"])
@routes
def test_degenerate_inputs(route: str, kind: str) -> None:
    end, z = End(16, 32, act=False), degenerate(kind)
    compare(
        route,
        end,
        (4, 16, 4, 5),
        torch.float32,
        data=(z, torch.randn(4, 32, 4, 5).contiguous(memory_format=LAST)),
    )


@pytest.mark.parametrize("gamma", [1e-4, 1e3, -2.0])
@routes
def test_gamma(route: str, gamma: float) -> None:
    compare(route, End(16, 32, gamma=gamma), (4, 16, 4, 5), torch.float32)


@pytest.mark.parametrize(
    "options", ["identity", "pair-strided", "plain", "frozen-all", "frozen-before", "no-affine"]
)
def test_gradcheck(options: str) -> None:
    end = End(3, 5, **OPTIONS[options] | ({"c2": 4} if "c2" in OPTIONS[options] else {})).double()
    y, other = inputs((2, 3, 3, 3), end, torch.float64)
    parameters = [p for p in end.parameters() if p.requires_grad]
    keep = torch.tensor([1.25, 0.5])

    def run(y: Tensor, other: Tensor, *_: Tensor) -> Tensor:
        return end(y, other, keep)

    with on("reference"):
        y, other = y.requires_grad_(), other.requires_grad_()
        assert torch.autograd.gradcheck(run, (y, other, *parameters), eps=1e-6, atol=1e-6)
        with pytest.raises(NotImplementedError, match="second derivative"):
            (g,) = torch.autograd.grad(run(y, other).sum(), y, create_graph=True)
            g.sum().backward()


@routes
def test_repeats_bitwise(route: str) -> None:
    end = End(16, 32, c2=16, stride=2)
    with on(route) as device:
        end.to(device)
        y, other = (t.to(device) for t in inputs((3, 16, 9, 8), end, torch.float32))
        dy = torch.randn(3, 32, 9, 8, device=device)
        state = {k: v.clone() for k, v in end.state_dict().items()}
        runs = []
        for _ in range(2):
            end.load_state_dict(state)
            end.zero_grad()
            runs.append(step(end, "ours", y, other, None, dy, torch.float32))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("wanted", ["y", "weight", "other", "gamma0"])
@routes
def test_only_what_is_asked(route: str, wanted: str) -> None:
    end = End(8, 16).requires_grad_(False)
    with on(route) as device:
        end.to(device)
        y, other = (t.to(device) for t in inputs((4, 8, 3, 3), end, torch.float32))
        leaf = {"y": y, "other": other, "weight": end.conv.weight, "gamma0": end.bn0.weight}[
            wanted
        ].requires_grad_()
        dy = torch.randn(4, 16, 3, 3, device=device)
        (g,) = torch.autograd.grad(end(y, other, None), leaf, dy)
    leaf64 = leaf.detach().double().cpu().requires_grad_()
    end.double().cpu()
    for m in (end.bn0, end.bn):
        m.reset_running_stats()
    if wanted in ("weight", "gamma0"):
        (end.conv if wanted == "weight" else end.bn0).weight = nn.Parameter(leaf64)
        leaf64 = (end.conv if wanted == "weight" else end.bn0).weight
    a, b = (leaf64 if wanted == k else t.detach().double().cpu() for k, t in (("y", y), ("other", other)))
    (ref,) = torch.autograd.grad(end.plain(a, b, None), leaf64, dy.double().cpu())
    assert_close64(wanted, g, g, ref)


@routes
def test_the_anchor_does_not_matter(route: str) -> None:
    """Every gradient is about the mean of z, whatever s the sums were taken about."""
    with on(route) as device, poison():
        x = torch.randn(3, 8, 5, 4, device=device).contiguous(memory_format=LAST)
        dout = torch.randn(3, 16, 5, 4, device=device).contiguous(memory_format=LAST)
        weight, front = torch.randn(16, 8, 1, 1, device=device), plan.Prologue()
        mu, cov, _ = family.moments(x, *front, 1)
        _, _, mean, var, wcov = family.fold(
            weight, x, mu, cov, None, None, 1e-5, None, None, None, None, 0.0, 60
        )
        found = []
        for anchor in (mu, torch.zeros_like(mu), torch.randn_like(mu)):
            sums, _ = family.p_sums(dout, None, x, *front, anchor, None, None, 1, None)
            rest = (wcov, anchor, mu, mean, var, None, 1e-5, True)
            found.append(family.weight_gradient(sums, weight, *rest))
    for values in found[1:]:
        for name, value, first in zip(("dW", "dgamma", "dvar", "a dbeta"), values, found[0], strict=True):
            assert_close64(name, value, first, first.double(), scale=60.0)


# ------------------------------------------------------------------------------------------- where it applies


def why(end: End, y: Tensor, other: Tensor, mode: str = "on") -> str:
    with fn.backend("reference"), fn.moments(mode), fn.record_routes() as log:
        end(y, other, None)
    return [c.reason for c in log if c.op == "add_relu"][-1]


def test_reasons() -> None:
    end = End(8, 32)
    y, other = inputs((2, 8, 4, 4), end, torch.float32)
    assert why(end, y, other).endswith("; moment form")
    assert "does not pay" in why(end, y, other, "off")
    assert "input is not channels_last" in why(end, y.contiguous(), other.contiguous())
    handle = end.conv.register_forward_hook(lambda *a: None)
    assert "not a plain 1x1" in why(end, y, other)
    handle.remove()
    few = inputs((1, 8, 5, 6), end, torch.float32)
    assert "four rows a channel" in why(end, *few)
    end.conv = nn.Conv2d(8, 32, 1, bias=True)
    assert "not a plain 1x1" in why(end, y, other)


def test_model_of_what_pays() -> None:
    with fn.moments("auto"):
        assert fn.moments_pay(256 * 56 * 56, 256, 64)
        assert fn.moments_pay(256 * 7 * 7, 2048, 512)
        assert not fn.moments_pay(256 * 7 * 7, 64, 2048)


def test_unknown_mode() -> None:
    with (
        pytest.raises(ValueError, match="moments is 'maybe'; wanted one of auto, on, off"),
        fn.moments("maybe"),
    ):
        pass


@pytest.mark.parametrize("wrong", ["identity", "downsample", "keep", "single"])
def test_bad_input_changes_nothing(wrong: str) -> None:
    end = End(8, 32, c2=16 if wrong == "downsample" else 0)
    y, other = inputs((3, 8, 4, 4), end, torch.float32)
    keep = torch.ones(2) if wrong == "keep" else None
    if wrong in ("identity", "downsample"):
        other = other[:, :, :3].contiguous(memory_format=LAST)
    if wrong == "single":
        y, other = y[:1, :, :1, :1], other[:1, :, :1, :1]
    before = {k: v.clone() for k, v in end.bn.state_dict().items()}
    with on("reference"), pytest.raises(ValueError, match="add_relu|batch_norm") as error:
        end(y, other, keep)
    assert "wanted" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in end.bn.state_dict().items())
