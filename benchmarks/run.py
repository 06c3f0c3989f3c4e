"""Time a suite and write its rows: eager, torch.compile and fastres in turn, in one process.

    python -m benchmarks.run --suite operations
    python -m benchmarks.run --suite networks --model resnet50 --batch 256 --dtype bf16 --full

Parity comes first: nothing is timed before ``fastres selfcheck`` has passed on the device. Rows that the output folder
already has for this commit and device (and, of fastres, this tuning table) are not measured again, so a stopped run
goes on where it stopped. Rows of several suites go to one file.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import (
    NAMES,
    REFERENCE,
    Case,
    alternatives,
    blocks,
    by_cost,
    net_case,
    operations,
    wanted,
)
from benchmarks.counted import counted
from benchmarks.meter import DTYPES
from benchmarks.nets import NETWORKS
from benchmarks.rows import RESULTS, Writer, commit, key, read
from fastres import selfcheck
from fastres._timing import Sample, interleaved, synchronize
from fastres.commands.tune import seconds

__all__ = ["gate", "main", "measure", "numbers", "peak_bytes"]

Call = Callable[[int], object]


def peak_bytes(call: Any, device: torch.device) -> int:
    """Most device memory that one call holds beyond what was there before; 0 on the CPU, where it is not measured."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gate(device: torch.device) -> list[str]:
    """What ``selfcheck`` misses on this device."""
    return [
        f"{r.case} {r.dtype} {r.layout}: {r.error or f'{r.worst:.2f} in {r.what}'}"
        for r in selfcheck.run(device)
        if not r.ok
    ]


def numbers(s: Sample, batch: int) -> dict[str, Any]:
    """The part of a row that says how long a call took."""
    return dict(
        median_s=s.median, q25_s=s.low, q75_s=s.high, min_s=s.least, rounds=s.rounds, calls=s.calls,
        images_per_s=batch / s.median,
    )  # fmt: skip


def _ready(
    case: Case, names: list[str], device: torch.device, dtype: str, train: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """Alternatives that have run twice, and of the others why not."""
    ready, failed = alternatives(case, names, device, DTYPES[dtype], train)
    for name, call in list(ready.items()):
        try:
            for i in range(2):
                call(i)
            synchronize(device)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del ready[name]
    return ready, failed


def measure(
    writer: Writer, case: Case, names: list[str], device: torch.device, dtype: str, train: bool, done: set[Any],
    rounds: int, region: float, stop: float,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Time a case's alternatives that are not in ``done`` and write their rows: (rows, alternatives left).

    Group by group (``by_cost``), each in turn with the reference alternative; no group is begun after ``stop``.
    """
    batch, size = case.shapes[0][0], case.shapes[0][-1]
    mode = "train" if train else "infer"
    same = dict(suite=f"{case.family}s", case=case.name, batch=batch, size=size, dtype=dtype, mode=mode)
    todo = [n for n in names if key(dict(alternative=n, **same)) not in done]
    rows: list[dict[str, Any]] = []
    for group in by_cost(todo):
        if time.perf_counter() >= stop:
            return rows, sum(n not in {r["alternative"] for r in rows} for n in todo)
        ready, failed = _ready(case, list(dict.fromkeys([REFERENCE, *group])), device, dtype, train)
        memory = {name: peak_bytes(getattr(call, "uncaptured", call), device) for name, call in ready.items()}
        left = max(5.0, stop - time.perf_counter())
        samples = interleaved(ready, device, rounds, region, warmup=2, budget=left) if ready else {}
        base = samples[REFERENCE].median if REFERENCE in samples else None
        for n in group:
            if n in samples:
                found = dict(numbers(samples[n], batch), peak_bytes=memory[n], reference_s=base)
                found |= counted(case, n, dtype, train, device)
                rows.append(writer.row(alternative=n, **same, **found))
            else:
                rows.append(writer.row(alternative=n, **same, error=failed[n]))
        ready.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, 0


def _spared(run: dict[str, Any], now: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row of another run need not be measured in this one: the same commit and device and, where fastres's
    kernels ran, the same tuning table."""
    if "error" in row or any(run[k] != now[k] for k in ("commit", "device")):
        return False
    tables = (r["environment"]["tuning_table"] for r in (run, now))
    return not row["alternative"].startswith("fastres") or len(set(tables)) == 1


def _cases(args: argparse.Namespace) -> list[Case]:
    found: list[Case] = []
    for suite in args.suite:
        if suite == "networks":
            found += [net_case(m, b, args.size) for m in args.model for b in args.batch]
        else:
            make = operations if suite == "operations" else blocks
            found += [c for b in args.batch for c in make(b, args.scale)]
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--suite", nargs="+", default=["operations"], choices=("operations", "blocks", "networks")
    )
    parser.add_argument(
        "--model", nargs="+", default=["resnet50" if gpu else "resnet18"], choices=sorted(NETWORKS)
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256 if gpu else 4])
    parser.add_argument(
        "--size", type=int, default=224 if gpu else 64, help="pixels along a side of the image"
    )
    parser.add_argument(
        "--scale", type=int, default=1 if gpu else 2, help="divides the pixels of operations and blocks"
    )
    parser.add_argument("--dtype", nargs="+", default=["bf16" if gpu else "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--mode", nargs="+", default=["train", "infer"], choices=("train", "infer"))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=gpu, help="time torch.compile too"
    )
    parser.add_argument(
        "--full", action="store_true", help="graphs, max-autotune and other packages' networks too"
    )
    parser.add_argument(
        "--alternatives",
        nargs="+",
        choices=sorted(NAMES),
        help="these alone, instead of what the options say",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--region", type=seconds, default=0.1, help="least time of a timed region")
    parser.add_argument(
        "--budget", type=seconds, default=480.0, help="time after which no further case begins"
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device, stop = torch.device(args.device), time.perf_counter() + args.budget
    missed = gate(device)
    if missed:
        print("parity is missed; nothing is timed", *missed, sep="\n", file=sys.stderr)
        return 1
    writer = Writer(args.out, "-".join(args.suite), device)
    known = commit() and "+" not in commit()  # of changed files old rows say nothing
    done = {key(r) for run, rows in read(args.out) for r in rows if known and _spared(run, writer.head, r)}
    left = 0
    for case in _cases(args):
        for dtype in args.dtype:
            for mode in args.mode:
                if time.perf_counter() >= stop:
                    left += 1
                    continue
                names = args.alternatives or wanted(case, device, args.compile, args.full)
                rows, missing = measure(
                    writer, case, names, device, dtype, mode == "train", done, args.rounds, args.region, stop
                )
                left += bool(missing)
                for r in rows:
                    text = (
                        r.get("error")
                        or f"{r['median_s'] * 1e3:10.3f} ms  {r['images_per_s']:10.1f} images/s"
                    )
                    print(f"{case.name:<32}{dtype} {mode:<6}{r['alternative']:<36}{text}", flush=True)
    writer.close()
    print(f"{writer.path}" + (f"; {left} cases left, whole or in part, for the next run" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
