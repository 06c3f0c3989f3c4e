"""Blocks of a ResNet, forward and backward and forward alone."""

from __future__ import annotations

import pytest

from benchmarks.cases import blocks

NAMES = [c.name for c in blocks(1)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def bench_block(compare, full, batch, dtype, index, train):
    compare(blocks(batch, 1 if full else 2)[index], train, dtype)
