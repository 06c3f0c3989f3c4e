"""Time inference: eager, eager folded, torch.compile in three ways, and fastres, in turn, in one process.

    python -m benchmarks.inference --model resnet18 resnet50 --batch 1 8
    python -m benchmarks.inference --model resnet50 --batch 256 --dtype bf16 --compile

The first call of each way is timed by itself: it folds and packs, or compiles. Then they take turns, what is not
compiled together and each compiled way with eager and fastres, until the budget of the case is spent. A turn begins
with a call that is not timed: whoever serves one model has its weights in the caches, not those of another. Batch 1
also gets the 50th, 90th and 99th percentile of single calls. Nothing is timed before the results agree with eager
PyTorch's; rows go to a new file of ``benchmarks/results``, as ``benchmarks.run`` writes them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import REFERENCE
from benchmarks.meter import DTYPES
from benchmarks.nets import NETWORKS, network
from benchmarks.rows import RESULTS, Writer
from benchmarks.run import peak_bytes
from fastres import GraphRunner, fold, functional, keep_memory
from fastres._timing import synchronize
from fastres.commands.tune import seconds

__all__ = ["main", "measure", "ways"]

LAST = torch.channels_last
Call = Callable[[], Tensor]
TURN = 3  # timed calls of a way before the next has its turn


def _plainly(model: nn.Module, x: Tensor) -> Tensor:
    with functional.folding("off"):
        return model(x)


def _frozen(model: nn.Module) -> nn.Module:
    """Compiled by inductor with its weights as constants, which it packs; the switch is read while compiling."""
    return torch.compile(model, options={"freezing": True})


def ways(name: str, x: Tensor, compiled: bool) -> dict[str, Call]:
    """Every way to run a network on ``x`` [N, 3, H, W], each on a copy of the same weights."""
    device, dtype = x.device, x.dtype
    torch.manual_seed(0)
    plain = network(name, "BN").to(device, dtype).eval()
    ours = network(name, "FusedBN").to(device, dtype).eval()
    ours.load_state_dict(plain.state_dict())
    last = x.contiguous(memory_format=LAST)

    def in_last(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=LAST)

    plain_last, ours_last, folded = in_last(plain), in_last(ours), in_last(fold(plain))
    found: dict[str, Call] = {
        "eager": lambda: plain(x),
        "eager channels_last": lambda: plain_last(last),
        "eager folded channels_last": lambda: _plainly(folded, last),
        "fastres": lambda: ours(x),
        "fastres channels_last": lambda: ours_last(last),
    }
    if device.type == "cuda":
        runner = GraphRunner(ours_last)
        found["fastres graph channels_last"] = lambda: runner(last)
    if compiled:
        default, tuned = (
            torch.compile(in_last(plain)),
            torch.compile(in_last(fold(plain)), mode="max-autotune"),
        )
        frozen = _frozen(in_last(plain))
        found["compile channels_last"] = lambda: default(last)
        found["compile max-autotune folded channels_last"] = lambda: tuned(last)
        found["compile freezing channels_last"] = lambda: frozen(last)
    return found


def _timed(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure(name: str, x: Tensor, compiled: bool, budget: float) -> Iterator[dict[str, Any]]:
    """A row for every way: first call, median and quartiles of single calls, percentiles at batch 1.

    What is not compiled takes turns for ``budget`` seconds; then each compiled way does with eager and fastres in
    channels_last, for as long, so that a run that is stopped while compiling has the rows before.
    """
    calls = ways(name, x, compiled)
    plain = [w for w in calls if not w.startswith("compile")]
    beside = [w for w in (REFERENCE, "fastres channels_last") if w in calls]
    done: set[str] = set()
    for group in [plain, *([*beside, w] for w in calls if w not in plain)]:
        for row in _in_turn({w: calls[w] for w in group}, x, budget):
            if row["alternative"] not in done:
                done.add(row["alternative"])
                yield row


def _in_turn(calls: dict[str, Call], x: Tensor, budget: float) -> list[dict[str, Any]]:
    device = x.device
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Call] = {}
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        wanted: Tensor | None = None
        for way, call in calls.items():
            row: dict[str, Any] = dict(alternative=way)
            rows[way] = row
            try:
                row["first_call_s"] = _timed(call, device)
                got = call().double()
            except Exception as error:  # a compiler that is missing says so in many ways
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            wanted = got if wanted is None else wanted
            error = float((got - wanted).abs().max() / wanted.abs().max())
            if not error < (1e-3 if x.dtype == torch.float32 else 0.1):
                row["error"] = f"differs from eager by {error:.1e}: not timed"
                continue
            for _ in range(2):
                call()
            ready[way], times[way] = call, []
            row["peak_bytes"] = peak_bytes(lambda i, call=call: call(), device)
        stop = time.perf_counter() + budget
        while ready and (time.perf_counter() < stop or len(times[next(iter(times))]) < 3):
            for way, call in ready.items():
                call()
                times[way] += [_timed(call, device) for _ in range(TURN)]
    reference = statistics.median(times[REFERENCE]) if REFERENCE in times else None
    for way, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        rows[way] |= dict(
            median_s=median, q25_s=low, q75_s=high, min_s=min(taken), rounds=len(taken), calls=1,
            images_per_s=x.shape[0] / median, reference_s=reference,
        )  # fmt: skip
        if x.shape[0] == 1:
            cuts = statistics.quantiles(taken, n=100, method="inclusive")
            rows[way] |= dict(p50_s=cuts[49], p90_s=cuts[89], p99_s=cuts[98])
    return list(rows.values())


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is printed: times beside the better of the two eager layouts."""
    eager = [r["median_s"] for r in rows if r["alternative"].startswith("eager") and "folded" not in r["alternative"]
             and "median_s" in r]  # fmt: skip
    text = []
    for r in rows:
        if "error" in r:
            text.append(f"  {r['alternative']:<44}{r['error']}")
            continue
        ms, spread = r["median_s"] * 1e3, (r["q25_s"] * 1e3, r["q75_s"] * 1e3)
        ratio = f"{min(eager) / r['median_s']:5.2f}x" if eager else ""
        line = f"  {r['alternative']:<44}{ms:9.2f} ms [{spread[0]:.2f}, {spread[1]:.2f}] {ratio}"
        line += f"  first call {r['first_call_s']:6.2f} s  {r['rounds']} rounds"
        if "p99_s" in r:
            line += f"  p50/p90/p99 {r['p50_s'] * 1e3:.2f}/{r['p90_s'] * 1e3:.2f}/{r['p99_s'] * 1e3:.2f}"
        text.append(line)
    return text


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", default=["resnet18"], choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256] if gpu else [1, 8])
    parser.add_argument("--size", type=int, default=224, help="pixels along a side of the image")
    parser.add_argument("--dtype", default="bf16" if gpu else "fp32", choices=sorted(DTYPES))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=gpu, help="torch.compile too"
    )
    parser.add_argument(
        "--budget", type=seconds, default=20.0, help="time for each case's rounds (default 20s)"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="call fastres.keep_memory() first, for all ways alike"
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.keep_memory:
        keep_memory()
    device, failed = torch.device(args.device), 0
    writer = Writer(args.out, "inference", device)
    for model in args.model:
        for batch in args.batch:
            generator = torch.Generator().manual_seed(batch)
            x = torch.randn(batch, 3, args.size, args.size, generator=generator).to(
                device, DTYPES[args.dtype]
            )
            rows = []
            torch._dynamo.reset()  # else the cases share one limit of recompilations
            same = dict(case=model, batch=batch, size=args.size, dtype=args.dtype, mode="infer")
            same |= dict(memory_kept=True) if args.keep_memory else {}
            for row in measure(model, x, args.compile, args.budget):
                rows.append(writer.row(**same, **row))
                failed += "differs" in row.get("error", "")
            print(f"{model}, batch {batch}, {args.size} pixels, {args.dtype}; beside the better eager layout")
            print("\n".join(lines(rows)), flush=True)
    writer.close()
    print(writer.path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
