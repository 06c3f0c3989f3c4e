"""The start of a residual block: the first 1x1 convolution and the identity, whose gradients meet in one product.

    forward     y = conv(x),  identity = x, or the pixels of x that a strided 1x1 downsample reads
    backward    dx = dy W + didentity                        didentity added in the product's epilogue; for a strided
                                                             identity only at the pixels that were read
                dW = dy^T x                                  PyTorch's own weight gradient
    saved       x and W, as the convolution alone
    rounding    dx is rounded once; eager rounds dy W and then the sum
    traffic     backward R dy, didentity, W dx. Left to autograd the sum would be a further pass, R dy W, didentity,
                W dx, over the widest tensor of the network; a strided didentity would be spread out with zeros first.

Two outputs make autograd hand both gradients to one backward. The convolution's forward is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import reference
from fastres.kernels import _jit as J
from fastres.kernels._aot import STORAGE, Case, signature
from fastres.kernels._launch import on
from fastres.kernels._library import Traffic, register
from fastres.kernels._pointwise import product
from fastres.kernels._triton import tl, triton
from fastres.kernels.fused_conv_bn_relu import GEMM, precision, tile

__all__ = ["aot_cases", "block_start", "odd_cases"]


@triton.jit
def dgrad_kernel(
    dy_ptr, w_ptr, did_ptr, dx_ptr, M, N, C, HW, OW, H2, W2,
    SUM: tl.constexpr, STRIDE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = dy [M, C] W + didentity, W given as [N, C]; with STRIDE didentity is [.., H2, W2] and has the pixels
    (STRIDE i, STRIDE j) of dx's images of HW pixels, OW a line."""
    across = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    ok_m, ok_n = (rows < M)[:, None], n < N
    wide = rows.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    acc = product(
        acc,
        dy_ptr,
        dy_ptr,
        dy_ptr,
        dy_ptr,
        dy_ptr,
        0.0,
        w_ptr,
        wide,
        ok_m,
        n,
        ok_n,
        C,
        False,
        False,
        PREC,
        BK,
    )
    ok = ok_m & ok_n[None, :]
    if SUM:
        source, hit = wide, ok
        if STRIDE > 1:
            h = (rows % HW) // OW
            w = (rows % HW) % OW
            hit = ok & ((h % STRIDE == 0) & (w % STRIDE == 0))[:, None]
            source = (((rows // HW).to(tl.int64) * H2 + h // STRIDE) * W2 + w // STRIDE)[:, None]
        acc += tl.load(did_ptr + source * N + n[None, :], mask=hit, other=0.0).to(tl.float32)
    tl.store(dx_ptr + wide * N + n[None, :], J.round_to(acc, dx_ptr.dtype.element_ty), mask=ok)


def _dgrad(dy: Tensor, weight: Tensor, did: Tensor | None, x: Tensor, stride: int) -> Tensor:
    dy = dy.contiguous(memory_format=torch.channels_last)
    c, n = weight.shape[:2]
    w = weight.reshape(c, n).t().to(x.dtype).contiguous()
    dx = torch.empty_like(x)
    b, _, height, width = x.shape
    rows = b * height * width
    small = (1, 1)
    if did is not None:
        did = did.contiguous(memory_format=torch.channels_last)
        small = (did.shape[2], did.shape[3])
    t = tile("end", x, n, c)
    with on(x):
        dgrad_kernel[(-(-rows // t.m) * -(-n // t.n),)](
            dy, w, did, dx, rows, n, c, height * width, width, small[0], small[1], SUM=did is not None, STRIDE=stride,
            PREC=precision(x), BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dx


dgrad = register(
    "block_start_dgrad(Tensor dy, Tensor weight, Tensor? did, Tensor x, int stride) -> Tensor",
    reference=reference.block_start_dgrad,
    triton=_dgrad,
    traffic=lambda dy, weight, did, x, stride: Traffic(
        [dy, weight, did], flops=2 * dy.numel() * weight.shape[1]
    ),
    fake=lambda dy, weight, did, x, stride: torch.empty_like(x),
)


class _BlockStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight.to(x.dtype)), x[:, :, ::stride, ::stride]

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, did: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if dy is None:
            dy = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
        if ctx.needs_input_grad[0]:
            dx = dgrad(dy, weight, did, x, ctx.stride)
        if ctx.needs_input_grad[1]:
            _, dw, _ = torch.ops.aten.convolution_backward(
                dy,
                x,
                weight.to(x.dtype),
                None,
                [1, 1],
                [0, 0],
                [1, 1],
                False,
                [0, 0],
                1,
                [False, True, False],
            )
            dw = dw.to(weight.dtype)
        return dx, dw, None


def block_start(x: Tensor, weight: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
    """The first convolution's output and the identity of a block.

    Args:
        x: [B, Cin, H, W], channels_last, float32, float16 or bfloat16 (float64 on the CPU).
        weight: [Cout, Cin, 1, 1], any floating dtype.
        stride: of the 1x1 downsample that will read the identity; 1 for a plain identity.

    Returns:
        y [B, Cout, H, W] and the view x[:, :, ::stride, ::stride]; to be used in place of x for the identity.
    """
    return _BlockStart.apply(x, weight, stride)


def _cases(which: tuple[int, ...]) -> Iterator[Case]:
    aligned = [a for a in dgrad_kernel.arg_names if a.endswith("_ptr") or a in ("N", "C")]
    for storage in STORAGE:
        types = dict.fromkeys(("w_ptr",), f"*{storage}")
        for t in dict.fromkeys(GEMM["end"][storage != "fp32"][i] for i in which):
            for stride in (1, 2):
                flags = dict(SUM=True, STRIDE=stride, PREC="tf32", BM=t.m, BN=t.n, BK=t.k)
                yield Case(
                    f"dgrad{stride}-{storage}-{t.m}x{t.n}x{t.k}", dgrad_kernel,
                    signature(dgrad_kernel, storage, types), flags, dict(num_warps=t.warps, num_stages=t.stages),
                    aligned,
                )  # fmt: skip


def aot_cases() -> Iterator[Case]:
    """Every launch on sizes that are multiples of 16."""
    return _cases((0, 1))


def odd_cases() -> Iterator[Case]:
    """Every launch on other sizes."""
    return _cases((2,))
