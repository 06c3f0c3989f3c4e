"""Trained side by side: fastres stays as near to a float64 run as eager runs that sum in other orders do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.paired import paired
from fastres import functional
from tests.tolerance import FACTOR, FLOOR

DEPTHS = pytest.mark.parametrize("depth", [18, 50])


def distances(*args, **options):
    return [r for r in paired(*args, orders=2, **options) if r.exact is None]


@DEPTHS
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_steps(backend, depth):
    """Before rounding has put many activations on the other side of a ReLU's kink, which would part even eager runs.
    Where it has in one order, the other counts: a wrong formula is wrong in both."""
    with functional.winograd("on"):
        for r in distances(2, backend, 4, depth=depth):
            assert r.ours.low <= FACTOR * r.eager.high + FLOOR[torch.float32], r


@DEPTHS
def test_five_steps_in_float64(depth):
    """Where no kink is within reach of rounding, runs stay together, and so do fastres's."""
    for r in distances(5, "reference", 4, depth=depth, dtype=torch.float64):
        assert r.ours.high <= FACTOR * r.eager.high + FLOOR[torch.float64], r


@pytest.mark.gpu
def test_200_steps_gpu():
    for r in paired(200, "triton", 32, device="cuda"):
        assert r.within(), r
