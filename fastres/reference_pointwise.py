"""Plain-torch definitions of the operators around 1x1 convolutions: see ``reference``, whose conventions hold here.

Kernels of ``kernels/fused_conv_bn_relu``, ``block_start`` and ``downsample_end`` are held to these, and CPU tensors are
served by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.reference import (
    _kept,
    batch_norm_act,
    batch_norm_backward,
    batch_norm_stats,
    normalized,
    pack_rows,
    relu,
    stored,
    unpack_rows,
    wide,
)

__all__ = ["block_start_conv", "block_start_dgrad", "downsample_end", "pointwise_correction", "pointwise_dz",
           "pointwise_end", "pointwise_fold", "pointwise_moments", "pointwise_p", "pointwise_weight"]  # fmt: skip

_OVER = (0, 2, 3)


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
