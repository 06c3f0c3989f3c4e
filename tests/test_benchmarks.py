"""Timing, rows, report and the stages: the machinery, at tiny sizes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
import types

import pytest
import torch

from benchmarks import declared, gpu, host, inductor, loading, pictures, profile, report, resume, run
from benchmarks.bytes import block_of, measure
from benchmarks.cases import NAMES, REFERENCE, alternatives, blocks, by_cost, net_case, operations, wanted
from benchmarks.counted import counted
from benchmarks.layers import layers_ms
from benchmarks.meter import trace
from benchmarks.nets import NETWORKS, network
from benchmarks.rows import Writer, key, read
from fastres._timing import interleaved, summary
from fastres.kernels import _tuned

CPU = torch.device("cpu")


def test_alternatives_are_timed_in_turn():
    order = []
    samples = interleaved(
        {n: lambda i, n=n: order.append((n, i)) for n in "ab"}, CPU, rounds=3, region=0.0, warmup=0
    )
    timed = order[2:]  # one call of each to find the number of calls
    assert [n for n, _ in timed] == ["a", "b"] * 3 and [i for n, i in timed if n == "a"] == [0, 1, 2]
    assert samples["a"].rounds == 3


def test_medians_and_spread():
    s = summary([3.0, 1.0, 2.0, 5.0, 4.0], 7)
    assert (s.median, s.low, s.high, s.least, s.rounds, s.calls) == (3.0, 2.0, 4.0, 1.0, 5, 7)
    assert s.spread == pytest.approx(2 / 3)
    sleeps = {"long": lambda i: time.sleep(0.004), "short": lambda i: time.sleep(0.001)}
    found = interleaved(sleeps, CPU, rounds=5, region=0.0, warmup=0)
    assert found["long"].median > found["short"].median


@pytest.mark.parametrize("train", [True, False])
def test_alternatives_compute_the_same(train):
    for case in (*operations(2, 14), *blocks(2, 14)):
        ready, failed = alternatives(case, wanted(case, CPU, False, False), CPU, torch.float32, train)
        assert failed == {} and len(ready) == 4
        found = {n: call(0) for n, call in ready.items()}
        expected = found.pop("eager")
        for name, got in found.items():
            pairs = zip(got, expected, strict=True) if train else [(got, expected)]
            for a, b in pairs:
                torch.testing.assert_close(
                    a, b, rtol=2e-3, atol=2e-3, msg=lambda m, n=name, c=case.name: f"{c} {n}: {m}"
                )


def test_an_alternative_that_cannot_be_made_costs_only_its_row():
    case = net_case("resnet18", 1, 32)._replace(build=lambda kind: 1 / 0)
    ready, failed = alternatives(case, ["eager", "fastres"], CPU, torch.float32, False)
    assert ready == {} and failed["eager"].startswith("ZeroDivisionError")


def test_rows_are_never_overwritten(tmp_path):
    a, b = Writer(tmp_path, "operations", CPU), Writer(tmp_path, "operations", CPU)
    assert a.path != b.path
    a.row(case="x", alternative="eager", median_s=1.0)
    a.close()
    b.close()
    ((first, rows),) = read(tmp_path)
    assert not b.path.exists()  # nothing was measured
    assert rows[0]["case"] == "x" and first["environment"]["torch"] == torch.__version__
    assert {"device", "commit", "date", "command"} <= set(first)
    (tmp_path / "z.jsonl").write_text('{"kind": "run"}\n{oops\n')
    with pytest.raises(ValueError, match=r"z\.jsonl:2"):
        list(read(tmp_path))


def arguments(tmp_path, *more):
    small = ["--suite", "operations", "--batch", "2", "--scale", "14", "--rounds", "1", "--region", "0.001s"]
    names = ["--alternatives", REFERENCE, "fastres channels_last"]
    return [*small, "--mode", "infer", "--out", str(tmp_path), *names, *more]


def test_runner_writes_rows_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "gate", lambda device: [])
    monkeypatch.setattr(run, "commit", lambda: "abc")
    monkeypatch.setattr("benchmarks.rows.commit", lambda: "abc")
    assert run.main(arguments(tmp_path)) == 0
    ((_, rows),) = read(tmp_path)
    count = 2 * len(operations(2))
    assert len(rows) == count and all(r["median_s"] > 0 and r["alternative"] in NAMES for r in rows)
    assert len({key(r) for r in rows}) == count
    assert all(r["bytes"] > 0 and r["reference_s"] > 0 for r in rows)
    assert all(r["reference_s"] == r["median_s"] for r in rows if r["alternative"] == REFERENCE)
    assert run.main(arguments(tmp_path)) == 0
    assert [len(rows) for _, rows in read(tmp_path)] == [count]  # and no file without a row
    with _tuned.using(_tuned.EMPTY._replace(source="a table")):  # other kernels than before, the same eager
        assert run.main(arguments(tmp_path)) == 0
    assert [len(rows) for _, rows in read(tmp_path)] == [count, count // 2]
    assert all(r["alternative"].startswith("fastres") for r in list(read(tmp_path))[1][1])
    monkeypatch.setattr(run, "commit", lambda: "abc+")  # changed files: old rows say nothing about them
    assert run.main([*arguments(tmp_path), "--suite", "blocks", "operations"]) == 0
    assert [len(rows) for _, rows in read(tmp_path)] == [count, count // 2, count + 2 * len(blocks(2))]
    assert {r["suite"] for r in list(read(tmp_path))[2][1]} == {"blocks", "operations"}


def test_groups_are_timed_by_cost_and_none_begins_late(tmp_path):
    every = wanted(net_case("resnet50", 2), torch.device("cuda"), True, True)
    costly = {"compile max-autotune", "compile graph", "compile max-autotune graph"}
    assert {n for n, a in NAMES.items() if a.norm in ("BN", "FusedBN")} - set(every) == costly
    groups = by_cost(every)
    assert sorted(n for g in groups for n in g) == sorted(every)
    assert [{NAMES[n].how for n in g} for g in groups] == [{""}, {"compile"}, {"compile-max"}]
    case, same = operations(2, 14)[0], dict(rounds=1, region=0.0)
    writer = Writer(tmp_path, "operations", CPU)
    names = ["eager", "fastres"]
    assert run.measure(writer, case, names, CPU, "fp32", False, set(), stop=0.0, **same) == ([], 2)
    rows, left = run.measure(writer, case, names, CPU, "fp32", False, set(), stop=float("inf"), **same)
    assert [r["alternative"] for r in rows] == names and left == 0


def test_counted_bytes_of_cases():
    """The moment form's operation moves fewer bytes than eager's; a compiled one is the model's."""
    gpu_like = types.SimpleNamespace(type="cuda")
    case = next(c for c in operations(64) if c.name.startswith("1x1 to block end 64"))
    eager, ours, compiled = (
        counted(case, n, "bf16", True, gpu_like)
        for n in ("eager channels_last", "fastres channels_last", "compile channels_last")
    )
    assert ours["bytes"] < compiled["bytes"] < eager["bytes"]
    y = 64 * 64 * 56 * 56 * 2
    act = counted(operations(64)[0], "eager channels_last", "bf16", True, gpu_like)
    assert act["bytes"] == pytest.approx((5 + 3 + 5) * y, rel=1e-3)  # stats, apply, ReLU; mask; sums, apply
    assert counted(net_case("resnet50", 2), "timm channels_last", "bf16", True, CPU) == {}
    assert counted(net_case("resnet18", 2, 32), "eager", "fp32", False, CPU)["bytes"] > 0


def test_nothing_is_timed_without_parity(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "gate", lambda device: ["batch norm: 2.0"])
    assert run.main(arguments(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [] and "nothing is timed" in capsys.readouterr().err


def rows_of(device, commit, median, alternative="fastres channels_last"):
    head = dict(
        kind="run", device=device, commit=commit, date="2030-01-02T00:00:00", suite="networks", file=commit
    )
    row = dict(
        kind="row", suite="networks", case="resnet50", alternative=alternative, batch=256, size=224, dtype="bf16",
        mode="train", median_s=median, q25_s=median, q75_s=median, min_s=median, rounds=5, calls=1,
        images_per_s=256 / median, peak_bytes=2**33, reference_s=0.75, bytes=10**11, flops=6 * 10**12,
    )  # fmt: skip
    return head, [row]


def test_readme_table_shows_what_is_missing(tmp_path):
    table = report.readme_table([])
    assert table.count(report.NOT_MEASURED) == len(report.README_ROWS) * len(report.README_COLUMNS)
    assert "no GPU row yet" in table
    assert report.readme_table([rows_of("cpu", "a", 0.5)]) == table  # a CPU's rows are not the README's
    table = report.readme_table([rows_of("A GPU", "a", 0.5), rows_of("A GPU", "b", 0.25)])
    assert "1,024" in table and "512" not in table and "A GPU at b" in table
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.write_readme(path, table) and not report.write_readme(path, table)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "1,024" in text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="has no"):
        report.write_readme(path, table)


def test_page_has_pictures_changes_and_gaps():
    count = measure("resnet18", 2, "bf16", True, size=64)
    text, pictures = report.page([], count, "resnet50", 256, "bf16", 4e12, 8e14)
    assert set(pictures) == {"waterfall", "bounds"} and text.count("data:image/png;base64,") == 2
    assert text.count(report.NOT_MEASURED) == 4  # GPU, limits, host, change
    runs = [
        rows_of("A GPU", "a", 0.5),
        rows_of("A GPU", "b", 0.25),
        rows_of("A GPU", "b", 0.75, "eager channels_last"),
    ]
    text, pictures = report.page(runs, count, "resnet50", 256, "bf16", 4e12, 8e14)
    assert {"speed networks A GPU", "memory networks A GPU", "roofline A GPU"} <= set(pictures)
    same = dict(kind="row", case="resnet50", batch=256, size=224, dtype="bf16", mode="train")
    limit = [
        dict(same, case="copy", rate=4e12, unit="B/s"),
        dict(same, case="matmul", rate=7e14, unit="flop/s"),
    ]
    kinds = [dict(same, alternative="eager channels_last", kinds_ms={"convolution": 3.0, "batch norm": 2.0})]
    overhead = [dict(same, alternative="fastres channels_last", launches=7, median_s=1e-3)]
    more = [
        (dict(runs[0][0], suite=s), rows)
        for s, rows in (("ceilings", limit), ("profile", kinds), ("host", overhead))
    ]
    assert report.limits(more, "A GPU") == (4e12, 7e14) and report.limits(more, "cpu") == (None, None)
    text, pictures = report.page([*runs, *more], count, "resnet50", 256, "bf16", 4e12, 8e14)
    assert "profile resnet50 batch 256 bf16 A GPU" in pictures
    assert text.count(report.NOT_MEASURED) == 1 and "time by block: not measured" in text
    assert "-50.0%" in text and all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_change_is_against_the_commit_measured_before():
    """The newest row of each commit; a commit that is measured again is the newest. Overlapping quartiles are said."""
    runs = [rows_of("A GPU", c, m) for c, m in (("a", 0.5), ("b", 0.25), ("c", 0.125), ("b", 1.0))]
    runs += [rows_of("A GPU", "c", 9.0, "eager"), rows_of("Another", "c", 9.0)]
    ((name, before, after, old, new, apart),) = report.changes(runs)
    assert (before, after, old, new, apart) == ("c", "b", 125.0, 1000.0, True)
    assert name == "resnet50 train bf16 batch 256, fastres channels_last, A GPU"
    wide = rows_of("A GPU", "d", 0.9)
    wide[1][0] |= dict(q25_s=0.8, q75_s=1.1)
    assert report.changes([*runs, wide])[0][2:] == ("d", 1000.0, 900.0, False)
    assert report.changes(runs[:1]) == []


def test_alternatives_that_only_inference_has_are_drawn():
    row = dict(median_s=1.0, reference_s=2.0)
    one = {("cpu", "inference", "resnet18", 1, 64, "fp32", "infer"): {"eager channels_last": row}}
    more = {k: {**g, "eager folded channels_last": row} for k, g in one.items()}
    assert pictures.bars(one, pictures.speed, "x", "t") != pictures.bars(more, pictures.speed, "x", "t")


def test_rates_keep_their_digits():
    wanted = {4.3e12: "4.3 TB/s", 34.94e9: "34.9 GB/s", 5e6: "5 MB/s", 12.0: "12 B/s"}
    assert {v: pictures.rate(v, "B/s") for v in wanted} == wanted


def test_a_step_is_measured_layer_by_layer_and_drawn_beside_its_bound():
    """Each layer forward and backward, of eager and fastres in turn; the picture adds what the profile measured."""
    found = layers_ms("resnet18", ["BN", "FusedBN"], 2, 32, "fp32", CPU, steps=1)
    norm = dict(BN="eager", FusedBN="fastres")
    named = {n for n, _ in network("resnet18", "BN").backbone.named_modules() if "conv" in n or "bn" in n}
    for times in found.values():
        assert named <= set(times) and {"fc", "optimizer"} <= set(times)
        assert all(ms > 0 for phases in times.values() for ms in phases.values())
        assert set(times["layer1.0.conv1"]) == {"forward", "backward"} and set(times["optimizer"]) == {
            "optimizer"
        }
        assert next(iter(times)) == "conv1"
        assert "backward" not in times.get(
            "other", {}
        )  # what has no parameter belongs to the layer that it reads
    head = dict(kind="run", device="cpu", commit="a", date="2030-01-02T00:00:00", suite="profile", file="f")
    same = dict(kind="row", case="resnet18", batch=2, size=32, dtype="fp32", mode="train")
    rows = [dict(same, alternative=f"{norm[n]} channels_last", layers_ms=t) for n, t in found.items()]
    count = measure("resnet18", 2, "fp32", True, size=32)
    rows += [
        {**same, **r}
        for r in (dict(case="copy", rate=3e10, unit="B/s"), dict(case="matmul", rate=5e10, unit="flop/s"))
    ]
    text, drawn = report.page([(head, rows)], count, "resnet18", 2, "fp32", 4e12, 8e14)
    assert "time by block" not in text.split("<h2>cpu")[1]
    title = "resnet18 batch 2 fp32: a training step on cpu, block by block"
    assert drawn["waterfall resnet18 batch 2 fp32 cpu"] != pictures.layers(
        {r["alternative"]: r["layers_ms"] for r in rows[:2]}, {}, "", title
    )
    least = report._least(rows[0], "cpu", 3e10, 5e10)
    assert sum(least.values()) == pytest.approx(
        sum(p.seconds(3e10, 5e10) for p in trace("resnet18", "BN", 2, "fp32", True, True, 32, False).passes)
        * 1e3
    )
    assert set(least) <= {block_of(n) for n in found["BN"]}


def test_declared_bytes_meet_the_profile():
    found = declared.operators(CPU, (2, 16, 8, 8))
    assert all(d["declared"] for d in found)
    assert {"batch_norm_act", "bn_add_relu", "bn_relu_max_pool", "pointwise_end"} <= {d["op"] for d in found}
    act = next(d for d in found if d["op"] == "batch_norm_act")
    assert act["bytes"] == 2 * (2 * 16 * 64) * 2 + 4 * 16 * 4
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== noise", header]
    for i, (name, read_, write) in enumerate(
        [
            ("lshift_kernel", 1, 1),
            ("act_kernel", 4000, 4000),
            ("merge", 0, 40),
            ("lshift_kernel", 1, 1),
            ("other", 9, 9),
        ]
    ):
        for metric, value in zip(declared.METRICS, (read_, write, 5), strict=True):
            lines.append(f'"{i}","{name}","{metric}","byte","{value:,}"')
    (segment,) = declared.measured(lines)
    assert segment == {"bytes": 8040.0, "kernels": 2}
    text = declared.compare([dict(op="batch_norm_act", bytes=8040)], [segment])
    assert "1.00" in text
    with pytest.raises(ValueError, match="1 operators, the program ran 2"):
        declared.compare(found[:2], [segment])


def test_stages_fit_their_limit_and_name_real_programs(tmp_path):
    for dry in (True, False):
        todo = gpu.stages(tmp_path, dry, 480.0)
        assert set(todo) == {0, *gpu.STAGES}
        for steps in todo.values():
            assert all(0 < s.share <= 1 and s.command for s in steps)


def test_a_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    marker = tmp_path / "marker"
    fine = ["python3", "-c", f"open({str(marker)!r}, 'a').write('x')"]
    child = tmp_path / "child"  # number of a process that a step has started, which must end with the step
    steps = [
        gpu.Step("fine", fine), gpu.Step("broken", ["python3", "-c", "raise SystemExit(3)"]),
        gpu.Step("slow", ["sh", "-c", f"sleep 30 & echo $! > {child}; wait"], 0.05),
        gpu.Step("absent", ["nothing"], 1.0, "a-program-that-is-not-here"),
    ]  # fmt: skip
    said = []
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "_path", lambda: os.environ["PATH"])
    assert not gpu.run_stage(9, steps, out, 20, False, said.append)
    assert "failed with 3" in said[1] and "stopped after" in said[2] and "not on the PATH" in said[3]
    assert not gpu.run_stage(9, steps[:2], out, 20, False, said.append)
    assert marker.read_text() == "x" and "done before" in said[4]
    monkeypatch.setattr(gpu, "commit", lambda: "abc+")
    assert gpu.run_stage(9, steps[:1], out, 20, False, said.append)
    assert marker.read_text() == "xx"
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    assert gpu.run_stage(9, [steps[0]._replace(resumes=True)], out, 20, False, said.append)
    assert marker.read_text() == "xxx"  # keeps its own books, so it is asked again
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the system may take a moment to clear it away
            os.kill(int(child.read_text()), 0)
            time.sleep(0.05)
    assert json.loads((out / "stage9.json").read_text())["broken"]["result"] == "failed with 3"


def collected(*arguments):
    """Ids of the benchmarks that a run would time, and the options in force."""
    seen = types.SimpleNamespace(ids=[], option=None)

    class Collector:
        def pytest_collection_finish(self, session):
            seen.ids, seen.option = [i.nodeid.split("::")[1] for i in session.items], session.config.getoption

    command = ["benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    assert pytest.main(command, plugins=[Collector()]) == 0
    return seen


def test_the_whole_matrix_is_reachable(capsys):
    """Every cell that is to be measured is a benchmark of its own, and every baseline an alternative of it."""
    from benchmarks.conftest import names_of

    seen = collected("--bench-all")
    cells = [f"[batch{b}-{d}-" for b in (1, 8, 32, 256, 400) for d in ("bf16", "fp16", "fp32")]
    cases = {"bench_operation": operations(1), "bench_block": blocks(1)}
    wanted_ids = {
        *(
            f"{f}{c}{k.name}-{m}]"
            for f, ks in cases.items()
            for c in cells
            for k in ks
            for m in ("train", "infer")
        ),
        *(f"bench_network{c}{n}-{m}]" for c in cells for n in NETWORKS for m in ("train", "infer")),
        *(f"bench_loading{c}{n}]" for c in cells for n in NETWORKS),
    }
    assert set(seen.ids) == wanted_ids and len(seen.ids) == len(wanted_ids)
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnetv1d50", "resnext50"} <= set(
        NETWORKS
    )
    assert set(names_of(net_case("resnet50", 8), CPU, seen.option)) == set(NAMES)
    options = {"network": "resnet50", "dtype": "fp16", "batch": "8", "alternatives": "timm channels_last"}
    asked = [part for name, value in options.items() for part in (f"--bench-{name}", value)]
    one = collected(*asked, "-k", "network and infer")
    assert one.ids == ["bench_network[batch8-fp16-resnet50-infer]"]
    asked = names_of(net_case("resnet50", 8), CPU, one.option)
    assert asked == [REFERENCE, "timm channels_last", "fastres channels_last"]
    eager = {(a.channels_last, a.how, a.graph) for a in NAMES.values() if a.norm == "BN"}
    hows = ("", "compile", "compile-max")
    assert eager == {(c, h, g) for c in (True, False) for h in hows for g in (True, False)}
    capsys.readouterr()


def test_cells_are_timed_and_written(tmp_path, monkeypatch, capsys):
    """Through pytest-benchmark, at tiny sizes: an operation, a block and a loader."""
    from benchmarks import conftest

    monkeypatch.setattr(conftest, "gate", lambda device: [])
    monkeypatch.setattr(conftest, "RESULTS", [])
    monkeypatch.setattr(loading, "WORKERS", 0)
    chosen = "(stem and train) or (BasicBlock and 128 and infer)"
    small = ["--bench-rounds", "2", "--bench-size", "32", "--bench-out", str(tmp_path)]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in one
    small += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = ["benchmarks", "-q", *small, "-k", f"{chosen} or (loading and resnet18)",
               "--bench-alternatives", "eager", "eager graph"]  # fmt: skip
    assert pytest.main(command) == 0
    text = capsys.readouterr().out
    assert "3 passed" in text and "medians in ms" in text
    ((head, rows),) = read(tmp_path)
    by = {}
    for r in rows:
        by.setdefault((r["suite"], r["mode"]), {})[r["alternative"]] = r
    timed = {("operations", "train"), ("blocks", "infer")}
    assert set(by) == {*timed, ("loading", "load"), ("loading", "train"), ("loading", "load+train")}
    for what in timed:
        assert set(by[what]) == {REFERENCE, "eager", "eager graph", "fastres channels_last"}
        good = [r for r in by[what].values() if "error" not in r]
        assert len(good) > 2
        for r in good:
            assert r["rounds"] >= 2 and r["reference_s"] > 0 and r["bytes"] > 0, r


def test_tests_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    class Item:
        def __init__(self, nodeid):
            self.nodeid = nodeid

    out = []
    config = types.SimpleNamespace(
        hook=types.SimpleNamespace(pytest_deselected=lambda items: out.extend(items))
    )
    monkeypatch.setattr(resume, "commit", lambda: "abc")
    path = tmp_path / "out" / "passed.txt"

    def left():
        items = [Item("a"), Item("b"), Item("c")]
        plugin = resume.Passed(path)
        plugin.pytest_collection_modifyitems(config, items)
        return plugin, [i.nodeid for i in items]

    plugin, todo = left()
    assert todo == ["a", "b", "c"]
    for nodeid, when, passed in (("a", "call", True), ("b", "call", False), ("c", "setup", True)):
        plugin.pytest_runtest_logreport(types.SimpleNamespace(nodeid=nodeid, when=when, passed=passed))
    assert left()[1] == ["b", "c"] and [i.nodeid for i in out] == ["a"]
    monkeypatch.setattr(resume, "commit", lambda: "abd")
    assert left()[1] == ["a", "b", "c"]


def test_kinds_of_kernels():
    names = {
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW": "batch norm", "sm90_xmma_fprop_implicit_gemm_bf16": "convolution",
        "nvjet_tst_128x64": "convolution", "triton_poi_fused_relu_1": "compiled", "end_reduce_kernel": "fastres",
        "p_kernel": "fastres", "void at::native::vectorized_elementwise_kernel<8>": "elementwise",
        "void multi_tensor_apply_kernel": "optimizer", "void at::native::max_pool_forward_nhwc": "pooling",
        "something": "other", "aten::native_batch_norm": "batch norm", "aten::mkldnn_convolution": "convolution",
    }  # fmt: skip
    assert {n: profile.kind(n) for n in names} == names


def test_inductor_kernels_from_a_profile():
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [header]
    for i, (name, bytes_) in enumerate([("triton_red_0", 5), ("triton_poi_1", 7), ("triton_red_0", 4000)]):
        for metric in declared.METRICS:
            lines.append(f'"{i}","{name}","{metric}","Kbyte","{bytes_:,}"')
    found = inductor.generated(lines)
    assert list(found) == ["triton_poi_1", "triton_red_0"]
    assert found["triton_red_0"] == {"read": 4e6, "written": 4e6, "runs": 2}
    case = operations(2, 8)[0]
    text = "\n".join(inductor.report(case, found, "fp32", CPU))
    assert "model" in text and "generated kernels together 8.0 MB" in text
    assert "not measured" in "\n".join(inductor.report(case, None, "fp32", CPU))


def test_loader_and_step_are_kept_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "gate", lambda device: [])
    small = ["--batch", "2", "--size", "32", "--steps", "2", "--workers", "0", "--out", str(tmp_path)]
    assert loading.main(small) == 0
    ((_, rows),) = read(tmp_path)
    sides = [("eager", "train"), ("eager", "load+train"), ("fastres", "train"), ("fastres", "load+train")]
    assert [(r["alternative"].split()[0], r["mode"]) for r in rows] == [("loader", "load"), *sides]
    assert all(r["rounds"] == 2 and r["images_per_s"] > 0 for r in rows)
    x, label = loading.Images(4, 32)[1]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and label == 1


@pytest.mark.aot
def test_a_fused_bottleneck_launches_fewer_kernels_than_eager():
    """A block of this package's kernels, counted where they are launched, against eager's passes on a GPU."""
    eager, fused = host.blocks("BN"), host.blocks("FusedBN")
    for name in eager:
        ours, theirs = host.launches(fused[name], True), host.launches(eager[name], False)
        assert 10 < ours < theirs, name


def in_this_process(step, log, timeout, otherwise=gpu._run):
    """Stands for a process: the same program with the same arguments, without another import of torch."""
    if ("TRITON_INTERPRET", "1") in step.env:  # which is read when Triton is imported
        return otherwise(step, log, timeout)
    module, arguments = step.command[2], step.command[3:]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if module == "pytest":  # no test in a test
            print(f"pytest {arguments}")
            code = 0
        else:
            name = "fastres.cli" if module == "fastres" else module
            code = importlib.import_module(name).main(arguments)
    return "failed" if code else "ok"


def test_dry_run_of_every_stage(tmp_path, monkeypatch, capsys):
    """All five stages on this device at tiny sizes, through the arguments that a GPU run would give."""
    monkeypatch.setattr(gpu, "_run", in_this_process)
    monkeypatch.setattr(gpu.shutil, "which", lambda program, path=None: None)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    for module in (run, loading):
        monkeypatch.setattr(module, "gate", lambda device: [])
    before = 0
    for stage in gpu.STAGES:
        assert gpu.main(["--dry", "--stage", str(stage), "--out", str(tmp_path)]) == 0, (
            capsys.readouterr().out
        )
        files = len(list(tmp_path.iterdir()))
        assert files - before <= 8
        before = files
    text = capsys.readouterr().out
    assert text.count(": ok") == 16 and text.count("not run: compute-sanitizer is not on the PATH") == 2
    assert "ncu bytes: not run: ncu is not on the PATH" in text
    assert (tmp_path / "report.html").stat().st_size > 50_000 and (tmp_path / "profile.txt").exists()
    assert _tuned.SCHEMA == json.loads((tmp_path / "tuned.json").read_text())["schema"]
    for stage in gpu.STAGES:
        log = (tmp_path / f"stage{stage}.log").read_text()
        assert "Traceback" not in log and "failed" not in log.replace("0 failed", "")
    suites = [head["suite"] for head, rows in read(tmp_path) if rows]
    assert sorted(suites) == [
        "blocks-operations", "ceilings", "host", "inference", "loading", "networks", "networks", "profile", "profile",
    ]  # fmt: skip
    layered = [r["alternative"] for _, rows in read(tmp_path) for r in rows if "layers_ms" in r]
    assert sorted(layered) == ["eager channels_last"] * 2 + ["fastres channels_last"]


def test_dry_run_of_the_short_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_run", in_this_process)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    monkeypatch.setattr(run, "gate", lambda device: [])
    assert gpu.main(["--dry", "--stage", "0", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(": ok") == 6
    assert len(list(tmp_path.iterdir())) <= 8
    assert sorted(head["suite"] for head, rows in read(tmp_path) if rows) == [
        "inference",
        "networks",
        "profile",
    ]
    rows = [r for _, rows in read(tmp_path) for r in rows if "images_per_s" in r]
    assert {"eager channels_last", "fastres channels_last"} <= {r["alternative"] for r in rows}


@pytest.mark.slow
def test_dry_run_of_a_step_in_a_process_of_its_own(tmp_path):
    said = []
    step = next(s for s in gpu.stages(tmp_path, True, 480.0)[5] if s.name == "declared bytes")
    assert gpu.run_stage(5, [step], tmp_path, 480.0, False, said.append), said
    assert "batch_norm_act" in (tmp_path / "stage5.log").read_text()


def test_a_gpu_run_wants_a_gpu_and_a_dry_run_its_own_folder(capsys):
    if not torch.cuda.is_available():
        assert gpu.main(["--stage", "1"]) == 1
        assert "no CUDA device" in capsys.readouterr().err
    assert gpu.main(["--stage", "1", "--dry"]) == 1
    assert "--dry wants --out" in capsys.readouterr().err
