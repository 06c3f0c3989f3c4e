"""The route that every layer of a model takes, and why.

    python -m fastres routes configs/resnet18_digits.py
    python -m fastres routes --model resnet50 --batch 256 --dtype bf16 --gpu 9.0

The model is traced on tensors without values, so a large batch costs nothing and `--gpu CAPABILITY` answers for a GPU
that this machine does not have (with the stated defaults: a table tuned on that GPU is not at hand).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Any

import torch

from fastres._registry import MODELS
from fastres.commands._text import columns
from fastres.config import load_config
from fastres.kernels import _tuned
from fastres.routes import routes

__all__ = ["add_arguments", "model_config", "run"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_TYPES = dict(
    resnet="ResNet", resnetv1c="ResNetV1c", resnetv1d="ResNetV1d", resnext="ResNeXt", seresnet="SEResNet"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a config file with a `model` dict")
    parser.add_argument("--model", help="resnet18 .. resnet152 instead of a config file")
    parser.add_argument("--norm", help="norm layer to build the model with, such as BN or FusedBN")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels along a side")
    parser.add_argument("--channels", type=int, default=3, help="of the image")
    parser.add_argument(
        "--dtype", default="fp32", choices=sorted(DTYPES), help="fp16 and bf16: under autocast"
    )
    parser.add_argument("--nchw", action="store_true", help="contiguous instead of channels_last")
    parser.add_argument("--infer", action="store_true", help="eval mode instead of training")
    parser.add_argument(
        "--gpu", metavar="CAPABILITY", help="decide for a GPU, such as 9.0, there or not; or `cpu`"
    )


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """The model dict of a config file or of a name such as resnet50; ValueError where neither or both are given."""
    if bool(args.config) == bool(args.model):
        raise ValueError("wanted a config file or --model, one of them")
    if args.config:
        config = load_config(args.config)
        if not isinstance(config.get("model"), dict):
            raise ValueError(f"{args.config} has no `model` dict")
        config = config["model"]
    else:
        kind = re.fullmatch(r"(resnet|resnetv1c|resnetv1d|resnext|seresnet)(\d+)", args.model.lower())
        if not kind:
            raise ValueError(
                f"--model is {args.model!r}; wanted resnet18, 34, 50, 101 or 152, one of resnetv1c, resnetv1d, resnext "
                "and seresnet with a depth, or a config file"
            )
        config = dict(type=_TYPES[kind[1]], depth=int(kind[2]))
    if args.norm:
        backbone = config.get("backbone", config)
        backbone["norm_cfg"] = dict(type=args.norm)
    return config


def _capability(text: str | None) -> tuple[int, int] | None:
    if text == "cpu" or text is None and not torch.cuda.is_available():
        return None
    if text is None:
        return torch.cuda.get_device_capability()
    major, _, minor = text.partition(".")
    if not major.isdigit() or not (minor or "0").isdigit():
        raise ValueError(f"--gpu is {text!r}; wanted a compute capability such as 9.0, or cpu")
    return int(major), int(minor or 0)


def run(args: argparse.Namespace) -> int:
    config, capability = model_config(args), _capability(args.gpu)
    shape = (args.batch, args.channels, args.size, args.size)
    table = _tuned.EMPTY if args.gpu else _tuned.active()
    with _tuned.using(table):
        found = routes(
            lambda: MODELS.build(config), shape, DTYPES[args.dtype], not args.nchw, not args.infer, capability
        )
    where = "CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
    print(f"{'inference' if args.infer else 'training'} on {where}, input {list(shape)}, {args.dtype}")
    rows = []
    for layer, c in found:
        rows.append(
            [layer or "-", c.op, "x".join(map(str, c.shape)), str(c.dtype)[6:], c.layout, c.route, c.reason]
        )
    if rows:
        print(columns(rows, ("norm", "operation", "shape", "dtype", "layout", "route", "reason")))
    counts = ", ".join(f"{n} {route}" for route, n in Counter(c.route for _, c in found).most_common())
    print(f"{len(found)} decisions: {counts}" if found else "no fused layer: every norm is PyTorch's own")
    return 0
