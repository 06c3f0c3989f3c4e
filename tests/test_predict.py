"""``python -m fastres predict``: values, batches, and what it says about files that are no images."""

from __future__ import annotations

import json

import pytest
import torch

from fastres._registry import MODELS
from fastres.cli import main
from fastres.config import ConfigError, load_config
from fastres.images import ImageError, Pipeline, files, read
from tests.parity import randomize

image_module = pytest.importorskip(
    "PIL.Image", reason="Pillow is not installed: pip install 'fastres[predict]'"
)
CONFIG = """
model = dict(type="ImageClassifier", backbone=dict(type="ResNet_CIFAR", depth=18, base_channels=8, stem_channels=8),
             neck=dict(type="GlobalAveragePooling"), head=dict(type="LinearClsHead", num_classes=7, in_channels=64))
normalize = dict(type="Normalize", mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0])
data = dict(val=dict(type="ImageFolder", data_prefix="x", pipeline=[
    dict(type="LoadImageFromFile"), dict(type="Resize", size=(24, -1)), dict(type="CenterCrop", crop_size=(20, 18)),
    normalize]))
"""


@pytest.fixture
def given(tmp_path, generator):
    """A config, a checkpoint and five pictures in two folders."""
    (tmp_path / "config.py").write_text(CONFIG)
    model = randomize(MODELS.build(load_config(tmp_path / "config.py")["model"])).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "net.pth")
    (tmp_path / "more").mkdir()
    for i in range(5):
        h, w = 30 + 7 * i, 41 - 3 * i
        pixels = torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8)
        folder = tmp_path / "more" if i > 2 else tmp_path
        image_module.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path, model


def call(folder, *more):
    return main(
        [
            "predict",
            "--config",
            str(folder / "config.py"),
            "--checkpoint",
            str(folder / "net.pth"),
            *map(str, more),
        ]
    )


def expected(folder, model, path):
    pipeline = Pipeline(load_config(folder / "config.py")["data"]["val"]["pipeline"])
    with torch.no_grad():
        return model(pipeline(read(path))[None]).softmax(1)[0]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_top_classes_of_files_and_folders(given, capsys, batch):
    folder, model = given
    paths = [folder / "2.png", folder / "0.png", folder / "more"]
    assert call(folder, *paths, "--json", "--batch", batch, "--top", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["image"].rsplit("/", 1)[-1] for r in rows] == ["2.png", "0.png", "3.png", "4.png"]
    for row in rows:
        wanted = expected(folder, model, row["image"])
        best = wanted.topk(3)
        assert [c["class"] for c in row["classes"]] == [str(i) for i in best.indices.tolist()]
        assert [c["probability"] for c in row["classes"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_text_and_class_names(given, capsys):
    folder, _ = given
    (folder / "names.txt").write_text("\n".join("abcdefg"))
    assert call(folder, folder / "0.png", "--classes", folder / "names.txt", "--top", 20) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("%") == 7 and all(f"  {c} " in line for c in "abcdefg")
    (folder / "names.txt").write_text("a")
    assert call(folder, folder / "0.png", "--classes", folder / "names.txt") == 1
    assert "1 names; wanted 7" in capsys.readouterr().err


def test_files_that_are_no_images(given, capsys):
    folder, _ = given
    (folder / "notes.txt").write_text("hello")
    whole = (folder / "1.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.jpg").write_bytes(b"")
    paths = [folder / n for n in ("notes.txt", "0.png", "half.png", "nothing.jpg", "gone.png", "1.png")]
    assert call(folder, *paths) == 1
    shown = capsys.readouterr()
    assert [line.split("  ")[0].rsplit("/", 1)[-1] for line in shown.out.splitlines()] == ["0.png", "1.png"]
    assert "notes.txt: not an image" in shown.err and "half.png: damaged or unreadable" in shown.err
    assert "nothing.jpg: not an image" in shown.err and "gone.png: no such file" in shown.err
    assert "4 of 6 files were left out" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "0"], "--top is 0"),
        (["--cfg-options", "model.head.num_classes=9"], "2 misshaped"),
        (["--cfg-options", "data.val.pipeline=none"], "no `data.val.pipeline`"),
        (["--cfg-options", "model.backbone.in_channels=1"], "misshaped"),
    ],
)
def test_wrong_options_are_told_in_one_line(given, capsys, options, message):
    folder, _ = given
    assert call(folder, folder / "0.png", *options) == 1
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out


def test_missing_checkpoint_and_empty_folder(given, capsys):
    folder, _ = given
    (folder / "empty").mkdir()
    assert call(folder, folder / "empty") == 1
    assert "no image" in capsys.readouterr().err
    (folder / "net.pth").write_bytes(b"not a checkpoint")
    assert call(folder, folder / "0.png") == 1
    assert "is not a file of tensors and plain values" in capsys.readouterr().err
    (folder / "net.pth").unlink()
    assert call(folder, folder / "0.png") == 1
    assert "is no file" in capsys.readouterr().err


NORMALIZE = dict(type="Normalize", mean=[1, 2, 3], std=[1, 1, 1])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("x", "expected a list"),
        ([3], "expected a dict"),
        ([], "no Normalize"),
        ([dict(type="RandomFlip"), NORMALIZE], "'RandomFlip' has no place in inference"),
        ([NORMALIZE, dict(type="CenterCrop", crop_size=3)], "after Normalize"),
        ([dict(type="Resize", size=0), NORMALIZE], "wanted positive integers"),
        ([dict(type="Resize", size=3, interpolation="x"), NORMALIZE], "interpolation"),
        ([dict(type="Resize", sizes=3), NORMALIZE], "sizes"),
        ([dict(NORMALIZE, mean=[1])], "wanted 3 numbers"),
        ([dict(NORMALIZE, std=[1, 0, 1])], "positive std"),
    ],
)
def test_pipelines_that_are_wrong(steps, message):
    with pytest.raises(ConfigError, match=message):
        Pipeline(steps)


def test_pipeline_gives_what_training_evaluates_on(tmp_path, generator):
    """The same pixels as the training example's own pipeline."""
    import sys
    from pathlib import Path
    from random import Random

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from training.transforms import build_pipeline

    steps = [dict(type="Resize", size=(24, -1)), dict(type="CenterCrop", crop_size=20), NORMALIZE]
    image = image_module.fromarray(
        torch.randint(256, (37, 51, 3), generator=generator, dtype=torch.uint8).numpy()
    )
    theirs = build_pipeline(steps, 3, "x")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in theirs.normalization)
    assert torch.equal(Pipeline(steps)(image), (theirs(image, Random(0)).float() - mean) / std)


def test_reading(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        read(tmp_path)
    image_module.new("RGBA", (3, 2), (9, 8, 7, 255)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").mode == "RGB" and read(tmp_path / "a.png", 1).mode == "L"
    assert files([tmp_path]) == [tmp_path / "a.png"]
