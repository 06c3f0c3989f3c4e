"""Training with data loading, and what the loader does alone: kept apart from the compute-only rows.

    python -m benchmarks.loading --model resnet50 --batch 256 --dtype bf16 --workers 12

Images are random bytes in memory, a little larger than the network's input; worker processes crop, flip and normalise
them, so no disk and no decoder is in the figures. Rows: the loader alone, and for eager and fastres the step alone (one
batch that stays on the device) and the step fed by the loader. Parity comes first, as in ``benchmarks.run``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.meter import DTYPES
from benchmarks.nets import NETWORKS, network
from benchmarks.rows import RESULTS, Writer
from benchmarks.run import gate
from fastres._timing import summary, synchronize
from fastres.commands.tune import seconds

__all__ = ["WORKERS", "Images", "batches", "main", "measure", "stepper"]

_SIDES = {"eager channels_last": "BN", "fastres channels_last": "FusedBN"}
WORKERS = max(1, (os.cpu_count() or 2) - 1)
_KEPT = 256  # images in memory; the epoch repeats them


class Images(Dataset[tuple[Tensor, int]]):
    """Random images of bytes, cropped at random to [3, size, size], flipped at random and normalised to float32."""

    def __init__(self, count: int, size: int) -> None:
        g = torch.Generator().manual_seed(0)
        side = size + size // 7
        self.count, self.size = count, size
        self.bytes = torch.randint(0, 256, (min(count, _KEPT), 3, side, side), generator=g, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self.bytes[i % len(self.bytes)]
        top, left, flip = (int(v) for v in torch.randint(0, 1 << 30, (3,)))
        room = image.shape[1] - self.size + 1
        image = image[:, top % room : top % room + self.size, left % room : left % room + self.size]
        image = image.flip(2) if flip % 2 else image
        return image.float().sub_(127.5).div_(58.0), i % 1000


def batches(
    args: argparse.Namespace, count: int, device: torch.device, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches on the device: images in channels_last, and classes."""
    loader = DataLoader(
        Images(count * args.batch, args.size),
        args.batch,
        num_workers=args.workers if workers is None else workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    for x, target in loader:
        x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        yield x, target.to(device, non_blocking=True)


def stepper(norm: str, args: argparse.Namespace, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A training step of the network on a batch."""
    torch.manual_seed(0)
    model = network(args.model, norm).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dtype = DTYPES[args.dtype]
    reduced = dtype != torch.float32

    def step(x: Tensor, target: Tensor) -> None:
        with torch.autocast(device.type, dtype if reduced else None, enabled=reduced):
            loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(
    device: torch.device, given: Iterator[Any], use: Callable[[Tensor, Tensor], None], skip: int
) -> list[float]:
    """Seconds from batch to batch; the first ``skip`` start workers and warm up."""
    found, last = [], 0.0
    for i, (x, target) in enumerate(given):
        use(x, target)
        synchronize(device)
        now = time.perf_counter()
        if i >= skip:
            found.append(now - last)
        last = now
    return found


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for the loader, then two for each side."""
    skip = 2
    count = args.steps + skip
    same = dict(case=args.model, batch=args.batch, size=args.size, dtype=args.dtype, workers=args.workers)

    def row(alternative: str, mode: str, times: list[float]) -> dict[str, Any]:
        s = summary(times, 1)
        return dict(
            same, alternative=alternative, mode=mode, median_s=s.median, q25_s=s.low, q75_s=s.high, min_s=s.least,
            rounds=s.rounds, calls=1, images_per_s=args.batch / s.median,
        )  # fmt: skip

    yield row("loader", "load", _timed(device, batches(args, count, device), lambda x, t: None, skip))
    for name, norm in _SIDES.items():
        step = stepper(norm, args, device)
        x, target = next(batches(args, 1, device, workers=0))
        yield row(name, "train", _timed(device, ((x, target) for _ in range(count)), step, skip))
        yield row(name, "load+train", _timed(device, batches(args, count, device), step, skip))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="resnet50" if gpu else "resnet18", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, default=256 if gpu else 4)
    parser.add_argument("--size", type=int, default=224 if gpu else 64, help="pixels along a side")
    parser.add_argument("--dtype", default="bf16" if gpu else "fp32", choices=sorted(DTYPES))
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--steps", type=int, default=30, help="batches of each row")
    parser.add_argument(
        "--budget", type=seconds, default=120.0, help="time after which no further row begins"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if gpu else "cpu")
    stop = time.perf_counter() + args.budget
    if missed := gate(device):
        print("parity is missed; nothing is timed", *missed, sep="\n", file=sys.stderr)
        return 1
    writer = Writer(args.out, "loading", device)
    for values in measure(args, device):
        r = writer.row(**values)
        print(
            f"{r['case']:<12}{r['mode']:<12}{r['alternative']:<24}{r['images_per_s']:>10.1f} images/s",
            flush=True,
        )
        if time.perf_counter() >= stop:
            print("the time is spent; the rest is not measured")
            break
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
