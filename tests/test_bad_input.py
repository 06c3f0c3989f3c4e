"""Bad input to the functions: an error that names operation, argument, got and wanted, before anything happens.

"Before anything" is taken literally: no operator of PyTorch runs during the call, so nothing is allocated or changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import functional as fn
from fastres.functional import BatchNorm
from fastres.kernels._triton import INTERPRET
from tests.cases import LAST, activation, copy_norm, make_norm, pending


class Nothing(TorchDispatchMode):
    """Fails where an operator runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran")


class Refusing:
    """Two norms and an input, and what they were."""

    def __init__(self) -> None:
        self.y = activation((2, 3, 4, 5))
        self.bn, self.bn2 = copy_norm(make_norm(3)), copy_norm(make_norm(3))
        self.kept = {id(bn): copy_norm(bn) for bn in (self.bn, self.bn2)}

    def refuses(
        self, call: Callable[[], Any], kind: type[Exception], op: str, argument: str, got: str, wanted: str
    ) -> None:
        with Nothing(), pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{op}: "), message
        for part in (argument, got, wanted):
            assert re.search(part, message), f"no {part!r} in: {message}"
        for bn in (self.bn, self.bn2):
            for name in bn._fields[:5]:
                assert torch.equal(getattr(bn, name), getattr(self.kept[id(bn)], name)), name


@pytest.fixture
def given() -> Refusing:
    return Refusing()


INPUTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str, str]] = {
    "list": (lambda y: [1.0], TypeError, "list", "a tensor"),
    "none": (lambda y: None, TypeError, "NoneType", "a tensor"),
    "three dimensions": (lambda y: y[0], ValueError, r"shape \[3, 4, 5\]", r"4 dimensions \[N, C, H, W\]"),
    "int": (lambda y: y.int(), TypeError, "int32 tensor", "float32, float16 or bfloat16"),
    "bool": (lambda y: y > 0, TypeError, "bool tensor", "float32, float16 or bfloat16"),
    "complex": (lambda y: y.to(torch.complex64), TypeError, "complex64 tensor", "float32"),
    "float8": (lambda y: y.to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn tensor", "bfloat16"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(given: Refusing, case: str) -> None:
    make, kind, got, wanted = INPUTS[case]
    x, y, bn = make(given.y), given.y, given.bn
    given.refuses(lambda: fn.batch_norm(x, bn), kind, "batch_norm", "input is", got, wanted)
    given.refuses(lambda: fn.max_pool(x), kind, "max_pool", "input is", got, wanted)
    given.refuses(lambda: fn.max_pool(pending(x, bn, True)), kind, "max_pool", "input is", got, wanted)
    given.refuses(lambda: fn.add_relu(x, y), kind, "add_relu", "branch is", got, wanted)
    given.refuses(lambda: fn.add_relu(y, x), kind, "add_relu", "identity is", got, wanted)
    given.refuses(lambda: fn.add_relu(pending(y, bn), x), kind, "add_relu", "identity is", got, wanted)
    given.refuses(lambda: fn.add_relu(x, pending(y, bn)), kind, "add_relu", "branch is", got, wanted)
    given.refuses(lambda: fn.add_relu(pending(x, bn), y), kind, "add_relu", "input is", got, wanted)
    both = pending(y, bn), pending(x, given.bn2)
    given.refuses(lambda: fn.add_relu(*both), kind, "add_relu", "identity is", got, wanted)


def vector(name: str, make: Callable[[Tensor], Any]) -> Callable[[BatchNorm], BatchNorm]:
    return lambda bn: bn._replace(**{name: make(getattr(bn, name))})


NORMS: dict[str, tuple[Callable[[BatchNorm], BatchNorm], type[Exception], str, str, str]] = {}
for _name in ("weight", "bias", "running_mean", "running_var"):
    NORMS |= {
        f"{_name} of another length": (
            vector(_name, lambda v: torch.ones(4)), ValueError, f"{_name} is", r"shape \[4\]", r"shape \[3\]"
        ),
        f"{_name} of two dimensions": (
            vector(_name, lambda v: torch.ones(3, 1)), ValueError, f"{_name} is", r"\[3, 1\]", r"shape \[3\]"
        ),
        f"{_name} of integers": (
            vector(_name, lambda v: torch.ones(3, dtype=torch.int64)), TypeError, f"{_name} is", "int64", "floating"
        ),
        f"{_name} elsewhere": (
            vector(_name, lambda v: torch.ones(3, device="meta")), ValueError, f"{_name} is", "on meta", "device cpu"
        ),
        f"{_name} a list": (
            vector(_name, lambda v: [1.0] * 3), TypeError, f"{_name} is", "list", "tensor of 3 values or None"
        ),
    }  # fmt: skip
NORMS |= {
    "weight alone": (lambda bn: bn._replace(bias=None), ValueError, "weight and bias", "None", "both or neither"),
    "bias alone": (lambda bn: bn._replace(weight=None), ValueError, "weight and bias", "None", "both or neither"),
    "mean alone": (
        lambda bn: bn._replace(running_var=None), ValueError, "running_mean and running_var", "None", "both or neither"
    ),
    "frozen without statistics": (
        lambda bn: bn._replace(running_mean=None, running_var=None, training=False),
        ValueError, "running_mean", "None", "training is False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS)
def test_norms(given: Refusing, case: str) -> None:
    """The second norm of a block end is checked before the first one's statistics are taken."""
    change, kind, argument, got, wanted = NORMS[case]
    y, bn, bad = given.y, given.bn, change(given.bn2)
    given.refuses(lambda: fn.batch_norm(y, bad), kind, "batch_norm", argument, got, wanted)
    given.refuses(lambda: fn.max_pool(pending(y, bad, True)), kind, "max_pool", argument, got, wanted)
    given.refuses(lambda: fn.add_relu(pending(y, bad), y), kind, "add_relu", argument, got, wanted)
    given.refuses(lambda: fn.add_relu(y, pending(y, bad)), kind, "add_relu", argument, got, wanted)
    both = pending(y, bn), pending(y, bad)
    given.refuses(lambda: fn.add_relu(*both), kind, "add_relu", argument, got, wanted)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1)])
def test_one_value_a_channel(given: Refusing, shape: tuple[int, ...]) -> None:
    y, got, wanted = activation(shape), r"shape \[1, 3, 1, 1\]", "more than 1 value per channel when training"
    given.refuses(lambda: fn.batch_norm(y, given.bn), ValueError, "batch_norm", "input", got, wanted)
    given.refuses(lambda: fn.add_relu(pending(y, given.bn), y), ValueError, "add_relu", "input", got, wanted)
    frozen = given.bn._replace(training=False)
    assert fn.batch_norm(y, frozen).shape == shape


SHAPES = [(2, 3, 4, 4), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_differ(given: Refusing, shape: tuple[int, ...]) -> None:
    """No broadcasting: a block end adds what has the same shape."""
    y, x = given.y, activation(shape)
    bn2 = given.bn2
    got, wanted = re.escape(str(list(shape))), r"shape \[2, 3, 4, 5\]"
    for branch, identity, argument in (
        (y, x, "identity is"),
        (pending(y, given.bn), x, "identity is"),
        (x, pending(y, given.bn), "branch is"),
        (pending(y, given.bn), pending(x, bn2), "identity is"),
    ):
        given.refuses(
            lambda b=branch, i=identity: fn.add_relu(b, i), ValueError, "add_relu", argument, got, wanted
        )


def test_devices_that_differ(given: Refusing) -> None:
    y, x, wanted = given.y, torch.empty(2, 3, 4, 5, device="meta"), "device cpu"
    given.refuses(lambda: fn.add_relu(y, x), ValueError, "add_relu", "identity is", "on meta", wanted)
    given.refuses(
        lambda: fn.add_relu(pending(y, given.bn), x), ValueError, "add_relu", "identity is", "on meta", wanted
    )


KEEPS: dict[str, tuple[Callable[[], Any], type[Exception], str, str]] = {
    "list": (lambda: [1.0, 1.0], TypeError, "list", r"a tensor \[N\] or None"),
    "number": (lambda: 0.8, TypeError, "float", r"a tensor \[N\] or None"),
    "length": (lambda: torch.ones(3), ValueError, r"shape \[3\]", r"shape \[2\], one factor a sample"),
    "shape": (lambda: torch.ones(2, 1, 1, 1), ValueError, r"\[2, 1, 1, 1\]", r"shape \[2\]"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), TypeError, "complex64", "real"),
    "device": (lambda: torch.ones(2, device="meta"), ValueError, "on meta", "device cpu"),
    "gradient": (lambda: torch.ones(2, requires_grad=True), ValueError, "requires grad", "a constant"),
}


@pytest.mark.parametrize("case", KEEPS)
def test_keep(given: Refusing, case: str) -> None:
    make, kind, got, wanted = KEEPS[case]
    keep, y = make(), given.y
    for branch in (y, pending(y, given.bn)):
        for identity in (y, pending(y, given.bn2)):
            given.refuses(
                lambda b=branch, i=identity: fn.add_relu(b, i, keep), kind, "add_relu", "keep", got, wanted
            )


def test_keep_is_not_applied_before_the_identity_is_checked(given: Refusing) -> None:
    y, x = given.y, activation((2, 3, 4, 4))
    given.refuses(
        lambda: fn.add_relu(y, x, KEEP), ValueError, "add_relu",
        "identity is", r"\[2, 3, 4, 4\]", r"\[2, 3, 4, 5\]",
    )  # fmt: skip


KEEP = torch.ones(2)


def test_a_pending_relu_cannot_end_a_block(given: Refusing) -> None:
    y, p = given.y, pending(given.y, given.bn, relu=True)
    for operands in ((p, y), (y, p), (p, pending(y, given.bn2)), (pending(y, given.bn2), p)):
        given.refuses(
            lambda o=operands: fn.add_relu(*o), ValueError, "add_relu", "operand", "ReLU", "conv_bn without"
        )


PARAMETERS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("input_", "parameter"), PARAMETERS)
def test_parameters_that_aten_does_not_take(
    given: Refusing, input_: torch.dtype, parameter: torch.dtype
) -> None:
    y, bad = given.y.to(input_), copy_norm(given.bn2, dtype=parameter)
    bn = given.bn if input_ != torch.float64 else copy_norm(given.bn, dtype=input_)
    got, wanted = str(parameter)[6:], str(input_)[6:]
    with fn.backend("aten"):
        given.refuses(lambda: fn.batch_norm(y, bad), TypeError, "batch_norm", "weight is", got, wanted)
        both = pending(y, bn), pending(y, bad)
        given.refuses(lambda: fn.add_relu(*both), TypeError, "add_relu", "weight is", got, wanted)
        p = pending(y, bad, True)
        given.refuses(lambda: fn.max_pool(p), TypeError, "max_pool", "weight is", got, wanted)
    assert torch.equal(bad.num_batches_tracked, given.bn2.num_batches_tracked)


def test_vectors_that_differ_in_dtype(given: Refusing) -> None:
    y, weight = given.y.bfloat16(), given.bn.weight.detach().bfloat16()
    bad = given.bn._replace(weight=weight)
    given.refuses(
        lambda: fn.batch_norm(y, bad),
        TypeError,
        "batch_norm",
        "bias is",
        "float32",
        "the same in all vectors",
    )


# ------------------------------------------------------------------------------------- routes that cannot be taken


@pytest.mark.skipif(INTERPRET, reason="the CPU serves the triton route in the interpreter")
def test_triton_on_the_cpu(given: Refusing) -> None:
    y, bn = given.y, given.bn
    with fn.backend("triton"):
        for op, call in (
            ("batch_norm", lambda: fn.batch_norm(y, bn)),
            ("add_relu", lambda: fn.add_relu(y, y)),
            ("add_relu", lambda: fn.add_relu(pending(y, bn), y, KEEP)),
            ("add_relu", lambda: fn.add_relu(y, y, KEEP)),
            ("max_pool", lambda: fn.max_pool(pending(y, bn, True))),
        ):
            given.refuses(call, ValueError, op, "backend 'triton'", "asked for", "Triton does not run on cpu")


ASKED = "triton" if INTERPRET else "reference"
# In the process of the interpreter these are tests of the kernels' route.
fused = pytest.mark.interpret if INTERPRET else pytest.mark.filterwarnings("default")


@fused
@pytest.mark.parametrize("case", ["strided", "dtype", "layout"])
def test_operands_that_the_fused_operators_do_not_take(given: Refusing, case: str) -> None:
    """A route that was asked for is refused, not replaced, and nothing is copied silently."""
    y, bn = given.y, given.bn
    x, got = {
        "strided": (activation((2, 3, 4, 10))[..., ::2], "layout|contiguous"),
        "dtype": (y.bfloat16(), "dtype, float32 and bfloat16"),
        "layout": (y.contiguous(memory_format=LAST), "differ in layout"),
    }[case]
    with fn.backend(ASKED):
        given.refuses(
            lambda: fn.add_relu(y, x), ValueError, "add_relu", f"backend '{ASKED}'", "asked for", got
        )
        given.refuses(
            lambda: fn.add_relu(pending(y, bn), x, KEEP), ValueError, "add_relu", ASKED, "asked for", got
        )
        if case == "strided":
            got = "neither contiguous NCHW nor channels_last"
            for op, call in (
                ("batch_norm", lambda: fn.batch_norm(x, bn)),
                ("max_pool", lambda: fn.max_pool(pending(x, bn, True))),
                ("add_relu", lambda: fn.add_relu(x, x, KEEP)),
            ):
                given.refuses(call, ValueError, op, ASKED, "asked for", got)


@pytest.mark.interpret
def test_float64_has_no_kernel(given: Refusing) -> None:
    y, bn = given.y.double(), copy_norm(given.bn, dtype=torch.float64)
    with fn.backend("triton"):
        given.refuses(
            lambda: fn.batch_norm(y, bn), ValueError, "batch_norm", "triton", "float64", "no kernel"
        )
