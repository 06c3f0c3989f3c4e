"""Data sets: scikit-learn's digits, a folder of images for each class, and synthetic images for throughput.

A data set is a list of labelled images. ``dataset[epoch, index]`` is one `Sample`, its augmentation a function of
(seed, epoch, index) alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastres.config import ConfigError, check_keys
from training.errors import TrainingError, require
from training.transforms import Pipeline, build_pipeline

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDER_TYPES = ("ImageFolder", "ImageNet", "CustomDataset")


class Sample(NamedTuple):
    image: Tensor | None  # uint8 [C, H, W]; None: left out
    label: int
    broken: tuple[str, ...] = ()  # what could not be read on the way here, with reasons


class Images(Dataset):
    """Base: subclasses set ``classes`` and ``labels`` and say how image ``index`` is read."""

    classes: list[str]
    labels: list[int]

    def __init__(self, pipeline: Pipeline, channels: int, seed: int, training: bool) -> None:
        self.pipeline, self.channels, self.seed, self.training = pipeline, channels, seed, training

    def read(self, index: int) -> Any:
        """PIL image ``index`` in mode 'L' or 'RGB'. Raises TrainingError where it cannot be read."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """In training the next readable image stands in for a broken one, elsewhere it is left out."""
        epoch, first = key
        broken: list[str] = []
        for offset in range(min(len(self), 100) if self.training else 1):
            index = (first + offset) % len(self)
            try:
                image = self.read(index)
            except TrainingError as e:
                broken.append(str(e))
                continue
            rng = Random(f"{self.seed}/{epoch}/{first}")
            return Sample(self.pipeline(image, rng), self.labels[index], tuple(broken))
        return Sample(None, self.labels[first], tuple(broken))


class Digits(Images):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, split once and for all by ``split_seed``.

    Args:
        split: 'train' or 'test'.
        test_fraction: share of every class that is held out.
        split_seed: seed of the split; the run's own seed does not change it.
    """

    def __init__(
        self, *common: Any, split: str, test_fraction: float = 0.2, split_seed: int = 0, **options: Any
    ) -> None:
        super().__init__(*common, **options)
        if split not in ("train", "test"):
            raise ConfigError(f"Digits: split: got {split!r}, wanted 'train' or 'test'")
        if not 0 < test_fraction < 1:
            raise ConfigError(
                f"Digits: test_fraction: got {test_fraction!r}, wanted a number between 0 and 1"
            )
        bunch = require("sklearn.datasets", "the digits data").load_digits()
        image = require("PIL.Image", "the digits data")
        labels = [int(t) for t in bunch.target]
        held_out = set(hold_out(labels, test_fraction, split_seed))
        chosen = [i for i in range(len(labels)) if (i in held_out) == (split == "test")]
        pixels = (bunch.images * (255 / 16)).round().astype("uint8")
        self.classes = [str(c) for c in range(10)]
        self.labels = [labels[i] for i in chosen]
        mode = "L" if self.channels == 1 else "RGB"
        self.images = [image.fromarray(pixels[i]).convert(mode) for i in chosen]

    def read(self, index: int) -> Any:
        return self.images[index]


class ImageFolder(Images):
    """A folder for each class, as ``data_prefix/cat/any/where/001.jpg``.

    Args:
        data_prefix: the folder of class folders.
        classes: the classes in order; default the folder names, sorted. Given, other folders are an error.
        part: None for all images; 'train' or 'val' for the rest or the ``held_out`` share of each class.
    """

    def __init__(
        self,
        *common: Any,
        data_prefix: str,
        classes: list[str] | None = None,
        part: str | None = None,
        held_out: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(*common, **options)
        require("PIL.Image", "reading images")
        found = class_folders(Path(data_prefix))
        self.classes = sorted(found) if classes is None else list(classes)
        if unknown := sorted(set(found) - set(self.classes)):
            raise TrainingError(
                f"{data_prefix}: class folder {unknown[0]!r} has no counterpart in the training data "
                f"({len(self.classes)} classes: {_some(self.classes)})"
            )
        self.paths: list[str] = []
        self.labels = []
        for label, name in enumerate(self.classes):
            paths = _image_files(found[name]) if name in found else []
            if not paths and name in found:
                kinds = ", ".join(sorted(EXTENSIONS))
                raise TrainingError(
                    f"{found[name]}: class {name!r} is empty: no image ({kinds}) in this folder"
                )
            self.paths += paths
            self.labels += [label] * len(paths)
        if part is not None:
            self._keep(part, held_out)

    def _keep(self, part: str, held_out: float) -> None:
        for label, name in enumerate(self.classes):
            if self.labels.count(label) < 2:
                raise TrainingError(
                    f"class {name!r} has one image; it takes two to split off a validation set"
                )
        out = set(hold_out(self.labels, held_out, seed=0))
        chosen = [i for i in range(len(self.labels)) if (i in out) == (part == "val")]
        self.paths, self.labels = [self.paths[i] for i in chosen], [self.labels[i] for i in chosen]

    def read(self, index: int) -> Any:
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata; what cannot be read raises
                with Image.open(path) as image:
                    image.load()
                    turned = ImageOps.exif_transpose(image)
                    return turned.convert("L" if self.channels == 1 else "RGB")
        except Exception as e:  # Pillow's decoders raise nearly everything on damaged files
            raise TrainingError(f"{path}: {e or type(e).__name__}") from e


class Synthetic(Images):
    """Random images with random labels, always the same few; for throughput, not for accuracy.

    Args:
        image_size: pixels on each side.
        num_classes: number of labels.
        length: how many images count as an epoch.
    """

    def __init__(
        self, *common: Any, image_size: int = 224, num_classes: int = 1000, length: int = 1280, **options: Any
    ) -> None:
        super().__init__(*common, **options)
        for name, value in (("image_size", image_size), ("num_classes", num_classes), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Synthetic: {name}: got {value!r}, wanted an integer >= 1")
        self.image_size = image_size
        self.classes = [str(c) for c in range(num_classes)]
        generator = torch.Generator().manual_seed(self.seed)
        self.labels = torch.randint(num_classes, (length,), generator=generator).tolist()


def build_dataset(
    cfg: Mapping[str, Any], channels: int, seed: int, where: str, training: bool, **extra: Any
) -> Images:
    """The data set of a ``data.train`` or ``data.val`` dict.

    Raises:
        ConfigError: unknown or wrong keys.
        TrainingError: the data are not there or not usable.
    """
    options = check_keys(cfg, None, where, required=["type", "pipeline"])
    kind, steps = options.pop("type"), options.pop("pipeline")
    keys: dict[str, tuple[type[Images], list[str]]] = {
        "Digits": (Digits, ["split", "test_fraction", "split_seed"]),
        "Synthetic": (Synthetic, ["image_size", "num_classes", "length"]),
        **{k: (ImageFolder, ["data_prefix", "part", "held_out"]) for k in FOLDER_TYPES},
    }
    if kind not in keys:
        raise ConfigError(f"{where}.type: unknown data set {kind!r}; known: {', '.join(keys)}")
    dataset, allowed = keys[kind]
    needed = {"Digits": ["split"], "Synthetic": []}.get(kind, ["data_prefix"])
    check_keys(options, allowed, where, required=needed)
    if dataset is not ImageFolder:
        extra.pop("classes", None)
    pipeline = build_pipeline(steps, channels, f"{where}.pipeline")
    return dataset(pipeline, channels, seed, training, **options, **extra)


def hold_out(labels: list[int], fraction: float, seed: int) -> list[int]:
    """Indices of ``fraction`` of every class, at least one of each and never all."""
    chosen: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        chosen += Random(f"{seed}/{label}").sample(members, count)
    return sorted(chosen)


def class_folders(root: Path) -> dict[str, Path]:
    """Folders by class name. TrainingError where ``root`` is missing, a file, or has no folder in it."""
    if not root.exists():
        raise TrainingError(
            f"{root}: no such folder; expected a folder with one subfolder of images for each class"
        )
    if not root.is_dir():
        raise TrainingError(
            f"{root}: is a file; expected a folder with one subfolder of images for each class"
        )
    folders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not folders:
        raise TrainingError(
            f"{root}: no class folders in it; expected one subfolder of images for each class"
        )
    return folders


def _image_files(folder: Path) -> list[str]:
    files = []
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        files += [os.path.join(parent, n) for n in sorted(names) if Path(n).suffix.lower() in EXTENSIONS]
    return files


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
