"""How many bytes a step moves: eager, torch.compile (modelled), fastres and the least that is known to suffice.

    python -m benchmarks.bytes --model resnet50 --batch 256 --dtype bf16 --train
    python -m benchmarks.bytes --model resnet50 --infer --layers

Eager and fastres are counted from the operators of a traced step, each with the passes that its kernels make (see
``benchmarks.meter`` and ``benchmarks.passes``); torch.compile and ideal are plans (``benchmarks.plans``). No GPU is
used and nothing is timed: the milliseconds are a bound, every kernel at the given bandwidth or peak rate, whichever
takes longer. Inference is the network as it stands under autocast, after the pass in which fastres folds its norms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any, NamedTuple

from benchmarks.meter import DTYPES, Pass, trace
from benchmarks.nets import NETWORKS
from benchmarks.plans import compiled, ideal

__all__ = ["COLUMNS", "Count", "block_of", "main", "measure", "table"]

COLUMNS = ("eager", "compile", "fastres", "ideal")


class Count(NamedTuple):
    """Passes of each column; bytes of activations that eager and fastres keep for the backward; the general rule's
    operators in fastres's trace, which are counted as reading each argument and writing each result once."""

    passes: dict[str, list[Pass]]
    saved: dict[str, int]
    undeclared: list[str]


def measure(
    model: str, batch: int, dtype: str, train: bool, channels_last: bool = True, size: int = 224
) -> Count:
    """Count one training step or inference pass in every column."""
    eager = trace(model, "BN", batch, dtype, train, channels_last, size)
    fused = trace(model, "FusedBN", batch, dtype, train, channels_last, size)
    passes = {
        "eager": eager.passes,
        "compile": compiled(eager.passes),
        "fastres": fused.passes,
        "ideal": ideal(eager.passes, DTYPES[dtype].itemsize, train),
    }
    undeclared = sorted(name for name in fused.assumed if name.startswith("fastres."))
    return Count(passes, {"eager": eager.saved, "fastres": fused.saved}, undeclared)


def totals(passes: list[Pass], bandwidth: float, peak: float) -> dict[str, float]:
    """GB, TFLOP, bound in ms and number of passes of a plan; a fastres operator counts as one."""
    return {
        "GB": sum(p.bytes for p in passes) / 1e9,
        "TFLOP": sum(p.flops for p in passes) / 1e12,
        "bound_ms": sum(p.seconds(bandwidth, peak) for p in passes) * 1e3,
        "kernels": len(passes),
    }


def block_of(layer: str) -> str:
    """The block of a layer, or the layer where it is in none."""
    return ".".join(layer.split(".")[:2]) if layer.startswith("layer") else layer


def grouped(passes: list[Pass], by_layer: bool) -> dict[str, float]:
    """GB by layer, or by block; in the order of the network."""
    sums: Counter[str] = Counter()
    for p in passes:
        sums[p.layer if by_layer else block_of(p.layer)] += p.bytes / 1e9
    return dict(sums)


def _order(names: set[str]) -> list[str]:
    last = {"fc": 2, "other": 3, "optimizer": 4}
    return sorted(names, key=lambda n: (last.get(n, int(n.startswith("layer"))), n))


def table(count: Count, by_layer: bool, bandwidth: float, peak: float, batch: int) -> str:
    """The table that the command prints."""
    groups = {c: grouped(p, by_layer) for c, p in count.passes.items()}
    lines = [f"{'GB':<24}" + "".join(f"{c:>10}" for c in COLUMNS)]
    for name in _order({n for g in groups.values() for n in g}):
        lines.append(f"{name:<24}" + "".join(f"{groups[c].get(name, 0.0):>10.3f}" for c in COLUMNS))
    sums = {c: totals(p, bandwidth, peak) for c, p in count.passes.items()}
    lines.append("-" * len(lines[0]))
    for label, key in (
        ("total GB", "GB"),
        ("TFLOP", "TFLOP"),
        ("bound ms", "bound_ms"),
        ("passes", "kernels"),
    ):
        digits = 0 if key == "kernels" else 2
        lines.append(f"{label:<24}" + "".join(f"{sums[c][key]:>10.{digits}f}" for c in COLUMNS))
    rates = "".join(f"{batch / (sums[c]['bound_ms'] / 1e3):>10.0f}" for c in COLUMNS)
    lines.append(f"{'bound images/s':<24}{rates}")
    kept = "".join(f"{count.saved[c] / 1e9:>10.2f}" if count.saved.get(c) else f"{'-':>10}" for c in COLUMNS)
    lines.append(f"{'kept for backward GB':<24}{kept}")
    if count.undeclared:
        lines.append(f"counted by the general rule, not declared: {', '.join(count.undeclared)}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels along a side of the image")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--nchw", action="store_true", help="contiguous activations instead of channels_last")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="a step with SGD and momentum (default)")
    mode.add_argument("--infer", action="store_true", help="one pass in eval mode without gradients")
    parser.add_argument("--layers", action="store_true", help="a line for every layer instead of every block")
    parser.add_argument("--kernels", choices=COLUMNS, help="list every kernel of this column")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second (default 4.3e12)")
    parser.add_argument("--peak", type=float, default=790e12, help="flops a second (default 790e12)")
    parser.add_argument("--json", action="store_true", help="totals as JSON instead of the table")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.size < 32:
        parser.error(f"--batch is {args.batch} and --size {args.size}; wanted at least 1 and 32")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    count = measure(args.model, args.batch, args.dtype, not args.infer, not args.nchw, args.size)
    if args.json:
        sums: dict[str, Any] = {c: totals(p, args.bandwidth, args.peak) for c, p in count.passes.items()}
        print(
            json.dumps(
                dict(model=args.model, batch=args.batch, dtype=args.dtype, infer=args.infer, columns=sums)
            )
        )
        return 0
    what = "inference pass" if args.infer else "training step"
    layout = "NCHW" if args.nchw else "channels_last"
    print(
        f"{args.model}, {what}, batch {args.batch}, {args.size} pixels, {args.dtype}, {layout}; counted, not timed"
    )
    print(
        f"bounds at {args.bandwidth / 1e12:.2f} TB/s and {args.peak / 1e12:.0f} TFLOP/s; compile and ideal are models"
    )
    print(table(count, args.layers, args.bandwidth, args.peak, args.batch))
    if args.kernels:
        print(f"\n{args.kernels}: every kernel")
        for p in count.passes[args.kernels]:
            us = p.seconds(args.bandwidth, args.peak) * 1e6
            print(f"{p.phase:<10}{p.layer:<24}{p.kernel:<56}{p.bytes / 1e6:>10.1f} MB {us:>9.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
