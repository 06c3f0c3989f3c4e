"""The one tolerance table and the one rule by which results are judged.

A result is held against the same computation in float64 and may be at most twice as far from it as eager PyTorch
is, plus a floor for the case where eager happens to be exact:

    max |ours - ref64|  <=  2 max |eager - ref64|  +  FLOOR[dtype] max |ref64|

Comparing with eager directly would say nothing about who of the two is right, and a tolerance picked by hand would
either hide faults or fail on another shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Relative to the largest magnitude of the reference. u is the unit roundoff: half an ulp, relative to the value.
FLOOR = {
    # Some thousand u (1.1e-16): sums of a few thousand terms, taken in another order than the reference's.
    torch.float64: 1e-12,
    # 17 u (6.0e-8): statistics, affine and backward sums are a chain of about that many roundings; a fused form makes
    # them in another order, so it may lose where eager is lucky.
    torch.float32: 1e-6,
    # 2 u (4.9e-4): arithmetic is in float32, so what is left is the rounding of the stored value: one ulp, not half,
    # because a float32 difference of 1e-7 may tip a value to the neighbour on the other side.
    torch.float16: 1e-3,
    # 2 u (3.9e-3), for the same reason; one ulp also allows the interpreter's truncation from float32.
    torch.bfloat16: 8e-3,
}
FACTOR = 2.0


def _placed(name: str, what: str, ours: Tensor, expected: Tensor) -> None:
    """The special values of ``ours`` must stand exactly where those of ``expected`` stand."""
    if not torch.equal(ours, expected):
        wrong = (ours != expected).nonzero()
        raise AssertionError(
            f"{name}: {what} in {int(ours.sum())} places, reference has {int(expected.sum())}; "
            f"{len(wrong)} of {ours.numel()} differ, first at {tuple(wrong[0].tolist())}"
        )


def assert_close64(
    name: str,
    ours: Tensor,
    eager: Tensor,
    ref64: Tensor,
    dtype: torch.dtype | None = None,
    scale: float = 0.0,
) -> None:
    """Assert the rule of this module for one tensor.

    Args:
        name: what is compared; begins the message.
        ours: the result under test, any floating dtype and device.
        eager: the same result from eager PyTorch in the dtype under test.
        ref64: the same result computed in float64 from the same (already rounded) inputs.
        dtype: the precision whose floor applies; default ``ours.dtype``. Give the input's dtype where a float32 result
            (a statistic, a parameter's gradient) was made from rounded 16-bit intermediates.
        scale: magnitude of the terms where the result cancels to nothing (a gradient that is zero in exact
            arithmetic); the floor is taken relative to the larger of it and max |ref64|.

    Raises:
        AssertionError: another shape; ours or eager not in the expected precision; NaN or inf at other places than the
            reference has them (after rounding to the dtype of ``ours``); or a difference above the bound.
    """
    assert ref64.dtype == torch.float64, f"{name}: the reference must be float64, got {ref64.dtype}"
    for who, t in (("ours", ours), ("eager", eager)):
        assert t.shape == ref64.shape, (
            f"{name}: {who} has shape {tuple(t.shape)}, reference {tuple(ref64.shape)}"
        )
    floor = FLOOR[dtype or ours.dtype]
    ref = ref64.detach().cpu()
    rounded = ref.to(ours.dtype)
    got, other = ours.detach().cpu().double(), eager.detach().cpu().double()
    _placed(name, "NaN", got.isnan(), ref.isnan())
    _placed(name, "+inf", got.isposinf(), rounded.isposinf())
    _placed(name, "-inf", got.isneginf(), rounded.isneginf())

    finite = rounded.isfinite()
    if not finite.any():
        return
    zero = torch.zeros((), dtype=torch.float64)
    err = torch.where(finite, (got - ref).abs(), zero)
    # Where eager overflows and the reference does not, eager is no measure.
    eager_err = float(torch.where(finite & other.isfinite(), (other - ref).abs(), zero).max())
    size = max(float(torch.where(finite, ref.abs(), zero).max()), scale)
    bound = FACTOR * eager_err + floor * size
    worst = float(err.max())
    if worst > bound:
        at = tuple(int(i) for i in torch.unravel_index(err.argmax(), err.shape))
        raise AssertionError(
            f"{name}: |ours - ref64| = {worst:.3e} > {bound:.3e} = {FACTOR:g} * {eager_err:.3e} (eager) "
            f"+ {floor:g} * {size:.3e} (floor, {dtype or ours.dtype}); worst at {at}: ours {float(got[at]):.9g}, "
            f"eager {float(other[at]):.9g}, reference {float(ref[at]):.9g}; {int((err > bound).sum())} of "
            f"{err.numel()} values above the bound"
        )


def _strides(t: Tensor) -> tuple[int | None, ...]:
    """Strides that say where values lie: those of dimensions of size one do not, nor any of an empty tensor."""
    return tuple(s if n > 1 and t.numel() else None for n, s in zip(t.shape, t.stride(), strict=True))


def assert_layout(ours: Tensor, like: Tensor, name: str = "layout") -> None:
    """Assert that ``ours`` has the shape, dtype, device and strides of ``like``."""
    assert ours.shape == like.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(like.shape)}"
    assert ours.dtype == like.dtype, f"{name}: dtype {ours.dtype}, wanted {like.dtype}"
    assert ours.device == like.device, f"{name}: device {ours.device}, wanted {like.device}"
    assert _strides(ours) == _strides(like), (
        f"{name}: strides {ours.stride()}, wanted {like.stride()} (shape {tuple(like.shape)})"
    )


@contextmanager
def poison() -> Iterator[None]:
    """Fill every tensor made without a value (``torch.empty`` and its kin) with NaN, integers with their largest value.

    A kernel that leaves a hole in its output, or reads memory it never wrote, then gives a NaN instead of whatever
    lay there before, which is often the right answer of the previous call.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    was_fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_fill
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
