"""Host overhead: kernels launched and Python time, eager and fused, of a block's training step and of inference.

    python -m benchmarks.host                              blocks with and without downsample, and networks, as rows
    python -m benchmarks.host --out DIR --rounds 30

fastres's launchers run on the CPU, with kernels compiled as far as Triton's IR for a GPU that is not there; a launch
takes all of Triton's Python and ends where its driver's launcher would begin. Launches are counted there; operators
that stay PyTorch's are counted by the rule of ``benchmarks.passes``, as all of eager's are. Host time is that of
forward and backward, or of one image's inference, on a few pixels and narrow channels, on one thread. fastres's kernels
compute nothing here, while eager's operators do compute their few pixels; the driver's launch itself, which comes to
every kernel of both sides, is in neither figure. No GPU is needed.
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
        if func is torch.ops.fastres.folded_conv.default:
            self.count += 1  # cuDNN's fused one
        elif func.namespace != NAMESPACE:
            self.count += len(passes_of(func, args, kwargs or {}, out)[0])
        return out


def blocks(norm: str) -> dict[str, nn.Module]:
    """Blocks with a plain identity and with a downsample branch, narrow, and networks in eval mode."""
    import fastres

    made: dict[str, nn.Module] = {}
    # The strided ones narrower, so that they have four pixels a channel, as every block of a real network has.
    for kind, cin, out, stride in (
        (fastres.Bottleneck, 64, 64, 1),
        (fastres.Bottleneck, 8, 32, 2),
        (fastres.BasicBlock, 16, 16, 1),
        (fastres.BasicBlock, 8, 16, 2),
    ):
        torch.manual_seed(0)
        layer = fastres.ResLayer(kind, 1, cin, out, stride=stride, norm_cfg=dict(type=norm))
        name = kind.__name__ + (" with downsample" if stride == 2 else "")
        made[name] = layer[0].to(memory_format=torch.channels_last).train()
    for depth in (18, 50):
        net = fastres.ResNet(depth, base_channels=16, stem_channels=16, norm_cfg=dict(type=norm))
        made[f"ResNet-{depth}, inference"] = net.to(memory_format=torch.channels_last).eval()
    return made


def _step(module: nn.Module, x: Tensor, g: Tensor, fused: bool) -> None:
    with functional.backend("triton" if fused else "aten"):
        if not module.training:
            with torch.inference_mode():
                module(x)
            return
        out = module(x)
    torch.autograd.grad(out, [x, *module.parameters()], g)


def _numbered(module: nn.Module, x: Tensor, g: Tensor, fused: bool, i: int) -> None:
    _step(module, x, g, fused)


def _tensors(module: Any) -> tuple[Tensor, Tensor]:
    if not module.training:
        return torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.empty(0)
    cin, out, stride = module.in_channels, module.out_channels, module.stride
    x = torch.randn(2, cin, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(2, out, 8 // stride, 8 // stride).contiguous(memory_format=torch.channels_last)
    return x, g


def launches(module: nn.Module, fused: bool) -> int:
    """Kernels that a training step, or a network's inference, launches on a GPU: fastres's, and PyTorch's."""
    x, g = _tensors(module)
    with on_cpu() as ours, _Kernels() as torchs:
        if not module.training:
            _step(module, x, g, fused)  # weights are folded
            ours.clear()
            torchs.count = 0
        _step(module, x, g, fused)
    return len(ours) + torchs.count


def measure(rounds: int, region: float) -> list[dict[str, Any]]:
    """A row for every case and side; alternatives of a case are timed in turn."""
    rows = []
    eager, fused = blocks("BN"), blocks("FusedBN")
    cpu = torch.device("cpu")
    for name in eager:
        sides = {"eager channels_last": (eager[name], False), "fastres channels_last": (fused[name], True)}
        given = {n: _tensors(b) for n, (b, _) in sides.items()}
        calls = {n: partial(_numbered, b, *given[n], f) for n, (b, f) in sides.items()}
        with on_cpu(noting=False):
            samples = interleaved(calls, cpu, rounds, region)
        for n, (b, f) in sides.items():
            s, (x, _) = samples[n], given[n]
            rows.append(
                dict(case=name, alternative=n, mode="train" if b.training else "infer", batch=x.shape[0],
                     size=x.shape[2], dtype="fp32", launches=launches(b, f), median_s=s.median, q25_s=s.low,
                     q75_s=s.high, min_s=s.least, rounds=s.rounds, calls=s.calls)
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
            f"{r['case']:<30}{r['alternative']:<24}{r['launches']:>4} launches"
            f"{r['median_s'] * 1e6:>10.0f} us on the host, spread {spread:.1%}, {r['rounds']} rounds"
        )
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
