"""The one place where a route is chosen, what can be asked of it, and the record of what it chose.

Routes:

    triton      the fused operators of ``fastres.kernels`` on Triton (CUDA, or the CPU in Triton's interpreter)
    aten        PyTorch's own operators, in the layout the input came in
    reference   the fused operators on their plain-torch implementation (CPU): for tests and debugging
    auto        triton on a CUDA device that can run it, else aten

``backend("aten")`` as a context manager, or FASTRES_BACKEND in the environment, asks for one. A route that was asked
for and cannot serve raises; nothing is rerouted silently, and ``record_routes`` shows what was chosen and why. On the
fused routes ``moments("on" | "off" | "auto")`` or FASTRES_MOMENTS says whether a block ends in the moment form of its
last convolution (``kernels/fused_conv_bn_relu.py``); auto asks ``moments_pay``. Where a tuning table of this GPU has
measured a shape class (``kernels/_tuned.py``), auto takes the faster of the routes that can serve.
``memory("save" | "recompute")`` or FASTRES_MEMORY says whether the input of a bottleneck's 3x3 is kept for backward.

Where no gradient is wanted and a norm uses running statistics it is folded into its convolution
(``kernels/folded_conv.py``), which has routes of its own: onednn, cudnn, triton and folded (PyTorch's convolution).
``folding("off")`` or FASTRES_FOLDING=off leaves norms unfolded.
``conv3x3("cudnn" | "triton")`` or FASTRES_CONV3X3 says what runs 3x3 convolutions: the library that PyTorch
calls, or ``kernels/conv3x3.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import _tuned
from fastres.kernels._check import KERNEL_DTYPES
from fastres.kernels._launch import channels_last, dense, lies_as, matrix, tile_key
from fastres.kernels._pointwise_plan import precision
from fastres.kernels._switch import from_environment, switched
from fastres.kernels._triton import HAS_TRITON, INTERPRET, TRITON_ERROR
from fastres.kernels.downsample_end import saving
from fastres.kernels.folded_conv import cudnn_obstacle, onednn_obstacle

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "CONV3X3", "MEMORY", "MOMENTS", "PREPACKED", "BatchNorm", "Choice", "assume_gpu", "backend",
           "choose", "conv3x3", "decide", "decide_folded", "decide_pair", "downsample_pays", "folding", "fuses",
           "get_backend", "get_folding", "memory", "moments", "moments_pay", "own_conv3x3", "prepacks", "recomputes",
           "record", "record_routes", "recording", "transformed"]  # fmt: skip

BACKENDS = ("auto", "triton", "aten", "reference")
MOMENTS = ("auto", "on", "off")
MEMORY = ("save", "recompute")
FOLDING = ("auto", "off")
CONV3X3 = ("cudnn", "triton")
_TUNED = ("batch_norm", "add_relu", "max_pool")  # operations whose route the tuning table may choose


class BatchNorm(NamedTuple):
    """One batch norm as the functions see it.

    Vectors are [C]. ``training`` selects batch statistics; the running statistics, where given, are then updated with
    ``momentum`` (None: cumulative average over ``num_batches_tracked``). Without ``training`` they are what is used.
    ``group`` merges the statistics over a process group. With ``skip_nonfinite`` a batch that would make a running
    statistic NaN or infinite leaves the running statistics, and the count, as they were. What was folded for one value
    of ``modes`` is not used for another.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool
    group: ProcessGroup | None = None
    skip_nonfinite: bool = False
    modes: int = 0


class Choice(NamedTuple):
    """One routing decision, as ``record_routes`` lists it."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    route: str
    reason: str
    key: int  # id of the norm's weight (running mean without one), to find the layer by; 0 without a norm


class _Setting:
    """Process-wide: plain attributes, so that torch.compile can guard on them."""

    backend: str = from_environment("FASTRES_BACKEND", "auto", BACKENDS)
    moments: str = from_environment("FASTRES_MOMENTS", "auto", MOMENTS)
    memory: str = from_environment("FASTRES_MEMORY", "save", MEMORY)
    folding: str = from_environment("FASTRES_FOLDING", "auto", FOLDING)
    conv3x3: str = from_environment("FASTRES_CONV3X3", "cudnn", CONV3X3)
    log: list[Choice] | None = None
    assumed: tuple[int, int] | None = None


def get_backend() -> str:
    """The backend in force: ``auto``, ``triton``, ``aten`` or ``reference``."""
    return _Setting.backend


def backend(name: str) -> AbstractContextManager[None]:
    """Ask for a route inside the block (process-wide). ValueError for an unknown name."""
    return switched(_Setting, "backend", name, BACKENDS)


def moments(mode: str) -> AbstractContextManager[None]:
    """Whether blocks end in the moment form, on the fused routes: ``on`` wherever it applies, ``off``, or ``auto``."""
    return switched(_Setting, "moments", mode, MOMENTS)


def memory(mode: str) -> AbstractContextManager[None]:
    """What the fused routes keep for backward of a bottleneck: ``save`` the 3x3's input, or ``recompute`` it, which
    takes one more pass over it in backward."""
    return switched(_Setting, "memory", mode, MEMORY)


def recomputes() -> bool:
    """Whether ``memory`` is ``recompute``."""
    return _Setting.memory == "recompute"


def get_folding() -> str:
    """Whether norms are folded into convolutions where no gradient is wanted: ``auto`` or ``off``."""
    return _Setting.folding


def folding(mode: str) -> AbstractContextManager[None]:
    """Fold norms into convolutions where no gradient is wanted (``auto``), or not (``off``); process-wide."""
    return switched(_Setting, "folding", mode, FOLDING)


def conv3x3(mode: str) -> AbstractContextManager[None]:
    """What runs 3x3 convolutions on the fused routes: ``cudnn`` (whatever PyTorch calls; the default, for nothing was
    measured) or ``triton``, this package's own kernels, wherever they apply."""
    return switched(_Setting, "conv3x3", mode, CONV3X3)


def own_conv3x3() -> bool:
    """Whether this package's own 3x3 kernels were asked for."""
    return _Setting.conv3x3 == "triton"


# What the model below charges: an H200's copy bandwidth and the share of its matrix peak that a good kernel reaches.
_BYTES_A_SECOND = 4.3e12
_FLOPS_A_SECOND = 0.6 * 790e12


def moments_pay(rows: int, n: int, c: int, op: str = "block_end", itemsize: int = 2) -> bool:
    """Whether the moment form of a 1x1 convolution between c and n channels saves more time than it costs.

    The tuning table says so where it has measured ``op`` (``block_end``, ``pair_end`` with a downsample branch, or
    ``block_start``) on this shape class; else a model does: the form saves eight passes over the [rows, n] output at
    two bytes (written once, read three times; its gradient written once, read three times) and costs 4 rows c^2 flops
    and three more passes over the [rows, c] input.
    """
    if _Setting.moments != "auto":
        return _Setting.moments == "on"
    saved = 8 * 2 * rows * n / _BYTES_A_SECOND
    pays = 4 * rows * c * c / _FLOPS_A_SECOND + 3 * 2 * rows * c / _BYTES_A_SECOND < saved
    return _form(op, (_tuned.log2(rows), n, c, itemsize), pays)


def _form(op: str, key: _tuned.Key, pays: bool) -> bool:
    """The tuning table's word on a form, or the model's."""
    form, without = _tuned.ROUTES[op]
    if not _tuned.routed():
        return pays
    return _tuned.route(op, key, form if pays else without) == form


def downsample_pays(x: Tensor, n: int, stride: int, batch: bool, forked: bool) -> bool:
    """The same for a downsample of x to n channels in a block of 3x3 convolutions (``kernels/downsample_end.py``): what
    it saves in bytes, partial results and small matrices counted, beside what it adds in flops. It never takes more
    bytes. ``batch``, ``forked``: as in ``downsample_end.saving``.
    """
    if _Setting.moments != "auto":
        return _Setting.moments == "on"
    b, c, h, w = x.shape
    rows, itemsize = b * ((h - 1) // stride + 1) * ((w - 1) // stride + 1), x.element_size()
    saved, flops = saving(rows, n, c, b * c * h * w * itemsize, itemsize, batch, forked)
    pays = flops / _FLOPS_A_SECOND < saved / _BYTES_A_SECOND
    return _form("downsample_end", (_tuned.log2(rows), n, c, itemsize, stride), pays)


@contextmanager
def assume_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Route as on a CUDA device of this compute capability, for models traced on fake tensors where there is none."""
    before, _Setting.assumed = _Setting.assumed, capability
    try:
        yield
    finally:
        _Setting.assumed = before


@contextmanager
def record_routes() -> Iterator[list[Choice]]:
    """Collect every routing decision taken inside the block."""
    before, _Setting.log = _Setting.log, []
    try:
        yield _Setting.log
    finally:
        _Setting.log = before


def settings(x: Tensor) -> tuple[Any, ...]:
    """All but sizes that a decision of this module about ``x``, and a launch on it, depends on. The first is None where
    somebody watches the decisions."""
    return (
        _tuned.token(),
        _Setting.backend,
        _Setting.moments,
        _Setting.assumed,
        precision(x),
        torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None,
        # which libraries PyTorch's convolutions may call, hence the layout of what they give
        torch._C._get_cudnn_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.are_deterministic_algorithms_enabled(),  # fills what is made without a value
    )


def transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func`` (vmap, grad, jvp ...)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _obstacle(x: Tensor, others: tuple[Tensor, ...]) -> str:
    """Why the fused operators cannot serve these activations; empty where they can."""
    if transformed():
        return "the fused operators have no rules for the transforms of torch.func (vmap, grad, jvp ...)"
    if not dense(x):
        return "input is neither contiguous NCHW nor channels_last"
    layout = matrix(x)
    for t in others:
        if t.dtype != x.dtype:
            return f"operands differ in dtype, {str(x.dtype)[6:]} and {str(t.dtype)[6:]}"
        if not lies_as(t, layout):
            return "operands differ in layout"
    return ""


def _device_obstacle(x: Tensor) -> str:
    if x.dtype not in KERNEL_DTYPES:
        return f"{str(x.dtype)[6:]} has no kernel"
    if not HAS_TRITON:
        return f"Triton could not be imported ({TRITON_ERROR})"
    if _Setting.assumed or x.is_cuda:
        capability = _Setting.assumed or torch.cuda.get_device_capability(x.device)
        return "" if capability >= (8, 0) else f"compute capability {capability} is below (8, 0)"
    if x.device.type == "cpu" and INTERPRET:
        return ""
    return f"Triton does not run on {x.device.type}"


def _measured(op: str, x: Tensor, bns: tuple[BatchNorm, ...]) -> tuple[str, str]:
    """Of an activation that the kernels can serve: the tuning table's route, or the kernels without an entry there."""
    route, reason = "triton", "CUDA device, dense activation"
    if op in _TUNED and _tuned.routed() and not any(bn.group is not None and bn.training for bn in bns):
        m = matrix(x)
        route = _tuned.route(op, (*tile_key(m), x.element_size()), route)
        if route != "triton":
            reason = "faster on this GPU by the tuning table"
    return route, reason


def decide(op: str, x: Tensor, others: tuple[Tensor, ...], bns: tuple[BatchNorm, ...]) -> tuple[str, str]:
    """The route of one call and the reason: the only routing decision in the package."""
    asked = _Setting.backend
    route, reason = asked, f"backend {asked!r} was asked for"
    if asked == "auto":
        if not x.is_cuda and _Setting.assumed is None:
            route, reason = "aten", f"{x.device.type}: ATen is the measured default"
        else:
            obstacle = _device_obstacle(x) or _obstacle(x, others)
            route, reason = ("aten", obstacle) if obstacle else _measured(op, x, bns)
    elif asked == "triton":
        obstacle = _device_obstacle(x) or _obstacle(x, others)
        if obstacle:
            raise ValueError(f"{op}: backend 'triton' was asked for, but {obstacle}")
    elif asked == "reference":
        obstacle = "" if x.device.type == "cpu" else f"it does not serve {x.device}"
        obstacle = obstacle or _obstacle(x, others)
        if obstacle:
            raise ValueError(f"{op}: backend 'reference' was asked for, but {obstacle}")
    if route == "aten" and any(bn.group is not None and bn.training for bn in bns):
        if x.device.type != "cpu":
            raise ValueError(
                f"{op}: statistics over a process group need the fused operators; on {x.device} {reason}"
            )
        route, reason = "reference", "statistics over a process group: plain-torch operators"
    return route, reason


def fuses(x: Tensor) -> bool:
    """Whether fused operators may serve activations on ``x``'s device."""
    asked = _Setting.backend
    return asked == "reference" or (
        asked != "aten" and (x.is_cuda or asked == "triton" or bool(_Setting.assumed))
    )


def _fused_obstacle(x: Tensor, others: tuple[Tensor, ...]) -> str:
    if _Setting.backend == "reference":
        return ("" if x.device.type == "cpu" else f"it does not serve {x.device}") or _obstacle(x, others)
    return _device_obstacle(x) or _obstacle(x, others)


def _folded_route(op: str, key: _tuned.Key, default: str) -> str:
    """The tuning table's route of a folded convolution or pair, where nothing was asked for; else the default."""
    if not key or _Setting.backend != "auto" or not _tuned.routed():
        return default
    return _tuned.route(op, key, default)


def decide_pair(key: _tuned.Key) -> bool:
    """Whether a block end takes the downsample's convolution into its product, where it can: yes without a table."""
    return _folded_route("folded_pair", key, "pair") == "pair"


PREPACKED = "CPU: prepacked weight"


def prepacks(x: Tensor) -> bool:
    """Whether ``decide_folded`` says ``onednn`` of this activation, and nothing would convert it."""
    return (
        x.device.type == "cpu"
        and _Setting.backend == "auto"
        and _Setting.assumed is None
        and channels_last(x)
        and not torch.is_autocast_enabled("cpu")
        and not onednn_obstacle(x.dtype)
    )


def decide_folded(
    op: str, x: Tensor, others: tuple[Tensor, ...], pointwise: bool, key: _tuned.Key = ()
) -> tuple[str, str]:  # fmt: skip
    """The route of a convolution with its norm folded in, and the reason.

    Args:
        op: named where a route that was asked for cannot serve.
        x, others: the input, in the dtype it will be computed in, and what is added to the result.
        pointwise: it is a 1x1 that the block end's product can make.
        key: its shape class for the tuning table (``folded_conv.folded_key``); empty where there is no choice.
    """
    asked = _Setting.backend
    if asked == "aten":
        return "folded", "backend 'aten' was asked for"
    if asked == "auto" and not x.is_cuda and _Setting.assumed is None:
        if x.device.type != "cpu":
            return "folded", f"{x.device.type}: ATen is the default"
        obstacle = onednn_obstacle(x.dtype)
        if not obstacle and not all(channels_last(t) for t in (x, *others)):
            obstacle = "oneDNN's fused convolution wants channels_last"
        return ("folded", obstacle) if obstacle else ("onednn", PREPACKED)
    obstacle = _fused_obstacle(x, others)
    if obstacle and asked != "auto":
        raise ValueError(f"{op}: backend {asked!r} was asked for, but {obstacle}")
    if obstacle:
        return "folded", obstacle
    if asked == "reference":
        return "reference", "backend 'reference' was asked for"
    product = pointwise and channels_last(x)
    default = "triton" if product else "cudnn"
    route = _folded_route("folded_product" if product else "folded_conv", key, default)
    obstacle = cudnn_obstacle(x.dtype, x.device) if x.is_cuda and "cudnn" in (route, default) else ""
    if route != default and not (route == "cudnn" and obstacle):
        return route, "faster on this GPU by the tuning table"
    if product:
        return "triton", "1x1: product with affine, addition and ReLU"
    return ("folded", obstacle) if obstacle else ("cudnn", "convolution with bias, addition and ReLU")


def choose(
    op: str, x: Tensor, others: tuple[Tensor, ...], bns: tuple[BatchNorm, ...], note: str = ""
) -> str:  # fmt: skip
    """The route of one call, recorded; ``note`` is added to the reason."""
    route, reason = decide(op, x, others, bns)
    record(op, x, route, f"{reason}; {note}" if note else reason, bns)
    return route


def recording() -> bool:
    """Whether a log is being kept."""
    return _Setting.log is not None


def record(op: str, x: Tensor, route: str, reason: str, bns: tuple[BatchNorm, ...]) -> None:
    """Append a decision to the log, where one is being kept."""
    if _Setting.log is not None:
        layout = "NCHW" if x.is_contiguous() else "channels_last" if dense(x) else "strided"
        key = 0
        if bns:
            anchor = bns[0].weight if bns[0].weight is not None else bns[0].running_mean
            key = id(anchor) if anchor is not None else 0
        _Setting.log.append(Choice(op, tuple(x.shape), x.dtype, layout, route, reason, key))
