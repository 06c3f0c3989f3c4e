"""Operators called without the dispatcher where nothing but it would see them: the same bits, and nobody misses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import functional as fn
from fastres.kernels import batch_norm
from fastres.kernels._library import NAMESPACE

LAST = torch.channels_last


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the dispatcher's way into the operators of batch norm raises."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("dispatched")

    with monkeypatch.context() as patch:
        for name in ("batch_norm_stats", "batch_norm_act", "batch_norm_reduce", "batch_norm_backward"):
            patch.setattr(getattr(batch_norm, name), "op", refuse)
        yield


def step(block: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with fn.backend("triton"):
        out = block(x)
        grads = torch.autograd.grad(out, [x, *block.parameters()], dy)
    return [out, *grads, *(b.clone() for b in block.buffers())]


def bottleneck() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    block = fastres.ResLayer(fastres.Bottleneck, 1, 16, 32, stride=2)[0].to(memory_format=LAST)
    return (
        block,
        torch.randn(2, 16, 6, 6).contiguous(memory_format=LAST),
        torch.randn(2, 32, 3, 3).contiguous(memory_format=LAST),
    )


@pytest.mark.interpret
def test_same_bits_with_and_without_the_dispatcher():
    block, x, dy = bottleneck()
    plain = step(block, x, dy)
    block, x, dy = bottleneck()
    with _Seen() as seen:
        watched = step(block, x, dy)
    assert len(seen.names) > 8
    for a, b in zip(plain, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.interpret
def test_the_dispatcher_is_left_out_of_a_step_and_is_there_for_whoever_watches(monkeypatch):
    norm = fastres.FusedBatchNorm2d(8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=LAST)
    with forbidden(monkeypatch):
        step(norm, x, torch.randn_like(x))
        with pytest.raises(AssertionError, match="dispatched"), _Seen():
            step(norm, x, torch.randn_like(x))
        with pytest.raises(AssertionError, match="dispatched"), torch.autograd.profiler.profile():
            step(norm, x, torch.randn_like(x))
        with pytest.raises(AssertionError, match="dispatched"), torch.device("cpu"):  # a function mode
            step(norm, x, torch.randn_like(x))


@pytest.mark.interpret
def test_gradients_and_strided_vectors_go_through_it():
    y = torch.randn(2, 8, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    mean, var = torch.zeros(8), torch.rand(16)[::2] + 0.5
    args = (mean, var, None, None, 1e-5, False, False, None, None)
    z = batch_norm.batch_norm_act(y, *args)
    (dy,) = torch.autograd.grad(z, y, torch.ones_like(z))
    rstd = torch.rsqrt(var + 1e-5).view(1, -1, 1, 1)
    torch.testing.assert_close(z, y * rstd)
    torch.testing.assert_close(dy, rstd.expand_as(y), check_stride=False)
    running = torch.zeros(16)[::2], torch.ones(16)[::2]
    mean, var = batch_norm.batch_norm_stats(y.detach(), *running, 1.0)
    torch.testing.assert_close(running[0], mean)
    assert running[1].mean() != 1


class _Sub(Tensor):
    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.interpret
def test_a_subclass_sees_the_operator():
    y = torch.randn(2, 8, 4, 4).as_subclass(_Sub)
    batch_norm.batch_norm_stats(y, None, None, 0.0)
    assert any("batch_norm_stats" in name for name in _Sub.seen)
