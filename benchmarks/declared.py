"""Declared bytes of every operator against what a profiler counts: `python -m benchmarks.declared --ncu OUT.csv`.

Without arguments it runs every fused operator of a training step once, a marker kernel before each, and prints what
each declares; that is the program to profile. With ``--ncu`` it runs itself under Nsight Compute, sums the bytes of
each operator's kernels between its markers, and prints both side by side. Caches keep part of a small tensor, so the
profiler's figure may be below the declared one; above it by much means a pass that was not declared.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.passes import passes_of
from fastres import selfcheck
from fastres.kernels._library import NAMESPACE

__all__ = ["compare", "main", "operators"]

MARKER = (
    "lshift"  # in the name of the kernel that torch.bitwise_left_shift launches, which nothing else here does
)
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")


class _Marked(TorchDispatchMode):
    """Launches the marker before every operator of this package and lists what each declares."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.one = torch.ones(1, dtype=torch.int32, device=device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace == NAMESPACE
        if ours:
            torch.bitwise_left_shift(self.one, 1)
        out = func(*args, **(kwargs or {}))
        if ours:
            (raw,), known = passes_of(func, args, kwargs or {}, out)
            torch.bitwise_left_shift(self.one, 1)
            bytes_ = raw.workspace + sum(b for _, b in (*raw.reads, *raw.writes))
            self.found.append(dict(op=raw.kernel, bytes=bytes_, declared=known))
        return out


def operators(device: torch.device, shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Run the operations of ``selfcheck`` forward and backward at this shape: every operator and its declared bytes."""
    route = "triton" if device.type == "cuda" else "reference"
    dtype = torch.bfloat16
    marked = _Marked(device)
    from fastres import functional

    for case in selfcheck.cases(device, shape=shape):
        tensors = selfcheck.leaves(case, dtype, torch.channels_last)
        leaves = [t for t in tensors.values() if t.requires_grad]
        with functional.backend(route), marked:
            out = case.run(tensors)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    return marked.found


def measured(lines: Iterable[str]) -> list[dict[str, float]]:
    """Sums of every segment between two markers of an Nsight Compute CSV (``--csv --page raw`` or metrics alone)."""
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))
    kernels: dict[str, dict[str, Any]] = {}
    for r in rows:
        kernel = kernels.setdefault(r["ID"], {"name": r["Kernel Name"]})
        scale = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(r["Metric Unit"], 1.0)
        kernel[r["Metric Name"]] = float(r["Metric Value"].replace(",", "")) * scale
    segments: list[dict[str, float]] = []
    inside = False
    for kernel in kernels.values():
        if MARKER in kernel["name"]:
            inside = not inside
            if inside:
                segments.append({"bytes": 0.0, "kernels": 0})
        elif inside:
            segments[-1]["bytes"] += kernel.get(METRICS[0], 0.0) + kernel.get(METRICS[1], 0.0)
            segments[-1]["kernels"] += 1
    return segments


def compare(declared: list[dict[str, Any]], counted: list[dict[str, float]]) -> str:
    """A line for every operator; ValueError where the profile has another number of operators."""
    if len(declared) != len(counted):
        raise ValueError(f"the profile has {len(counted)} operators, the program ran {len(declared)}")
    lines = [f"{'operator':<28}{'declared MB':>12}{'profiler MB':>12}{'ratio':>8}{'kernels':>9}"]
    for d, c in zip(declared, counted, strict=True):
        ratio = c["bytes"] / d["bytes"] if d["bytes"] else 0.0
        lines.append(
            f"{d['op']:<28}{d['bytes'] / 1e6:>12.2f}{c['bytes'] / 1e6:>12.2f}{ratio:>8.2f}{c['kernels']:>9.0f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.declared",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=int, nargs=4, default=(64, 256, 56, 56), metavar=("N", "C", "H", "W"))
    parser.add_argument("--ncu", type=Path, help="run under Nsight Compute and write its CSV here")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.ncu:
        print(json.dumps(operators(device, tuple(args.shape))))
        return 0
    if shutil.which("ncu") is None:
        print("not run: ncu is not on the PATH")
        return 0
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--metrics",
        ",".join(METRICS),
        sys.executable,
        "-m",
    ]
    command += ["benchmarks.declared", "--shape", *map(str, args.shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    args.ncu.write_text(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    printed = next((line for line in lines if line.startswith('[{"op"')), None)
    if done.returncode or printed is None:
        why = next((line for line in (done.stdout + done.stderr).splitlines() if "ERR_" in line), "")
        print(f"not measured: ncu ended with {done.returncode}. {why} See {args.ncu}", file=sys.stderr)
        return 1
    print(compare(json.loads(printed), measured(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
