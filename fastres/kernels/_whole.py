"""A residual block in training as one differentiable function: what its forward and backward are called with.

The block begins with two convolutions that have norms and ReLU or a pending end behind them; a last convolution and a
downsample may follow, each with a norm of its own. What both kinds of block need for backward has one order
(``Saved``), so that autograd, the saving and the programs (``_tape``) are written once, here.
The norms have statistics of their own batch, and all that has a gradient gets one; whoever wants less calls the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels._library import applied, unwatched
from fastres.kernels._pointwise_plan import precision
from fastres.kernels._saved import recall, store, through_hooks
from fastres.kernels._tape import Kept

__all__ = ["Norm", "OtherLayout", "Part", "Saved", "Whole", "convolution_backward", "updates"]

convolution_backward = torch.ops.aten.convolution_backward.default
_fills = torch.are_deterministic_algorithms_enabled


class Norm(NamedTuple):
    """What of a norm is no tensor."""

    eps: float
    momentum: float


class Part(NamedTuple):
    """A convolution's weight as it is read, its norm's gamma and beta, and the running statistics and counter to be
    updated."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


class Saved(NamedTuple):
    """What is kept for backward, before what is kept of other convolutions than the first two.

    ``low1`` and ``low2`` are weights in the dtype of x, without a gradient; ``bits`` the sign bits of x where its
    gradient is wanted with the ReLU that made x applied; ``signs`` those of the result, or None where its gradient
    has been through them.
    """

    signs: Tensor | None
    x: Tensor
    bits: Tensor | None
    low1: Tensor
    low2: Tensor
    gamma1: Tensor
    beta1: Tensor
    gamma2: Tensor
    beta2: Tensor
    y1: Tensor
    mean1: Tensor
    var1: Tensor
    z1: Tensor
    y2: Tensor
    mean2: Tensor
    var2: Tensor


_FIRST, _GIVEN = len(Saved._fields), Saved._fields.index("y1")
# Where gammas and betas, and means and variances, stand; slices, for a Saved is not made to look into it.
_VECTORS = slice(Saved._fields.index("gamma1"), _GIVEN)
_STATISTICS = tuple(slice(i, i + 2) for i in map(Saved._fields.index, ("mean1", "mean2")))


class OtherLayout(Exception):
    """A convolution by PyTorch did not give channels_last; ``updated``: how many parts' statistics had been updated."""

    def __init__(self, updated: int) -> None:
        self.updated = updated


Update = tuple[Tensor | None, Tensor | None, float, Tensor | None]


def updates(parts: list[Part], norms: tuple[Norm, ...]) -> list[Update]:
    """Of every part what an operator takes that is to update running statistics."""
    return [(p.running_mean, p.running_var, n.momentum, p.batches) for p, n in zip(parts, norms, strict=True)]


class _Made(NamedTuple):
    """What has been computed, without a gradient."""

    options: Any
    out: Tensor
    signs: Tensor
    saved: tuple[Tensor | None, ...]
    programs: Kept | None
    dtypes: tuple[torch.dtype, ...]


def _function(name: str, gradients: Callable[..., Any]) -> type[torch.autograd.Function]:
    """Returns out and its sign bits."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        made: _Made = args[-1]
        ctx.mark_non_differentiable(made.signs)
        ctx.set_materialize_grads(False)
        store(ctx, *made.saved)
        ctx.made, ctx.inputs = (made.options, made.dtypes, made.programs), len(args)
        return made.out, made.signs

    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * ctx.inputs
        kept, (options, dtypes, programs) = recall(ctx), ctx.made
        n = 2 * (len(options.norms) - 2)  # weight and gamma of every other convolution
        x, others = kept[1], kept[_FIRST : _FIRST + n]
        vectors = (*kept[_VECTORS], *others[1::2])
        fast = unwatched(dout, *vectors, *kept[_STATISTICS[0]], *kept[_STATISTICS[1]])
        run = functools.partial(gradients, options, dtypes, fast)
        if programs is None or not fast:
            return *run(dout, *kept), None
        # The parameters' data may be others than in forward.
        key = [dout.stride(), precision(x), _fills(), *[v.dtype for v in vectors]]
        key += [(w.shape, w.stride(), w.dtype) for w in others[::2]]
        return *programs(tuple(key), run, (dout, *kept), 1 + _FIRST + n), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


class Whole:
    """A kind of block, differentiable in all that it reads.

    Args:
        name: of its node in autograd's graph, less ``Backward``.
        forward: ``(options, fast, x, parts)`` to out, its sign bits, what ``Saved`` names from y1 on, and what is kept
            of the other convolutions. May raise ``OtherLayout``.
        backward: ``(options, dtypes, fast, dout, *saved)``, with weight and gamma of every other convolution behind
            ``Saved`` and then what was kept of them, to the gradients of x and of every part's weight, gamma and beta;
            dtypes are those of the weights' gradients.
    """

    def __init__(self, name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self._forward, self._apply = forward, applied(_function(name, backward))

    def _flat(self, options: Any, fast: bool, x: Tensor, *flat: Any) -> Any:
        parts = [Part(*flat[i : i + len(Part._fields)]) for i in range(0, len(flat), len(Part._fields))]
        return self._forward(options, fast, x, parts)

    def __call__(
        self, options: Any, x: Tensor, bits: Tensor | None, weights: Sequence[Tensor], parts: list[Part],
        programs: Kept | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The block's result.

        Args:
            options: the kind's own, with ``norms``, a ``Norm`` a part, and ``linked``: whoever uses the result applies
                its ReLU to the gradient. Hashable.
            x: [N, Cin, H, W], channels_last.
            bits: as in ``Saved``.
            weights: the parameters that the parts' weights are.
            parts: the first two convolutions, then the others.
            programs: of this block on tensors like these, or None where there are to be none.

        Returns:
            out [N, Cout, H', W'], channels_last, in the dtype of x, and its sign bits, a row of bytes a pixel; and,
            without a gradient, y1 and y2, what the first two convolutions gave.

        Raises:
            OtherLayout: as it says.
        """
        flat: list[Any] = []
        vectors: list[Tensor | None] = []
        wanted: list[Tensor] = []
        for p, weight in zip(parts, weights, strict=True):
            flat += p
            vectors += p[1:5]
            wanted += (weight, p[1], p[2])
        with torch.no_grad():
            fast = unwatched(x, *vectors)
            run = functools.partial(self._flat, options, fast)
            if programs is None or not fast:
                found = run(x, *flat)
            else:
                found = programs("forward", run, (x, *flat), len(flat) + 1)
        out, signs, *made = found
        one, two = parts[:2]
        others: list[Tensor] = []
        for p in parts[2:]:
            others += p[:2]
        saved = (
            None if options.linked else signs, x, bits, one.weight, two.weight, one.gamma, one.beta, two.gamma,
            two.beta, *made[: _FIRST - _GIVEN], *others, *made[_FIRST - _GIVEN :],
        )  # fmt: skip
        if through_hooks():  # what comes back may be of another kind
            programs = None
        result = _Made(options, out, signs, saved, programs, tuple([w.dtype for w in weights]))
        return *self._apply(x, *wanted, result), made[0], made[4]
