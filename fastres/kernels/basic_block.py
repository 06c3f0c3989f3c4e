"""A block of two 3x3 convolutions in training as one differentiable function.

    y1 = conv1(x),  z1 = relu(bn1(y1)),  y2 = conv2(z1)                  PyTorch's convolutions, ``batch_norm``
    out = relu(bn2(y2) + identity)                     identity x, or bn3(conv3(x)), y3 by PyTorch:
                                                       ``residual_add_relu``; or the same in its moment form:
                                                       ``downsample_end``

Launches, values, gradients and what is saved are those of the parts called one after the other, bit for bit; what is
saved is time on the host (``_whole``, ``_tape``). A downsample's gradient of the pixels of x that it read is added in
place to the first convolution's gradient of all of x, as by ``downsample_end.fork``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import block_end, downsample_end
from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels import residual_add_relu as end_ops
from fastres.kernels._launch import channels_last
from fastres.kernels._pointwise_plan import Prologue
from fastres.kernels._sync import over_group
from fastres.kernels._whole import Norm, OtherLayout, Part, Saved, Whole, convolution_backward, updates
from fastres.kernels.batch_norm import (
    batch_norm_act,
    batch_norm_backward,
    batch_norm_reduce,
    batch_norm_stats,
    in_dtype,
)
from fastres.kernels.block_end import Branch, Folded
from fastres.kernels.folded_conv import Geometry

__all__ = ["Options", "basic_block"]

_convolve = torch.conv2d
_PLAIN = Prologue()  # no norm in front of the downsample
_FIRST = len(Saved._fields)


class Options(NamedTuple):
    """What of a block is no tensor."""

    first: Geometry
    second: Geometry
    norms: tuple[Norm, ...]
    stride: int  # of the downsample
    moments: bool  # it takes its moment form
    linked: bool = False


def _forward(o: Options, fast: bool, x: Tensor, parts: list[Part]) -> tuple[Tensor | None, ...]:
    updated, (one, two) = updates(parts, o.norms), parts[:2]
    y1 = _convolve(x, one.weight, None, *o.first)
    if not channels_last(y1):
        raise OtherLayout(0)
    mean1, var1 = batch_norm_stats.at(fast)(y1, *updated[0])
    z1 = batch_norm_act.at(fast)(y1, mean1, var1, one.gamma, one.beta, o.norms[0].eps, True, True, None, None)
    y2 = _convolve(z1, two.weight, None, *o.second)
    if not channels_last(y2):
        raise OtherLayout(1)
    y3 = None
    if len(parts) == 3 and not o.moments:
        y3 = _convolve(x, parts[2].weight, None, (o.stride, o.stride))
        if not channels_last(y3):
            raise OtherLayout(1)
    mean2, var2 = batch_norm_stats.at(fast)(y2, *updated[1])
    norm2 = (y2, mean2, var2, two.gamma, two.beta, o.norms[1].eps)
    made = (y1, mean1, var1, z1, y2, mean2, var2)
    if len(parts) == 2:
        return *end_ops.bn_add_relu.at(fast)(*norm2, True, None, None, x, None, True), *made
    three, eps3 = parts[2], o.norms[2].eps
    if y3 is not None:
        mean3, var3 = batch_norm_stats.at(fast)(y3, *updated[2])
        norm3 = (y3, mean3, var3, three.gamma, three.beta, eps3)
        result = end_ops.bn_add_bn_relu.at(fast)(
            *norm2, True, None, None, *norm3, True, None, None, None, True
        )
        return *result, *made, y3, mean3, var3
    second = Branch(x, three.weight, three.gamma, three.beta, eps3, True, o.stride)
    folded = block_end.fold(second, *updated[2], fast)
    result = downsample_end.end.at(fast)(*norm2, x, folded.wf, folded.bias, o.stride, None, True)
    return *result, *made, *folded.kept


def _convolution(dy: Tensor, x: Tensor, low: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and weight."""
    dx, dw, _ = convolution_backward(
        dy, x, low, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (True, True, False)
    )
    return dx, dw


def _affine(sums: tuple[Tensor, Tensor], gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gamma and beta, in their dtype."""
    return in_dtype(sums[1], gamma), in_dtype(sums[0], beta)


def _backward(
    o: Options, dtypes: tuple[torch.dtype, ...], fast: bool, dout: Tensor, *saved: Any
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = Saved(*saved[:_FIRST])
    end = _pair if len(o.norms) == 3 and not o.moments else _end
    dy2, of2, identity, down = end(o, dtypes, fast, dout, s, *saved[_FIRST:])
    dz1, dw2 = _convolution(dy2, s.z1, s.low2, o.second)
    del dy2
    norm = (s.y1, s.mean1, s.var1, s.gamma1, s.beta1, o.norms[0].eps)
    sums = batch_norm_reduce.at(fast)(dz1, *norm, True)
    totals, scale = over_group(sums, s.y1, None, None)
    dy1 = batch_norm_backward.at(fast)(dz1, *norm, True, None, *totals, scale)
    del dz1
    dx, dw1 = _convolution(dy1, s.x, s.low1, o.first)
    if o.moments and o.stride > 1:  # of the pixels that were read
        dx[:, :, :: o.stride, :: o.stride].add_(identity)
    else:
        dx = identity.add_(dx)
    return dx, dw1.to(dtypes[0]), *_affine(sums, s.gamma1, s.beta1), dw2.to(dtypes[1]), *of2, *down


_Ended = tuple[Tensor, tuple[Tensor, Tensor], Tensor, tuple[Tensor, ...]]


def _end(
    o: Options, dtypes: tuple[torch.dtype, ...], fast: bool, dout: Tensor, s: Saved, *third: Tensor
) -> _Ended:  # fmt: skip
    """Of a block's end: the gradient of y2; of the second gamma and beta; of the identity, or of the pixels of x that
    a downsample read; and of that one's weight, gamma and beta."""
    eps = o.norms[1].eps
    none = (None, None, None, 0.0, None)  # of a second norm, and of keep
    g, *sums, _, _ = end_ops.end_reduce.at(fast)(dout, s.signs, s.y2, s.mean2, s.var2, eps, *none)
    identity, down = g, ()
    if third:
        weight, gamma, *rest = third
        identity, *down = _downsample(o, fast, g, s.x, weight, gamma, Folded(*rest))  # type: ignore[assignment]
    totals, scale = over_group(tuple(sums), s.y2, None, None)
    dy2 = batch_norm_backward.at(fast)(
        g, s.y2, s.mean2, s.var2, s.gamma2, s.beta2, eps, False, None, *totals, scale
    )
    return dy2, _affine((sums[0], sums[1]), s.gamma2, s.beta2), identity, tuple(down)


def _downsample(
    o: Options, fast: bool, g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, f: Folded
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of a downsample in moment form: of the pixels of x that it reads, of weight, gamma and beta."""
    options = block_end._Options(o.norms[2].eps, True, o.stride, None, 0.0, False, None)
    sums, _ = ops.p_sums.at(fast)(g, None, x, *_PLAIN, f.anchor, None, None, o.stride, None)
    rows = g.shape[0] * g.shape[2] * g.shape[3]
    dw, dgamma, dbeta, b, shift = block_end._matrices(sums, weight, gamma, f, options, x, None, rows, fast)
    none = (None,) * 6  # of keep and of a second branch
    dread = ops.pointwise_dz.at(fast)(g, f.wf, x, *_PLAIN, b, shift, f.mu, *none, o.stride)[0]
    return dread, dw, in_dtype(dgamma, gamma), dbeta  # autograd gives that beta's dtype


def _pair(
    o: Options, dtypes: tuple[torch.dtype, ...], fast: bool, dout: Tensor, s: Saved, low: Tensor, gamma: Tensor,
    y: Tensor, mean: Tensor, var: Tensor,
) -> _Ended:  # fmt: skip
    """``_end`` of two norms, with the downsample's convolution by PyTorch."""
    eps2, eps3 = o.norms[1].eps, o.norms[2].eps
    ours, theirs = (s.y2, s.mean2, s.var2), (y, mean, var)
    _, *sums = end_ops.end_reduce.at(fast)(dout, s.signs, *ours, eps2, *theirs, eps3, None)
    of2, of3 = (sums[0], sums[1]), (sums[2], sums[3])
    totals2, scale2 = over_group(of2, s.y2, None, None)
    totals3, scale3 = over_group(of3, y, None, None)
    dy2, dy3 = end_ops.end_pair_backward.at(fast)(
        dout, s.signs, *ours, s.gamma2, eps2, *totals2, scale2, *theirs, gamma, eps3, *totals3, scale3, None
    )
    stride = Geometry((o.stride, o.stride), (0, 0), (1, 1), 1)
    dx, dw = _convolution(dy3, s.x, low, stride)
    return dy2, _affine(of2, s.gamma2, s.beta2), dx, (dw.to(dtypes[2]), in_dtype(of3[1], gamma), of3[0])


basic_block = Whole("_BasicBlock", _forward, _backward)
