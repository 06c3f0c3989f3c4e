"""Timing, rows, report and the stages: the machinery, at tiny sizes."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import time
import types

import pytest
import torch

from benchmarks import declared, gpu, host, inductor, loading, profile, report, run
from benchmarks.bytes import measure
from benchmarks.cases import NAMES, REFERENCE, alternatives, blocks, by_cost, net_case, operations, wanted
from benchmarks.counted import counted
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
    (first, rows), _ = read(tmp_path)
    assert rows[0]["case"] == "x" and first["environment"]["torch"] == torch.__version__
    assert {"device", "commit", "date", "command"} <= set(first)
    (tmp_path / "z.jsonl").write_text('{"kind": "run"}\n{oops\n')
    with pytest.raises(ValueError, match=r"z\.jsonl:2"):
        list(read(tmp_path))


def arguments(tmp_path, *more):
    small = ["--suite", "operations", "--batch", "2", "--scale", "14", "--rounds", "1", "--region", "0.001s"]
    return [*small, "--mode", "infer", "--out", str(tmp_path), *more]


def test_runner_writes_rows_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "gate", lambda device: [])
    monkeypatch.setattr(run, "commit", lambda: "abc")
    monkeypatch.setattr("benchmarks.rows.commit", lambda: "abc")
    assert run.main(arguments(tmp_path)) == 0
    ((_, rows),) = read(tmp_path)
    count = 4 * len(operations(2))
    assert len(rows) == count and all(r["median_s"] > 0 and r["alternative"] in NAMES for r in rows)
    assert len({key(r) for r in rows}) == count
    assert all(r["bytes"] > 0 and r["reference_s"] > 0 for r in rows)
    assert all(r["reference_s"] == r["median_s"] for r in rows if r["alternative"] == REFERENCE)
    assert run.main(arguments(tmp_path)) == 0
    assert [len(rows) for _, rows in read(tmp_path)] == [count, 0]
    with _tuned.using(_tuned.EMPTY._replace(source="a table")):  # other kernels than before
        assert run.main(arguments(tmp_path)) == 0
    monkeypatch.setattr(run, "commit", lambda: "abc+")  # changed files: old rows say nothing about them
    assert run.main(arguments(tmp_path)) == 0
    assert [len(rows) for _, rows in read(tmp_path)] == [count, 0, count, count]


def test_groups_are_timed_by_cost_and_none_begins_late(tmp_path):
    every = wanted(net_case("resnet50", 2), torch.device("cuda"), True, True)
    assert {n for n, a in NAMES.items() if a.norm in ("BN", "FusedBN")} <= set(every)
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
    assert "profile resnet50 batch 256 bf16 A GPU" in pictures and report.NOT_MEASURED not in text
    assert "-50.0%" in text and all(png.startswith(b"\x89PNG") for png in pictures.values())


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
        assert set(todo) == set(gpu.STAGES)
        for steps in todo.values():
            assert all(0 < s.share <= 1 and s.command for s in steps)


def test_a_stage_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    marker = tmp_path / "marker"
    fine = ["python3", "-c", f"open({str(marker)!r}, 'a').write('x')"]
    steps = [
        gpu.Step("fine", fine), gpu.Step("broken", ["python3", "-c", "raise SystemExit(3)"]),
        gpu.Step("slow", ["python3", "-c", "import time; time.sleep(30)"], 0.05),
        gpu.Step("absent", ["nothing"], 1.0, "a-program-that-is-not-here"),
    ]  # fmt: skip
    said = []
    out = tmp_path / "out"
    assert not gpu.run_stage(9, steps, out, 20, False, said.append)
    assert "failed with 3" in said[1] and "stopped after" in said[2] and "not on the PATH" in said[3]
    assert not gpu.run_stage(9, steps[:2], out, 20, False, said.append)
    assert marker.read_text() == "x" and "done before" in said[4]
    monkeypatch.setattr(gpu, "commit", lambda: "abc+")
    assert gpu.run_stage(9, steps[:1], out, 20, False, said.append)
    assert marker.read_text() == "xx"
    assert json.loads((out / "stage9.json").read_text())["broken"]["result"] == "failed with 3"


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


@pytest.mark.interpret
def test_a_fused_bottleneck_launches_fewer_kernels_than_eager():
    """A block of this package's kernels, counted where they are launched, against eager's passes on a GPU."""
    eager, fused = host.blocks("BN"), host.blocks("FusedBN")
    for name in eager:
        ours, theirs = host.launches(fused[name], True), host.launches(eager[name], False)
        assert 10 < ours < theirs, name


def in_this_process(command, stdout, **options):
    """Stands for subprocess.run: the same program with the same arguments, without another import of torch."""
    if options.get("env", {}).get("TRITON_INTERPRET"):  # which is read when Triton is imported
        return subprocess.run(command, stdout=stdout, **options)
    module, arguments = command[2], command[3:]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
        if module == "pytest":  # no test in a test
            print(f"pytest {arguments}")
            code = 0
        else:
            name = "fastres.cli" if module == "fastres" else module
            code = importlib.import_module(name).main(arguments)
    return subprocess.CompletedProcess(command, code)


def test_dry_run_of_every_stage(tmp_path, monkeypatch, capsys):
    """All five stages on this device at tiny sizes, through the arguments that a GPU run would give."""
    programs = types.SimpleNamespace(
        run=in_this_process, STDOUT=None, TimeoutExpired=subprocess.TimeoutExpired
    )
    monkeypatch.setattr(gpu, "subprocess", programs)
    monkeypatch.setattr(gpu.shutil, "which", lambda program: None)
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
    assert text.count(": ok") == 15 and text.count("not run: compute-sanitizer") == 2
    assert (tmp_path / "report.html").stat().st_size > 50_000 and (tmp_path / "profile.txt").exists()
    assert _tuned.SCHEMA == json.loads((tmp_path / "tuned.json").read_text())["schema"]
    for stage in gpu.STAGES:
        log = (tmp_path / f"stage{stage}.log").read_text()
        assert "Traceback" not in log and "failed" not in log.replace("0 failed", "")
    suites = [head["suite"] for head, rows in read(tmp_path) if rows]
    assert sorted(suites) == [
        "blocks", "ceilings", "host", "loading", "networks", "networks", "operations", "profile",
    ]  # fmt: skip


@pytest.mark.slow
def test_dry_run_of_a_stage_in_processes_of_its_own(tmp_path, capsys):
    assert gpu.main(["--stage", "5", "--dry", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert "batch_norm_act" in (tmp_path / "stage5.log").read_text()


def test_a_gpu_run_wants_a_gpu_and_a_dry_run_its_own_folder(capsys):
    if not torch.cuda.is_available():
        assert gpu.main(["--stage", "1"]) == 1
        assert "no CUDA device" in capsys.readouterr().err
    assert gpu.main(["--stage", "1", "--dry"]) == 1
    assert "--dry wants --out" in capsys.readouterr().err
