"""The watcher of the interpreter's launches (tests/sanitizer.py) sees what it is there to see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastres
from fastres.kernels._triton import tl, triton
from tests import sanitizer

pytestmark = pytest.mark.interpret


@triton.jit
def shifted_copy(x_ptr, out_ptr, N, READ, WRITE, B: tl.constexpr):
    """out[i + WRITE] = x[i + READ]"""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + i + WRITE, tl.load(x_ptr + i + READ, mask=i < N), mask=i < N)


@triton.jit
def everyone_writes(out_ptr, B: tl.constexpr):
    """Every program the same sum to the same place."""
    tl.store(out_ptr, tl.sum(tl.arange(0, B), axis=0))


@triton.jit
def lanes_collide(out_ptr, B: tl.constexpr):
    """Two lanes to each place."""
    i = tl.arange(0, B)
    tl.store(out_ptr + i // 2, i)


@triton.jit
def turned(x_ptr, B: tl.constexpr):
    """In place, from the other end of the tile."""
    i = tl.arange(0, B)
    tl.store(x_ptr + i, tl.load(x_ptr + B - 1 - i))


@triton.jit
def counts_up(x_ptr, STEPS, B: tl.constexpr):
    """Each round reads what the round before wrote."""
    i = tl.arange(0, B)
    for _ in range(STEPS):
        tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


def test_a_sound_launch_passes_also_in_place():
    x = torch.arange(13.0)
    shifted_copy[(2,)](x, x, 13, 0, 0, B=8)
    shifted, part = torch.zeros(16), torch.zeros(11)
    shifted_copy[(2,)](x, shifted, 13, 0, 3, B=8)
    shifted_copy[(2,)](x[2:], part, 11, 0, 0, B=8)
    assert x.equal(torch.arange(13.0)) and shifted[3:].equal(x) and part.equal(x[2:])


@pytest.mark.parametrize(
    "read, write, says",
    [
        (1, 0, r"program 1 reads outside its tensors, lane 4 of a tile \[8\]: element 13 of \[13\]"),
        (-1, 0, r"program 0 reads outside its tensors, lane 0 of a tile \[8\]: element -1 of \[13\]"),
        (0, 1, r"program 1 writes outside its tensors"),
    ],
)
def test_outside(read, write, says):
    with pytest.raises(Exception, match=says):
        shifted_copy[(2,)](torch.zeros(13), torch.zeros(13), 13, read, write, B=8)


def test_between_programs():
    x = torch.zeros(24)
    with pytest.raises(sanitizer.Fault, match=r"programs 1 and 0 write and read one address"):
        shifted_copy[(2,)](x, x, 16, 8, 0, B=8)
    with pytest.raises(sanitizer.Fault, match=r"everyone_writes: programs 0 and 1 write one address"):
        everyone_writes[(3,)](torch.zeros(1, dtype=torch.int32), B=4)


def test_between_lanes():
    with pytest.raises(sanitizer.Fault, match=r"programs 0 and 0 write one address, lanes 0 .* and 1 of"):
        lanes_collide[(1,)](torch.zeros(4, dtype=torch.int32), B=4)
    with pytest.raises(sanitizer.Fault, match=r"programs 0 and 0 write and read one address"):
        turned[(1,)](torch.zeros(4), B=4)


def test_read_back():
    counts_up[(1,)](torch.zeros(4), 1, B=4)
    with pytest.raises(
        sanitizer.Fault, match="programs 0 and 0 write and read one address, lanes 0 .* and 0 of"
    ):
        counts_up[(1,)](torch.zeros(4), 2, B=4)


def test_a_launch_at_fault_stays_at_fault():
    for _ in range(2):
        with pytest.raises(sanitizer.Fault):
            everyone_writes[(2,)](torch.zeros(1, dtype=torch.int32), B=4)


def test_no_kernel_has_atomics():
    """Sums are in a fixed order, and the watcher need not know them."""
    for file in (Path(fastres.__file__).parent / "kernels").glob("*.py"):
        assert "atomic_" not in file.read_text(), file
