"""Measured choices: the launch configuration of a kernel and the route of an operation, by shape class, for one GPU.

Tables are JSON files in ``fastres/data``, one a GPU; one in the user's cache directory goes before it. A table may
choose only among what is tested anyway: a kernel's configurations are those that its family names (``products``,
``allow``), routes are those of ``ROUTES``. A table must be of this very GPU; a corrupt or foreign one is refused with a
warning and the stated defaults are used. Nothing is measured here, and a launch reads no file after the first.

A launcher asks ``choose(kernel, key, default)``; a routing decision asks ``route(op, key)``. Keys are integers that
describe a shape class, sizes as powers of two. A configuration decides the order of a sum, so results are bitwise
reproducible on GPUs that share a table and agree to rounding elsewhere. What torch.compile has traced keeps the routes
that it was traced with.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "EMPTY",
    "Key",
    "Lookup",
    "ROUTES",
    "SCHEMA",
    "Table",
    "TableError",
    "active",
    "allow",
    "cache_folder",
    "candidates",
    "choose",
    "chosen",
    "log2",
    "parse",
    "product",
    "products",
    "reset",
    "route",
    "routed",
    "slug",
    "using",
    "watch",
]

SCHEMA = 2
_DATA = Path(__file__).resolve().parent.parent / "data"
Key = tuple[int, ...]
Config = tuple[int, ...]
T = TypeVar("T", bound=Config)

# Operation -> its routes, the stated default first where that is fixed. Keys: of an activation's matrix (channels_last,
# classes of rows and columns, bytes a value) for the first three, (class of rows, N, C, bytes a value) for a 1x1
# convolution between C and N channels in the next four, whose default is the byte and flop model of ``_routing``; of a
# downsample beside 3x3 convolutions its stride comes last.
# The last three are of inference (keys: ``folded_conv.folded_key`` and ``pair_key``): a 1x1 convolution that the block
# end's product can make, any other with a ReLU, and a block end with the downsample's convolution in its product.
ROUTES: dict[str, tuple[str, ...]] = {
    "batch_norm": ("triton", "aten"),
    "add_relu": ("triton", "aten"),
    "max_pool": ("triton", "aten"),
    "block_end": ("moments", "pending"),
    "pair_end": ("moments", "pending"),
    "downsample_end": ("moments", "pending"),
    "block_start": ("joint", "autograd"),
    "folded_product": ("triton", "cudnn", "folded"),
    "folded_conv": ("cudnn", "folded"),
    "folded_pair": ("pair", "separate"),
}


class TableError(ValueError):
    """A table cannot be used; the message says why."""


class Table(NamedTuple):
    """Choices by kernel or operation and shape class, and where they come from."""

    configs: dict[tuple[str, Key], Config]
    routes: dict[tuple[str, Key], str]
    source: str


EMPTY = Table({}, {}, "none: the stated defaults")


class Lookup(NamedTuple):
    """A choice that was asked for: of a kernel's configuration, or, with ``default`` a name, of a route."""

    name: str
    key: Key
    default: Any


# ------------------------------------------------------------------------------------- what may be chosen


_FAMILIES: dict[str, Callable[[Key], Sequence[Config]]] = {}


def allow(kernel: str, configurations: Callable[[Key], Sequence[Config]]) -> None:
    """Name the tested configurations of a kernel, as a function of the shape class."""
    _FAMILIES[kernel] = configurations


def candidates(kernel: str, key: Key) -> tuple[Config, ...]:
    """Every configuration that may be chosen there, without repeats; KeyError for an unknown kernel."""
    return tuple(dict.fromkeys(_FAMILIES[kernel](key)))


ODD = 2  # index in a product's table of the configuration for sizes that are no multiples of 16


def products(table: dict[str, dict[bool, tuple[Any, ...]]]) -> None:
    """Allow the configurations of matrix products: kernel -> (2 bytes a value?) -> configurations.

    The one at index ``ODD`` is compiled and tested for sizes that are no multiples of 16 and is all there is for them;
    the others are compiled and tested for multiples. Kernels and configurations added to the table later count too.
    """
    for name in table:

        def configurations(key: Key, name: str = name) -> tuple[Config, ...]:
            two, odd = bool(key[0]), bool(key[1])
            choices = table[name][two]
            return choices[ODD : ODD + 1] if odd else choices[:ODD] + choices[ODD + 1 :]

        allow(name, configurations)


# ---------------------------------------------------------------------------------------------------- choices


class _State:
    table: Table | None = None
    token: object = None  # another one with every table
    watching: list[Lookup] | None = None


def _put(table: Table | None) -> None:
    _State.table, _State.token = table, object()


def log2(n: int) -> int:
    """Exponent of the power of two that holds n; by comparisons, so that a symbolic size stays one within its class."""
    k = 0
    while (1 << k) < n:
        k += 1
    return k


def chosen() -> bool:
    """Whether a table has any say, or somebody watches: only then a launch needs its shape class."""
    return _State.watching is not None or bool(active().configs)


def routed() -> bool:
    """The same for routes. torch.compile takes it as a constant."""
    return _State.watching is not None or bool(active().routes)


def choose(kernel: str, key: Key, default: T) -> T:
    """The measured configuration of a kernel on a shape class, or the default."""
    if _State.watching is not None:
        _State.watching.append(Lookup(kernel, key, default))
    found = active().configs.get((kernel, key))
    return default if found is None else found  # type: ignore[return-value]


def product(kernel: str, x: Tensor, columns: int, other: int, odd: bool, default: T) -> T:
    """``choose`` for a matrix product over the pixels of ``x`` with this many result columns and this depth."""
    rows = x.numel() // max(x.shape[1], 1)
    key = (int(x.element_size() == 2), int(odd), log2(max(rows, 1)), log2(columns), log2(other))
    return choose(kernel, key, default)


def route(op: str, key: Key, default: str = "") -> str:
    """The measured route of an operation on a shape class, or the default. torch.compile takes it as a constant."""
    if _State.watching is not None:
        _State.watching.append(Lookup(op, key, default))
    return active().routes.get((op, key), default)


# What torch.compiler.assume_constant_result sets; that function would import torch._dynamo with this package.
for _constant in (route, routed):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010  (functions have no such attribute to mypy)


def active() -> Table:
    """The table in force, read once: the first CUDA device's, or none without one."""
    if _State.table is None:
        if not torch.cuda.is_available():
            _put(EMPTY)
            return EMPTY
        table = load(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
        _put(table)
        return table
    return _State.table


def token() -> object:
    """Stands for the table in force, in a key: what was chosen under it holds under no other. None where somebody
    watches, who has to see every choice."""
    active()
    return None if _State.watching is not None else _State.token


def reset(table: Table | None = None) -> None:
    """Use this table from now on; None: read the files again at the next launch."""
    _put(table)


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Use this table inside the block."""
    before = _State.table
    _put(table)
    try:
        yield
    finally:
        _put(before)


@contextmanager
def watch() -> Iterator[list[Lookup]]:
    """Collect every choice asked for inside the block."""
    before, _State.watching = _State.watching, []
    try:
        yield _State.watching
    finally:
        _State.watching = before


# ------------------------------------------------------------------------------------------------------- files


def slug(gpu: str, capability: tuple[int, int]) -> str:
    """File name of a GPU's table, without folder."""
    return f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}-sm{capability[0]}{capability[1]}.json"


def cache_folder() -> Path:
    """Where the user's own tables lie: FASTRES_CACHE, else ``fastres`` in the user's cache directory."""
    named = os.environ.get("FASTRES_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base, "fastres")


def _key(values: Any) -> Key:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise TableError(f"key is {values!r}; wanted a list of sizes")
    return tuple(values)


def _config(row: dict[str, Any]) -> tuple[tuple[str, Key], Config]:
    kernel, key, wanted = row["kernel"], _key(row["key"]), tuple(row["config"])
    if kernel not in _FAMILIES:
        raise TableError(f"kernel is {kernel!r}; wanted one of {', '.join(sorted(_FAMILIES))}")
    for config in candidates(kernel, key):
        if config == wanted:
            return (kernel, key), config
    raise TableError(f"{kernel}: {list(wanted)} is not among the tested configurations of {list(key)}")


def _route(row: dict[str, Any]) -> tuple[tuple[str, Key], str]:
    op, wanted = row["op"], row["route"]
    if op not in ROUTES:
        raise TableError(f"operation is {op!r}; wanted one of {', '.join(ROUTES)}")
    if wanted not in ROUTES[op]:
        raise TableError(f"{op}: route is {wanted!r}; wanted one of {', '.join(ROUTES[op])}")
    return (op, _key(row["key"])), wanted


def parse(text: str, gpu: str, capability: tuple[int, int], source: str = "table") -> Table:
    """A table from its JSON text; TableError if it is corrupt, of another schema or of another GPU."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise TableError(f"schema is {data['schema']!r}; wanted {SCHEMA}")
        if data["gpu"] != gpu or tuple(data["capability"]) != capability:
            raise TableError(f"made on {data['gpu']} {data['capability']}; this is {gpu} {list(capability)}")
        configs = dict(_config(row) for row in data["configs"])
        return Table(configs, dict(_route(row) for row in data["routes"]), source)
    except TableError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
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
