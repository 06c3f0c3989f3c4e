"""Time training steps on a CPU: eager PyTorch in both layouts, and fastres with and without its forms, in turn.

    python -m benchmarks.training --model resnet18 resnet50 --batch 8 --keep-memory
    python -m benchmarks.training --model resnet18 --batch 32 --size 64

A step is forward, cross entropy, backward and fused SGD. All ways are in one process and take turns until the budget of
the case is spent; a turn begins with a step that is not timed, as in training one network's data is in the caches and
not another's. Nothing is timed before the losses of two steps agree with eager PyTorch's. Rows go to a new file of
``benchmarks/results``, as ``benchmarks.run`` writes them. The compiled loops take part where they were built
(``python -m fastres build``).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks.nets import NETWORKS, network, train_step
from benchmarks.rows import RESULTS, Writer
from fastres import functional, keep_memory
from fastres.commands.tune import seconds
from fastres.kernels._native import native_obstacle

__all__ = ["main", "measure", "ways"]

LAST = torch.channels_last
TURN = 3  # timed steps of a way before the next has its turn
Step = Callable[[], float]


@contextlib.contextmanager
def _without_forms() -> Iterator[None]:
    with functional.winograd("off"), functional.native("off"):
        yield


def ways(name: str, batch: int, size: int, only: Sequence[str] = ()) -> dict[str, Step]:
    """Every way to train a network (or those of ``only``), each on a copy of the same weights, with the same images; a
    step gives the loss."""

    def way(norm: str, last: bool, context: Callable[[], AbstractContextManager[Any]]) -> Step:
        torch.manual_seed(0)
        model = network(name, norm).train()
        x, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
        if last:
            model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

        def step() -> float:
            with context():
                loss = train_step(model, x, target, contextlib.nullcontext())
                optimizer.step()
                optimizer.zero_grad()
            return loss.item()

        return step

    plain = contextlib.nullcontext
    makers: dict[str, tuple[str, bool, Callable[[], AbstractContextManager[Any]]]] = {
        "eager": ("BN", False, plain),
        "eager channels_last": ("BN", True, plain),
        "fastres without its forms channels_last": ("FusedBN", True, _without_forms),
        "fastres without compiled loops channels_last": ("FusedBN", True, lambda: functional.native("off")),
    }
    if not native_obstacle():
        makers["fastres channels_last"] = ("FusedBN", True, plain)
    return {name: way(*how) for name, how in makers.items() if not only or name in only}


def measure(
    name: str, batch: int, size: int, budget: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row for every way: median and quartiles of single steps, and of the better eager layout over it, by turns."""
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Step] = {}
    wanted: list[float] = []
    for way, step in ways(name, batch, size, only).items():
        rows[way] = dict(alternative=way)
        losses = [step() for _ in range(2)]
        wanted = wanted or losses
        off = [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]
        if not (off[0] < 1e-3 and off[1] < 2e-2):  # the second after a step, which carries rounding further
            rows[way]["error"] = f"its losses differ from eager's by {off[0]:.1e} and {off[1]:.1e}: not timed"
            continue
        ready[way] = step
    times: dict[str, list[list[float]]] = {way: [] for way in ready}
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 2:
        for way, step in ready.items():
            step()
            turn = []
            for _ in range(TURN):
                start = time.perf_counter()
                step()
                turn.append(time.perf_counter() - start)
            times[way].append(turn)
    of_turns = {way: [statistics.median(turn) for turn in turns] for way, turns in times.items()}
    best = min((w for w in ready if w.startswith("eager")), key=lambda w: statistics.median(of_turns[w]))
    for way, turns in times.items():
        taken = [t for turn in turns for t in turn]
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        ratios = [a / b for a, b in zip(of_turns[best], of_turns[way], strict=True)]
        cuts = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[way] |= dict(
            median_s=median, q25_s=low, q75_s=high, min_s=min(taken), rounds=len(turns), calls=TURN,
            images_per_s=batch / median, reference=best, ratio=cuts[1], ratio_q25=cuts[0], ratio_q75=cuts[2],
        )  # fmt: skip
    return list(rows.values())


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is printed: times, and how many times as fast as the better of the two eager layouts."""
    text = []
    for r in rows:
        if "error" in r:
            text.append(f"  {r['alternative']:<46}{r['error']}")
            continue
        ms = [1e3 * r[k] for k in ("median_s", "q25_s", "q75_s")]
        ratio = f"{r['ratio']:.3f}x [{r['ratio_q25']:.3f} {r['ratio_q75']:.3f}]"
        text.append(
            f"  {r['alternative']:<46}{ms[0]:8.1f} ms [{ms[1]:.1f} {ms[2]:.1f}]  {ratio}  {r['rounds']} turns"
        )
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", default=["resnet18"], choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--size", type=int, default=224, help="pixels along a side of the image")
    parser.add_argument(
        "--budget", type=seconds, default=30.0, help="time for each case's rounds (default 30s)"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="call fastres.keep_memory() first, for all ways alike"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WAY", help="ways, by their names in the rows"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.keep_memory:
        keep_memory()
    if obstacle := native_obstacle():
        print(f"without compiled loops: {obstacle}")
    writer, failed = Writer(args.out, "training", torch.device("cpu")), 0
    for name in args.model:
        for batch in args.batch:
            print(
                f"{name}, batch {batch}, {args.size} pixels, float32, {torch.get_num_threads()} threads",
                flush=True,
            )
            rows = measure(name, batch, args.size, args.budget, args.only)
            for r in rows:
                failed += "error" in r
                keep = dict(keep_memory=args.keep_memory)
                writer.row(case=name, batch=batch, size=args.size, dtype="fp32", mode="train", **keep, **r)
            print("\n".join(lines(rows)), flush=True)
    print(f"rows in {writer.path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
