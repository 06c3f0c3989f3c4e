"""Every configuration that can be chosen compiles for sm_80, sm_90 and sm_100, and keeps its promises there.

What has been compiled is kept in tables (``tests/compiled.py``); what is not in them is compiled here. AOT_TRITON names
the version of Triton that must be the imported one, where it is not the installed one.
"""

from __future__ import annotations

import importlib
import linecache
import os
from collections import Counter

import pytest

from fastres.kernels._aot import Case
from fastres.kernels._triton import HAS_TRITON, INTERPRET, tl, triton
from tests import aot
from tests import compiled as table

COMPILES = HAS_TRITON and not INTERPRET
FAMILIES = aot.families()
OTHER = os.environ.get("AOT_TRITON", "")
WORK = list(aot.work(FAMILIES)) if COMPILES else []
SAMPLE = WORK[5::24]  # compiled although the table has them

pytestmark = pytest.mark.aot

# With Triton 3.6.0 these spill 8 to 56 bytes on sm_80 or sm_100 (none does on sm_90, or with the pinned version). A
# strict expectation: one that stops to spill, or another that begins to, fails.
SPILL_3_6_0 = {
    "pool.pool_backward_kernel-fp16-nchw-16x256-sm_100",
    "pool.pool_backward_kernel-bf16-nchw-16x256-sm_100",
    "block_start.dgrad2-fp16-128x64x64-sm_100",
    "block_start.dgrad2-bf16-128x64x64-sm_100",
    "pointwise_launches.plain_p1-fp16-128x128x32-sm_100",
    "pointwise_launches.plain_p1-bf16-128x128x32-sm_100",
    "pointwise_launches.gram1-fp32-64x64x32-sm_100",
    "pointwise_launches.dz1-bf16-128x64x64-sm_100",
    "pointwise_launches.dz1-fp16-128x128x64-sm_80",
    "pointwise_launches.dz2-fp16-128x128x64-sm_80",
    "pointwise_launches.dz1-bf16-128x128x64-sm_100",
    "pointwise_launches.dz2-bf16-128x128x64-sm_100",
}


def parameters() -> list:
    """Work for the test below, by names that tell family, case and architecture."""
    found = []
    for f, i, a in WORK:
        name = f"{f}.{aot.cases(f)[i].name}-sm_{a}"
        known = OTHER == "3.6.0" and name in SPILL_3_6_0
        marks = (
            [pytest.mark.xfail(reason="spills a few bytes with Triton 3.6.0", strict=True)] if known else []
        )
        found.append(pytest.param(f, i, a, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("family", "index", "arch"), parameters())
def test_configuration(family, index, arch):
    case = aot.cases(family)[index]
    known = table.rows().get(table.key(case, arch))
    result = aot.compile_case(case, arch) if known is None else table.compiled(known)
    assert aot.faults(case, result, arch) == []


@pytest.mark.parametrize(("family", "index", "arch"), SAMPLE)
def test_the_table_tells_what_is_compiled(family, index, arch):
    case = aot.cases(family)[index]
    known = table.rows().get(table.key(case, arch))
    if known is None:
        pytest.skip("not in the table: compiled in the test above")
    now = table.row(family, case, arch, aot.compile_case(case, arch))
    same = dict.fromkeys(("family", "case"))  # two cases may be one kernel launch
    assert now | same == known | same


def test_the_table_has_every_configuration_and_no_other():
    if not table.rows():
        pytest.skip(f"no table for Triton {table.version()}: every configuration was compiled")
    wanted = {table.key(aot.cases(f)[i], a) for f, i, a in WORK}
    known = set(table.rows())
    told = f"{len(wanted - known)} missing, {len(known - wanted)} too many"
    assert wanted == known, f"{told}: run python -m tests.compiled with Triton {table.version()}"


def test_whatever_decides_the_code_decides_the_key(monkeypatch):
    case = next(c for c in aot.cases("batch_norm"))
    keys = {table.key(case, 90), table.key(case, 80)}
    keys.add(table.key(case._replace(options=dict(case.options, num_warps=16)), 90))
    keys.add(table.key(case._replace(constants=dict(case.constants, B0=8)), 90))
    keys.add(table.key(case._replace(aligned=[]), 90))
    keys.add(table.key(case._replace(signature=dict(case.signature, eps="fp64")), 90))
    monkeypatch.setattr(table, "version", lambda: "0.0.0")
    keys.add(table.key(case, 90))
    assert len(keys) == 7


def test_a_function_that_a_kernel_calls_decides_its_key():
    source = "def scale(v):\n    return v * {}\n\n\ndef k_kernel(x_ptr):\n    tl.store(x_ptr, scale(tl.load(x_ptr)))\n"
    keys = set()
    for i, factor in enumerate((2, 3)):
        path = f"/generated/{i}.py"
        text = source.format(factor)
        linecache.cache[path] = (len(text), None, text.splitlines(True), path)
        space: dict = {"tl": tl, "__name__": "generated"}
        exec(compile(text, path, "exec"), space)
        space["scale"] = triton.jit(space["scale"])
        keys.add(table.key(Case("k", triton.jit(space["k_kernel"]), {"x_ptr": "*fp32"}, {}, {}, []), 90))
    assert len(keys) == 2


def test_the_version_is_the_one_asked_for():
    assert OTHER in ("", triton.__version__)


def test_every_kernel_is_compiled():
    """A kernel is a jit function named so, in whatever module; some family must name each."""
    kernels = {
        f"{m}.{name}": value
        for m in aot.modules()
        for name, value in vars(importlib.import_module(f"fastres.kernels.{m}")).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    compiled = {id(case.kernel) for family in FAMILIES for case in aot.cases(family)}
    assert kernels and [name for name, k in kernels.items() if id(k) not in compiled] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_cases_are_unique(family):
    names = [c.name for c in aot.cases(family)]
    assert sorted(set(names)) == sorted(names)


# ------------------------------------------------------------------------------------ the harness itself must bite


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N), mask=i < N)


@triton.jit
def hungry_kernel(x_ptr, y_ptr, B: tl.constexpr):
    """Holds two tiles that cannot fit one warp's registers, each needed after the other is complete."""
    i = tl.arange(0, B)
    a = tl.load(x_ptr + i)
    b = tl.load(x_ptr + B + i)
    tl.store(y_ptr + i, a * tl.sum(b, 0) + b * tl.sum(a, 0))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * BN + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * BN + n[None, :], acc)


def copy_case(dtype: str, div16: list[str]) -> Case:
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "N": "i32"}
    return Case("copy", copy_kernel, types, {"B": 1024}, {"num_warps": 4}, div16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_wide_copy_passes_and_narrow_copy_of_16_bit_values_does_not(arch, dtype):
    good = copy_case(dtype, ["x_ptr", "y_ptr", "N"])
    compiled = aot.compile_case(good, arch)
    assert aot.faults(good, compiled, arch) == []
    assert set(compiled.reads) == set(compiled.writes) == {16}
    assert 0 < compiled.registers < 64
    assert compiled.opcodes["EXIT"] >= 1
    bad = copy_case(dtype, [])
    found = aot.faults(bad, aot.compile_case(bad, arch), arch)
    assert len(found) == 3 if dtype == "bf16" else not found


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_spills_are_seen(arch):
    case = Case(
        "hungry", hungry_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"B": 8192}, {"num_warps": 1},
        ["x_ptr", "y_ptr"],
    )  # fmt: skip
    compiled = aot.compile_case(case, arch)
    assert compiled.spills > 0 and compiled.opcodes["STL"] > 0
    assert "spills" in aot.faults(case, compiled, arch)[0]


def test_shared_memory_and_tensor_cores_are_read():
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    constants = {"BM": 128, "BN": 128, "BK": 64}
    case = Case("mm", matmul_kernel, types, constants, {"num_warps": 8, "num_stages": 3}, [*types])
    compiled = aot.compile_case(case, 90)
    assert compiled.opcodes["HGMMA"] >= 1 and compiled.opcodes["HMMA"] == 0
    assert compiled.shared == 3 * (128 * 64 + 64 * 128) * 2
    # Triton 3.6.0 has this plain product's wgmma serialised, which is then the one fault.
    assert ["C7515" in f for f in aot.faults(case, compiled, 90)] == [True] * (OTHER == "3.6.0")
    deep = case._replace(options={"num_warps": 8, "num_stages": 8})
    assert any("shared memory" in f for f in aot.faults(deep, aot.compile_case(deep, 90), 90))


def test_each_promise_has_its_fault():
    case = copy_case("bf16", [])
    kept = aot.Compiled(32, 0, 0, 128, Counter(), Counter({16: 1}), Counter({16: 1}), [], 0.0)
    assert aot.faults(case, kept, 80) == []
    remark = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    broken = {
        "spills": kept._replace(spills=8),
        "LDL": kept._replace(opcodes=Counter(LDL=1)),
        "shared": kept._replace(shared=163 * 1024 + 1),
        "cannot launch": kept._replace(registers=255, threads=512),
        "wgmma": kept._replace(opcodes=Counter(HMMA=4)),
        "C7510": kept._replace(remarks=[remark]),
        "load": kept._replace(reads=Counter({8: 1})),
        "store": kept._replace(writes=Counter({4: 3})),
        "single": kept._replace(reads=Counter({16: 1, 2: 1})),
    }
    for word, compiled in broken.items():
        (found,) = aot.faults(case, compiled, 90 if word == "wgmma" else 80)
        assert word in found
    assert aot.faults(case, broken["shared"], 90) == []  # sm_90 has more
    odd = case._replace(name="copy-odd")
    assert aot.faults(odd, broken["load"], 80) == [] and aot.faults(odd, broken["spills"], 80) != []
