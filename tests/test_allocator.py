"""``keep_memory``: page faults of large tensors, with and without, each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import fastres
from fastres import _allocator

GLIBC = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource, sys
import torch, fastres
torch.set_num_threads(1)
for keep in sys.argv[1:]:
    fastres.keep_memory(keep == "True")
def use():
    return [torch.ones(4 << 20) for _ in range(4)]  # 64 MiB
for _ in range(4):  # glibc finds places for all four
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*keep: bool) -> int:
    command = [sys.executable, "-c", FAULTS, *map(str, keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not GLIBC, reason="a setting of glibc's")
def test_memory_is_kept_and_given_back():
    given_back, kept = faults(True, False), faults(True)
    if given_back < 1000:
        pytest.skip(f"{given_back} page faults for 256 MiB: large pages, or another malloc than glibc's")
    assert kept < given_back / 10  # without either, glibc's threshold adapts, differently from run to run


def test_another_c_library_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_allocator.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(OSError, match="keep_memory: C library is unknown on .*; wanted glibc on Linux"):
        fastres.keep_memory()


@pytest.mark.skipif(not GLIBC, reason="a setting of glibc's")
def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch):
    class Refuses:
        def mallopt(self, parameter: int, value: int) -> int:
            return 0

    monkeypatch.setattr(_allocator.ctypes, "CDLL", lambda name: Refuses())
    with pytest.raises(OSError, match=r"keep_memory: glibc .* refused mallopt\(-4, 0\)"):
        fastres.keep_memory()
