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


# --------------------------------------------------------------------- moment form of a 1x1 convolution and its norm


def _operand(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, stride: int,
) -> Tensor:  # fmt: skip
    """z [M, C]: the rows a 1x1 convolution of this stride reads, through the pending norm and ReLU."""
    if act and mean is not None and var is not None:
        x = batch_norm_act(x, mean, var, gamma, beta, eps, True, True, None, None)
    return wide(x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, x.shape[1]))


def _samples(v: Tensor, keep: Tensor | None) -> Tensor:
    """Rows [M, N] times the factor of the sample they belong to."""
    if keep is None:
        return v
    return v * keep.to(v.dtype).repeat_interleave(v.shape[0] // keep.shape[0]).unsqueeze(1)


def pointwise_moments(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, stride: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean [C] and covariance [C, C] of z, and the anchor [C] that sums are taken about: here the mean itself."""
    z = _operand(x, mean, var, gamma, beta, eps, act, stride)
    mu = z.mean(0)
    centred = z - mu
    return mu, centred.t() @ centred / z.shape[0], mu.clone()


def pointwise_fold(
    weight: Tensor, like: Tensor, mu: Tensor | None, cov: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, mean: Tensor | None, var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, count: int, batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Wf [N, C] in the dtype of ``like``, bias, mean and var of y [N], and W S (empty without moments)."""
    w = wide(weight.reshape(weight.shape[0], -1)).to(wide(like).dtype)
    if mu is not None and cov is not None:
        wcov = w @ cov
        if batches is not None:
            batches.add_(1)
        mean, var = w @ mu, (wcov * w).sum(1).clamp(min=0)
        if running_mean is not None and running_var is not None:
            running_mean.copy_(running_mean.to(w.dtype).lerp(mean, momentum))
            unbiased = var * (count / max(count - 1, 1))
            running_var.copy_(running_var.to(w.dtype).lerp(unbiased, momentum))
    else:
        assert mean is not None and var is not None
        wcov, mean, var = w.new_empty(0, 0), mean.to(w.dtype, copy=True), var.to(w.dtype, copy=True)
    a = torch.rsqrt(var + eps) if gamma is None else gamma.to(w.dtype) * torch.rsqrt(var + eps)
    wf = (a.unsqueeze(1) * w).to(like.dtype)
    bias = -(wf.to(w.dtype) @ mu) if mu is not None else -a * mean
    return wf, bias if beta is None else bias + beta.to(w.dtype), mean, var, wcov


def pointwise_end(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: bool, wf: Tensor, bias: Tensor, identity: Tensor | None, x2: Tensor | None, wf2: Tensor | None,
    bias2: Tensor | None, stride2: int, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(keep (z Wf^T + bias) + identity), the identity a tensor or x2 Wf2^T + bias2; and its sign bits."""
    n, (b, _, h, w) = wf.shape[0], x.shape
    z = _operand(x, mean, var, gamma, beta, eps, act, 1)
    v = _samples(z @ wf.to(z.dtype).t() + bias, keep)
    if x2 is not None and wf2 is not None and bias2 is not None:
        v = v + _operand(x2, None, None, None, None, 0.0, False, stride2) @ wf2.to(z.dtype).t() + bias2
    v = v.view(b, h, w, n).permute(0, 3, 1, 2)
    if identity is not None:
        v = v + identity.to(v.dtype)
    out = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bits = torch.empty(0, 0, dtype=torch.uint8, device=x.device)
    if save:
        bits = pack_rows(~(v <= 0).permute(0, 2, 3, 1).reshape(b * h * w, n))
    return out.copy_(relu(v)), bits


def pointwise_p(
    dout: Tensor, bits: Tensor | None, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, anchor: Tensor | None, x2: Tensor | None, anchor2: Tensor | None,
    stride2: int, keep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums (keep g)^T (z - s) [N C] and sum keep g [N] one after the other, with x2 then g^T (x2 - s2) and sum g of
    the downsample branch; and g (empty without bits). ``stride2`` is that of x2, or where there is none that of x."""
    n = dout.shape[1]
    rows = dout.permute(0, 2, 3, 1).reshape(-1, n)
    g = x.new_empty(0)
    if bits is not None:
        rows = torch.where(unpack_rows(bits, n), rows, torch.zeros_like(rows))
        b, _, h, w = dout.shape
        g = torch.empty(dout.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        g.copy_(rows.view(b, h, w, n).permute(0, 3, 1, 2))
    rows = wide(rows)
    kept = _samples(rows, keep)
    z = _operand(x, mean, var, gamma, beta, eps, act, stride2 if x2 is None else 1)
    sums = [(kept.t() @ (z if anchor is None else z - anchor)).reshape(-1), kept.sum(0)]
    if x2 is not None:
        z = _operand(x2, None, None, None, None, 0.0, False, stride2)
        sums += [(rows.t() @ (z if anchor2 is None else z - anchor2)).reshape(-1), rows.sum(0)]
    return torch.cat(sums), g


def pointwise_weight(
    sums: Tensor, weight: Tensor, wcov: Tensor, anchor: Tensor, mu: Tensor, mean: Tensor, var: Tensor,
    gamma: Tensor | None, eps: float, batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dW, dgamma, dvar and a dbeta from the sums of ``pointwise_p``; P = p + sum g (s - mu)."""
    n, c = weight.shape[:2]
    p, sum_g = sums[: n * c].view(n, c), sums[n * c :]
    p = p + sum_g.unsqueeze(1) * (anchor - mu)
    rstd = torch.rsqrt(var.to(p.dtype) + eps)
    scale = torch.ones_like(rstd) if gamma is None else gamma.to(p.dtype)
    da = (p * weight.reshape(n, c).to(p.dtype)).sum(1)
    if not batch:
        da = da - mean.to(p.dtype) * sum_g
    dvar = -0.5 * da * scale * rstd**3
    dw = (scale * rstd).unsqueeze(1) * p
    if batch:
        dw = dw + (2 * dvar).unsqueeze(1) * wcov
    return stored(dw.view(weight.shape), weight), da * rstd, dvar, scale * rstd * sum_g


def pointwise_correction(
    weight: Tensor, dvar: Tensor, adb: Tensor, like: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """B = 2 / M W^T diag(dvar) W, rounded to the dtype of ``like``, and c = -(a dbeta) W / M."""
    w = weight.reshape(weight.shape[0], -1).to(dvar.dtype)
    b = (w.t() @ (dvar.unsqueeze(1) * w) * (2.0 / count)).to(like.dtype)
    return b, -(adb @ w) / count


def _dz(
    g: Tensor, wf: Tensor, z: Tensor, b: Tensor | None, shift: Tensor | None, mu: Tensor | None,
    keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """keep g Wf + (z - mu) B + c, rows by rows; z - mu rounded to the storage type."""
    dz = _samples(wide(g).permute(0, 2, 3, 1).reshape(z.shape[0], -1), keep) @ wf.to(z.dtype)
    if b is None or shift is None or mu is None:
        return dz
    return dz + (z - mu).to(g.dtype).to(z.dtype) @ b.to(z.dtype) + shift


def pointwise_dz(
    g: Tensor, wf: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, act: bool, b: Tensor | None, shift: Tensor | None, mu: Tensor | None,
    keep: Tensor | None, wf2: Tensor | None, x2: Tensor | None, b2: Tensor | None, shift2: Tensor | None,
    mu2: Tensor | None, stride2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dz = keep g Wf + (z - mu) B + c; with ``act`` masked by z > 0, and then sum dz and sum dz xhat; with ``x2`` also
    g Wf2 + (x2 - mu2) B2 + c2 at the pixels of x2 that were read. ``stride2`` is that of x2, or, where there is none,
    of x."""
    z = _operand(x, mean, var, gamma, beta, eps, act, stride2 if x2 is None else 1)
    (n, _, h, w), c = g.shape, x.shape[1]
    dz = _dz(g, wf, z, b, shift, mu, keep).view(n, h, w, c).permute(0, 3, 1, 2)
    dx2 = x.new_empty(0)
    if x2 is not None and wf2 is not None:
        z2 = _operand(x2, None, None, None, None, 0.0, False, stride2)
        dz2 = _dz(g, wf2, z2, b2, shift2, mu2, None).view(n, h, w, x2.shape[1]).permute(0, 3, 1, 2)
        dx2 = dz2.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx = torch.empty(dz.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not act or mean is None or var is None:
        return dx.copy_(dz), dz.new_empty(0), dz.new_empty(0), dx2
    xhat, _, v = normalized(x, mean, var, gamma, beta, eps)
    dx.copy_(torch.where(v <= 0, torch.zeros_like(dz), dz))
    return dx, wide(dx).sum(_OVER), (wide(dx) * xhat).sum(_OVER), dx2


def downsample_end(
    y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, x: Tensor,
    wf: Tensor, bias: Tensor, stride: int, keep: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(keep_n bn(y) + x Wf^T + bias) with x at the pixels that were read; and with ``save`` its sign bits."""
    b, n, h, w = y.shape
    v = _operand(x, None, None, None, None, 0.0, False, stride) @ wide(wf).t() + bias
    v = _kept(normalized(y, mean, var, gamma, beta, eps)[2], keep) + v.view(b, h, w, n).permute(0, 3, 1, 2)
    bits = torch.empty(0, 0, dtype=torch.uint8, device=y.device)
    if save:
        bits = pack_rows(~(v <= 0).permute(0, 2, 3, 1).reshape(b * h * w, n))
    return stored(relu(v), y), bits


def block_start_conv(
    x: Tensor,
    weight: Tensor,
    stats: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(x), and with ``stats`` mean and var of y (else empty), updating the running ones and their count."""
    y = torch.nn.functional.conv2d(x, weight.to(x.dtype)).contiguous(memory_format=torch.channels_last)
    if not stats:
        return y, wide(y).new_empty(0), wide(y).new_empty(0)
    return y, *batch_norm_stats(y, running_mean, running_var, momentum, batches)


def block_start_dgrad(
    dz: Tensor, y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    s1: Tensor | None, s2: Tensor | None, scale: float, weight: Tensor, did: Tensor | None, bits: Tensor | None,
    x: Tensor, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = dy W + didentity, the latter at every ``stride``-th pixel of every ``stride``-th line, masked by ``bits``
    where there are any; and dy of z = relu(bn(y))."""
    dy = batch_norm_backward(dz, y, mean, var, gamma, beta, eps, True, None, s1, s2, scale)
    c, n = weight.shape[:2]
    b, _, h, w = x.shape
    rows = wide(dy).permute(0, 2, 3, 1).reshape(-1, c)
    dx = (rows @ weight.reshape(c, n).to(x.dtype).to(rows.dtype)).view(b, h, w, n).permute(0, 3, 1, 2)
    if did is not None:
        dx[:, :, ::stride, ::stride] += did.to(dx.dtype)
    if bits is not None:
        live = unpack_rows(bits, n).view(b, h, w, n).permute(0, 3, 1, 2)
        dx = torch.where(live, dx, dx.new_zeros(()))
    return stored(dx, x), dy
