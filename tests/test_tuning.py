"""Tuning tables: what is accepted, what is refused, that they choose, and that the tuner writes good ones."""

from __future__ import annotations

import ast
import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch

import fastres
from fastres import _trials, functional, tuning
from fastres._jobs import Job, Route, Site, jobs, shares
from fastres._workload import Call, Spec, workload
from fastres.cli import main
from fastres.functional import BatchNorm
from fastres.kernels import _launch, _tuned
from fastres.kernels import _pointwise_plan as plan
from fastres.kernels._launch import ELEMENTWISE, REDUCTION, cut, elementwise, matrix, tile_key
from fastres.tuning import Tuner
from tests import aot

GPU, CAPABILITY = "Test GPU", (9, 0)
WIDEST = ELEMENTWISE[True][-1]  # not the default of 64 channels
CPU = torch.device("cpu")
LARGE = plan.GEMM["end"][True][1]


def config(kernel="elementwise", key=(1, 6, 6), tile=WIDEST):
    return dict(kernel=kernel, key=list(key), config=list(tile))


def chosen_route(op="batch_norm", key=(1, 6, 6, 4), route="aten"):
    return dict(op=op, key=list(key), route=route)


def table(**changes):
    return {
        **dict(schema=2, gpu=GPU, capability=[9, 0], configs=[config()], routes=[chosen_route()]),
        **changes,
    }


def use(**changes):
    _tuned.reset(_tuned.parse(json.dumps(table(**changes)), GPU, CAPABILITY))


@pytest.fixture(autouse=True)
def no_table():
    _tuned.reset()  # whatever ran before in this process has read one
    yield
    _tuned.reset()


def activation(n=1, c=64, h=8, w=8, dtype=torch.float32):
    return torch.empty(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ what a table does


def test_a_table_chooses_the_tile_of_its_shape_class():
    x = activation()
    assert tile_key(matrix(x)) == (1, 6, 6)
    default = elementwise(matrix(x))[0]
    use()
    assert elementwise(matrix(x))[0] == WIDEST != default
    assert elementwise(matrix(activation(n=4)))[0] == default
    assert cut(matrix(x)).tile == _launch.default_tile("reduction", matrix(x))


def test_a_table_chooses_the_configuration_of_a_product():
    x = activation(n=4, dtype=torch.bfloat16)
    assert plan.tile("end", x, 64, 64) == plan.GEMM["end"][True][0]
    use(configs=[config("end", (1, 0, 8, 6, 6), LARGE)])
    assert plan.tile("end", x, 64, 64) == LARGE
    assert plan.tile("dz", x, 64, 64) == plan.GEMM["dz"][True][0]
    assert plan.tile("end", activation(dtype=torch.bfloat16), 64, 64) == plan.GEMM["end"][True][0]
    assert plan.tile("end", x, 60, 64) == plan.GEMM["end"][True][_tuned.ODD]


def test_a_kernel_added_to_the_products_can_be_chosen(monkeypatch):
    """Also a configuration that is appended; the one for odd sizes serves odd sizes alone."""
    extra = plan.Gemm(256, 128, 64, 8, 3)
    monkeypatch.setitem(_tuned._FAMILIES, "start", None)
    gemm = {"start": {True: (*plan.GEMM["end"][True], extra), False: plan.GEMM["end"][False]}}
    _tuned.products(gemm)
    assert extra in _tuned.candidates("start", (1, 0, 8, 6, 6))
    odd = gemm["start"][True][_tuned.ODD]
    assert odd not in _tuned.candidates("start", (1, 0, 8, 6, 6))
    assert _tuned.candidates("start", (1, 1, 8, 6, 6)) == (odd,)
    use(configs=[config("start", (1, 0, 8, 6, 6), extra)])
    with pytest.raises(_tuned.TableError, match="not among the tested"):
        use(configs=[config("start", (1, 1, 8, 6, 6), extra)])


def test_every_product_is_tunable():
    assert set(plan.GEMM) <= set(_tuned._FAMILIES)


def test_what_a_table_may_choose_is_compiled_ahead_of_time():
    """Every configuration of a product is among the launches that the ahead-of-time tests name."""
    compiled = set()
    for name in aot.families():
        module = importlib.import_module(f"fastres.kernels.{name}")
        for case in (*module.aot_cases(), *getattr(module, "odd_cases", tuple)()):
            sizes = frozenset(v for k, v in case.constants.items() if k in ("BM", "BN", "BC", "BK"))
            compiled.add((sizes, case.options["num_warps"], case.options.get("num_stages")))
    for kernel, by_storage in plan.GEMM.items():
        for two in by_storage:
            for odd in (0, 1):
                for t in _tuned.candidates(kernel, (int(two), odd, 8, 6, 6)):
                    assert (frozenset((t.m, t.n, t.k)), t.warps, t.stages) in compiled, (kernel, t)


def test_default_tile_holds_a_row():
    for c in (8, 16, 24, 64, 100, 2048):
        m = matrix(activation(c=c))
        wide = [t for t in ELEMENTWISE[m.nhwc] if t.b1 >= m.cols]
        assert _launch.default_tile("elementwise", m) == (wide or ELEMENTWISE[m.nhwc][-1:])[0]


def norm(c=64, **changes):
    made = BatchNorm(torch.ones(c), torch.zeros(c), torch.zeros(c), torch.ones(c), None, 0.1, 1e-5, True)
    return made._replace(**changes)


def test_a_table_chooses_routes():
    x = activation()
    with functional.assume_gpu():
        assert functional.decide("batch_norm", x, (), (norm(),))[0] == "triton"
        use()
        route, reason = functional.decide("batch_norm", x, (), (norm(),))
        assert route == "aten" and "tuning table" in reason
        assert functional.decide("add_relu", x, (), (norm(),))[0] == "triton"
        assert functional.decide("batch_norm", activation(n=4), (), (norm(),))[0] == "triton"
        # Statistics over a process group exist in the fused operators alone.
        assert functional.decide("batch_norm", x, (), (norm(group=object()),))[0] == "triton"
    with functional.backend("reference"):
        assert functional.decide("batch_norm", x, (), (norm(),))[0] == "reference"  # what was asked for


def test_a_table_turns_the_moment_form_on_and_off():
    assert functional.moments_pay(1 << 18, 256, 64) and not functional.moments_pay(1 << 18, 64, 4096)
    routes = [
        chosen_route("block_end", (18, 256, 64, 2), "pending"), chosen_route("pair_end", (18, 64, 4096, 2), "moments"),
    ]  # fmt: skip
    use(routes=routes)
    assert not functional.moments_pay(1 << 18, 256, 64) and functional.moments_pay(
        1 << 18, 256, 64, "pair_end"
    )
    assert functional.moments_pay(1 << 18, 64, 4096, "pair_end")
    assert functional.moments_pay(1 << 19, 256, 64) and functional.moments_pay(1 << 18, 256, 64, itemsize=4)
    with functional.moments("on"):
        assert functional.moments_pay(1 << 18, 256, 64)


def block_routes(block, x):
    with functional.assume_gpu(), functional.record_routes() as log:
        block(x)
    return {c.op: (c.route, c.reason.endswith("; moment form")) for c in log}


def bottleneck():
    torch.manual_seed(0)
    down = torch.nn.Sequential(torch.nn.Conv2d(64, 256, 1, bias=False), fastres.FusedBatchNorm2d(256))
    return fastres.Bottleneck(64, 256, downsample=down).to(memory_format=torch.channels_last)


def test_a_block_follows_the_table_in_eager_mode_and_compiled():
    """With symbolic sizes: asking the table must not make a size static."""
    block, x = bottleneck(), torch.randn(4, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    assert block_routes(block, x)["add_relu"] == ("triton", True)
    pair = chosen_route("pair_end", (10, 256, 64, 4), "pending")
    use(routes=[pair, chosen_route("add_relu", (1, 10, 8, 4), "aten")])
    assert block_routes(block, x)["add_relu"] == ("aten", False)
    expected = block(x)
    torch._dynamo.reset()
    with functional.assume_gpu():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        compiled(torch.cat([x, x[:1]]))


def folded_routes(net, x):
    """Route of every convolution of an inference pass on a GPU, and the result."""
    with torch.no_grad(), functional.assume_gpu(), functional.record_routes() as log:
        out = net(x)
    return [c.route for c in log], out


def test_a_table_chooses_the_routes_of_inference():
    """Per shape class, also whether a downsample's convolution joins the block end; every choice computes the same."""
    net, x = bottleneck().eval(), torch.randn(4, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    routes, expected = folded_routes(net, x)
    assert routes == ["triton", "cudnn", "triton", "triton"]
    rows = [
        chosen_route("folded_product", (1, 10, 64, 64, 1, 1, 1, 1, 1, 0, 4), "cudnn"),
        chosen_route("folded_conv", (1, 10, 64, 64, 3, 3, 1, 1, 1, 0, 4), "folded"),
    ]
    use(routes=rows)
    routes, out = folded_routes(net, x)
    assert routes == ["cudnn", "folded", "triton", "triton"]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    apart = chosen_route("folded_pair", (10, 256, 64, 64, 1, 4), "separate")
    use(routes=[apart, chosen_route("folded_product", (1, 10, 256, 64, 1, 1, 1, 1, 1, 1, 4), "folded")])
    routes, out = folded_routes(net, x)
    assert routes == ["triton", "cudnn", "cudnn", "folded"]  # of the pair the downsample's first
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert folded_routes(net, x[:1])[0] == ["triton", "cudnn", "triton", "triton"]  # another class
    assert folded_routes(net, x.contiguous())[0][0] != "folded"
    for backend, wanted in (
        ("reference", {"reference"}),
        ("triton", {"triton", "cudnn"}),
    ):  # what was asked for
        with functional.backend(backend):
            assert set(folded_routes(net, x)[0]) == wanted
    assert routes == ["triton", "cudnn", "cudnn", "folded"]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tuning table"),
        ("[]", "not a tuning table"),
        (json.dumps(table(schema=1)), "schema is 1"),
        (json.dumps(table(gpu="Other GPU")), "made on Other GPU"),
        (json.dumps(table(capability=[8, 0])), "made on Test GPU [8, 0]"),
        (json.dumps(table(configs=[config("conv9x9")])), "conv9x9"),
        (json.dumps(table(configs=[config(tile=(7, 7, 4))])), "[7, 7, 4]"),
        (json.dumps(table(configs=[config("end", (1, 0, 8, 6, 6), (999, 128, 64, 8, 3))])), "[999, 128"),
        (json.dumps(table(configs=[config(key=())])), "not a tuning table"),
        (json.dumps(table(configs=[config(key=("a",))])), "key is ['a']"),
        (json.dumps(table(configs=[dict(kernel="elementwise")])), "not a tuning table"),
        (json.dumps(table(routes=[chosen_route(route="magic")])), "magic"),
        (json.dumps(table(routes=[chosen_route(op="magic")])), "magic"),
        (
            json.dumps(table(routes=[chosen_route(op="block_end", route="aten")])),
            "wanted one of moments, pending",
        ),
        (
            json.dumps(table(routes=[chosen_route("folded_conv", route="triton")])),
            "wanted one of cudnn, folded",
        ),
        (json.dumps({k: v for k, v in table().items() if k != "routes"}), "not a tuning table"),
    ],
)
def test_a_corrupt_or_foreign_table_is_refused(text, message, tmp_path, monkeypatch):
    with pytest.raises(_tuned.TableError) as refused:
        _tuned.parse(text, GPU, CAPABILITY)
    assert message in str(refused.value)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    (tmp_path / _tuned.slug(GPU, CAPABILITY)).write_text(text)
    with pytest.warns(UserWarning, match="is refused"):
        assert _tuned.load(GPU, CAPABILITY) == _tuned.EMPTY


def test_the_users_table_goes_before_the_package(tmp_path, monkeypatch):
    package, user = tmp_path / "data", tmp_path / "cache"
    for folder, rows in ((package, 6), (user, 7)):
        folder.mkdir()
        (folder / _tuned.slug(GPU, CAPABILITY)).write_text(
            json.dumps(table(configs=[config(key=(1, rows, 6))]))
        )
    monkeypatch.setattr(_tuned, "_DATA", package)
    monkeypatch.setenv("FASTRES_CACHE", str(user))
    assert ("elementwise", (1, 7, 6)) in _tuned.load(GPU, CAPABILITY).configs
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "nothing"))
    assert ("elementwise", (1, 6, 6)) in _tuned.load(GPU, CAPABILITY).configs
    monkeypatch.setattr(_tuned, "_DATA", tmp_path / "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuned.load(GPU, CAPABILITY) == _tuned.EMPTY


def test_tables_in_the_package_are_good():
    for path in sorted(_tuned._DATA.glob("*.json")):
        data = json.loads(path.read_text())
        _tuned.parse(path.read_text(), data["gpu"], tuple(data["capability"]))
        assert path.name == _tuned.slug(data["gpu"], tuple(data["capability"]))


def test_a_launch_reads_no_file_twice(monkeypatch):
    reads = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: CAPABILITY)
    monkeypatch.setattr(_tuned, "load", lambda *gpu: reads.append(gpu) or _tuned.EMPTY)
    for _ in range(3):
        elementwise(matrix(activation()))
    assert reads == [(GPU, CAPABILITY)]


def test_nothing_but_the_command_tunes():
    """No other module of the package imports the tuner, so no forward, import or capture can start it."""
    package = Path(fastres.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if any("tuning" in f"{source}.{n}".split(".") for n in names):
                importers.add(path.relative_to(package).as_posix())
    assert importers == {"commands/tune.py"}


def test_the_tuner_refuses_inside_a_capture(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuner = Tuner(CPU, tmp_path / "t.json", "reference")
    with pytest.raises(RuntimeError, match="being captured"):
        tuner.run([operation()], 60, str)
    assert not (tmp_path / "t.json").exists()


# ------------------------------------------------------------------------------------------------------- the tuner


def operation(op="batch_norm", c=8, side=6):
    return Job("operation", f"{op} {c} {side}", Route(op, (2, c, side, side), torch.float32, True), 1)


def act_call(c=64):
    """A call of batch_norm_act on [1, c, 8, 8]."""
    y, v = Spec((1, c, 8, 8), (c * 64, 1, 8 * c, c), torch.float32), Spec((c,), (1,), torch.float32)
    return Call("batch_norm_act", (y, v, v, v, v, 1e-5, True, True, None, None))


def kernel_job(key=(1, 6, 6)):
    site = Site("elementwise", key, tuple(ELEMENTWISE[True][0]), {act_call(): 3})
    return Job("kernel", f"elementwise {list(key)}", site, 1)


def tuner_at(path, **changes):
    return Tuner(CPU, path, "reference", **{**dict(rounds=1, region=0.0, warmup=0), **changes})


def test_the_tuner_writes_what_a_table_may_hold(tmp_path):
    path, said = tmp_path / "t.json", []
    todo = [kernel_job(), operation(), operation("add_relu"), operation("max_pool")]
    tuner = tuner_at(path)
    assert tuner.run(todo, 60, said.append) == (4, 0)
    assert len(said) == 4 and tuner.refused == []
    made = _tuned.parse(path.read_text(), tuner.gpu, tuner.capability)
    assert len(made.configs) == 1 and len(made.routes) == 3
    data = json.loads(path.read_text())
    assert set(data["routes"][0]["microseconds"]) == {"triton", "aten"}
    assert set(data["configs"][0]["microseconds"]) == {str(list(t)) for t in ELEMENTWISE[True]}


def test_the_tuner_resumes_and_keeps_its_budget(tmp_path):
    path = tmp_path / "t.json"
    todo = [operation(), operation("add_relu"), operation(c=16), kernel_job()]
    assert tuner_at(path).run(todo, 0, str) == (0, 4)
    assert tuner_at(path).run(todo[:1], 60, str) == (1, 0)
    assert tuner_at(path).run(todo, 60, str) == (3, 0)
    assert tuner_at(path).run(todo, 60, str) == (0, 0)


def test_the_tuner_does_not_overwrite_a_foreign_table(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table()))
    with pytest.raises(_tuned.TableError, match="made on Test GPU"):
        tuner_at(path)
    assert json.loads(path.read_text()) == table()


def test_a_wrong_configuration_is_not_timed(tmp_path, monkeypatch):
    right = _trials.ratio

    def ratio(*given):
        return 9.0 if WIDEST in _tuned.active().configs.values() else right(*given)

    monkeypatch.setattr(_trials, "ratio", ratio)
    tuner = tuner_at(tmp_path / "t.json")
    tuner.run([kernel_job()], 60, str)
    assert len(tuner.refused) == 1 and str(list(WIDEST)) in tuner.refused[0]
    assert str(list(WIDEST)) not in tuner.configs[0]["microseconds"]


def test_where_nothing_is_right_the_default_stays_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(_trials, "ratio", lambda *given: float("nan"))
    path = tmp_path / "t.json"
    assert tuner_at(path).run([kernel_job(), operation()], 60, str) == (2, 0)
    assert json.loads(path.read_text())["configs"] == []
    assert tuner_at(path).run([kernel_job()], 60, str) == (0, 0)  # not tried again


@pytest.mark.slow
def test_every_route_of_a_block_is_checked_and_timed(tmp_path, monkeypatch):
    build = lambda: fastres.ResNet(50, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))  # noqa: E731
    work = workload(build, (2, 3, 64, 64), torch.float32, True)
    todo = [j for j in jobs(work) if j.what == "block"]
    assert [j.subject.name for j in todo] == ["layer1.1", "layer1.0"]
    tuner = tuner_at(tmp_path / "t.json")
    model = build().to(memory_format=torch.channels_last)
    assert tuner.run(todo, 300, str, model) == (2, 0) and tuner.refused == []
    found = {(r["op"], tuple(r["microseconds"])) for r in tuner.routes}
    assert found == {(op, _tuned.ROUTES[op]) for op in ("block_start", "block_end", "pair_end")}
    assert all(r["key"][0] == 9 and r["key"][3] == 4 for r in tuner.routes)
    # A route that is wrong is not timed.
    monkeypatch.setattr(_trials, "block_ratio", lambda *given: (9.0, "input"))
    again = tuner_at(tmp_path / "u.json")
    again.run(todo[:1], 300, str, model)
    assert again.routes == [] and len(again.refused) == 4


TINY = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), stem_channels=8, base_channels=8)


def test_routes_of_inference_are_checked_timed_and_followed(tmp_path, monkeypatch):
    """Every folded convolution of a pass, each on all its routes; a network then takes what the table says."""
    net = fastres.ResNet(50, **TINY).to(memory_format=torch.channels_last).eval()
    work = workload(lambda: fastres.ResNet(50, **TINY), (2, 3, 32, 32), torch.float32, True, train=False)
    todo = shares(jobs(work))
    assert [j.what for j in todo] == ["convolution"] * 4 + ["pair"]
    assert all(a.weight >= b.weight for a, b in zip(todo[:4], todo[1:4], strict=False))
    tuner = tuner_at(tmp_path / "t.json")
    assert tuner.run(todo, 60, str) == (5, 0) and tuner.refused == []
    assert {(r["op"], tuple(r["microseconds"])) for r in tuner.routes} == {
        (op, _tuned.ROUTES[op]) for op in ("folded_product", "folded_conv", "folded_pair")
    }
    assert tuner_at(tmp_path / "t.json").run(todo, 60, str) == (0, 0)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for op, route, count in (("folded_conv", "folded", 3), ("folded_product", "cudnn", 3 + 3 + 2)):
        forced = {k: route for k in tuner.table().routes if k[0] == op}
        with _tuned.using(_tuned.EMPTY._replace(routes=forced)):
            assert folded_routes(net, x)[0].count(route) == count, op
    # What is wrong is not timed.
    right = _trials.ways
    monkeypatch.setattr(
        _trials,
        "ways",
        lambda c, o: {n: lambda f=f, n=n: f() + (n == "cudnn") for n, f in right(c, o).items()},
    )
    again = tuner_at(tmp_path / "u.json")
    again.run(todo[:4], 60, str)
    assert len(again.refused) == 4 and all("cudnn" in line for line in again.refused)
    assert not any("cudnn" in r["microseconds"] for r in again.routes) and len(again.routes) == 4


def test_a_kernel_of_two_workloads_is_one_job():
    one, other = kernel_job(), kernel_job()
    more = other._replace(subject=other.subject._replace(calls={act_call(32): 2}), weight=3)
    small = kernel_job((1, 7, 6))._replace(weight=1)
    merged = shares([one], [more, small])
    assert [(j.name, j.weight) for j in merged] == [(one.name, 1.0), (small.name, 0.25)]
    assert merged[0].subject.calls == {act_call(): 3, act_call(32): 2}


def test_a_tie_keeps_the_default():
    def sample(median, spread):
        return tuning.Sample(median, median - spread, median + spread, median - spread, 9, 1)

    assert tuning._faster({"a": sample(1.0, 0.1), "b": sample(0.95, 0.1)}, "a") == "a"
    assert tuning._faster({"a": sample(1.0, 0.1), "b": sample(0.5, 0.1)}, "a") == "b"
    assert tuning._faster({}, "a") is None
    total = tuning._total([(sample(1.0, 0.1), 2), (sample(0.5, 0.0), 1)])
    assert total.median == 2.5 and total.low == pytest.approx(2.3)


@pytest.mark.slow
def test_a_workload_has_calls_of_all_forms_and_jobs_by_their_share():
    build = lambda: fastres.ResNet(50)  # noqa: E731
    work = workload(build, (2, 3, 224, 224), torch.bfloat16, True)
    ops = {c.op for c in work.calls}
    assert {"pointwise_end", "pointwise_p", "pointwise_dz", "pointwise_moments", "block_start_dgrad"} <= ops
    assert {"bn_add_relu", "bn_add_bn_relu", "bn_relu_max_pool", "batch_norm_stats"} <= ops
    todo = jobs(work)
    for what in ("operation", "block"):
        weights = [j.weight for j in todo if j.what == what]
        assert weights == sorted(weights, reverse=True) and weights
    assert len({j.name for j in todo}) == len(todo)
    assert sum(work.blocks.values()) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_judge_passes_the_reference_and_fails_a_fault(dtype):
    """Every operator of a step, on the inputs that the tuner makes for it."""
    tiny = dict(
        num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), stem_channels=8, base_channels=8
    )
    work = workload(lambda: fastres.ResNet(50, **tiny), (1, 3, 32, 32), dtype, True)
    for call in work.calls:
        args = _trials.inputs(call, CPU)
        plain, wide = _trials.references(call, args)
        got = _trials.outcome(call, args)
        if "fold" in call.op:  # of random moments, which are those of no data
            continue
        assert _trials.ratio(got, plain, wide, dtype) <= 1.0, call
        big = max((t for t in got if t.is_floating_point()), key=lambda t: t.numel())
        big[(0,) * big.dim()] += 10 * big.abs().max().item() + 1
        assert _trials.ratio(got, plain, wide, dtype) > 1.0, call


@pytest.mark.interpret
def test_kernels_are_found_by_launching_and_tuned(tmp_path):
    """The real launches: which kernels a call reaches, and that each configuration is run, checked and timed."""
    x = Spec((1, 16, 8, 8), (1024, 1, 128, 16), torch.float32)
    v, wf, out = (
        Spec((16,), (1,), torch.float32),
        Spec((64, 16), (16, 1), torch.float32),
        Spec((64,), (1,), torch.float32),
    )
    identity = Spec((1, 64, 8, 8), (4096, 1, 512, 64), torch.float32)
    end = Call(
        "pointwise_end", (x, v, v, v, v, 1e-5, True, wf, out, identity, None, None, None, 1, None, True)
    )
    stats = Call("batch_norm_stats", (x, v, v, 0.1))
    tuner = tuner_at(tmp_path / "t.json")
    todo = tuner.sites({end: 1, stats: 2})
    assert {(j.subject.kernel, j.subject.key) for j in todo} == {
        ("end", (0, 0, 6, 6, 4)),
        ("reduction", (1, 6, 4)),
    }
    assert tuner.run(todo, 300, str) == (2, 0) and tuner.refused == []
    by = {r["kernel"]: r for r in tuner.configs}
    assert set(by["reduction"]["microseconds"]) == {str(list(t)) for t in REDUCTION[True]}
    assert by["end"]["config"] == list(plan.GEMM["end"][False][0])


def test_command(tmp_path, capsys):
    arguments = ["tune", "--model", "resnet18", "--batch", "2", "--trial"]
    assert main(arguments) == 1
    assert "--trial wants --out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*arguments, "--out", str(tmp_path / "t.json")]) == 1
        assert "TRITON_INTERPRET=1" in capsys.readouterr().err
        assert main(["tune", "--model", "resnet18"]) == 1
        assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.interpret
def test_command_in_a_trial(tmp_path, capsys):
    path = tmp_path / "t.json"
    arguments = [
        "tune",
        "--batch",
        "1",
        "--size",
        "32",
        "--dtype",
        "fp32",
        "--trial",
        "--out",
        str(path),
        "--rounds",
        "1",
    ]
    assert main([*arguments, "--infer", "--budget", "60s"]) == 0
    assert "9 measured" in (said := capsys.readouterr().out) and "0 of 9 left" in said
    data = json.loads(path.read_text())
    assert {r["kernel"] for r in data["configs"]} == {"end", "elementwise"}
    assert {r["op"] for r in data["routes"]} == {"folded_product", "folded_conv", "folded_pair"}
