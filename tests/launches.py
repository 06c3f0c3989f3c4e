"""Triton's own way to a launch, without a GPU: argument binding, specialisation and the compiler's front end.

The interpreter takes any arguments, but the compiler makes of a size that is 1 a constant with no methods, and of None
a constant, refuses options it does not know, and types a large size as 64 bits; a GPU refuses grids beyond its
limits. So the phase of tests in the interpreter notes down every distinct launch (``record``), and the phase of
compiles launches each again (``read``, ``replay``) through ``triton.jit``'s ``run`` on a driver that has no device
(``no_device``). What follows the front end is the business of ``tests/aot.py``, for every configuration.
"""

from __future__ import annotations

import importlib
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:  # tests/run.py asks for FOLDER alone
    import torch

FOLDER = "FASTRES_LAUNCHES"  # environment: where launches are noted down, by tests/run.py
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications


class Pointer(NamedTuple):
    """Stands for a tensor."""

    dtype: torch.dtype


class Launch(NamedTuple):
    """A launch as it was made: positional arguments and keywords, options such as num_warps among them."""

    module: str
    kernel: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]
    test: str


def _class(value: Any, constant: bool) -> Any:
    """What the compiler may tell a value apart by: the value of a constant, of an integer whether it is 1, a multiple
    of 16 or too large for 32 bits, else the type."""
    if isinstance(value, Pointer):
        return value
    if constant or value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value).__name__


def record(path: Path) -> Any:
    """Note down every distinct launch of the interpreter from here on; a function that writes them to ``path``."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    found: dict[tuple[Any, ...], Launch] = {}
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = tuple(Pointer(a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        names = self.arg_names
        annotated = self.fn.__annotations__
        key = (
            self.fn.__module__,
            self.fn.__name__,
            *(_class(v, names[i] in annotated) for i, v in enumerate(given)),
            *sorted((k, repr(v)) for k, v in kwargs.items()),
        )
        if key not in found:
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            found[key] = Launch(self.fn.__module__, self.fn.__name__, given, kwargs, tuple(grid), test)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noted

    def write() -> None:
        path.write_bytes(pickle.dumps(list(found.items())))

    return write


def read(folder: Path) -> list[Launch]:
    """The distinct launches that the processes of a run of tests noted down."""
    found: dict[tuple[Any, ...], Launch] = {}
    for file in sorted(folder.glob("*.pickle")):
        found |= dict(pickle.loads(file.read_bytes()))
    return list(found.values())


class Log(list[tuple[str, tuple[int, ...]]]):
    """Kernels that were launched, and their grids; and in ``arguments`` what the driver's launcher got: of a tensor its
    size and all that the compiler may tell it apart by."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[tuple[Any, ...]] = []


def _told(value: Any) -> Any:
    if not hasattr(value, "data_ptr"):
        return repr(value)
    return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16


class _Kernel:
    """What the front end made: counts launches and looks at their grids."""

    function, packed_metadata = None, None

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(
        self, x: Any, y: Any, z: Any, stream: int, function: Any, packed: Any, metadata: Any, enter: Any, leave: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        self.log.append((self.name, check_grid((x, y, z))))
        self.log.arguments.append((stream, function, packed, *map(_told, args)))


def check_grid(grid: tuple[Any, ...]) -> tuple[int, ...]:
    """``grid``; ValueError for one that a GPU would refuse."""
    for size, limit in zip(grid, GRID_LIMITS, strict=False):
        if type(size) is not int or not 1 <= size <= limit:
            raise ValueError(f"grid {grid}: wanted integers of 1 to {GRID_LIMITS}")
    return grid


class _Driver:
    """A driver of Triton's for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        return self.target


def _front_end(source: Any, target: Any, options: Any) -> str:
    """Source to Triton's IR, as ``triton.compile`` begins; the kernel's name."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    code = source.make_ir(
        target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    )
    if not code.verify():
        raise ValueError(f"{source.name}: the front end's output is not valid")
    return str(source.name)


class _Silent(_Kernel):
    """For timing."""

    def run(self, *args: Any) -> None:  # type: ignore[override]
        pass


@contextmanager
def no_device(arch: int = 90, kernel: type[_Kernel] = _Kernel) -> Iterator[Log]:
    """Launches of compiled kernels go through Triton's ``run`` and front end, and end in the list that is yielded."""
    import triton.compiler
    from triton.runtime.driver import driver

    log = Log()
    front = lambda source, target, options: kernel(_front_end(source, target, options), log)  # noqa: E731
    before = driver._active
    _forget()
    driver.set_active(_Driver(arch))
    try:
        with mock.patch.object(triton.compiler, "compile", front):
            yield log
    finally:
        driver._active = before
        _forget()


@contextmanager
def on_cpu(noting: bool = True) -> Iterator[Log]:
    """``no_device`` for operators on the CPU, which launch compiled kernels in it; results are what memory held.
    Without ``noting`` a launch ends in an empty function, for timing."""
    import torch

    from fastres import _routing
    from fastres.kernels import _library

    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    with (
        mock.patch.object(_library, "INTERPRET", True),
        mock.patch.object(_routing, "INTERPRET", True),
        no_device(kernel=_Kernel if noting else _Silent) as log,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, launcher in _library.LAUNCHERS.items():
            library.impl(name, launcher, "CPU", allow_override=True)
        try:
            yield log
        finally:
            library._destroy()


def _forget() -> None:
    """Nothing that the package's kernels were compiled to, here or on a device, is taken for another's."""
    from triton import JITFunction

    from fastres import _whole
    from tests.aot import modules

    _whole.VERDICTS.clear()  # programs launch what was compiled
    for name in modules():
        for value in vars(importlib.import_module(f"fastres.kernels.{name}")).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def replay(launch: Launch) -> None:
    """Make the launch again, inside ``no_device``."""
    from triton.runtime.jit import MockTensor

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    check_grid(launch.grid)
    args = [MockTensor(a.dtype) if isinstance(a, Pointer) else a for a in launch.args]
    kernel.warmup(*args, grid=launch.grid, **launch.kwargs)
