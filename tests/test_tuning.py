"""Tuning tables: what is accepted, what is refused, that they choose, and that the tuner writes good ones."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from fastres import tuning
from fastres.cli import main
from fastres.functional import Choice
from fastres.kernels import _launch, _tuned
from fastres.kernels._launch import ELEMENTWISE, cut, elementwise, matrix, shape_class
from fastres.tuning import Job, Tuner, jobs

GPU, CAPABILITY = "Test GPU", (9, 0)
WIDEST = ELEMENTWISE[True][-1]  # not the default of 64 channels


def table(**changes):
    tile = dict(kind="elementwise", nhwc=True, rows=6, cols=6, tile=list(WIDEST))
    route = dict(op="batch_norm", nhwc=True, rows=6, cols=6, itemsize=2, route="aten")
    return {**dict(schema=1, gpu=GPU, capability=[9, 0], tiles=[tile], routes=[route]), **changes}


@pytest.fixture(autouse=True)
def no_table():
    yield
    _tuned.reset()


def activation(n=1, c=64, h=8, w=8):
    return torch.empty(n, c, h, w).contiguous(memory_format=torch.channels_last)


def test_a_table_chooses_the_tile_of_its_shape_class():
    x = activation()
    assert shape_class(matrix(x)) == (6, 6)
    default = elementwise(matrix(x))[0]
    _tuned.reset(_tuned.parse(json.dumps(table()), GPU, CAPABILITY))
    assert elementwise(matrix(x))[0] == WIDEST != default
    assert elementwise(matrix(activation(n=4)))[0] == default
    assert cut(matrix(x)).tile == _launch.default_tile("reduction", matrix(x))


def test_default_tile_holds_a_row():
    for c in (8, 16, 24, 64, 100, 2048):
        m = matrix(activation(c=c))
        wide = [t for t in ELEMENTWISE[m.nhwc] if t.b1 >= m.cols]
        assert _launch.default_tile("elementwise", m) == (wide or ELEMENTWISE[m.nhwc][-1:])[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tuning table"),
        ("[]", "not a tuning table"),
        (json.dumps(table(schema=2)), "schema is 2"),
        (json.dumps(table(gpu="Other GPU")), "made on Other GPU"),
        (json.dumps(table(capability=[8, 0])), "made on Test GPU [8, 0]"),
        (json.dumps(table(tiles=[dict(kind="gemm", nhwc=True, rows=1, cols=1, tile=[1, 1, 1])])), "gemm"),
        (
            json.dumps(table(tiles=[dict(kind="elementwise", nhwc=True, rows=1, cols=1, tile=[7, 7, 4])])),
            "[7, 7, 4]",
        ),
        (json.dumps(table(tiles=[dict(kind="elementwise", nhwc=True)])), "not a tuning table"),
        (json.dumps(table(routes=[dict(op="batch_norm", route="magic")])), "magic"),
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
        tile = dict(kind="elementwise", nhwc=True, rows=rows, cols=6, tile=list(WIDEST))
        (folder / _tuned.slug(GPU, CAPABILITY)).write_text(json.dumps(table(tiles=[tile])))
    monkeypatch.setattr(_tuned, "_DATA", package)
    monkeypatch.setenv("FASTRES_CACHE", str(user))
    assert ("elementwise", True, 7, 6) in _tuned.load(GPU, CAPABILITY).tiles
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "nothing"))
    assert ("elementwise", True, 6, 6) in _tuned.load(GPU, CAPABILITY).tiles
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
    monkeypatch.setattr(_tuned, "active", lambda: reads.append(1) or _tuned.EMPTY)
    _launch.use_tiles(None)
    for _ in range(3):
        elementwise(matrix(activation()))
    assert len(reads) == 1


def job(what, n=2, c=8, side=6):
    return Job(what, (n, c, side, side), torch.float32, True, 1)


def test_the_tuner_writes_what_a_table_may_hold(tmp_path):
    path = tmp_path / "t.json"
    todo = [job("elementwise"), job("reduction"), job("batch_norm"), job("add_relu"), job("max_pool")]
    said = []
    tuner = Tuner(torch.device("cpu"), path, "reference")
    assert tuner.run(todo, 60, said.append, rounds=1, region=1e-4) == (5, 0)
    assert len(said) == 5 and tuner.refused == []
    made = _tuned.parse(path.read_text(), tuner.gpu, tuner.capability)
    assert len(made.tiles) == 2 and len(made.routes) == 3
    assert set(json.loads(path.read_text())["routes"][0]["microseconds"]) == {"triton", "aten"}


def test_the_tuner_resumes_and_keeps_its_budget(tmp_path):
    path = tmp_path / "t.json"
    todo = [job("elementwise"), job("reduction"), job("batch_norm", c=16)]
    effort = dict(rounds=1, region=1e-4)
    assert Tuner(torch.device("cpu"), path, "reference").run(todo, 0, str, **effort) == (0, 3)
    assert Tuner(torch.device("cpu"), path, "reference").run(todo[:1], 60, str, **effort) == (1, 0)
    assert Tuner(torch.device("cpu"), path, "reference").run(todo, 60, str, **effort) == (2, 0)
    assert Tuner(torch.device("cpu"), path, "reference").run(todo, 60, str, **effort) == (0, 0)


def test_the_tuner_does_not_overwrite_a_foreign_table(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table()))
    with pytest.raises(_tuned.TableError, match="made on Test GPU"):
        Tuner(torch.device("cpu"), path, "reference")
    assert json.loads(path.read_text()) == table()


def test_a_wrong_configuration_is_not_timed(tmp_path, monkeypatch):
    right = tuning.selfcheck.check

    def check(case, *rest):
        r = right(case, *rest)
        forced = _launch._Tuned.tiles or {}
        return r._replace(worst=9.0) if WIDEST in forced.values() else r

    monkeypatch.setattr(tuning.selfcheck, "check", check)
    tuner = Tuner(torch.device("cpu"), tmp_path / "t.json", "reference")
    tuner.measure(job("elementwise", c=64), rounds=1, region=1e-4)
    assert len(tuner.refused) == 1 and str(list(WIDEST)) in tuner.refused[0]
    assert str(list(WIDEST)) not in tuner.tiles[0]["microseconds"]


def test_a_tie_keeps_the_default():
    def sample(median, spread):
        return tuning.Sample(median, median - spread, median + spread, median - spread, 9, 1)

    assert tuning._faster({"a": sample(1.0, 0.1), "b": sample(0.95, 0.1)}, "a") == "a"
    assert tuning._faster({"a": sample(1.0, 0.1), "b": sample(0.5, 0.1)}, "a") == "b"
    assert tuning._faster({}, "a") is None


def test_jobs_are_sorted_by_their_share():
    def choice(op, side):
        return Choice(op, (2, 8, side, side), torch.bfloat16, "channels_last", "triton", "", 0)

    found = jobs([choice("batch_norm", 4), choice("batch_norm", 16), choice("batch_norm", 4)])
    assert [j.shape[2] for j in found if j.what == "batch_norm"] == [16, 4]
    assert next(j for j in found if j.what == "batch_norm" and j.shape[2] == 4).weight == 2 * 2 * 8 * 16 * 2
    assert {j.what for j in found} == {"elementwise", "reduction", "batch_norm"}


def test_command(tmp_path, capsys):
    arguments = ["tune", "--model", "resnet18", "--batch", "2", "--size", "32", "--dtype", "fp32", "--trial"]
    path = tmp_path / "t.json"
    assert main([*arguments, "--out", str(path), "--rounds", "1", "--budget", "3s"]) == 0
    assert "left" in capsys.readouterr().out and path.exists()
    assert main(arguments) == 1
    assert "--trial wants --out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune", "--model", "resnet18"]) == 1
        assert "no CUDA device" in capsys.readouterr().err
