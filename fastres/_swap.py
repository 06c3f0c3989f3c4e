"""Classes made on the fly from somebody else's, for modules whose class is swapped in place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres import functional as FF
from fastres._fusable import hooked, relu_obstacle
from fastres._norm import FusedNorm
from fastres._reading import NotUnderstood

__all__ = ["FusedNormAct", "Swapped", "check_class", "fused_class"]


class Swapped:
    """What the made classes share: they are pickled by the names of what they were made from, and refuse scripting."""

    fused_from: type[nn.Module]
    fused_by: type[Swapped]

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        state = self.__dict__ if getstate is None else getstate()
        return _restore, (self.fused_by, self.fused_from), state

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} runs on fused functions and cannot be scripted; wanted "
            "torch.compile or torch.export, or fastres.unfuse_(model) first"
        )


class FusedNormAct(Swapped, FusedNorm):
    """Mixed into timm's ``BatchNormAct2d``: a plain ReLU is applied in the norm's pass, anything else after it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Any:
        """Batch norm, ``drop`` and ``act`` of ``input`` [N, C, H, W]."""
        if isinstance(input, fx.Proxy):
            return self.node(input)
        if type(self.drop) is nn.Identity and not hooked(self.drop):
            if not relu_obstacle(self.act):
                return FF.batch_norm(input, self.fused(), True)
        return self.act(self.drop(FF.batch_norm(input, self.fused(), False)))


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def fused_class(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The class ``Fused<original>``, derived from both; the same one every time."""
    key = (mixin, original)
    if key not in _classes:

        @functools.wraps(original.forward)  # torch.fx, torch.export and others ask for its arguments' names
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        members = dict(fused_from=original, fused_by=mixin, __module__=__name__, __doc__=original.__doc__)
        members["forward"] = forward
        _classes[key] = type(f"Fused{original.__name__}", (mixin, original), members)
    return _classes[key]


def _restore(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, original)
    return cls.__new__(cls)


def check_class(module: nn.Module) -> None:
    """NotUnderstood where a module's class cannot be derived from, or its instances are not copied as plain dicts."""
    cls = type(module)
    if "forward" in module.__dict__:
        raise NotUnderstood("it has a forward of its own, on the instance")
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__deepcopy__", "__slots__"):
            if name in base.__dict__:
                raise NotUnderstood(f"its class defines {name}")
    if isinstance(module, torch.jit.ScriptModule):
        raise NotUnderstood("it is a ScriptModule")
