"""Device functions that every kernel family shares: rounding, ReLU, one-bit masks, tiles of a dense activation.

A dense 4-d activation is a matrix in memory, with the channel along one side of it:

    channels_last   rows = pixels (n, h, w), columns = channels
    NCHW            rows = planes (n, c),    columns = the pixels of a plane

Elementwise kernels walk that matrix in [B0, B1] tiles (``elementwise_tile``) and look the channel up along the side it
lies on. Reductions per channel (``reduction_tile``) keep the columns in channels_last and, in NCHW, take one channel
per program and walk [images, pixels].
"""

from __future__ import annotations

from fastres.kernels._triton import INTERPRET as _INTERPRET
from fastres.kernels._triton import tl, triton

# The interpreter multiplies bf16 as raw integers in tl.dot and truncates fp32 -> bf16; both are put right here and
# only there, so that an interpreted kernel rounds as the compiled one does.
INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """fp32 to the storage type, round to nearest even on every path."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(v == v, even & 0xFFFF0000, bits)
        v = bits.to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def dot(a, b, acc, PREC: tl.constexpr):
    """acc + a @ b with fp32 accumulation; PREC says how fp32 operands enter: ieee, tf32 or tf32x3."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PREC)


@triton.jit
def relu(v):
    """ReLU that keeps NaN, as torch does; a plain maximum would turn it into 0."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def passes(v):
    """Where the gradient passes: not (v <= 0), so that NaN passes it as in torch's threshold backward."""
    return (v <= 0) == 0


@triton.jit
def pack_bits(live, B0: tl.constexpr, B1: tl.constexpr):
    """[B0, B1] booleans to [B0, B1 / 8] bytes, bit k of a byte being column 8 j + k."""
    bits = tl.reshape(live.to(tl.int32), (B0, B1 // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(byte, B0: tl.constexpr, B1: tl.constexpr):
    """The inverse of pack_bits."""
    bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (B0, B1)) != 0


@triton.jit
def elementwise_tile(ROWS, COLS, C, IMAGE, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """This program's tile: offsets, mask, channel, channel mask and image index, each broadcastable to [B0, B1].

    IMAGE is the number of rows of one image: H W in channels_last, C in NCHW.
    """
    rows = tl.program_id(0) * B0 + tl.arange(0, B0)
    cols = tl.program_id(1) * B1 + tl.arange(0, B1)
    ok = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    off = rows.to(tl.int64)[:, None] * COLS + cols[None, :]
    if NHWC:
        ch = cols[None, :]
        ch_ok = (cols < COLS)[None, :]
    else:
        ch = (rows % C)[:, None]
        ch_ok = (rows < ROWS)[:, None]
    return off, ok, ch, ch_ok, (rows // IMAGE)[:, None]


@triton.jit
def bit_tile(ROWS, BYTES, B0: tl.constexpr, B1: tl.constexpr):
    """Offsets and mask of the tile's bytes in a one-bit mask of shape [ROWS, BYTES], BYTES = ceil(COLS / 8)."""
    rows = tl.program_id(0) * B0 + tl.arange(0, B0)
    cols = tl.program_id(1) * (B1 // 8) + tl.arange(0, B1 // 8)
    return rows.to(tl.int64)[:, None] * BYTES + cols[None, :], (rows < ROWS)[:, None] & (cols < BYTES)[
        None, :
    ]


@triton.jit
def reduction_channel(C, NHWC: tl.constexpr, B1: tl.constexpr):
    """The channels that program (p, j) reduces, [1, B1] in channels_last and [1, 1] in NCHW, and their mask."""
    j = tl.program_id(1)
    if NHWC:
        ch = j * B1 + tl.arange(0, B1)[None, :]
    else:
        ch = j + tl.arange(0, 1)[None, :]
    return ch, ch < C


@triton.jit
def reduction_steps(CHUNK, HW, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """How many tiles a program walks: CHUNK rows in channels_last, CHUNK images of HW pixels in NCHW."""
    if NHWC:
        return tl.cdiv(CHUNK, B0)
    else:
        return tl.cdiv(CHUNK, B0) * tl.cdiv(HW, B1)


@triton.jit
def reduction_tile(t, START, STOP, C, HW, NHWC: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """Tile t of this program: row and column of the matrix, offsets, mask and image index.

    START and STOP bound rows (channels_last) or images (NCHW). Row and column broadcast to [B0, B1].
    """
    j = tl.program_id(1)
    if NHWC:
        i0 = START + t * B0 + tl.arange(0, B0)
        col = j * B1 + tl.arange(0, B1)
        row = i0
        image = i0 // HW
        ok = (i0 < STOP)[:, None] & (col < C)[None, :]
        off = row.to(tl.int64)[:, None] * C + col[None, :]
    else:
        across = tl.cdiv(HW, B1)
        i0 = START + (t // across) * B0 + tl.arange(0, B0)
        col = (t % across) * B1 + tl.arange(0, B1)
        row = i0 * C + j
        image = i0
        ok = (i0 < STOP)[:, None] & (col < HW)[None, :]
        off = row.to(tl.int64)[:, None] * HW + col[None, :]
    return row[:, None], col[None, :], off, ok, image[:, None]


@triton.jit
def column_sum(v, NHWC: tl.constexpr):
    """Sum of a [B0, B1] tile over what a program reduces: [1, B1] in channels_last, [1, 1] in NCHW."""
    s = tl.sum(v, 0)[None, :]
    if NHWC:
        return s
    else:
        return tl.sum(s, 1)[:, None]


@triton.jit
def load_affine(gamma_ptr, beta_ptr, ch, ch_ok, AFFINE: tl.constexpr):
    """gamma and beta in fp32 at these channels; 1 and 0 where the norm has none."""
    if AFFINE:
        gamma = tl.load(gamma_ptr + ch, mask=ch_ok, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + ch, mask=ch_ok, other=0.0).to(tl.float32)
    else:
        gamma = tl.where(ch_ok, 1.0, 0.0)
        beta = tl.where(ch_ok, 0.0, 0.0)
    return gamma, beta


@triton.jit
def load_moments(mean_ptr, var_ptr, eps, ch, ch_ok):
    """mean and rstd = 1 / sqrt(var + eps) in fp32 at these channels."""
    mean = tl.load(mean_ptr + ch, mask=ch_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + ch, mask=ch_ok, other=1.0).to(tl.float32)
    return mean, tl.rsqrt(var + eps)


@triton.jit
def norm_gradient(
    g, y, mean, rstd, gamma, beta, s1_ptr, s2_ptr, scale, ch, ch_ok, RELU: tl.constexpr, BATCH: tl.constexpr
):  # fmt: skip
    """dy = a (g [z > 0] - scale s1 - xhat scale s2) of a batch norm (with RELU) in fp32; without BATCH a g [z > 0]."""
    a = gamma * rstd
    centred = y - mean
    if RELU:
        g = tl.where(passes(centred * a + beta), g, 0.0)
    if BATCH:
        s1 = tl.load(s1_ptr + ch, mask=ch_ok, other=0.0) * scale
        s2 = tl.load(s2_ptr + ch, mask=ch_ok, other=0.0) * scale
        g = g - s1 - centred * (rstd * s2)
    return g * a
