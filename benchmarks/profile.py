"""Where the time of a step goes: the profiler's table of kernels for eager, torch.compile and fastres.

    python -m benchmarks.profile --model resnet50 --batch 256 --dtype bf16 --out profile.txt

With ``--results DIR`` the milliseconds by kind of kernel and, of what is not compiled, by layer are written as rows
too, for the report's waterfall.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import NAMES, net_case, prepare
from benchmarks.layers import layers_ms
from benchmarks.meter import DTYPES
from benchmarks.rows import Writer
from fastres._timing import synchronize

__all__ = ["KINDS", "by_kind", "kind", "main", "profiled"]


# Kind of kernel by its name, the first that matches: on a GPU kernels, on the CPU PyTorch's operators.
KINDS = {
    "optimizer": r"multi_tensor|foreach|optimizer",
    "fastres": r"^(stats|reduce|merge|act|backward|end|pair|masked|add_relu|pool|gram|cov|fold|pointwise|p|weight|"
               r"correction|shift|dz|dgrad)\w*_kernel",
    "batch norm": r"batch_?norm|bn_|norm_",
    "convolution": r"conv|xmma|cutlass|cudnn|gemm|nvjet|wgrad|dgrad|implicit|addmm|::mm|cublas",
    "compiled": r"^triton_|Compiled",
    "pooling": r"pool",
    "elementwise": r"elementwise|relu|threshold|add|mul|copy|fill|memset|memcpy|zero",
}  # fmt: skip


def kind(kernel: str) -> str:
    """The kind of a kernel, ``other`` where no pattern of ``KINDS`` fits."""
    return next((k for k, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profiled(name: str, model: str, batch: int, size: int, dtype: str, device: torch.device) -> Any:
    """The profiler's averages of one training step of an alternative of ``benchmarks.cases.NAMES``."""
    step = prepare(net_case(model, batch, size), name, device, DTYPES[dtype], True)
    for i in range(3):
        step(i)
    synchronize(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as p:
        step(0)
        synchronize(device)
    return p.key_averages()


def by_kind(averages: Any, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kind, the largest first; on a GPU of kernels alone."""
    sums: dict[str, float] = {}
    for e in averages:
        gpu = device.type == "cuda"
        if gpu and e.device_type != torch.autograd.DeviceType.CUDA:
            continue
        ms = (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3
        if ms > 0:
            sums[kind(e.key)] = sums.get(kind(e.key), 0.0) + ms
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _has_layers(name: str) -> bool:
    """Whether it is what ``benchmarks.layers`` runs: our networks, channels_last, neither compiled nor captured."""
    a = NAMES[name]
    return a.norm in ("BN", "FusedBN") and a.channels_last and not a.how and not a.graph


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
    parser.add_argument(
        "--results", type=Path, help="folder for rows of milliseconds by kind of kernel and layer"
    )
    parser.add_argument("--steps", type=int, default=3, help="profiled steps of the milliseconds by layer")
    parser.add_argument("--out", type=Path, help="file for the tables (default: they are printed)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = []
    writer = Writer(args.results, "profile", device) if args.results else None
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for name in args.alternatives:
        averages = profiled(name, args.model, args.batch, args.size, args.dtype, device)
        text = averages.table(sort_by=by, row_limit=args.rows, max_name_column_width=90)
        same = dict(case=args.model, batch=args.batch, size=args.size, dtype=args.dtype, mode="train")
        texts.append(f"{name}, {args.model}, training step, batch {args.batch}, {args.dtype}\n{text}")
        print("\n".join(texts[-1].splitlines()[: 16 if args.out else None]), flush=True)
        if args.out:
            args.out.write_text("\n\n".join(texts))  # after each: a later one may be stopped
        if writer:
            writer.row(alternative=name, **same, kinds_ms=by_kind(averages, device))
    if writer and (layered := {NAMES[n].norm: n for n in args.alternatives if _has_layers(n)}):
        at = (args.batch, args.size, args.dtype, device, args.steps)
        for norm, found in layers_ms(args.model, list(layered), *at).items():
            writer.row(alternative=layered[norm], **same, layers_ms=found)
    if writer:
        writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
