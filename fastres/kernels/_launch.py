"""How a dense activation is cut into programs: layout, launch configurations, grids.

Configurations are plain data, chosen from the shape alone: the same shape is cut the same way on every GPU, so the
order of every sum, and with it every bit of the result, does not depend on the device's size. ``ELEMENTWISE`` and
``REDUCTION`` hold all that can be chosen; tests compile and run each one. A table measured on a GPU may choose another
of them for a shape class there (``_tuned``); without one the rule below does.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import _tuned

__all__ = [
    "ELEMENTWISE",
    "REDUCTION",
    "MERGE",
    "Cut",
    "Matrix",
    "Tile",
    "channels_last",
    "cut",
    "default_tile",
    "dense",
    "elementwise",
    "lies_as",
    "matrix",
    "on",
    "partial_bytes",
    "shape_class",
    "tile_key",
]


class Tile(NamedTuple):
    """A [b0, b1] tile and the warps that work on it."""

    b0: int
    b1: int
    warps: int


# Keyed by channels_last. b1 is the contiguous side: at least 16 columns, and a whole row where it fits. A thread has 16
# values: with 32 the kernels spill where rows are no multiple of 16 (14x14, 7x7 in NCHW), for each value then has an
# address and a mask of its own.
ELEMENTWISE: dict[bool, tuple[Tile, ...]] = {
    True: (Tile(64, 16, 4), Tile(64, 32, 4), Tile(64, 64, 8), Tile(32, 128, 8)),
    False: (Tile(64, 64, 8), Tile(16, 256, 8), Tile(4, 512, 4)),
}
REDUCTION: dict[bool, tuple[Tile, ...]] = {
    True: (Tile(64, 16, 4), Tile(64, 32, 4), Tile(32, 64, 4)),
    False: (Tile(32, 64, 4), Tile(8, 256, 4), Tile(2, 1024, 4)),
}
MERGE = Tile(32, 32, 4)  # the second stage: [partials, channels]
_PROGRAMS = 1024  # first-stage programs to aim at: several for each of 100 to 150 multiprocessors
SHAPES = 4096  # whose plans are remembered, for a launch is as quick as its arithmetic
_MIN_TILES = 4  # tiles a program walks at least, so that the second stage stays small


class Matrix(NamedTuple):
    """A dense [N, C, H, W] activation as it lies in memory (see ``_jit``)."""

    rows: int
    cols: int
    n: int
    c: int
    hw: int
    nhwc: bool

    @property
    def image(self) -> int:
        """Rows of one image."""
        return self.hw if self.nhwc else self.c

    @property
    def bytes(self) -> int:
        """Bytes of one row of a one-bit mask."""
        return (self.cols + 7) // 8


class Cut(NamedTuple):
    """How a reduction is divided: ``parts`` programs along rows or images, ``chunk`` of them each."""

    tile: Tile
    parts: int
    chunk: int
    groups: int
    per_chunk: int  # values a channel has in a full chunk


def channels_last(x: Tensor) -> bool:
    """Whether ``x`` [N, C, H, W] is dense in channels_last.

    ``Tensor.is_contiguous`` of torch 2.11 denies that of everything with a symbolic size, as torch.compile makes them
    for a batch whose size changes; there the strides tell.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    symbolic = torch.compiler.is_compiling() or any(type(size) is not int for size in x.shape)
    if x.dim() != 4 or not symbolic:
        return False
    wanted: Any = 1
    for i in (1, 3, 2, 0):
        if x.shape[i] != 1 and x.stride(i) != wanted:
            return False
        wanted = wanted * x.shape[i]
    return True


def dense(x: Tensor) -> bool:
    """True for a contiguous NCHW or channels_last tensor."""
    return x.is_contiguous() or channels_last(x)


def matrix(x: Tensor) -> Matrix:
    """The matrix that a dense activation is; where both layouts hold, the one with the longer rows."""
    n, c, h, w = x.shape
    hw = h * w
    last = channels_last(x)
    if not last and not x.is_contiguous():
        raise ValueError(
            f"fastres kernels: activation has shape {list(x.shape)} and stride {list(x.stride())}; wanted a "
            "contiguous NCHW or channels_last tensor"
        )
    if last and (c >= hw or not x.is_contiguous()):
        return Matrix(n * hw, c, n, c, hw, True)
    return Matrix(n * c, hw, n, c, hw, False)


def like(x: Tensor, m: Matrix) -> torch.memory_format:
    """The memory format in which ``x`` lies as ``m`` does."""
    return torch.channels_last if m.nhwc else torch.contiguous_format


def lies_as(x: Tensor, m: Matrix) -> bool:
    """Whether ``x`` is dense in the layout of ``m``."""
    return channels_last(x) if m.nhwc else x.is_contiguous()


def same_layout(x: Tensor, m: Matrix) -> Tensor:
    """``x`` as it is; ValueError where it does not lie in memory as ``m`` does, for nothing is copied silently."""
    if not lies_as(x, m):
        raise ValueError(
            f"fastres kernels: second operand has stride {list(x.stride())}; wanted "
            f"{'channels_last' if m.nhwc else 'contiguous NCHW'}, as the first operand has"
        )
    return x


def shape_class(m: Matrix) -> tuple[int, int]:
    """The powers of two that hold the rows and the columns."""
    return _tuned.log2(m.rows), _tuned.log2(m.cols)


def default_tile(kind: str, m: Matrix) -> Tile:
    """Without a table: the first tile that holds a row, else the widest."""
    tiles = (ELEMENTWISE if kind == "elementwise" else REDUCTION)[m.nhwc]
    for t in tiles:
        if t.b1 >= m.cols:
            return t
    return tiles[-1]


def tile_key(m: Matrix) -> _tuned.Key:
    """Shape class of an elementwise pass or a reduction: channels_last, powers of two of rows and columns."""
    return (int(m.nhwc), *shape_class(m))


_tuned.allow("elementwise", lambda key: ELEMENTWISE[bool(key[0])])
_tuned.allow("reduction", lambda key: REDUCTION[bool(key[0])])


def _pick(kind: str, m: Matrix) -> Tile:
    default = default_tile(kind, m)
    return _tuned.choose(kind, tile_key(m), default) if _tuned.chosen() else default


def elementwise(m: Matrix) -> tuple[Tile, tuple[int, int]]:
    """Tile and grid of an elementwise pass over ``m``."""
    tile = _pick("elementwise", m)
    return tile, (-(-m.rows // tile.b0), -(-m.cols // tile.b1))


def cut(m: Matrix) -> Cut:
    """How a reduction per channel over ``m`` is divided among programs."""
    return _cut(m, _pick("reduction", m))


@functools.lru_cache(SHAPES)
def _cut(m: Matrix, tile: Tile) -> Cut:
    groups = -(-m.c // tile.b1) if m.nhwc else m.c
    length = m.rows if m.nhwc else m.n
    # Rows (images) that make _MIN_TILES tiles, and the number of parts that makes _PROGRAMS programs.
    least = tile.b0 * _MIN_TILES if m.nhwc else -(-_MIN_TILES * tile.b0 * tile.b1 // max(m.hw, 1))
    parts = max(1, min(-(-_PROGRAMS // groups), -(-length // least)))
    chunk = max(-(-length // parts), 1)
    if m.nhwc:
        chunk = -(-chunk // tile.b0) * tile.b0
    parts = max(1, -(-length // chunk))
    return Cut(tile, parts, chunk, groups, chunk * (1 if m.nhwc else m.hw))


def partial_bytes(y: Tensor, rows: int) -> int:
    """Bytes moved by ``rows`` fp32 partials a channel and program: each is written once and read back once."""
    m = matrix(y)
    return 2 * 4 * rows * cut(m).parts * m.c if y.numel() else 0


_HERE = nullcontext()


def on(x: Tensor) -> AbstractContextManager[object]:
    """Make ``x``'s GPU current for a launch; nothing where it already is, or on the CPU."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE
