"""What a function launched, written down and launched again: the writing, and blocks that live on their programs."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import _whole, selfcheck
from fastres import functional as fn
from fastres.kernels import _tape
from fastres.kernels._tape import Kept, launch, record
from tests.tolerance import poison

LAST = torch.channels_last


def written(function: Callable[..., Any], *tensors: Tensor | None) -> _tape.Program:
    """The program of a function, which gives what the function gave."""
    with torch.no_grad():
        result, program = record(function, tensors)
        assert program is not None
        again = program.run(*tensors)
    assert len(result) == len(again)
    for a, b in zip(result, again, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride() and a.dtype == b.dtype and torch.equal(a, b)
    return program


class Kernel:
    """Stands for a kernel of Triton: adds ``n`` to its first tensor, in place."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(x: Tensor, n: float, **constants: Any) -> None:
            self.seen.append((grid, n, constants))
            x += n  # no operator of the function's: Triton's own

        return run


def test_operators_of_every_form():
    def function(x: Tensor, y: Tensor | None, z: Tensor) -> tuple[Tensor | None, ...]:
        a = torch.zeros(3, 4, dtype=x.dtype)
        a.add_(x, alpha=0.5)
        one, two, three = a.unbind(0)
        wide = torch.cat([one, two.detach()]).view(2, 4).to(torch.float64)
        return wide, None if y is None else y * 2, three.as_strided((2, 2), (1, 2)), z.flatten(), one

    without, program = (
        written(function, torch.randn(3, 4), y, torch.randn(2, 3)) for y in (None, torch.randn(3))
    )
    assert len(program.source.splitlines()) == len(without.source.splitlines()) + 1  # y * 2


def test_convolutions_and_what_they_leave_out():
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = torch.conv2d(x, w, None, 2, 1)
        dx, dw, _ = torch.ops.aten.convolution_backward.default(
            y, x, w, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
        )
        return y, dx, dw

    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=LAST)
    source = written(function, x, torch.randn(5, 3, 3, 3)).source
    assert "_, = " in source and source.count("changed(") == 1  # of y, which is read


def test_what_nobody_reads_is_left_out():
    kernel = Kernel()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        base = torch.zeros(4)
        base[1:3].add_(x)  # seen through the base
        torch.empty(3).view(3, 1)
        torch.empty(2, 5).unbind(0)
        scratch = torch.empty(2)
        launch(kernel, (1,))(scratch, 1.0)
        return (base,)

    source = written(function, torch.ones(2)).source
    assert len(kernel.seen) == 2
    assert source.count("= c") + source.count("= empty") == 4, source  # zeros, slice, add_, scratch


@pytest.mark.parametrize("deterministic", [False, True])
def test_made_without_a_value(deterministic):
    """As it was made, and given back as soon as nothing will read it; filled where PyTorch was asked to fill."""
    torch.use_deterministic_algorithms(deterministic)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        a = torch.empty_like(x)
        b = x.new_empty(3, 2, dtype=torch.int32)
        c = torch.empty((2, 3, 4, 5), memory_format=LAST)
        d = torch.empty_strided((4, 2), (3, 1))
        for t in (a, b, c, d):
            t.fill_(7)
        return a, b, c, d

    program = written(function, torch.randn(2, 2))
    if deterministic:
        assert "empty(" in program.source
        with torch.no_grad():
            _, program = record(lambda x: (torch.empty(5),), (torch.ones(1),))
            assert program is not None
            assert program.run(torch.ones(1))[0].isnan().all()


def test_memory_is_given_back_after_the_last_reader():
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    kernel = Kernel()
    run = kernel[(1,)]

    class Watching(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def note(x: Tensor, n: float) -> None:
                made.append(weakref.ref(x))
                alive.append(sum(r() is not None for r in made))
                run(x, n)

            return note

    watching = Watching()

    def function(x: Tensor) -> tuple[Tensor]:
        for i in range(4):
            t = torch.zeros(8)
            launch(watching, (1,))(t, float(i))
            x = x + t
        return (x,)

    x = torch.ones(8)
    with torch.no_grad():
        _, program = record(function, (x,))
        assert program is not None
        made.clear()
        alive.clear()
        program.run(x)
    assert alive == [1, 1, 1, 1]


def test_launches():
    kernel = Kernel()

    def function(x: Tensor) -> tuple[Tensor]:
        a = x.clone()
        for n in (1.5, -0.0, 0.0, float("inf"), 1e-5):
            launch(kernel, (3, 2))(a, n, BLOCK=16, DTYPE=torch.float16, NAME="ieee", FLAG=True)
        launch(kernel, (1,))(a, 2)
        return (a,)

    with torch.no_grad():
        _, program = record(function, (torch.ones(2),))
        assert program is not None
        seen = [*map(repr, kernel.seen)]
        kernel.seen.clear()
        program.run(torch.ones(2))
    assert [*map(repr, kernel.seen)] == seen  # by repr, which tells -0.0 from 0.0
    assert len(seen) == 6
    launch(kernel, (5,))(torch.ones(1), 1.0)  # and without a tape
    assert kernel.seen[-1] == ((5,), 1.0, {})


@pytest.mark.parametrize("what", ["number", "stranger", "kernel", "twice", "result"])
def test_what_cannot_be_written_has_no_program(what):
    """And runs to its end as it would have."""
    stranger, kernel = torch.ones(2), Kernel()

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if what == "number":
            return (x * x.sum().item(),)
        if what == "stranger":
            return (x + stranger,)
        if what == "kernel":
            launch(kernel, (1,))(stranger, 1.0)
            return (x + 0,)
        return (stranger,) if what == "result" else (x + y,)

    x = torch.full((2,), 3.0)
    tensors = (x, x if what == "twice" else x.clone())
    with torch.no_grad():
        result, program = record(function, tensors)
    assert program is None
    stranger.fill_(1)
    assert torch.equal(result[0], function(*tensors)[0])


def test_a_result_in_other_strides_is_refused():
    """A setting of PyTorch's that nobody knew of may choose another library."""
    with torch.no_grad():
        _, program = record(lambda x: (x + 1,), (torch.randn(2, 3, 4, 4).contiguous(memory_format=LAST),))
        assert program is not None
        assert program.run(torch.randn(2, 3, 4, 4))[0].is_contiguous()  # nobody reads it here
        _, program = record(
            lambda x: ((x + 1).relu(),), (torch.randn(2, 3, 4, 4).contiguous(memory_format=LAST),)
        )
        assert program is not None
        with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor gave a tensor of other strides"):
            program.run(torch.randn(2, 3, 4, 4))


def test_an_error_passes_and_leaves_no_tape():
    def function(x: Tensor) -> tuple[Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record(function, (torch.ones(1),))
    assert _tape._running.tape is None
    assert torch._C._len_torch_dispatch_stack() == 0


def test_other_threads_write_nothing():
    kernel, lines = Kernel(), []

    def elsewhere() -> None:
        launch(kernel, (9,))(torch.ones(1) + 1, 1.0)

    def function(x: Tensor) -> tuple[Tensor]:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return (x + 1,)

    lines = written(function, torch.ones(1)).source.splitlines()
    assert len(lines) == 3 and len(kernel.seen) == 1  # the second run is the program's


def test_kept_by_key():
    kept, calls = Kept(2), []

    def function(x: Tensor) -> tuple[Tensor]:
        calls.append(1)
        return (x * 2,)

    def call(key: Any) -> None:
        (y,) = kept(key, function, (torch.ones(1),), 1)
        assert y == 2

    with torch.no_grad():
        for _ in range(4):
            call("a")
        assert len(calls) == 2  # once, once written down, then by the program
        with fn.programs("off"):
            call("a")
        assert len(calls) == 3
        call("b")
        call("c")  # the first is forgotten
        assert len(kept._found) == 2
        call("a")
        assert len(calls) == 6


def test_programs_within_a_function_that_is_written_down():
    """They are seen into: a tape has every launch."""
    kernel, inner = Kernel(), Kept(2)

    def within(x: Tensor) -> tuple[Tensor]:
        y = x.clone()
        launch(kernel, (1,))(y, 1.0)
        return (y,)

    def function(x: Tensor) -> tuple[Tensor]:
        return inner("a", within, (x,), 1)  # type: ignore[no-any-return]

    with torch.no_grad():
        for _ in range(3):
            function(torch.ones(2))
        assert isinstance(inner._found["a"], _tape.Program)
        _, program = record(function, (torch.ones(2),))
        assert program is not None
        kernel.seen.clear()
        assert program.run(torch.ones(2))[0].tolist() == [2, 2]
    assert len(kernel.seen) == 1


def test_setting():
    with pytest.raises(ValueError, match="programs is 'on'; wanted one of auto, off"), fn.programs("on"):
        pass


# --------------------------------------------------------------------------------------------- blocks in training


@pytest.mark.interpret
def test_selfcheck_runs_programs(hits):
    cpu = torch.device("cpu")
    cases = [case for case in selfcheck.cases(cpu, small=True) if case.programs]
    for case in cases:
        assert selfcheck.check(case, torch.float32, LAST, "triton", cpu).ok
    assert len(cases) == 2 and len(hits) == 8  # forward and backward, the last two times


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A list of the keys of programs that ran."""
    found: list[Any] = []
    call = Kept.__call__

    def counted(self: Kept, key: Any, *args: Any) -> Any:
        if isinstance(self._found.get(key), _tape.Program) and _tape.writing():
            found.append(key)
        return call(self, key, *args)

    monkeypatch.setattr(Kept, "__call__", counted)
    monkeypatch.setattr(_whole, "VERDICTS", {})
    yield found


class Stage:
    """Of two blocks, the first with a downsample; and how it takes a step."""

    def __init__(self, kind: type[nn.Module] = fastres.Bottleneck) -> None:
        torch.manual_seed(3)
        net = fastres.ResLayer(kind, 2, 8, 16, stride=1, norm_cfg=dict(type="FusedBN"))
        self.net = net.to(memory_format=LAST).train()
        self.x = torch.randn(2, 8, 5, 6).contiguous(memory_format=LAST)
        self.dy = torch.randn(2, 16, 5, 6).contiguous(memory_format=LAST)
        self.around: list[Callable[[], Any]] = []
        self.linked = False

    def step(self, mode: str) -> list[Tensor]:
        """Result, gradients and buffers."""
        leaf = self.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with contextlib.ExitStack() as stack:
            for context in (
                fn.backend("triton"),
                fn.programs(mode),
                fn.moments("on"),
                *(c() for c in self.around),
            ):
                stack.enter_context(context)
            if mode == "off":  # nor by what was decided before
                stack.enter_context(mock.patch.object(_whole, "VERDICTS", {}))
            out = fn.materialize(self.net.chained(leaf, True)) if self.linked else self.net(leaf)
            leaves = [p for p in self.net.parameters() if p.requires_grad]
            grads = torch.autograd.grad(out, [leaf, *leaves], self.dy.to(out.dtype))
        return [out, *grads, *self.net.buffers()]


def set_each(what: str, value: Any) -> dict[str, Callable[[Stage], None]]:
    """Of every norm by itself."""

    def change(name: str) -> Callable[[Stage], None]:
        return lambda stage: setattr(stage.net.get_submodule(name), what, value)

    return {f"{what} of {n}": change(n) for n in ("0.bn1", "0.bn2", "0.bn3", "0.downsample.1")}


def _layout(name: str) -> Callable[[Stage], None]:
    def change(stage: Stage) -> None:
        weight = stage.net.get_submodule(name).weight
        weight.data = torch.cat([weight.data, weight.data], 2)[:, :, : weight.shape[2]]  # with gaps

    return change


def _images(stage: Stage) -> None:
    stage.x, stage.dy = torch.cat([stage.x, stage.x[:1]]), torch.cat([stage.dy, stage.dy[:1]])


def _turned(stage: Stage) -> None:
    stage.x, stage.dy = (t.transpose(2, 3).contiguous(memory_format=LAST) for t in (stage.x, stage.dy))


def _low(stage: Stage) -> None:
    stage.around.append(lambda: torch.autocast("cpu", torch.bfloat16))
    stage.x = stage.x.bfloat16()


def _nchw_saved() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.contiguous() if t.dim() == 4 else t
    )


CHANGES: dict[str, Callable[[Stage], Any]] = {
    "nothing": lambda stage: None,
    **set_each("eps", 0.1),
    **set_each("momentum", 0.7),
    "cumulative average": lambda stage: setattr(stage.net[0].bn2, "momentum", None),
    "weight with gaps, conv1": _layout("0.conv1"),
    "weight with gaps, conv2": _layout("0.conv2"),
    "weight with gaps, conv3": _layout("0.conv3"),
    "weight with gaps, downsample": _layout("0.downsample.0"),
    "more images": _images,
    "turned images": _turned,
    "gradient in NCHW": lambda stage: setattr(stage, "dy", stage.dy.contiguous()),
    "expanded gradient": lambda stage: setattr(stage, "dy", stage.dy[:, :, :1, :1].expand_as(stage.dy)),
    "linked": lambda stage: setattr(stage, "linked", True),
    "frozen weight": lambda stage: stage.net[0].conv2.weight.requires_grad_(False),
    "frozen statistics": lambda stage: stage.net[1].bn1.eval(),
    "no running statistics": lambda stage: (
        setattr(stage.net[1].bn2, "running_mean", None) or setattr(stage.net[1].bn2, "running_var", None)
    ),
    "no counter": lambda stage: setattr(stage.net[1].bn2, "num_batches_tracked", None),
    "half vectors": lambda stage: stage.net[0].bn1.bfloat16(),
    "half network": lambda stage: (stage.net.bfloat16(), setattr(stage, "x", stage.x.bfloat16())),
    "autocast": _low,
    "moments off": lambda stage: stage.around.append(lambda: fn.moments("off")),
    "recompute": lambda stage: stage.around.append(lambda: fn.memory("recompute")),
    "own 3x3": lambda stage: stage.around.append(lambda: fn.conv3x3("triton")),
    "saved otherwise": lambda stage: stage.around.append(_nchw_saved),
    "filled": lambda stage: stage.around.append(poison),
    "other stride": lambda stage: (
        setattr(stage.net[0].conv2, "dilation", (2, 2)) or setattr(stage.net[0].conv2, "padding", (2, 2))
    ),
    "checkpointed": lambda stage: setattr(stage.net[0], "with_cp", True),
    "hooked": lambda stage: stage.net[0].conv1.register_forward_hook(lambda *_: None),
    "shared": lambda stage: setattr(stage.net[1].bn2, "weight", stage.net[1].bn1.weight),
}


KINDS = {"Bottleneck": fastres.Bottleneck, "BasicBlock": fastres.BasicBlock}
OF_BOTTLENECKS = ("bn3", "conv3", "linked", "recompute", "moments off")


@functools.cache
def warm(kind: str) -> tuple[Stage, dict[Any, Any]]:
    """A stage after two steps, and the programs that were written at the second."""
    stage = Stage(KINDS[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_whole, "VERDICTS", {})
        for _ in range(2):
            stage.step("auto")
        return stage, _whole.VERDICTS


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_between_steps(what, kind, hits, monkeypatch):
    """A step by programs after a change gives what one without programs gives, bit for bit."""
    if kind == "BasicBlock" and what.split()[-1].split(".")[-1] in OF_BOTTLENECKS:
        pytest.skip("is of bottlenecks")
    kept, programs = warm(kind)
    stage, other = (copy.deepcopy(kept) for _ in range(2))
    monkeypatch.setattr(_whole, "VERDICTS", programs)
    for s in (stage, other):
        CHANGES[what](s)
    for _ in range(2 if what == "cumulative average" else 1):
        for a, b in zip(stage.step("auto"), other.step("off"), strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            assert torch.equal(a, b)
    if what != "cumulative average":  # two steps, with the other block's programs
        assert (len(hits) == 4) == (what in ("nothing", "shared"))  # forward and backward of two blocks


@pytest.mark.interpret
def test_data_that_changes_between_forward_and_backward(hits):
    """A program of other strides would read past them; without one the operator refuses."""
    for mode in ("auto", "off"):
        stage = Stage()
        for _ in range(2):
            stage.step("auto")
        hits.clear()
        with fn.backend("triton"), fn.moments("on"), fn.programs(mode):
            out = stage.net(stage.x.detach().requires_grad_())
            assert len(hits) == (2 if mode == "auto" else 0)
            weight = stage.net[1].conv3.weight
            weight.data = torch.cat([weight.data, weight.data], 2)[:, :, :1]
            with pytest.raises(ValueError, match="pointwise_weight: weight has stride"):
                out.backward(stage.dy)


@pytest.mark.interpret
def test_a_step_that_shared_a_tensor_is_no_model_for_others(hits):
    stage = Stage()
    gamma = stage.net[1].bn2.weight
    CHANGES["shared"](stage)
    for _ in range(2):
        stage.step("auto")
    stage.net[1].bn2.weight = gamma
    with torch.no_grad():
        gamma.add_(1)
    other = copy.deepcopy(stage)
    for a, b in zip(stage.step("auto"), other.step("off"), strict=True):
        assert torch.equal(a, b)
    assert len(hits) == 2  # of the first block


class Twins:
    """A stage that runs by programs and one that never does; everything happens to both, and all bits are equal."""

    def __init__(self, seed: int) -> None:
        self.draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        kind = KINDS["BasicBlock" if seed % 2 else "Bottleneck"]
        self.options: dict[str, Any] = dict(
            in_channels=self.draw.choice([8, 16]), out_channels=16, stride=self.draw.choice([1, 2]),
            dilation=self.draw.choice([1, 1, 2]),
        )  # fmt: skip
        if kind is fastres.Bottleneck:
            groups, style = self.draw.choice([1, 1, 2]), self.draw.choice(["pytorch", "pytorch", "caffe"])
            self.options |= dict(groups=groups, style=style)
        net = fastres.ResLayer(kind, 2, **self.options).to(memory_format=LAST).train()
        self.nets = [net, copy.deepcopy(net)]
        self.n, self.size, self.layout = 2, 6, LAST
        self.around: dict[str, Any] = {}
        self.told: list[str] = [str(self.options)]

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        for net in self.nets:
            change(net)

    def pick(self, kind: type[nn.Module]) -> str:
        return self.draw.choice([n for n, m in self.nets[0].named_modules() if type(m) is kind])

    def norm(self, change: Callable[[Any], Any]) -> None:
        name = self.pick(fastres.FusedBatchNorm2d)
        self.both(lambda net: change(net.get_submodule(name)))

    def event(self) -> str:
        kinds = [n[3:] for n in dir(self) if n.startswith("to_")]
        kind = self.draw.choice(kinds)
        getattr(self, f"to_{kind}")()
        return kind

    def to_freeze(self) -> None:
        name = self.draw.choice([n for n, _ in self.nets[0].named_parameters()])
        wanted = self.draw.random() < 0.5
        self.both(lambda net: net.get_parameter(name).requires_grad_(wanted))

    def usual(self) -> None:
        """What has no program is undone."""
        self.both(lambda net: net.requires_grad_(True).train().to(memory_format=LAST))
        for name in ("memory", "moments"):
            self.around.pop(name, None)

    def to_eps(self) -> None:
        eps = self.draw.choice([1e-5, 1e-3])
        self.norm(lambda bn: setattr(bn, "eps", eps))

    def to_momentum(self) -> None:
        momentum = self.draw.choice([0.1, 0.3, None])
        self.norm(lambda bn: setattr(bn, "momentum", momentum))

    def to_frozen_norm(self) -> None:
        self.norm(lambda bn: bn.eval())

    def to_size(self) -> None:
        self.n, self.size = self.draw.choice([2, 3]), self.draw.choice([5, 6])

    def to_gradient(self) -> None:
        """As it may come: in either layout, or expanded."""
        self.layout = self.draw.choice([LAST, torch.contiguous_format, None])

    def to_halves(self) -> None:
        dtype = self.draw.choice([torch.bfloat16, torch.float32])
        self.both(lambda net: net.to(dtype))

    def to_autocast(self) -> None:
        self.around = {"autocast": self.draw.random() < 0.5}

    def to_moments(self) -> None:
        self.around["moments"] = self.draw.choice(["on", "off"])

    def to_recompute(self) -> None:
        self.around["memory"] = self.draw.choice(["save", "recompute"])

    def to_hook(self) -> None:
        name = self.pick(nn.Conv2d)
        handles = [net.get_submodule(name).register_forward_hook(lambda *_: None) for net in self.nets]
        self.step()
        for h in handles:
            h.remove()

    def to_shared(self) -> None:
        """Two norms of a block share their gamma."""

        def tie(net: nn.Module) -> None:
            net[1].bn2.weight = net[1].bn1.weight  # type: ignore[index]

        self.both(tie)
        self.step()

        def untie(net: nn.Module) -> None:
            net[1].bn2.weight = nn.Parameter(net[1].bn1.weight.detach().clone())  # type: ignore[index]

        self.both(untie)

    def to_layout(self) -> None:
        layout = self.draw.choice([LAST, torch.contiguous_format])
        self.both(lambda net: net.to(memory_format=layout))

    def to_other_weights(self) -> None:
        state = {k: v * 0.9 if v.is_floating_point() else v for k, v in self.nets[0].state_dict().items()}
        self.both(lambda net: net.load_state_dict(state))

    def to_copies(self) -> None:
        self.nets = copy.deepcopy(self.nets)

    def step(self) -> None:
        dtype = torch.float32 if self.around.get("autocast") else next(self.nets[0].parameters()).dtype
        if self.around.get("autocast"):
            dtype = torch.bfloat16
            self.both(lambda net: net.float())
        size = self.n, self.options["in_channels"], self.size, self.size
        x = torch.randn(size, generator=self.generator).to(dtype).contiguous(memory_format=LAST)
        scale = torch.randn(1, 16, 1, 1, generator=self.generator)
        hooked, twice, filled = (self.draw.random() for _ in range(3))
        results = []
        for net, mode in zip(self.nets, ("auto", "off"), strict=True):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with contextlib.ExitStack() as stack:
                stack.enter_context(fn.backend("triton"))
                stack.enter_context(fn.programs(mode))
                stack.enter_context(fn.moments(self.around.get("moments", "on")))
                stack.enter_context(fn.memory(self.around.get("memory", "save")))
                if self.around.get("autocast"):
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                if hooked < 0.1:
                    nchw = lambda t: t.contiguous() if t.dim() == 4 and t.is_contiguous() else t  # noqa: E731
                    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, nchw))
                if filled < 0.2:
                    stack.enter_context(poison())
                out = net(leaf)
                dy = scale.to(out.dtype).expand_as(out)  # its strides are 0
                dy = dy if self.layout is None else dy.contiguous(memory_format=self.layout)
                wanted = [leaf, *(p for p in net.parameters() if p.requires_grad)]
                results.append([torch.autograd.grad(out, wanted, dy, retain_graph=True)])
                if twice < 0.2:
                    results[-1].append(torch.autograd.grad(out, wanted, dy))
            results[-1].append([out, *net.buffers()])
        for ours, theirs in zip(*results, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype and a.stride() == b.stride(), self.told
                assert torch.equal(a, b), self.told


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@pytest.mark.parametrize("seed", range(4))
def test_stages_that_live_on_programs(seed, hits):
    twins = Twins(seed)
    for _ in range(7):
        for _ in range(3):
            twins.step()
        twins.told.append(twins.event())
        twins.step()
        if twins.draw.random() < 0.7:
            twins.usual()
    assert len(hits) > 10
