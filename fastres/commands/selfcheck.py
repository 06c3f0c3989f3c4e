"""Parity of every fused operation on this machine's device; exit code 1 on a miss.

Each operation is run forward and backward on random data and held against float64: the error may be at most twice
eager PyTorch's plus a floor. `error` is the largest one as a part of what is allowed, so above 1.00 is a miss.
Set TRITON_INTERPRET=1 to check the kernels themselves on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import time

import torch

from fastres import selfcheck
from fastres.commands._text import columns
from fastres.kernels._triton import INTERPRET

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="", help="cuda, cuda:1 or cpu; default the GPU where there is one"
    )
    parser.add_argument(
        "--small", action="store_true", help="few pixels, for slow tools such as compute-sanitizer"
    )


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"))
    how = (
        "Triton's interpreter"
        if INTERPRET
        else "kernels"
        if device.type == "cuda"
        else "plain-torch operators"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"selfcheck on {name}: {how}")
    start = time.perf_counter()
    results = list(selfcheck.run(device, args.small or INTERPRET))
    rows = [
        [
            r.case,
            r.dtype,
            r.layout,
            r.route,
            "-" if r.error else f"{r.worst:.2f}",
            r.what,
            "ok" if r.ok else "MISS",
        ]
        for r in results
    ]
    print(columns(rows, ("operation", "dtype", "layout", "route", "error", "worst in", "")))
    missed = [r for r in results if not r.ok]
    for r in missed:
        if r.error:
            print(f"{r.case}, {r.dtype}, {r.layout}: {r.error}")
    seconds = time.perf_counter() - start
    print(
        f"{len(results) - len(missed)} of {len(results)} within the rule, {len(missed)} missed, {seconds:.1f} s"
    )
    return 1 if missed else 0
