"""What is not evaluated yet: a convolution with its norm and ReLU; and a block's output on its way to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres import _cpu, _folding, _inference
from fastres._batch_norm import (
    Moments,
    apply_norm,
    check_bn,
    check_norm,
    noted_batch_norm,
    statistics_of,
    untracked,
)
from fastres._casts import cast_weight
from fastres._convolution import own_geometry, plain_conv
from fastres._foldable import off, unseen
from fastres._routing import (
    BatchNorm,
    decide,
    own_conv3x3,
    recomputes,
    record,
)
from fastres.kernels import block_end as moment_form
from fastres.kernels import conv3x3 as conv_ops
from fastres.kernels import conv_native
from fastres.kernels._check import check_aten
from fastres.kernels._launch import channels_last
from fastres.kernels.recomputed_conv import recomputed_conv
from fastres.kernels.winograd import winograd as winograd_conv

__all__ = [
    "Linked",
    "Pending",
    "fits_norm",
    "fold_pending",
    "foldable",
    "materialize",
    "plain_conv",
    "pointwise",
]


class Pending:
    """``relu(bn(conv(x)))`` (or without ReLU), not evaluated yet: its consumer decides how.

    Each part is evaluated at most once, so the running statistics are updated once however many consumers there are.
    """

    __slots__ = ("_moments", "_partial", "_raw", "_tracked", "_y", "_z", "bn", "conv", "relu", "x")

    def __init__(self, x: Tensor | Pending | Linked, conv: nn.Module, bn: BatchNorm, relu: bool) -> None:
        self.x, self.conv, self.bn, self.relu = x, conv, bn, relu
        self._y: Tensor | None = None
        self._z: Tensor | None = None
        # What _z was made of, where that is at hand without a gradient of its own.
        self._raw: Tensor | None = None
        self._moments: Moments | None = None
        self._partial: conv_ops.Partial | None = None  # of the statistics, where the convolution made them
        self._tracked = False
        if not torch.compiler.is_compiling() and (
            bn.training or torch.is_grad_enabled() and _wants(*_own(conv))
        ):
            _folding.trained(conv)

    def raw(self) -> Tensor:
        """The convolution's output, before the norm."""
        if self._y is None:
            x, conv, own = self.x, self.conv, _conv3x3(self)
            if own is not None:
                self._y, self._partial = own
            elif isinstance(x, Pending) and x._raw is not None and recomputes() and plain_conv(conv):
                self._y = _conv_keeping_raw(x, conv)
            else:
                self._y = _convolve(conv, materialize(x), self.bn)
        return self._y

    def tensor(self) -> Tensor:
        """The activation itself."""
        if self._z is None:
            folded = fold_pending(self, self.relu)
            if isinstance(folded, Tensor):
                self._z = folded
                return folded
            y, s = self.raw(), self._moments
            if s is None and self._partial is not None:
                check_bn("batch_norm", y, self.bn)
                s = self.moments()
            if s is not None:
                self._z = apply_norm(y, self.bn, s, self.relu)
            else:
                self._z = noted_batch_norm(y, self.once(), self.relu, folded)
        return self._z

    def moments(self) -> Moments:
        """The norm's statistics, for a consumer that applies the norm itself (fused routes)."""
        if self._moments is None:
            y = self.raw()
            self._moments = statistics_of(y, self.once(), self._partial)
        return self._moments

    def once(self) -> BatchNorm:
        """The norm, with its running statistics for the first who asks: a second evaluation must not update them."""
        first, self._tracked = not self._tracked, True
        return self.bn if first or not self.bn.training else untracked(self.bn)


class Linked:
    """The output of a block that nothing but the next block will see: the gradient of ``out`` must come back with the
    block's last ReLU applied, which the next block does in passing (``kernels/block_start.py``)."""

    __slots__ = ("_tensor", "bits", "out")

    def __init__(self, out: Tensor, bits: Tensor) -> None:
        self.out, self.bits = out, bits
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """For whoever does not apply that ReLU: the same values, with a gradient like any other."""
        if self._tensor is None:
            self._tensor = moment_form.unmasked(self.out, self.bits)
        return self._tensor


def materialize(x: Tensor | Pending | Linked) -> Tensor:
    """A tensor, whether it was one, was pending or was on its way to the next block."""
    return x.tensor() if isinstance(x, Pending | Linked) else x


def _own(conv: nn.Module) -> tuple[Tensor | None, ...]:
    return conv._parameters.get("weight"), conv._parameters.get("bias")


def _wants(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def foldable(p: Pending) -> bool:
    """Whether a norm may be folded: it uses running statistics, and no gradient is wanted of anything before it."""
    if p.bn.training or p._y is not None or p._moments is not None:
        return False
    if torch.is_grad_enabled():
        q: Tensor | Pending | Linked = p
        while isinstance(q, Pending):
            if q.bn.training or _wants(*_own(q.conv), q.bn.weight, q.bn.bias):
                return False
            q = q.x
        if not isinstance(q, Tensor) or q.requires_grad:
            return False
    return not off()


def fits_norm(bn: BatchNorm) -> _inference.Check:
    def check(shape: tuple[int, ...], x: Tensor) -> None:
        n, c, h, w = shape
        check_norm("batch_norm", (n, c, h, w), x.device, bn)
        check_aten("batch_norm", x, bn)

    return check


def fold_pending(
    p: Pending, relu: bool, other: Tensor | None = None, own: bool = False, inner: bool = False
) -> Tensor | str:
    """The pending convolution with its norm folded in, or why not; empty where folding is no question."""
    if not foldable(p):
        return ""
    x = materialize(p.x)
    z = _inference.convolve(x, p.conv, p.bn, relu, other, own, fits_norm(p.bn), inner)
    if isinstance(z, str):
        unseen()
        return f"not folded: {z}"
    return z


def _weight(conv: nn.Conv2d) -> Tensor:
    weight: Tensor | None = conv._parameters.get("weight")
    return conv.weight if weight is None else weight  # a plain attribute, as sharding makes them


def pointwise(conv: nn.Module, c: int, dtype: torch.dtype) -> bool:
    """Whether a module is exactly a 1x1 convolution of this input that nothing else watches or changes."""
    if type(conv) is not nn.Conv2d or not plain_conv(conv):
        return False
    weight = _weight(conv)
    return (
        conv.kernel_size == (1, 1)
        and conv.padding == (0, 0)
        and conv.stride[0] == conv.stride[1]
        and conv.groups == 1
        and conv.in_channels == c
        and weight.shape[1] == c
        and weight.is_contiguous()  # a slice of another is not, and kernels read rows of C values
        and (weight.dtype == dtype or torch.is_autocast_enabled(weight.device.type))
    )


def _convolve(conv: nn.Module, x: Tensor, bn: BatchNorm) -> Tensor:
    """The module called, or its form on a CPU."""
    tile, weights = _cpu.winograd_tiles(conv, x, bn.training)
    if not (tile or weights):
        if _cpu.looped(conv, x, bn.training):
            assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
            record("conv", x, "native", "cpu: measured; weight gradient in compiled loops", (bn,))
            return conv_native.conv(x, conv.weight, conv.stride[0], conv.padding[0])
        if type(conv) is not nn.Conv2d or not plain_conv(conv) or torch.jit.is_tracing():
            return conv(x)
        assert not isinstance(conv.padding, str)
        weight = _weight(conv)
        low = cast_weight(weight, x.device)
        weight = weight if low is None else low
        # What the module would call.
        return torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert isinstance(conv, nn.Conv2d)
    record("conv", x, "winograd", _cpu.measured(conv, x, tile, weights), (bn,))
    return winograd_conv(x, conv.weight, tile, weights)


def _conv_keeping_raw(x: Pending, conv: nn.Module) -> Tensor:
    assert isinstance(conv, nn.Conv2d) and x._raw is not None
    s, bn = x.moments(), x.bn
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    low = cast_weight(conv.weight, x._raw.device)
    return recomputed_conv(
        x.tensor(),
        conv.weight if low is None else low,
        x._raw,
        s.mean,
        s.var,
        bn.weight,
        bn.bias,
        bn.eps,
        geometry,
    )


def _conv3x3(p: Pending) -> tuple[Tensor, conv_ops.Partial | None] | None:
    """The 3x3 convolution of a pending input by this package's kernels, where they were asked for and serve: the output
    and its partial statistics. The input's norm and ReLU are applied while loading."""
    if not own_conv3x3() or getattr(p.conv, "kernel_size", None) != (3, 3):
        return None
    front = p.x if isinstance(p.x, Pending) and p.x.relu and p.x._z is None else None
    if front is not None and front.bn.group is not None and front.bn.training:
        front = None  # its gradient needs sums over the group between the two halves of a backward
    x = materialize(p.x) if front is None else front.raw()
    if x.dim() != 4 or not x.numel() or not channels_last(x):
        return None
    geometry = own_geometry(p.conv, x)
    if geometry is None:
        return None
    route, reason = decide("conv3x3", x, (), (p.bn,))
    if route == "aten":
        return None
    prologue = conv_ops.Prologue()
    if front is not None:
        check_bn("batch_norm", x, front.bn)
        s, bn = front.moments(), front.bn
        prologue = conv_ops.Prologue(s.mean, s.var, bn.weight, bn.bias, bn.eps, True)
    record("conv3x3", x, route, f"{reason}; own 3x3 kernels", (p.bn,))
    assert isinstance(p.conv, nn.Conv2d)
    batch = front is not None and front.bn.training
    return conv_ops.conv3x3(x, p.conv.weight, geometry, prologue, batch, p.bn.training)
