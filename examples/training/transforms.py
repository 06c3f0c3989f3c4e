"""Image transforms under mmcls' names, on PIL images, each a function of (image, random.Random).

The random numbers come in from outside, so an augmentation is a pure function of (seed, epoch, image): the same with
any number of workers, and the same after a resume.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.config import ConfigError
from training.errors import require

Transform = Callable[[Any, Random], Any]
# Steps of mmcls pipelines that the loader does itself.
IMPLIED = ("LoadImageFromFile", "ImageToTensor", "ToTensor", "Collect")


class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to ``size`` (Szegedy et al. 2015, section 6)."""

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        backend: str = "pillow",
    ) -> None:
        self.size = _pair(size)
        self.scale, self.ratio = scale, ratio
        self.filter = _filter(interpolation)

    def __call__(self, image: Any, rng: Random) -> Any:
        width, height = image.size
        area = width * height
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            target, ratio = area * rng.uniform(*self.scale), math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                break
        else:  # an elongated image: the largest centred crop of an allowed ratio
            w = min(width, max(1, round(height * self.ratio[1])))
            h = min(height, max(1, round(width / self.ratio[0])))
            left, top = (width - w) // 2, (height - h) // 2
        return image.resize(self.size, self.filter, box=(left, top, left + w, top + h))


class Resize:
    """To ``size``: an int for a square, (height, width), or (short, -1) for the short side alone."""

    def __init__(
        self, size: int | Sequence[int], interpolation: str = "bilinear", backend: str = "pillow"
    ) -> None:
        self.short = size[0] if isinstance(size, Sequence) and len(size) == 2 and size[1] == -1 else None
        self.size = (0, 0) if self.short else _pair(size)
        self.filter = _filter(interpolation)

    def __call__(self, image: Any, rng: Random) -> Any:
        if self.short is None:
            return image.resize(self.size, self.filter)
        width, height = image.size
        factor = self.short / min(width, height)
        return image.resize((max(1, round(width * factor)), max(1, round(height * factor))), self.filter)


class CenterCrop:
    """The middle ``crop_size``, padded with zeros where the image is smaller."""

    def __init__(self, crop_size: int | Sequence[int]) -> None:
        self.size = _pair(crop_size)

    def __call__(self, image: Any, rng: Random) -> Any:
        left, top = (image.width - self.size[0]) // 2, (image.height - self.size[1]) // 2
        return image.crop((left, top, left + self.size[0], top + self.size[1]))


class RandomCrop:
    """A crop of ``size`` at a random place, after ``padding`` pixels of ``pad_val`` on every side."""

    def __init__(self, size: int | Sequence[int], padding: int = 0, pad_val: int = 0) -> None:
        self.size, self.padding, self.pad_val = _pair(size), padding, pad_val

    def __call__(self, image: Any, rng: Random) -> Any:
        if self.padding:
            ops = require("PIL.ImageOps", "RandomCrop")
            fill = self.pad_val if image.mode == "L" else (self.pad_val,) * 3
            image = ops.expand(image, self.padding, fill)
        left = rng.randint(0, max(0, image.width - self.size[0]))
        top = rng.randint(0, max(0, image.height - self.size[1]))
        return image.crop((left, top, left + self.size[0], top + self.size[1]))


class RandomFlip:
    """Mirrors with probability ``flip_prob``, 'horizontal' or 'vertical'."""

    def __init__(self, flip_prob: float = 0.5, direction: str = "horizontal") -> None:
        if direction not in ("horizontal", "vertical"):
            raise ValueError(f"direction: got {direction!r}, wanted 'horizontal' or 'vertical'")
        transpose = require("PIL.Image", "RandomFlip").Transpose
        self.method = transpose.FLIP_LEFT_RIGHT if direction == "horizontal" else transpose.FLIP_TOP_BOTTOM
        self.flip_prob = flip_prob

    def __call__(self, image: Any, rng: Random) -> Any:
        return image.transpose(self.method) if rng.random() < self.flip_prob else image


TRANSFORMS: dict[str, type] = {
    c.__name__: c for c in (RandomResizedCrop, Resize, CenterCrop, RandomCrop, RandomFlip)
}


class Normalization(NamedTuple):
    """Mean and standard deviation for every channel, on the scale of 0 to 255; applied on the device."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pipeline(NamedTuple):
    transforms: list[Transform]
    normalization: Normalization

    def __call__(self, image: Any, rng: Random) -> Tensor:
        """A uint8 tensor [C, H, W] of an 'L' or 'RGB' image."""
        for transform in self.transforms:
            image = transform(image, rng)
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1).contiguous()


def build_pipeline(steps: Sequence[Mapping[str, Any]], channels: int, where: str) -> Pipeline:
    """A pipeline from mmcls-style steps. ``Normalize`` must be the last that changes the image.

    Raises:
        ConfigError: an unknown step or argument, a wrong value, Normalize missing, misplaced or of another number of
            channels; naming ``where`` and the step.
    """
    transforms: list[Transform] = []
    normalization = None
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise ConfigError(f"{where}: expected a list of dicts, got {steps!r}")
    for i, step in enumerate(steps):
        at = f"{where}.{i}"
        if not isinstance(step, Mapping) or "type" not in step:
            raise ConfigError(f"{at}: expected a dict with the key 'type', got {step!r}")
        arguments = {k: v for k, v in step.items() if k != "type"}
        if step["type"] in IMPLIED:
            continue
        if normalization is not None:
            raise ConfigError(f"{at}: {step['type']} after Normalize; Normalize must come last")
        if step["type"] == "Normalize":
            normalization = _normalization(arguments, channels, at)
        else:
            transforms.append(_build(step["type"], arguments, at))
    if normalization is None:
        raise ConfigError(
            f"{where}: no Normalize step, such as dict(type='Normalize', mean=[127.5], std=[127.5])"
        )
    return Pipeline(transforms, normalization)


def _build(kind: str, arguments: dict[str, Any], at: str) -> Transform:
    if kind not in TRANSFORMS:
        known = ", ".join([*TRANSFORMS, "Normalize"])
        raise ConfigError(f"{at}: unknown transform {kind!r}; known: {known}")
    wanted = list(inspect.signature(TRANSFORMS[kind]).parameters)
    unknown = [k for k in arguments if k not in wanted]
    if unknown:
        raise ConfigError(f"{at}: {kind}: unknown key {unknown[0]!r}; known: {', '.join(wanted)}")
    try:
        return TRANSFORMS[kind](**arguments)
    except (TypeError, ValueError, KeyError) as e:
        raise ConfigError(f"{at}: {kind}: {e}") from e


def _normalization(arguments: dict[str, Any], channels: int, at: str) -> Normalization:
    try:
        mean, std = tuple(map(float, arguments.pop("mean"))), tuple(map(float, arguments.pop("std")))
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{at}: Normalize: mean and std must be lists of {channels} numbers") from e
    if not arguments.pop("to_rgb", True):
        raise ConfigError(f"{at}: Normalize: to_rgb=False: images are loaded as RGB, only True is supported")
    if arguments:
        raise ConfigError(f"{at}: Normalize: unknown key {next(iter(arguments))!r}; known: mean, std, to_rgb")
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"{at}: Normalize: got {len(mean)} means and {len(std)} stds, wanted {channels} each "
            "(model.backbone.in_channels)"
        )
    if min(std) <= 0:
        raise ConfigError(f"{at}: Normalize: std: got {list(std)}, wanted positive numbers")
    return Normalization(mean, std)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(width, height) of a size given as an int or as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"size: got {size!r}, wanted positive integers")
    return width, height


def _filter(interpolation: str) -> Any:
    names = {"nearest": 0, "bilinear": 2, "bicubic": 3, "lanczos": 1}
    if interpolation not in names:
        raise ValueError(f"interpolation: got {interpolation!r}, wanted one of {', '.join(names)}")
    return require("PIL.Image", "Resize").Resampling(names[interpolation])
