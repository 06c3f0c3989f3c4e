"""Measured choices: which tile a shape class is cut with, and which route serves it, from a table of one GPU.

Tables are JSON files in ``fastres/data``, one a GPU; one in the user's cache directory goes before it. Whatever a
table says must be among the launch configurations that are tested anyway, and the table must be of this very GPU: a
corrupt or foreign one is refused with a warning and the stated default is used. Nothing is measured here.

Shape classes are powers of two of the rows and columns of the activation's matrix. A reduction's tile decides the
order of its sums, so results are bitwise reproducible on GPUs that share a table and agree to rounding elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastres.kernels._launch import ELEMENTWISE, REDUCTION, Tile, TileKey

__all__ = [
    "EMPTY",
    "RouteKey",
    "SCHEMA",
    "Table",
    "TableError",
    "active",
    "cache_folder",
    "parse",
    "reset",
    "slug",
]

SCHEMA = 1
ROUTES = ("triton", "aten")
_DATA = Path(__file__).resolve().parent.parent / "data"
_TILES = {"elementwise": ELEMENTWISE, "reduction": REDUCTION}
RouteKey = tuple[
    str, bool, int, int, int
]  # operation, channels_last, classes of rows and columns, bytes a value


class TableError(ValueError):
    """A table cannot be used; the message says why."""


class Table(NamedTuple):
    """Choices by shape class, and where they come from."""

    tiles: dict[TileKey, Tile]
    routes: dict[RouteKey, str]
    source: str


EMPTY = Table({}, {}, "none: the stated defaults")


def slug(gpu: str, capability: tuple[int, int]) -> str:
    """File name of a GPU's table, without folder."""
    return f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}-sm{capability[0]}{capability[1]}.json"


def cache_folder() -> Path:
    """Where the user's own tables lie: FASTRES_CACHE, else ``fastres`` in the user's cache directory."""
    named = os.environ.get("FASTRES_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base, "fastres")


def _tile(row: dict[str, Any]) -> tuple[TileKey, Tile]:
    kind, nhwc, tile = row["kind"], row["nhwc"], Tile(*row["tile"])
    if kind not in _TILES:
        raise TableError(f"tile kind is {kind!r}; wanted one of {', '.join(_TILES)}")
    if not isinstance(nhwc, bool) or tile not in _TILES[kind][nhwc]:
        raise TableError(
            f"{kind} tile {list(tile)} with nhwc {nhwc!r} is not among the tested configurations"
        )
    return (kind, nhwc, int(row["rows"]), int(row["cols"])), tile


def _route(row: dict[str, Any]) -> tuple[RouteKey, str]:
    if row["route"] not in ROUTES:
        raise TableError(f"route is {row['route']!r}; wanted one of {', '.join(ROUTES)}")
    key = (str(row["op"]), bool(row["nhwc"]), int(row["rows"]), int(row["cols"]), int(row["itemsize"]))
    return key, row["route"]


def parse(text: str, gpu: str, capability: tuple[int, int], source: str = "table") -> Table:
    """A table from its JSON text; TableError if it is corrupt, of another schema or of another GPU."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise TableError(f"schema is {data['schema']!r}; wanted {SCHEMA}")
        if data["gpu"] != gpu or tuple(data["capability"]) != capability:
            raise TableError(f"made on {data['gpu']} {data['capability']}; this is {gpu} {list(capability)}")
        tiles = dict(_tile(row) for row in data["tiles"])
        return Table(tiles, dict(_route(row) for row in data["routes"]), source)
    except TableError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"not a tuning table: {type(error).__name__}: {error}") from error


def load(gpu: str, capability: tuple[int, int]) -> Table:
    """The user's table of this GPU, else the package's, else none; one that is refused is skipped with a warning."""
    for folder in (cache_folder(), _DATA):
        path = folder / slug(gpu, capability)
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.warn(f"fastres: {path} cannot be read ({error}); using the defaults", stacklevel=2)
            continue
        try:
            return parse(text, gpu, capability, str(path))
        except TableError as error:
            warnings.warn(f"fastres: {path} is refused ({error}); using the defaults", stacklevel=2)
    return EMPTY


class _State:
    table: Table | None = None


def active() -> Table:
    """The table in force, read once: the first CUDA device's, or none without one."""
    if _State.table is None:
        if not torch.cuda.is_available():
            return EMPTY
        _State.table = load(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
    return _State.table


def reset(table: Table | None = None) -> None:
    """Use this table from now on; None: read the files again at the next launch."""
    from fastres.kernels import _launch

    _State.table = table
    _launch.use_tiles(None if table is None else table.tiles)
