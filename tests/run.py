"""Run lint, types and every test phase, then print one table; exit 1 if any phase failed.

    python tests/run.py                          everything
    python tests/run.py --only lint              ruff, mypy and the documentation
    python tests/run.py --only interpret -k relu one phase, the rest is passed to pytest

The tests need several processes: Triton decides when a kernel is decorated whether it will be interpreted
(TRITON_INTERPRET=1) or compiled, so kernels in the interpreter and ahead-of-time compiles exclude each other; other
people's packages (tests/set_up_peers.py) are on the path of the phase ``peers`` alone; and the last phase compiles with
another version of Triton, which is put in a folder of its own beside the environment's packages. What the tests in the
interpreter launch is noted down, and launched again through the compiler's front end in the phases after it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import launches
from set_up_peers import FOLDER

ROOT = Path(__file__).resolve().parent.parent
LINT = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "docs": ["mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"],
}
OTHER_TRITON = (
    "3.6.0"  # the oldest that every launch configuration is compiled with; the newest is the pinned one
)
OTHER_PHASE = f"aot-{OTHER_TRITON}"
PHASES = {
    "torch": "not interpret and not aot and not peers",
    "peers": "peers",
    "interpret": "interpret",
    "aot": "aot",
    OTHER_PHASE: "aot",
}
NO_TESTS = 5  # pytest's exit code when nothing was collected


class Result(NamedTuple):
    name: str
    ok: bool
    seconds: float
    counts: dict[str, int]


def run_lint(name: str, command: list[str]) -> Result:
    start = time.perf_counter()
    print(f"\n== {name}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
    return Result(name, code == 0, time.perf_counter() - start, {})


def read_counts(report: Path) -> dict[str, int]:
    """Tests passed, failed and skipped in a JUnit file; empty when pytest died before it wrote one."""
    if not report.exists():
        return {}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def workers() -> list[str]:
    """Options that spread tests over the cores where pytest-xdist is there and more than one core is."""
    cores = min(os.cpu_count() or 1, 8)
    if cores == 1 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(cores), "--dist", "worksteal"]


def other_triton() -> Path | str:
    """Folder of the second Triton, made when it is first asked for; or why there is none."""
    folder = Path(sys.prefix, f"triton-{OTHER_TRITON}")
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unfinished)]
    done = subprocess.run([*command, f"triton=={OTHER_TRITON}"], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        return f"triton {OTHER_TRITON} could not be installed: {said[-1]}"
    unfinished.rename(folder)
    return folder


def _path(folder: str) -> str:
    """PYTHONPATH with a folder at its head."""
    return os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def record() -> int:
    """Bring the tables of what every launch compiles to up to date, for both versions of Triton."""
    other, code = other_triton(), 0
    if isinstance(other, str):
        print(other)
        return 1
    for folder in ("", str(other)):
        env = os.environ | {"PYTHONPATH": _path(folder)}
        code |= subprocess.run([sys.executable, "-m", "tests.compiled"], cwd=ROOT, env=env).returncode
    return code


def run_phase(name: str, expression: str, extra: list[str]) -> Result:
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    if name == "interpret":
        env["TRITON_INTERPRET"] = "1"
    if name == "peers":
        env["PYTHONPATH"] = _path(str(FOLDER))
    print(f"\n== pytest {name}", flush=True)
    start = time.perf_counter()
    if name == OTHER_PHASE:
        folder = other_triton()
        if isinstance(folder, str):
            print(f"skipped: {folder}")
            return Result(name, True, time.perf_counter() - start, {"passed": 0, "failed": 0, "skipped": 1})
        env |= {"PYTHONPATH": _path(str(folder)), "AOT_TRITON": OTHER_TRITON}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-m", expression, f"--junitxml={report}", "--durations=8", "--durations-min=2"]
        command = [sys.executable, "-m", "pytest", *options, *([] if extra else workers()), *extra]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        counts = read_counts(report)
    # A phase without tests is a fault of the suite, unless the caller narrowed it.
    ok = code == 0 or (code == NO_TESTS and bool(extra))
    return Result(name, ok, time.perf_counter() - start, counts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["lint", *PHASES], help="one part instead of all")
    parser.add_argument("--record", action="store_true", help="bring tests/compiled up to date, and no tests")
    args, extra = parser.parse_known_args()
    if args.record:
        return record()
    results = []
    if args.only == "lint" or (args.only is None and not extra):
        results += [run_lint(name, command) for name, command in LINT.items()]
    with tempfile.TemporaryDirectory() as noted:
        if args.only is None and not extra:
            os.environ[launches.FOLDER] = noted
        results += [
            run_phase(name, expression, extra)
            for name, expression in PHASES.items()
            # A narrowed run is for a quick answer: it compiles with the other version only when asked to.
            if args.only == name or (args.only is None and not (extra and name == OTHER_PHASE))
        ]

    print("\n" + "=" * 72)
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for r in results:
        counts = ", ".join(f"{n} {k}" for k, n in r.counts.items())
        print(f"{r.name:<12} {'ok' if r.ok else 'FAILED':<7} {r.seconds:7.1f} s   {counts}")
        for k, n in r.counts.items():
            total[k] += n
    bad = [r.name for r in results if not r.ok]
    if args.only != "lint" and not sum(total.values()):
        bad.append("no test was found")
    print(f"failed: {', '.join(bad)}" if bad else "all parts ok")
    if any(r.counts for r in results):
        print(", ".join(f"{n} {k}" for k, n in total.items()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
