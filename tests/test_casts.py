"""Weights cast in one launch under autocast: the same numbers, fewer casts, and nothing left over."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import _casts
from fastres import functional as fn

LAST = torch.channels_last


class _Casts(TorchDispatchMode):
    """Counts the launches that cast weights: 4-d float32 to bfloat16, alone or many at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.alone, self.together = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "_to_copy" and args[0].dim() == 4 and args[0].dtype == torch.float32:
            self.alone += args[0].data_ptr() in self.weights
        self.together += name == "_foreach_copy_"
        return out


def net(depth: int = 50, **options: Any) -> nn.Module:
    torch.manual_seed(4)
    options = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,)) | options
    return fastres.ResNet(depth, base_channels=8, stem_channels=8, **options).to(memory_format=LAST)


def image() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(2, 3, 16, 16).contiguous(memory_format=LAST)


def run(model: nn.Module, x: Tensor, mode: str = "reference") -> Tensor:
    with fn.backend(mode), fn.moments("on"), torch.autocast("cpu", torch.bfloat16):
        return model(x)[-1]


def step(model: nn.Module, x: Tensor, mode: str = "reference") -> list[Tensor]:
    model.zero_grad()
    out = run(model, x, mode)
    with fn.backend(mode), fn.moments("on"):  # for checkpointed blocks
        out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_same_step_with_casts_made_before(depth, memory):
    with fn.memory(memory):
        model, x = net(depth), image()
        state = copy.deepcopy(model.state_dict())
        first, second = _Casts(model), _Casts(model)
        with first:
            alone = step(model, x)
        model.load_state_dict(state)
        with second:
            together = step(model, x)
    assert first.alone > 7 and first.together == 0
    assert second.alone == 0 and second.together == 1
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_weights_that_change_are_cast_anew():
    model, x = net(18), image()
    for _ in range(3):
        step(model, x)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    fresh = net(18)
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(step(model, x), step(fresh, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_replaced_frozen_and_hooked_weights():
    model, x = net(18), image()
    step(model, x)
    conv = model.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 2)
    model.layer2[0].conv1.weight.requires_grad_(False)
    calls: list[int] = []
    model.layer2[1].conv1.register_forward_hook(lambda *a: calls.append(1))
    model.zero_grad()
    with _Casts(model) as counted:
        run(model, x).float().sum().backward()
    assert calls and conv.weight.grad is not None and model.layer2[0].conv1.weight.grad is None
    # The replaced weight is new to the network, the hooked convolution casts its own.
    assert counted.together == 1 and 1 <= counted.alone <= 2
    with _Casts(model) as counted:
        run(model, x)
    assert counted.together == 1 and counted.alone <= 1


def test_gradients_arrive_layer_by_layer():
    """Not all at the end: the buckets of DistributedDataParallel are sent while backward goes on."""
    model, x = net(18), image()
    step(model, x)
    order: list[str] = []
    for name, p in model.named_parameters():
        if p.dim() == 4:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for module in (model.layer1[0], model.layer2[1]):
        module.register_full_backward_hook(lambda m, *_: order.append(type(m).__name__))
    step(model, x)
    assert order.index("layer2.1.conv2.weight") < order.index("layer1.0.conv1.weight")
    assert order.index("BasicBlock") < order.index("layer1.0.conv1.weight")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_network(reentrant):
    model, x = net(18), image()
    plain = [step(model, x) for _ in range(2)][1]
    model = net(18)
    for _ in range(2):
        model.zero_grad()
        given = x.detach().requires_grad_()
        out = checkpoint(run, model, given, use_reentrant=reentrant)
        out.float().square().sum().backward()
        for p in model.parameters():
            assert p.grad is not None
    grads = [p.grad for p in model.parameters()]
    for a, b in zip(plain[1:], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpointed_blocks():
    plain, model, x = net(), net(with_cp=True), image()
    for _ in range(2):
        for a, b in zip(step(plain, x), step(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_only_where_it_is_of_use():
    model, x = net(18), image()
    step(model, x)
    with _Casts(model) as counted:
        step(model, x, "aten")
        with torch.no_grad():
            run(model.eval(), x)
        model.train()
        with fn.backend("reference"):
            model(x)
    assert counted.together == 0


def test_nothing_outside_a_forward_and_nothing_in_the_module():
    model, x = net(18), image()
    step(model, x)
    step(model, x)
    assert _casts._now.made is None and _casts._now.asked is None
    assert not any("cast" in key for m in model.modules() for key in vars(m))
    pickle.loads(pickle.dumps(copy.deepcopy(model)))
    kept = len(_casts._wanted)
    del model
    gc.collect()
    assert len(_casts._wanted) < kept


def test_a_failed_forward_leaves_nothing_in_force():
    model, x = net(18), image()
    step(model, x)
    model.layer2[0].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, x)
    assert _casts._now.made is None
