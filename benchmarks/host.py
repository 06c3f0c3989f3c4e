"""Host overhead of a block: kernels launched and Python time of a training step, eager and fused. No GPU is needed.

    python -m benchmarks.host                              Bottlenecks with and without downsample, as rows
    python -m benchmarks.host --out DIR --rounds 30

fastres's launchers run on the CPU, with kernels compiled as far as Triton's IR for a GPU that is not there; a launch
takes all of Triton's Python and ends where its driver's launcher would begin. Launches are counted there; operators
that stay PyTorch's are counted by the rule of ``benchmarks.passes``, as all of eager's are. Host time is that of
forward and backward on a few pixels, on one thread. fastres's kernels compute nothing here, while eager's operators do
compute their few pixels; the driver's launch itself, which comes to every kernel of both sides, is in neither figure.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.passes import passes_of
from benchmarks.rows import RESULTS, Writer
from fastres import functional
from fastres._timing import interleaved
from fastres.kernels._library import NAMESPACE
from fastres.kernels._triton import HAS_TRITON, INTERPRET
from tests.launches import on_cpu

__all__ = ["blocks", "launches", "main"]


class _Kernels(TorchDispatchMode):
    """Counts kernels of PyTorch's operators as a GPU would launch them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != NAMESPACE:
            self.count += len(passes_of(func, args, kwargs or {}, out)[0])
        return out


def blocks(norm: str) -> dict[str, nn.Module]:
    """A Bottleneck with a plain identity and one with a downsample branch, narrow."""
    import fastres

    made = {}
    # The strided one narrower, so that it has four pixels a channel, as every block of a real network has.
    for name, cin, out, stride in (("Bottleneck", 64, 64, 1), ("Bottleneck with downsample", 8, 32, 2)):
        torch.manual_seed(0)
        layer = fastres.ResLayer(fastres.Bottleneck, 1, cin, out, stride=stride, norm_cfg=dict(type=norm))
        made[name] = layer[0].to(memory_format=torch.channels_last).train()
    return made


def _step(block: nn.Module, x: Tensor, g: Tensor, fused: bool) -> None:
    with functional.backend("triton" if fused else "auto"):
        out = block(x)
    torch.autograd.grad(out, [x, *block.parameters()], g)


def _numbered(block: nn.Module, x: Tensor, g: Tensor, fused: bool, i: int) -> None:
    _step(block, x, g, fused)


def _tensors(block: nn.Module) -> tuple[Tensor, Tensor]:
    cin, out, stride = block.in_channels, block.out_channels, block.stride
    x = torch.randn(2, cin, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(2, out, 8 // stride, 8 // stride).contiguous(memory_format=torch.channels_last)
    return x, g


def launches(block: nn.Module, fused: bool) -> int:
    """Kernels that a training step of the block launches on a GPU: fastres's, and PyTorch's."""
    x, g = _tensors(block)
    with on_cpu() as ours, _Kernels() as torchs:
        _step(block, x, g, fused)
    return len(ours) + torchs.count


def measure(rounds: int, region: float) -> list[dict[str, Any]]:
    """A row for every block and side; alternatives of a block are timed in turn."""
    rows = []
    eager, fused = blocks("BN"), blocks("FusedBN")
    cpu = torch.device("cpu")
    for name in eager:
        sides = {"eager channels_last": (eager[name], False), "fastres channels_last": (fused[name], True)}
        calls = {n: partial(_numbered, b, *_tensors(b), f) for n, (b, f) in sides.items()}
        with on_cpu(noting=False):
            samples = interleaved(calls, cpu, rounds, region)
        for n, (b, f) in sides.items():
            s = samples[n]
            rows.append(
                dict(case=name, alternative=n, mode="train", batch=2, size=8, dtype="fp32", launches=launches(b, f),
                     median_s=s.median, q25_s=s.low, q75_s=s.high, min_s=s.least, rounds=s.rounds, calls=s.calls)
            )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--region", type=float, default=0.05, help="seconds of a timed region")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if not HAS_TRITON or INTERPRET:
        parser.error("it takes Triton, and a process without TRITON_INTERPRET")
    torch.set_num_threads(1)
    writer = Writer(args.out, "host", torch.device("cpu"))
    for r in measure(args.rounds, args.region):
        writer.row(**r)
        spread = (r["q75_s"] - r["q25_s"]) / r["median_s"]
        print(
            f"{r['case']:<28}{r['alternative']:<24}{r['launches']:>4} launches"
            f"{r['median_s'] * 1e6:>10.0f} us on the host, spread {spread:.1%}, {r['rounds']} rounds"
        )
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
