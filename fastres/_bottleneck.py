"""When a bottleneck in training is evaluated as one differentiable function (``kernels/bottleneck.py``), and doing it:
in the usual case (``_whole``), with the moment form at both ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres._pending import Linked, Pending, pointwise
from fastres._routing import decide, moments_pay, recomputes, record, recording
from fastres._whole import Block, Verdict, apart, check, evaluate, fits, geometry, norms, verdict, weight_of
from fastres.kernels.bottleneck import Options, bottleneck

__all__ = ["whole_bottleneck"]


def _result(b: Block) -> tuple[int, int] | None:
    """Height and width of the result, where the convolutions fit each other and the moment form pays at both ends."""
    front, middle, end = b.branch
    conv1, conv2, conv3 = front.conv, middle.conv, end.conv
    (n, c, h, w), dtype = b.x.shape, b.x.dtype
    if not pointwise(conv1, c, dtype) or conv1.stride != (1, 1):
        return None
    assert isinstance(conv2, nn.Conv2d)
    weight1, weight2, weight3 = map(weight_of, b.branch)
    mid, out = weight2.shape[0], weight3.shape[0]
    if weight2.shape[1:] != (weight1.shape[0] // conv2.groups, *conv2.kernel_size):
        return None
    if weight2.dtype != dtype and not torch.is_autocast_enabled(b.x.device.type):
        return None
    if not pointwise(conv3, mid, dtype) or conv3.stride != (1, 1):
        return None
    _, _, height, width = geometry(middle).out(b.x.shape, weight2.shape)
    rows, kind, shortcut, deepest = n * height * width, "block_end", tuple(b.x.shape), mid
    if b.down is not None:
        if not pointwise(b.down.conv, c, dtype):
            return None
        kind, deepest = "pair_end", max(mid, c)
        shortcut = geometry(b.down).out(b.x.shape, weight_of(b.down).shape)
    if shortcut != (n, out, height, width) or rows < 4 * deepest:
        return None
    itemsize = b.x.element_size()
    pays = moments_pay(n * h * w, c, weight1.shape[0], "block_start", itemsize)
    return (height, width) if pays and moments_pay(rows, out, mid, kind, itemsize) else None


def _judge(b: Block, linked: bool) -> Verdict | None:
    size = _result(b)
    if size is None:
        return None
    route, reason = decide("block_start", b.x, (), (b.branch[0].bn,))
    if route == "aten":
        return None
    h, w = b.x.shape[2:]
    ends = (("add_relu", size),) * (len(b.parts) - 2)
    check(b, (("batch_norm", (h, w)), ("batch_norm", size), *ends))
    stride = 1 if b.down is None else geometry(b.down).stride[0]
    linked = linked and weight_of(b.branch[2]).shape[0] > 1
    return Verdict((route,), (reason,), Options(geometry(b.branch[1]), norms(b), stride, linked), None)


def whole_bottleneck(
    branch: Pending, identity: Tensor | Pending | Linked, linked: bool
) -> Tensor | Linked | None:  # fmt: skip
    """A bottleneck's result, or None where its parts have to be evaluated one after the other.

    Args:
        branch: the three convolutions with their norms.
        identity: the block's input, or its downsample.
        linked: whether nothing but the next block will see the result.
    """
    b = apart(branch, identity, 3)
    if b is None or recomputes() or not fits(b):
        return None
    found = verdict(b, linked, _judge)
    made = None if found is None else evaluate(bottleneck, b, found, (False, False, True, True))
    if found is None or made is None:
        return None
    out, signs, _, y2 = made
    if recording():
        (route,), (reason,) = found.routes, found.reasons
        record("batch_norm", b.x, route, f"{reason}; block start", (b.branch[0].bn,))
        record("add_relu", y2, route, f"{reason}; moment form", (branch.bn,))
    return Linked(out, signs) if found.options.linked else out
