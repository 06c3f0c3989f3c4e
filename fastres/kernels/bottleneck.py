"""A bottleneck in training as one differentiable function, composed of what the functions of its parts are composed of.

    y1 = conv1(x),  z1 = relu(bn1(y1)),  y2 = conv2(z1)                  ``block_start`` and PyTorch's convolution
    out = relu(bn3(conv3(relu(bn2(y2)))) + identity)                     ``block_end``; identity x, or bn4(conv4(x))

Launches, values, gradients and what is saved are those of the parts called one after the other, bit for bit. What is
saved is time on the host: autograd sees one node where there were four, nothing between them is asked for twice, and
what forward and backward launch is kept as programs (``_whole``, ``_tape``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import block_end, block_start
from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels._launch import channels_last
from fastres.kernels._whole import Norm, OtherLayout, Part, Saved, Whole, convolution_backward, updates
from fastres.kernels.batch_norm import batch_norm_act, batch_norm_stats
from fastres.kernels.block_end import Branch, Folded
from fastres.kernels.folded_conv import Geometry

__all__ = ["Options", "bottleneck"]

_convolve = torch.conv2d
_FOLDED = len(Folded._fields) - 2  # without a process group
_NONE = Folded(*(None,) * len(Folded._fields))  # type: ignore[arg-type]
_FIRST = len(Saved._fields)


class Options(NamedTuple):
    """What of a bottleneck is no tensor."""

    geometry: Geometry  # of the convolution in the middle
    norms: tuple[Norm, ...]
    stride: int  # of the downsample
    linked: bool

    def first(self) -> Any:
        """The block end's branch."""
        return block_end._Options(self.norms[2].eps, True, 1, None, self.norms[1].eps, True, None)

    def second(self) -> Any:
        """The downsample, if there is one."""
        if len(self.norms) == 3:
            return None
        return block_end._Options(self.norms[3].eps, True, self.stride, None, 0.0, False, None)


def _forward(
    o: Options, fast: bool, x: Tensor, parts: list[Part]
) -> tuple[Tensor | None, ...]:  # fmt: skip
    updated, (one, two, three) = updates(parts, o.norms), parts[:3]
    y1, mean1, var1 = block_start.start_conv.at(fast)(x, one.weight, True, *updated[0])
    z1 = batch_norm_act.at(fast)(y1, mean1, var1, one.gamma, one.beta, o.norms[0].eps, True, True, None, None)
    y2 = _convolve(z1, two.weight, None, *o.geometry)
    if not channels_last(y2):
        raise OtherLayout(1)
    mean2, var2 = batch_norm_stats.at(fast)(y2, *updated[1])
    front = (mean2, var2, two.gamma, two.beta, o.norms[1].eps)
    first = Branch(y2, three.weight, three.gamma, three.beta, o.norms[2].eps, True, 1, None, *front, True)
    folded = block_end.fold(first, *updated[2], fast)
    pair: tuple[Any, ...] = (x, None, None, None, 1)
    folded2: tuple[Any, ...] = ()
    if len(parts) == 4:
        four = parts[3]
        second = Branch(x, four.weight, four.gamma, four.beta, o.norms[3].eps, True, o.stride)
        f2 = block_end.fold(second, *updated[3], fast)
        pair, folded2 = (None, x, f2.wf, f2.bias, o.stride), f2.kept
    out, signs = ops.pointwise_end.at(fast)(y2, *front, True, folded.wf, folded.bias, *pair, None, True)
    return out, signs, y1, mean1, var1, z1, y2, mean2, var2, *folded.kept, *folded2


def _backward(
    o: Options, dtypes: tuple[torch.dtype, ...], fast: bool, dout: Tensor, *saved: Any
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s, (weight3, gamma3, *rest) = Saved(*saved[:_FIRST]), saved[_FIRST:]
    first, second, g = o.first(), o.second(), o.geometry
    weight4 = gamma4 = None
    folded2 = _NONE
    if second is not None:
        weight4, gamma4, *rest = rest
        folded2 = Folded(*rest[_FOLDED:])
    end = block_end.gradients(
        dout, s.signs, None, s.y2, s.mean2, s.var2, s.gamma2, s.beta2, None, weight3, gamma3, Folded(*rest[:_FOLDED]),
        first, None if second is None else s.x, weight4, gamma4, folded2, second, fast,
    )  # fmt: skip
    dz1, dw2, _ = convolution_backward(
        end.x, s.z1, s.low2, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (True, True, False)
    )  # fmt: skip
    did, stride = (end.identity, 1) if second is None else (end.x2, second.stride)
    dx, dw1, dgamma1, dbeta1 = block_start.gradients(
        dz1, did, s.x, s.low1, s.gamma1, s.beta1, s.y1, s.mean1, s.var1, None, s.bits, o.norms[0].eps, True, None,
        stride, fast,
    )  # fmt: skip
    assert dw1 is not None
    found = (
        dx, dw1.to(dtypes[0]), dgamma1, dbeta1, dw2.to(dtypes[1]), end.gamma0, end.beta0, end.weight, end.gamma,
        end.beta,
    )  # fmt: skip
    return found if second is None else (*found, end.weight2, end.gamma2, end.beta2)


bottleneck = Whole("_Bottleneck", _forward, _backward)
