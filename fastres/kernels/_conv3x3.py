"""Kernels of the 3x3 convolution. The maths is in conv3x3.

Activations are rows of pixels (channels_last), a tap of the window is a displacement of the row, and one loop walks all
taps and all channels: its counters are scalars that are carried along, and whether a row has the tap at all is one bit
of a mask made before the loop. Padding is what a row does not have, so it is zero after the pending norm and ReLU.
"""

from __future__ import annotations

from fastres.kernels import _jit as J
from fastres.kernels._pointwise import z_tile
from fastres.kernels._triton import tl, triton

__all__ = ["dgrad3x3_kernel", "forward3x3_kernel", "wgrad3x3_kernel"]


@triton.jit
def tap_bits(h, w, live, H, W, NR, NS, DH: tl.constexpr):
    """Bit 3 i + j of each row: its tap (h + i DH, w + j DH) lies in the [H, W] map, and i < NR, j < NS."""
    bits = tl.where(live, 0, 0)
    for t in tl.static_range(9):
        y = h + (t // 3) * DH
        x = w + (t % 3) * DH
        ok = live & (y >= 0) & (y < H) & (x >= 0) & (x < W) & (t // 3 < NR) & (t % 3 < NS)
        bits |= ok.to(tl.int32) << t
    return bits


@triton.jit
def next_step(k0, i, j, K, NS, BK: tl.constexpr):
    """The channels after k0 of tap (i, j), or the first ones of the next tap."""
    k0 += BK
    wrap = k0 >= K
    k0 = tl.where(wrap, 0, k0)
    j = tl.where(wrap, j + 1, j)
    line = j >= NS
    return k0, tl.where(line, i + 1, i), tl.where(line, 0, j)


@triton.jit
def tap_tile(
    x_ptr, base, bits, k0, i, j, W, K, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    DH: tl.constexpr, ACT: tl.constexpr, AFFINE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[rows, BK] of the input at tap (i, j), through a pending norm and ReLU with ACT; zero where a row has no tap."""
    k = k0 + tl.arange(0, BK)
    ok = (((bits >> (3 * i + j)) & 1) != 0)[:, None] & (k < K)[None, :]
    at = base + (i * W + j) * (DH * K) + k[None, :]
    z = z_tile(x_ptr, at, ok, k, k < K, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ACT, AFFINE)
    if ACT:
        z = tl.where(ok, z, 0.0).to(x_ptr.dtype.element_ty)
    return z


@triton.jit
def forward3x3_kernel(
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, w_ptr, y_ptr, pmean_ptr, pm2_ptr, M, N, C, H, W, OH, OW,
    ACT: tl.constexpr, AFFINE: tl.constexpr, STATS: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr,
    PAD: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = conv(z) for BM pixels and BN channels; with STATS row pm of the workspaces gets their mean and M2."""
    across = tl.cdiv(N, BN)
    pm = tl.program_id(0) // across
    rows = pm * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    ok_n = n < N
    image = (rows // (OH * OW)).to(tl.int64)
    h = (rows // OW % OH) * STRIDE - PAD
    w = (rows % OW) * STRIDE - PAD
    bits = tap_bits(h, w, rows < M, H, W, 3, 3, DIL)
    base = (((image * H + h) * W + w) * C)[:, None]
    k0, i, j = 0, 0, 0
    acc = tl.zeros((BM, BN), tl.float32)
    z = tap_tile(x_ptr, base, bits, k0, i, j, W, C, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, DIL, ACT, AFFINE,
                 BK)  # fmt: skip
    for _ in range(0, 9 * tl.cdiv(C, BK)):  # the tile is carried, as in _pointwise.product
        k = k0 + tl.arange(0, BK)
        weight = tl.load(w_ptr + n[:, None] * (9 * C) + (3 * i + j) * C + k[None, :],
                         mask=ok_n[:, None] & (k < C)[None, :], other=0.0)  # fmt: skip
        acc = J.dot(z, tl.trans(weight), acc, PREC)
        k0, i, j = next_step(k0, i, j, C, 3, BK)  # after the last step to tap (3, 0), which no row has
        z = tap_tile(x_ptr, base, bits, k0, i, j, W, C, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, DIL, ACT, AFFINE,
                     BK)  # fmt: skip
    live = (rows < M)[:, None]
    y = J.round_to(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], y, mask=live & ok_n[None, :])
    if STATS:
        v = y.to(tl.float32)
        mean = tl.sum(v, 0)[None, :] / tl.minimum(M - pm * BM, BM).to(
            tl.float32
        )  # rows beyond the last are zero
        d = tl.where(live, v - mean, 0.0)
        at = pm * N + n
        tl.store(pmean_ptr + at[None, :], mean, mask=ok_n[None, :])
        tl.store(pm2_ptr + at, tl.sum(d * d, 0), mask=ok_n)


@triton.jit
def dgrad3x3_kernel(
    dy_ptr, w_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, dz_ptr, p1_ptr, p2_ptr, IMAGES, N, C, H, W, OH,
    OW, ACT: tl.constexpr, AFFINE: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr, PAD: tl.constexpr,
    STEP: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz = conv^T(dy), with ACT masked by z > 0 and with sum dz and sum dz xhat in the workspaces.

    Program (t, q) has pixels (STRIDE i + a, STRIDE j + b) of one remainder q = STRIDE a + b: only every STEP-th tap
    reaches those, from the first that does. Row STRIDE^2 pm + q of the workspaces is this program's.
    """
    across = tl.cdiv(C, BC)
    pm, q = tl.program_id(0) // across, tl.program_id(1)
    a, b = q // STRIDE, q % STRIDE
    lines, columns = (H - a + STRIDE - 1) // STRIDE, (W - b + STRIDE - 1) // STRIDE
    rows = pm * BM + tl.arange(0, BM)
    live = rows < IMAGES * lines * columns
    h = (rows // tl.maximum(columns, 1) % tl.maximum(lines, 1)) * STRIDE + a
    w = rows % tl.maximum(columns, 1) * STRIDE + b
    image = (rows // tl.maximum(lines * columns, 1)).to(tl.int64)
    r0, s0 = 3, 3
    for back in tl.static_range(3):  # the first tap that divides, so the last to be tried
        reach = (2 * STRIDE - 2 + back) * DIL
        r0 = tl.where((a + PAD + reach) % STRIDE == 0, 2 - back, r0)
        s0 = tl.where((b + PAD + reach) % STRIDE == 0, 2 - back, s0)
    nr, ns = (3 - r0 + STEP - 1) // STEP, (3 - s0 + STEP - 1) // STEP
    oh, ow = (h + PAD - r0 * DIL) // STRIDE, (w + PAD - s0 * DIL) // STRIDE
    D: tl.constexpr = -(STEP * DIL // STRIDE)
    bits = tap_bits(oh, ow, live, OH, OW, nr, ns, D)
    base = (((image * OH + oh) * OW + ow) * N)[:, None]
    c = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    ok_c = c < C
    k0, i, j = 0, 0, 0
    acc = tl.zeros((BM, BC), tl.float32)
    for _ in range(0, nr * ns * tl.cdiv(N, BK)):
        k = k0 + tl.arange(0, BK)
        tap = (r0 + i * STEP) * 3 + s0 + j * STEP
        weight = tl.load(w_ptr + k[:, None] * (9 * C) + tap * C + c[None, :], mask=(k < N)[:, None] & ok_c[None, :],
                         other=0.0)  # fmt: skip
        dy = tap_tile(
            dy_ptr, base, bits, k0, i, j, OW, N, dy_ptr, dy_ptr, dy_ptr, dy_ptr, 0.0, D, False, False, BK
        )
        acc = J.dot(dy, weight, acc, PREC)
        k0, i, j = next_step(k0, i, j, N, ns, BK)
    ok = live[:, None] & ok_c[None, :]
    at = (((image * H + h) * W + w) * C)[:, None] + c[None, :]
    if ACT:
        mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, c[None, :], ok_c[None, :])
        gamma, beta = J.load_affine(gamma_ptr, beta_ptr, c[None, :], ok_c[None, :], AFFINE)
        centred = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean
        acc = tl.where(J.passes(centred * (gamma * rstd) + beta) & ok, acc, 0.0)
        acc = J.round_to(acc, dz_ptr.dtype.element_ty).to(tl.float32)
        part = (pm * STRIDE * STRIDE + q) * C + c
        tl.store(p1_ptr + part, tl.sum(acc, 0), mask=ok_c)
        tl.store(p2_ptr + part, tl.sum(acc * (centred * rstd), 0), mask=ok_c)
    tl.store(dz_ptr + at, J.round_to(acc, dz_ptr.dtype.element_ty), mask=ok)


@triton.jit
def wgrad3x3_kernel(
    dy_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, part_ptr, M, N, C, CHUNK, H, W, OH, OW,
    ACT: tl.constexpr, AFFINE: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr, PAD: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (p, i, j): a [BN, BC] tile of dW = dy^T z at one tap, over the CHUNK output pixels of part p.

    Row p of the workspace holds the N x 9 x C sums.
    """
    p, across = tl.program_id(0), tl.cdiv(C, BC)
    tap = tl.program_id(2) // across
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = (tl.program_id(2) % across) * BC + tl.arange(0, BC)
    ok_n, ok_c = n < N, c < C
    dh, dw = tap // 3 * DIL - PAD, tap % 3 * DIL - PAD
    acc = tl.zeros((BN, BC), tl.float32)
    stop = tl.minimum((p + 1) * CHUNK, M)
    for start in range(p * CHUNK, stop, BM):
        rows = start + tl.arange(0, BM)
        h = rows // OW % OH * STRIDE + dh
        w = rows % OW * STRIDE + dw
        image = (rows // (OH * OW)).to(tl.int64)
        live = rows < stop
        there = (live & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & ok_c[None, :]
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], mask=live[:, None] & ok_n[None, :],
                     other=0.0)  # fmt: skip
        at = (((image * H + h) * W + w) * C)[:, None] + c[None, :]
        z = z_tile(x_ptr, at, there, c, ok_c, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ACT, AFFINE)
        if ACT:
            z = tl.where(there, z, 0.0).to(x_ptr.dtype.element_ty)
        acc = J.dot(tl.trans(dy), z, acc, PREC)
    base = part_ptr + p.to(tl.int64) * (9 * N * C)
    tl.store(base + n[:, None] * (9 * C) + tap * C + c[None, :], acc, mask=ok_n[:, None] & ok_c[None, :])
