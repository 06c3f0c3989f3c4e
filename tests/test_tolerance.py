"""The rule must bite: each of these would go unnoticed under a looser one."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import FLOOR, assert_close64, assert_layout, poison

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ids = [str(d).removeprefix("torch.") for d in DTYPES]


def ref_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_rounding_passes_and_more_fails(dtype):
    ref = ref_of(64, 33)
    eager = ref.to(dtype)
    assert_close64("rounded", eager, eager, ref)
    bound = 2 * (eager.double() - ref).abs().max() + FLOOR[dtype] * ref.abs().max()
    off = ref.clone()
    off[5, 7] += 1.5 * bound
    with pytest.raises(AssertionError, match=r"worst at \(5, 7\)"):
        assert_close64("off", off.to(dtype), eager, ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_floor_when_eager_is_exact(dtype):
    """With an exact eager result only the floor is left: one ulp at the maximum passes, eight do not (16 bits)."""
    ref = torch.ones(4, dtype=torch.float64)
    eager = ref.to(dtype)
    ulp = torch.finfo(dtype).eps
    assert_close64("one ulp", (ref + ulp).to(dtype), eager, ref)
    with pytest.raises(AssertionError, match="1 of 4 values"):
        off = ref.clone()
        off[2] += max(8 * ulp, 4 * FLOOR[dtype])
        assert_close64("far", off.to(dtype), eager, ref)


def test_message_has_every_number():
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.001])
    with pytest.raises(AssertionError) as e:
        assert_close64("dx", torch.tensor([1.0, 2.5]), eager, ref)
    numbers = (
        "5.000e-01",
        "9.999e-04",
        "1e-06",
        "2.000e+00",
        "2.002e-03",
        "ours 2.5",
        "eager 2.00",
        "reference 2",
    )
    for part in ("dx:", "(1,)", *numbers):
        assert part in str(e.value)


def test_eager_error_widens_the_bound():
    ref = torch.zeros(3, dtype=torch.float64)
    eager = torch.tensor([0.0, 1e-3, 0.0])
    assert_close64("within twice", torch.tensor([1.9e-3, 0, 0]), eager, ref)
    with pytest.raises(AssertionError):
        assert_close64("beyond twice", torch.tensor([2.1e-3, 0, 0]), eager, ref)


def test_dtype_and_scale_choose_the_floor():
    ref = torch.ones(3, dtype=torch.float64)
    ours = torch.full((3,), 1.004)
    assert_close64("bf16 inside", ours, torch.ones(3), ref, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_close64("fp32", ours, torch.ones(3), ref)
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close64("cancels", torch.full((3,), 5e-6), torch.zeros(3), zero, scale=10.0)
    with pytest.raises(AssertionError):
        assert_close64("does not", torch.full((3,), 5e-6), torch.zeros(3), zero)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_special_values_must_stand_where_the_reference_has_them(value):
    ref = ref_of(5, 4)
    special = ref.clone()
    special[1, 2] = value
    assert_close64("both", special.float(), special.float(), special)
    with pytest.raises(AssertionError, match="in 1 places, reference has 0"):
        assert_close64("only ours", special.float(), special.float(), ref)
    with pytest.raises(AssertionError, match="in 0 places, reference has 1"):
        assert_close64("only the reference", ref.float(), special.float(), special)
    moved = ref.clone()
    moved[2, 2] = value
    with pytest.raises(AssertionError, match=r"first at \(1, 2\)"):
        assert_close64("moved", moved.float(), special.float(), special)


def test_values_beside_a_nan_still_count():
    ref = ref_of(6)
    ref[0] = float("nan")
    ours = ref.float()
    ours[3] += 1
    with pytest.raises(AssertionError, match=r"worst at \(3,\)"):
        assert_close64("beside", ours, ref.float(), ref)


def test_overflow_of_the_dtype_is_no_miss():
    ref = torch.tensor([1e6, -1e6, 1.0], dtype=torch.float64)
    half = ref.half()
    assert_close64("fp16", half, half, ref)
    with pytest.raises(AssertionError, match=r"\+inf"):
        assert_close64("finite", torch.tensor([6e4, float("-inf"), 1.0]).half(), half, ref)
    # An eager result that overflows where nothing should must not excuse ours.
    with pytest.raises(AssertionError, match="above the bound"):
        assert_close64("excused", torch.tensor([3.0]), torch.tensor([float("inf")]), torch.ones(1).double())


def test_shape_and_reference_dtype():
    ref = ref_of(2, 3)
    with pytest.raises(AssertionError, match="shape"):
        assert_close64("shape", ref.float().t(), ref.float(), ref)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close64("ref", ref.float(), ref.float(), ref.float())
    empty = ref_of(0, 3)
    assert_close64("empty", empty.float(), empty.float(), empty)


def test_layout():
    x = torch.empty(2, 3, 4, 5)
    nhwc = x.to(memory_format=torch.channels_last)
    assert_layout(nhwc.clone(), nhwc)
    with pytest.raises(AssertionError, match="strides"):
        assert_layout(x, nhwc)
    with pytest.raises(AssertionError, match="dtype"):
        assert_layout(x.half(), x)
    with pytest.raises(AssertionError, match="shape"):
        assert_layout(x[:1], x)
    # With one pixel both layouts put every value in the same place, whatever the strides say.
    one = torch.empty(2, 3, 1, 1)
    assert_layout(one, one.to(memory_format=torch.channels_last))
    assert_layout(x[:0], nhwc[:0])


def test_poison_fills_and_is_undone(layout, device):
    x = torch.zeros(2, 3, 4, 4, device=device).to(memory_format=layout)
    with poison():
        for t in (
            torch.empty_like(x),
            x.new_empty(5),
            torch.empty(3, device=device),
            torch.empty_strided((2, 3), (1, 2)),
        ):
            assert t.isnan().all()
        assert torch.empty_like(x, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(7, dtype=torch.int32, device=device) == 2**31 - 1).all()
        hole = torch.empty_like(x)
        hole[0] = 0
        with pytest.raises(AssertionError, match="NaN"):
            assert_close64("hole", hole, x, x.double())
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), poison():
        _ = 1 / 0
    assert not torch.are_deterministic_algorithms_enabled()
