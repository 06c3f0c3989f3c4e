"""The inference benchmark: rows for every way, percentiles at batch 1, and nothing timed that differs from eager."""

from __future__ import annotations

import torch

from benchmarks import inference
from benchmarks.rows import read


def test_rows_for_every_way(tmp_path, capsys):
    small = ["--model", "resnet18", "--batch", "1", "2", "--size", "32", "--budget", "1s", "--device", "cpu"]
    assert inference.main([*small, "--dtype", "fp32", "--no-compile", "--out", str(tmp_path)]) == 0
    ((head, rows),) = read(tmp_path)
    assert head["suite"] == "inference"
    ways = ["eager", "eager channels_last", "eager folded channels_last", "fastres", "fastres channels_last"]
    for batch in (1, 2):
        found = [r for r in rows if r["batch"] == batch]
        assert [r["alternative"] for r in found] == ways
        assert all(
            ("p99_s" in r) == (batch == 1) and r["q25_s"] <= r["median_s"] <= r["q75_s"] for r in found
        )
        assert all(r["first_call_s"] > 0 and r["rounds"] >= 3 for r in found)
        assert len({r["reference_s"] for r in found}) == 1 and found[1]["reference_s"] == found[1]["median_s"]
    text = capsys.readouterr().out
    assert "resnet18, batch 2" in text and "p50/p90/p99" in text


def test_what_differs_is_not_timed(monkeypatch):
    x = torch.randn(1, 3, 32, 32)
    calls = {"eager": lambda: x, "fastres": lambda: x * 1.1, "broken": lambda: 1 / 0}
    monkeypatch.setattr(inference, "ways", lambda *a: calls)
    rows = {r["alternative"]: r for r in inference.measure("resnet18", x, False, 0.1)}
    assert "median_s" in rows["eager"] and "differs from eager" in rows["fastres"]["error"]
    assert "ZeroDivisionError" in rows["broken"]["error"] and "median_s" not in rows["fastres"]
    assert any("not timed" in line for line in inference.lines(list(rows.values())))


def test_rows_come_before_anything_is_compiled(monkeypatch):
    """So that a run that is stopped while compiling has them; each compiled way is in turn with eager and fastres."""
    x, called = torch.randn(2, 3, 32, 32), []

    def way(name):
        return lambda: called.append(name) or x

    names = ["eager channels_last", "fastres channels_last", "compile a", "compile b"]
    monkeypatch.setattr(inference, "ways", lambda *a: {n: way(n) for n in names})
    rows = inference.measure("resnet18", x, True, 0.01)
    assert [next(rows)["alternative"] for _ in range(2)] == names[:2] and set(called) == set(names[:2])
    called.clear()
    assert next(rows)["alternative"] == "compile a" and set(called) == set(names[:3])
    assert [r["alternative"] for r in rows] == ["compile b"]
