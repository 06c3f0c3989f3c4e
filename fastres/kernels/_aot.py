"""Descriptions of launches for compiling ahead of time, without a GPU: what ``aot_cases`` of every family yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fastres.kernels._launch import Tile

__all__ = ["STORAGE", "Case", "launches", "signature"]

STORAGE = ("fp32", "fp16", "bf16")
_ACTIVATIONS = frozenset(
    f"{name}_ptr" for name in ("y", "z", "dz", "dy", "out", "id", "did", "g", "dout", "x", "w", "dx")
)  # fmt: skip


class Case(NamedTuple):
    """One kernel launch as the compiler sees it."""

    name: str
    kernel: Any
    signature: dict[str, str]  # run-time arguments: "*bf16", "*fp32", "i32", "fp32"
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages
    aligned: list[str]  # arguments declared divisible by 16


def signature(kernel: Any, storage: str, types: dict[str, str] | None = None) -> dict[str, str]:
    """Types by this package's naming: activations hold ``storage``, other pointers fp32, capitals are sizes."""
    table = {}
    for name in kernel.arg_names:
        if types and name in types:
            table[name] = types[name]
        elif name.endswith("_ptr"):
            table[name] = f"*{storage}" if name in _ACTIVATIONS else "*fp32"
        else:
            table[name] = "i32" if name.isupper() else "fp32"
    return table


def launches(
    kernel: Any,
    tiles: dict[bool, tuple[Tile, ...]],
    *variants: dict[str, Any],
    types: dict[str, str] | None = None,
    layout: bool = True,
) -> Iterator[Case]:
    """Every (storage, layout, tile, variant) of a kernel over the tile table it is launched from.

    Pointers, and the sizes that strides are made of, are declared divisible by 16, as for the layers of a ResNet.
    """
    aligned = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ("C", "COLS", "HW")]
    rows: Iterable[tuple[bool, Tile]] = [(nhwc, t) for nhwc in (True, False) for t in tiles[nhwc]]
    for storage in STORAGE:
        for nhwc, t in rows:
            for i, flags in enumerate(variants or ({},)):
                yield Case(
                    f"{kernel.__name__}{i or ''}-{storage}-{'nhwc' if nhwc else 'nchw'}-{t.b0}x{t.b1}",
                    kernel,
                    signature(kernel, storage, types),
                    dict(flags, B0=t.b0, B1=t.b1, **({"NHWC": nhwc} if layout else {})),
                    dict(num_warps=t.warps),
                    aligned,
                )
