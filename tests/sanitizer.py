"""What compute-sanitizer's memcheck and racecheck look for on a GPU, looked for in Triton's interpreter.

The interpreter runs one program after the other, and a program's tile as one array: a kernel whose programs step on
each other's values, or which reads past a tensor's end, can give the right answer there and a wrong one on a GPU. So
every launch of the tests in the interpreter is watched (``watch``), and fails where

- a lane that is not masked reads or writes outside the tensors that the launch was given;
- two lanes write one address, in one program or in two;
- a program reads what another program writes;
- a program reads and writes an address from different lanes: Triton promises no order between the threads of a program,
  and only a value that is read and written by the same lane of the same tile stays within a thread;
- a program reads back what it wrote: a pipelined loop loads ahead of its stores.

A launch is watched once for each set of sizes, layouts and constants, since addresses do not depend on values. Atomics
are not watched; no kernel has any (``tests/test_sanitizer.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Access(NamedTuple):
    """The lanes of one load or store that are not masked: their addresses, and their places in the tile."""

    program: int
    write: bool
    address: np.ndarray
    lane: np.ndarray
    tile: tuple[int, ...]


class Fault(AssertionError):
    """A launch that a GPU may run otherwise than the interpreter."""


def extent(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte that belongs to a tensor."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def intervals(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the memory of tensors, those that overlap joined."""
    joined: list[list[int]] = []
    for begin, end in sorted(extent(t) for t in tensors if t.numel()):
        if joined and begin < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    both = np.array(joined, dtype=np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


class Log:
    """The accesses of one launch."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel, self.tensors, self.program = kernel, tensors, -1
        self.starts, self.ends = intervals(tensors)
        self.accesses: list[Access] = []

    def add(self, write: bool, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Note down a load or store of elements of ``size`` bytes; Fault where it leaves the launch's tensors."""
        tile = np.broadcast_shapes(pointers.shape, mask.shape)
        lane = np.flatnonzero(np.broadcast_to(mask, tile))
        address = np.broadcast_to(pointers, tile).reshape(-1)[lane]
        if not address.size:
            return
        if not self.starts.size:
            raise Fault(f"{self.kernel}: reads or writes, and was given no tensor")
        at = np.maximum(np.searchsorted(self.starts, address, "right") - 1, 0)
        outside = (address < self.starts[at]) | (address + np.uint64(size) > self.ends[at])
        if outside.any():
            raise Fault(
                f"{self.kernel}: program {self.program} {'writes' if write else 'reads'} outside its tensors, lane "
                f"{lane[outside][0]} of a tile {list(tile)}: {self.place(address[outside][0])}"
            )
        self.accesses.append(Access(self.program, write, address, lane, tile))

    def place(self, address: Any) -> str:
        """An address as an element of the tensor that it belongs to or is nearest to."""

        def distance(t: Tensor) -> int:
            begin, end = extent(t)
            return max(begin - int(address), int(address) - end + 1, 0)

        t = min((t for t in self.tensors if t.numel()), key=distance)
        offset = (int(address) - t.data_ptr()) // t.element_size()
        return f"element {offset} of {list(t.shape)}, strides {list(t.stride())}, {t.dtype}"

    def check(self) -> None:
        """Fault where the result depends on the order of programs or lanes."""
        writes = [a for a in self.accesses if a.write]
        if not writes:
            return
        first, last = min(a.address.min() for a in writes), max(a.address.max() for a in writes)
        near = [a for a in self.accesses if a.address.max() >= first and a.address.min() <= last]
        address = np.concatenate([a.address for a in near])
        lane = np.concatenate([a.lane for a in near])
        which = np.repeat(np.arange(len(near)), [a.address.size for a in near])
        write = np.array([a.write for a in near])[which]

        # Only addresses that are written, sorted, the first writer of each in front: the others are held against it.
        kept = np.flatnonzero(np.isin(address, address[write]))
        kept = kept[np.lexsort((~write[kept], address[kept]))]
        address, lane, which, write = address[kept], lane[kept], which[kept], write[kept]
        heads = np.flatnonzero(np.r_[True, address[1:] != address[:-1]])
        owner = np.repeat(heads, np.diff(np.r_[heads, address.size]))

        program = np.array([a.program for a in near])[which]
        numbers = {tile: i for i, tile in enumerate({a.tile for a in near})}
        tile = np.array([numbers[a.tile] for a in near])[which]
        same = (program == program[owner]) & (lane == lane[owner]) & (tile == tile[owner])
        back = ~write & (which > which[owner])
        for i in np.flatnonzero(~same | back)[:1]:
            j = owner[i]
            both = "write" if write[i] else "write and read"
            raise Fault(
                f"{self.kernel}: programs {program[j]} and {program[i]} {both} one address, lanes {lane[j]} of a tile "
                f"{list(near[which[j]].tile)} and {lane[i]} of {list(near[which[i]].tile)}: {self.place(address[i])}"
            )


def _facts(value: Any, memories: dict[int, int]) -> Any:
    """Of an argument what decides addresses; of tensors also which of them share their memory."""
    if not isinstance(value, Tensor):
        return repr(value)
    memory = memories.setdefault(value.untyped_storage().data_ptr(), len(memories))
    return tuple(value.shape), value.stride(), value.dtype, value.storage_offset(), memory


@contextmanager
def watch() -> Iterator[None]:
    """Every launch of the interpreter is watched from here on. A :class:`Fault` within a kernel reaches the caller as
    Triton's ``InterpreterError``, which quotes it."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    inner_load, inner_store = builder.create_masked_load, builder.create_masked_store
    inner_index, inner_call = builder.set_grid_idx, executor.__call__
    sound: set[Any] = set()
    log: Log | None = None

    def note(write: bool, pointers: Any, mask: Any) -> None:
        if log is not None:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            log.add(write, pointers.data, mask.data, size)

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        note(False, pointers, mask)
        return inner_load(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(True, pointers, mask)
        return inner_store(pointers, value, mask, *rest)

    def index(*place: int) -> None:
        if log is not None:
            log.program += 1
        inner_index(*place)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal log
        values, memories = [*args, *kwargs.values()], dict[int, int]()
        key = (self.fn, repr(self.grid), tuple(kwargs), *(_facts(v, memories) for v in values))
        if key not in sound:
            log = Log(self.fn.__name__, [v for v in values if isinstance(v, Tensor)])
        try:
            inner_call(self, *args, **kwargs)
            if log is not None:
                log.check()
                sound.add(key)
        finally:
            log = None

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.set_grid_idx, executor.__call__ = index, call
    try:
        yield
    finally:
        executor.__call__ = inner_call
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
