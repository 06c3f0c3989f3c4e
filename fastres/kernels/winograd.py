"""Winograd's form of a 3x3 convolution, stride 1, padding 1, on a CPU: matrix products of ATen.

A 2x2 tile of the output takes 36 multiplications a channel pair directly and 16 here:

    forward     Y = A^T [ (B^T d B) . (G g G^T) ] A         d: 4x4 patch of the input, g: the 3x3 weights, Y: 2x2
                the sum over input channels turns the 16 products . into 16 matrix products [tiles, C] [C, N]
    backward    dx  the same with the weights turned by 180 degrees and transposed; that turn only permutes the 16
                matrices G g G^T
                dg = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G
    saved       x and the weight, as the convolution itself
    rounding    float32 throughout. The transforms only add; the products' sums are 9 times shorter than the direct
                form's. Measured against float64 it is the more exact of the two (docs/CPU.md)
    traffic     the transformed patches are four times the input; they are made for a few images at a time, so that
                they stay in the cache, in buffers that are reused
    inference   ``winograd_folded``: the 16 matrices of a folded weight are made once, and bias, addition and ReLU
                follow in place
    source      A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, F(2x2, 3x3)

Sums are taken in a fixed order: two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastres.kernels._library import Traffic, register

__all__ = ["winograd", "winograd_folded", "winograd_weight"]

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_TURNED = (3, 1, 2, 0)  # rows of G on a kernel read backwards
_CACHED = 1 << 20  # values of transformed patches at a time: 4 MB
_TILES = 256  # and at least so many rows in a product


def _transform(like: Tensor, turned: bool = False) -> Tensor:
    """[16, 9]: from a 3x3 kernel to G g G^T, or that of the kernel turned by 180 degrees."""
    g = like.new_tensor(_G)
    g = g[list(_TURNED)] if turned else g
    return torch.kron(g, g)


def _weights(weight: Tensor, turned: bool) -> Tensor:
    """[N, C, 3, 3] to [16, N, C]."""
    n, c = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(9, n * c)
    return (_transform(weight, turned) @ taps).view(16, n, c)


def _combine(v: Tensor, out: Tensor) -> None:
    """B^T along the first of the four rows."""
    torch.sub(v[0], v[2], out=out[0])
    torch.add(v[1], v[2], out=out[1])
    torch.sub(v[2], v[1], out=out[2])
    torch.sub(v[1], v[3], out=out[3])


class _Tiles:
    """The images of a channels_last batch, cut into tiles of 2x2 a few images at a time."""

    def __init__(self, x: Tensor, widest: int) -> None:
        self.b, self.c, self.h, self.w = x.shape
        self.down, self.across = (self.h + 1) // 2, (self.w + 1) // 2
        tiles = self.down * self.across
        self.images = min(self.b, max(-(-_TILES // tiles), _CACHED // (16 * tiles * widest), 1))
        self.tiles = tiles * self.images  # rows of the largest step
        self.even = (2 * self.down, 2 * self.across) == (self.h, self.w)

    def steps(self) -> Iterator[tuple[slice, int]]:
        """The images of each step and their tiles."""
        for i in range(0, self.b, self.images):
            last = min(i + self.images, self.b)
            yield slice(i, last), (last - i) * self.down * self.across

    def shape(self, tiles: int) -> tuple[int, int, int]:
        return tiles // (self.down * self.across), self.down, self.across


class _Patches:
    """B^T d B of the 4x4 patches around each tile."""

    def __init__(self, x: Tensor, t: _Tiles) -> None:
        self.x, self.t = x.permute(0, 2, 3, 1), t
        c = x.shape[1]
        self.padded = x.new_zeros(t.images, 2 * t.down + 2, 2 * t.across + 2, c)
        self.half, self.out = x.new_empty(16 * t.tiles * c), x.new_empty(16 * t.tiles * c)

    def __call__(self, images: slice, tiles: int) -> Tensor:
        """[16, tiles, C]."""
        t, p, c = self.t, self.padded, self.t.c
        p = p[: images.stop - images.start]
        p[:, 1 : t.h + 1, 1 : t.w + 1].copy_(self.x[images])
        s, shape = p.stride(), (4, 4, *t.shape(tiles), c)
        patches = p.as_strided(shape, (s[1], s[2], s[0], 2 * s[1], 2 * s[2], 1))
        half, out = (v[: 16 * tiles * c].view(shape) for v in (self.half, self.out))
        _combine(patches, half)
        _combine(half.transpose(0, 1), out.transpose(0, 1))
        return out.view(16, tiles, c)


class _Outputs:
    """A^T m A of each tile, written to the output."""

    def __init__(self, out: Tensor, t: _Tiles) -> None:
        self.out, self.t = out.permute(0, 2, 3, 1), t
        self.half = out.new_empty(8 * t.tiles * out.shape[1])
        self.spare = None if t.even else out.new_empty(t.images, 2 * t.down, 2 * t.across, out.shape[1])

    def __call__(self, m: Tensor, images: slice, tiles: int) -> None:
        t, n = self.t, m.shape[2]
        count = images.stop - images.start
        m = m.view(4, 4, tiles * n)
        half = self.half[: 8 * tiles * n].view(2, 4, tiles * n)
        torch.add(m[0], m[1], out=half[0]).add_(m[2])
        torch.sub(m[1], m[2], out=half[1]).sub_(m[3])
        half = half.view(2, 4, *t.shape(tiles), n)
        y = self.out[images] if self.spare is None else self.spare[:count]
        y = y.view(count, t.down, 2, t.across, 2, n)
        for i in range(2):
            torch.add(half[i, 0], half[i, 1], out=y[:, :, i, :, 0]).add_(half[i, 2])
            torch.sub(half[i, 1], half[i, 2], out=y[:, :, i, :, 1]).sub_(half[i, 3])
        if self.spare is not None:
            self.out[images].copy_(self.spare[:count, : t.h, : t.w])


class _Gradients:
    """A dY A^T of each tile."""

    def __init__(self, dy: Tensor, t: _Tiles) -> None:
        self.dy, self.t = dy.permute(0, 2, 3, 1), t
        n = dy.shape[1]
        self.spare = None if t.even else dy.new_zeros(t.images, 2 * t.down, 2 * t.across, n)
        self.half, self.out = dy.new_empty(8 * t.tiles * n), dy.new_empty(16 * t.tiles * n)

    def __call__(self, images: slice, tiles: int) -> Tensor:
        """[16, tiles, N]."""
        t, n, count = self.t, self.dy.shape[3], images.stop - images.start
        dy = self.dy[images]
        if self.spare is not None:
            dy = self.spare[:count]
            dy[:, : t.h, : t.w].copy_(self.dy[images])
        d = dy.view(count, t.down, 2, t.across, 2, n)
        half = self.half[: 8 * tiles * n].view(4, 2, *t.shape(tiles), n)
        out = self.out[: 16 * tiles * n].view(4, 4, *t.shape(tiles), n)
        for j in range(2):
            _spread(d[:, :, 0, :, j], d[:, :, 1, :, j], half[:, j])
        for i in range(4):
            _spread(half[i, 0], half[i, 1], out[i])
        return out.view(16, tiles, n)


def _spread(first: Tensor, second: Tensor, out: Tensor) -> None:
    """A along two values."""
    out[0].copy_(first)
    torch.add(first, second, out=out[1])
    torch.sub(first, second, out=out[2])
    torch.neg(second, out=out[3])


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _product(x: Tensor, weight: Tensor, backward: bool) -> Tensor:
    u = _weights(weight, turned=backward)
    return _tiled(_dense(x), u if backward else u.transpose(1, 2))


def winograd_weight(weight: Tensor) -> Tensor:
    """[N, C, 3, 3] as :func:`winograd_folded` takes it: [16, C, N]."""
    return _weights(weight, turned=False).transpose(1, 2).contiguous()


def winograd_folded(x: Tensor, u: Tensor, bias: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    """relu(conv2d(x, weight, bias, padding=1) + other), without gradients.

    Args:
        x: [B, C, H, W], channels_last, float32.
        u: the weight [16, C, N], from :func:`winograd_weight`.
        bias: [N].
        other: [B, N, H, W], or None.
        relu: end in a ReLU.
    """
    y = _tiled(x, u).add_(bias.view(1, -1, 1, 1))
    y = y if other is None else y.add_(other)
    return y.relu_() if relu else y


def _tiled(x: Tensor, u: Tensor) -> Tensor:
    n = u.shape[2]
    t = _Tiles(x, max(n, x.shape[1]))
    b, _, h, w = x.shape
    out = torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    patches, outputs = _Patches(x, t), _Outputs(out, t)
    product = x.new_empty(16 * t.tiles * n)
    for images, tiles in t.steps():
        m = product[: 16 * tiles * n].view(16, tiles, n)
        outputs(torch.bmm(patches(images, tiles), u, out=m), images, tiles)
    return out


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    x, dy = _dense(x), _dense(dy)
    n, c = weight.shape[:2]
    t = _Tiles(x, max(n, c))
    patches, gradients = _Patches(x, t), _Gradients(dy, t)
    sums = x.new_zeros(16, n, c)
    for images, tiles in t.steps():
        sums.baddbmm_(gradients(images, tiles).transpose(1, 2), patches(images, tiles))
    taps = (_transform(x).t() @ sums.view(16, n * c)).view(3, 3, n, c)
    return torch.empty_like(weight).copy_(taps.permute(2, 3, 0, 1))


def _fake(x: Tensor, weight: Tensor, backward: bool) -> Tensor:
    b, _, h, w = x.shape
    n = weight.shape[1 if backward else 0]
    return torch.empty((b, n, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _flops(x: Tensor, weight: Tensor) -> int:
    """Of the products: 16 for a tile of four results and a pair of channels, in place of 36."""
    return 8 * (x.numel() // x.shape[1]) * weight.shape[0] * weight.shape[1]


product = register(
    "winograd(Tensor x, Tensor weight, bool backward) -> Tensor",
    reference=_product,
    triton=_product,
    fake=_fake,
    traffic=lambda x, weight, backward: Traffic(
        [x, weight], flops=8 * (x.numel() // x.shape[1]) * weight[..., 0, 0].numel()
    ),
)
weight_gradient = register(
    "winograd_weight(Tensor x, Tensor dy, Tensor weight) -> Tensor",
    reference=_weight_gradient,
    triton=_weight_gradient,
    fake=lambda x, dy, weight: torch.empty_like(weight),
    traffic=lambda x, dy, weight: Traffic([x, dy], flops=_flops(x, weight)),
)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return product(x, weight, False) if products else torch.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight, True) if ctx.products else _direct_dgrad(dy, x, weight)
        return dx, weight_gradient(x, dy, weight) if ctx.needs_input_grad[1] else None, None


def _direct_dgrad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    one = [1, 1]
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, one, one, one, False, [0, 0], 1, mask)[0]


def winograd(x: Tensor, weight: Tensor, products: bool = True) -> Tensor:
    """``conv2d(x, weight, padding=1)``, differentiable once.

    Args:
        x: [B, C, H, W], channels_last, float32 or float64.
        weight: [N, C, 3, 3], of the same dtype.
        products: False: the weight gradient alone is made in Winograd's form; forward and dx by PyTorch's convolution.

    Returns:
        [B, N, H, W], channels_last.
    """
    return _Winograd.apply(x, weight, products)
