"""Folded weights, kept per convolution as long as what they were made from has not changed.

The cache lies outside the modules: state dict, ``deepcopy``, ``pickle`` and the convolution itself know nothing of it,
and its entries go with the convolution. An entry is used where the norm is the same and every tensor that went into
it is the same object in the same storage with the same version counter. So it notices every change that PyTorch
records: in place under ``no_grad``, by an optimizer, ``load_state_dict`` (by copy or by assignment), ``.to()``,
``.half()``, a new ``Parameter``, ``.data = tensor``, and running statistics that move, by their
``num_batches_tracked``. Besides, a forward pass in training drops the entries of the convolutions that it uses, and so
does a call of ``train()`` or ``eval()`` on their norms: whoever evaluates calls one of them first. Where on a CPU that
is all that happened, and happens again, as in a loop with ``eval()`` in it, the values are kept from then on and
compared, which takes a fraction of the time.

What PyTorch does not record cannot be noticed otherwise: values written through an alias that has a counter of its own
(``p.data.add_()``, ``p.detach().numpy()``, a collective on ``p.data``) between two evaluations with no such call.
:func:`forget` is for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastres.kernels.folded_conv import Folded

__all__ = [
    "KEPT",
    "Sources",
    "Untracked",
    "User",
    "count",
    "forget",
    "get",
    "held",
    "states",
    "trained",
    "use",
    "users",
]

KEPT = 8  # entries a convolution: routes, dtypes, layouts and packings that it is used in by turns


class Sources(NamedTuple):
    """Everything that a folded weight is made from."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None  # counts the updates of mean and var, which some kernels make without telling
    eps: float
    modes: int = 0  # how often the mode of the norm was set; last, see ``get``


_TENSORS = 7  # the first of them


class _Entry(NamedTuple):
    state: tuple[Any, ...]
    storages: tuple[StorageWeakRef, ...]  # keep the addresses in ``state`` from being given to other storages
    folded: Folded
    values: tuple[Tensor, ...]  # copies of the tensors, where the mode is set again and again; else empty


_cache: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Entry]] = weakref.WeakKeyDictionary()


class User:
    """Of folded weights, beside the convolutions: what goes when one of those is trained or forgotten."""

    __slots__ = ()

    def drop(self) -> None:
        raise NotImplementedError


users: weakref.WeakKeyDictionary[nn.Module, User] = weakref.WeakKeyDictionary()  # by network
_using: weakref.WeakKeyDictionary[nn.Module, User] = weakref.WeakKeyDictionary()  # by convolution


def use(conv: nn.Module, user: User) -> None:
    """``user`` holds what was folded from this convolution."""
    _using[conv] = user


def _unused(m: nn.Module) -> None:
    user = _using.pop(m, None)
    if user is not None:
        user.drop()


class Untracked(Exception):
    """A tensor was made in inference mode: PyTorch does not tell when it changes."""


def states(tensors: Iterable[Tensor | None]) -> list[Any]:
    """What tells of each tensor that it is the same, unchanged, as long as its storage is not another's.

    Raises:
        Untracked: one was made in inference mode.
    """
    try:
        return [
            None if t is None else (id(t), t._version, t.untyped_storage()._cdata, t.storage_offset())
            for t in tensors
        ]
    except RuntimeError as error:
        raise Untracked from error


def _state(s: Sources) -> tuple[Any, ...]:
    given: Any = s[:_TENSORS]
    return (*states(given), *s[_TENSORS:])


def get(conv: nn.Module, key: Any, sources: Sources, make: Callable[[], Folded]) -> Folded:
    """The folded weight of a convolution for ``key`` (route, dtype, layout), made where there is no valid one.

    Args:
        conv: whose weight it is; held weakly.
        key: what else the result depends on.
        sources: what it is made from.
        make: makes it; its errors leave the cache as it was.

    Raises:
        Untracked: nobody can tell whether the tensors have changed.
    """
    entry = _cache.get(conv, {}).get(key)
    state = _state(sources)
    if entry is not None and entry.state == state:
        return entry.folded
    # Outside inference mode, so that the weight can be used in either mode.
    with torch.inference_mode(False), torch.no_grad():
        now: tuple[Tensor, ...] = ()
        # Perhaps the mode was set and no more. On a GPU a comparison would wait for it.
        if entry is not None and entry.state[:-1] == state[:-1] and sources.weight.device.type == "cpu":
            now = tuple(t.detach() for t in sources if isinstance(t, Tensor))
            if len(entry.values) == len(now) and all(map(torch.equal, now, entry.values)):
                _cache[conv][key] = entry._replace(state=state)
                return entry.folded
        folded, values = make(), tuple(t.clone() for t in now)
    entries = _cache.setdefault(conv, {})
    for old in [k for k, e in entries.items() if e.state != state]:
        del entries[old]
    while len(entries) >= KEPT:
        del entries[next(iter(entries))]
    storages = tuple(StorageWeakRef(t.untyped_storage()) for t in sources if isinstance(t, Tensor))
    entries[key] = _Entry(state, storages, folded, values)
    return folded


def trained(conv: nn.Module) -> None:
    """A training step uses this convolution: drop what was folded from it, whoever changes the weight and how."""
    if _cache:
        _cache.pop(conv, None)
    if _using:
        _unused(conv)


def forget(module: nn.Module | None = None) -> int:
    """Drop the folded weights of a module and all inside it, or of all modules; they are made anew when needed.

    Only needed after values were changed in a way that PyTorch keeps no count of, such as ``p.data.add_()``, or to free
    the memory. Returns how many convolutions had any.
    """
    if module is None:
        dropped = len(_cache)
        for held_by in (_cache, users, _using):
            held_by.clear()
        return dropped
    for m in module.modules():
        users.pop(m, None)
        _unused(m)
    return sum(_cache.pop(m, None) is not None for m in module.modules())


def count(module: nn.Module) -> int:
    """How many folded weights a module and all inside it have at present."""
    return sum(len(_cache.get(m, ())) for m in module.modules())


def held(module: nn.Module) -> list[Folded]:
    """The folded weights that a module and all inside it have at present."""
    return [entry.folded for m in module.modules() for entry in _cache.get(m, {}).values()]
