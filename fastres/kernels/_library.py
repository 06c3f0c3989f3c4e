"""Registration of operators with torch.library: one call for schema, fake, CPU, CUDA and autograd.

``torch.library.Library.impl`` is used rather than ``custom_op``: a call through it costs about a quarter on the host.
An operator without a backward gets one that raises: a second derivative through the fused kernels is refused instead
of being silently dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from fastres.kernels._check import PLAIN
from fastres.kernels._tape import noting
from fastres.kernels._triton import INTERPRET

__all__ = ["NAMESPACE", "REFERENCES", "TRAFFIC", "Operator", "Traffic", "applied", "register", "unwatched",
           "watched"]  # fmt: skip

NAMESPACE = "fastres"
_LIBRARY = Library(NAMESPACE, "DEF")


class Traffic(NamedTuple):
    """What one call of an operator moves through device memory, beside its outputs, which are written once."""

    reads: Sequence[
        Tensor | None
    ]  # activations, masks, matrices: one entry a pass. Vectors [C] are added by the meter
    workspace: int = 0  # bytes of partial results, written and read back
    flops: int = 0  # multiplications and additions of matrix products


TRAFFIC: dict[str, Callable[..., Traffic]] = {}  # by operator name: arguments of a call -> its traffic
REFERENCES: dict[
    str, Callable[..., Any]
] = {}  # by operator name: the plain-torch implementation, on any device
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # by operator name: what launches its kernels


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The operator has fixed its dtypes; autocast must not change those of the torch calls inside it."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return reference(*args)
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    return run


def _contiguous_vectors(triton: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """Kernels read vectors by index: a strided or expanded one is copied first, and back where it is updated."""
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments
    updated = [i for i, a in enumerate(arguments) if a.alias_info is not None]

    @functools.wraps(triton)
    def run(*args: Any) -> Any:
        strided = [i for i, a in enumerate(args) if isinstance(a, Tensor) and _strided(a)]
        if not strided:
            return triton(*args)
        given = [a.contiguous() if i in strided else a for i, a in enumerate(args)]
        result = triton(*given)
        for i in updated:
            if i in strided:
                args[i].copy_(given[i])
        return result

    return run


def _strided(a: Tensor) -> bool:
    return a.dim() == 1 and not a.is_contiguous()


_SCALARS = frozenset((type(None), bool, int, float, str))
_interpreters = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled, _tracing = torch.autograd._profiler_enabled, torch._C._get_tracing_state


def watched() -> bool:
    """Whether anything but autograd has to see the operators that run: a compiler, a transform, a mode that is no tape
    (``_tape``), a profiler."""
    return bool(
        torch.compiler.is_compiling()
        or _dispatch_modes() > noting()
        or _function_modes()
        or _interpreters() is not None
        or _profiled()
        or _tracing() is not None
    )


def unwatched(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the launchers themselves may be called (``Operator.at``) on tensors that lie where x does: nothing has to
    see the operators, no gradient is recorded, and kernels can read these vectors as they lie. Asked once for several
    operators, where each would ask for itself."""
    if watched() or torch.is_grad_enabled() or type(x) not in PLAIN or not (INTERPRET or x.is_cuda):
        return False
    for v in vectors:
        if v is not None and (type(v) not in PLAIN or not v.is_contiguous()):
            return False
    return True


class Operator:
    """Calls a registered operator; or its launcher, where all that the dispatcher would do is call that.

    The dispatcher, which autograd makes every call enter twice, takes as much host time as a launcher; with a gradient,
    through the Python that torch.library puts around a backward, several times as much.
    """

    __slots__ = ("_recorded", "launch", "op")

    def __init__(
        self, op: Any, launch: Callable[..., Any], function: type[torch.autograd.Function] | None
    ) -> None:
        self.op, self.launch = op, launch
        self._recorded = (
            op if function is None else applied(function)
        )  # what to call where a gradient is recorded

    def at(self, fast: bool) -> Callable[..., Any]:
        """The launcher where ``fast``, which :func:`unwatched` tells, else the operator."""
        return self.launch if fast else self.op

    def __call__(self, *args: Any) -> Any:
        if watched():
            return self.op(*args)
        grad, recorded = torch.is_grad_enabled(), False
        for a in args:
            kind = type(a)
            if kind in _SCALARS:
                continue
            if kind not in PLAIN or not (INTERPRET or a.is_cuda) or _strided(a):
                return self.op(*args)
            recorded = recorded or (grad and a.requires_grad)
        return self._recorded(*args) if recorded else self.launch(*args)


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for hot paths: outside compilers and transforms of torch.func straight into C++, without the
    Python that prepares every argument for those."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _interpreters() is not None:
            return function.apply(*args)
        return direct(*args)

    return call


def _function(
    launch: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """What ``register_autograd`` makes of the three, around the launcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = launch(*args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(backward.__name__, (torch.autograd.Function,), methods)


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    differentiable: bool = True,
    traffic: Callable[..., Traffic] | None = None,
) -> Operator:
    """Register an operator and return what calls it.

    Args:
        schema: torch schema without the namespace, ``name(Tensor y, ...) -> Tensor``.
        reference: plain-torch implementation, which serves CPU tensors.
        triton: launcher of the kernels, which serves CUDA tensors, and CPU tensors in Triton's interpreter.
        fake: shapes, dtypes and strides of the outputs.
        backward, setup_context: as in ``torch.library.register_autograd``.
        differentiable: False for operators that only ever see detached tensors (statistics).
        traffic: from the operator's arguments, the bytes its kernels move; the byte meter adds them up.
    """
    name = schema.split("(", 1)[0]
    REFERENCES[name] = reference
    if traffic is not None:
        TRAFFIC[name] = traffic
    launcher = LAUNCHERS[name] = _contiguous_vectors(triton, schema)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launcher if INTERPRET else _without_autocast(reference), "CPU")
    _LIBRARY.impl(name, launcher, "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    function = None
    if backward is not None:
        assert setup_context is not None
        function = _function(triton, setup_context, backward)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    elif differentiable:

        def refuse(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"{qualified}: a second derivative through the fused kernels is not defined; use "
                "fastres.functional.backend('aten') (or FASTRES_BACKEND=aten) where double backward is needed"
            )

        torch.library.register_autograd(qualified, refuse, lib=_LIBRARY)
    return Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, triton, function)
