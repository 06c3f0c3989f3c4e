"""Where the time of a step goes: the profiler's table of kernels for eager, torch.compile and fastres.

python -m benchmarks.profile --model resnet50 --batch 256 --dtype bf16 --out profile.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import NAMES, net_case, prepare
from benchmarks.meter import DTYPES
from fastres._timing import synchronize

__all__ = ["main", "table"]


def table(name: str, model: str, batch: int, size: int, dtype: str, device: torch.device, rows: int) -> str:
    """The profiler's table of one training step of an alternative of ``benchmarks.cases.NAMES``, largest first."""
    step = prepare(net_case(model, batch, size), name, device, DTYPES[dtype], True)
    for i in range(3):
        step(i)
    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as p:
        step(0)
        synchronize(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return p.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--alternatives", nargs="+", default=["eager channels_last"], choices=sorted(NAMES))
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = []
    for name in args.alternatives:
        text = table(name, args.model, args.batch, args.size, args.dtype, device, args.rows)
        texts.append(f"{name}, {args.model}, training step, batch {args.batch}, {args.dtype}\n{text}")
        print("\n".join(texts[-1].splitlines()[:16]), flush=True)
    args.out.write_text("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
