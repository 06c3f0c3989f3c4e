"""Parts of the training example: images to batches, optimizers and schedules, the files it writes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from fastres.config import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from training import checkpoint
from training.data import build_dataset, hold_out
from training.errors import TrainingError
from training.loading import EvaluationBatches, EvaluationOrder, Prepare, TrainBatches, TrainOrder
from training.optim import build_optimizer, build_schedule, grad_clip
from training.report import CsvLog, read_csv
from training.runtime import Runtime
from training.transforms import CenterCrop, RandomCrop, RandomFlip, RandomResizedCrop, Resize, build_pipeline

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'fastres[train]'")

CPU = Runtime(torch.device("cpu"))
NORMALIZE = dict(type="Normalize", mean=[10.0, 20.0, 30.0], std=[1.0, 2.0, 4.0])
CROPS = [dict(type="RandomResizedCrop", size=8), dict(type="RandomFlip"), NORMALIZE]


def gradient(width: int, height: int) -> Image.Image:
    """Red counts columns, green rows."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype("uint8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ with two classes of six and two images."""
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(["cat", "dog"]):
            (tmp_path / part / name / "deeper").mkdir(parents=True)
            for i in range(count):
                where = tmp_path / part / name / ("deeper" if i == 0 else "")
                gradient(12 + i, 20 - 4 * label).save(where / f"{i}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def dataset(root: Path, training: bool = True, pipeline=CROPS, **extra):
    cfg = dict(type="ImageFolder", data_prefix=str(root), pipeline=pipeline)
    return build_dataset(cfg, channels=3, seed=0, where="data.train", training=training, **extra)


# --- transforms ---------------------------------------------------------------------------------------------


def test_transforms_size_and_content():
    image, rng = gradient(40, 30), Random(0)
    assert Resize(16)(image, rng).size == (16, 16)
    assert Resize((10, 20))(image, rng).size == (20, 10)
    assert Resize((15, -1))(image, rng).size == (20, 15)
    centre = np.asarray(CenterCrop(10)(image, rng))
    assert centre.shape == (10, 10, 3) and centre[0, 0].tolist() == [15, 10, 7]
    padded = np.asarray(CenterCrop(50)(image, rng))
    assert padded[0, 0].tolist() == [0, 0, 0] and padded[10, 5].tolist() == [0, 0, 7]
    flipped = np.asarray(RandomFlip(1.0)(image, rng))
    assert flipped[0, :, 0].tolist() == list(range(39, -1, -1))
    assert np.asarray(RandomFlip(1.0, "vertical")(image, rng))[:, 0, 1].tolist() == list(range(29, -1, -1))
    assert RandomFlip(0.0)(image, rng) is image


def test_random_crops_cover_their_range():
    image, rng = gradient(8, 8), Random(0)
    corners = set()
    for _ in range(100):
        cut = np.asarray(RandomCrop(8, padding=1)(image, rng)).astype(int)
        assert cut.shape == (8, 8, 3)
        corners.add((int(cut[4, 4, 0]) - 4, int(cut[4, 4, 1]) - 4))
    assert corners == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    areas = []
    for _ in range(200):
        cut = np.asarray(RandomResizedCrop(64, interpolation="nearest")(gradient(200, 150), rng)).astype(int)
        w, h = np.ptp(cut[..., 0]) + 1, np.ptp(cut[..., 1]) + 1
        areas.append(w * h / 30000)
        assert 0.7 < w / h < 1.45
    assert min(areas) < 0.12 and max(areas) > 0.85
    assert RandomResizedCrop(8)(gradient(300, 2), rng).size == (8, 8)


def test_pipeline_gives_bytes_and_prepare_normalizes_them():
    pipeline = build_pipeline(
        [dict(type="LoadImageFromFile"), dict(type="CenterCrop", crop_size=4), NORMALIZE], 3, "p"
    )
    image = pipeline(gradient(6, 4), Random(0))
    assert image.dtype == torch.uint8 and image.shape == (3, 4, 4)
    assert image[:, 2, 1].tolist() == [2, 2, 7]
    from training.loading import Batch

    batch = Batch(image[None], torch.tensor([3]))
    for layout in (torch.contiguous_format, torch.channels_last):
        images, labels = Prepare(pipeline.normalization, CPU.device, layout)(batch)
        assert images.is_contiguous(memory_format=layout) and images.dtype == torch.float32
        expected = (image.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
            [1.0, 2, 4]
        ).view(3, 1, 1)
        torch.testing.assert_close(images[0], expected)
        assert labels.tolist() == [3]
    grey = build_pipeline([dict(type="Normalize", mean=[0], std=[1])], 1, "p")
    assert grey(gradient(5, 4).convert("L"), Random(0)).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "p: no Normalize step"),
        (3, "p: expected a list of dicts"),
        ([3], r"p\.0: expected a dict with the key 'type'"),
        ([dict(type="Blur"), NORMALIZE], r"p\.0: unknown transform 'Blur'; known: RandomResizedCrop"),
        ([dict(type="Resize", sz=3), NORMALIZE], r"p\.0: Resize: unknown key 'sz'; known: size"),
        ([dict(type="Resize", size=0), NORMALIZE], r"p\.0: Resize: size: got 0"),
        ([dict(type="Resize"), NORMALIZE], r"p\.0: Resize: .*missing.*'size'"),
        ([dict(type="Resize", size=3, interpolation="area"), NORMALIZE], "interpolation: got 'area'"),
        ([dict(type="RandomFlip", direction="up"), NORMALIZE], "direction: got 'up'"),
        ([NORMALIZE, dict(type="Resize", size=3)], r"p\.1: Resize after Normalize"),
        ([dict(type="Normalize", mean=[1], std=[1])], "got 1 means and 1 stds, wanted 3 each"),
        ([dict(type="Normalize", mean=[1] * 3, std=[0] * 3)], "std: got .*positive"),
        ([dict(type="Normalize", mean=[1] * 3)], "mean and std must be lists of 3 numbers"),
        ([{**NORMALIZE, "to_rgb": False}], "to_rgb=False"),
        ([{**NORMALIZE, "axis": 1}], "unknown key 'axis'"),
    ],
)
def test_bad_pipelines(steps, message):
    with pytest.raises(ConfigError, match=message):
        build_pipeline(steps, 3, "p")


# --- data sets ----------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_and_disjoint():
    pipeline = [dict(type="Normalize", mean=[0], std=[1])]
    parts = {
        (split, seed): build_dataset(
            dict(type="Digits", split=split, pipeline=pipeline), 1, seed, "data.train", True
        )
        for split in ("train", "test")
        for seed in (0, 1)
    }
    train, test = parts["train", 0], parts["test", 0]
    assert (len(train), len(test), len(train.classes)) == (1438, 359, 10)
    assert {s.labels.count(c) > 30 for s in (train, test) for c in range(10)} == {True}
    assert train.labels == parts["train", 1].labels, "the run's seed changed the split"
    digits = {t.pipeline(t.read(i), None).numpy().tobytes() for t in (train, test) for i in range(len(t))}
    assert len(digits) > 1790  # the 1797 digits hold a few identical ones
    image, label, _ = test[0, 5]
    assert image.shape == (1, 8, 8) and image.max() == 255 and label == test.labels[5]


def test_hold_out():
    labels = [0] * 10 + [1] * 5 + [2] * 2
    chosen = hold_out(labels, 0.2, seed=0)
    assert [sum(labels[i] == c for i in chosen) for c in range(3)] == [2, 1, 1]
    assert chosen == hold_out(labels, 0.2, seed=0) != hold_out(labels, 0.2, seed=1)


def test_image_folder(folder: Path):
    train = dataset(folder / "train")
    assert (train.classes, train.labels) == (["cat", "dog"], [0] * 6 + [1] * 6)
    assert any("deeper" in p for p in train.paths) and not any("notes" in p for p in train.paths)
    val = dataset(folder / "val", training=False, classes=["ape", "cat", "dog"])
    assert val.labels == [1, 1, 2, 2]
    grey = build_dataset(
        dict(type="ImageFolder", data_prefix=str(folder / "val"), pipeline=[dict(type="Normalize", mean=[0], std=[1])]),
        1, 0, "data.val", False,
    )  # fmt: skip
    assert grey[0, 0].image.shape[0] == 1


def test_images_with_an_orientation_are_turned(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(30, 10).save(folder / "val" / "cat" / "0.jpg", exif=exif)
    val = dataset(folder / "val", training=False, pipeline=[NORMALIZE])
    index = next(i for i, p in enumerate(val.paths) if p.endswith("0.jpg"))
    assert val.read(index).size == (10, 30)


def test_folders_that_do_not_fit(folder: Path):
    with pytest.raises(TrainingError, match="nowhere: no such folder; expected a folder with one subfolder"):
        dataset(folder / "nowhere")
    with pytest.raises(TrainingError, match="notes.txt: is a file"):
        dataset(folder / "train" / "cat" / "notes.txt")
    (folder / "bare").mkdir()
    with pytest.raises(TrainingError, match="bare: no class folders in it"):
        dataset(folder / "bare")
    with pytest.raises(
        TrainingError, match=r"class folder 'dog' has no counterpart in the training data \(1 classes: cat"
    ):
        dataset(folder / "val", classes=["cat"])
    (folder / "train" / "fox").mkdir()
    (folder / "train" / "fox" / "fox.txt").write_text("no image")
    with pytest.raises(TrainingError, match=r"train.fox: class 'fox' is empty: no image \(\.bmp"):
        dataset(folder / "train")
    gradient(4, 4).save(folder / "train" / "fox" / "1.png")
    with pytest.raises(TrainingError, match="class 'fox' has one image; it takes two"):
        cfg = dict(type="ImageFolder", data_prefix=str(folder / "train"), part="train", pipeline=CROPS)
        build_dataset(cfg, 3, 0, "data.train", True)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="Cifar", pipeline=CROPS), r"data\.train\.type: unknown data set 'Cifar'; known: Digits"),
        (dict(type="Digits", pipeline=CROPS), r"data\.train: key 'split' is missing"),
        (dict(type="Digits"), r"data\.train: key 'pipeline' is missing"),
        (dict(type="Digits", split="dev", pipeline=CROPS), "split: got 'dev'"),
        (dict(type="Digits", split="test", test_fraction=1, pipeline=CROPS), "test_fraction: got 1"),
        (dict(type="ImageFolder", pipeline=CROPS), "key 'data_prefix' is missing"),
        (dict(type="ImageFolder", data_prefx="x", pipeline=CROPS), "did you mean 'data_prefix'"),
        (dict(type="Synthetic", image_size=0, pipeline=CROPS), "image_size: got 0"),
        (3, r"data\.train: expected a dict, got 3"),
    ],
)
def test_bad_data_configs(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_dataset(cfg, 3, 0, "data.train", True)


def test_broken_images_are_named_and_skipped_or_refused(folder: Path):
    (folder / "train" / "cat" / "2.png").write_bytes(b"not a png")
    whole = (folder / "train" / "dog" / "3.png").read_bytes()
    (folder / "train" / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "val" / "dog" / "1.png").write_bytes(b"")
    seen, count = set(), 0
    for batch in TrainBatches(dataset(folder / "train"), 3, 0, CPU).epoch(0):
        assert len(batch.images) == 3
        seen.update(batch.broken)
        count += 3
    assert count == 12 and len(seen) == 2
    assert any("cat/2.png: cannot identify" in line for line in seen)
    assert any("dog/3.png: " in line for line in seen)

    val = EvaluationBatches(dataset(folder / "val", False), 2, 0, CPU)
    batches = list(val)
    assert [len(b.images) for b in batches] == [2, 1] and batches[1].broken[0].count("1.png") >= 1
    for workers in (0, 1):
        strict = TrainBatches(dataset(folder / "train"), 3, workers, CPU, strict=True)
        with pytest.raises(TrainingError, match=r"^broken image \(refused by --strict-data\): .*png: "):
            list(strict.epoch(0))


def test_images_of_different_sizes_are_refused(folder: Path):
    for workers in (0, 1):
        batches = EvaluationBatches(dataset(folder / "train", False, [NORMALIZE]), 3, workers, CPU)
        with pytest.raises(
            TrainingError, match=r"^images leave the pipeline in different sizes \(\d\dx20 and \d\dx20\)"
        ):
            list(batches)


# --- order --------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_workers_or_on_where_they_start(folder: Path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ways = [TrainBatches(dataset(folder / "train"), 4, workers, CPU) for workers in (0, 2)]
    a, b = ([list(way.epoch(e)) for e in (0, 1)] for way in ways)
    late = list(TrainBatches(dataset(folder / "train"), 4, 0, CPU).epoch(1, first=1))
    for e in (0, 1):
        assert len(a[e]) == 3
        for x, y in zip(a[e], b[e], strict=True):
            assert torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
    assert [b.images.sum() for b in late] == [b.images.sum() for b in a[1][1:]]
    assert not torch.equal(a[0][0].images, a[1][0].images)
    assert torch.equal(torch.get_rng_state(), before), "loading drew from the global generator"


def test_processes_share_a_step_and_cover_evaluation():
    def keys(order_type, *args):
        return [list(order_type(*args, Runtime(CPU.device, rank, 2))) for rank in (0, 1)]

    alone = list(TrainOrder(21, 10, 3, CPU))
    first, second = keys(TrainOrder, 21, 5, 3)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert len(set(sum(alone, []))) == 20
    first, second = keys(EvaluationOrder, 7, 2)
    assert [len(b) for b in first] == [2, 2] and [len(b) for b in second] == [2, 1]
    assert sorted(i for b in first + second for _, i in b) == list(range(7))


def test_too_few_images_for_a_step(folder: Path):
    with pytest.raises(
        TrainingError, match=r"have 12 images, fewer than one step takes \(32\).*samples_per_gpu=12"
    ):
        TrainBatches(dataset(folder / "train"), 32, 0, CPU)


# --- optimizer and schedule ---------------------------------------------------------------------------------


def rates(cfg, base=0.1, steps=10, epochs=4):
    factor = build_schedule(cfg, base, steps, epochs)
    return [base * factor(i) for i in range(steps * epochs)]


def test_schedules_follow_mmcv():
    assert rates(dict(policy="fixed")) == [0.1] * 40
    got = rates(dict(policy="step", step=[1, 3]))
    assert got[::10] == pytest.approx([0.1, 0.01, 0.01, 0.001]) and got[9] == 0.1
    assert rates(dict(policy="step", step=2, gamma=0.5))[::10] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert rates(dict(policy="step", step=1, min_lr=0.01))[30] == pytest.approx(0.01)
    cosine = rates(dict(policy="CosineAnnealing", min_lr=0.02))
    assert (
        cosine[10] == pytest.approx(0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2)
        and cosine[19] == cosine[10]
    )
    by_step = rates(dict(policy="CosineAnnealing", min_lr_ratio=0.0, by_epoch=False))
    assert by_step[20] == pytest.approx(0.05)
    assert rates(dict(policy="poly", power=2.0, min_lr=0.0))[20] == pytest.approx(0.1 * 0.5**2)
    common = dict(policy="fixed", warmup_iters=10, warmup_ratio=0.1)
    linear = rates(dict(common, warmup="linear"))
    assert linear[0] == pytest.approx(0.01) and linear[5] == pytest.approx(0.055) and linear[10] == 0.1
    assert rates(dict(common, warmup="constant"))[9] == pytest.approx(0.01)
    assert rates(dict(common, warmup="exp"))[5] == pytest.approx(0.1 * 0.1**0.5)
    by_epoch = rates(dict(common, warmup="linear", warmup_iters=2, warmup_by_epoch=True))
    assert by_epoch[10] == pytest.approx(0.055) and by_epoch[20] == 0.1


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(policy="cosine"), "unknown policy 'cosine'; known: fixed"),
        (dict(by_epoch=True), "key 'policy' is missing"),
        (dict(policy="step"), r"lr_config\.step: got None"),
        (dict(policy="step", step=[0]), r"lr_config\.step: got \[0\]"),
        (dict(policy="step", step=1, gama=1), "unknown key 'gama'; did you mean 'gamma'"),
        (dict(policy="CosineAnnealing"), "exactly one of min_lr and min_lr_ratio"),
        (dict(policy="fixed", warmup="slow"), "warmup: got 'slow'"),
        (dict(policy="fixed", warmup="linear"), "warmup_iters: got 0"),
    ],
)
def test_bad_schedules(cfg, message):
    with pytest.raises(ConfigError, match=message):
        rates(cfg)


def test_optimizer_and_its_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False))
    model[2].weight.requires_grad = False
    cfg = dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=0.1)
    assert len(build_optimizer(model, cfg).param_groups) == 1
    multipliers = dict(norm_decay_mult=0.0, bias_decay_mult=0.5, bias_lr_mult=2.0)
    groups = build_optimizer(model, dict(cfg, paramwise_cfg=multipliers)).param_groups
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (1, 0.2, 0.1),
        (1, 0.4, 0.05),
        (2, 0.2, 0.0),
    ]
    assert type(build_optimizer(model, dict(type="AdamW", lr=1e-3))) is torch.optim.AdamW
    assert grad_clip(None) is None and grad_clip(dict(grad_clip=None)) is None
    assert grad_clip(dict(grad_clip=dict(max_norm=2))) == dict(max_norm=2)
    for bad, message in (
        (dict(type="SDG", lr=1), "unknown optimizer 'SDG'"),
        (dict(type="SGD", lr=1, momentun=1), "did you mean 'momentum'"),
        (dict(type="SGD", lr=-1), "SGD: Invalid learning rate"),
        (dict(type="SGD"), "key 'lr' is missing"),
        (dict(cfg, paramwise_cfg=dict(norm_mult=1)), r"optimizer\.paramwise_cfg: unknown key 'norm_mult'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(model, bad)


# --- files --------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(dict(n=1), path)

    def half(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(
        TrainingError, match=r"cannot write the checkpoint .*last\.pt: No space left on device"
    ):
        checkpoint.save(dict(n=2), path)
    assert checkpoint.load(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    monkeypatch.undo()

    def refuse(source, target):
        assert checkpoint.load(Path(source))["n"] == 3 and checkpoint.load(path)["n"] == 1
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(TrainingError, match="Permission denied"):
        checkpoint.save(dict(n=3), path)
    assert checkpoint.load(path)["n"] == 1


def test_checkpoints_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "last.pt"
    with pytest.raises(TrainingError, match=r"last\.pt: no such checkpoint"):
        checkpoint.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"last\.pt: cannot be read as a checkpoint"):
        checkpoint.load(path)
    torch.save(dict(a=1), path)
    with pytest.raises(TrainingError, match="not a checkpoint of this program"):
        checkpoint.load(path)
    torch.save(dict(format=checkpoint.FORMAT, code=TrainingError), path)
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        checkpoint.load(path)  # would have to import a class


def test_config_differences():
    saved = dict(model=dict(depth=18), data=dict(workers_per_gpu=1), optimizer=dict(lr=0.1), seed=0)
    path = Path("last.pt")
    assert checkpoint.check_config(saved, saved, path) == []
    now = dict(saved, data=dict(workers_per_gpu=4), optimizer=dict(lr=0.2, momentum=0.9))
    assert checkpoint.check_config(saved, now, path) == [
        "optimizer.lr: 0.1 -> 0.2",
        "optimizer.momentum: 'absent' -> 0.9",
    ]
    with pytest.raises(
        TrainingError, match=r"last\.pt: was written by .*\n  model\.depth: 18 -> 50\n  seed: 0 -> 1"
    ):
        checkpoint.check_config(saved, dict(saved, model=dict(depth=50), seed=1), path)


def test_csv_log_keeps_rows_up_to_the_checkpoint(tmp_path: Path):
    path = tmp_path / "steps.csv"
    log = CsvLog(path, ["step", "loss"])
    for i in range(1, 5):
        log.write([i, i / 3])
    with open(path, "a") as file:
        file.write("5,0.12")  # cut off by a kill
    assert [r["step"] for r in read_csv(path)] == ["1", "2", "3", "4"]
    log = CsvLog(path, ["step", "loss"], keep=2)
    log.write([3, ""])
    assert log.rows() == [dict(step=1, loss=0.333333333), dict(step=2, loss=0.666666667), dict(step=3)]
    assert CsvLog(path, ["step", "loss"]).rows() == []
