"""Blocks of a ResNet, forward and backward and forward alone."""

from __future__ import annotations

import pytest

from benchmarks.cases import blocks

COUNT = 4


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("index", range(COUNT))
def bench_block(compare, full, request, index, train):
    batch = request.config.getoption("--bench-batch") or (32 if full else 4)
    compare(blocks(batch, 1 if full else 2)[index], train)
