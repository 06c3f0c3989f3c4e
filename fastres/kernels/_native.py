"""Compiled loops for a CPU (``fastres/csrc``): how they are built, where they lie, whether they serve here.

They are plain C functions over addresses, called through ctypes. No header of PyTorch is in them, so a build takes a
second or two and serves every version of PyTorch. Nothing builds them but ``build``, which ``python -m fastres build``
calls; what it made is found again as long as sources, processor and flags are the same, and everything runs without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fastres.kernels._switch import from_environment, switched
from fastres.kernels._tuned import cache_folder

__all__ = ["NATIVE", "build", "built_at", "library", "native", "native_obstacle", "serves"]

NATIVE = ("auto", "off")
CHANNELS = 16  # they come in multiples of this
_SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
}

_size, _address = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "fastres_winograd_weights": [_address, _size, _size, _address, _size, _size, _address, _size],
    "fastres_winograd": [*[_address] * 3, _size, _size, *[_address] * 4, ctypes.c_int, *[_size] * 6],
    "fastres_winograd_gradient": [*[_address] * 3, _size, _size, _address, *[_size] * 6],
    "fastres_winograd_size": [_size, _size],
    "fastres_conv_gradient": [*[_address] * 3, _size, _size, _address, *[_size] * 11],
}


class _Setting:
    native: str = from_environment("FASTRES_NATIVE", "auto", NATIVE)


def native(mode: str) -> AbstractContextManager[None]:
    """Whether a CPU takes the compiled loops: ``auto``, where they were built and are measured to be faster, or ``off``
    (process-wide). ValueError for another mode."""
    return switched(_Setting, "native", mode, NATIVE)


def _flags() -> tuple[str, ...]:
    """The compiler's, for this processor as PyTorch takes it. OSError where there are no loops for it."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions not in _FLAGS:
        raise OSError(
            f"the compiled loops are for processors with AVX2 or AVX-512; this one has {instructions}"
        )
    return *_COMMON, *_FLAGS[instructions]


def _sources() -> list[Path]:
    return sorted(p for p in _SOURCES.iterdir() if p.suffix in (".cpp", ".h"))


def built_at() -> Path:
    """Where a build for this processor from these sources lies, whether it is there or not. OSError as ``build``."""
    made_of = [platform.machine(), *_flags(), *(p.name + p.read_text() for p in _sources())]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{name}.so"


def build() -> Path:
    """Compile the loops for this processor and use them from now on.

    The compiler is CXX, else ``c++``, ``g++`` or ``clang++``; the result goes to FASTRES_CACHE, else ``fastres`` in the
    user's cache directory.

    Returns:
        Where the library lies.

    Raises:
        OSError: another processor than x86 with AVX2; no compiler; it failed, with what it said.
    """
    target = built_at()
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
    if compiler is None:
        raise OSError(f"no C++ compiler: {named or 'c++, g++ and clang++'} not found; CXX names another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        sources = [str(p) for p in _sources() if p.suffix == ".cpp"]
        done = subprocess.run(
            [compiler, *_flags(), *sources, "-o", unfinished], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"{compiler} failed:\n{done.stderr.strip()}")
        unfinished.replace(target)  # at once, so that no process loads half of it
    _loaded.cache_clear()
    return target


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        path = built_at()
        if not path.exists():
            return "the compiled loops are not built: python -m fastres build"
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes = arguments
        function.restype = _size if name.endswith("_size") else ctypes.c_int
    return found


def library() -> ctypes.CDLL:
    """The compiled loops; only where ``native_obstacle`` is empty."""
    found = _loaded()
    assert not isinstance(found, str), found
    return found


def native_obstacle() -> str:
    """Why the compiled loops do not run here; empty where they do."""
    if _Setting.native == "off":
        return "native is 'off'"
    found = _loaded()
    return found if isinstance(found, str) else ""


def serves(dtype: torch.dtype, *channels: int) -> bool:
    """Whether the loops run here and take these channels. torch.compile takes it as a constant."""
    return dtype == torch.float32 and not any(c % CHANNELS for c in channels) and not native_obstacle()


setattr(serves, "_dynamo_marked_constant", True)  # noqa: B010  (functions have no such attribute to mypy)
