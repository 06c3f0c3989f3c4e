"""Plain-torch definitions of the 3x3 operators: see ``reference``, whose conventions hold here.

Kernels of ``kernels/conv3x3`` are held to these, and CPU tensors are served by them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.reference import batch_norm_act, normalized, wide

__all__ = ["conv3x3_dgrad", "conv3x3_forward", "conv3x3_statistics", "conv3x3_wgrad"]

_OVER = (0, 2, 3)


def _operand(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool,
) -> Tensor:  # fmt: skip
    """What the convolution reads: x, or z = relu(bn(x)) as stored."""
    if act and mean is not None and var is not None:
        x = batch_norm_act(x, mean, var, gamma, beta, eps, True, True, None, None)
    return wide(x)


def _convolution_backward(
    dy: Tensor, z: Tensor, w: Tensor, stride: int, padding: int, dilation: int, which: int
) -> Tensor:  # fmt: skip
    """The gradient of the input (0) or of the weight (1), in the dtype arithmetic is done in."""
    mask = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(
        wide(dy), z, w, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1, mask
    )
    return found[which]


def conv3x3_forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, weight: Tensor, stride: int, padding: int, dilation: int, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = conv(z), channels_last, and with ``chunk`` the mean and M2 of every ``chunk`` pixels of y as stored."""
    z = _operand(x, mean, var, gamma, beta, eps, act)
    v = F.conv2d(z, weight.to(x.dtype).to(z.dtype), None, stride, padding, dilation)
    y = torch.empty(v.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(v)
    if not chunk:
        return y, v.new_empty(2, 0, 0)
    rows = wide(y).permute(0, 2, 3, 1).reshape(-1, v.shape[1])
    parts = [torch.stack([p.mean(0), (p - p.mean(0)).square().sum(0)], 0) for p in rows.split(chunk)]
    return y, torch.stack(parts, 1)


def conv3x3_statistics(
    partial: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, chunk: int, total: int,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and biased variance [N] from the chunks; updates the running statistics and their count where given."""
    if batches is not None:
        batches.add_(1)
    means, m2 = partial.unbind(0)
    first = torch.arange(means.shape[0], device=partial.device) * chunk
    count = (total - first).clamp(max=chunk).to(partial.dtype).unsqueeze(1)
    mean = means[0] + (count * (means - means[0])).sum(0) / total
    var = (m2 + count * (means - mean).square()).sum(0) / total
    if running_mean is not None and running_var is not None:
        running_mean.copy_(running_mean.to(mean.dtype).lerp(mean, momentum))
        unbiased = var * (total / max(total - 1, 1))
        running_var.copy_(running_var.to(mean.dtype).lerp(unbiased, momentum))
    return mean, var


def conv3x3_dgrad(
    dy: Tensor, weight: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, stride: int, padding: int, dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz = conv^T(dy); with ``act`` masked by z > 0, and then sum dz and sum dz xhat."""
    w = weight.to(x.dtype).to(wide(x).dtype)
    dz = _convolution_backward(dy, wide(x), w, stride, padding, dilation, 0)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not act or mean is None or var is None:
        return out.copy_(dz), dz.new_empty(0), dz.new_empty(0)
    xhat, _, v = normalized(x, mean, var, gamma, beta, eps)
    out.copy_(torch.where(v <= 0, torch.zeros_like(dz), dz))
    return out, wide(out).sum(_OVER), (wide(out) * xhat).sum(_OVER)


def conv3x3_wgrad(
    dy: Tensor, weight: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, stride: int, padding: int, dilation: int,
) -> Tensor:  # fmt: skip
    """dW in the dtype and strides of ``weight``."""
    z = _operand(x, mean, var, gamma, beta, eps, act)
    dw = _convolution_backward(dy, z, weight.to(z.dtype), stride, padding, dilation, 1)
    return torch.empty_like(weight).copy_(dw)
