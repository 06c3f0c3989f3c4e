"""examples/train.py as its users run it: runs, kills and resumes, processes, comparisons, and what it refuses."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastres.config import load_config
from fastres.registry import NORM_LAYERS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train
from training import compare, engine, errors, settings
from training.compare import judge, swap_norm
from training.engine import build_model
from training.loading import load_data
from training.runtime import Runtime

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'fastres[train]'")
ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "examples" / "train.py")
CONFIG = """
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR", depth=18, in_channels=1, stem_channels=8, base_channels=8, num_stages=2,
        strides=(1, 2), dilations=(1, 1), out_indices=(1,), norm_cfg=dict(type="FusedBN"), drop_path_rate=0.3,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=16, topk=(1, 3)),
)
normalize = dict(type="Normalize", mean=[77.8], std=[95.8])
data = dict(
    samples_per_gpu=96,
    train=dict(type="Digits", split="train", pipeline=[dict(type="RandomCrop", size=8, padding=1), normalize]),
    val=dict(type="Digits", split="test", pipeline=[normalize]),
)
optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4)
lr_config = dict(policy="CosineAnnealing", by_epoch=False, min_lr=0, warmup="linear", warmup_iters=10)
runner = dict(max_epochs=2)
log_config = dict(interval=4)
"""
STEPS = 1438 // 96


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def run(config: str, work_dir: Path, *arguments: str) -> int:
    return train.main([config, "--device", "cpu", "--work-dir", str(work_dir), *arguments])


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [
            {k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in csv.DictReader(file)
        ]


def assert_same_run(a: Path, b: Path) -> None:
    """The same numbers to the last bit: weights, optimizer, schedule, generators, logs."""
    x, y = (torch.load(p / "last.pt", weights_only=True) for p in (a, b))
    assert x["position"] == y["position"] and x["scheduler"] == y["scheduler"] and x["scaler"] == y["scaler"]
    assert list(x["model"]) == list(y["model"])
    for key in x["model"]:
        assert torch.equal(x["model"][key], y["model"][key]), key
    assert x["optimizer"]["param_groups"] == y["optimizer"]["param_groups"]
    for key, state in x["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], y["optimizer"]["state"][key]["momentum_buffer"])
    for p, q in zip(x["random"], y["random"], strict=True):
        assert torch.equal(p["torch"], q["torch"]) and p["python"] == q["python"] and p["numpy"] == q["numpy"]
    for name in ("steps.csv", "epochs.csv"):
        assert rows(a / name) == rows(b / name)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, signum: int = signal.SIGTERM) -> None:
    """A signal arrives while step number ``steps`` of this process is computed."""
    original, count = engine.Trainer.step, 0

    def step(self, images, labels):
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), signum)
        return original(self, images, labels)

    monkeypatch.setattr(engine.Trainer, "step", step)


# --- a run and its files ------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_says(config, tmp_path, capsys):
    work = tmp_path / "run"
    options = ["model.backbone.drop_path_rate=0", "data.samples_per_gpu=32"]
    assert run(config, work, "--epochs", "3", "--cfg-options", *options) == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in work.iterdir()) == [
        "best.pt", "config.py", "curves.png", "epochs.csv", "last.pt", "steps.csv",
    ]  # fmt: skip
    for word in ("torch 2.", "CPU", "ResNet_CIFAR-18", "FusedBatchNorm2d", "Digits, 1,438 for training"):
        assert word in out
    assert all(f"  {work / name}" in out for name in ("last.pt", "best.pt", "curves.png"))
    epochs, steps = rows(work / "epochs.csv"), rows(work / "steps.csv")
    assert [r["step"] for r in steps] == [str(i) for i in range(1, 3 * 44 + 1)]
    assert float(epochs[2]["train_loss"]) < float(epochs[0]["train_loss"])
    mean = sum(float(r["loss"]) for r in steps[:44]) / 44
    assert float(epochs[0]["train_loss"]) == pytest.approx(mean, rel=1e-6)
    assert float(epochs[2]["val_top3"]) >= float(epochs[2]["val_top1"]) > 20
    assert Image.open(work / "curves.png").size[0] > 1000

    best = torch.load(work / "best.pt", weights_only=True)
    assert best["position"]["best"] == pytest.approx(max(float(r["val_top1"]) for r in epochs))
    model = build_model(load_config(work / "config.py")["model"], 0)
    model.load_state_dict(best["model"])

    assert run(config, work) == 2, "an earlier run would have been overwritten"
    assert "--resume goes on with it, --overwrite starts over" in capsys.readouterr().err
    assert run(config, work, "--epochs", "1", "--overwrite") == 0
    assert len(rows(work / "epochs.csv")) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--amp", "bf16", "--channels-last"),
        ("--amp", "fp16"),
        ("--compile",),
        (
            "--cfg-options",
            "optimizer_config.grad_clip.max_norm=1",
            "optimizer.type=Adam",
            "optimizer.momentum=None",
        ),
        ("--data", "synthetic"),
    ],
)
def test_ways_to_run(config, tmp_path, monkeypatch, arguments):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    text = Path(config).read_text()
    if "optimizer.type=Adam" in arguments:
        Path(config).write_text(text.replace("momentum=0.9, ", ""))
        arguments = arguments[:-1]
    assert run(config, tmp_path / "run", "--epochs", "1", *arguments) == 0
    (epoch,) = rows(tmp_path / "run" / "epochs.csv")
    assert 0 < float(epoch["train_loss"]) < 3


def test_gradients_are_clipped_without_their_loss_scale(config):
    arguments = [config, "--amp", "fp16", "--cfg-options", "optimizer_config.grad_clip.max_norm=1e-3"]
    options = [
        "optimizer.weight_decay=0",
        "lr_config=dict(_delete_=True, policy='fixed')",
        "optimizer.lr=1.0",
    ]
    resolved = settings.resolve(train.parser().parse_args([*arguments, *options]))
    runtime = Runtime(torch.device("cpu"))
    data = load_data(resolved, runtime)
    normalization = data.train_set.pipeline.normalization
    trainer = engine.Trainer(resolved, runtime, resolved.config["model"], len(data.train), normalization)
    batch = trainer.prepare(next(data.train.epoch(0)))
    for _ in range(8):  # the first scales may overflow
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.step(*batch)
        moved = [(p.detach() - b).norm() for p, b in zip(trainer.model.parameters(), before, strict=True)]
        distance = torch.stack(moved).norm().item()
        if distance:
            break
    assert distance == pytest.approx(1e-3, rel=1e-2)


def test_seeds_decide_the_numbers(config, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(config, tmp_path / name, "--epochs", "1", "--seed", seed) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a" / "steps.csv")[0]["loss"] != rows(tmp_path / "c" / "steps.csv")[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, capsys):
    options = ["--cfg-options", "optimizer.lr=1e30", "lr_config=dict(_delete_=True, policy='fixed')"]
    assert run(config, tmp_path / "run", *options) == 2
    assert "the loss is nan in step" in capsys.readouterr().err


# --- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, STEPS, STEPS + 6])
def test_a_stopped_run_goes_on_to_the_same_numbers(config, tmp_path, monkeypatch, capsys, steps):
    """Stopped within an epoch and at its end, by a signal; drop path makes the random state count."""
    assert run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        assert run(config, tmp_path / "parts") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().out
    position = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["position"]
    assert position["epoch"] * STEPS + position["step"] == steps
    torch.manual_seed(99)  # what the process did before must not matter
    assert run(config, tmp_path / "parts", "--resume") == 0
    assert f"after epoch {steps // STEPS}" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_was_logged_after_the_last_checkpoint_is_dropped(config, tmp_path, monkeypatch):
    options = ("--cfg-options", "checkpoint_config.step_interval=4", "log_config.interval=1")
    assert run(config, tmp_path / "whole", *options) == 0

    class Crash(Exception):
        pass

    original = engine.Trainer.step

    def step(self, images, labels):
        if self.scheduler.last_epoch == STEPS + 6:
            raise Crash
        return original(self, images, labels)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(engine.Trainer, "step", step)
        run(config, tmp_path / "parts", *options)
    assert len(rows(tmp_path / "parts" / "steps.csv")) == STEPS + 6
    assert run(config, tmp_path / "parts", "--resume", *options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_without_warning_goes_on_to_the_same_numbers(config, tmp_path):
    arguments = [config, "--device", "cpu", "--cfg-options", "checkpoint_config.step_interval=4"]
    work = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments, "--work-dir", str(work)],
        stdout=subprocess.DEVNULL,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads())),
    )
    deadline = time.monotonic() + 120
    while not (work / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    position = torch.load(work / "last.pt", weights_only=True)["position"]
    assert position["epoch"] < 2
    assert train.main([*arguments, "--work-dir", str(work), "--resume"]) == 0
    assert train.main([*arguments, "--work-dir", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", work)


def test_resume_of_nothing_of_everything_and_of_something_else(config, tmp_path, capsys):
    work = tmp_path / "run"
    assert run(config, work, "--resume", "--epochs", "1") == 0
    assert "nothing to resume" in capsys.readouterr().out
    before = rows(work / "epochs.csv")
    assert run(config, work, "--resume", "--epochs", "1") == 0, "a finished run"
    assert rows(work / "epochs.csv") == before
    assert run(config, work, "--resume", "--epochs", "2") == 0, "a longer run"
    assert "resuming with another runner.max_epochs: 1 -> 2" in capsys.readouterr().out
    assert len(rows(work / "epochs.csv")) == 2
    assert run(config, work, "--resume", "--seed", "7") == 2
    assert "cannot resume it with\n  seed: 0 -> 7" in capsys.readouterr().err
    assert run(config, work, "--resume", str(tmp_path / "gone.pt")) == 2
    assert "gone.pt: no such checkpoint" in capsys.readouterr().err
    (work / "last.pt").write_bytes(b"damaged")
    assert run(config, work, "--resume") == 2
    assert "last.pt: cannot be read as a checkpoint" in capsys.readouterr().err


# --- several processes --------------------------------------------------------------------------------------

WORKER = """
import contextlib, pathlib, sys, time
sys.path.insert(0, {examples!r})
import train

config, work = sys.argv[1:]
common = [config, "--device", "cpu", "--cfg-options", "data.samples_per_gpu=48"]

class Killed(Exception):
    pass

def killed_in_the_second_epoch(self, metrics, original=train.Run._end_epoch):
    original(self, metrics)
    if self.position.epoch == 1:
        raise Killed

with train.start("cpu") as runtime:
    train.start = lambda device: contextlib.nullcontext(runtime)  # a process can join its group only once
    assert train.main([*common, "--work-dir", work + "/whole"]) == 0
    kept, train.Run._end_epoch = train.Run._end_epoch, killed_in_the_second_epoch
    try:
        train.main([*common, "--work-dir", work + "/parts"])
        raise AssertionError("was not killed")
    except Killed:
        train.Run._end_epoch = kept
    assert train.main([*common, "--work-dir", work + "/parts", "--resume"]) == 0
    batch_norm = "model.backbone.norm_cfg=dict(_delete_=True, type='FusedBN')"
    assert train.main([*common, batch_norm, "--work-dir", work + "/bn", "--epochs", "1"]) == 0
    code = train.main([*common, batch_norm, "--work-dir", work + "/compare", "--epochs", "1", "--compare"])
    assert code == 0
    written = pathlib.Path(work) / "written"
    if runtime.is_main:
        time.sleep(0.5)
        written.touch()
assert written.exists(), "a process left before the main one had written its files"
"""


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    """Half the batch in each of two processes: the same images in a step, and without batch statistics the same
    numbers but for the order of sums. Files come from one of them, and they resume to the same numbers."""
    text = Path(config).read_text().replace('dict(type="FusedBN")', "dict(type='GN', num_groups=2)")
    Path(config).write_text(text.replace("drop_path_rate=0.3", "drop_path_rate=0.0"))
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(examples=str(ROOT / "examples")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*torchrun, str(script), config, str(tmp_path)], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CPU, 1 thread, 2 processes" in done.stdout and "batches of 96" in done.stdout
    assert done.stdout.count("epoch 1/2  loss") == 2, "one line in each of two runs, from one process"
    assert "ok: losses agree" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["random"]) == 2

    assert run(config, tmp_path / "alone") == 0
    alone, together = (rows(tmp_path / name / "steps.csv") for name in ("alone", "whole"))
    assert [r["step"] for r in alone] == [r["step"] for r in together]
    for a, b in zip(alone[:10], together[:10], strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)

    # Running statistics differ between processes; what is evaluated must be what is in the checkpoint.
    (epoch,) = rows(tmp_path / "bn" / "epochs.csv")
    resolved = settings.resolve(train.parser().parse_args([str(tmp_path / "bn" / "config.py")]))
    data = load_data(resolved, Runtime(torch.device("cpu")))
    normalization = data.val_set.pipeline.normalization
    trainer = engine.Trainer(
        resolved, Runtime(torch.device("cpu")), resolved.config["model"], 1, normalization
    )
    trainer.model.load_state_dict(torch.load(tmp_path / "bn" / "last.pt", weights_only=True)["model"])
    metrics = trainer.evaluate(data.val)
    assert metrics.images == 359 and metrics.loss == pytest.approx(float(epoch["val_loss"]), rel=1e-6)
    assert metrics.accuracy[0] == pytest.approx(float(epoch["val_top1"]))
    assert len(rows(tmp_path / "compare" / "steps.csv")) == STEPS


# --- comparison ---------------------------------------------------------------------------------------------


def test_compare_prints_both_sides_and_judges_them(config, tmp_path, capsys):
    work = tmp_path / "compare"
    assert run(config, work, "--compare", "--min-accuracy", "5") == 0
    out = capsys.readouterr().out
    for word in (
        "BN (eager)",
        "FusedBN (fastres)",
        "images/s, median step",
        "saved for backward, MiB",
        "agree",
    ):
        assert word in out
    assert sorted(p.name for p in work.iterdir()) == ["compare.png", "config.py", "epochs.csv", "steps.csv"]
    steps = rows(work / "steps.csv")
    assert len(steps) == 2 * STEPS and {bool(r["loss_fp64"]) for r in steps[:STEPS]} == {True}
    assert not steps[STEPS]["loss_fp64"] and float(steps[0]["seconds_BN"]) > 0
    assert float(steps[0]["loss_BN"]) == pytest.approx(float(steps[0]["loss_fp64"]), rel=1e-5)

    assert run(config, work, "--compare", "--epochs", "1", "--min-accuracy", "99") == 1
    out = capsys.readouterr().out
    assert "FAILED: BN: accuracy" in out and "FAILED: FusedBN: accuracy" in out and "below 99 %" in out
    assert run(config, work, "--compare", "--resume") == 2


def test_compare_trains_bn_as_a_run_of_its_own_does(config, tmp_path):
    """Neither the warm-up, nor the reference, nor the other side leaves a trace in a side's numbers."""
    options = ("--epochs", "1", "--cfg-options", "model.backbone.norm_cfg.type=BN")
    assert run(config, tmp_path / "compare", "--compare", *options) == 0
    assert run(config, tmp_path / "alone", *options) == 0
    compared, alone = rows(tmp_path / "compare" / "steps.csv"), rows(tmp_path / "alone" / "steps.csv")
    assert [r["loss_BN"] for r in compared] == [r["loss"] for r in alone]


def test_compare_fails_where_the_fused_norm_is_wrong(config, tmp_path, monkeypatch, capsys):
    class WrongBN(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 1.001

    NORM_LAYERS.register_module("WrongBN", module=WrongBN, force=True)
    monkeypatch.setattr(compare, "PAIRS", (("BN", "WrongBN"), compare.PAIRS[1]))
    assert run(config, tmp_path / "run", "--compare", "--epochs", "1") == 1
    assert "FAILED: losses disagree: WrongBN is" in capsys.readouterr().out


def test_the_rule_for_losses():
    reference, eager = [2.0, 1.0], [2.0, 1.0 + 1e-4]
    assert judge(eager, [2.0, 1.0 - 2e-4], reference, 1e-6).holds
    assert not judge(eager, [2.0, 1.0 - 2.1e-4], reference, 1e-6).holds
    assert judge(eager, [2.0, 1.0 - 2.1e-4], reference, 1e-5).holds
    assert not judge(eager, [2.0, float("nan")], reference, 1.0).holds
    assert judge(eager, eager, [], 1e-6) is None
    exact = judge([1.0, 5.0], [1.0, 9.0], [1.0], 1e-6)
    assert (exact.steps, exact.eager, exact.fused, exact.between) == (1, 0, 0, 0)


def test_swapping_one_string():
    model = dict(
        backbone=dict(norm_cfg=dict(type="BN", eps=1e-3), parts=[dict(norm_cfg=dict(type="fastres.FusedBN"))])
    )
    swapped = swap_norm(model, "FusedBN")
    assert swapped["backbone"] == dict(
        norm_cfg=dict(type="FusedBN", eps=1e-3), parts=[dict(norm_cfg=dict(type="FusedBN"))]
    )
    assert model["backbone"]["norm_cfg"]["type"] == "BN"
    assert swap_norm(dict(backbone=dict(type="ResNet")), "BN")["backbone"]["norm_cfg"] == dict(type="BN")
    mixed = dict(backbone=dict(norm_cfg=dict(type="BN")), head=dict(norm_cfg=dict(type="LN")))
    assert swap_norm(mixed, "FusedBN")["head"]["norm_cfg"] == dict(type="LN")
    with pytest.raises(Exception, match="--compare swaps BN and FusedBN, the config has GN only"):
        swap_norm(dict(backbone=dict(norm_cfg=dict(type="GN"))), "BN")


# --- data from the command line -----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes that a colour tells apart, five images each, without a split."""
    for name, colour in (("blue", (20, 20, 200)), ("red", (200, 20, 20))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20 + i, 24), colour).save(tmp_path / "photos" / name / f"{i}.jpg")
    return tmp_path / "photos"


def test_own_images(config, photos, tmp_path, capsys):
    colour = ["--cfg-options", "model.backbone.in_channels=3", "data.samples_per_gpu=4"]
    (photos / "red" / "2.jpg").write_bytes(b"broken")
    data = ["--data", f"imagefolder:{photos}"]
    assert run(config, tmp_path / "run", *data, *colour) == 0
    out = capsys.readouterr().out
    assert "has no train and val folders: every class's images are split" in out
    assert "8 for training, 2 for validation, 2 classes, batches of 4" in out
    assert "model.head.num_classes: 10 -> 2, as in the data" in out
    assert f"broken image skipped: {photos / 'red' / '2.jpg'}: cannot identify" in out
    assert "broken images skipped" in out.split("last epoch")[-1]
    assert run(config, tmp_path / "run2", *data, "--strict-data", *colour) == 2
    assert "broken image (refused by --strict-data): " in capsys.readouterr().err


def test_data_that_do_not_fit(config, photos, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert run(config, tmp_path / "run", *arguments) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("error: ") and "Traceback" not in captured
        return captured

    assert "expected digits, imagefolder:DIR or synthetic" in error("--data", "cifar")
    assert "/nowhere: no such folder" in error("--data", "imagefolder:/nowhere")
    (photos / "train").mkdir()
    assert "val: no such folder; expected" in error("--data", f"imagefolder:{photos}")
    assert "the data have 10" in error("--cfg-options", "model.head.num_classes=9")
    assert "model: " in error("--cfg-options", "model.backbone.depth=19")
    assert "head.in_channels: got 8, wanted 16" in error("--cfg-options", "model.head.in_channels=8")
    assert "FusedBN" in error("--cfg-options", "model.backbone.norm_cfg.type=FusedBM")
    assert "samples_per_gpu: got 0, wanted an integer >= 1" in error(
        "--cfg-options", "data.samples_per_gpu=0"
    )
    assert "unknown key 'optimiser'; did you mean 'optimizer'?" in error("--cfg-options", "optimiser.lr=1")
    assert "optimizer: unknown key 'momentun'" in error("--cfg-options", "optimizer.momentun=1")
    assert "fewer than one step takes (5000)" in error("--cfg-options", "data.samples_per_gpu=5000")
    assert "tiny.py: fp16: use amp = 'fp16'" in error("--cfg-options", "fp16.loss_scale=512")
    assert "no such config file" in error("--cfg-options", "a=1") if Path(config).unlink() is None else ""


def test_device_that_is_not_there(config, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert train.main([config, "--device", "cuda", "--work-dir", str(tmp_path / "run")]) == 2
    assert "--device cuda: " in capsys.readouterr().err
    assert train.main([config, "--device", "tpu", "--work-dir", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_the_configs_of_the_repository_are_complete(name):
    arguments = train.parser().parse_args([str(ROOT / "configs" / f"{name}.py")])
    resolved = settings.resolve(arguments)
    model = build_model(resolved.config["model"], 0)
    with torch.no_grad():
        scores = model.eval()(torch.rand(2, resolved.channels, 32, 32))
    assert scores.shape == (2, resolved.config["model"]["head"]["num_classes"])
    engine.build_optimizer(model, resolved.config["optimizer"])
    engine.build_schedule(resolved.config["lr_config"], 0.1, 10, resolved.epochs)
    for part in ("train", "val"):
        settings.image_size(resolved.config)
        from training.transforms import build_pipeline

        build_pipeline(resolved.config["data"][part]["pipeline"], resolved.channels, part)


# --- packages that are not installed ------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["matplotlib", "tqdm"])
def test_training_works_without(absent, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, absent, None)
    assert run(config, tmp_path / "run", "--epochs", "1") == 0
    out = capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists() == (absent != "matplotlib")
    if absent == "matplotlib":
        assert "the picture of the learning curves needs matplotlib" in out
        assert "pip install 'fastres[train]'" in out
    assert "epoch 1/1" in out


@pytest.mark.parametrize(
    ("absent", "package"), [("sklearn.datasets", "scikit-learn"), ("PIL.Image", "Pillow")]
)
def test_what_the_data_need_is_named(absent, package, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "optional", lambda name: None if name == absent else import_module(name))
    assert run(config, tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert f"needs {package}, which is not installed: pip install 'fastres[train]'" in err
