"""Train one network side by side: in float64, by eager PyTorch in several orders of summation, and by fastres.

    python -m benchmarks.paired --steps 200                          on ATen, as a CPU trains
    python -m benchmarks.paired --steps 200 --backend reference      the fused operators in plain torch, moment form on
    TRITON_INTERPRET=1 python -m benchmarks.paired --steps 200 --backend triton --width 4

All begin from the same weights and see the same digits in the same order. Rounding makes runs drift apart, by jumps
where an activation falls on the other side of a ReLU's kink, so a single number says little: what counts is how far
fastres is from the float64 run, beside how far eager runs are that are the same mathematics (channels_last, NCHW, the
batch reversed). Printed and returned, for the losses of all steps, for the parameters and for the running statistics at
the end: the distance of fastres and that of the farthest eager run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import functional

__all__ = ["Distance", "main", "paired"]

LAST, NCHW = torch.channels_last, torch.contiguous_format
BATCH = 32


class _Backbone(fastres.ResNet):
    """Every kind of bottleneck once or twice, few in all."""

    arch_settings = {50: (fastres.Bottleneck, (2, 2, 1, 1))}


class _Net(nn.Module):
    def __init__(self, norm: str, width: int) -> None:
        super().__init__()
        sizes = dict(stem_channels=width, base_channels=width, num_stages=2, strides=(1, 2), dilations=(1, 1))
        self.backbone = _Backbone(50, norm_cfg=dict(type=norm), out_indices=(1,), **sizes)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0].mean((2, 3)))


class _Run(NamedTuple):
    losses: Tensor
    parameters: Tensor
    statistics: Tensor


class Distance(NamedTuple):
    """How far from the float64 run, relative to its size: fastres, and the farthest eager run."""

    name: str
    ours: float
    eager: float


def digits(steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of scikit-learn's digits [32, 3, 16, 16] in float64, and their classes."""
    from sklearn.datasets import load_digits  # an extra: 'train'

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).unsqueeze(1) / 8 - 1
    x = F.interpolate(x, scale_factor=2, mode="nearest").expand(-1, 3, -1, -1)
    y = torch.from_numpy(bunch.target)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(x), (BATCH,), generator=order)
        yield x[at], y[at]


def _train(net: nn.Module, steps: int, dtype: torch.dtype, layout: torch.memory_format, reverse: bool, backend: str,
           device: torch.device) -> _Run:  # fmt: skip
    net = net.to(device, dtype).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(functional.backend(backend))
        if backend != "auto":
            stack.enter_context(functional.moments("on"))
        for x, y in digits(steps):
            x, y = (t.flip(0) if reverse else t for t in (x, y))
            x = x.to(device, dtype).contiguous(memory_format=layout)
            loss = F.cross_entropy(net(x), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double().cpu())
    statistics = [b for b in net.buffers() if b.is_floating_point()]
    return _Run(torch.stack(losses), _flat(net.parameters()), _flat(statistics))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


def paired(steps: int, backend: str = "auto", width: int = 8, device: str = "cpu") -> list[Distance]:
    """Distances from the float64 run after training side by side.

    Args:
        steps: how many.
        backend: fastres's (see ``functional.backend``). With another than ``auto`` blocks end in moment form wherever
            they can.
        width: channels of the stem, and of the first stage's bottlenecks.
        device: where fastres and eager run; float64 runs there too.
    """
    torch.manual_seed(0)
    start = _Net("BN", width)
    at = torch.device(device)

    def run(norm: str, dtype: torch.dtype, layout: torch.memory_format, reverse: bool, how: str) -> _Run:
        net = _Net(norm, width)
        net.load_state_dict(copy.deepcopy(start.state_dict()))
        return _train(net, steps, dtype, layout, reverse, how, at)

    want = run("BN", torch.float64, LAST, False, "auto")
    ours = run("FusedBN", torch.float32, LAST, False, backend)
    eager = [
        run("BN", torch.float32, layout, reverse, "auto")
        for layout, reverse in ((LAST, False), (NCHW, False), (LAST, True))
    ]
    found = []
    for name in _Run._fields:
        reference = getattr(want, name)

        def far(r: _Run, name: str = name, reference: Tensor = reference) -> float:
            return float((getattr(r, name) - reference).norm() / reference.norm())

        found.append(Distance(name, far(ours), max(far(r) for r in eager)))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backend", choices=functional.BACKENDS, default="auto")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    found = paired(args.steps, args.backend, args.width, args.device)
    print(
        f"{args.steps} steps, width {args.width}, backend {args.backend}, {args.device}: distance from float64"
    )
    for d in found:
        print(
            f"  {d.name:<12} fastres {d.ours:.2e}   farthest eager run {d.eager:.2e}   ratio {d.ours / d.eager:.2f}"
        )
    return 0 if all(math.isfinite(d.ours) for d in found) else 1


if __name__ == "__main__":
    sys.exit(main())
