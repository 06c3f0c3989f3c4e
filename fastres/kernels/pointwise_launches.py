"""The launches of the moment form's kernels, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastres.kernels import _pointwise as fwd
from fastres.kernels import _pointwise_backward as bwd
from fastres.kernels._aot import STORAGE, Case, signature
from fastres.kernels._launch import MERGE
from fastres.kernels._pointwise_plan import FOLD, GEMM

__all__ = ["aot_cases", "odd_cases"]


def _products(storage: str, which: int) -> Iterator[Case]:
    """The four products with their heaviest options: forward with a pending norm, and the downsample's strided form;
    and in backward of ``downsample_end`` with a strided input alone."""
    small, half = storage != "fp32", f"*{storage}"
    matrices = ("wf_ptr", "b_ptr", "x2_ptr", "w2_ptr", "w_ptr", "wf2_ptr", "b2_ptr", "dx2_ptr")
    types = {"bits_ptr": "*u8", **dict.fromkeys(matrices, half)}
    act = dict(ACT=True, AFFINE=True, PREC="tf32")
    plain = dict(act, ACT=False)
    for name, kernel, sizes, *variants in (
        ("gram", fwd.gram_kernel, ("BC", "BC", "BM"), dict(act, STRIDE=1, PREC="tf32x3"),
         dict(plain, STRIDE=2, PREC="tf32x3")),
        ("end", fwd.pointwise_end_kernel, ("BM", "BN", "BK"),
         dict(act, IDENTITY=True, PAIR=False, STRIDE2=1, KEEP=True, BITS=True),
         dict(act, IDENTITY=False, PAIR=True, STRIDE2=2, KEEP=True, BITS=True)),
        ("p", bwd.p_kernel, ("BN", "BC", "BM"),
         dict(act, ANCHOR=True, MASK=True, KEEP=True, PAIR=False, STRIDE2=1),
         dict(act, ANCHOR=True, MASK=True, KEEP=True, PAIR=True, STRIDE2=2)),
        ("plain_p", bwd.p_kernel, ("BN", "BC", "BM"),
         dict(plain, ANCHOR=True, MASK=False, KEEP=False, PAIR=False, STRIDE2=2)),
        ("dz", bwd.dz_kernel, ("BM", "BC", "BK"),
         dict(act, BATCH=True, KEEP=True, PAIR=False, BATCH2=False, STRIDE2=1),
         dict(act, BATCH=True, KEEP=True, PAIR=True, BATCH2=True, STRIDE2=2),
         dict(plain, BATCH=True, KEEP=False, PAIR=False, BATCH2=False, STRIDE2=2)),
    ):  # fmt: skip
        if which >= len(GEMM[name][small]):
            continue
        t = GEMM[name][small][which]
        for i, flags in enumerate(variants):
            yield Case(
                f"{name}{i + 1}-{storage}-{t.m}x{t.n}x{t.k}{'-8' if which == 3 else ''}", kernel,
                signature(kernel, storage, types),
                dict(flags, **dict(zip(sizes, t[:3], strict=True))), dict(num_warps=t.warps, num_stages=t.stages),
                _aligned(kernel),
            )  # fmt: skip


def _small(storage: str) -> Iterator[Case]:
    """The matrices between the products; the weight itself is fp32, as under autocast."""
    types = {"wf_ptr": f"*{storage}", "b_ptr": f"*{storage}", "w_ptr": "*fp32", "batches_ptr": "*i64"}
    size, wide = dict(BN=FOLD.m, BC=FOLD.n), dict(BN=FOLD.k, BC=FOLD.n)
    for k, flags in (
        (fwd.fold_kernel, dict(size, AFFINE=True, BATCH=True, RUNNING=True, COUNT=True)),
        (bwd.weight_kernel, dict(size, AFFINE=True, BATCH=True)),
        (bwd.correction_kernel, wide),
        (fwd.cov_kernel, dict(GC=128, BP=MERGE.b0, BC=MERGE.b1)),
    ):
        yield Case(
            f"{k.__name__}-{storage}", k, signature(k, "fp32", types), flags,
            dict(num_warps=MERGE.warps if k is fwd.cov_kernel else FOLD.warps), _aligned(k)
        )  # fmt: skip


def _aligned(kernel: Any) -> list[str]:
    return [a for a in kernel.arg_names if a.endswith("_ptr") or a in ("N", "C", "C2", "WIDTH")]


def aot_cases() -> Iterator[Case]:
    """Every launch on sizes that are multiples of 16."""
    for storage in STORAGE:
        for which in (0, 1, 3) if storage != "fp32" else (0,):
            yield from _products(storage, which)
        yield from _small(storage)


def odd_cases() -> Iterator[Case]:
    """Every launch on other sizes."""
    for storage in STORAGE:
        yield from _products(storage, 2)
        yield from _small(storage)
