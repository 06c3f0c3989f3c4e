"""Plain-torch implementations of every operator: the definition the kernels are held to, and the CPU implementation.

Arithmetic is float64 for float64 storage and float32 for everything else, results are rounded once when stored, as in
the kernels. Per-channel vectors are [C]; activations are [N, C, H, W] in any strides; outputs keep the strides of
their activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels._launch import matrix

__all__ = [
    "batch_norm_act",
    "batch_norm_backward",
    "batch_norm_reduce",
    "batch_norm_stats",
    "add_relu",
    "bn_add_bn_relu",
    "bn_add_bn_relu_backward",
    "bn_add_relu",
    "bn_add_relu_reduce",
    "bn_relu_max_pool",
    "masked",
    "max_pool_backward",
    "max_pool_reduce",
]

_OVER = (0, 2, 3)


def wide(t: Tensor) -> Tensor:
    """``t`` in the dtype arithmetic is done in."""
    return t if t.dtype == torch.float64 else t.float()


def per_channel(v: Tensor) -> Tensor:
    """[C] to [1, C, 1, 1]."""
    return v.view(1, -1, 1, 1)


def stored(v: Tensor, like: Tensor) -> Tensor:
    """``v`` rounded to the dtype of ``like``, in its strides."""
    out = torch.empty_like(like)
    return out.copy_(v)


def normalized(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """xhat, a = gamma rstd as [1, C, 1, 1], and a (y - mean) + beta."""
    y = wide(y)
    rstd = torch.rsqrt(var.to(y.dtype) + eps)
    centred = y - per_channel(mean.to(y.dtype))
    a = per_channel(rstd if gamma is None else gamma.to(y.dtype) * rstd)
    v = centred * a
    if beta is not None:
        v = v + per_channel(beta.to(y.dtype))
    return centred * per_channel(rstd), a, v


def relu(v: Tensor) -> Tensor:
    """ReLU that keeps NaN."""
    return torch.where(v <= 0, torch.zeros_like(v), v)


def batch_norm_stats(
    y: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, batches: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and biased variance [C] of y over N, H, W; updates the running statistics, and counts the batch in the
    scalar ``batches``, in place where given."""
    if batches is not None:
        batches.add_(1)
    y = wide(y)
    total = y.numel() // max(y.shape[1], 1)
    if total == 0:
        return y.new_zeros(y.shape[1]), y.new_zeros(y.shape[1])
    mean = y.mean(_OVER)
    rest = (y - per_channel(mean)).mean(_OVER)  # what rounding left of a mean far from zero
    mean = mean + rest
    var = (y - per_channel(mean)).square().mean(_OVER)
    if running_mean is not None and running_var is not None:
        unbiased = var * (total / max(total - 1, 1))
        running_mean.copy_(running_mean.to(y.dtype).lerp(mean, momentum))
        running_var.copy_(running_var.to(y.dtype).lerp(unbiased, momentum))
    return mean, var


def batch_norm_act(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, relu_: bool,
    training: bool, count: Tensor | None, group: str | None,
) -> Tensor:  # fmt: skip
    """z = relu(a (y - mean) + beta); ``training``, ``count`` and ``group`` matter to the backward only."""
    _, _, v = normalized(y, mean, var, gamma, beta, eps)
    return stored(relu(v) if relu_ else v, y)


def _masked(dz: Tensor, v: Tensor, relu_: bool) -> Tensor:
    dz = dz.to(v.dtype)
    return torch.where(v <= 0, torch.zeros_like(dz), dz) if relu_ else dz


def batch_norm_reduce(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu_: bool,
) -> tuple[Tensor, Tensor]:
    """sum g and sum g xhat over N, H, W, with g = dz [z > 0]: dbeta and dgamma."""
    xhat, _, v = normalized(y, mean, var, gamma, beta, eps)
    g = _masked(dz, v, relu_)
    return g.sum(_OVER), (g * xhat).sum(_OVER)


def batch_norm_backward(
    dz: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    relu_: bool, keep: Tensor | None, s1: Tensor | None, s2: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """dy = a (g - scale s1 - xhat scale s2), or a g where s1 and s2 are None; g = keep_n dz [z > 0]."""
    xhat, a, v = normalized(y, mean, var, gamma, beta, eps)
    g = _masked(dz, v, relu_)
    if keep is not None:
        g = g * keep.to(g.dtype).view(-1, 1, 1, 1)
    if s1 is not None and s2 is not None:
        g = g - scale * per_channel(s1.to(g.dtype)) - xhat * (scale * per_channel(s2.to(g.dtype)))
    return stored(g * a, y)


# --------------------------------------------------------------------------------------------------- block end


def _as_rows(t: Tensor, y: Tensor) -> Tensor:
    """[N, C, H, W] to the matrix [rows, columns] that ``y`` is in memory."""
    m = matrix(y)
    return (t.permute(0, 2, 3, 1) if m.nhwc else t).reshape(m.rows, m.cols)


def pack_rows(live: Tensor) -> Tensor:
    """Booleans [rows, columns] to bytes [rows, ceil(columns / 8)], lowest bit first."""
    rows, cols = live.shape
    padded = torch.nn.functional.pad(live, (0, -cols % 8)).to(torch.uint8).view(rows, (cols + 7) // 8, 8)
    return (padded * 2 ** torch.arange(8, dtype=torch.uint8, device=live.device)).sum(2, dtype=torch.uint8)


def unpack_rows(bits: Tensor, cols: int) -> Tensor:
    """The inverse."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    live = bits.unsqueeze(2).bitwise_and(weights) != 0
    return live.reshape(bits.shape[0], bits.shape[1] * 8)[:, :cols]


def pack_bits(live: Tensor, y: Tensor) -> Tensor:
    """Booleans [N, C, H, W] to bytes, row by row of the matrix that ``y`` is in memory."""
    return pack_rows(_as_rows(live, y))


def unpack_bits(bits: Tensor, y: Tensor) -> Tensor:
    """The inverse: booleans [N, C, H, W]."""
    m = matrix(y)
    rows = unpack_rows(bits, m.cols)
    n, c, h, w = y.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2) if m.nhwc else rows.reshape(n, c, h, w)


def _kept(v: Tensor, keep: Tensor | None) -> Tensor:
    return v if keep is None else v * keep.to(v.dtype).view(-1, 1, 1, 1)


def _end(v: Tensor, y: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    bits = pack_bits(~(v <= 0), y) if save else torch.empty(0, 0, dtype=torch.uint8, device=y.device)
    return stored(relu(v), y), bits


def bn_add_relu(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None, identity: Tensor, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(keep_n bn(y) + identity), and with ``save`` its sign bits (else an empty tensor)."""
    v = _kept(normalized(y, mean, var, gamma, beta, eps)[2], keep)
    return _end(v + identity.to(v.dtype), y, save)


def bn_add_bn_relu(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None, x: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None,
    beta2: Tensor | None, eps2: float, training2: bool, count2: Tensor | None, group2: str | None,
    keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(keep_n bn(y) + bn'(x)), and with ``save`` its sign bits (else an empty tensor)."""
    v = _kept(normalized(y, mean, var, gamma, beta, eps)[2], keep)
    return _end(v + normalized(x, mean2, var2, gamma2, beta2, eps2)[2], y, save)


def add_relu(a: Tensor, b: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """relu(a + b), and with ``save`` its sign bits (else an empty tensor)."""
    return _end(wide(a) + wide(b), a, save)


def masked(dout: Tensor, bits: Tensor, y: Tensor) -> Tensor:
    """dout where the bit is set, in the dtype and strides of ``y``."""
    return stored(torch.where(unpack_bits(bits, y), dout, torch.zeros_like(dout)), y)


def _sums(g: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    xhat = normalized(x, mean, var, None, None, eps)[0]
    return g.sum(_OVER), (g * xhat).sum(_OVER)


def bn_add_relu_reduce(
    dout: Tensor, bits: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float, x: Tensor | None,
    mean2: Tensor | None, var2: Tensor | None, eps2: float, keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """g = dout [out > 0] (empty with ``x``) and the sums of g and g xhat: the branch's norm, then the downsample's."""
    g = torch.where(unpack_bits(bits, y), wide(dout), wide(dout).new_zeros(()))
    sums = _sums(_kept(g, keep), y, mean, var, eps)
    if x is None or mean2 is None or var2 is None:
        return stored(g, y), *sums, sums[0].new_empty(0), sums[0].new_empty(0)
    return y.new_empty(0), *sums, *_sums(g, x, mean2, var2, eps2)


def bn_add_bn_relu_backward(
    dout: Tensor, bits: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float,
    s1: Tensor | None, s2: Tensor | None, scale: float, x: Tensor, mean2: Tensor, var2: Tensor,
    gamma2: Tensor | None, eps2: float, s3: Tensor | None, s4: Tensor | None, scale2: float, keep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy and dx of the block end with a downsample branch."""
    g = torch.where(unpack_bits(bits, y), dout, torch.zeros_like(dout))
    dy = batch_norm_backward(g, y, mean, var, gamma, None, eps, False, keep, s1, s2, scale)
    return dy, batch_norm_backward(g, x, mean2, var2, gamma2, None, eps2, False, None, s3, s4, scale2)


# --------------------------------------------------------------------------------------------------- stem pool


def bn_relu_max_pool(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, training: bool,
    count: Tensor | None, group: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """3x3 stride 2 padding 1 max pool of z = relu(bn(y)) as stored, and the winning tap 3 r + s of each window."""
    z = batch_norm_act(y, mean, var, gamma, beta, eps, True, training, count, group)
    out, at = torch.nn.functional.max_pool2d(z, 3, 2, 1, return_indices=True)
    h, w = z.shape[2:]
    top = 2 * torch.arange(out.shape[2], device=y.device).view(-1, 1) - 1
    left = 2 * torch.arange(out.shape[3], device=y.device) - 1
    taps = (at // max(w, 1) - top) * 3 + (at % max(w, 1) - left)
    memory = torch.empty_like(out, dtype=torch.uint8)
    return out, memory.copy_(taps)


def _unpooled(dout: Tensor, taps: Tensor, y: Tensor) -> Tensor:
    """dz [N, C, H, W] of the pool: each window's gradient at its winning tap."""
    n, c, h, w = y.shape
    oh, ow = dout.shape[2:]
    taps = taps.long()
    rows = 2 * torch.arange(oh, device=y.device).view(-1, 1) - 1 + taps // 3
    cols = 2 * torch.arange(ow, device=y.device) - 1 + taps % 3
    dz = wide(dout).new_zeros(n, c, h * w)
    at = (rows * w + cols).reshape(n, c, oh * ow)
    dz.scatter_add_(2, at, wide(dout).reshape(n, c, oh * ow))
    return dz.view(n, c, h, w)


def max_pool_reduce(
    dout: Tensor, taps: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum g and sum g xhat of the stem's norm through the pool and the ReLU."""
    return batch_norm_reduce(_unpooled(dout, taps, y), y, mean, var, gamma, beta, eps, True)


def max_pool_backward(
    dout: Tensor, taps: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float, s1: Tensor | None, s2: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """dy of the stem's norm through the pool and the ReLU."""
    dz = _unpooled(dout, taps, y)
    return batch_norm_backward(dz, y, mean, var, gamma, beta, eps, True, None, s1, s2, scale)
