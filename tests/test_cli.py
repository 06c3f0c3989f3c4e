"""``python -m fastres``: what it prints and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres import _inference, functional, selfcheck
from fastres.cli import commands_by_name, main
from fastres.kernels import batch_norm as bn_ops
from fastres.kernels._triton import INTERPRET
from fastres.routes import routes
from tests.tolerance import FLOOR

ROOT = Path(__file__).resolve().parent.parent
plain_process = pytest.mark.skipif(
    INTERPRET, reason="Triton interprets in this process, so auto takes its kernels"
)


def test_every_command_has_a_help_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert {"env", "routes", "selfcheck", "tune"} <= set(commands_by_name())
    assert all(name in text for name in commands_by_name())


def test_env_names_versions_and_device(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert bool(found["gpu"]) == torch.cuda.is_available()
    assert found["backend"] == functional.get_backend()
    assert main(["env"]) == 0
    assert f"torch {' ' * 3}" in " ".join(capsys.readouterr().out.split("\n"))


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "fastres", "env"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0 and done.stdout.startswith("fastres"), done.stderr


def test_routes_of_a_gpu_that_is_not_there(capsys):
    assert main(["routes", "--model", "resnet50", "--batch", "256", "--dtype", "bf16", "--gpu", "9.0"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    by_layer = {line[0]: line for line in lines if len(line) > 5}
    assert by_layer["layer4.2.bn3"][5] == "triton" and "bfloat16" in by_layer["layer4.2.bn3"]
    assert by_layer["layer1.0.bn1"][2] == "256x64x56x56"
    assert " aten " not in text


def test_routes_on_the_cpu_and_below_the_least_capability(capsys):
    assert main(["routes", "--model", "resnet18", "--size", "64", "--gpu", "cpu"]) == 0
    assert "30 decisions: 17 aten, 13 winograd" in capsys.readouterr().out
    assert main(["routes", "--model", "resnet18", "--size", "64", "--gpu", "7.5"]) == 0
    text = capsys.readouterr().out
    assert "triton" not in text.replace("Triton", "") and "(7, 5) is below (8, 0)" in text
    assert main(["routes", "--model", "resnet18", "--norm", "BN", "--size", "64"]) == 0
    assert "no fused layer" in capsys.readouterr().out


def test_routes_from_a_config_file(tmp_path, capsys):
    path = tmp_path / "net.py"
    path.write_text("model = dict(type='ResNet', depth=18, stem_channels=16, base_channels=16)\n")
    assert main(["routes", str(path), "--size", "32"]) == 0
    assert "32x16x8x8" in capsys.readouterr().out


def test_routes_leave_no_setting_behind():
    from fastres import ResNet

    routes(lambda: ResNet(18), (2, 3, 32, 32), torch.bfloat16, capability=(9, 0))
    with functional.record_routes() as log:
        ResNet(18)(torch.randn(2, 3, 32, 32))
    assert {c.route for c in log} == {"aten"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["routes"], "wanted a config file or --model"),
        (["routes", "a.py", "--model", "resnet18"], "one of them"),
        (["routes", "missing.py"], "missing.py"),
        (["routes", "--model", "resnet51"], "51"),
        (["routes", "--model", "vgg"], "vgg"),
        (["routes", "--model", "resnet18", "--gpu", "hopper"], "hopper"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_selfcheck_passes_on_this_device(capsys):
    assert main(["selfcheck"]) == 0
    text = capsys.readouterr().out
    assert "0 missed" in text and "1x1 convolution to block end" in text


def test_selfcheck_finds_a_wrong_gradient(capsys, monkeypatch):
    right = bn_ops.batch_norm_backward
    monkeypatch.setattr(bn_ops, "batch_norm_backward", lambda *a: right(*a) * 1.001)
    assert main(["selfcheck", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "MISS" in text and "gradient of y" in text


def folded_results():
    device = torch.device("cpu")
    for case in selfcheck.inference_cases(device, small=True):
        for memory in (torch.contiguous_format, torch.channels_last):
            yield selfcheck.check(case, torch.float32, memory, "auto", device)


@plain_process
def test_selfcheck_runs_inference_by_its_own_routes():
    found = list(folded_results())
    assert all(r.ok for r in found), found
    assert {r.route for r in found} == {"folded", "onednn", "winograd"}


@plain_process
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_selfcheck_finds_a_wrong_folded_weight(part, monkeypatch):
    right = _inference.fold

    def wrong(*a):
        f = right(*a)
        return f._replace(**{part: getattr(f, part) * 1.001})

    monkeypatch.setattr(_inference, "fold", wrong)
    assert not any(r.ok for r in folded_results())


def test_selfcheck_reports_a_kernel_that_raises(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(bn_ops, "batch_norm_stats", broken)
    assert main(["selfcheck", "--device", "cpu"]) == 1
    assert "RuntimeError: launch failed" in capsys.readouterr().out


def test_selfcheck_rule_is_the_tests_rule():
    assert selfcheck.FLOOR == FLOOR
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = ref.float() + 1e-4
    assert selfcheck.worst_ratio(ref.float() + 1.9e-4, eager, ref, torch.float32) < 1
    assert selfcheck.worst_ratio(ref.float() + 2.1e-4, eager, ref, torch.float32) > 1
    assert selfcheck.worst_ratio(torch.tensor([1.0, float("nan")]), eager, ref, torch.float32) == float("inf")


@pytest.mark.interpret
def test_selfcheck_of_the_kernels_in_the_interpreter():
    chosen = {"block end", "batch norm + ReLU", "stem pool"}
    for case in selfcheck.cases(torch.device("cpu"), small=True):
        if case.name in chosen:
            for dtype in (torch.float32, torch.bfloat16):
                r = selfcheck.check(case, dtype, torch.channels_last, "triton", torch.device("cpu"))
                assert r.ok and r.route == "triton", r
    for case in selfcheck.inference_cases(torch.device("cpu"), small=True):
        r = selfcheck.check(case, torch.float32, torch.channels_last, "triton", torch.device("cpu"))
        product = "1x1" in case.name or "downsample" in case.name
        assert r.ok and "triton" in r.route.split("+") if product else r.ok, r


@pytest.mark.gpu
def test_selfcheck_on_the_gpu(capsys):
    code = main(["selfcheck", "--device", "cuda"])
    assert code == 0, capsys.readouterr().out
