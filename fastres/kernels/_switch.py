"""Process-wide switches: their values from the environment, and for the time of a ``with`` block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["from_environment", "known", "switched"]


def known(value: str, source: str, values: tuple[str, ...]) -> str:
    """``value``; ValueError, naming where it comes from, where it is none of ``values``."""
    if value not in values:
        raise ValueError(f"{source} is {value!r}; wanted one of {', '.join(values)}")
    return value


def from_environment(variable: str, default: str, values: tuple[str, ...]) -> str:
    """What the variable says, in any case, or the default."""
    return known(os.environ.get(variable, "").lower() or default, variable, values)


@contextmanager
def switched(setting: Any, name: str, value: str, values: tuple[str, ...]) -> Iterator[None]:
    """The attribute ``name`` of ``setting`` is ``value`` inside the block; ValueError for none of ``values``."""
    before = getattr(setting, name)
    setattr(setting, name, known(value, name, values))
    try:
        yield
    finally:
        setattr(setting, name, before)
