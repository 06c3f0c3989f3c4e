"""pytest-benchmark: fastres is the function under test, and everything it is compared with is timed in its rounds.

    python -m pytest benchmarks                                small, on whatever device is there
    python -m pytest benchmarks --bench-full --bench-batch 8 32 --bench-dtype bf16 fp32
                                                               the shapes of ResNet at 224 pixels, every network,
                                                               torch.compile too

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
from benchmarks.meter import DTYPES
from benchmarks.nets import NETWORKS
from benchmarks.run import gate
from fastres._timing import summary, synchronize

RESULTS: list[tuple[str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres benchmarks")
    group.addoption(
        "--bench-full", action="store_true", help="full-size shapes and torch.compile, as on a GPU"
    )
    group.addoption(
        "--bench-batch", type=int, nargs="+", default=[], help="batch sizes, such as 1 8 32 256 400"
    )
    group.addoption(
        "--bench-dtype", nargs="+", default=[], choices=sorted(DTYPES), help="bf16 on a GPU, fp32 on a CPU"
    )
    group.addoption("--bench-rounds", type=int, default=0, help="rounds of each")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for every batch size and dtype asked for, and for every network where sizes are full."""
    option = metafunc.config.getoption
    gpu = torch.cuda.is_available()
    full = gpu or option("--bench-full")
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", option("--bench-batch") or [32 if full else 2], ids="batch{}".format)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", option("--bench-dtype") or ["bf16" if gpu else "fp32"])
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", sorted(NETWORKS) if full else ["resnet18", "resnet50"])


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to time on, once its kernels have been found right."""
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if missed := gate(found):
        pytest.fail(f"parity is missed; nothing is timed: {missed}", pytrace=False)
    return found


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest, device: torch.device) -> bool:
    return request.config.getoption("--bench-full") or device.type == "cuda"


def _calls(call: Callable[[int], object], device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    synchronize(device)
    start = time.perf_counter()
    call(0)
    synchronize(device)
    return max(1, min(1000, int(0.02 / max(time.perf_counter() - start, 1e-6))))


@pytest.fixture
def compare(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, full: bool
) -> Callable[[Case, bool, str], None]:
    """``compare(case, train, dtype)``: time a case's alternatives; fastres channels_last is the one under test.

    A timed region is as many calls as last 20 ms on a GPU, where a single one would be mostly launch and wait.
    """

    def run(case: Case, train: bool, name: str) -> None:
        dtype = DTYPES[name]
        ready, failed = alternatives(case, wanted(case, device, full, False), device, dtype, train)
        ours = ready.pop("fastres channels_last")
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for call in (*ready.values(), ours):
            for i in range(2):
                call(i)
        calls = _calls(ours, device)

        def region(call: Callable[[int], object]) -> float:
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            synchronize(device)
            return (time.perf_counter() - start) / calls

        def others() -> None:
            for name, call in ready.items():
                seconds[name].append(region(call))

        def timed() -> None:
            region(ours)

        rounds = request.config.getoption("--bench-rounds") or (20 if full else 7)
        benchmark.group = case.family
        benchmark.pedantic(timed, setup=others, rounds=rounds)
        medians = {name: summary(s, 1).median for name, s in seconds.items()}
        stats = getattr(benchmark, "stats", None)  # none under --benchmark-disable
        if stats is not None:
            medians["fastres channels_last"] = stats.stats.median / calls
        benchmark.extra_info.update(
            {
                **medians,
                "failed": failed,
                "device": str(device),
                "dtype": name,
                "shapes": case.shapes,
                "calls": calls,
            }
        )
        label = f"{case.name} {'train' if train else 'infer'} {name} batch {case.shapes[0][0]}"
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
