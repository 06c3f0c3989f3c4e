"""The functions that blocks are written in: routes and their record, pending norms, checkpointing, autocast."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastres import functional as fn
from fastres.functional import BatchNorm, Pending
from fastres.kernels._triton import INTERPRET
from tests import test_batch_norm, test_pool, test_residual_add_relu
from tests.cases import HALF, LAST, LAYOUTS, NCHW, Route, activation, compare, copy_norm, make_norm, pending
from tests.tolerance import assert_close64

layouts = pytest.mark.parametrize("layout", LAYOUTS)
ATEN = Route("aten", "cpu")
# Interpreted here stands for every fused route; the CPU operators are plain torch in the other processes.
FUSED = pytest.param(
    "triton" if INTERPRET else "reference", marks=[pytest.mark.interpret] if INTERPRET else [], id="fused"
)
backends = pytest.mark.parametrize("backend", ["aten", FUSED])


def channels(n: int = 3, **norm: Any) -> BatchNorm:
    return copy_norm(make_norm(n, **norm))


# ------------------------------------------------------------------------------------------------------- routes


def test_the_backend_is_asked_for_by_name() -> None:
    before = fn.get_backend()
    with fn.backend("aten"):
        assert fn.get_backend() == "aten"
        with fn.backend("reference"):
            assert fn.get_backend() == "reference"
        assert fn.get_backend() == "aten"
    assert fn.get_backend() == before
    with pytest.raises(RuntimeError, match="inside"), fn.backend("aten"):
        raise RuntimeError("inside")
    assert fn.get_backend() == before
    with pytest.raises(ValueError, match="'cudnn'.*auto, triton, aten, reference"), fn.backend("cudnn"):
        pass
    assert fn.get_backend() == before


@pytest.mark.parametrize(("value", "says"), [("Reference", "reference"), ("", "auto"), ("fast", "'fast'")])
def test_the_environment_names_a_backend(value: str, says: str) -> None:
    code = "from fastres.functional import get_backend; print(get_backend())"
    env = dict(os.environ, FASTRES_BACKEND=value)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert says in (done.stderr if value == "fast" else done.stdout)
    assert "FASTRES_BACKEND" in done.stderr or done.returncode == 0


def test_auto_takes_aten_on_the_cpu_and_says_why() -> None:
    y, x, bn, bn2 = activation((2, 3, 4, 4), layout=LAST), activation((2, 3, 4, 4)), channels(), channels()
    with fn.backend("auto"), fn.record_routes() as outer:
        fn.batch_norm(y, bn)
        with fn.record_routes() as inner:
            fn.add_relu(pending(x, bn2), x)
        fn.add_relu(y[..., 1:], y[..., 1:])
        fn.max_pool(pending(y, bn2, relu=True))
    fn.batch_norm(y, bn)
    assert [c.op for c in outer] == ["batch_norm", "add_relu", "max_pool"]
    assert [c.op for c in inner] == ["add_relu"]
    first = outer[0]
    assert (first.shape, first.dtype, first.layout, first.route) == (
        (2, 3, 4, 4), torch.float32, "channels_last", "aten"
    )  # fmt: skip
    assert "cpu" in first.reason and first.key == id(bn.weight)
    assert inner[0].layout == "NCHW" and inner[0].key == id(bn2.weight)
    assert outer[1].layout == "strided" and outer[1].key == 0


def test_the_key_of_a_norm_without_weight_is_its_running_mean() -> None:
    bn = channels(affine=False)
    with fn.record_routes() as log:
        fn.batch_norm(activation((2, 3, 4, 4)), bn)
        fn.batch_norm(activation((2, 3, 4, 4)), channels(affine=False, track=False))
    assert [c.key for c in log] == [id(bn.running_mean), 0]


def test_an_assumed_gpu_changes_the_choice() -> None:
    """What a CUDA device would be given, asked where there is none: fake tensors have shapes and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def routes(capability: tuple[int, int], make: Callable[[Tensor], Tensor]) -> tuple[str, str]:
        with fn.backend("auto"), fn.assume_gpu(capability), fn.record_routes() as log, FakeTensorMode():
            fn.add_relu(make(torch.empty(2, 3, 4, 4)), torch.empty(2, 3, 4, 4))
        return log[0].route, log[0].reason

    assert routes((9, 0), lambda t: t)[0] == "triton"
    assert routes((7, 5), lambda t: t) == ("aten", "compute capability (7, 5) is below (8, 0)")
    assert routes((9, 0), lambda t: t[:, :, :, ::1].transpose(2, 3))[0] == "aten"
    assert "dtype" in routes((9, 0), lambda t: t.half())[1]
    assert "layout" in routes((9, 0), lambda t: t.contiguous(memory_format=LAST))[1]
    assert "float64" in routes((9, 0), lambda t: t.double())[1]


# ------------------------------------------------------------------------------- the aten route gives eager's values

PROBLEMS = {
    "bn": lambda layout, dtype: test_batch_norm.problem(
        activation((3, 5, 6, 5), dtype, layout), relu=False, momentum=None
    ),
    "bn-relu": lambda layout, dtype: test_batch_norm.problem(activation((3, 5, 6, 5), dtype, layout)),
    "bn-frozen": lambda layout, dtype: test_batch_norm.problem(
        activation((3, 5, 6, 5), dtype, layout), training=False
    ),
    "pool": lambda layout, dtype: test_pool.problem(activation((3, 5, 6, 5), dtype, layout, grid=0.5)),
} | {
    f"{kind}{'-keep' if keep else ''}": lambda layout, dtype, kind=kind, keep=keep: (
        test_residual_add_relu.problem(
            kind,
            (3, 5, 6, 5),
            dtype,
            layout,
            keep=test_residual_add_relu.keep_of(3) if keep else None,
        )
    )
    for kind in test_residual_add_relu.KINDS
    for keep in (False, True)
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@layouts
def test_aten(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Values, gradients and running statistics; and no input is modified in place, whatever part it plays."""
    compare(ATEN, PROBLEMS[name](layout, dtype))


@pytest.mark.parametrize("kind", ["identity", "pair"])
def test_aten_takes_operands_of_different_layout_and_dtype(kind: str) -> None:
    p = test_residual_add_relu.problem(kind, (3, 5, 6, 5))
    other = p.acts["x"].contiguous(memory_format=LAST)
    bn = copy_norm(p.norms["bn"])
    identity = pending(other, copy_norm(p.norms["bn2"])) if kind == "pair" else other
    with fn.backend("auto"):
        out = fn.add_relu(pending(p.acts["y"], bn), identity)
        want = p.plain(p.acts, {k: copy_norm(b) for k, b in p.norms.items()}, out.dtype)[0]
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        half = fn.add_relu(p.acts["y"].bfloat16(), p.acts["x"])
    assert half.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ pending


class Counting(nn.Conv2d):
    """A convolution that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


CONSUMERS: dict[str, Callable[[Pending, Tensor], Tensor]] = {
    "tensor": lambda p, x: p.tensor(),
    "branch": lambda p, x: fn.add_relu(p, x),
    "identity": lambda p, x: fn.add_relu(x, p),
    "pool": lambda p, x: fn.max_pool(p),
}


@pytest.mark.parametrize("second", CONSUMERS)
@pytest.mark.parametrize("first", CONSUMERS)
@backends
def test_two_consumers(backend: str, first: str, second: str) -> None:
    """The convolution runs once, the running statistics move once, and both consumers see the same values."""
    conv, bn, x = Counting(3, 4, 1), channels(4), activation((2, 3, 6, 5))
    other, fresh = activation((2, 4, 6, 5)), copy_norm(bn)
    relu = "pool" in (first, second) and not {first, second} & {"branch", "identity"}
    with fn.backend(backend):
        p = fn.conv_bn(x, conv, bn, relu)
        results = [CONSUMERS[c](p, other) for c in (first, second)]
        assert conv.calls == 1
        assert int(bn.num_batches_tracked) == int(fresh.num_batches_tracked) + 1
        want = [CONSUMERS[c](fn.conv_bn(x, conv, copy_norm(fresh), relu), other) for c in (first, second)]
        once = copy_norm(fresh)
        fn.materialize(fn.conv_bn(x, conv, once, relu))
    for got, w in zip(results, want, strict=True):
        torch.testing.assert_close(got, w)
    torch.testing.assert_close(bn.running_mean, once.running_mean)
    torch.testing.assert_close(bn.running_var, once.running_var)


def test_nothing_is_computed_before_a_consumer_asks() -> None:
    conv, bn = Counting(3, 4, 1), channels(4)
    p = fn.conv_bn_relu(activation((2, 3, 6, 5)), conv, bn)
    q = fn.conv_bn(p, Counting(4, 4, 1), channels(4))
    assert p.relu and not q.relu and q.x is p
    assert conv.calls == 0 and int(bn.num_batches_tracked) == 3
    z = fn.materialize(q)
    assert conv.calls == 1 and fn.materialize(q) is z and fn.materialize(z) is z


@backends
def test_a_chain_of_blocks_is_the_eager_one(backend: str) -> None:
    x = activation((2, 3, 6, 5))
    convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    norms, plain = [channels() for _ in range(3)], []
    with fn.backend(backend):
        z = fn.conv_bn_relu(fn.conv_bn_relu(x, convs[0], norms[0]), convs[1], norms[1])
        out = fn.add_relu(fn.conv_bn(z, convs[2], norms[2]), x)
    want = x
    for conv, bn in zip(convs, norms, strict=True):
        module = nn.BatchNorm2d(3)
        module.load_state_dict(dict(weight=bn.weight, bias=bn.bias), strict=False)
        plain.append(module)
        want = module(conv(want if conv is convs[0] else want.relu()))
    torch.testing.assert_close(out, (want + x).relu(), rtol=1e-4, atol=1e-5)


@backends
def test_a_downsample_of_what_is_pending_is_of_its_activation(backend: str) -> None:
    x = activation((4, 8, 4, 6)).contiguous(memory_format=torch.channels_last).requires_grad_()
    convs = [nn.Conv2d(8, n, 1, bias=False) for n in (8, 8, 24, 24)]
    norms = [channels(c.out_channels) for c in convs]
    first, second, last, down = zip(convs, norms, strict=True)
    with fn.backend(backend), fn.moments("on"):
        p = fn.conv_bn_relu(x, *first)
        out = fn.add_relu(fn.conv_bn(fn.conv_bn_relu(x, *second), *last), fn.conv_bn(p, *down))

    def plain(z: torch.Tensor, conv: nn.Conv2d, bn: BatchNorm) -> torch.Tensor:
        return F.batch_norm(conv(z), None, None, bn.weight, bn.bias, True, 0.0, bn.eps)

    z = plain(x, *first).relu()
    want = (plain(plain(x, *second).relu(), *last) + plain(z, *down)).relu()
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(out)
    for a, b in zip(
        *(torch.autograd.grad(t, [x, *(c.weight for c in convs)], dy) for t in (out, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------- checkpointing, autocast


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = [channels(), channels(), channels(momentum=None)]

    def forward(self, x: Tensor) -> Tensor:
        z = fn.conv_bn_relu(x, self.conv, self.norms[0])
        x = fn.add_relu(fn.conv_bn(z, self.conv, self.norms[1]), x)
        return fn.max_pool(fn.conv_bn_relu(x, self.conv, self.norms[2]))


@pytest.mark.parametrize("reentrant", [True, False])
@backends
def test_checkpointing_updates_the_statistics_once(backend: str, reentrant: bool) -> None:
    """As without checkpointing: output, gradients and running statistics, over two steps."""
    plain, saving = Block(), Block()
    saving.load_state_dict(plain.state_dict())
    saving.norms = [copy_norm(bn) for bn in plain.norms]
    for step in range(2):
        x, dout = activation((2, 3, 6, 5)), torch.randn(2, 3, 3, 3)
        results = []
        for block, call in (
            (plain, plain),
            (saving, lambda t: checkpoint(saving, t, use_reentrant=reentrant)),
        ):
            leaf = x.clone().requires_grad_()
            params = [*block.parameters(), *(p for bn in block.norms for p in (bn.weight, bn.bias))]
            for p in params:
                p.grad = None
            with fn.backend(backend):
                out = call(leaf)
                out.backward(dout)
            results.append([out.detach(), leaf.grad, *(p.grad for p in params)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(plain.norms, saving.norms, strict=True):
            assert int(b.num_batches_tracked) == int(a.num_batches_tracked) == 4 + step
            assert torch.equal(a.running_mean, b.running_mean)
            assert torch.equal(a.running_var, b.running_var)


@backends
@layouts
def test_autocast(backend: str, layout: torch.memory_format) -> None:
    """bf16 activations, fp32 parameters and statistics; as near to float64 as eager under autocast is."""
    conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=layout)
    bn, x = channels(5), activation((2, 3, 6, 5), layout=layout)
    dout = activation((2, 5, 6, 5), torch.bfloat16, layout)
    eager = nn.BatchNorm2d(5)
    eager.load_state_dict(dict(weight=bn.weight, bias=bn.bias), strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x).detach()
        with fn.backend(backend):
            z = fn.add_relu(fn.conv_bn(x, conv, bn), y)
        want = (eager(y) + y).relu()
    assert z.dtype == y.dtype == torch.bfloat16
    wide = nn.BatchNorm2d(5).double()
    wide.load_state_dict(dict(weight=bn.weight, bias=bn.bias), strict=False)
    ref = (wide(y.double()) + y.double()).relu()
    assert_close64("out", z, want, ref)
    grads = []
    for out, params in (
        (z, (bn.weight, bn.bias)),
        (want, (eager.weight, eager.bias)),
        (ref, (wide.weight, wide.bias)),
    ):
        grads.append(torch.autograd.grad(out, params, dout.to(out.dtype)))
    for name, ours, theirs, exact in zip(("dweight", "dbias"), *grads, strict=True):
        assert ours.dtype == torch.float32
        assert_close64(
            name, ours, theirs, exact, dtype=torch.bfloat16, scale=float(dout.float().norm()) / 5**0.5
        )


# ------------------------------------------------------------------------------------------------- empty batches


@pytest.mark.parametrize("name", ["bn", "bn-relu", "pool", "identity", "pair"])
@backends
def test_an_empty_batch_is_counted_and_nothing_else(backend: str, name: str) -> None:
    """torch.nn.BatchNorm2d counts it and leaves the averages; so do we."""
    p = PROBLEMS[name](NCHW, torch.float32)
    acts = {k: v[:0] for k, v in p.acts.items()}
    norms = {k: copy_norm(b) for k, b in p.norms.items()}
    eager = nn.BatchNorm2d(5)
    eager(acts["y"])
    assert int(eager.num_batches_tracked) == 1 and torch.equal(eager.running_var, torch.ones(5))
    with fn.backend(backend):
        assert p.ours(acts, norms).shape[0] == 0
    for k, bn in norms.items():
        assert int(bn.num_batches_tracked) == 4
        assert torch.equal(bn.running_mean, p.norms[k].running_mean)
        assert torch.equal(bn.running_var, p.norms[k].running_var)
