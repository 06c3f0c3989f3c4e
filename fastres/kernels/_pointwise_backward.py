"""Kernels of the moment form of a 1x1 convolution and its batch norm: backward. The maths is in fused_conv_bn_relu."""

from __future__ import annotations

from fastres.kernels import _jit as J
from fastres.kernels._pointwise import source_rows, z_tile
from fastres.kernels._triton import tl, triton

__all__ = ["correction_kernel", "dz_kernel", "p_kernel", "weight_kernel"]


@triton.jit
def p_tile(
    dout_ptr, bits_ptr, g_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, anchor_ptr, keep_ptr, base_ptr,
    start, stop, i, j, N, C, BYTES, HW, OW, H, W,
    ACT: tl.constexpr, AFFINE: tl.constexpr, ANCHOR: tl.constexpr, MASK: tl.constexpr, STORE: tl.constexpr,
    KEEP: tl.constexpr, STRIDE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of sum (keep g)^T (z - s) over rows start .. stop, and (j == 0) sum keep g: N x C, then N values at
    ``base_ptr``. With MASK g = dout [out > 0]; STORE stores it, once."""
    n, c = i * BN + tl.arange(0, BN), j * BC + tl.arange(0, BC)
    ok_n, ok_c = n < N, c < C
    acc = tl.zeros((BN, BC), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for r0 in range(start, stop, BM):
        rows = r0 + tl.arange(0, BM)
        live = (rows < stop)[:, None]
        wide = rows.to(tl.int64)[:, None]
        ok = live & ok_n[None, :]
        g = tl.load(dout_ptr + wide * N + n[None, :], mask=ok, other=0.0)
        if MASK:
            byte = tl.load(bits_ptr + wide * BYTES + n[None, :] // 8, mask=ok, other=0).to(tl.int32)
            g = tl.where(((byte >> (n[None, :] % 8)) & 1) != 0, g, 0.0).to(dout_ptr.dtype.element_ty)
            if STORE:
                if j == 0:
                    tl.store(g_ptr + wide * N + n[None, :], g, mask=ok)
        if KEEP:
            keep = tl.load(keep_ptr + rows // HW, mask=rows < stop, other=0.0).to(tl.float32)[:, None]
            g = J.round_to(g.to(tl.float32) * keep, dout_ptr.dtype.element_ty)
        at = source_rows(rows, HW, OW, H, W, STRIDE)[:, None] * C
        z = z_tile(x_ptr, at + c[None, :], live & ok_c[None, :], c, ok_c, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                   ACT, AFFINE)  # fmt: skip
        if ANCHOR:
            anchor = tl.load(anchor_ptr + c, mask=ok_c, other=0.0)[None, :]
            z = J.round_to(z.to(tl.float32) - anchor, x_ptr.dtype.element_ty)
        acc = J.dot(tl.trans(g), z, acc, PREC)
        if j == 0:
            total += tl.sum(g.to(tl.float32), 0)
    tl.store(base_ptr + n[:, None] * C + c[None, :], acc, mask=ok_n[:, None] & ok_c[None, :])
    if j == 0:
        tl.store(base_ptr + N * C + n, total, mask=ok_n)


@triton.jit
def p_kernel(
    dout_ptr, bits_ptr, g_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, anchor_ptr, x2_ptr, anchor2_ptr,
    keep_ptr, part_ptr, M, N, C, C2, CHUNK, WIDTH, BYTES, HW, OW, H2, W2,
    ACT: tl.constexpr, AFFINE: tl.constexpr, ANCHOR: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
    PAIR: tl.constexpr, STRIDE2: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Program (p, i, j): ``p_tile`` of the branch, or with PAIR, beyond its columns, of the downsample branch x2.

    Row p of the workspace holds the branch's N C + N values, then the downsample's N C2 + N, WIDTH in all. STRIDE2 is
    the downsample's, or without PAIR the branch's own.
    """
    p, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = p * CHUNK
    stop = tl.minimum(start + CHUNK, M)
    base_ptr = part_ptr + p.to(tl.int64) * WIDTH
    if PAIR:
        across = tl.cdiv(C, BC)
        if j >= across:
            p_tile(dout_ptr, bits_ptr, g_ptr, x2_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, anchor2_ptr,
                   keep_ptr, base_ptr + N * C + N, start, stop, i, j - across, N, C2, BYTES, HW, OW, H2, W2,
                   False, AFFINE, ANCHOR, MASK, False, False, STRIDE2, PREC, BM, BN, BC)  # fmt: skip
            return
    p_tile(dout_ptr, bits_ptr, g_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, anchor_ptr, keep_ptr,
           base_ptr, start, stop, i, j, N, C, BYTES, HW, OW, H2, W2,
           ACT, AFFINE, ANCHOR, MASK, True, KEEP, 1 if PAIR else STRIDE2, PREC, BM, BN, BC)  # fmt: skip


@triton.jit
def centred_p(p_ptr, anchor_ptr, mu_ptr, sum_g, n, c, ok, C):
    """P = sum g (z - mu) from the sums about the anchor."""
    shift = tl.load(anchor_ptr + c, mask=c < C, other=0.0) - tl.load(mu_ptr + c, mask=c < C, other=0.0)
    return tl.load(p_ptr + n[:, None] * C + c[None, :], mask=ok, other=0.0) + sum_g[:, None] * shift[None, :]


@triton.jit
def weight_kernel(
    p_ptr, w_ptr, wcov_ptr, anchor_ptr, mu_ptr, mean_ptr, var_ptr, gamma_ptr, eps, dw_ptr, dgamma_ptr, dvar_ptr,
    adb_ptr, N, C,
    AFFINE: tl.constexpr, BATCH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BN output channels: da = sum g (y - mean), dgamma = da rstd, dvar, dW = a P + 2 dvar W S, and a dbeta.

    p holds the sums about the anchor s, [N, C], then sum g [N]; P = p + sum g (s - mu). Without BATCH s = mu = 0,
    da = rowsum(P W) - mean sum g and dW = a P.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok_n = n < N
    sum_g = tl.load(p_ptr + N * C + n, mask=ok_n, other=0.0)
    da = tl.zeros((BN,), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        ok = ok_n[:, None] & (c < C)[None, :]
        p = centred_p(p_ptr, anchor_ptr, mu_ptr, sum_g, n, c, ok, C)
        da += tl.sum(p * tl.load(w_ptr + n[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32), 1)
    rstd = tl.rsqrt(tl.load(var_ptr + n, mask=ok_n, other=1.0).to(tl.float32) + eps)
    gamma, beta = J.load_affine(gamma_ptr, gamma_ptr, n, ok_n, AFFINE)
    if not BATCH:
        da -= tl.load(mean_ptr + n, mask=ok_n, other=0.0).to(tl.float32) * sum_g
    dvar = -0.5 * da * gamma * rstd * rstd * rstd
    tl.store(dgamma_ptr + n, da * rstd, mask=ok_n)
    tl.store(dvar_ptr + n, dvar, mask=ok_n)
    tl.store(adb_ptr + n, gamma * rstd * sum_g, mask=ok_n)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        ok = ok_n[:, None] & (c < C)[None, :]
        dw = (gamma * rstd)[:, None] * centred_p(p_ptr, anchor_ptr, mu_ptr, sum_g, n, c, ok, C)
        if BATCH:
            dw += (2 * dvar)[:, None] * tl.load(wcov_ptr + n[:, None] * C + c[None, :], mask=ok, other=0.0)
        tl.store(dw_ptr + n[:, None] * C + c[None, :], J.round_to(dw, dw_ptr.dtype.element_ty), mask=ok)


@triton.jit
def correction_kernel(
    w_ptr, dvar_ptr, adb_ptr, b_ptr, c_ptr, N, C, inv_m, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Tile (i, j) of B = 2 / M W^T diag(dvar) W, rounded to the storage type, and (i == 0) of c = -(a dbeta) W / M."""
    i = tl.program_id(0) * BC + tl.arange(0, BC)
    j = tl.program_id(1) * BC + tl.arange(0, BC)
    acc = tl.zeros((BC, BC), tl.float32)
    shift = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        ok_n = (n < N)[:, None]
        wi = tl.load(w_ptr + n[:, None] * C + i[None, :], mask=ok_n & (i < C)[None, :], other=0.0).to(
            tl.float32
        )
        wj = tl.load(w_ptr + n[:, None] * C + j[None, :], mask=ok_n & (j < C)[None, :], other=0.0).to(
            tl.float32
        )
        dvar = tl.load(dvar_ptr + n, mask=n < N, other=0.0)[:, None]
        shift -= wj * tl.load(adb_ptr + n, mask=n < N, other=0.0)[:, None]
        acc = J.dot(tl.trans(wi), wj * dvar, acc, "tf32x3")
    b = J.round_to(acc * (2.0 * inv_m), b_ptr.dtype.element_ty)
    tl.store(b_ptr + i[:, None] * C + j[None, :], b, mask=(i < C)[:, None] & (j < C)[None, :])
    if tl.program_id(0) == 0:
        tl.store(c_ptr + j, tl.sum(shift, 0) * inv_m, mask=j < C)


@triton.jit
def dz_product(
    g_ptr, wf_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, b_ptr, c_ptr, mu_ptr, keep_ptr, rows, live,
    source, c, ok_c, N, C, HW,
    ACT: tl.constexpr, AFFINE: tl.constexpr, BATCH: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BC] of dz = keep g Wf + (z - mu) B + c."""
    acc = tl.zeros((BM, BC), tl.float32)
    for k0 in range(0, N, BK):
        k = k0 + tl.arange(0, BK)
        g = tl.load(g_ptr + rows.to(tl.int64) * N + k[None, :], mask=live & (k < N)[None, :], other=0.0)
        w = tl.load(wf_ptr + k[:, None] * C + c[None, :], mask=(k < N)[:, None] & ok_c[None, :], other=0.0)
        acc = J.dot(g, w, acc, PREC)
    if KEEP:
        acc *= tl.load(keep_ptr + rows // HW, mask=live, other=0.0).to(tl.float32)
    if BATCH:
        for k0 in range(0, C, BK):
            k = k0 + tl.arange(0, BK)
            z = z_tile(x_ptr, source + k[None, :], live & (k < C)[None, :], k, k < C, mean_ptr, var_ptr, gamma_ptr,
                       beta_ptr, eps, ACT, AFFINE)  # fmt: skip
            mu = tl.load(mu_ptr + k, mask=k < C, other=0.0)[None, :]
            z = J.round_to(z.to(tl.float32) - mu, x_ptr.dtype.element_ty)
            b = tl.load(b_ptr + k[:, None] * C + c[None, :], mask=(k < C)[:, None] & ok_c[None, :], other=0.0)
            acc = J.dot(z, b, acc, PREC)
        acc += tl.load(c_ptr + c, mask=ok_c, other=0.0)[None, :]
    return acc


@triton.jit
def dz_kernel(
    g_ptr, wf_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, b_ptr, c_ptr, mu_ptr, keep_ptr, dx_ptr,
    p1_ptr, p2_ptr, wf2_ptr, x2_ptr, b2_ptr, c2_ptr, mu2_ptr, dx2_ptr, M, N, C, C2, HW, OW, H2, W2,
    ACT: tl.constexpr, AFFINE: tl.constexpr, BATCH: tl.constexpr, KEEP: tl.constexpr, PAIR: tl.constexpr,
    BATCH2: tl.constexpr, STRIDE2: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz of the branch; with ACT masked by z > 0, and row pm of the two workspaces gets the sums of the norm before:
    sum dz and sum dz xhat. With PAIR the programs beyond the branch's columns make dz2 of the downsample branch, of
    the M pixels that its convolution read, one after the other; without, STRIDE2 is the branch's and so is that."""
    across = tl.cdiv(C, BC)
    programs = across
    if PAIR:
        programs += tl.cdiv(C2, BC)
    pm, j = tl.program_id(0) // programs, tl.program_id(0) % programs
    rows = pm * BM + tl.arange(0, BM)
    live, wide = (rows < M)[:, None], rows.to(tl.int64)[:, None]
    if PAIR:
        if j >= across:
            c = (j - across) * BC + tl.arange(0, BC)
            source = source_rows(rows, HW, OW, H2, W2, STRIDE2)[:, None] * C2
            acc = dz_product(g_ptr, wf2_ptr, x2_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, b2_ptr, c2_ptr,
                             mu2_ptr, keep_ptr, rows[:, None], live, source, c, c < C2, N, C2, HW,
                             False, AFFINE, BATCH2, False, PREC, BM, BC, BK)  # fmt: skip
            dz2 = J.round_to(acc, dx2_ptr.dtype.element_ty)
            tl.store(dx2_ptr + wide * C2 + c[None, :], dz2, mask=live & (c < C2)[None, :])
            return
    c = j * BC + tl.arange(0, BC)
    ok_c = c < C
    source = source_rows(rows, HW, OW, H2, W2, 1 if PAIR else STRIDE2)[:, None] * C
    acc = dz_product(g_ptr, wf_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, b_ptr, c_ptr, mu_ptr,
                     keep_ptr, rows[:, None], live, source, c, ok_c, N, C, HW,
                     ACT, AFFINE, BATCH, KEEP, PREC, BM, BC, BK)  # fmt: skip
    ok = live & ok_c[None, :]
    if ACT:
        mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, c[None, :], ok_c[None, :])
        gamma, beta = J.load_affine(gamma_ptr, beta_ptr, c[None, :], ok_c[None, :], AFFINE)
        centred = tl.load(x_ptr + source + c[None, :], mask=ok, other=0.0).to(tl.float32) - mean
        acc = tl.where(J.passes(centred * (gamma * rstd) + beta) & ok, acc, 0.0)
        acc = J.round_to(acc, dx_ptr.dtype.element_ty).to(tl.float32)
        tl.store(p1_ptr + pm * C + c, tl.sum(acc, 0), mask=ok_c)
        tl.store(p2_ptr + pm * C + c, tl.sum(acc * (centred * rstd), 0), mask=ok_c)
    tl.store(dx_ptr + wide * C + c[None, :], J.round_to(acc, dx_ptr.dtype.element_ty), mask=ok)
