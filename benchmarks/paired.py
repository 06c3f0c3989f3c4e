"""Train one network side by side: in float64, by eager PyTorch, and by fastres, the latter two in several orders.

    python -m benchmarks.paired --steps 200                          on ATen, as a CPU trains
    python -m benchmarks.paired --steps 200 --backend reference      the fused operators in plain torch, moment form on
    python -m benchmarks.paired --steps 200 --backend reference --dtype float64
    TRITON_INTERPRET=1 python -m benchmarks.paired --steps 200 --backend triton --width 2 --batch 8 --orders 1

All begin from the same weights and see the same digits, step by step. In each run but the float64 one the samples of a
batch are permuted in an order of its own, and eager runs in both layouts: the same mathematics, summed in another
order. Rounding makes such runs drift apart, exponentially and by jumps where an activation falls on the other side of
a ReLU's kink, so the distance between two of them is a draw and one alone says little. What counts is whether the
distances of fastres's runs are drawn from where eager's are: from the float64 run, and from run to run. Printed and
returned for both sides are median and range over the orders, for the losses of all steps, the parameters and the
running statistics at the end; then the mean of the last 20 losses and the accuracy on 297 digits kept aside, as such.
``OUTSIDE`` marks a median of fastres that is further off than any run or pair of eager's, or not among their values;
the exit status is 1 then.

With ``--dtype float64`` fastres and eager run in float64 too. A value so near to a kink that rounding decides is then
some 1e9 times rarer, so runs stay together, and a wrong formula could not hide behind their spread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres import functional
from fastres.kernels import _merge
from fastres.kernels._triton import INTERPRET

__all__ = ["Row", "Spread", "main", "paired"]

LAST, NCHW = torch.channels_last, torch.contiguous_format
TRAINED_ON = 1500  # of 1,797 digits


class _Backbone(fastres.ResNet):
    """Every kind of block once, few in all."""

    arch_settings = {18: (fastres.BasicBlock, (2, 1, 1, 1)), 50: (fastres.Bottleneck, (2, 1, 1, 1))}


class _Net(nn.Module):
    def __init__(self, norm: str, depth: int, width: int) -> None:
        super().__init__()
        sizes = dict(stem_channels=width, base_channels=width, num_stages=2, strides=(1, 2), dilations=(1, 1))
        self.backbone = _Backbone(depth, norm_cfg=dict(type=norm), out_indices=(1,), **sizes)
        self.head = nn.Linear((8 if depth == 50 else 2) * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0].mean((2, 3)))


class _Run(NamedTuple):
    losses: Tensor
    parameters: Tensor
    statistics: Tensor
    accuracy: float

    def last(self) -> float:
        return float(self.losses[-20:].mean())


class Spread(NamedTuple):
    """Of one number over several runs, or over pairs of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Row(NamedTuple):
    """One quantity of fastres's runs and of eager's. ``exact`` is the float64 run's, None where it is a distance."""

    name: str
    ours: Spread
    eager: Spread
    exact: float | None = None

    def within(self) -> bool:
        """Whether fastres's median is no further off than eager's furthest, or lies among the values of all others."""
        if self.exact is None:
            return self.ours.median <= self.eager.high
        low, high = min(self.eager.low, self.exact), max(self.eager.high, self.exact)
        slack = 1e-9 * abs(self.exact)  # for runs that have not parted
        return low - slack <= self.ours.median <= high + slack


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits [1797, 3, 16, 16] in float64, and their classes."""
    from sklearn.datasets import load_digits  # an extra: 'train'

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).unsqueeze(1) / 8 - 1
    x = F.interpolate(x, scale_factor=2, mode="nearest").expand(-1, 3, -1, -1)
    return x, torch.from_numpy(bunch.target)


def _batches(steps: int, batch: int, order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of digits and their classes, the samples of each permuted by ``order`` (0: as drawn)."""
    x, y = _digits()
    drawn, permuted = torch.Generator().manual_seed(0), torch.Generator().manual_seed(order)
    for _ in range(steps):
        at = torch.randint(TRAINED_ON, (batch,), generator=drawn)
        if order:
            at = at[torch.randperm(batch, generator=permuted)]
        yield x[at], y[at]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


class _Trainer(NamedTuple):
    """What all runs have in common."""

    steps: int
    depth: int
    width: int
    batch: int
    lr: float
    device: torch.device
    start: dict[str, Tensor]

    def net(self, norm: str, weights: dict[str, Tensor]) -> _Net:
        net = _Net(norm, self.depth, self.width)
        net.load_state_dict(copy.deepcopy(weights))
        return net

    def run(self, norm: str, dtype: torch.dtype, layout: torch.memory_format, order: int, how: str) -> _Run:
        """Train from the common start; accuracy is of the trained weights, by eager PyTorch in float64."""
        net = self.net(norm, self.start).to(self.device, dtype).to(memory_format=layout).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        losses = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(functional.backend(how))
            if how in ("reference", "triton"):
                stack.enter_context(functional.moments("on"))
            if INTERPRET:
                # A program costs milliseconds there: let one merge more columns, each of them in the same order.
                stack.enter_context(mock.patch.object(_merge, "MERGE", _merge.MERGE._replace(b1=1024)))
            for x, y in _batches(self.steps, self.batch, order):
                x = x.to(self.device, dtype).contiguous(memory_format=layout)
                loss = F.cross_entropy(net(x), y.to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach().double().cpu())
        running = _flat(b for b in net.buffers() if b.is_floating_point())
        x, y = (t[TRAINED_ON:] for t in _digits())
        with torch.no_grad():
            right = self.net("BN", net.state_dict()).double().eval()(x).argmax(1) == y
        return _Run(torch.stack(losses), _flat(net.parameters()), running, float(right.double().mean()))


def _rows(exact: _Run, ours: list[_Run], eager: list[_Run]) -> list[Row]:
    found = []
    for name in ("losses", "parameters", "statistics"):
        size = getattr(exact, name).norm()

        def apart(a: _Run, b: _Run, name: str = name, size: Tensor = size) -> float:
            return float((getattr(a, name) - getattr(b, name)).norm() / size)

        to_exact = [Spread.of(apart(r, exact) for r in side) for side in (ours, eager)]
        found.append(Row(f"{name}, from float64", *to_exact))
        crossed, among = itertools.product(ours, eager), itertools.combinations(eager, 2)
        between = [Spread.of(apart(a, b) for a, b in pairs) for pairs in (crossed, among)]
        found.append(Row(f"{name}, from eager", *between))
    for name, value in (("mean of the last 20 losses", _Run.last), ("accuracy", lambda r: r.accuracy)):
        found.append(Row(name, *(Spread.of(map(value, side)) for side in (ours, eager)), value(exact)))
    return found


def paired(
    steps: int, backend: str = "auto", width: int = 8, *, depth: int = 50, batch: int = 32, orders: int = 4,
    lr: float = 0.05, dtype: torch.dtype = torch.float32, device: str = "cpu", verbose: bool = False,
) -> list[Row]:  # fmt: skip
    """Train side by side, and compare.

    Args:
        steps: how many.
        backend: fastres's (see ``functional.backend``). With another than ``auto`` blocks end in moment form wherever
            they can.
        width: channels of the stem, and of the first stage's blocks.
        depth: 50, three bottlenecks, or 18, three basic blocks.
        batch: samples a step.
        orders: how many runs of fastres, all channels_last; eager's are four in either layout.
        lr: learning rate of SGD with momentum 0.9.
        dtype: of fastres and eager.
        device: where fastres and eager run; float64 runs there too.
        verbose: print how long each run took, and the routes that fastres took.
    """
    torch.manual_seed(0)
    start = _Net("BN", depth, width).state_dict()
    trainer = _Trainer(steps, depth, width, batch, lr, torch.device(device), start)

    began = time.perf_counter()
    exact = trainer.run("BN", torch.float64, LAST, 0, "aten")
    eager = [trainer.run("BN", dtype, LAST if i % 2 else NCHW, i, "aten") for i in range(1, 9)]
    between = time.perf_counter()
    with functional.record_routes() as log:
        ours = [trainer.run("FusedBN", dtype, LAST, 9 + i, backend) for i in range(orders)]
    if verbose:
        seconds = between - began, time.perf_counter() - between
        print(f"  {seconds[0]:.0f} s for float64 and eager, {seconds[1]:.0f} s for fastres")
        counts = Counter((c.op, c.route, c.reason) for c in log)
        for (op, route, reason), n in sorted(counts.items()):
            print(f"  {n // (orders * steps)} a step: {op} on {route} ({reason})")
    return _rows(exact, ours, eager)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backend", choices=functional.BACKENDS, default="auto")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--depth", type=int, choices=(18, 50), default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    print(", ".join(f"{k} {v}" for k, v in vars(args).items()), flush=True)
    options = vars(args) | dict(dtype=getattr(torch, args.dtype))
    rows = paired(**options, verbose=True)
    print(f"  {'median [range]':<28} {'fastres':<30} {'eager':<30} float64")
    for r in rows:
        exact = "" if r.exact is None else f"{r.exact:.3g}"
        print(f"  {r.name:<28} {r.ours!s:<30} {r.eager!s:<30} {exact:<8} {'' if r.within() else 'OUTSIDE'}")
    return 0 if all(r.within() for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
