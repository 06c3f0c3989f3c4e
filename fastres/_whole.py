"""What evaluating a residual block in training as one differentiable function takes (``kernels/_whole.py``).

That is for the usual case: norms with gamma and beta that use the statistics of this batch and no process group, a
gradient for everything, plain convolutions. Which block it is for, and whether its forms pay, is decided once for
tensors of the same kind under the same settings (``verdict``). All else, and whatever has to raise, is left to the
parts (``_block_end``), which give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres._batch_norm import check_norm, recomputing, tracking
from fastres._casts import low_weight
from fastres._pending import Linked, Pending, plain_conv
from fastres._routing import own_conv3x3, settings, transformed
from fastres.kernels._check import PLAIN
from fastres.kernels._launch import channels_last
from fastres.kernels._tape import Kept
from fastres.kernels._whole import Norm, OtherLayout, Part, Whole
from fastres.kernels.folded_conv import Geometry

__all__ = ["VERDICTS", "Block", "Verdict", "apart", "check", "evaluate", "fits", "geometry", "norms", "verdict",
           "weight_of"]  # fmt: skip


class Block(NamedTuple):
    """A block, not evaluated yet, whose branch and identity read the same tensor."""

    parts: tuple[Pending, ...]  # from the input to the end, and then the downsample
    branch: tuple[Pending, ...]  # those without it
    down: Pending | None
    x: Tensor
    bits: Tensor | None  # sign bits of x, where its gradient is wanted with the ReLU that made it applied


class Verdict(NamedTuple):
    """How blocks of certain sizes are evaluated under certain settings."""

    routes: tuple[str, ...]
    reasons: tuple[str, ...]
    options: Any
    programs: Kept | None


# By all that they depend on, the state of the modules apart. None: by parts.
VERDICTS: dict[Any, Verdict | None] = {}
_MOST = 1024
_PROGRAMS = 8  # for a verdict: a forward, and a backward for each layout in which the gradient came


def apart(branch: Pending, identity: Tensor | Pending | Linked, convs: int) -> Block | None:
    """The parts of a block of this many convolutions with ReLU between them; None for any other."""
    parts = [branch]
    while isinstance(parts[0].x, Pending):
        parts.insert(0, parts[0].x)
        if len(parts) > convs or not parts[0].relu:
            return None
    down = identity if isinstance(identity, Pending) else None
    source = parts[0].x
    if len(parts) != convs or (identity if down is None else down.x) is not source:
        return None
    x, bits = (source.out, source.bits) if isinstance(source, Linked) else (source, None)
    branch_ = tuple(parts)
    return Block(branch_ if down is None else (*branch_, down), branch_, down, x, bits)


def weight_of(p: Pending) -> Tensor:
    return p.conv._parameters["weight"]  # type: ignore[return-value]


def geometry(p: Pending) -> Geometry:
    """Of a plain convolution."""
    conv = p.conv
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


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
        and plain_conv(p.conv)
    )


def _plain_input(x: Tensor) -> bool:
    """Whether the kernels can read the block's input, and a gradient of it is wanted."""
    if type(x) not in PLAIN or x.dim() != 4 or not x.numel() or not x.requires_grad or not channels_last(x):
        return False
    device = x.device.type
    return not torch.is_autocast_enabled(device) or x.dtype == torch.get_autocast_dtype(device)


def fits(b: Block) -> bool:
    """Whether the block is the usual case, and nothing has to see its parts."""
    if not torch.is_grad_enabled() or own_conv3x3():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    return _plain_input(b.x) and all(map(_usual, b.parts))


def _key(b: Block, linked: bool) -> tuple[Any, ...] | None:
    """What a verdict depends on; None where that is another at every step, or somebody watches the choice."""
    x = b.x
    key: list[Any] = [*settings(x), linked, recomputing(), b.bits is None, b.down is None]
    if key[0] is None:
        return None
    key += (len(b.branch), x.shape, x.dtype, x.device)
    for p in b.parts:
        conv: Any = p.conv
        bn, weight = p.bn, weight_of(p)
        if bn.momentum is None:  # the cumulative average
            return None
        key += (
            conv.stride, conv.padding, conv.dilation, conv.groups, conv.kernel_size, conv.in_channels, weight.shape,
            weight.stride(), weight.dtype, bn.eps, bn.momentum,
        )  # fmt: skip
        key += [None if v is None else (v.shape, v.dtype, v.device) for v in bn[:5]]
    return tuple(key)


def verdict(b: Block, linked: bool, judge: Callable[[Block, bool], Verdict | None]) -> Verdict | None:
    """What ``judge`` says of such a block, asked once, with programs to be kept; None: by parts."""
    key = _key(b, linked)
    if key is None:
        return judge(b, linked)
    if key in VERDICTS:
        return VERDICTS[key]
    found = judge(b, linked)
    if found is not None:
        found = found._replace(programs=Kept(_PROGRAMS))
    if len(VERDICTS) >= _MOST:
        VERDICTS.pop(next(iter(VERDICTS)), None)
    VERDICTS[key] = found
    return found


def norms(b: Block) -> tuple[Norm, ...]:
    return tuple(Norm(p.bn.eps, tracking(p.bn)[1]) for p in b.parts)


def check(b: Block, sizes: tuple[tuple[str, tuple[int, int]], ...]) -> None:
    """The norms against what they will see: for every part the operation that is named, and height and width."""
    for p, (op, size) in zip(b.parts, sizes, strict=True):
        check_norm(op, (b.x.shape[0], weight_of(p).shape[0], *size), b.x.device, p.bn)


def _part(p: Pending, x: Tensor, low: bool, tracks: bool) -> Part:
    """``tracks``: running statistics are updated, where there are any, as by ``tracking``."""
    bn, weight, p._tracked = p.bn, weight_of(p), True
    mean, var, batches = bn.running_mean, bn.running_var, bn.num_batches_tracked
    if not tracks or mean is None or var is None:
        mean = var = batches = None
    return Part(low_weight(weight, x) if low else weight, bn.weight, bn.bias, mean, var, batches)  # type: ignore[arg-type]


def evaluate(
    whole: Whole, b: Block, found: Verdict, folded: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The result, its sign bits, and what the first two convolutions gave; None where a convolution's result is not in
    channels_last. The parts are evaluated again then, but update no statistics that have been updated here
    (``Pending.once``). ``folded``: which parts' weights are folded with their norms, and not read as they are."""
    tracks = not recomputing()
    parts = [_part(p, b.x, not f, tracks) for p, f in zip(b.parts, folded, strict=False)]
    try:
        return whole(found.options, b.x, b.bits, [*map(weight_of, b.parts)], parts, found.programs)
    except OtherLayout as other:
        for p in b.parts[other.updated :]:
            p._tracked = False
        return None
