"""A bottleneck in training as one differentiable function, composed of what the functions of its parts are composed of.

    y1 = conv1(x),  z1 = relu(bn1(y1)),  y2 = conv2(z1)                  ``block_start`` and PyTorch's convolution
    out = relu(bn3(conv3(relu(bn2(y2)))) + identity)                     ``block_end``; identity x, or bn4(conv4(x))

Launches, values, gradients and what is saved are those of the parts called one after the other, bit for bit. What is
saved is time on the host: autograd sees one node where there were four, and nothing between them is asked for twice.
The norms have statistics of their own batch, and all that has a gradient gets one; whoever wants less calls the parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import block_end, block_start
from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels._library import applied, unwatched
from fastres.kernels.block_end import Branch, Folded
from fastres.kernels.folded_conv import Geometry

__all__ = ["Made", "bottleneck"]

_convolution_backward = torch.ops.aten.convolution_backward.default
_NONE = (None,) * len(Folded._fields)


class Made(NamedTuple):
    """What has been computed up to the block's end, without a gradient.

    ``low1`` and ``low2`` are the weights in the dtype of x, ``bits`` the sign bits of x where its gradient is wanted
    with the ReLU that made x applied; ``linked``: whoever uses the result does the same for it.
    """

    low1: Tensor
    y1: Tensor
    mean1: Tensor
    var1: Tensor
    eps1: float
    bits: Tensor | None
    z1: Tensor
    low2: Tensor
    geometry: Geometry  # of the convolution in the middle
    first: Branch  # conv3 and its norm, with the second norm in front
    folded: Folded
    second: Branch | None  # the downsample and its norm
    folded2: Folded | None
    linked: bool
    fast: bool  # what ``unwatched`` says of all this


class _Bottleneck(torch.autograd.Function):
    """Returns out and its sign bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, gamma1: Tensor, beta1: Tensor, weight2: Tensor, gamma2: Tensor,
        beta2: Tensor, weight3: Tensor, gamma3: Tensor, beta3: Tensor, weight4: Tensor | None, gamma4: Tensor | None,
        beta4: Tensor | None, made: Made,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        first, second, folded, folded2 = made.first, made.second, made.folded, made.folded2
        y2, mean2, var2 = first.x, first.mean0, first.var0
        pair: tuple[Any, ...] = (x, None, None, None, 1)
        if second is not None and folded2 is not None:
            pair = (None, x, folded2.wf, folded2.bias, second.stride)
        out, bits = ops.pointwise_end.at(made.fast)(
            y2, mean2, var2, gamma2, beta2, first.eps0, True, folded.wf, folded.bias, *pair, None, True
        )
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            None if made.linked else bits, x, made.bits, made.low1, gamma1, beta1, made.y1, made.mean1, made.var1,
            made.z1, made.low2, y2, mean2, var2, gamma2, beta2, weight3, gamma3, weight4, gamma4, *folded,
            *(_NONE if folded2 is None else folded2),
        )  # fmt: skip
        ctx.first, ctx.second = first.options, None if second is None else second.options
        ctx.eps1, ctx.geometry, ctx.dtypes = made.eps1, made.geometry, (weight1.dtype, weight2.dtype)
        return out, bits

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        (bits, x, bits1, low1, gamma1, beta1, y1, mean1, var1, z1, low2, y2, mean2, var2, gamma2, beta2, weight3,
         gamma3, weight4, gamma4, *rest) = ctx.saved_tensors  # fmt: skip
        second, g = ctx.second, ctx.geometry
        fast = unwatched(dout, gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2, gamma3, gamma4)
        end = block_end.gradients(
            dout, bits, None, y2, mean2, var2, gamma2, beta2, None, weight3, gamma3, Folded(*rest[: len(_NONE)]),
            ctx.first, None if second is None else x, weight4, gamma4, Folded(*rest[len(_NONE) :]), second, fast,
        )  # fmt: skip
        dz1, dw2, _ = _convolution_backward(
            end.x, z1, low2, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (True, True, False)
        )  # fmt: skip
        did, stride = (end.identity, 1) if second is None else (end.x2, second.stride)
        dx, dw1, dgamma1, dbeta1 = block_start.gradients(
            dz1, did, x, low1, gamma1, beta1, y1, mean1, var1, None, bits1, ctx.eps1, True, None, stride, fast
        )
        assert dw1 is not None
        dtype1, dtype2 = ctx.dtypes
        return (
            dx, dw1.to(dtype1), dgamma1, dbeta1, dw2.to(dtype2), end.gamma0, end.beta0, end.weight, end.gamma, end.beta,
            end.weight2, end.gamma2, end.beta2, None,
        )  # fmt: skip


_apply = applied(_Bottleneck)


def bottleneck(
    x: Tensor, weight1: Tensor, gamma1: Tensor, beta1: Tensor, weight2: Tensor, made: Made
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The end of a bottleneck, differentiable in all that the block reads.

    Args:
        x: [N, Cin, H, W], channels_last: the block's input.
        weight1, gamma1, beta1: of the first 1x1 convolution [C, Cin, 1, 1] and its norm [C].
        weight2: [C, C / groups, kh, kw] of the convolution in the middle.
        made: what was computed of them, and the rest of the block; every norm has gamma and beta.

    Returns:
        out [N, Cout, H', W'], channels_last, in the dtype of x; and its sign bits, a row of bytes a pixel.
    """
    b, d = made.first, made.second
    down = (None, None, None) if d is None else (d.weight, d.gamma, d.beta)
    return _apply(
        x, weight1, gamma1, beta1, weight2, b.gamma0, b.beta0, b.weight, b.gamma, b.beta, *down, made
    )
