"""Fixtures and the rules by which tests are skipped. ``make test`` runs every phase; see tests/run.py."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

# A worker of pytest-xdist shares the cores with the others; must be set before torch starts its thread pool.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What was built on this machine stays out; tests of the compiled loops build their own.
os.environ["FASTRES_NATIVE"] = "off"

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import launches, sanitizer

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
SEED = 20


def pytest_configure(config: pytest.Config) -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    folder = os.environ.get(launches.FOLDER)
    if folder and INTERPRET and HAS_TRITON:
        write = launches.record(Path(folder, f"{os.getpid()}.pickle"))
        config.add_cleanup(write)
    if INTERPRET and HAS_TRITON:
        watching = ExitStack()
        watching.enter_context(sanitizer.watch())
        config.add_cleanup(watching.close)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this process cannot run, and say why. A skipped test never counts as passed."""
    reasons = {}
    if not HAS_TRITON:
        reasons["interpret"] = reasons["aot"] = "triton is not installed"
    elif INTERPRET:
        reasons["aot"] = "compiling needs a process without TRITON_INTERPRET"
    else:
        reasons["interpret"] = "set TRITON_INTERPRET=1 to run kernels in Triton's interpreter"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    elif INTERPRET:
        reasons["gpu"] = "GPU tests need a process without TRITON_INTERPRET"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.fixture(autouse=True)
def _same_rule_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` on a CPU as with AVX2, whatever runs the tests."""
    from fastres import _cpu

    monkeypatch.setattr(_cpu._Setting, "instructions", "AVX2")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's global switches as it found them."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is; the CUDA case is skipped, not passed, without one."""
    return torch.device(request.param)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator on the CPU, so that all devices see the same numbers."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def randn(generator: torch.Generator) -> Callable[..., Tensor]:
    """``randn(*shape, dtype=float32, device='cpu', layout=contiguous, mean=0, std=1)``: the same numbers everywhere."""

    def make(
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: torch.memory_format = torch.contiguous_format,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
        return t.to(device=device, dtype=dtype).contiguous(memory_format=layout)

    return make
