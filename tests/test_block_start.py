"""The start of a block: convolution, statistics, norm and ReLU; and in backward all gradients of the input at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import _block_end
from fastres import functional as fn
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels.block_start import block_start, start_conv
from fastres.reference import pack_rows
from tests.cases import graph, node_names
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
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
SHAPES = {  # (B, Cin, H, W), Cout: every tile, remainders, one line, one pixel
    "wide": ((2, 144, 9, 7), 80),
    "narrow": ((2, 64, 5, 4), 16),
    "odd": ((3, 65, 7, 5), 21),
    "line": ((2, 32, 1, 6), 16),
    "pixel": ((5, 32, 1, 1), 16),
    "one-channel": ((2, 1, 4, 4), 1),
}


class Start(nn.Module):
    """Convolution, norm and ReLU, and the identity, of an input that is itself a ReLU's output."""

    def __init__(
        self, cin: int, cout: int, stride: int = 1, affine: bool = True, frozen: bool = False
    ) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout, affine=affine)
        self.stride = stride
        self.bn.train(not frozen)
        with torch.no_grad():
            self.bn.running_mean.normal_(std=0.3)
            self.bn.running_var.uniform_(0.5, 1.5)
            if affine:
                self.bn.weight.uniform_(-0.5, 1.5)
                self.bn.bias.normal_(std=0.5)

    def plain(self, x: Tensor, relu: bool = True) -> tuple[Tensor, Tensor]:
        v = self.bn(F.conv2d(x, self.conv.weight.to(x.dtype)))
        return (v.relu() if relu else v), x[:, :, :: self.stride, :: self.stride]

    def ours(self, x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
        bn = self.bn
        running = (bn.running_mean, bn.running_var) if bn.training else (None, None)
        low = self.conv.weight.detach().to(x.dtype)
        y, mean, var = start_conv(x.detach(), low, bn.training, *running, 0.1)
        if not bn.training:
            mean, var = bn.running_mean, bn.running_var
        return block_start(
            x, self.conv.weight, low, bn.weight, bn.bias, y, mean, var, bits=bits, eps=bn.eps, batch=bn.training,
            stride=self.stride,
        )  # fmt: skip


def measure(
    m: Start, u: Tensor, dz: Tensor, did: Tensor, dtype: torch.dtype, ours: bool, masked: bool
) -> dict[str, Tensor]:  # fmt: skip
    """All that comes out of one step from the pre-activation u, of which x = relu(u) (or u itself)."""
    u = u.detach().to(dtype).requires_grad_()
    x = u.relu() if masked and not ours else u
    if ours and masked:
        x = u.detach().relu().requires_grad_()
        rows = (x > 0).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        z, identity = m.ours(x, pack_rows(rows))
        leaf = x
    else:
        z, identity = m.ours(x, None) if ours else m.plain(x)
        leaf = u
    torch.autograd.backward((z, identity), (dz.to(dtype), did.to(dtype)))
    found = {"z": z.detach(), "identity": identity.detach(), "dx": leaf.grad}
    found |= {f"d{k}": p.grad for k, p in m.named_parameters()}
    return found | {k: b.clone() for k, b in m.named_buffers() if b.is_floating_point()}


def compare(
    route: str, size: tuple[int, ...], c: int, stride: int, dtype: torch.dtype, masked: bool = True, **options: bool
) -> None:  # fmt: skip
    m = Start(size[1], c, stride, **options)
    u = torch.randn(size, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    dz, did = torch.randn(size[0], c, *size[2:]), torch.randn(u[:, :, ::stride, ::stride].shape)
    state = {k: v.clone() for k, v in m.state_dict().items()}

    def fresh(kind: torch.dtype, device: str = "cpu") -> Start:
        m.load_state_dict(state)
        m.zero_grad()
        return m.to(device, kind)

    x = u.relu() if masked else u
    # The weight is rounded to the input's dtype by whoever multiplies with it.
    state["conv.weight"] = state["conv.weight"].to(dtype).to(torch.float32)
    v = fresh(torch.float64).plain(x.double(), relu=False)[0].detach()
    dz = (dz * (v.abs() > (0.05 if dtype.itemsize == 2 else 1e-4) * v.abs().max())).to(
        dtype
    )  # off the ReLU's kink
    did = did.to(dtype)
    with poison():
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        ours = measure(fresh(kind, route), u.to(route), dz.to(route), did.to(route), dtype, True, masked)
    ref = measure(fresh(torch.float64), u, dz, did, torch.float64, False, masked)
    eager = measure(fresh(dtype), u, dz, did, dtype, False, masked)
    assert ours.keys() == ref.keys()
    for name, value in ours.items():
        assert_close64(name, value, eager[name], ref[name], dtype, scale=float(ref["dx"].abs().max()))
    assert_layout(ours["dx"].cpu(), u)
    assert_layout(ours["z"].cpu(), torch.empty_like(ref["z"], dtype=dtype, memory_format=LAST))


@dtypes
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@routes
def test_parity(
    route: str, shape: str, stride: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    if dtype == torch.float64 and "reference" not in request.node.name:
        pytest.skip("float64 has no kernel")
    compare(route, *SHAPES[shape], stride, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", ["unmasked", "frozen", "no-affine", "frozen-no-affine"])
@routes
def test_options(route: str, options: str, dtype: torch.dtype) -> None:
    flags = dict(frozen="frozen" in options, affine="no-affine" not in options)
    compare(route, (2, 24, 5, 6), 20, 2, dtype, masked=options != "unmasked", **flags)


@routes
def test_many_parts_are_merged_in_two_steps(route: str) -> None:
    rows = 2 * 97 * 131
    assert -(-rows // plan.tile("start", torch.empty(0), 4, 3).m) > 256
    x = torch.randn(2, 3, 97, 131, device=route).mul_(3).add_(50).contiguous(memory_format=LAST)
    w = torch.randn(4, 3, 1, 1, device=route)
    y, mean, var = start_conv(x, w, True, None, None, 0.0)
    wide, eager = y.double(), y.float()
    for name, got, kind in (("mean", mean, torch.mean), ("var", var, lambda t, d: t.var(d, correction=0))):
        assert_close64(name, got, kind(eager, (0, 2, 3)), kind(wide, (0, 2, 3)).cpu(), scale=1.0)


def test_every_tile_is_tried() -> None:
    seen = set()
    for (_, cin, _, _), cout in SHAPES.values():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(0, dtype=dtype)
            seen |= {
                ("start", plan.tile("start", x, cout, cin)),
                ("dgrad", plan.tile("dgrad", x, cin, cout)),
            }
    assert seen == {(k, t) for k in ("start", "dgrad") for ts in plan.GEMM[k].values() for t in ts}


@pytest.mark.parametrize("missing", ["z", "identity"])
@pytest.mark.parametrize("stride", [1, 2])
@routes
def test_one_gradient_missing(route: str, stride: int, missing: str) -> None:
    m = Start(16, 8, stride)
    x = torch.randn(2, 16, 5, 6).contiguous(memory_format=LAST)
    out = m.plain(x)[missing == "z"]
    d = torch.randn(out.shape)
    results = []
    for kind, ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        device = route if ours else "cpu"
        m.to(device, kind)
        leaf = x.to(device, kind).requires_grad_()
        outs = m.ours(leaf, None) if ours else m.plain(leaf)
        results.append(torch.autograd.grad(outs[missing == "z"], leaf, d.to(device, kind))[0])
    assert_close64("dx", results[2], results[1], results[0])


@pytest.mark.parametrize("wanted", ["weight", "gamma", "beta"])
@routes
def test_only_what_is_asked(route: str, wanted: str) -> None:
    m = Start(16, 8).requires_grad_(False)
    leaf = {"weight": m.conv.weight, "gamma": m.bn.weight, "beta": m.bn.bias}[wanted].requires_grad_()
    x, d = torch.randn(2, 16, 5, 6).contiguous(memory_format=LAST), torch.randn(2, 8, 5, 6)
    m.double()
    (ref,) = torch.autograd.grad(m.plain(x.double())[0], leaf, d.double())
    m.float()
    (eager,) = torch.autograd.grad(m.plain(x)[0], leaf, d)
    m.to(route)
    (got,) = torch.autograd.grad(m.ours(x.to(route), None)[0], leaf, d.to(route))
    assert_close64(wanted, got, eager, ref)


def test_gradcheck() -> None:
    for stride in (1, 2):
        for frozen in (False, True):
            m = Start(3, 2, stride, frozen=frozen).double()
            x = torch.randn(2, 3, 3, 4, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
            inputs = (x, m.conv.weight, m.bn.weight, m.bn.bias)
            assert torch.autograd.gradcheck(lambda x, *_, m=m: m.ours(x, None), inputs)


# ------------------------------------------------------------------------------------------------- in a block


@contextmanager
def fused(mode: str = "on") -> Iterator[None]:
    with fn.backend("reference"), fn.moments(mode):
        yield


def stage(stride: int, **options: object) -> tuple[fastres.ResLayer, Tensor]:
    torch.manual_seed(3)
    layer = fastres.ResLayer(fastres.Bottleneck, 2, 32, 64, stride=stride, **options)
    x = torch.randn(4, 32, 9, 10).contiguous(memory_format=LAST)
    return layer.to(memory_format=LAST), x.requires_grad_()


@pytest.fixture(params=["whole", "parts"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Bottlenecks as one function, or part by part: the autograd node that has the start of the block."""
    if request.param == "whole":
        return "_BottleneckBackward"
    monkeypatch.setattr(_block_end, "whole", lambda *args: None)
    return "_BlockStartBackward"


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_use_it_and_agree(stride: int, node: str) -> None:
    layer, x = stage(stride)
    dy = torch.randn(4, 64, *(9, 10) if stride == 1 else (5, 5))
    results = []
    for kind, mode in ((torch.float64, "off"), (torch.float32, "off"), (torch.float32, "on")):
        net, leaf = layer.to(kind), x.detach().to(kind).requires_grad_()
        net.zero_grad()
        with fused(mode):
            out = net(leaf)
        assert (node in node_names(out)) == (mode == "on")
        assert "_UnmaskedBackward" not in node_names(out)
        out.backward(dy.to(kind))
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())])
        # One sum of gradients fewer a block is the point: the two uses of a block's input have one gradient.
    for i, (ref, eager, ours) in enumerate(zip(*results, strict=True)):
        assert_close64(f"result {i}", ours, eager, ref, scale=1e-2)


@pytest.mark.parametrize("why", ["off", "caffe", "no gradient", "hook", "avg_down", "nchw"])
def test_blocks_leave_it(why: str) -> None:
    options = {"caffe": dict(style="caffe"), "avg_down": dict(avg_down=True)}.get(why, {})
    layer, x = stage(2, **options)
    block = layer[0]
    if why == "hook":
        block.conv1.register_forward_hook(lambda *a: None)
    if why == "no gradient":
        x = x.detach()
    if why == "nchw":
        x = x.detach().contiguous().requires_grad_()
    with fused("off" if why == "off" else "on"):
        out = block(x)
    assert not node_names(out) & {"_BlockStartBackward", "_BottleneckBackward"}


# ------------------------------------------------------------------------------------------- from block to block


def both(net: nn.Module, x: Tensor, dy: Tensor, run: Callable[..., list[Tensor]] | None = None) -> None:
    """All results with the moment form against float64, beside two runs without it that sum in other orders."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    results = []
    for kind, mode, flip in (
        (torch.float64, "off", False),
        (torch.float32, "off", False),
        (torch.float32, "off", True),
        (torch.float32, "on", False),
    ):
        turn = (lambda t: t.flip(0).contiguous(memory_format=LAST)) if flip else (lambda t: t)
        net.to(kind).load_state_dict(state)
        net.zero_grad()
        leaf = turn(x.detach().to(kind)).requires_grad_()
        with fused(mode):
            found = (run or (lambda net, leaf, dy: [net(leaf)]))(net, leaf, turn(dy.to(kind)))
            found[0].backward(turn(dy.to(kind)))
        results.append([turn(t.detach()) for t in (*found, leaf.grad)])
        results[-1] += [p.grad.clone() for p in net.parameters()]
        results[-1] += [b.clone() for b in net.buffers() if b.is_floating_point()]
    errors = torch.zeros(3, dtype=torch.float64)
    for ref, *others in zip(*results, strict=True):
        size = max(float(ref.abs().max()), 1e-2)
        relative = torch.stack([(t.double() - ref).abs().max() / size for t in others])
        assert relative[2] < 1e-3
        errors += relative
    # Through many layers the error of one tensor is a draw; the rule is held for their sum.
    assert errors[2] <= 2 * errors[:2].max() + 1e-6 * len(results[0]), errors


def network(**options: object) -> tuple[fastres.ResNet, Tensor]:
    torch.manual_seed(5)
    net = fastres.ResNet(50, base_channels=4, stem_channels=8, zero_init_residual=False, **options)
    net.init_weights()
    return net.to(memory_format=LAST), torch.randn(3, 3, 64, 64).contiguous(memory_format=LAST)


def test_a_block_in_between_gets_its_gradient_masked(node: str) -> None:
    """In a whole network only the last block of a chain masks its gradient itself."""
    net, x = network(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))
    with fused():
        (out,) = net(x)
    assert "_UnmaskedBackward" not in node_names(out)
    ends = [n for n in graph(out) if type(n).__name__ in ("_BlockEndBackward", "_BottleneckBackward")]
    marks = [n.saved_tensors[0] is None for n in ends]
    assert sorted(marks) == [False] + [True] * 6  # 3 + 4 blocks
    both(net, x, torch.randn(out.shape), lambda net, leaf, dy: list(net(leaf)))


def test_outputs_of_stages_have_plain_gradients() -> None:
    net, x = network(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))

    def run(net: nn.Module, leaf: Tensor, dy: Tensor) -> list[Tensor]:
        first, second = net(leaf)
        (g,) = torch.autograd.grad(second, first, dy, retain_graph=True)
        return [second, first, g]

    both(net, x, torch.randn(3, 32, 8, 8), run)


@pytest.mark.parametrize("what", ["forward hook", "backward hook", "checkpoint", "subclass", "other norm"])
def test_what_watches_a_block_sees_plain_tensors(what: str) -> None:
    torch.manual_seed(3)
    seen: list[Tensor] = []

    class Own(fastres.Bottleneck):
        def _fused(self, x: Tensor) -> Tensor:
            assert isinstance(x, Tensor)
            return super()._fused(x)

    layer = fastres.ResLayer(
        Own if what == "subclass" else fastres.Bottleneck, 3, 16, 16, with_cp=what == "checkpoint"
    ).to(memory_format=LAST)
    if what == "forward hook":
        layer[1].register_forward_hook(lambda m, a, out: seen.append(out))
    if what == "backward hook":
        layer[1].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].detach()))
    if what == "other norm":
        layer[1].bn2 = nn.BatchNorm2d(4)

    def run(net: nn.Module, leaf: Tensor, dy: Tensor) -> list[Tensor]:
        seen.clear()
        out = net(leaf)
        if what == "forward hook":
            return [out, torch.autograd.grad(out, seen[0], dy, retain_graph=True)[0]]
        return [out]

    x = torch.randn(4, 16, 6, 5).contiguous(memory_format=LAST)
    both(layer, x, torch.randn(4, 16, 6, 5), run)
    assert bool(seen) == ("hook" in what)


@pytest.mark.parametrize("options", [{}, dict(stride=2), dict(dilation=2)], ids=str)
def test_recomputed_input_gives_the_same_bits(options: dict[str, int]) -> None:
    torch.manual_seed(3)
    layer = fastres.ResLayer(fastres.Bottleneck, 2, 16, 32, **options).to(memory_format=LAST)
    x, state = torch.randn(4, 16, 6, 5).contiguous(memory_format=LAST), copy.deepcopy(layer.state_dict())
    results = []
    for mode in ("save", "recompute"):
        layer.load_state_dict(state)
        layer.zero_grad()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with fused(), fn.memory(mode):
            out = layer(leaf)
            assert ("_RecomputedConvBackward" in node_names(out)) == (mode == "recompute")
            out.backward(torch.ones_like(out).cumsum(1))
        results.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters()), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with (
        pytest.raises(ValueError, match="memory is 'none'; wanted one of save, recompute"),
        fn.memory("none"),
    ):
        pass


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_linked_blocks_compile_whole(memory: str) -> None:
    net, x = network(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))
    twin = copy.deepcopy(net)
    results = []
    with fused(), fn.memory(memory):
        for model in (net, torch.compile(twin, fullgraph=True, backend="aot_eager")):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            (out,) = model(leaf)
            out.backward(torch.ones_like(out).cumsum(1))
            results.append([out.detach(), leaf.grad])
    results[0] += [p.grad for p in net.parameters()] + list(net.buffers())
    results[1] += [p.grad for p in twin.parameters()] + list(twin.buffers())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
