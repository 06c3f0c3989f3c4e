"""The training benchmark: rows for every way beside the better eager layout, nothing timed that differs from eager."""

from __future__ import annotations

from benchmarks import training
from benchmarks.rows import read


def test_rows_for_every_way(tmp_path, capsys):
    small = ["--model", "resnet18", "--batch", "4", "--size", "64", "--budget", "1s", "--out", str(tmp_path)]
    assert training.main(small) == 0
    ((head, rows),) = read(tmp_path)
    assert head["suite"] == "training"
    names = [r["alternative"] for r in rows]
    assert names[:2] == ["eager", "eager channels_last"] and len(names) == 4  # the loops are off in tests
    for r in rows:
        assert r["q25_s"] <= r["median_s"] <= r["q75_s"] and r["rounds"] >= 2 and r["reference"] in names[:2]
        assert r["ratio_q25"] <= r["ratio"] <= r["ratio_q75"]
    assert next(r["ratio"] for r in rows if r["alternative"] == r["reference"]) == 1
    text = capsys.readouterr().out
    assert "without compiled loops: native is 'off'" in text and "resnet18, batch 4, 64 pixels" in text


def test_what_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr(training, "ways", lambda *a: {"eager": lambda: 1.0, "fastres": lambda: 1.1})
    rows = {r["alternative"]: r for r in training.measure("resnet18", 1, 32, 0.01)}
    assert "median_s" in rows["eager"] and "differ from eager's" in rows["fastres"]["error"]
    assert any("not timed" in line for line in training.lines(list(rows.values())))
