"""What every launch configuration compiled to, kept in ``tests/compiled/<Triton version>.csv``.

Compiling all of them takes a quarter of an hour on two cores, and gives the same result each time: the compiler's
output follows from the kernel's source and those of all it calls, the types, constants and options, the architecture,
and the version of Triton, whose wheel holds ptxas. A row is found by a hash of all these, so a configuration that has
changed has no row: the tests compile it, and fail until the table has it. They compile some of the others too, and
compare. With a version of Triton that has no table they compile everything.

    python -m tests.compiled          compile what has no row, drop rows of what is no more, for the imported Triton
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastres.kernels._aot import Case
from tests import aot
from tests.aot import Compiled

FOLDER = Path(__file__).with_suffix("")
COLUMNS = tuple(
    "family case sm key registers spills shared threads instructions opcodes reads writes remarks".split()
)
OPCODES = ("LDL", "STL", "HMMA", "HGMMA", "UTMALDG", "UTMASTG")  # those that a promise is about


def version() -> str:
    import triton

    return str(triton.__version__)


@functools.cache
def sources(kernel: Any) -> tuple[str, ...]:
    """The source of a kernel, of every device function that it calls, and the values of the globals that they use.

    Triton's own identity of a kernel also counts the line it stands on, and was seen to change with what else a process
    had compiled. Triton's own functions go with its version.
    """
    found: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        name = f"{function.__module__}.{function.__name__}"
        if name in found:
            continue
        found[name] = f"{name}: {function.src}"
        for node in ast.walk(ast.parse(function.src)):
            value = None
            if isinstance(node, ast.Name):
                value = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(function.__globals__.get(node.value.id), node.attr, None)
            if hasattr(value, "src") and not value.__module__.startswith("triton"):  # another device function
                todo.append(value)
            elif isinstance(value, int | float | str) or type(value).__name__ == "constexpr":
                found[f"{name} {ast.unparse(node)}"] = f"{name} {ast.unparse(node)} = {value}"
    return tuple(found[k] for k in sorted(found))


def key(case: Case, arch: int) -> str:
    """A hash of all that decides what this configuration compiles to."""
    parts = [
        sources(case.kernel), case.signature, case.constants, case.options, case.aligned, arch, version()
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _counts(counter: Counter) -> str:
    return " ".join(f"{k}:{n}" for k, n in sorted(counter.items()) if n)


def _counter(text: str, kind: type) -> Counter:
    return Counter({kind(k): int(n) for k, n in (word.split(":") for word in text.split())})


def row(family: str, case: Case, arch: int, c: Compiled) -> dict[str, str]:
    """One line of the table."""
    kept = Counter({name: c.opcodes[name] for name in OPCODES})
    values = (
        family, case.name, arch, key(case, arch), c.registers, c.spills, c.shared, c.threads, sum(c.opcodes.values()),
        _counts(kept), _counts(c.reads), _counts(c.writes), "|".join(c.remarks),
    )  # fmt: skip
    return dict(zip(COLUMNS, map(str, values), strict=True))


def compiled(line: dict[str, str]) -> Compiled:
    """What of it the promises are about."""
    numbers = (int(line[name]) for name in ("registers", "spills", "shared", "threads"))
    remarks = line["remarks"].split("|") if line["remarks"] else []
    reads, writes = (_counter(line[name], int) for name in ("reads", "writes"))
    return Compiled(*numbers, _counter(line["opcodes"], str), reads, writes, remarks, 0.0)


@functools.cache
def rows() -> dict[str, dict[str, str]]:
    """The table of the imported Triton, by key; empty without one."""
    path = FOLDER / f"{version()}.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {line["key"]: line for line in csv.DictReader(file)}


def write(lines: Iterable[dict[str, str]]) -> None:
    """The whole table, in order."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{version()}.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(lines, key=lambda r: (r["family"], r["case"], int(r["sm"]))))


def main() -> int:
    known, kept, todo = rows(), {}, {}
    for family, index, arch in aot.work(aot.families()):
        case = aot.cases(family)[index]
        k = key(case, arch)
        if k in known:
            kept[k] = dict(known[k], family=family, case=case.name)
        else:
            todo.setdefault(k, (family, index, arch))
    print(
        f"Triton {version()}: {len(kept)} known, {len(known) - len(kept)} dropped, {len(todo)} to compile",
        flush=True,
    )
    failed = 0
    for done, r in enumerate(aot.compile_work(list(todo.values())), 1):
        if r.compiled is None:
            failed += 1
            print(f"sm_{r.arch} {r.family}.{r.case}: {r.faults[0]}")
            continue
        (case,) = [c for c in aot.cases(r.family) if c.name == r.case]
        line = row(r.family, case, r.arch, r.compiled)
        kept[line["key"]] = line
        if done % 100 == 0:
            print(f"{done} compiled", flush=True)
            write(kept.values())  # an interrupted run goes on here
    write(kept.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
