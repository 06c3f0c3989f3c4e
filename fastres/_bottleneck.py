"""When a bottleneck in training is evaluated as one differentiable function (``kernels/bottleneck.py``), and doing it.

It takes the usual case: norms with gamma and beta that use the statistics of this batch and no process group, a
gradient for everything, a plain convolution by PyTorch in the middle, the moment form at both ends. All else, and
whatever has to raise, is left to the parts (``_block_end``), which give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres._batch_norm import check_norm, recomputing, running, tracking
from fastres._casts import low_weight
from fastres._pending import Linked, Pending, plain_conv, pointwise
from fastres._routing import (
    decide,
    moments_pay,
    own_conv3x3,
    recomputes,
    record,
    recording,
    settings,
    transformed,
)
from fastres.kernels._check import PLAIN
from fastres.kernels._launch import SHAPES, channels_last
from fastres.kernels._tape import Kept
from fastres.kernels.bottleneck import Norm, Options, Part, bottleneck
from fastres.kernels.folded_conv import Geometry

__all__ = ["whole"]


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


def _part(p: Pending) -> Part:
    mean, var, _, batches = running(*tracking(p.once()))
    return Part(_weight(p), p.bn.weight, p.bn.bias, mean, var, batches)  # type: ignore[arg-type]


class _Verdict(NamedTuple):
    """On a bottleneck of certain sizes under certain settings."""

    route: str
    reason: str
    options: Options
    programs: Kept | None


# By all that they depend on, the state of the modules apart. None: by parts.
_verdicts: dict[Any, _Verdict | None] = {}
_PROGRAMS = 8  # for a verdict: a forward, and a backward for each layout in which the gradient came


def _about(v: Tensor | None) -> tuple[Any, ...] | None:
    return None if v is None else (v.shape, v.dtype, v.device)


def _key(p: _Parts, linked: bool) -> tuple[Any, ...] | None:
    """What a verdict depends on; None where that is another at every step, or somebody watches the choice."""
    key: list[Any] = [*settings(p.x), linked, recomputing(), p.bits is None, p.x.shape, p.x.dtype, p.x.device]
    if key[0] is None:
        return None
    for q in p.all:
        conv: Any = q.conv
        bn, weight = q.bn, _weight(q)
        if bn.momentum is None:  # the cumulative average
            return None
        key += (
            conv.stride, conv.padding, conv.dilation, conv.groups, conv.kernel_size, conv.in_channels, weight.shape,
            weight.stride(), weight.dtype, bn.eps, bn.momentum,
        )  # fmt: skip
        key += map(_about, bn[:5])
    return tuple(key)


def _judge(p: _Parts, linked: bool) -> _Verdict | None:
    size = _result(p)
    if size is None:
        return None
    route, reason = decide("block_start", p.x, (), (p.front.bn,))
    if route == "aten":
        return None
    _check(p.all, p.x, size)
    norms = tuple(Norm(q.bn.eps, tracking(q.bn)[1]) for q in p.all)
    stride = 1 if p.down is None else _geometry(p.down).stride[0]
    options = Options(_geometry(p.middle), norms, stride, linked and _weight(p.branch).shape[0] > 1)
    return _Verdict(route, reason, options, Kept(_PROGRAMS))


def _verdict(p: _Parts, linked: bool) -> _Verdict | None:
    if not all(plain_conv(q.conv) for q in p.all):
        return None
    key = _key(p, linked)
    if key is None:
        found = _judge(p, linked)
        return None if found is None else found._replace(programs=None)
    if key in _verdicts:
        return _verdicts[key]
    found = _judge(p, linked)
    if len(_verdicts) >= SHAPES:
        _verdicts.pop(next(iter(_verdicts)), None)
    _verdicts[key] = found
    return found


def whole(
    branch: Pending, identity: Tensor | Pending | Linked, linked: bool
) -> Tensor | Linked | None:  # fmt: skip
    """A bottleneck's result, or None where its parts have to be evaluated one after the other. So it is also where the
    convolution in the middle does not give channels_last; only the first norm's statistics have been updated then, and
    will not be again (``Pending.once``).

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
    verdict = _verdict(p, linked)
    if verdict is None:
        return None
    x, (route, reason, options, programs) = p.x, verdict
    low1, low2 = low_weight(_weight(p.front), x), low_weight(_weight(p.middle), x)
    parts = [_part(q) for q in p.all]
    made = bottleneck(x, p.bits, low1, low2, parts, options, programs)
    if made is None:
        for q in p.all[1:]:
            q._tracked = False  # of which nothing has been evaluated
        return None
    out, signs, y2 = made
    if recording():
        record("batch_norm", x, route, f"{reason}; block start", (p.front.bn,))
        record("add_relu", y2, route, f"{reason}; moment form", (branch.bn,))
    return Linked(out, signs) if options.linked else out
