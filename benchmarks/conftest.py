"""pytest-benchmark: fastres is the function under test, and everything it is compared with is timed in its rounds.

    python -m pytest benchmarks                                small, on whatever device is there
    python -m pytest benchmarks --bench-full --bench-batch 32  the shapes of ResNet at 224 pixels, torch.compile too

``benchmark.pedantic`` calls a set-up before each round of the function under test; the others are timed there, so all
are interleaved in one process. The table at the end shows the medians side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, alternatives, wanted
from fastres._timing import summary, synchronize

RESULTS: list[tuple[str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres benchmarks")
    group.addoption(
        "--bench-full", action="store_true", help="full-size shapes and torch.compile, as on a GPU"
    )
    group.addoption("--bench-batch", type=int, default=0, help="batch size")
    group.addoption("--bench-rounds", type=int, default=0, help="rounds of each")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest, device: torch.device) -> bool:
    return request.config.getoption("--bench-full") or device.type == "cuda"


@pytest.fixture
def compare(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, full: bool
) -> Callable[[Case, bool], None]:
    """``compare(case, train)``: time a case's alternatives; fastres channels_last is the one under test."""

    def run(case: Case, train: bool) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        ready, failed = alternatives(case, wanted(case, device, full, False), device, dtype, train)
        ours = ready.pop("fastres channels_last")
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for call in (*ready.values(), ours):
            for i in range(2):
                call(i)
        synchronize(device)

        def others() -> None:
            for name, call in ready.items():
                start = time.perf_counter()
                call(len(seconds[name]))
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)

        def timed() -> None:
            ours(0)
            synchronize(device)

        rounds = request.config.getoption("--bench-rounds") or (20 if full else 7)
        benchmark.group = case.family
        benchmark.pedantic(timed, setup=others, rounds=rounds)
        medians = {name: summary(s, 1).median for name, s in seconds.items()}
        stats = getattr(benchmark, "stats", None)  # none under --benchmark-disable
        if stats is not None:
            medians["fastres channels_last"] = stats.stats.median
        benchmark.extra_info.update(
            {**medians, "failed": failed, "device": str(device), "dtype": str(dtype), "shapes": case.shapes}
        )
        label = f"{case.name} {'train' if train else 'infer'} batch {case.shapes[0][0]}"
        RESULTS.append((label, {**medians, **dict.fromkeys(failed, "failed")}))

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Medians in milliseconds, a case a line; ``x`` is the fastest eager time over the fastest of fastres."""
    if not RESULTS:
        return
    columns = list(dict.fromkeys(name for _, found in RESULTS for name in found))
    terminalreporter.section("medians in ms")
    terminalreporter.write_line(
        " " * 52 + "".join(f"{c.replace('channels_last', 'cl'):>14}" for c in columns) + f"{'x':>8}"
    )
    for label, found in RESULTS:
        cells = [found.get(c, "") for c in columns]
        text = "".join(f"{v * 1e3:>14.3f}" if isinstance(v, float) else f"{v:>14}" for v in cells)
        eager = [v for n, v in found.items() if n.startswith("eager") and isinstance(v, float)]
        ours = [v for n, v in found.items() if n.startswith("fastres") and isinstance(v, float)]
        ratio = f"{min(eager) / min(ours):>8.2f}" if eager and ours else ""
        terminalreporter.write_line(f"{label:<52}{text}{ratio}")
