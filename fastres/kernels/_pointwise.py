"""Kernels of the moment form of a 1x1 convolution and its batch norm: forward. The maths is in fused_conv_bn_relu.

All of them see the input as rows of pixels: x [M, C] of a channels_last activation, each row read through ``z_tile``,
which applies a pending batch norm and ReLU (ACT) while loading, so that the activation is formed in registers and
never stored. A strided convolution reads every STRIDE-th pixel of every STRIDE-th line (``source_rows``).
"""

from __future__ import annotations

from fastres.kernels import _jit as J
from fastres.kernels._triton import tl, triton

__all__ = ["cov_kernel", "fold_kernel", "gram_kernel", "pointwise_end_kernel"]


@triton.jit
def source_rows(rows, HW, OW, H, W, STRIDE: tl.constexpr):
    """Input rows (64-bit) of output rows: HW = OH OW output pixels an image, [H, W] the input's size."""
    if STRIDE == 1:
        return rows.to(tl.int64)
    else:
        pixel = rows % HW
        line = (rows // HW).to(tl.int64) * H + (pixel // OW) * STRIDE
        return line * W + (pixel % OW) * STRIDE


@triton.jit
def z_tile(
    x_ptr, at, ok, cols, col_ok, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ACT: tl.constexpr, AFFINE: tl.constexpr
):  # fmt: skip
    """z = relu(a (x - mean) + beta) rounded to the storage type, or x itself; zero in columns beyond the last."""
    v = tl.load(x_ptr + at, mask=ok, other=0.0)
    if ACT:
        mean, rstd = J.load_moments(mean_ptr, var_ptr, eps, cols[None, :], col_ok[None, :])
        gamma, beta = J.load_affine(gamma_ptr, beta_ptr, cols[None, :], col_ok[None, :], AFFINE)
        v = J.round_to(J.relu((v.to(tl.float32) - mean) * (gamma * rstd) + beta), x_ptr.dtype.element_ty)
    return v


@triton.jit
def anchor_of(z, live, seen, dtype: tl.constexpr):
    """Per channel, from the first rows: 0 where the mean is within 4 standard deviations of it, else the mean as
    stored. Either way z - s is exact in the storage type (for the second, as z and s are within a factor of two), so
    the matrix product of the Gram sums sees no rounding of its operands."""
    z = tl.where(live, z, 0.0)
    mean = tl.sum(z, 0)[None, :] / seen
    d = tl.where(live, z - mean, 0.0)
    var = tl.sum(d * d, 0)[None, :] / seen
    return tl.where(mean * mean > 16.0 * var, J.round_to(mean, dtype).to(tl.float32), 0.0)


@triton.jit
def upper(i, j, C, BC: tl.constexpr):
    """Number of tile (i, j >= i) among the upper tiles of a C x C matrix, row by row."""
    return i * tl.cdiv(C, BC) - i * (i - 1) // 2 + j - i


@triton.jit
def gram_kernel(
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, part_ptr, anchor_ptr, M, C, CHUNK, WIDTH, HW, OW, H, W,
    ACT: tl.constexpr, AFFINE: tl.constexpr, STRIDE: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (p, i, j >= i): tile (i, j) of sum (z - s)(z - s)^T over chunk p, and on the diagonal sum (z - s).

    The anchor s is the same in every program (``anchor_of``). Row p of the workspace, WIDTH long, holds the upper tiles
    of the C x C sums one after the other (``upper``), then the C sums.
    """
    i, j = tl.program_id(1), tl.program_id(2)
    if j < i:
        return
    p = tl.program_id(0)
    ci, cj = i * BC + tl.arange(0, BC), j * BC + tl.arange(0, BC)
    oki, okj = ci < C, cj < C
    rows = tl.arange(0, BM)
    at = source_rows(rows, HW, OW, H, W, STRIDE)[:, None] * C
    live = (rows < M)[:, None]
    seen = tl.minimum(M, BM).to(tl.float32)
    zi = z_tile(x_ptr, at + ci[None, :], live & oki[None, :], ci, oki, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                ACT, AFFINE).to(tl.float32)  # fmt: skip
    zj = z_tile(x_ptr, at + cj[None, :], live & okj[None, :], cj, okj, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                ACT, AFFINE).to(tl.float32)  # fmt: skip
    si = anchor_of(zi, live, seen, x_ptr.dtype.element_ty)
    sj = anchor_of(zj, live, seen, x_ptr.dtype.element_ty)
    acc = tl.zeros((BC, BC), tl.float32)
    total = tl.zeros((BM, BC), tl.float32)
    stop = tl.minimum((p + 1) * CHUNK, M)
    for r0 in range(p * CHUNK, stop, BM):
        rows = r0 + tl.arange(0, BM)
        live = (rows < stop)[:, None]
        at = source_rows(rows, HW, OW, H, W, STRIDE)[:, None] * C
        zi = z_tile(x_ptr, at + ci[None, :], live & oki[None, :], ci, oki, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                    ACT, AFFINE).to(tl.float32)  # fmt: skip
        zj = z_tile(x_ptr, at + cj[None, :], live & okj[None, :], cj, okj, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
                    ACT, AFFINE).to(tl.float32)  # fmt: skip
        zi = tl.where(live, zi - si, 0.0)
        zj = tl.where(live, zj - sj, 0.0)
        total += zi
        acc = J.dot(
            tl.trans(J.round_to(zi, x_ptr.dtype.element_ty)),
            J.round_to(zj, x_ptr.dtype.element_ty),
            acc,
            PREC,
        )
    base = part_ptr + p.to(tl.int64) * WIDTH
    inside = tl.arange(0, BC)[:, None] * BC + tl.arange(0, BC)[None, :]
    tl.store(base + upper(i, j, C, BC) * (BC * BC) + inside, acc)
    if i == j:
        tl.store(base + WIDTH - C + ci, tl.sum(total, 0), mask=oki)
        if p == 0:
            tl.store(anchor_ptr + ci[None, :], si, mask=oki[None, :])


@triton.jit
def cov_kernel(
    part_ptr, anchor_ptr, mu_ptr, cov_ptr, PARTS, C, WIDTH, inv_m,
    GC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the PARTS rows of ``gram_kernel``'s workspace of tiles of GC, and make of the sums mu = s + t / M and
    cov = G / M - (t / M)(t / M)^T: program (a, j) row and column a from column j BC on, of what is right of column a.
    """
    a, j = tl.program_id(0), tl.program_id(1)
    if (j + 1) * BC <= a:
        return
    b = j * BC + tl.arange(0, BC)
    ok = b < C
    at = upper(a // GC, (j * BC) // GC, C, GC) * (GC * GC) + (a % GC) * GC + b % GC
    g = tl.zeros((BP, BC), tl.float32)
    tb = tl.zeros((BP, BC), tl.float32)
    ta = tl.zeros((BP,), tl.float32)
    for p0 in range(0, PARTS, BP):
        p = p0 + tl.arange(0, BP)
        row = part_ptr + p.to(tl.int64) * WIDTH
        live = (p < PARTS)[:, None] & ok[None, :]
        g += tl.load(row[:, None] + at[None, :], mask=live & (b >= a)[None, :], other=0.0)
        tb += tl.load(row[:, None] + (WIDTH - C + b)[None, :], mask=live, other=0.0)
        ta += tl.load(row + WIDTH - C + a, mask=p < PARTS, other=0.0)
    mean = tl.sum(tb, 0) * inv_m
    if a == 0:
        tl.store(mu_ptr + b, tl.load(anchor_ptr + b, mask=ok, other=0.0) + mean, mask=ok)
    cov = tl.sum(g, 0) * inv_m - mean * (tl.sum(ta, 0) * inv_m)
    tl.store(cov_ptr + a * C + b, cov, mask=ok & (b >= a))
    tl.store(cov_ptr + b * C + a, cov, mask=ok & (b > a))


@triton.jit
def fold_kernel(
    w_ptr, mu_ptr, cov_ptr, gamma_ptr, beta_ptr, eps, rmean_ptr, rvar_ptr, batches_ptr, momentum, unbias,
    wf_ptr, bias_ptr, mean_ptr, var_ptr, wcov_ptr, N, C,
    AFFINE: tl.constexpr, BATCH: tl.constexpr, RUNNING: tl.constexpr, COUNT: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BN rows of the weight: mean = W mu, var = diag(W S W^T), Wf = a W rounded, bias = beta - Wf mu, W S.

    Without BATCH mean and var are given (running statistics) and the bias is beta - a mean.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    okn = n < N
    if BATCH:
        mean = tl.zeros((BN,), tl.float32)
        var = tl.zeros((BN,), tl.float32)
        for j0 in range(0, C, BC):
            cj = j0 + tl.arange(0, BC)
            okj = okn[:, None] & (cj < C)[None, :]
            v = tl.zeros((BN, BC), tl.float32)
            for k0 in range(0, C, BC):
                ck = k0 + tl.arange(0, BC)
                wk = tl.load(
                    w_ptr + n[:, None] * C + ck[None, :], mask=okn[:, None] & (ck < C)[None, :], other=0.0
                )
                s = tl.load(
                    cov_ptr + ck[:, None] * C + cj[None, :],
                    mask=(ck < C)[:, None] & (cj < C)[None, :],
                    other=0.0,
                )
                v = J.dot(wk.to(tl.float32), s, v, "tf32x3")
            w = tl.load(w_ptr + n[:, None] * C + cj[None, :], mask=okj, other=0.0).to(tl.float32)
            mean += tl.sum(w * tl.load(mu_ptr + cj, mask=cj < C, other=0.0)[None, :], 1)
            var += tl.sum(w * v, 1)
            tl.store(wcov_ptr + n[:, None] * C + cj[None, :], v, mask=okj)
        var = tl.where(var < 0, 0.0, var)
        tl.store(mean_ptr + n, mean, mask=okn)
        tl.store(var_ptr + n, var, mask=okn)
        if COUNT:
            if tl.program_id(0) == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + 1)
        if RUNNING:
            old = tl.load(rmean_ptr + n, mask=okn, other=0.0).to(tl.float32)
            new = (1 - momentum) * old + momentum * mean  # exact for a momentum of one
            tl.store(rmean_ptr + n, J.round_to(new, rmean_ptr.dtype.element_ty), mask=okn)
            old = tl.load(rvar_ptr + n, mask=okn, other=0.0).to(tl.float32)
            new = (1 - momentum) * old + momentum * (var * unbias)
            tl.store(rvar_ptr + n, J.round_to(new, rvar_ptr.dtype.element_ty), mask=okn)
    else:
        mean = tl.load(mean_ptr + n, mask=okn, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + n, mask=okn, other=1.0).to(tl.float32)
    gamma, beta = J.load_affine(gamma_ptr, beta_ptr, n, okn, AFFINE)
    a = gamma * tl.rsqrt(var + eps)
    shift = tl.zeros((BN,), tl.float32)
    for j0 in range(0, C, BC):
        cj = j0 + tl.arange(0, BC)
        okj = okn[:, None] & (cj < C)[None, :]
        w = tl.load(w_ptr + n[:, None] * C + cj[None, :], mask=okj, other=0.0).to(tl.float32)
        wf = J.round_to(w * a[:, None], wf_ptr.dtype.element_ty)
        tl.store(wf_ptr + n[:, None] * C + cj[None, :], wf, mask=okj)
        if BATCH:
            mu = tl.load(mu_ptr + cj, mask=cj < C, other=0.0)
            shift += tl.sum(wf.to(tl.float32) * mu[None, :], 1)
    if not BATCH:
        shift = a * mean
    tl.store(bias_ptr + n, beta - shift, mask=okn)


@triton.jit
def product(
    acc, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, w_ptr, source, ok_m, n, ok_n, C,
    ACT: tl.constexpr, AFFINE: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + z W^T over all C columns. The activated tile is carried through the loop: formed for step k + 1 while the
    tensor cores work on step k, and kept in shared memory, where wgmma wants it."""
    k = tl.arange(0, BK)
    z = z_tile(x_ptr, source * C + k[None, :], ok_m & (k < C)[None, :], k, k < C, mean_ptr, var_ptr, gamma_ptr,
               beta_ptr, eps, ACT, AFFINE)  # fmt: skip
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_ptr + n[:, None] * C + k[None, :], mask=ok_n[:, None] & (k < C)[None, :], other=0.0)
        acc = J.dot(z, tl.trans(w), acc, PREC)
        k = k + BK
        z = z_tile(x_ptr, source * C + k[None, :], ok_m & (k < C)[None, :], k, k < C, mean_ptr, var_ptr, gamma_ptr,
                   beta_ptr, eps, ACT, AFFINE)  # fmt: skip
    return acc


@triton.jit
def pointwise_end_kernel(
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, w_ptr, bias_ptr, id_ptr, x2_ptr, w2_ptr, bias2_ptr, keep_ptr,
    out_ptr, bits_ptr, M, N, C, C2, BYTES, HW, OW, H2, W2,
    ACT: tl.constexpr, AFFINE: tl.constexpr, IDENTITY: tl.constexpr, PAIR: tl.constexpr, STRIDE2: tl.constexpr,
    KEEP: tl.constexpr, BITS: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = relu(keep (z Wf^T + bias) + identity), the identity a tensor or (PAIR) x2 Wf2^T + bias2; and sign bits."""
    across = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    ok_m, ok_n = (rows < M)[:, None], n < N
    acc = tl.zeros((BM, BN), tl.float32)
    acc = product(acc, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, w_ptr, rows.to(tl.int64)[:, None], ok_m, n,
                  ok_n, C, ACT, AFFINE, PREC, BK)  # fmt: skip
    acc += tl.load(bias_ptr + n, mask=ok_n, other=0.0)[None, :]
    if KEEP:
        acc *= tl.load(keep_ptr + rows // HW, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if PAIR:
        source = source_rows(rows, HW, OW, H2, W2, STRIDE2)[:, None]
        acc = product(acc, x2_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, w2_ptr, source, ok_m, n, ok_n, C2,
                      False, AFFINE, PREC, BK)  # fmt: skip
        acc += tl.load(bias2_ptr + n, mask=ok_n, other=0.0)[None, :]
    off = rows.to(tl.int64)[:, None] * N + n[None, :]
    ok = ok_m & ok_n[None, :]
    if IDENTITY:
        acc += tl.load(id_ptr + off, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + off, J.round_to(J.relu(acc), out_ptr.dtype.element_ty), mask=ok)
    if BITS:
        byte = (tl.program_id(0) % across) * (BN // 8) + tl.arange(0, BN // 8)
        bits = J.pack_bits(J.passes(acc) & ok, BM, BN)
        tl.store(
            bits_ptr + rows.to(tl.int64)[:, None] * BYTES + byte[None, :],
            bits,
            mask=ok_m & (byte < BYTES)[None, :],
        )
