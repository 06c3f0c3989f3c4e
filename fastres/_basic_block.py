"""When a block of two 3x3 convolutions in training is evaluated as one differentiable function
(``kernels/basic_block.py``), and doing it: in the usual case (``_whole``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres._pending import Linked, Pending, pointwise
from fastres._routing import decide, downsample_pays, record, recording
from fastres._whole import Block, Verdict, apart, check, evaluate, fits, geometry, norms, verdict, weight_of
from fastres.kernels.basic_block import Options, basic_block

__all__ = ["whole_basic_block"]


def _sizes(b: Block) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of what the convolutions give, where they fit each other and the identity."""
    shape, dtype = tuple(b.x.shape), b.x.dtype
    found = []
    for p in b.branch:
        conv, weight = p.conv, weight_of(p)
        assert isinstance(conv, nn.Conv2d)
        if weight.dim() != 4 or weight.shape[1:] != (shape[1] // conv.groups, *conv.kernel_size):
            return None
        if weight.dtype != dtype and not torch.is_autocast_enabled(b.x.device.type):
            return None
        shape = tuple(geometry(p).out(shape, weight.shape))
        if min(shape) < 1:
            return None
        found.append(shape)
    identity = tuple(b.x.shape)
    if b.down is not None:
        if not pointwise(b.down.conv, b.x.shape[1], dtype):
            return None
        identity = tuple(geometry(b.down).out(b.x.shape, weight_of(b.down).shape))
    return (found[0], found[1]) if identity == shape else None


def _downsample(b: Block, shape: tuple[int, ...]) -> str:
    """Why the downsample does not take its moment form, as ``_moment_forms.downsample_end`` says it; else empty."""
    n, out, h, w = shape
    assert b.down is not None
    stride = geometry(b.down).stride[0]
    if out == 1 or n * h * w < 4 * b.x.shape[1]:
        return "no moment form of the downsample: fewer than four rows a channel, or one channel"
    if not downsample_pays(b.x, out, stride, True, stride > 1):
        return "moment form: off, or does not pay by the model or the tuning table"
    return ""


def _judge(b: Block, linked: bool) -> Verdict | None:
    sizes = _sizes(b)
    if sizes is None:
        return None
    (first, last), bns, x = sizes, [p.bn for p in b.parts], b.x
    y1, y2 = (x.new_empty(s).contiguous(memory_format=torch.channels_last) for s in sizes)
    route, reason = decide("batch_norm", y1, (), (bns[0],))
    note = "" if b.down is None else _downsample(b, last)
    if b.down is not None and not note:
        end, why = decide("downsample_end", x, (), tuple(bns[1:]))
        note = "downsample in moment form"
    else:
        end, why = decide("add_relu", y2, (y2,), tuple(bns[1:]))
    if "aten" in (route, end):
        return None
    ends = (("add_relu", (last[2], last[3])),) * (len(b.parts) - 1)
    check(b, (("batch_norm", (first[2], first[3])), *ends))
    stride = 1 if b.down is None else geometry(b.down).stride[0]
    moments = note == "downsample in moment form"
    options = Options(geometry(b.branch[0]), geometry(b.branch[1]), norms(b), stride, moments)
    return Verdict((route, end), (reason, f"{why}; {note}" if note else why), options, None)


def whole_basic_block(branch: Pending, identity: Tensor | Pending | Linked) -> Tensor | None:
    """The block's result, or None where its parts have to be evaluated one after the other.

    Args:
        branch: the two convolutions with their norms.
        identity: the block's input, or its downsample.
    """
    b = apart(branch, identity, 2)
    if b is None or b.bits is not None or not fits(b):
        return None
    found = verdict(b, False, _judge)
    made = None if found is None else evaluate(basic_block, b, found, (False, False, found.options.moments))
    if found is None or made is None:
        return None
    out, _, y1, y2 = made
    if recording():
        (route, end), (reason, why) = found.routes, found.reasons
        record("batch_norm", y1, route, reason, (b.branch[0].bn,))
        bns = (branch.bn,) if b.down is None or found.options.moments else (branch.bn, b.down.bn)
        record("add_relu", y2, end, why, bns)
    return out
