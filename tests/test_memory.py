"""What a training step keeps for backward, counted on fake tensors: no memory is taken, no value is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastres
from fastres import functional as fn

LAST = torch.channels_last


def kept(
    norm: str, backend: str, moments: str, memory: str = "save", batch: int = 256, pixels: int = 224
) -> int:
    """Bytes of activations, masks and matrices that a ResNet-50's forward saves; parameters and vectors left out."""
    net = fastres.ResNet(50, norm_cfg=dict(type=norm), init_cfg=[]).bfloat16().to(memory_format=LAST)
    weights = {tuple(p.shape) for p in net.parameters()}
    found: dict[object, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if tuple(t.shape) not in weights and t.dim() > 1:
            found[storage._cdata] = storage.nbytes()
            alive.append(t)  # a storage that dies could give its key to another
        return t

    alive: list[Tensor] = []
    unpack: Callable[[Tensor], Tensor] = lambda t: t  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(batch, 3, pixels, pixels, dtype=torch.bfloat16).contiguous(memory_format=LAST)
        with fn.backend(backend), fn.moments(moments), fn.memory(memory):
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                net(x)
    return sum(found.values())


@pytest.fixture(scope="module")
def eager() -> int:
    return kept("BN", "aten", "off")


def test_eager_is_counted_right(eager: int) -> None:
    """Eager keeps each convolution's input and output once: 11.1 GB at batch 256 by the layer table."""
    assert 10.5e9 < eager < 11.8e9


def test_moment_form_keeps_at_most_0_6_of_eager(eager: int) -> None:
    assert kept("FusedBN", "reference", "on") <= 0.6 * eager


def test_recomputing_keeps_half_of_eager(eager: int) -> None:
    saved = kept("FusedBN", "reference", "on")
    assert kept("FusedBN", "reference", "on", "recompute") <= min(0.5 * eager, saved - 0.9e9)


def test_fused_norms_keep_no_more_than_eager(eager: int) -> None:
    assert kept("FusedBN", "reference", "off") <= eager


def test_aten_keeps_what_eager_keeps(eager: int) -> None:
    assert kept("FusedBN", "aten", "off") <= eager * 1.001
