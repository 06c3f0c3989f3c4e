"""Classify images with a config's model and a checkpoint: the most probable classes of each.

    python -m fastres predict --config configs/resnet50_imagenet.py --checkpoint resnet50.pth cat.jpg photos/

Images go through the config's validation pipeline (`data.val.pipeline`) in batches. A file that is not an image is
reported and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres._registry import MODELS
from fastres.checkpoints import load_checkpoint
from fastres.commands.routes import DTYPES
from fastres.config import ConfigError, load_config
from fastres.images import ImageError, Pipeline, files, read

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a config file with `model` and `data.val.pipeline`")
    parser.add_argument("--checkpoint", required=True, help="of fastres, torchvision, timm or mmpretrain")
    parser.add_argument("images", nargs="+", help="image files, and folders that are searched for them")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each image (default 5)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    parser.add_argument("--classes", type=Path, help="a text file with one class name a line")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default the GPU where there is one")
    parser.add_argument(
        "--dtype", default="fp32", choices=sorted(DTYPES), help="fp16 and bf16: under autocast"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="such as model.head.num_classes=5"
    )


def _model(config: dict[str, Any], checkpoint: str, device: torch.device) -> torch.nn.Module:
    if not isinstance(config.get("model"), dict):
        raise ConfigError("the config has no `model` dict")
    model = MODELS.build(config["model"])
    if not getattr(model, "with_head", False):
        raise ConfigError("the config's model has no head: there are no classes to predict")
    try:
        load_checkpoint(model, checkpoint)
    except (ValueError, TypeError, OSError, ImportError):
        raise
    except Exception as error:  # torch.load raises nearly everything on files that are no checkpoints
        raise ValueError(f"{checkpoint}: cannot be read as a checkpoint ({type(error).__name__})") from error
    return model.to(device, memory_format=torch.channels_last).eval()


def _pipeline(config: dict[str, Any]) -> Pipeline:
    data = config.get("data")
    for part in ("test", "val"):
        steps = data.get(part, {}).get("pipeline") if isinstance(data, dict) else None
        if steps is not None:
            break
    else:
        raise ConfigError("the config has no `data.val.pipeline`")
    backbone = config["model"].get("backbone", {})
    return Pipeline(steps, backbone.get("in_channels", 3), f"data.{part}.pipeline")


def _names(path: Path | None, count: int) -> list[str]:
    if path is None:
        return [str(i) for i in range(count)]
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(names) != count:
        raise ValueError(f"{path}: {len(names)} names; wanted {count}, one for each class of the model")
    return names


def _batches(
    paths: list[Path], pipeline: Pipeline, channels: int, size: int, failed: list[str], advance: Any
) -> Iterator[tuple[list[Path], Tensor]]:
    """Images of one shape, up to ``size`` of them; what cannot be read goes to ``failed``."""
    names: list[Path] = []
    images: list[Tensor] = []
    for path in paths:
        try:
            image = pipeline(read(path, channels))
        except ImageError as error:
            failed.append(str(error))
            advance(1)
            continue
        if images and (len(images) == size or image.shape != images[0].shape):
            yield names, torch.stack(images)
            names, images = [], []
        names.append(path)
        images.append(image)
    if images:
        yield names, torch.stack(images)


def _bar(total: int) -> Any:
    """A progress bar on a terminal; nothing elsewhere or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext(None)
    return tqdm(total=total, unit="img", leave=False, dynamic_ncols=True, disable=None)


def run(args: argparse.Namespace) -> int:
    for name in ("top", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; wanted at least 1")
    config = load_config(args.config, args.cfg_options)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    paths = files(args.images)
    model, pipeline = _model(config, args.checkpoint, device), _pipeline(config)
    names = _names(args.classes, model.head.num_classes)  # type: ignore[union-attr, arg-type]
    channels = config["model"].get("backbone", {}).get("in_channels", 3)
    reduced = args.dtype != "fp32"
    failed: list[str] = []
    with _bar(len(paths)) as bar:
        advance = bar.update if bar is not None else lambda n: None
        say = bar.write if bar is not None else print
        for found, x in _batches(paths, pipeline, channels, args.batch, failed, advance):
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, DTYPES[args.dtype] if reduced else None, reduced),
            ):
                probabilities = model.predict(x)  # type: ignore[operator]
            best = probabilities.topk(min(args.top, len(names)), dim=1)
            for path, values, indices in zip(found, best.values.tolist(), best.indices.tolist(), strict=True):
                say(_line(path, [(names[i], v) for i, v in zip(indices, values, strict=True)], args.json))
            advance(len(found))
    for message in failed:
        print(message, file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(paths)} files were left out", file=sys.stderr)
    return 1 if failed else 0


def _line(path: Path, classes: list[tuple[str, float]], as_json: bool) -> str:
    if as_json:
        return json.dumps(
            {"image": str(path), "classes": [{"class": c, "probability": p} for c, p in classes]}
        )
    return f"{path}  " + "  ".join(f"{c} {100 * p:.2f} %" for c, p in classes)
