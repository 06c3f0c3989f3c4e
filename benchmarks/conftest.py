"""pytest-benchmark: fastres is the function under test, and everything it is compared with is timed in its rounds.

    python -m pytest benchmarks                                small, on whatever device is there
    python -m pytest benchmarks --bench-full --bench-batch 8 32 --bench-dtype bf16 fp32
                                                               the shapes of ResNet at 224 pixels, every network,
                                                               torch.compile too
    python -m pytest benchmarks --bench-all --bench-out DIR -k "resnet50 and train"
                                                               of the whole matrix, every alternative: batch 1 to 400,
                                                               three dtypes, captured, autotuned, torchvision and timm

A cell of the matrix is a test, chosen by the options or by ``-k``; layouts and baselines are its alternatives
(``--bench-alternatives``). ``benchmark.pedantic`` calls a set-up before each round of the function under test; the
others are timed there, so all are interleaved in one process. On a GPU regions are timed by events. The table at the
end shows the medians side by side; ``--bench-out`` also writes the rows that the report draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import NAMES, REFERENCE, Case, alternatives, wanted
from benchmarks.counted import counted
from benchmarks.meter import DTYPES
from benchmarks.nets import NETWORKS
from benchmarks.rows import Writer
from benchmarks.run import gate, numbers, peak_bytes
from fastres._timing import seconds_a_call, summary, synchronize

BATCHES = (1, 8, 32, 256, 400)
OURS = "fastres channels_last"
RESULTS: list[tuple[str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres benchmarks")
    group.addoption(
        "--bench-full", action="store_true", help="full-size shapes and torch.compile, as on a GPU"
    )
    group.addoption(
        "--bench-all", action="store_true", help="the whole matrix at full size, with every alternative"
    )
    group.addoption(
        "--bench-batch", type=int, nargs="+", default=[], help="batch sizes, such as 1 8 32 256 400"
    )
    group.addoption(
        "--bench-dtype", nargs="+", default=[], choices=sorted(DTYPES), help="bf16 on a GPU, fp32 on a CPU"
    )
    group.addoption("--bench-network", nargs="+", default=[], choices=sorted(NETWORKS))
    group.addoption("--bench-alternatives", nargs="+", default=[], choices=sorted(NAMES), metavar="NAME",
                    help=f"these beside {OURS!r} and {REFERENCE!r}, of: {', '.join(NAMES)}")  # fmt: skip
    group.addoption(
        "--bench-size", type=int, default=0, help="pixels along a side of a network's image (224, or 64)"
    )
    group.addoption("--bench-rounds", type=int, default=0, help="rounds of each")
    group.addoption("--bench-out", type=Path, help="folder for the rows")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for every batch size, dtype and network asked for, by default few unless sizes are full."""
    option = metafunc.config.getoption
    gpu, every = torch.cuda.is_available(), option("--bench-all")
    full = gpu or option("--bench-full") or every
    defaults = {
        "batch": list(BATCHES) if every else [32 if full else 2],
        "dtype": sorted(DTYPES) if every else ["bf16" if gpu else "fp32"],
        "network": sorted(NETWORKS) if full else ["resnet18", "resnet50"],
    }
    for name, values in defaults.items():
        if name in metafunc.fixturenames:
            ids = "batch{}".format if name == "batch" else None
            metafunc.parametrize(name, option(f"--bench-{name}") or values, ids=ids)


def names_of(case: Case, device: torch.device, option: Callable[[str], Any]) -> list[str]:
    """The alternatives that a cell times: those asked for, all of the matrix, or what a device is usually asked."""
    if asked := option("--bench-alternatives"):
        return list(dict.fromkeys([REFERENCE, *asked, OURS]))
    if option("--bench-all"):
        return [
            n for n, a in NAMES.items() if case.network or not (a.graph or a.norm in ("timm", "torchvision"))
        ]
    full = option("--bench-full") or device.type == "cuda"
    return wanted(case, device, full, full)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to time on, once its kernels have been found right."""
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if missed := gate(found):
        pytest.fail(f"parity is missed; nothing is timed: {missed}", pytrace=False)
    return found


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest, device: torch.device) -> bool:
    option = request.config.getoption
    return option("--bench-full") or option("--bench-all") or device.type == "cuda"


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, full: bool) -> int:
    return request.config.getoption("--bench-rounds") or (20 if full else 7)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest, full: bool) -> int:
    return request.config.getoption("--bench-size") or (224 if full else 64)


@pytest.fixture(scope="session")
def writer(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Writer | None]:
    """Where rows go, a file a session; None where nobody asked for them."""
    folder = request.config.getoption("--bench-out")
    found = Writer(folder, "pytest", device) if folder else None
    yield found
    if found is not None:
        found.close()


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
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, rounds: int, writer: Writer | None
) -> Callable[[Case, bool, str], None]:
    """``compare(case, train, dtype)``: time a case's alternatives; fastres channels_last is the one under test.

    A timed region is as many calls as last 20 ms on a GPU, where a single one would be mostly launch and wait.
    """

    def run(case: Case, train: bool, name: str) -> None:
        dtype, batch = DTYPES[name], case.shapes[0][0]
        ready, failed = alternatives(
            case, names_of(case, device, request.config.getoption), device, dtype, train
        )
        for n, call in list(ready.items()):
            try:
                for i in range(2):
                    call(i)
            except Exception as error:  # a compiler that is missing shows itself at the first call
                failed[n] = f"{type(error).__name__}: {str(error)[:300]}"
                del ready[n]
        if OURS not in ready:
            pytest.fail(f"{OURS}: {failed[OURS]}", pytrace=False)
        memory = {n: peak_bytes(getattr(call, "uncaptured", call), device) for n, call in ready.items()}
        calls = _calls(ready[OURS], device)
        seconds: dict[str, list[float]] = {n: [] for n in ready}

        def region(n: str) -> None:
            seconds[n].append(seconds_a_call(ready[n], len(seconds[n]) * calls, calls, device))

        def others() -> None:
            for n in ready:
                if n != OURS:
                    region(n)

        benchmark.group = f"{case.family} {'train' if train else 'infer'} {name} batch {batch}"
        benchmark.pedantic(region, args=(OURS,), setup=None if len(ready) == 1 else others, rounds=rounds)
        samples = {n: summary(s, calls) for n, s in seconds.items()}
        medians = {n: s.median for n, s in samples.items()}
        mode, pixels = "train" if train else "infer", case.shapes[0][-1]
        same = dict(case=case.name, batch=batch, size=pixels, dtype=name, mode=mode)
        benchmark.extra_info.update(
            same,
            medians=medians,
            peak_bytes=memory,
            failed=failed,
            device=str(device),
            shapes=case.shapes,
            calls=calls,
        )
        for n in [*samples, *failed] if writer is not None else []:
            found: dict[str, Any] = dict(error=failed[n]) if n in failed else numbers(samples[n], batch)
            if n in samples:
                found |= dict(peak_bytes=memory[n], reference_s=medians.get(REFERENCE))
                found |= counted(case, n, name, train, device)
            writer.row(suite=f"{case.family}s", alternative=n, **same, **found)
        label = f"{case.name} {same['mode']} {name} batch {batch}"
        RESULTS.append((label, {**medians, **dict.fromkeys(failed, "not measured")}))

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Medians in milliseconds, a case a line; ``x`` is the fastest eager time over the fastest of fastres."""
    if not RESULTS:
        return
    columns = list(dict.fromkeys(name for _, found in RESULTS for name in found))
    heads = [c.replace("channels_last", "cl") for c in columns]
    widths = [max(14, len(h) + 2) for h in heads]
    terminalreporter.section("medians in ms")
    terminalreporter.write_line(
        " " * 52 + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)) + f"{'x':>8}"
    )
    for label, found in RESULTS:
        cells = [found.get(c, "") for c in columns]
        text = "".join(
            f"{v * 1e3:>{w}.3f}" if isinstance(v, float) else f"{v:>{w}}"
            for v, w in zip(cells, widths, strict=True)
        )
        eager = [v for n, v in found.items() if n.startswith("eager") and isinstance(v, float)]
        ours = [v for n, v in found.items() if n.startswith("fastres") and isinstance(v, float)]
        ratio = f"{min(eager) / min(ours):>8.2f}" if eager and ours else ""
        terminalreporter.write_line(f"{label:<52}{text}{ratio}")
