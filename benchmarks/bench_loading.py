"""A training step fed by the data loader, beside the loader alone and the step alone: never mixed with compute-only."""

from __future__ import annotations

from argparse import Namespace

from benchmarks import loading
from fastres._timing import synchronize


def bench_loading(benchmark, device, rounds, size, writer, batch, dtype, network):
    args = Namespace(
        model=network, batch=batch, size=size, dtype=dtype, workers=loading.WORKERS, steps=rounds
    )
    rows = list(loading.measure(args, device))
    for row in rows if writer is not None else []:
        writer.row(suite="loading", **row)
    step, batches = loading.stepper("FusedBN", args, device), loading.batches(args, rounds + 2, device)

    def fed() -> None:
        step(*next(batches))
        synchronize(device)

    benchmark.group = f"loading {dtype} batch {batch}"
    benchmark.pedantic(fed, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info.update({f"{r['alternative']} {r['mode']}": r["median_s"] for r in rows})
