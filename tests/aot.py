"""Compile kernels for GPUs that are not there and read what came out: registers, spills, shared memory, SASS.

    python -m tests.aot --report                     every configuration of every family, for sm_80, sm_90, sm_100
    python -m tests.aot --report pool --arch 90      one family, one architecture
    python -m tests.aot --report -k stats --faults   by case name; only what breaks a promise

The version of Triton is the one that is imported: with a folder of another at the head of PYTHONPATH, that one.

A family is a module of ``fastres.kernels`` with an ``aot_cases()`` that yields, for every launch that can be chosen,
the fields of `Case`. The process must not have TRITON_INTERPRET set. ptxas and cuobjdump
come with Triton's wheel, so neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from fastres.kernels._aot import Case

ARCHS = (80, 90, 100)
# Shared memory that one program may have, bytes: CUDA C++ Programming Guide, table of technical specifications per
# compute capability (the maximum per thread block; one KB of each multiprocessor's is the system's).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of one multiprocessor, on all three
# Kernels on 16-bit tensors that need not load or store 16 bytes a thread, by case name, and why.
NARROW_LOADS = {r"pool_kernel.*-nchw": "a window of stride 2 is no contiguous run along the row"}
NARROW_STORES = {
    r"reduce|stats": "sums; what else a reduction stores depends on its constants, the source does not tell",
    r"fold_kernel|correction_kernel": "a weight matrix, once a layer",
}
# Kernels that may use the tensor cores by HMMA where wgmma or tcgen05 is to be had.
SMALL_DOTS = {
    r"fold_kernel|correction_kernel": "a weight matrix, once a layer, in tiles of fewer than 64 rows"
}
# Those that may move single 16-bit values.
SINGLES = {r"pool_": "gathers through windows that overlap"}


class Compiled(NamedTuple):
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    threads: int
    opcodes: Counter[str]  # opcode without suffixes -> instructions
    reads: Counter[int]  # bytes of one thread's global access -> instructions
    writes: Counter[int]
    remarks: list[str]  # C75xx: ptxas could not pipeline the wgmma instructions and serialised them
    seconds: float


def is_odd(case: Case) -> bool:
    """Whether this is the launch on sizes that are no multiples of 16, where nothing wide can be asked for."""
    return case.name.endswith("-odd")


def modules() -> list[str]:
    """Names of the modules in fastres.kernels, helpers included."""
    import fastres.kernels as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def families() -> list[str]:
    """Those that have launches to compile."""
    return [m for m in modules() if hasattr(importlib.import_module(f"fastres.kernels.{m}"), "aot_cases")]


@functools.cache
def cases(family: str) -> list[Case]:
    """What the family names, on aligned tensors and, named "-odd", on sizes that are no multiples of 16.

    A family that takes other configurations for such sizes names them itself, in ``odd_cases()``.
    """
    module = importlib.import_module(f"fastres.kernels.{family}")
    aligned = list(module.aot_cases())
    odd = []
    for case in module.odd_cases() if hasattr(module, "odd_cases") else aligned:
        pointers = [n for n in case.aligned if case.signature[n].startswith("*")]
        if pointers != case.aligned:
            odd.append(case._replace(name=f"{case.name}-odd", aligned=pointers))
    return aligned + odd


def work(names: list[str], archs: Sequence[int] = ARCHS) -> Iterator[tuple[str, int, int]]:
    """(family, index of the case, architecture) of everything to compile; odd sizes for sm_90 only."""
    for family in names:
        for i, case in enumerate(cases(family)):
            for arch in archs:
                if arch == 90 or not is_odd(case):
                    yield family, i, arch


def build(case: Case, arch: int) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said. Nothing is left in Triton's cache, and nothing is taken from it."""
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in case.aligned and n not in case.constants
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=dict(case.constants), attrs=attributes)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(said),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    return kernel, said.getvalue()


def disassemble(cubin: bytes) -> list[str]:
    """The instructions, without addresses. (``asm['sass']`` of Triton stops after 4096 of them.)"""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [found.group(1) for found in re.finditer(r"^\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", text, re.MULTILINE)]


def mnemonic(instruction: str) -> list[str]:
    """Opcode and suffixes without the predicate: '@!P0 LDG.E.128 R4, [R2]' -> ['LDG', 'E', '128']."""
    words = instruction.split()
    return words[1 if words[0].startswith("@") else 0].split(".")


def access_bytes(suffixes: list[str]) -> int:
    """Bytes that one thread moves with a load or store of these suffixes; 4 where none names a size."""
    for s in suffixes:
        if s in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(s.lstrip("US")) // 8
    return 4


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"ptxas did not say {pattern!r}:\n{text}")
    return int(found.group(1))


def compile_case(case: Case, arch: int) -> Compiled:
    start = time.perf_counter()
    kernel, log = build(case, arch)
    code = [mnemonic(i) for i in disassemble(kernel.asm["cubin"])]
    if not code:
        raise ValueError(f"{case.name}: cuobjdump found no instructions")
    return Compiled(
        registers=number(r"Used (\d+) registers", log),
        spills=number(r"(\d+) bytes spill stores", log) + number(r"(\d+) bytes spill loads", log),
        shared=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 32,
        opcodes=Counter(c[0] for c in code),
        reads=Counter(access_bytes(c[1:]) for c in code if c[0] in ("LDG", "LDGSTS")),
        writes=Counter(access_bytes(c[1:]) for c in code if c[0] == "STG"),
        remarks=re.findall(r"[^\n]*\bC75\d\d\b[^\n]*", log),
        seconds=time.perf_counter() - start,
    )


def excused(case: Case, reasons: dict[str, str]) -> bool:
    return any(re.search(pattern, case.name) for pattern in reasons)


def faults(case: Case, compiled: Compiled, arch: int) -> list[str]:
    """The promises that a compiled configuration breaks; empty when it keeps all."""
    c, found = compiled, []
    if c.spills or c.opcodes["LDL"] or c.opcodes["STL"]:
        found.append(f"spills {c.spills} bytes, {c.opcodes['LDL']} LDL, {c.opcodes['STL']} STL")
    if c.shared > SHARED_LIMIT[arch]:
        found.append(f"{c.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
    if c.registers * c.threads > REGISTERS:
        found.append(f"{c.registers} registers x {c.threads} threads > {REGISTERS}: cannot launch")
    if arch >= 90 and c.opcodes["HMMA"] and not excused(case, SMALL_DOTS):
        found.append(f"{c.opcodes['HMMA']} HMMA: tensor cores without {'wgmma' if arch == 90 else 'tcgen05'}")
    found += [f"ptxas: {r.strip()}" for r in c.remarks]
    return found if is_odd(case) else found + narrow_accesses(case, compiled)


def narrow_accesses(case: Case, compiled: Compiled) -> list[str]:
    """Global accesses that waste bandwidth: 16-bit activations move in pieces of 16 bytes a thread.

    Vectors are fp32 and masks are bytes, so their accesses cannot be taken for one of a single 16-bit value.
    """
    c, found = compiled, []
    half = {n for n, t in case.signature.items() if t in ("*fp16", "*bf16")}
    stores = half & set(re.findall(r"tl\.store\(\s*(\w+)", case.kernel.src))
    widest_load, widest_store = max(c.reads, default=0), max(c.writes, default=0)
    if half and widest_load < 16 and not c.opcodes["UTMALDG"] and not excused(case, NARROW_LOADS):
        found.append(f"widest global load is {widest_load} bytes a thread, wanted 16")
    if stores and widest_store < 16 and not c.opcodes["UTMASTG"] and not excused(case, NARROW_STORES):
        found.append(f"widest global store is {widest_store} bytes a thread, wanted 16")
    if half and (c.reads[2] or c.writes[2]) and not excused(case, SINGLES):
        found.append(f"{c.reads[2]} loads and {c.writes[2]} stores of single 16-bit values")
    return found


class Row(NamedTuple):
    family: str
    arch: int
    case: str
    compiled: Compiled | None
    faults: list[str]


def _job(family: str, index: int, arch: int) -> Row:
    case = cases(family)[index]
    try:
        compiled = compile_case(case, arch)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return Row(
            family, arch, case.name, None, [f"does not compile: {type(error).__name__}: {error}"[:300]]
        )
    return Row(family, arch, case.name, compiled, faults(case, compiled, arch))


def compile_all(names: list[str], archs: list[int], match: str = "", jobs: int = 2) -> Iterator[Row]:
    """A row per configuration and architecture, in order, compiled in ``jobs`` processes."""
    yield from compile_work([w for w in work(names, archs) if match in cases(w[0])[w[1]].name], jobs)


def compile_work(todo: list[tuple[str, int, int]], jobs: int = min(os.cpu_count() or 1, 8)) -> Iterator[Row]:
    """The same for (family, index of the case, architecture)."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_job, *zip(*todo, strict=True), chunksize=4) if todo else ()


def show(row: Row) -> str:
    head = f"sm_{row.arch:<4} {row.family + '.' + row.case:<64}"
    if row.compiled is None:
        return f"{head} FAULT {row.faults[0]}"
    c = row.compiled
    widths = f"{max(c.reads, default=0):>2}/{max(c.writes, default=0):<2}"
    figures = f"{c.registers:>4} {c.spills:>5} {c.shared:>7} {sum(c.opcodes.values()):>6} {widths:>7} {c.seconds:5.2f}"
    return f"{head} {figures}" + "".join(f"\n    FAULT {f}" for f in row.faults)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", required=True, help="compile and print the table")
    parser.add_argument("family", nargs="*", help="default: all")
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHS, help="default: all; may be repeated"
    )
    parser.add_argument("-k", dest="match", default="", help="only cases whose name contains this")
    parser.add_argument("--faults", action="store_true", help="print only what breaks a promise")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    unknown = sorted(set(args.family) - set(families()))
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(families())}")

    import triton

    print(f"triton {triton.__version__}", flush=True)
    print(
        f"{'arch':<7} {'case':<64} {'regs':>4} {'spill':>5} {'shared':>7} {'instr':>6} {'ld/st B':>7} {'sec':>5}"
    )
    start, total, bad = time.perf_counter(), 0, 0
    for row in compile_all(args.family or families(), args.arch or list(ARCHS), args.match, args.jobs):
        total, bad = total + 1, bad + bool(row.faults)
        if row.faults or not args.faults:
            print(show(row), flush=True)
    print(f"{total} compiled, {bad} with faults, {time.perf_counter() - start:.0f} s")
    return 1 if bad or not total else 0


if __name__ == "__main__":
    sys.exit(main())
