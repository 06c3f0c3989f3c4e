"""Images for inference: files, and the steps of a validation pipeline in mmcls's terms, on Pillow.

pipeline = Pipeline([dict(type="Resize", size=(256, -1)), dict(type="CenterCrop", crop_size=224),
                     dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])])
x = pipeline(read("cat.jpg"))                # float32 [3, 224, 224]
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.config import ConfigError, check_keys

__all__ = ["ImageError", "Pipeline", "files", "read"]

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_IMPLIED = ("LoadImageFromFile", "ImageToTensor", "ToTensor", "Collect")
_KEYS = {
    "Resize": ["size", "interpolation", "backend"],
    "CenterCrop": ["crop_size"],
    "Normalize": ["mean", "std", "to_rgb"],
}
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it and says why."""


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError(
            "reading images needs Pillow, which is not installed: pip install 'fastres[predict]'"
        ) from None
    return Image, ImageOps


def files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Every path that is no folder, and of folders the files that look like images, in order.

    Raises:
        ValueError: a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not inside:
            raise ValueError(f"{path}: no image ({', '.join(sorted(EXTENSIONS))}) in this folder")
        found += inside
    return found


def read(path: str | os.PathLike[str], channels: int = 3) -> Any:
    """A Pillow image, RGB or with ``channels`` 1 grey, turned as its EXIF data say.

    Raises:
        ImageError: missing, a folder, not an image, or damaged.
        ImportError: Pillow is not installed.
    """
    image_module, ops = _pillow()
    if not os.path.exists(path):
        raise ImageError(f"{path}: no such file")
    if os.path.isdir(path):
        raise ImageError(f"{path}: is a folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what cannot be read raises
            with image_module.open(path) as image:
                image.load()
                return ops.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except image_module.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image, or of a kind that Pillow does not read") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        raise ImageError(f"{path}: damaged or unreadable: {error or type(error).__name__}") from error


class Pipeline:
    """The steps of a config's validation pipeline: Resize, CenterCrop and Normalize, which comes last.

    Args:
        steps: dicts with ``type``. Steps that load and collect are implied; random ones are refused.
        channels: of the images.
        where: what the steps are called in messages.

    Raises:
        ConfigError: an unknown step or key, a wrong value, no Normalize or something after it.
    """

    def __init__(self, steps: Any, channels: int = 3, where: str = "pipeline") -> None:
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise ConfigError(f"{where}: expected a list of dicts, got {steps!r}")
        self._steps: list[dict[str, Any]] = []
        self._mean: Tensor | None = None
        for i, step in enumerate(steps):
            at = f"{where}.{i}"
            if not isinstance(step, Mapping) or "type" not in step:
                raise ConfigError(f"{at}: expected a dict with the key 'type', got {step!r}")
            options = dict(step)
            kind = options.pop("type")
            if kind in _IMPLIED:
                continue
            if kind not in _KEYS:
                raise ConfigError(f"{at}: {kind!r} has no place in inference; wanted {', '.join(_KEYS)}")
            if self._mean is not None:
                raise ConfigError(f"{at}: {kind} after Normalize; Normalize must come last")
            needed = {"Resize": ["size"], "CenterCrop": ["crop_size"], "Normalize": ["mean", "std"]}[kind]
            check_keys(options, _KEYS[kind], f"{at} ({kind})", required=needed)
            if kind == "Normalize":
                self._mean, self._std = (
                    _channel(options[k], channels, f"{at} (Normalize).{k}") for k in ("mean", "std")
                )
                if options.get("to_rgb", True) is not True or float(self._std.min()) <= 0:
                    raise ConfigError(f"{at} (Normalize): wanted to_rgb=True and positive std")
            else:
                self._steps.append(dict(kind=kind, **_geometry(kind, options, at)))
        if self._mean is None:
            raise ConfigError(
                f"{where}: no Normalize step, such as dict(type='Normalize', mean=[127.5], std=[127.5])"
            )

    def __call__(self, image: Any) -> Tensor:
        """float32 [channels, H, W] of a Pillow image."""
        for step in self._steps:
            width, height = image.size
            if step["kind"] == "CenterCrop":
                w, h = step["size"]
                left, top = (width - w) // 2, (height - h) // 2
                image = image.crop((left, top, left + w, top + h))
                continue
            size = step["size"]
            if step["short"]:
                factor = step["short"] / min(width, height)
                size = max(1, round(width * factor)), max(1, round(height * factor))
            image = image.resize(size, step["filter"])
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = data.view(image.height, image.width, -1).permute(2, 0, 1).float()
        assert self._mean is not None
        return (pixels - self._mean) / self._std


def _channel(values: Any, channels: int, at: str) -> Tensor:
    try:
        vector = torch.tensor([float(v) for v in values])
    except (TypeError, ValueError):
        vector = torch.empty(0)
    if len(vector) != channels:
        raise ConfigError(f"{at}: got {values!r}, wanted {channels} numbers (model.backbone.in_channels)")
    return vector.view(-1, 1, 1)


def _geometry(kind: str, options: dict[str, Any], at: str) -> dict[str, Any]:
    name = "size" if kind == "Resize" else "crop_size"
    size, short = options[name], 0
    if kind == "Resize" and isinstance(size, Sequence) and len(size) == 2 and size[1] == -1:
        short, size = size[0], (size[0], size[0])
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ConfigError(f"{at} ({kind}).{name}: got {options[name]!r}, wanted positive integers")
    interpolation = options.get("interpolation", "bilinear")
    if interpolation not in _FILTERS:
        raise ConfigError(
            f"{at} ({kind}).interpolation: got {interpolation!r}, wanted one of {', '.join(_FILTERS)}"
        )
    return dict(size=(pair[1], pair[0]), short=short, filter=_FILTERS[interpolation])
