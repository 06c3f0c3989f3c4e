"""The machine's two limits: bytes a second of a large copy and flops a second of a large matrix product."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.rows import RESULTS, Writer
from fastres._timing import Sample, interleaved

__all__ = ["ceilings", "main"]


def _copy(n: int, device: torch.device, rounds: int, region: float) -> Sample:
    a = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return interleaved({"copy": lambda i: b.copy_(a)}, device, rounds, region)["copy"]


def ceilings(device: torch.device, small: bool = False) -> list[dict[str, float | str]]:
    """Copy bandwidth (bytes read plus written) and matrix rate in each dtype, on random data."""
    n = 1 << (22 if small else 31)  # bytes; far larger than any cache on a GPU
    rounds, region = (3, 0.01) if small else (9, 0.2)
    copy = _copy(n, device, rounds, region)
    found: list[dict[str, float | str]] = [
        dict(
            case="copy",
            dtype="uint8",
            median_s=copy.median,
            spread=copy.spread,
            rate=2 * n / copy.median,
            unit="B/s",
        )
    ]
    side = 256 if small else 8192
    for dtype in (torch.float32,) if small else (torch.bfloat16, torch.float16, torch.float32):
        x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        s = interleaved({"matmul": lambda i, x=x, y=y: x @ y}, device, rounds, region)["matmul"]
        name = str(dtype)[6:]
        rate = 2 * side**3 / s.median
        found.append(
            dict(case="matmul", dtype=name, median_s=s.median, spread=s.spread, rate=rate, unit="flop/s")
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the machinery")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = Writer(args.out, "ceilings", device)
    for values in ceilings(device, args.small):
        r = writer.row(alternative="limit", **values)
        print(
            f"{r['case']:<8}{r['dtype']:<10}{r['rate'] / 1e12:10.3f} T{r['unit']}  spread {r['spread']:.1%}"
        )
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
