"""When a bottleneck in training is evaluated as one differentiable function (``kernels/bottleneck.py``), and doing it.

It takes the usual case: norms with gamma and beta that use the statistics of this batch and no process group, a
gradient for everything, a plain convolution by PyTorch in the middle, the moment form at both ends. All else, and
whatever has to raise, is left to the parts (``_block_end``), which give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres._batch_norm import Running, check_norm, running, tracking
from fastres._casts import low_weight
from fastres._pending import Linked, Pending, plain_conv, pointwise
from fastres._routing import decide, moments_pay, own_conv3x3, recomputes, record, transformed
from fastres.kernels import block_end as moment_form
from fastres.kernels._check import PLAIN
from fastres.kernels._launch import channels_last
from fastres.kernels._library import unwatched
from fastres.kernels.batch_norm import batch_norm_act, batch_norm_stats
from fastres.kernels.block_start import start_conv
from fastres.kernels.bottleneck import Made, bottleneck
from fastres.kernels.folded_conv import Geometry

__all__ = ["whole"]

_convolve = torch.conv2d


class _Parts(NamedTuple):
    """A bottleneck, not evaluated yet, whose branch and identity read the same tensor."""

    front: Pending
    middle: Pending
    branch: Pending
    down: Pending | None
    x: Tensor
    bits: Tensor | None  # sign bits of x, where its gradient is wanted with the ReLU that made it applied

    @property
    def all(self) -> tuple[Pending, ...]:
        first = self.front, self.middle, self.branch
        return first if self.down is None else (*first, self.down)


def _parts(branch: Pending, identity: Tensor | Pending | Linked) -> _Parts | None:
    middle, down = branch.x, identity if isinstance(identity, Pending) else None
    front = middle.x if isinstance(middle, Pending) else None
    if not isinstance(middle, Pending) or not isinstance(front, Pending) or not (front.relu and middle.relu):
        return None
    source = front.x
    if isinstance(source, Pending) or (identity if down is None else down.x) is not source:
        return None
    x, bits = (source.out, source.bits) if isinstance(source, Linked) else (source, None)
    return _Parts(front, middle, branch, down, x, bits)


def _weight(p: Pending) -> Tensor:
    return p.conv._parameters["weight"]  # type: ignore[return-value]


def _usual(p: Pending) -> bool:
    """Whether nothing of a part has been evaluated, and all of it is to be trained by the statistics of this batch."""
    bn = p.bn
    weight: Tensor | None = p.conv._parameters.get("weight")
    return (
        bn.training
        and bn.group is None
        and not bn.skip_nonfinite
        and not (p._tracked or p._y is not None or p._z is not None or p._moments is not None)
        and bn.weight is not None
        and bn.weight.requires_grad
        and bn.bias is not None
        and bn.bias.requires_grad
        and weight is not None
        and type(weight) in PLAIN
        and weight.requires_grad
    )


def _plain_input(x: Tensor) -> bool:
    """Whether the moment form can read the block's input, and a gradient of it is wanted."""
    if type(x) not in PLAIN or x.dim() != 4 or not x.numel() or not x.requires_grad or not channels_last(x):
        return False
    device = x.device.type
    return not torch.is_autocast_enabled(device) or x.dtype == torch.get_autocast_dtype(device)


def _geometry(p: Pending) -> Geometry:
    """Of a plain convolution."""
    conv = p.conv
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def _result(p: _Parts) -> tuple[int, int] | None:
    """Height and width of the result, where the convolutions are plain and fit each other, and the moment form pays at
    both ends; else None."""
    conv1, conv2, conv3 = p.front.conv, p.middle.conv, p.branch.conv
    (n, c, h, w), dtype = p.x.shape, p.x.dtype
    if not (pointwise(conv1, c, dtype) and plain_conv(conv2)) or conv1.stride != (1, 1):
        return None
    assert isinstance(conv2, nn.Conv2d)
    weight1, weight2, weight3 = _weight(p.front), _weight(p.middle), _weight(p.branch)
    mid, out = weight2.shape[0], weight3.shape[0]
    if weight2.shape[1:] != (weight1.shape[0] // conv2.groups, *conv2.kernel_size):
        return None
    if weight2.dtype != dtype and not torch.is_autocast_enabled(p.x.device.type):
        return None
    if not pointwise(conv3, mid, dtype) or conv3.stride != (1, 1):
        return None
    _, _, height, width = _geometry(p.middle).out(p.x.shape, weight2.shape)
    rows, kind, shortcut, deepest = n * height * width, "block_end", tuple(p.x.shape), mid
    if p.down is not None:
        if not pointwise(p.down.conv, c, dtype):
            return None
        kind, deepest = "pair_end", max(mid, c)
        shortcut = _geometry(p.down).out(p.x.shape, _weight(p.down).shape)
    if shortcut != (n, out, height, width) or rows < 4 * deepest:
        return None
    itemsize = p.x.element_size()
    pays = moments_pay(n * h * w, c, weight1.shape[0], "block_start", itemsize)
    return (height, width) if pays and moments_pay(rows, out, mid, kind, itemsize) else None


def _check(parts: tuple[Pending, ...], x: Tensor, size: tuple[int, int]) -> None:
    """The norms against what they will see."""
    n, _, h, w = x.shape
    for i, p in enumerate(parts):
        op = "batch_norm" if i < 2 else "add_relu"
        check_norm(op, (n, _weight(p).shape[0], *((h, w) if i == 0 else size)), x.device, p.bn)


def _running(p: Pending) -> Running:
    return running(*tracking(p.once()))


def whole(
    branch: Pending, identity: Tensor | Pending | Linked, linked: bool
) -> Tensor | Linked | None:  # fmt: skip
    """A bottleneck's result, or None where its parts have to be evaluated one after the other.

    Args:
        branch: the three convolutions with their norms.
        identity: the block's input, or its downsample.
        linked: whether nothing but the next block will see the result.
    """
    p = _parts(branch, identity)
    if p is None or not torch.is_grad_enabled() or own_conv3x3() or recomputes():
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return None
    if not _plain_input(p.x) or not all(map(_usual, p.all)):
        return None
    size = _result(p)
    if size is None:
        return None
    x, front = p.x, p.front
    route, reason = decide("block_start", x, (), (front.bn,))
    if route == "aten":
        return None
    _check(p.all, x, size)
    made = _make(p, linked and _weight(branch).shape[0] > 1)
    if made is None:
        return None
    record("batch_norm", x, route, f"{reason}; block start", (front.bn,))
    record("add_relu", made.first.x, route, f"{reason}; moment form", (branch.bn,))
    gamma, beta = front.bn.weight, front.bn.bias
    assert gamma is not None and beta is not None
    out, signs = bottleneck(x, _weight(front), gamma, beta, _weight(p.middle), made)
    return Linked(out, signs) if made.linked else out


def _make(p: _Parts, linked: bool) -> Made | None:
    """Evaluate a bottleneck up to its end. None where the convolution in the middle does not give channels_last; the
    parts are evaluated again then, but update no statistics that have been updated here (``Pending.once``)."""
    x, bn1, bn2, bn3, geometry = p.x, p.front.bn, p.middle.bn, p.branch.bn, _geometry(p.middle)
    low1, low2 = low_weight(_weight(p.front), x), low_weight(_weight(p.middle), x)
    second = folded2 = None
    with torch.no_grad():
        fast = unwatched(x, *(v for q in p.all for v in q.bn[:4]))
        y1, mean1, var1 = start_conv.at(fast)(x, low1, True, *_running(p.front))
        z1 = batch_norm_act.at(fast)(y1, mean1, var1, bn1.weight, bn1.bias, bn1.eps, True, True, None, None)
        y2 = _convolve(z1, low2, None, *geometry)
        if not channels_last(y2):
            return None
        mean2, var2 = batch_norm_stats.at(fast)(y2, *_running(p.middle))
        mine = (_weight(p.branch), bn3.weight, bn3.bias, bn3.eps, True, 1, None)
        first = moment_form.Branch(y2, *mine, mean2, var2, bn2.weight, bn2.bias, bn2.eps, True)
        folded = moment_form.fold(first, *_running(p.branch), fast)
        if p.down is not None:
            bn = p.down.bn
            second = moment_form.Branch(
                x, _weight(p.down), bn.weight, bn.bias, bn.eps, True, _geometry(p.down).stride[0]
            )
            folded2 = moment_form.fold(second, *_running(p.down), fast)
    start = (low1, y1, mean1, var1, bn1.eps, p.bits, z1, low2, geometry)
    return Made(*start, first, folded, second, folded2, linked, fast)
