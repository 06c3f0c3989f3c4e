"""Inference of a whole network by programs (``kernels/_tape.py``): what it launched once, launched again.

At batch 1 a network's Python takes as long as its arithmetic: which route, which folded weight, does it still hold. All
of that follows from the network's modules, its tensors, the settings and the kind of images. So the third forward of a
network in eval mode on images of one kind is written down, and the ones after it run by what was written, as long as
nothing of that has changed (``_Signature``): modules, their types and attributes, hooks, and every parameter and buffer
by what folded weights are kept by (``_folding``). A network has programs where it consists of this package's modules
and such of torch's as compute the same of the same input, with a fused norm among them.

Everything lies outside the modules, as folded weights do, and goes with the network, with the first step of a training
and by :func:`fastres._folding.forget`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastres import _folding
from fastres._cpu import rule
from fastres._foldable import finite, images, keeps_finite, off
from fastres._fusable import observed
from fastres._norm import FusedNorm
from fastres._routing import get_folding, own_conv3x3, recording, settings
from fastres.kernels import _tuned
from fastres.kernels._check import PLAIN
from fastres.kernels._library import watched
from fastres.kernels._tape import Kept, writing

__all__ = ["run"]

# Modules of torch that compute the same of the same input in eval mode, and nothing besides.
_KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity,
          nn.Sequential, nn.Linear, nn.Sigmoid, nn.GroupNorm)  # fmt: skip
_TORCHS = frozenset(nn.Module().__dict__) - {"training"}  # attributes of every module that say nothing here
_PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.device)
_KINDS = 16  # of images, for a network
_PATIENCE = 64  # forwards at most between two signatures of a network that changes all the time


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value)) and all(map(_plain, value.values()))
    return isinstance(value, _PLAIN)


def _copied(value: Any) -> Any:
    """So that a list or dict that is changed in place is not what it was."""
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class _Module(NamedTuple):
    ref: weakref.ref[nn.Module]
    kind: type
    attributes: int  # how many there are
    get: Callable[[dict[str, Any]], Any]
    values: Any
    children: list[int]


class _Signature:
    """What a network was; it holds neither the network nor its tensors."""

    __slots__ = ("_forwards", "_modules", "_storages", "_tensors", "finite")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.finite = keeps_finite(modules[0])
        self._modules = [self._module(m) for m in modules]
        self._forwards = {type(m): type(m).forward for m in modules}
        given = _tensors(modules)
        self._tensors = _folding.states(given)
        # They keep their addresses theirs.
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in given if t is not None]

    @staticmethod
    def _module(m: nn.Module) -> _Module:
        names = [n for n in m.__dict__ if n not in _TORCHS]
        get = operator.itemgetter(*names)
        children = [*map(id, m._modules.values())]
        return _Module(weakref.ref(m), type(m), len(m.__dict__), get, _copied(get(m.__dict__)), children)

    def holds(self) -> bool:
        """Whether the network is still what it was."""
        modules = []
        for ref, kind, attributes, get, values, children in self._modules:
            m = ref()
            if m is None or type(m) is not kind:
                return False
            own = m.__dict__
            try:
                if (
                    len(own) != attributes
                    or get(own) != values
                    or own["_forward_hooks"]
                    or own["_forward_pre_hooks"]
                    or [*map(id, own["_modules"].values())] != children
                ):
                    return False
            except KeyError:
                return False
            modules.append(m)
        if any(kind.forward is not forward for kind, forward in self._forwards.items()):
            return False
        try:
            return _folding.states(_tensors(modules)) == self._tensors
        except _folding.Untracked:
            return False


def _tensors(modules: list[nn.Module]) -> list[Tensor | None]:
    """Every parameter and buffer."""
    return [t for m in modules for own in (m._parameters, m._buffers) for t in own.values()]


class _State(_folding.User):
    """Of a network: its signature and programs; or, without, how many forwards are to pass before there is one."""

    __slots__ = ("_kept", "_patience", "_wait", "signature")

    def __init__(self) -> None:
        self.signature: _Signature | None = None
        self._kept = Kept(_KINDS)
        self._wait, self._patience = 0, 1

    def drop(self) -> None:
        self.signature, self._kept = None, Kept(_KINDS)

    def programs(self, net: nn.Module) -> Kept | None:
        """The programs of the network as it is now, or None."""
        if self.signature is None:
            self._wait -= 1
            if self._wait < 0:
                self._sign(net)
            return None
        if self.signature.holds():
            return self._kept
        self.drop()
        self._wait = self._patience = min(2 * self._patience, _PATIENCE)
        return None

    def _sign(self, net: nn.Module) -> None:
        modules = [*net.modules()]
        if not all(map(_settled, modules)) or not any(map(_ours, modules)):
            self._wait = _PATIENCE
            return
        try:
            self.signature = _Signature(modules)
        except _folding.Untracked:
            self._wait = _PATIENCE
            return
        for m in modules:
            if isinstance(m, nn.Conv2d):
                _folding.use(m, self)


def _ours(m: nn.Module) -> bool:
    """A network without any is eager PyTorch, and stays so."""
    return isinstance(m, FusedNorm) or getattr(type(m), "is_plain_convolution", False)


def _settled(m: nn.Module) -> bool:
    """Whether a module computes the same of the same input, and nothing besides, as long as its attributes are the
    same."""
    known = type(m) in _KNOWN or type(m).__module__.startswith("fastres.")
    if getattr(type(m), "by_plan", False):  # somebody else's class: its plan runs, or whatever they wrote
        known = not m.fused_obstacle()  # type: ignore[operator]
    own = m.__dict__
    return (
        known
        and not m.training
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and all(_plain(v) for n, v in own.items() if n not in _TORCHS)
        and all(t is None or type(t) in PLAIN for t in _tensors([m]))
    )


def _free(x: Tensor) -> bool:
    """Whether a forward of a network in eval mode may run by a program: nothing has to see its parts."""
    return not (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or not x.numel()
        or watched()
        or recording()
        or off()
        or not writing()
        or observed()
        or _tuned.token() is None
    )


def run(
    net: nn.Module, x: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, ...]], of_images: bool = True
) -> tuple[Tensor, ...]:
    """``evaluate(x)``, what a network makes of ``x``, or its program. ``of_images``: x is what the whole network reads,
    and what is known of its values holds for all inside (``_foldable.images``)."""
    state: Any = None
    if not torch.compiler.is_compiling() and not net.training and _free(x):
        state = _folding.users.get(net)
        if state is None:
            state = _folding.users[net] = _State()
    programs = None if state is None else state.programs(net)
    keeps = None if programs is None or state.signature is None else state.signature.finite
    with images(net, x, keeps) if of_images else nullcontext(finite()) as known:
        if programs is None:
            return evaluate(x)
        about = x.shape, x.stride(), x.device, x.dtype, torch.is_inference_mode_enabled()
        key = (*settings(x), *about, known, rule(), own_conv3x3(), get_folding())
        return programs(key, evaluate, (x,), 1, constants=True)
