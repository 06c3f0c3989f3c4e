"""A training step and an inference pass of every network at full size, of ResNet-18 and ResNet-50 at a small one."""

from __future__ import annotations

import pytest

from benchmarks.cases import net_case


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
def bench_network(compare, size, batch, dtype, network, train):
    compare(net_case(network, batch, size), train, dtype)
