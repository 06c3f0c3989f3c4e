"""What a module's forward depends on, read from its bytecode: its children, constants, and nothing else.

A plan made from a traced forward stands for that forward only if everything that the code reads is either a child that
is called, a plain constant (checked again at every forward), or a function without a memory. Whatever else it names,
stores or reaches for is a reason to leave the module alone.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["NotUnderstood", "constants_of"]


class NotUnderstood(Exception):
    """Why a module is left alone, in words."""


# Names of functions and modules that a forward may load; what is called through them is checked in the traced graph.
_GLOBALS = {"torch", "F", "nn", "functional", "enumerate", "getattr", "tuple", "list", "len", "range", "zip",
            "reversed", "float", "int", "bool", "checkpoint", "checkpoint_seq", "cp"}  # fmt: skip
# Attributes of those modules, of lists, and of tensors; the last are checked in the graph as well.
_ATTRIBUTES = {"nn", "functional", "relu", "relu_", "flatten", "view", "size", "mean", "cat", "add", "append", "values",
               "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "dropout", "jit", "is_scripting", "requires_grad",
               "checkpoint", "utils"}  # fmt: skip
_STORES = {"STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_GLOBAL", "DELETE_SUBSCR"}
_PLAIN = (bool, int, float, str, type(None))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return isinstance(value, _PLAIN)


def constants_of(module: nn.Module) -> tuple[dict[str, Any], bool]:
    """The plain attributes that the forward of ``module`` reads, and whether it looks at ``training``.

    Raises:
        NotUnderstood: the code may depend on something else.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise NotUnderstood(f"its forward is a {type(forward).__name__}")
    constants: dict[str, Any] = {}
    if forward is nn.Sequential.forward:
        return constants, False
    done: set[CodeType] = set()
    todo: list[Callable[..., Any]] = [forward]
    while todo:
        function = todo.pop()
        code = getattr(function, "__code__", None)
        if code is None or code.co_freevars:
            raise NotUnderstood(
                f"{getattr(function, '__name__', function)} is wrapped or uses names around it"
            )
        if code not in done:
            done.add(code)
            todo += _read(module, code, constants)
    return constants, constants.pop("training", None) is not None


def _read(module: nn.Module, code: CodeType, constants: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Collect the constants of one function; its methods are still to be read."""
    for part in _codes(code):
        for instruction in dis.get_instructions(part):
            name, kind = instruction.argval, instruction.opname
            if kind in _STORES:
                raise NotUnderstood(f"{code.co_name} stores {name or 'an item'}")
            if kind in ("LOAD_GLOBAL", "LOAD_NAME") and name not in _GLOBALS:
                raise NotUnderstood(f"{code.co_name} uses {name}")
            if kind in ("LOAD_ATTR", "LOAD_METHOD"):
                if method := _attribute(module, code.co_name, name, constants):
                    yield method


def _attribute(
    module: nn.Module, where: str, name: str, constants: dict[str, Any]
) -> Callable[..., Any] | None:
    static = inspect.getattr_static(type(module), name, None)
    if isinstance(static, property):
        return static.fget
    if isinstance(static, FunctionType):
        if getattr(nn.Module, name, None) is static:
            raise NotUnderstood(f"{where} uses {name}")
        return static
    value = getattr(module, name, _MISSING)
    if isinstance(value, nn.Module):
        return None
    if value is not _MISSING:
        if not _plain(value):
            raise NotUnderstood(f"{where} reads {name}, a {type(value).__name__}")
        constants[name] = copy.deepcopy(value)
    elif name not in _ATTRIBUTES and any(hasattr(child, name) for child in module.children()):
        raise NotUnderstood(f"{where} reads {name} of a child")
    return None


_MISSING = object()
