"""What a convolution module must be for this package's own kernels to stand in for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastres.kernels.conv3x3 import Geometry

__all__ = ["own_geometry", "plain_conv"]


def plain_conv(conv: nn.Module) -> bool:
    """Whether a module is exactly a convolution that nothing else watches or changes."""
    return (
        type(conv) is nn.Conv2d
        and conv._parameters.get("bias", conv) is None  # an attribute is looked up in three places
        and conv.padding_mode == "zeros"
        and type(conv.padding) is not str
        and "forward" not in conv.__dict__
        and not (conv._forward_hooks or conv._forward_pre_hooks)
        and not (conv._backward_hooks or conv._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def own_geometry(conv: nn.Module, x: Tensor) -> Geometry | None:
    """Stride, padding and dilation of a module that is exactly a 3x3 convolution of x which the kernels of ``conv3x3``
    have, and that nothing else watches or changes; else None."""
    if (
        not isinstance(conv, nn.Conv2d)
        or not plain_conv(conv)
        or conv.kernel_size != (3, 3)
        or conv.groups != 1
    ):
        return None
    assert not isinstance(conv.padding, str)
    if conv.in_channels != x.shape[1] or conv.weight.shape[1] != x.shape[1]:
        return None
    cast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != (torch.get_autocast_dtype(x.device.type) if cast else conv.weight.dtype):
        return None
    (stride, *other), (padding, *p), (dilation, *d) = conv.stride, conv.padding, conv.dilation
    if stride not in (1, 2) or other != [stride] or p != [padding] or d != [dilation]:
        return None
    geometry = Geometry(stride, padding, dilation)
    return geometry if min(geometry.size(x.shape[2], x.shape[3])) > 0 else None
