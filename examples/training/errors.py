"""Faults that the person at the keyboard can mend: shown as one message, without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn"}


class TrainingError(Exception):
    """Something the user gave (data, option, checkpoint, device) does not work; the message says what and why."""


def optional(module: str) -> ModuleType | None:
    """The module, or None where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def missing(module: str, purpose: str) -> str:
    top = module.partition(".")[0]
    return f"{purpose} needs {PACKAGES.get(top, top)}, which is not installed: pip install 'fastres[train]'"


def require(module: str, purpose: str) -> ModuleType:
    """The module; TrainingError naming the package and the extra where it is not installed."""
    found = optional(module)
    if found is None:
        raise TrainingError(missing(module, purpose))
    return found
