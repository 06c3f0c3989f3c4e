"""One call on somebody else's model: ``fuse_`` swaps the fused parts in, in place; ``unfuse_`` takes them out.

    model = torchvision.models.resnet50()
    print(fastres.fuse_(model))              # what was fused, what was left and why

Modules stay the objects they are and only change their class: parameters, buffers, state-dict keys, hooks, optimizers
and whatever else refers to them go on. A fused class derives from the original one, so ``isinstance`` holds.

- ``nn.BatchNorm2d`` (and what mmengine puts in a synchronised norm's place for a run of one process) and
  ``nn.SyncBatchNorm`` become :class:`fastres.FusedBatchNorm2d` and :class:`fastres.FusedSyncBatchNorm`.
- A module that has batch norms among its children (a residual block, the net around the stem, an ``nn.Sequential``)
  gets a forward of fused functions if its own forward does nothing but call its children, add, and apply ReLU. This is
  found out from the code and one trace of it (:mod:`fastres._matching`), not from names, so it covers torchvision's,
  timm's and mmpretrain's ResNets as well as a block that was copied from them. Everything else is left alone, and the
  report says why.
- When something later changes what was found (a hook on a norm, norms folded or converted, children replaced), the
  module's own forward runs, which is always there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastres._matching import make_plan, reverted
from fastres._network import run
from fastres._norm import FusedBatchNorm2d, FusedNorm, FusedSyncBatchNorm
from fastres._plan import Plan, Value
from fastres._reading import NotUnderstood
from fastres._swap import FusedNormAct, Swapped, check_class, fused_class

__all__ = ["FuseReport", "FusedForward", "Row", "channels_last_", "fuse_", "unfuse_"]

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.SyncBatchNorm: FusedSyncBatchNorm,
}
_PLAN, _MARK = "_fastres_plan", "_fastres_norm"
_NO_PLAN = "it was made from a fused module (a slice of it?) and not fused itself"


# ---------------------------------------------------------------------------------------------------- fused classes


class FusedForward(Swapped):
    """Mixed into the class of a fused module: its forward by plan, or its own where the plan no longer holds."""

    by_plan = True

    def fused_obstacle(self) -> str:
        """Why the module's own forward runs as things are now, in words; empty where it is fused."""
        plan = self._plan()
        return _NO_PLAN if plan is None else plan.obstacle(self)  # type: ignore[arg-type]

    def _plan(self) -> Plan | None:
        """None in an instance that the class itself was called for, as slicing an ``nn.Sequential`` does."""
        return self.__dict__.get(_PLAN)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        plan = self._plan()
        plain = plan is not None and not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if plan is None or not plain or plan.obstacle(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        (x,) = args
        if plan.checkpointed and self.with_cp and x.requires_grad:  # type: ignore[attr-defined]
            return checkpoint(plan.run, self, x, use_reentrant=False)
        if torch.is_grad_enabled() or not isinstance(plan.result, Value):
            return plan.run(self, x)  # type: ignore[arg-type]
        net: Any = self
        return run(net, x, lambda x: (plan.run(net, x),), of_images=False)[0]


# ------------------------------------------------------------------------------------------------------------ report


class Row(NamedTuple):
    """One module in a report."""

    path: str
    kind: str  # class name before
    fused: bool
    text: str  # what was fused, or why it was left


class FuseReport:
    """What :func:`fuse_` did. ``print(report)`` shows a table; it is true where anything was fused.

    Attributes:
        rows: a :class:`Row` for every module that was fused or looked at and left.
        norms: how many norms were replaced.
    """

    def __init__(self, model: str, rows: list[Row], norms: int) -> None:
        self.model, self.rows, self.norms = model, rows, norms

    @property
    def fused(self) -> list[Row]:
        """The rows of modules that run on a plan or a fused norm now."""
        return [row for row in self.rows if row.fused]

    @property
    def left(self) -> list[Row]:
        """The rows of modules that were left alone, with the reason."""
        return [row for row in self.rows if not row.fused]

    def __bool__(self) -> bool:
        return bool(self.norms or self.fused)

    def __str__(self) -> str:
        counts = f"{len(self.fused)} modules fused, {len(self.left)} left, {self.norms} norms replaced"
        head = f"fuse_({self.model}): {counts}"
        if not self.rows:
            return f"{head}\nno batch norm in it: the model is as it was"
        groups: dict[tuple[bool, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((not row.fused, row.kind, row.text), []).append(row.path or "(model)")
        table = [("", "modules", "class", "parts, or why not")]
        for (left, kind, text), paths in sorted(groups.items(), key=lambda item: item[0][0]):
            table.append(("left" if left else "fused", _paths(paths), kind, text))
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in table
        ]
        return "\n".join([head, *(line.rstrip() for line in lines)])

    __repr__ = __str__


def _paths(paths: list[str]) -> str:
    if len(paths) <= 3:
        return ", ".join(paths)
    return f"{paths[0]}, {paths[1]} ... {paths[-1]} ({len(paths)})"


# ----------------------------------------------------------------------------------------------------- fuse, unfuse


def _norm_target(norm: nn.Module) -> type[nn.Module] | str:
    """The class that a norm becomes, or why it is left."""
    target: type[nn.Module] | None = FusedBatchNorm2d if reverted(norm) else _NORMS.get(type(norm))
    if f"{type(norm).__module__}.{type(norm).__name__}" == "timm.layers.norm_act.BatchNormAct2d":
        target = fused_class(FusedNormAct, type(norm))
    if target is None:
        names = [original.__name__ for original in _NORMS]
        return f"is {type(norm).__name__}, not exactly {' or '.join(names)}"
    return "has a forward of its own" if "forward" in norm.__dict__ else target


def _own(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "fastres"


def fuse_(model: nn.Module) -> FuseReport:
    """Swap fused parts into ``model``, in place.

    Args:
        model: any module. Parameters and buffers stay the same tensors under the same names, hooks stay, and an
            optimizer made before goes on. Calling it twice is calling it once.

    Returns:
        The report: what was fused, what was left and why. A model with nothing to fuse is left as it was.

    Results agree with the original's within the rounding of another order of operations; on the CPU, where PyTorch's
    own operators run, they are the same operations. One difference is documented: a block recomputed under activation
    checkpointing updates its running statistics once a step, eager twice.

    Raises:
        TypeError: not a module.

    A forward hook that wants the output of a norm inside a fused block makes that block run its own forward.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        >>> fuse_(model)
        fuse_(Sequential): 1 modules fused, 0 left, 1 norms replaced
               modules  class       parts, or why not
        fused  (model)  Sequential  0+1+2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model is {type(model).__name__}; wanted an nn.Module")
    rows: list[Row] = []
    norms = 0
    model_name = getattr(type(model), "fused_from", type(model)).__name__
    planned: set[nn.Module] = set()
    # Plans first: they look at the norms as they were.
    todo: list[tuple[nn.Module, Plan]] = []
    for path, module in model.named_modules():
        if isinstance(module, FusedForward) and module._plan() is None:
            module.__class__ = module.fused_from  # type: ignore[assignment]
        if isinstance(module, FusedForward) or _own(module) or not _holds_norms(module):
            continue
        try:
            plan = make_plan(module)
            check_class(module)
        except NotUnderstood as reason:
            rows.append(Row(path, type(module).__name__, False, str(reason)))
            continue
        rows.append(Row(path, type(module).__name__, True, plan.text))
        todo.append((module, plan))
        planned.update(module._modules[step.norm] for step in plan.steps if step.norm)
    for path, module in model.named_modules():
        if (
            not isinstance(module, _BatchNorm)
            or isinstance(module, FusedNorm)
            or isinstance(module, FusedForward)
        ):
            continue
        target = _norm_target(module)
        kind = type(module).__name__
        if isinstance(target, str):
            rows.append(Row(path, kind, False, target))
            continue
        module.__dict__[_MARK] = type(module)
        module.__class__ = target  # type: ignore[assignment]
        norms += 1
        if module not in planned:
            rows.append(Row(path, kind, True, f"{target.__name__}, alone"))
    for module, plan in todo:
        module.__dict__[_PLAN] = plan
        module.__class__ = fused_class(FusedForward, type(module))
    return FuseReport(model_name, rows, norms)


def _holds_norms(module: nn.Module) -> bool:
    return any(isinstance(child, _BatchNorm) for child in module.children())


def unfuse_(model: nn.Module) -> int:
    """Undo :func:`fuse_` in place: every module gets the class back that it had.

    Norms that were made otherwise (a :class:`fastres.FusedBatchNorm2d` of the model's own) are left.

    Returns:
        How many modules changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_: model is {type(model).__name__}; wanted an nn.Module")
    changed = 0
    for module in model.modules():
        if isinstance(module, FusedForward):
            module.__class__ = module.fused_from  # type: ignore[assignment]
            module.__dict__.pop(_PLAN, None)
        elif _MARK in module.__dict__ and isinstance(module, FusedNorm):
            module.__class__ = module.__dict__.pop(_MARK)
            module.__dict__.pop("_modes", None)
        else:
            continue
        changed += 1
    return changed


# ----------------------------------------------------------------------------------------------------- channels_last


def _to_channels_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple(map(_laid_out, args)), {key: _laid_out(value) for key, value in kwargs.items()}


def _laid_out(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def channels_last_(model: nn.Module, on: bool = True) -> nn.Module:
    """Put the 4-d parameters and buffers of ``model``, and from now on its inputs, into channels_last, in place.

    Parameters stay the same objects with the same values, so optimizers and checkpoints go on. Inputs are laid out by a
    forward pre-hook on ``model`` itself, floating tensors [N, C, H, W] only; everything inside follows from them.

    Args:
        model: any module.
        on: False goes back to the default layout and removes the hook.

    Returns:
        ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"channels_last_: model is {type(model).__name__}; wanted an nn.Module")
    memory = torch.channels_last if on else torch.contiguous_format
    for tensor in _four_dimensional(model):
        tensor.data = tensor.data.contiguous(memory_format=memory)
        if tensor.grad is not None:
            tensor.grad.data = tensor.grad.data.contiguous(memory_format=memory)
    mine = [key for key, hook in model._forward_pre_hooks.items() if hook is _to_channels_last]
    if on and not mine:
        model.register_forward_pre_hook(_to_channels_last, with_kwargs=True)
    for key in [] if on else mine:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def _four_dimensional(model: nn.Module) -> Iterator[Tensor]:
    seen: set[Tensor] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4 and tensor not in seen:
            seen.add(tensor)
            yield tensor
