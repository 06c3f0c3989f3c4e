"""A training step and an inference pass of ResNet-18 and ResNet-50."""

from __future__ import annotations

import pytest

from benchmarks.cases import net_case


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def bench_network(compare, full, request, name, train):
    batch = request.config.getoption("--bench-batch") or (32 if full else 2)
    compare(net_case(name, batch, 224 if full else 64), train)
