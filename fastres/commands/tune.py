"""Measure launch configurations and routes of training and inference on this GPU and write its tuning table.

Every configuration and every route is checked for its values before it is timed. A run that meets its budget, or is
stopped, goes on where it stopped when the command is given again. The table goes to the user's cache directory
(FASTRES_CACHE names another), where it goes before the one in the package; nothing tunes but this command. `--trial`
tries the machinery on a CPU, in Triton's interpreter (TRITON_INTERPRET=1); its table serves nobody.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from fastres._jobs import jobs, shares
from fastres._registry import MODELS
from fastres._workload import workload
from fastres.commands.routes import DTYPES, model_config
from fastres.kernels import _tuned
from fastres.kernels._triton import INTERPRET
from fastres.tuning import Tuner

__all__ = ["add_arguments", "run", "seconds"]

# What a trial tunes without a model: one stage of bottlenecks, in few and small programs.
TINY = dict(
    type="ResNet", depth=50, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), stem_channels=16,
    base_channels=16,
)  # fmt: skip


def seconds(text: str) -> float:
    """``90``, ``90s``, ``8m`` or ``1h`` in seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], None)
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a time such as 90s or 8m") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted more than nothing")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        help="a config file with a `model` dict (default: resnet50; in a trial a tiny one)",
    )
    parser.add_argument("--model", help="resnet18 .. resnet152 instead of a config file")
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    parser.add_argument("--size", type=int, default=224, help="pixels along a side")
    parser.add_argument("--channels", type=int, default=3, help="of the image")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument(
        "--layout",
        default="channels_last",
        choices=("channels_last", "nchw", "both"),
        help="of the activations",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="what a training step uses (default: both)")
    mode.add_argument("--infer", action="store_true", help="what an inference pass uses (default: both)")
    parser.add_argument("--budget", type=seconds, default=480.0, help="time to spend, such as 8m (default)")
    parser.add_argument(
        "--out", type=Path, help="the table to write, instead of the one in the cache directory"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed regions of each configuration")
    parser.add_argument("--trial", action="store_true", help="on the CPU, to try the machinery")
    parser.set_defaults(norm=None)


def run(args: argparse.Namespace) -> int:
    if not args.config and not args.model and not args.trial:
        args.model = "resnet50"
    if not torch.cuda.is_available() and not args.trial:
        raise ValueError("there is no CUDA device to tune for; --trial tries the machinery on the CPU")
    if args.trial and not args.out:
        raise ValueError("--trial wants --out: its table is of no use in the cache directory")
    if args.trial and not INTERPRET:
        raise ValueError("--trial runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    device = torch.device("cpu" if args.trial else "cuda")
    capability = (9, 0) if args.trial else torch.cuda.get_device_capability(device)
    path = args.out
    if path is None:
        path = _tuned.cache_folder() / _tuned.slug(torch.cuda.get_device_name(device), capability)
    start = time.perf_counter()
    tuner = Tuner(device, path, rounds=args.rounds)
    if args.trial:
        tuner.timing |= dict(region=0.0, warmup=0)
    config = model_config(args) if args.config or args.model else dict(TINY)
    works = []
    model = MODELS.build(config)
    for batch in args.batch:
        shape = (batch, args.channels, args.size, args.size)
        for last in {"both": (True, False), "nchw": (False,)}.get(args.layout, (True,)):
            for train in (True, False):
                if args.infer if train else args.train:
                    continue
                work = workload(
                    lambda: MODELS.build(config), shape, DTYPES[args.dtype], last, capability, train
                )
                works.append([*tuner.sites(work.calls), *jobs(work)])
    todo = shares(*works)
    left_s = args.budget - (time.perf_counter() - start)
    measured, left = tuner.run(todo, left_s, print, model)
    for line in tuner.refused:
        print(f"refused: {line}")
    print(f"{measured} measured in {time.perf_counter() - start:.0f} s, {left} of {len(todo)} left; {path}")
    if not args.trial:
        _tuned.reset()
    return 1 if tuner.refused else 0
