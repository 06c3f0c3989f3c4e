"""Whether anything may be folded now, and what is known of a network's values while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from fastres._routing import decide_folded, get_folding, record

__all__ = ["fake", "finite", "images", "inference_layout", "keeps_finite", "off", "plain_tensor", "unseen"]

LAST = torch.channels_last
# Any activation in channels_last.
_LAST_LIKE = torch.empty(1, 2, 2, 2, device="cpu").contiguous(memory_format=LAST)


class _Forward(threading.local):
    """Of the forward of a network in this thread: whether its images, and all weights so far, are finite."""

    finite: bool = False


_now = _Forward()


# Modules of torch whose results are finite where their inputs are; weights, if any, are looked at when they are folded.
_FINITE = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Sequential)


def _modules(net: nn.Module) -> list[nn.Module]:
    """All of a network's modules, in any order, some perhaps twice; ``modules()`` takes three times as long."""
    found = [net]
    for m in found:
        found += [child for child in m._modules.values() if child is not None]
    return found


def keeps_finite(net: nn.Module) -> bool:
    """Whether a network consists of such modules and this package's, with every norm on running statistics: no weight
    is used unseen, and nobody else's code or hook runs in between."""
    for m in _modules(net):
        if type(m) not in _FINITE and not type(m).__module__.startswith("fastres."):
            return False
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            return False
        if m._forward_hooks or m._forward_pre_hooks:
            return False
    return True


@contextmanager
def images(net: nn.Module, x: Tensor, keeps: bool | None = None) -> Iterator[bool]:
    """Around the forward of a network of images ``x`` [N, C, H, W]. On a CPU, where the images are finite and the
    network keeps them so, every ReLU may be fused, although oneDNN's turns NaN into 0: none can arise, unless values
    overflow. Checking costs one sum of the images and, unless ``keeps`` says what it would find, a walk over the
    modules. Gives what :func:`finite` will say."""
    before = _now.finite
    if off() or torch.is_grad_enabled() or x.device.type != "cpu" or not plain_tensor(x) or fake(x):
        yield False
        return
    fused = decide_folded("conv_bn", _LAST_LIKE.to(x.dtype), (), False)[0] == "onednn"
    if keeps is None:
        keeps = fused and keeps_finite(net)
    _now.finite = fused and keeps and isfinite(x.sum())
    try:
        yield _now.finite
    finally:
        _now.finite = before


def finite() -> bool:
    """Whether the images of the network that runs in this thread, and all weights so far, are finite."""
    return _now.finite


def unseen() -> None:
    """A weight is used that nobody has looked at."""
    if not torch.compiler.is_compiling():
        _now.finite = False


def off() -> bool:
    """Whether no norm may be folded now: switched off, or somebody records or differentiates the operators."""
    return (
        torch.compiler.is_compiling()  # the compiler sees the norm and folds or fuses it itself
        or get_folding() == "off"
        or torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def fake(x: Tensor) -> bool:
    if type(x) in (Tensor, nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor  # slow to import, and loaded already where x is one

    return isinstance(x, FakeTensor)


def plain_tensor(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) or fake(x)


def inference_layout(x: Tensor) -> Tensor:
    """The images of a network in the layout that inference on them is fastest in: x itself, or a channels_last copy.

    Only where no gradient is wanted and oneDNN's fused convolutions will run. The network gives its results back in
    the layout that the images came in.
    """
    if off() or torch.is_grad_enabled() or x.device.type != "cpu" or x.is_contiguous(memory_format=LAST):
        return x
    if decide_folded("conv_bn", _LAST_LIKE.to(x.dtype), (), False)[0] != "onednn":
        return x
    record(
        "layout", x, "channels_last", "NCHW images: runs in channels_last, results are given back in NCHW", ()
    )
    return x.contiguous(memory_format=LAST)
