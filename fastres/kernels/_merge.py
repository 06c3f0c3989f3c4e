"""The second stage of every reduction: partial results of many programs merged per channel, in a fixed order.

Sums are added; means and M2 = sum (y - mean)^2 are merged about the mean of all by (count, mean, M2), after T. F. Chan,
G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. A program
walks its partials one block after the other, so many of them are merged in two steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastres.kernels import _jit as J
from fastres.kernels._aot import Case, signature
from fastres.kernels._launch import MERGE
from fastres.kernels._tape import launch
from fastres.kernels._triton import tl, triton

__all__ = ["aot_cases", "merge_stats", "merge_sums", "workspace"]

# More partial results than _MANY are merged in two steps, _GROUP of them a program in the first.
_MANY, _GROUP = 256, 128


@triton.jit
def merged(
    pmean_ptr, pm2_ptr, start, stop, ch, ch_ok, C, TOTAL, PER_CHUNK, B0: tl.constexpr, B1: tl.constexpr
):
    """Mean and M2, [1, B1] each, of chunks start .. stop - 1 together, and the number of values they hold."""
    left = TOTAL - start.to(tl.int64) * PER_CHUNK
    values = tl.minimum(left, (stop - start).to(tl.int64) * PER_CHUNK).to(tl.float32)
    s = tl.zeros((B0, B1), tl.float32)
    first = tl.load(pmean_ptr + start.to(tl.int64) * C + ch, mask=ch_ok, other=0.0)[None, :]
    for p0 in range(start, stop, B0):
        p = p0 + tl.arange(0, B0)
        ok = (p < stop)[:, None] & ch_ok[None, :]
        n = tl.minimum(TOTAL - p.to(tl.int64) * PER_CHUNK, PER_CHUNK).to(tl.float32)[:, None]
        m = tl.load(pmean_ptr + p.to(tl.int64)[:, None] * C + ch[None, :], mask=ok, other=0.0)
        s += tl.where(ok, n * (m - first), 0.0)
    mean = first + tl.sum(s, 0)[None, :] / values
    q = tl.zeros((B0, B1), tl.float32)
    for p0 in range(start, stop, B0):
        p = p0 + tl.arange(0, B0)
        ok = (p < stop)[:, None] & ch_ok[None, :]
        n = tl.minimum(TOTAL - p.to(tl.int64) * PER_CHUNK, PER_CHUNK).to(tl.float32)[:, None]
        d = tl.load(pmean_ptr + p.to(tl.int64)[:, None] * C + ch[None, :], mask=ok, other=0.0) - mean
        m2 = tl.load(pm2_ptr + p.to(tl.int64)[:, None] * C + ch[None, :], mask=ok, other=0.0)
        q += tl.where(ok, m2 + n * d * d, 0.0)
    return mean, tl.sum(q, 0)[None, :], values


@triton.jit
def group_stats_kernel(
    pmean_ptr,
    pm2_ptr,
    mean_ptr,
    m2_ptr,
    PARTS,
    C,
    TOTAL,
    PER_CHUNK,
    GROUP,
    B0: tl.constexpr,
    B1: tl.constexpr,
):
    """Program (j, k): merge GROUP chunks of B1 channels into row k of another workspace of means and M2."""
    ch = tl.program_id(0) * B1 + tl.arange(0, B1)
    ch_ok = ch < C
    start = tl.program_id(1) * GROUP
    stop = tl.minimum(start + GROUP, PARTS)
    mean, m2, values = merged(pmean_ptr, pm2_ptr, start, stop, ch, ch_ok, C, TOTAL, PER_CHUNK, B0, B1)
    at = tl.program_id(1) * C + ch[None, :]
    tl.store(mean_ptr + at, mean, mask=ch_ok[None, :])
    tl.store(m2_ptr + at, m2, mask=ch_ok[None, :])


@triton.jit
def merge_stats_kernel(
    pmean_ptr, pm2_ptr, mean_ptr, var_ptr, rmean_ptr, rvar_ptr, batches_ptr, PARTS, C, TOTAL, PER_CHUNK, unbias,
    momentum, RUNNING: tl.constexpr, COUNT: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of B1 channels into mean and biased variance; update the running statistics and their count."""
    ch = tl.program_id(0) * B1 + tl.arange(0, B1)
    ch_ok = ch < C
    start = tl.program_id(1)  # 0: there is one program along this axis
    stop = start + PARTS
    mean, m2, values = merged(pmean_ptr, pm2_ptr, start, stop, ch, ch_ok, C, TOTAL, PER_CHUNK, B0, B1)
    var = m2 / values
    tl.store(mean_ptr + ch[None, :], mean, mask=ch_ok[None, :])
    tl.store(var_ptr + ch[None, :], var, mask=ch_ok[None, :])
    if COUNT:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    if RUNNING:
        old = tl.load(rmean_ptr + ch[None, :], mask=ch_ok[None, :]).to(tl.float32)
        new = (1 - momentum) * old + momentum * mean  # exact for a momentum of one
        tl.store(rmean_ptr + ch[None, :], J.round_to(new, rmean_ptr.dtype.element_ty), mask=ch_ok[None, :])
        old = tl.load(rvar_ptr + ch[None, :], mask=ch_ok[None, :]).to(tl.float32)
        new = (1 - momentum) * old + momentum * (var * unbias)
        tl.store(rvar_ptr + ch[None, :], J.round_to(new, rvar_ptr.dtype.element_ty), mask=ch_ok[None, :])


@triton.jit
def merge_sums_kernel(part_ptr, sum_ptr, PARTS, C, GROUP, B0: tl.constexpr, B1: tl.constexpr):
    """Program (j, k, s): column sums over rows s GROUP .. of partial workspace k, [PARTS, C] each, to row s of the
    k-th result."""
    ch = tl.program_id(0) * B1 + tl.arange(0, B1)
    ch_ok = ch < C
    base = part_ptr + tl.program_id(1).to(tl.int64) * PARTS * C
    start = tl.program_id(2) * GROUP
    stop = tl.minimum(start + GROUP, PARTS)
    s = tl.zeros((B0, B1), tl.float32)
    for p0 in range(start, stop, B0):
        p = p0 + tl.arange(0, B0)
        ok = (p < stop)[:, None] & ch_ok[None, :]
        s += tl.load(base + p.to(tl.int64)[:, None] * C + ch[None, :], mask=ok, other=0.0)
    row = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(sum_ptr + row.to(tl.int64) * C + ch, tl.sum(s, 0), mask=ch_ok)


def workspace(parts: int, rows: int, c: int, device: torch.device) -> Tensor:
    """``rows`` fp32 partials of ``c`` channels for each of ``parts`` programs."""
    return torch.empty(rows, parts, c, dtype=torch.float32, device=device)


def merge_sums(partial: Tensor) -> tuple[Tensor, ...]:
    """Second stage of a reduction: [K, parts, C] partials to K vectors [C], in a fixed order; in two steps where there
    are many parts, for a program walks its parts one after the other."""
    k, parts, c = partial.shape
    if parts > _MANY:
        rows = -(-parts // _GROUP)
        out = partial.new_empty(k, rows, c)
        _sum_rows(partial, out, k, rows, parts, c, _GROUP)
        partial, parts = out, rows
    sums = partial.new_empty(k, c)
    _sum_rows(partial, sums, k, 1, parts, c, parts)
    return (sums.view(c),) if k == 1 else sums.unbind(0)


def _sum_rows(partial: Tensor, out: Tensor, k: int, rows: int, parts: int, c: int, group: int) -> None:
    launch(merge_sums_kernel, (-(-c // MERGE.b1), k, rows))(
        partial, out, parts, c, group, B0=MERGE.b0, B1=MERGE.b1, num_warps=MERGE.warps
    )


def merge_stats(
    pmean: Tensor, pm2: Tensor, total: int, per_chunk: int, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Second stage of the statistics: means and M2, [parts, C] each, of chunks of ``per_chunk`` values (the last one
    what is left of ``total``) to mean and variance [C]; updates the running statistics, and
    counts the batch in the scalar ``batches``, where given."""
    parts, c = pmean.shape
    if parts > _MANY:
        rows = -(-parts // _GROUP)
        means, m2 = pmean.new_empty(rows, c), pmean.new_empty(rows, c)
        launch(group_stats_kernel, (-(-c // MERGE.b1), rows))(
            pmean, pm2, means, m2, parts, c, total, per_chunk, _GROUP,
            B0=MERGE.b0, B1=MERGE.b1, num_warps=MERGE.warps,
        )  # fmt: skip
        pmean, pm2, parts, per_chunk = means, m2, rows, per_chunk * _GROUP
    mean, var = pmean.new_empty(c), pmean.new_empty(c)
    launch(merge_stats_kernel, (-(-c // MERGE.b1), 1))(
        pmean, pm2, mean, var, running_mean, running_var, batches, parts, c, total, per_chunk,
        total / max(total - 1, 1), momentum,
        RUNNING=running_mean is not None, COUNT=batches is not None, B0=MERGE.b0, B1=MERGE.b1, num_warps=MERGE.warps,
    )  # fmt: skip
    return mean, var


def aot_cases() -> Iterator[Case]:
    """Every launch that can be chosen."""
    merge = dict(B0=MERGE.b0, B1=MERGE.b1)
    for kernel, flags in (
        (merge_stats_kernel, dict(merge, RUNNING=True, COUNT=True)),
        (group_stats_kernel, merge),
        (merge_sums_kernel, merge),
    ):
        yield Case(
            kernel.__name__, kernel, signature(kernel, "fp32", {"batches_ptr": "*i64"}), flags,
            dict(num_warps=MERGE.warps), ["C"],
        )  # fmt: skip
