"""Every operator of the package, with the arguments that networks call it with, against torch.library.opcheck.

``tests/test_ops.py`` checks the operators of batch norm, block end and pooling with arguments written by hand; here all
operators' arguments come from steps of small networks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import functional as fn
from fastres import selfcheck

LAST = torch.channels_last


class _Calls(TorchDispatchMode):
    """The arguments of a first call of every operator, and of a first one with other optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, tuple[bool, ...]], tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastres":
            name = func.__name__.split(".")[0]
            key = name, tuple(a is None for a in args)
            if key not in self.found:
                copies = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
                self.found[key] = func, copies
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict[tuple[str, tuple[bool, ...]], tuple[Any, tuple[Any, ...]]]:
    seen = _Calls()
    device = torch.device("cpu")
    with seen, fn.backend("reference"), fn.moments("on"):
        for case in selfcheck.cases(device, small=True):
            for layout in (torch.contiguous_format, LAST):
                tensors = selfcheck.leaves(case, torch.float32, layout)
                out = case.run(tensors)
                leaves = [t for t in tensors.values() if t.requires_grad]
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        for mode in ("cudnn", "triton"):
            layer = fastres.ResLayer(fastres.Bottleneck, 2, 8, 16, stride=2).to(memory_format=LAST)
            x = torch.randn(3, 8, 12, 11).contiguous(memory_format=LAST).requires_grad_()
            with fn.conv3x3(mode):
                layer(x).sum().backward()
                with torch.no_grad():
                    layer.eval()(x)
        layer = fastres.ResLayer(fastres.BasicBlock, 1, 8, 16, stride=2).to(memory_format=LAST)
        layer(torch.randn(3, 8, 8, 7).contiguous(memory_format=LAST).requires_grad_()).sum().backward()
    with seen, fn.winograd("on"):
        layer = fastres.ResLayer(fastres.BasicBlock, 1, 8, 8).to(memory_format=LAST)
        layer(torch.randn(2, 8, 6, 6).contiguous(memory_format=LAST)).sum().backward()
    return seen.found


def names() -> set[str]:
    return {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastres::")}


def test_networks_call_every_operator(calls) -> None:
    # cuDNN's place is taken by PyTorch's convolution on the CPU's reference route; tests/test_inference.py has it. And
    # the compiled loops are not built here; tests/test_native.py has them.
    assert names() - {name for name, _ in calls} <= {"folded_conv", "winograd_loops", "conv_weight_gradient"}


@pytest.mark.parametrize("name", sorted(names()))
def test_opcheck(name: str, calls) -> None:
    mine = [call for (n, _), call in calls.items() if n == name]
    for func, args in mine:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
