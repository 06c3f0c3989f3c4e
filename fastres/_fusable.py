"""When a module need not be called as one, and the checks that come before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fastres._norm import FusedNorm
from fastres.kernels._check import check_activation, describe

__all__ = ["check_input", "check_values", "hooked", "norm_obstacle", "observed", "relu_obstacle"]


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward: hooks, a forward of its own, or a compiled one."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def observed() -> str:
    """Why every module has to be called as one now, in words; empty where nobody follows the calls."""
    if _has_any_global_hook():
        return "a hook for all modules is set"
    return "torch.jit.trace records the modules" if torch.jit.is_tracing() else ""


def norm_obstacle(norm: nn.Module) -> str:
    """Why a norm has to be called as a module, in words; empty where the functions can take :meth:`fused` instead."""
    if not isinstance(norm, FusedNorm):
        return f"is {type(norm).__name__}"
    if type(norm).forward is not FusedNorm.forward:
        return f"is {type(norm).__name__}, with a forward of its own"
    if norm.relu:
        return "has a ReLU of its own"
    return "has hooks" if hooked(norm) else ""


def relu_obstacle(relu: nn.Module) -> str:
    """Why an activation has to be called as a module; empty for a plain ``nn.ReLU``."""
    if type(relu) is not nn.ReLU:
        return f"is {type(relu).__name__}"
    return "has hooks" if hooked(relu) else ""


def check_input(op: str, x: Any, conv: nn.Module) -> None:
    """``x`` can be the input of the 2d convolution ``conv``: TypeError or ValueError otherwise."""
    check_activation(op, "input", x)
    channels = getattr(conv, "in_channels", x.shape[1])
    if x.shape[1] != channels:
        raise ValueError(f"{op}: input is {describe(x)}; wanted {channels} channels")
    weight = conv._parameters.get("weight")
    if (
        type(weight) is not nn.Parameter
    ):  # sharded, parametrized or not there: the convolution itself will tell
        return
    if x.device != weight.device:
        raise ValueError(
            f"{op}: input is {describe(x)}; wanted device {weight.device}, where the weights are"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        wanted = str(weight.dtype)[6:]
        raise TypeError(f"{op}: input is {describe(x)}; wanted {wanted}, as the weights, or autocast")


def check_values(op: str, x: Tensor, stride: int, module: nn.Module, where: str = "") -> None:
    """A module that leaves one value a channel cannot be trained: ValueError before any of its norms is touched.

    ``x`` [N, C, H, W] enters ``module``, whose norms see it ``stride`` times smaller.
    """
    if x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) != 1:
        return
    for name, norm in module.named_modules():
        if not isinstance(norm, _BatchNorm) or not (norm.training or norm.running_mean is None):
            continue
        dist = torch.distributed
        if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            continue
        raise ValueError(
            f"{op}: input is {describe(x)}, which leaves 1 value per channel in {where}{name}; "
            "wanted more than 1 where batch statistics are used"
        )
