"""A module's forward as a plan in fused functions, and how it runs in its place.

A plan is one straight line of steps: calls of children, and fused functions where ``conv -> norm -> ReLU``,
``norm + shortcut -> ReLU`` and ``norm -> ReLU -> max pool`` stood. It is made by :mod:`fastres._matching`. What it
takes for granted is looked up again at every forward (:meth:`Plan.obstacle`), so that a model whose norms are folded,
converted, replaced or hooked later falls back to its own forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import functional as FF
from fastres._fusable import hooked, norm_obstacle, observed, relu_obstacle

__all__ = ["ADD", "FUNCTIONS", "METHODS", "NAME_OF", "Plan", "Step", "Value", "drops_paths", "plain_pool"]

# Functions and methods without side effects (or whose side effect is checked, see _mutated) that a plan may call.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "iadd": operator.iadd, "torch.add": torch.add, "mul": operator.mul, "cat": torch.cat,
    "relu": F.relu, "torch.relu": torch.relu, "flatten": torch.flatten, "avg_pool2d": F.avg_pool2d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d, "max_pool2d": F.max_pool2d, "dropout": F.dropout,
}  # fmt: skip
NAME_OF = {function: name for name, function in FUNCTIONS.items()}
METHODS = {"view", "size", "flatten", "mean", "relu", "add"}
ADD = {"add", "iadd", "torch.add"}


class Value(NamedTuple):
    """Stands for the result of an earlier step among a step's arguments."""

    at: int


class Step(NamedTuple):
    """One operation. ``kind``: call (child ``name``), function, method, norm, end, pool or input.

    ``conv``, ``norm``, ``relu``, ``drop`` name the children that take part in a fused one; "" where there is none.
    """

    kind: str
    out: int
    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    conv: str = ""
    norm: str = ""
    relu: str = ""
    drop: str = ""
    act: bool = False  # a ReLU belongs to it, as a child or as a function


def drops_paths(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath"  # timm's, mmcv's, mmpretrain's, ours


def plain_pool(pool: nn.Module) -> bool:
    """Whether a module is exactly the 3x3 max pooling, stride 2, padding 1, that can be fused."""
    if type(pool) is not nn.MaxPool2d or hooked(pool) or pool.ceil_mode or pool.return_indices:
        return False
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return all(s in (wanted, (wanted, wanted)) for s, wanted in zip(sizes, (3, 2, 1, 1), strict=True))


# ------------------------------------------------------------------------------------------------------------ plans


class Plan(NamedTuple):
    """What runs instead of a module's forward. Plain data: it is copied and pickled with its module."""

    steps: tuple[Step, ...]
    result: Any
    children: tuple[str, ...]  # the module's children when it was traced
    constants: tuple[tuple[str, Any], ...]  # what its forward reads
    identities: tuple[str, ...]  # children that did nothing
    checkpointed: bool  # the module has ``with_cp``, which the plan honours
    text: str  # in words, for reports

    def obstacle(self, module: nn.Module) -> str:
        """Why the module's own forward has to run instead, in words; empty where the plan holds."""
        children = module._modules
        if tuple(children) != self.children:
            return "its children have changed"
        for name, value in self.constants:
            if getattr(module, name, None) != value:
                return f"{name} has changed"
        for name in self.identities:
            if type(children[name]) is not nn.Identity or hooked(children[name]):  # type: ignore[arg-type]
                return f"{name} has changed"
        for step in self.steps:
            if step.norm and (why := norm_obstacle(children[step.norm])):  # type: ignore[arg-type]
                return f"{step.norm} {why}"
            if step.relu and (why := relu_obstacle(children[step.relu])):  # type: ignore[arg-type]
                return f"{step.relu} {why}"
            if step.drop and (not drops_paths(children[step.drop]) or hooked(children[step.drop])):  # type: ignore[arg-type]
                return f"{step.drop} has changed"
            if step.kind == "pool" and not plain_pool(children[step.name]):  # type: ignore[arg-type]
                return f"{step.name} has changed"
        return observed()

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """The module's forward on ``x``."""
        values: list[Any] = [None] * (1 + max(step.out for step in self.steps))
        for step in self.steps:
            if step.kind == "input":
                values[step.out] = x
            else:
                values[step.out] = _run_step(step, module._modules, values, x)
        return _filled(self.result, values, FF.materialize)


def _filled(argument: Any, values: list[Any], read: Callable[[Any], Any]) -> Any:
    """An argument with the values in it put in."""
    if isinstance(argument, Value):
        return read(values[argument.at])
    if isinstance(argument, tuple | list):
        return type(argument)([_filled(one, values, read) for one in argument])
    return argument


def _run_step(step: Step, children: dict[str, Any], values: list[Any], x: Tensor) -> Any:
    if step.kind == "norm":
        (source,) = step.args
        norm = children[step.norm].fused()
        if step.conv:
            return FF.conv_bn(values[source.at], children[step.conv], norm, step.act)
        return FF.batch_norm(FF.materialize(values[source.at]), norm, step.act)
    if step.kind == "end":
        branch, identity = (values[value.at] for value in step.args)
        # An activation that is pending is a shortcut from within the module: it is read as a tensor.
        branch = FF.materialize(branch) if getattr(branch, "relu", False) is True else branch
        identity = FF.materialize(identity) if getattr(identity, "relu", False) is True else identity
        keep = children[step.drop](x.new_ones(x.shape[0], 1, 1, 1)).flatten() if step.drop else None
        return FF.add_relu(branch, identity, keep)
    if step.kind == "pool":
        return FF.max_pool(values[step.args[0].at])
    if step.kind == "shortcut":
        return _shortcut(children[step.name], FF.materialize(values[step.args[0].at]))
    args = _filled(step.args, values, FF.materialize)
    kwargs = {key: _filled(value, values, FF.materialize) for key, value in step.kwargs}
    if step.kind == "call":
        return children[step.name](*args, **kwargs)
    if step.kind == "function":
        return FUNCTIONS[step.name](*args, **kwargs)
    return getattr(args[0], step.name)(*args[1:], **kwargs)


def _shortcut(module: nn.Module, x: Tensor) -> Tensor | FF.Pending:
    """A downsample branch, its last convolution and norm still pending where the module is as plain as that."""
    plain = type(module).__dict__.get("fused_from", type(module)) is nn.Sequential
    if not plain or len(module) < 2 or hooked(module):  # type: ignore[arg-type]
        return module(x)
    *before, conv, norm = module.children()
    if norm_obstacle(norm):
        return module(x)
    for one in before:
        x = one(x)
    return FF.conv_bn(x, conv, norm.fused())  # type: ignore[operator]
