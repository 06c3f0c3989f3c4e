"""What a CPU does beside ATen's own operators and oneDNN's fused ones: the rules, as measured, and the switches.

In training ``auto`` takes ATen's operators on a CPU, except that 3x3 convolutions of stride 1 take Winograd's form, or
their weight gradient alone does, where that is faster by the figures of docs/CPU.md. It needs channels_last, gradients
enabled, no autocast; ``auto`` takes it for float32 and batch statistics only. ``backend("aten")`` turns it off, and
``winograd("on" | "off")`` or FASTRES_WINOGRAD says so alone. Folded convolutions have a rule of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastres import _routing
from fastres.kernels._launch import channels_last
from fastres.kernels._triton import INTERPRET
from fastres.kernels.folded_conv import Geometry

__all__ = ["WINOGRAD", "obstacle", "winograd", "winograd_parts", "winograd_pays"]

WINOGRAD = ("auto", "on", "off")


class _Setting:
    winograd: str = _routing._known(
        os.environ.get("FASTRES_WINOGRAD", "").lower() or "auto", "FASTRES_WINOGRAD", WINOGRAD
    )


@contextmanager
def winograd(mode: str) -> Iterator[None]:
    """Whether 3x3 convolutions take Winograd's form on a CPU: ``on`` wherever it applies, ``off``, or
    ``auto``, where it was measured to be faster (process-wide). ValueError for another mode."""
    before, _Setting.winograd = _Setting.winograd, _routing._known(mode, "winograd", WINOGRAD)
    try:
        yield
    finally:
        _Setting.winograd = before


def obstacle(x: Tensor) -> str:
    """Why the form cannot take this activation; empty where it can."""
    if INTERPRET or x.device.type != "cpu" or _routing._Setting.assumed or _routing.get_backend() != "auto":
        return "not the CPU under backend 'auto'"
    if _routing.transformed():
        return "inside a transform of torch.func"
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "neither float32 nor float64, or under autocast"
    if not torch.is_grad_enabled():
        return "gradients are not enabled"
    if x.dim() != 4 or not x.numel() or not channels_last(x):
        return "input is not channels_last"
    return ""


def winograd_pays(conv: nn.Conv2d, g: Geometry, out: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a folded 3x3 convolution to a result of shape ``out`` takes Winograd's form in inference: a rule, from
    figures in docs/INFERENCE.md."""
    if _Setting.winograd == "off" or dtype != torch.float32 or conv.kernel_size != (3, 3):
        return False
    if g != ((1, 1), (1, 1), (1, 1), 1):
        return False
    tiles = out[0] * (-(-out[2] // 2)) * (-(-out[3] // 2))
    return _Setting.winograd == "on" or (tiles >= 128 and min(conv.in_channels, conv.out_channels) >= 256)


def winograd_parts(conv: nn.Module, x: Tensor, training: bool) -> tuple[bool, bool]:
    """Whether a convolution, followed by a norm in training or not, takes Winograd's form: for forward and input
    gradient, and for the weight gradient."""
    mode = _Setting.winograd
    if mode == "off" or type(conv) is not nn.Conv2d or obstacle(x) or x.shape[1] != conv.in_channels:
        return False, False
    plain = (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and conv.weight.dtype == x.dtype
        and not (conv._forward_hooks or conv._forward_pre_hooks)
        and not (conv._backward_hooks or conv._backward_pre_hooks)
    )
    if not plain or not (x.requires_grad or conv.weight.requires_grad):
        return False, False
    if mode == "on":
        return True, True
    narrow = min(x.shape[1], conv.out_channels)
    tiles = x.shape[0] * (-(-x.shape[2] // 2)) * (-(-x.shape[3] // 2))
    if not training or x.dtype != torch.float32 or min(x.shape[2:]) < 4 or tiles < 64:
        return False, False
    return narrow >= 256, narrow >= 64
