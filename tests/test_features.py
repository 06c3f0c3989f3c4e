"""What a training script does with a net beside calling it: loss scaling, compiling, averaging, graphs, transforms.

Checkpointing, autocast and copies have their tests where the layers have theirs; these are whole nets.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fastres
from fastres import functional as FF
from fastres.kernels._launch import channels_last
from fastres.kernels._triton import INTERPRET
from tests.parity import randomize
from tests.plain_resnet import Block as PlainBlock
from tests.tolerance import assert_close64

ROUTES = ["aten", "reference"]
# Interpreted here stands for every fused route; the CPU operators are plain torch in the other processes.
FUSED = pytest.param(
    "triton" if INTERPRET else "reference", marks=[pytest.mark.interpret] if INTERPRET else [], id="fused"
)
SMALL = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))
X = (4, 3, 32, 32)


class Short(fastres.ResNet):
    """Few blocks, of each kind one."""

    arch_settings = {50: (fastres.Bottleneck, (2, 1, 1, 1))}


class Net(nn.Module):
    """Stem, block ends in the moment form (where it is asked for), two downsample branches."""

    def __init__(self, norm: str = "FusedBN", width: int = 4, **options: Any) -> None:
        super().__init__()
        norm_cfg = dict(type=norm, **options)
        sizes: dict[str, Any] = dict(stem_channels=width, base_channels=width)
        self.backbone = Short(50, norm_cfg=norm_cfg, **SMALL, **sizes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x.contiguous(memory_format=torch.channels_last))[0]


def images(seed: int = 0, n: int = X[0], dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *X[1:], generator=g, dtype=torch.float64).to(dtype)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------- loss scaling


def scaled_step(model: nn.Module, x: Tensor, scaler: torch.amp.GradScaler, weight: float = 1.0) -> Tensor:
    """One step of a training script with fp16 autocast. Returns the output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    scaler.scale(y.float().square().mean() * weight).backward()
    scaler.step(optimizer)
    scaler.update()
    return y.detach()


def twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    ours, eager = randomize(Net(**options)), Net("BN")
    eager.load_state_dict(ours.state_dict())
    return ours, eager


@pytest.mark.parametrize("route", ROUTES)
def test_a_step_whose_gradients_overflow_is_skipped_as_in_eager(route):
    """The forward was sound: its statistics count. The parameters stay, and the scale is halved."""
    ours, eager = twins()
    before = copy.deepcopy(ours.state_dict())
    for model in (ours, eager):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        with FF.backend(route):
            scaled_step(model, images(), scaler, weight=1e30)
        assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    for (name, got), want in zip(ours.named_buffers(), eager.buffers(), strict=True):
        assert not torch.equal(got, before[name]), f"{name} was updated"
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("route", ROUTES)
def test_a_forward_that_overflows_poisons_what_it_poisons_in_eager(route):
    ours, eager = twins()
    for model in (ours, eager):
        with FF.backend(route), FF.moments("off"):
            scaled_step(model, images() * 1e30, torch.amp.GradScaler("cpu"))
    for (name, got), want in zip(ours.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(got.isfinite(), want.isfinite()), name
    assert not ours.backbone.bn1.running_mean.isfinite().any()


@pytest.mark.parametrize("moments", ["on", "off"])
@pytest.mark.parametrize("route", ROUTES)
def test_statistics_that_are_not_finite_can_be_kept_out(route, moments):
    """With the option, a poisoned step leaves every buffer as it was, bit for bit, and the steps after it are those of
    a net that never saw it; without a poisoned step the option changes nothing."""
    plain = randomize(Net())
    careful = Net(skip_nonfinite_stats=True)
    careful.load_state_dict(plain.state_dict())
    poisoned = copy.deepcopy(plain)
    bad = images(9) * 1e30
    with FF.backend(route), FF.moments(moments), fastres.record_routes() as log:
        for step in range(3):
            if step == 1:
                before = buffers(careful)
                got = scaled_step(careful, bad, torch.amp.GradScaler("cpu"))
                assert same(buffers(careful), before)
                want = scaled_step(poisoned, bad, torch.amp.GradScaler("cpu"))
                assert torch.equal(got.isfinite(), want.isfinite()), (
                    "the output is what it is without the option"
                )
            for model in (plain, careful):
                for p in model.parameters():
                    p.grad = None
                scaled_step(model, images(step), torch.amp.GradScaler("cpu"))
    assert same(dict(plain.state_dict()), dict(careful.state_dict()))
    assert int(careful.backbone.bn1.num_batches_tracked) == 3
    assert any(choice.reason.endswith("; moment form") for choice in log) == (
        route != "aten" and moments == "on"
    )


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("route", ["aten", FUSED])
def test_one_bad_value_keeps_a_whole_norm(route, value, momentum):
    norm = randomize(fastres.FusedBatchNorm2d(3, momentum=momentum, skip_nonfinite_stats=True))
    plain = copy.deepcopy(norm)
    plain.skip_nonfinite_stats = False
    assert "skip_nonfinite_stats=True" in repr(norm) and "skip" not in repr(plain)
    good, bad = torch.randn(2, 2, 3, 4, 4)
    bad[0, 1, 2, 2] = value
    with FF.backend(route):
        for _ in range(2):
            norm(good), plain(good)
        before = buffers(norm)
        assert same(before, buffers(plain))
        norm(bad), plain(bad)
        assert same(buffers(norm), before)
        assert not plain.running_mean[1].isfinite() and plain.running_mean[0].isfinite()
        norm.eval()(bad)
    assert same(buffers(norm), before)


def test_the_option_goes_everywhere_a_norm_goes():
    net = Net(skip_nonfinite_stats=True)
    synchronised = fastres.convert_sync_batchnorm(copy.deepcopy(net))
    assert all(m.skip_nonfinite_stats for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm))
    block = nn.Sequential(PlainBlock(4, 4))
    fastres.fuse_(block)
    norms = [m for m in block.modules() if isinstance(m, fastres.FusedBatchNorm2d)]
    assert norms and not any(m.skip_nonfinite_stats for m in norms)
    for m in norms:
        m.skip_nonfinite_stats = True
    before = buffers(block)
    block(torch.full((2, 4, 8, 8), float("nan")))
    assert same(buffers(block), before)
    assert not FF.BatchNorm(None, None, None, None, None, 0.1, 1e-5, True).skip_nonfinite


@pytest.mark.parametrize("route", ROUTES)
def test_the_option_compiles_and_goes_with_checkpointing(route):
    torch._dynamo.reset()
    eager = randomize(Net(skip_nonfinite_stats=True))
    compiled, recomputed = copy.deepcopy(eager), copy.deepcopy(eager)
    for block in recomputed.modules():
        if isinstance(block, fastres.Bottleneck):
            block.with_cp = True
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with FF.backend(route):
        for i, x in enumerate((images(), images(1) * float("inf"), images(2))):
            x.requires_grad_()
            for model in (eager, call, recomputed):
                model(x).square().mean().backward()
            for name, want in eager.named_buffers():
                for other in (compiled, recomputed):
                    got = other.get_buffer(name)
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"step {i}: {name}")
    assert int(eager.backbone.bn1.num_batches_tracked) == 2


# ------------------------------------------------------------------------------------------- compile, averages


@pytest.mark.parametrize("depth", [18, 50])
def test_compiling_warns_of_nothing(depth, monkeypatch):
    """Dynamo warns of every cache that it meets in what it traces; at shapes where both moment forms are weighed."""
    said: list[str] = []
    monkeypatch.setattr("torch._dynamo.utils.warn_once", lambda message, *rest: said.append(message))
    torch._dynamo.reset()
    net = fastres.ResNet(depth, base_channels=16, stem_channels=16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with FF.backend("reference"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)[0].sum().backward()
    assert not said


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("route", ROUTES)
def test_one_graph_for_every_batch_size(route, training):
    torch._dynamo.reset()
    plain = randomize(Net()).train(training)
    compiled = copy.deepcopy(plain)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    with (
        FF.backend(route),
        torch.set_grad_enabled(training),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for n in (5, 7):  # no other size in the net, which torch would take for the same
            y, want = call(images(n, n)), plain(images(n, n))
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
            if training:
                y.square().mean().backward(), want.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (p.grad is None) != training
        if training:
            size = float(p.grad.abs().max())
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * size, msg=name)
    for (name, p), q in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)


class _Symbolic:
    """A tensor as torch 2.11 shows it to a compiler: of symbolic sizes, and by its own word in no layout."""

    class Size(int):
        pass

    def __init__(self, like: Tensor) -> None:
        self.shape, self.like = [self.Size(n) for n in like.shape], like

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return False

    def stride(self, i: int) -> int:
        return self.like.stride(i)

    def dim(self) -> int:
        return self.like.dim()


def test_layout_by_strides_where_torch_does_not_tell():
    for shape in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1), (1, 1, 1, 1)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=memory)
            want = x.is_contiguous(memory_format=torch.channels_last)
            assert channels_last(x) == channels_last(_Symbolic(x)) == want, (shape, memory)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for strided in (x[:, :, ::2], x[:, :2], x[:, :, :, 1:], x.transpose(2, 3)):
        assert not channels_last(strided) and not channels_last(_Symbolic(strided))
    assert not channels_last(_Symbolic(torch.randn(3, 4)))


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_accumulate(route):
    """Three micro-batches, one step: each normalised by itself, as in eager; by the rule, against float64."""

    def accumulated(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        for i in range(3):
            (model(images(i, 4, dtype)).square().mean() / 3).backward()
        return {name: p.grad for name, p in model.named_parameters()} | buffers(model)

    ours, eager = twins()
    reference = copy.deepcopy(eager).double()
    with FF.backend(route):
        got = accumulated(ours, torch.float32)
    other, want = accumulated(eager, torch.float32), accumulated(reference, torch.float64)
    scale = max(float(want[name].abs().max()) for name, _ in ours.named_parameters())
    for name, value in want.items():
        if value.is_floating_point():
            assert_close64(name, got[name], other[name], value, scale=scale)
        else:
            assert torch.equal(got[name], value)


def test_averaged_models():
    """torch's EMA of parameters and buffers, and its update_bn, which changes momentum and resets statistics."""
    ours, eager = twins()
    averages = []
    for model in (ours, eager):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for i in range(3):
            model(images(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        averages.append(average)
    for check in range(2):
        for (name, a), b in zip(
            averages[0].state_dict().items(), averages[1].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{check}: {name}")
        for average in averages:
            update_bn([images(5), images(6)], average)
    assert all(m.momentum == 0.1 for m in averages[0].modules() if isinstance(m, nn.BatchNorm2d))


# ---------------------------------------------------------------------------------------- transforms, processes


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).square().sum())(x[0]),
    "jvp": lambda f, x: torch.func.jvp(f, (x[0],), (x[1],))[1],
    "jacrev": lambda f, x: torch.func.jacrev(lambda t: f(t).sum((0, 2, 3)))(x[0]),
}


@pytest.mark.parametrize("kind", ["norm", "block"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_run_on_aten_and_are_refused_elsewhere(name, kind):
    x = torch.randn(2, 3, 4, 5, 5).double()
    ours: nn.Module = fastres.FusedBatchNorm2d(4) if kind == "norm" else fastres.Bottleneck(4, 4)
    ours = randomize(ours).double().eval()
    plain: nn.Module = copy.deepcopy(ours)
    if kind == "norm":
        plain = nn.BatchNorm2d(4).double().eval()
    else:
        plain = fastres.Bottleneck(4, 4, norm_cfg=dict(type="BN")).double().eval()
    plain.load_state_dict(ours.state_dict())
    transform = TRANSFORMS[name]
    want = transform(plain, x)
    torch.testing.assert_close(transform(ours, x), want)
    with FF.backend("reference"):
        with pytest.raises(
            ValueError, match=r"batch_norm: .*no rules for the transforms of torch.func \(vmap"
        ):
            transform(ours, x)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp|forward"):
            ours(forward_ad.make_dual(x[0], x[1]))


def test_scripting_a_net_is_refused_clearly():
    for module in (Net(), fastres.BasicBlock(4, 4), fastres.ResLayer(fastres.Bottleneck, 2, 4, 8)):
        with pytest.raises(RuntimeError, match="torch.jit.script: FusedBatchNorm2d .* wanted torch.compile"):
            torch.jit.script(module)


def _child(models: list[nn.Module], x: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put([(type(m).__name__, m(x).detach().numpy()) for m in models])


def test_a_spawned_process_gets_the_net():
    """Pickled into another process: a net of ours, and a block whose class fuse_ made."""
    theirs = randomize(PlainBlock(3, 3)).eval()
    fastres.fuse_(theirs)
    models, x = [randomize(Net()).eval(), theirs], images()
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_child, args=(models, x, answers))
    process.start()
    got = answers.get()
    process.join(60)
    assert process.exitcode == 0
    for (name, y), model in zip(got, models, strict=True):
        assert name == type(model).__name__
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


# ------------------------------------------------------------------------------------------------- CUDA graphs


def on_gpu() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A net, its twin, and inputs, on the GPU; big enough for every fused path."""
    model = randomize(Net(width=16)).cuda()
    return model, copy.deepcopy(model), [images(i).cuda() for i in range(3)]


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
def test_graphed_callables():
    """``torch.cuda.make_graphed_callables``: outputs, gradients and running statistics of replays."""
    model, twin, xs = on_gpu()
    state = copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (xs[0].clone().requires_grad_(),))
    model.load_state_dict(state)  # the warm-up of the capture has updated the statistics
    for x in xs:
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = graphed(a), twin(b)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(want)
        y.backward(dy), want.backward(dy)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()))
    assert_same_state(model, twin)


@pytest.mark.gpu
def test_a_whole_step_in_a_graph():
    """Forward, backward and update captured once and replayed on new images."""
    model, twin, xs = on_gpu()
    state = copy.deepcopy(model.state_dict())
    static = xs[0].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(model, optimizer, static)
    model.load_state_dict(state)
    plain = torch.optim.SGD(twin.parameters(), lr=1e-3)
    for x in xs:
        static.copy_(x)
        graph.replay()
        step(twin, plain, x)
    assert_same_state(model, twin)
