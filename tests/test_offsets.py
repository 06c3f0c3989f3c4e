"""Addresses beyond 2^31 values: each kernel reads and writes the right place in tensors of more than 4 GB.

The interpreter computes offsets in the integer types that the compiled kernel has, so a 32-bit product wraps there too
(and the process dies, or the value is missing). The tensors are reserved but never filled: one program touches a few
pages at the beginning of the first row or image and of the last one.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.kernels import batch_norm, pool, residual_add_relu
from tests.cases import LAST, NCHW

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs MAP_NORESERVE of Linux"),
]

Reserve = Callable[..., Tensor]
HUGE = 3 * 2**29  # one and a half times 2^30: the third row begins beyond 2^31
B0, B1 = 4, 64  # small tiles, so that few pages are touched


@pytest.fixture
def reserve() -> Iterator[Reserve]:
    """``reserve(count, dtype)``: a flat tensor of zeros in address space that only gets memory where it is touched."""
    held = []
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # MAP_NORESERVE, which mmap names since Python 3.13

    def make(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        try:
            area = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
        except OSError as error:
            pytest.skip(f"no address space for {count * dtype.itemsize} bytes: {error}")
        held.append(area)
        return torch.frombuffer(area, dtype=dtype)

    yield make
    held.clear()


def vectors(reserve: Reserve, c: int, **values: float) -> list[Tensor]:
    """Per-channel vectors of which the first B1 channels have a value."""
    made = []
    for value in values.values():
        v = reserve(c, torch.float32)
        v[:B1] = value
        made.append(v)
    return made


class Huge:
    """Two or three rows (channels_last) or images (NCHW) of which the last begins beyond 2^31 values."""

    def __init__(self, layout: torch.memory_format) -> None:
        self.nhwc = layout == LAST
        if self.nhwc:  # 3 pixels of HUGE channels
            self.n, self.c, self.hw, self.rows, self.cols = 3, HUGE, 1, 3, HUGE
            self.last, self.row = 2 * HUGE, 2
        else:  # 2 images of 2^26 channels of 32 pixels: image 1 is row 2^26 of the matrix
            self.n, self.c, self.hw, self.rows, self.cols = 2, 2**26, 32, 2**27, 32
            self.last, self.row = 2**31, 2**26
        self.count = self.rows * self.cols
        self.width = min(B1, self.cols)
        assert self.last >= 2**31 and self.last + self.width <= self.count

    def fill(self, t: Tensor) -> Tensor:
        """Random values where the last row or image begins; returns them."""
        t[self.last : self.last + self.width] = torch.randn(self.width)
        return t[self.last : self.last + self.width].float()

    def of(self, t: Tensor) -> Tensor:
        return t[self.last : self.last + self.width].float()


huge = pytest.mark.parametrize("h", [Huge(NCHW), Huge(LAST)], ids=["nchw", "channels_last"])
MEAN, VAR, GAMMA, BETA = 0.25, 1.0, 2.0, 0.125
NORM = dict(mean=MEAN, var=VAR, gamma=GAMMA, beta=BETA)
EXACT = dict(rtol=8e-3, atol=1e-6)  # one rounding to bf16


def launch(kernel: Any, *args: Any, **constants: Any) -> None:
    """Program (0, 0) alone."""
    kernel[(1, 1)](*args, **dict(dict(B0=B0, B1=B1), **constants))


def whole(h: Huge) -> tuple[int, int, int, int]:
    """LENGTH, C, HW, CHUNK of a reduction by a single program."""
    length = h.rows if h.nhwc else h.n
    return length, h.c, h.hw, length


@huge
def test_statistics(reserve: Reserve, h: Huge) -> None:
    y, (mean, m2) = reserve(h.count), vectors(reserve, h.c, mean=0, m2=0)
    v = h.fill(y)
    launch(batch_norm.stats_kernel, y, mean, m2, *whole(h), NHWC=h.nhwc)
    v = v.unsqueeze(0) if h.nhwc else v.unsqueeze(1)
    values = torch.cat([v, torch.zeros(h.n - 1, *v.shape[1:]) if h.nhwc else torch.zeros_like(v)])
    got_mean, got_m2 = (mean[:B1], m2[:B1]) if h.nhwc else (mean[:1], m2[:1])
    torch.testing.assert_close(got_mean, values.mean(0))
    torch.testing.assert_close(got_m2, values.var(0, correction=0) * values.shape[0])


def elementwise_sizes(h: Huge) -> tuple[int, int, int, int]:
    """ROWS, COLS, C, IMAGE of a matrix of which tile (0, 0) holds the last row.

    In NCHW the rows of one image are too many for a tile: two rows of 2^31 columns stand for two images there.
    """
    if h.nhwc:
        return h.rows, h.cols, h.c, 1
    return 2, 2**31 - 16, 1, 1


def place(h: Huge, t: Tensor) -> Tensor:
    """Where row 2 (channels_last) or row 1 (NCHW) of that matrix begins."""
    start = 2 * h.cols if h.nhwc else 2**31 - 16
    return t[start : start + B1]


@huge
def test_elementwise(reserve: Reserve, h: Huge) -> None:
    """Forward and backward of batch norm; in NCHW the last row crosses 2^31 within the tile."""
    rows, cols, c, image = elementwise_sizes(h)
    y, z, dz, dy = (reserve(rows * cols) for _ in range(4))
    mean, var, gamma, beta = vectors(reserve, max(c, B1), **NORM)
    place(h, y).copy_(torch.randn(B1))
    place(h, dz).copy_(torch.randn(B1))
    flags = dict(RELU=True, AFFINE=True, NHWC=h.nhwc)
    launch(batch_norm.act_kernel, y, z, mean, var, gamma, beta, 0.0, rows, cols, c, image, **flags)
    v = (place(h, y).float() - MEAN) * GAMMA + BETA
    torch.testing.assert_close(place(h, z).float(), v.relu(), **EXACT)
    none = (None, None, None)
    launch(batch_norm.backward_kernel, dz, y, dy, mean, var, gamma, beta, *none, 0.0, 0.0, rows, cols, c, image,
           KEEP=False, BATCH=False, **flags)  # fmt: skip
    torch.testing.assert_close(place(h, dy).float(), GAMMA * place(h, dz).float() * (v > 0), **EXACT)


@huge
def test_batch_norm_sums(reserve: Reserve, h: Huge) -> None:
    y, dz = reserve(h.count), reserve(h.count)
    v, g = h.fill(y), h.fill(dz)
    mean, var, gamma, beta = vectors(reserve, h.c, **NORM)
    p1, p2 = vectors(reserve, h.c, s1=0, s2=0)
    launch(batch_norm.reduce_kernel, dz, y, mean, var, gamma, beta, p1, p2, 0.0, *whole(h), RELU=False, AFFINE=True,
           NHWC=h.nhwc)  # fmt: skip
    check_sums(h, p1, p2, g, g * (v - MEAN))


def check_sums(h: Huge, p1: Tensor, p2: Tensor, g: Tensor, gx: Tensor) -> None:
    """What is not at the end of the tensor is zero, so these few values are the whole sums."""
    for p, want in ((p1, g), (p2, gx)):
        got = p[:B1] if h.nhwc else p[:1]
        torch.testing.assert_close(got, want if h.nhwc else want.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@huge
def test_block_end(reserve: Reserve, h: Huge) -> None:
    """relu(bn(y) + x) and the input's gradients, without bits (their own test is below)."""
    rows, cols, c, image = elementwise_sizes(h)
    y, x, out = (reserve(rows * cols) for _ in range(3))
    place(h, y).copy_(torch.randn(B1))
    place(h, x).copy_(torch.randn(B1))
    norm = vectors(reserve, max(c, B1), **NORM)
    launch(residual_add_relu.end_kernel, y, x, out, None, *norm, 0.0, *norm, 0.0, None, rows, cols, c, image, 0,
           NORM=2, AFFINE=True, AFFINE2=True, KEEP=False, BITS=False, NHWC=h.nhwc)  # fmt: skip
    want = sum((place(h, t).float() - MEAN) * GAMMA + BETA for t in (y, x)).relu()
    torch.testing.assert_close(place(h, out).float(), want, **EXACT)


def test_bits(reserve: Reserve) -> None:
    """Bytes of the mask beyond 2^31, for which a row has more than 2^33 values: written, then read by both readers."""
    stride = 3 * 2**29
    cols, start, byte = 8 * stride, 2 * 8 * stride, 2 * stride
    y, x, out, dout, g = (reserve(3 * cols) for _ in range(5))
    bits = reserve(3 * stride, torch.uint8)
    y[start : start + B1] = torch.randn(B1)
    dout[start : start + B1] = torch.randn(B1)
    none = (None, None, None, None, 0.0)
    launch(residual_add_relu.end_kernel, y, x, out, bits, *none, *none, None, 3, cols, cols, 1, stride,
           NORM=0, AFFINE=False, AFFINE2=False, KEEP=False, BITS=True, NHWC=True)  # fmt: skip
    live = y[start : start + B1] > 0
    want = (live.view(-1, 8).long() << torch.arange(8)).sum(1).to(torch.uint8)
    assert torch.equal(bits[byte : byte + B1 // 8], want)
    masked = dout[start : start + B1] * live
    launch(residual_add_relu.masked_kernel, dout, bits, g, 3, cols, stride)
    assert torch.equal(g[start : start + B1], masked)
    g[start : start + B1] = 0
    mean, var = vectors(reserve, cols, mean=0.0, var=1.0)
    part = reserve(2 * cols, torch.float32)
    launch(residual_add_relu.end_reduce_kernel, dout, bits, y, None, g, mean, var, 0.0, None, None, 0.0, None, part,
           cols, 3, cols, 1, 3, stride, PAIR=False, KEEP=False, NHWC=True)  # fmt: skip
    assert torch.equal(g[start : start + B1], masked)
    torch.testing.assert_close(part[:B1], masked.float())


@huge
def test_block_end_sums(reserve: Reserve, h: Huge) -> None:
    y, dout, g = (reserve(h.count) for _ in range(3))
    v, d = h.fill(y), h.fill(dout)
    stride = -(-h.cols // 8)
    bits = reserve(h.rows * stride, torch.uint8)
    bits[h.row * stride : h.row * stride + B1 // 8] = 255
    mean, var, _, _ = vectors(reserve, h.c, **NORM)
    part = reserve(2 * h.c, torch.float32)
    none = (None, None, 0.0)
    launch(residual_add_relu.end_reduce_kernel, dout, bits, y, None, g, mean, var, 0.0, *none, None, part, h.c,
           *whole(h), stride, PAIR=False, KEEP=False, NHWC=h.nhwc)  # fmt: skip
    check_sums(h, part[: h.c], part[h.c :], d, d * (v - MEAN))
    assert torch.equal(h.of(g), d)


def test_pool_channels_last(reserve: Reserve) -> None:
    """Two images of 2 x 2 pixels: the second begins beyond 2^31 values of the input."""
    c = 2**29 + 16
    y, out, taps = reserve(8 * c), reserve(2 * c), reserve(2 * c, torch.uint8)
    norm = vectors(reserve, c, **NORM)
    window = y[4 * c :].view(4, c)[:, :B1]
    window.copy_(torch.randn(4, B1))
    launch(pool.pool_kernel, y, out, taps, *norm, 0.0, 2, c, c, 2, 2, 1, 1, AFFINE=True, NHWC=True)
    want, at = ((window.float() - MEAN) * GAMMA + BETA).relu().max(0)
    torch.testing.assert_close(out[c : c + B1].float(), want, **EXACT)
    live = want > 0
    assert torch.equal(taps[c : c + B1][live].long(), (at[live] // 2 + 1) * 3 + at[live] % 2 + 1)


def test_pool_nchw(reserve: Reserve) -> None:
    """One plane of 2 x (2^31 - 16) pixels: the second line crosses 2^31 values of the input."""
    w = 2**31 - 16
    y, out, taps = reserve(2 * w), reserve(w // 2), reserve(w // 2, torch.uint8)
    norm = vectors(reserve, B1, **NORM)
    line = y[w : w + 2 * B1]
    line.copy_(torch.rand(2 * B1) + 1)
    launch(pool.pool_kernel, y, out, taps, *norm, 0.0, 1, w // 2, 1, 2, w, 1, w // 2, AFFINE=True, NHWC=False)
    z = (line.float() - MEAN) * GAMMA + BETA
    want = torch.nn.functional.max_pool1d(z.view(1, 1, -1), 3, 2, 1).flatten()
    torch.testing.assert_close(out[: B1 - 1].float(), want[: B1 - 1], **EXACT)


@pytest.mark.parametrize("kernel", ["backward", "sums"])
def test_pool_backward(reserve: Reserve, kernel: str) -> None:
    """Two images of one pixel and one window each: the second one's values, windows and taps cross 2^31."""
    c = 2**31 - 16
    y, dy, dout, taps = reserve(2 * c), reserve(2 * c), reserve(2 * c), reserve(2 * c, torch.uint8)
    mean, var, gamma, beta = vectors(reserve, c, **NORM)
    far = slice(c, c + B1)
    y[far], dout[far], taps[far] = 1.0, torch.randn(B1).to(dout.dtype), 4  # the middle of the window
    g = dout[far].float()
    if kernel == "backward":
        none = (None, None, 0.0, 0.0)
        launch(pool.pool_backward_kernel, dout, taps, y, dy, mean, var, gamma, beta, *none, 2, c, c, 1, 1, 1, 1,
               AFFINE=True, BATCH=False, NHWC=True)  # fmt: skip
        torch.testing.assert_close(dy[far].float(), GAMMA * g, **EXACT)
    else:
        p1, p2 = vectors(reserve, c, s1=0, s2=0)
        launch(pool.pool_reduce_kernel, dout, taps, y, mean, var, gamma, beta, 0.0, p1, p2, 2, c, 1, 2, 1, 1, 1, 1,
               AFFINE=True, NHWC=True)  # fmt: skip
        torch.testing.assert_close(p1[:B1], g)
        torch.testing.assert_close(p2[:B1], g * (1.0 - MEAN))
