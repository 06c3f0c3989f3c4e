"""Trained side by side: fastres stays as near to a float64 run as eager runs that sum in other orders do."""

from __future__ import annotations

import pytest

from benchmarks.paired import paired
from tests.tolerance import FACTOR


def within(floor: float, *args: object) -> None:
    for d in paired(*args):  # type: ignore[arg-type]
        assert d.ours <= FACTOR * d.eager + floor, d


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_steps(backend):
    """Before any activation has fallen on the other side of a ReLU's kink, which would part even eager runs."""
    within(1e-6, 2, backend, 4)


@pytest.mark.gpu
def test_200_steps_gpu():
    within(0.0, 200, "triton", 32, "cuda")
