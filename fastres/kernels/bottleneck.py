"""A bottleneck in training as one differentiable function, composed of what the functions of its parts are composed of.

    y1 = conv1(x),  z1 = relu(bn1(y1)),  y2 = conv2(z1)                  ``block_start`` and PyTorch's convolution
    out = relu(bn3(conv3(relu(bn2(y2)))) + identity)                     ``block_end``; identity x, or bn4(conv4(x))

Launches, values, gradients and what is saved are those of the parts called one after the other, bit for bit. What is
saved is time on the host: autograd sees one node where there were four, nothing between them is asked for twice, and
what forward and backward launch is kept as programs (``_tape``).
The norms have statistics of their own batch, and all that has a gradient gets one; whoever wants less calls the parts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import block_end, block_start
from fastres.kernels import fused_conv_bn_relu as ops
from fastres.kernels._launch import channels_last, on
from fastres.kernels._library import applied, unwatched
from fastres.kernels._pointwise_plan import precision
from fastres.kernels._tape import Kept
from fastres.kernels.batch_norm import batch_norm_act, batch_norm_stats
from fastres.kernels.block_end import Branch, Folded
from fastres.kernels.folded_conv import Geometry

__all__ = ["Norm", "Options", "Part", "bottleneck"]

_convolve = torch.conv2d
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_fills = torch.are_deterministic_algorithms_enabled
_convolution_backward = torch.ops.aten.convolution_backward.default
_FOLDED = len(Folded._fields) - 2  # without a process group
_GIVEN = 14  # tensors of a backward that have not been made in forward, or the sign bits
_NONE = (None,) * len(Folded._fields)


class Norm(NamedTuple):
    """What of a norm is no tensor."""

    eps: float
    momentum: float


class Part(NamedTuple):
    """A convolution's weight, its norm's gamma and beta, and the running statistics and counter to be updated."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


class Options(NamedTuple):
    """What of a bottleneck is no tensor."""

    geometry: Geometry  # of the convolution in the middle
    norms: tuple[Norm, ...]
    stride: int  # of the downsample
    linked: bool  # whoever uses the result applies its ReLU to the gradient

    def first(self) -> Any:
        """The block end's branch."""
        return block_end._Options(self.norms[2].eps, True, 1, None, self.norms[1].eps, True, None)

    def second(self) -> Any:
        """The downsample, if there is one."""
        if len(self.norms) == 3:
            return None
        return block_end._Options(self.norms[3].eps, True, self.stride, None, 0.0, False, None)


_Found = tuple[Tensor | None, ...]


def _forward(o: Options, fast: bool, x: Tensor, low1: Tensor, low2: Tensor, *given: Any) -> _Found | None:
    """out and its sign bits, and what backward needs of what was made on the way: y1, its mean and variance, z1, y2 and
    its, the folded convolutions. None where the convolution in the middle does not give channels_last."""
    parts = [Part(*given[i : i + 6]) for i in range(0, len(given), 6)]
    updated = [
        (p.running_mean, p.running_var, n.momentum, p.batches) for p, n in zip(parts, o.norms, strict=True)
    ]
    one, two, three = parts[:3]
    y1, mean1, var1 = block_start.start_conv.at(fast)(x, low1, True, *updated[0])
    z1 = batch_norm_act.at(fast)(y1, mean1, var1, one.gamma, one.beta, o.norms[0].eps, True, True, None, None)
    y2 = _convolve(z1, low2, None, *o.geometry)
    if not channels_last(y2):
        return None
    mean2, var2 = batch_norm_stats.at(fast)(y2, *updated[1])
    front = (mean2, var2, two.gamma, two.beta, o.norms[1].eps)
    first = Branch(y2, three.weight, three.gamma, three.beta, o.norms[2].eps, True, 1, None, *front, True)
    folded = block_end.fold(first, *updated[2], fast)
    pair: tuple[Any, ...] = (x, None, None, None, 1)
    found: _Found = (y1, mean1, var1, z1, y2, mean2, var2, *folded[:_FOLDED])
    if len(parts) == 4:
        four = parts[3]
        second = Branch(x, four.weight, four.gamma, four.beta, o.norms[3].eps, True, o.stride)
        folded2 = block_end.fold(second, *updated[3], fast)
        pair = (None, x, folded2.wf, folded2.bias, o.stride)
        found += folded2[:_FOLDED]
    out, bits = ops.pointwise_end.at(fast)(y2, *front, True, folded.wf, folded.bias, *pair, None, True)
    return out, bits, *found


def _backward(
    o: Options, dtypes: tuple[torch.dtype, torch.dtype], fast: bool, dout: Tensor, bits: Tensor | None, x: Tensor,
    bits1: Tensor | None, low1: Tensor, low2: Tensor, gamma1: Tensor, beta1: Tensor, gamma2: Tensor, beta2: Tensor,
    weight3: Tensor, gamma3: Tensor, weight4: Tensor | None, gamma4: Tensor | None, y1: Tensor, mean1: Tensor,
    var1: Tensor, z1: Tensor, y2: Tensor, mean2: Tensor, var2: Tensor, *rest: Tensor,
) -> _Found:  # fmt: skip
    """The gradients of x, and of weight, gamma and beta of every part."""
    first, second, g = o.first(), o.second(), o.geometry
    folded2 = Folded(*(_NONE if second is None else rest[_FOLDED:]))
    end = block_end.gradients(
        dout, bits, None, y2, mean2, var2, gamma2, beta2, None, weight3, gamma3, Folded(*rest[:_FOLDED]),
        first, None if second is None else x, weight4, gamma4, folded2, second, fast,
    )  # fmt: skip
    dz1, dw2, _ = _convolution_backward(
        end.x, z1, low2, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, (True, True, False)
    )  # fmt: skip
    did, stride = (end.identity, 1) if second is None else (end.x2, second.stride)
    dx, dw1, dgamma1, dbeta1 = block_start.gradients(
        dz1, did, x, low1, gamma1, beta1, y1, mean1, var1, None, bits1, o.norms[0].eps, True, None, stride, fast
    )  # fmt: skip
    assert dw1 is not None
    return (
        dx, dw1.to(dtypes[0]), dgamma1, dbeta1, dw2.to(dtypes[1]), end.gamma0, end.beta0, end.weight, end.gamma,
        end.beta, end.weight2, end.gamma2, end.beta2,
    )  # fmt: skip


class _Made(NamedTuple):
    """What has been computed, without a gradient."""

    options: Options
    out: Any  # tensors
    bits: Any
    saved: _Found
    programs: Kept | None


class _Bottleneck(torch.autograd.Function):
    """Returns out and its sign bits."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        made: _Made = args[-1]
        ctx.mark_non_differentiable(made.bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made.saved)
        ctx.made = made.options, (args[1].dtype, args[4].dtype), made.programs
        return made.out, made.bits

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        saved, (options, dtypes, programs) = ctx.saved_tensors, ctx.made
        _, x, _, _, _, *vectors, weight3, gamma3, weight4, gamma4 = saved[:13]
        mean1, var1, _, _, mean2, var2 = saved[14:20]
        fast = unwatched(dout, *vectors, mean1, var1, mean2, var2, gamma3, gamma4)
        function = functools.partial(_backward, options, dtypes, fast)
        if programs is None or not fast:
            return *function(dout, *saved), None
        # The parameters' data may be others than in forward.
        second = None if weight4 is None else (weight4.shape, weight4.stride(), weight4.dtype, gamma4.dtype)
        first = weight3.shape, weight3.stride(), weight3.dtype, gamma3.dtype
        key = dout.stride(), dtypes, precision(x), _fills(), first, second, *(v.dtype for v in vectors)
        with on(x):
            return *programs(key, function, (dout, *saved), _GIVEN), None


_apply = applied(_Bottleneck)


def bottleneck(
    x: Tensor, bits: Tensor | None, low1: Tensor, low2: Tensor, parts: list[Part], options: Options,
    programs: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """A bottleneck, differentiable in all that it reads.

    Args:
        x: [N, Cin, H, W], channels_last.
        bits: sign bits of x, where its gradient is wanted with the ReLU that made x applied.
        low1, low2: the first two weights in the dtype of x, without a gradient.
        parts: [C, Cin, 1, 1], [C, C / groups, kh, kw] and [Cout, C, 1, 1] with their norms; and of a downsample.
        programs: of this function on tensors like these, in forward, or None where there are to be none.

    Returns:
        out [N, Cout, H', W'], channels_last, in the dtype of x; its sign bits, a row of bytes a pixel; and, without a
        gradient, y2 [N, C, H', W']. None where the convolution in the middle does not give channels_last: running
        statistics have been updated then.
    """
    flat = [t for p in parts for t in p]
    with torch.no_grad():
        fast = unwatched(x, *(v for p in parts for v in p[1:5]))
        function = functools.partial(_forward, options, fast)
        if programs is None or not fast:
            found = function(x, low1, low2, *flat)
        else:
            with on(x):
                found = programs("forward", function, (x, low1, low2, *flat), len(flat) + 3)
    if found is None:
        return None
    out, signs, *made = found
    one, two, three = parts[:3]
    four = (None, None, None) if len(parts) == 3 else parts[3][:3]
    saved = (
        None if options.linked else signs, x, bits, low1, low2, one.gamma, one.beta, two.gamma, two.beta, three.weight,
        three.gamma, *four[:2], *made,
    )  # fmt: skip
    if _saved_hooks(True) is not None:  # what comes back may lie otherwise
        programs = None
    result = _Made(options, out, signs, saved, programs)
    return *_apply(x, *one[:3], *two[:3], *three[:3], *four, result), made[4]
