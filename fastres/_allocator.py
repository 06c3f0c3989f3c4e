"""What glibc's malloc does with memory that is given back: on a CPU, new activations otherwise cost page faults."""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["keep_memory"]

# mallopt's parameters (glibc's malloc.h) and their values: no block has a mapping of its own, the heap's top is never
# given back, and it grows by 64 MiB at least. After them glibc's defaults.
_KEEP = ((-4, 0, 65536), (-1, -1, 128 << 10), (-2, 64 << 20, 0))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_memory(keep: bool = True) -> None:
    """Keep the memory of freed tensors in this process, for the next ones to take; ``False`` gives it back again, and
    leaves glibc's defaults (but not its adapting threshold, which any setting ends).

    For training, and inference by batches, on a CPU. glibc returns large blocks to the system at once, and each new
    activation then costs a page fault for every 4 KiB. It is a setting of the whole process and of glibc's malloc:
    memory grows to the largest that was ever in use at once and stays there, and another allocator that is preloaded
    does not see it. Nothing in fastres calls it. docs/CPU.md and docs/INFERENCE.md have figures.

    Raises:
        OSError: the C library is not glibc, or refuses.
    """
    operation = "keep_memory"
    name, version = platform.libc_ver()
    if not sys.platform.startswith("linux") or name != "glibc":
        raise OSError(
            f"{operation}: C library is {name or 'unknown'} on {sys.platform}; wanted glibc on Linux"
        )
    libc = ctypes.CDLL(None)
    for parameter, *values in _KEEP:
        value = values[0 if keep else 1]
        if not libc.mallopt(parameter, value):
            raise OSError(f"{operation}: glibc {version} refused mallopt({parameter}, {value})")
    if not keep:
        libc.malloc_trim(0)
