"""Other people's packages, for tests beside them: imported where they are installed, else a skip with the reason.

Tests that use them are marked ``peers``; ``tests/run.py`` gives them a process with the folder that
``tests/set_up_peers.py`` has filled.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from types import ModuleType

import pytest
import torch

from tests.set_up_peers import FOLDER, MISSING

_library: torch.library.Library | None = None


def _define_missing_operators() -> None:
    """torchvision's wheel for CUDA imports on a CPU torch once the operators that it has fakes for are declared."""
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def why_missing(name: str, error: Exception) -> str:
    """The reason of a skip: what pip said when the package was to be installed, else what the import said."""
    file = FOLDER / MISSING
    package = name.partition(".")[0]
    group = "mmengine" if package.startswith("mm") else package
    said = json.loads(file.read_text()).get(group) if file.is_file() else None
    return f"{name} does not import: {type(error).__name__}: {error}" + (f"; {said}" if said else "")


def peer(name: str) -> ModuleType:
    """A package or module of one; skips the test with the reason where it does not import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name.partition(".")[0] in ("torchvision", "timm", "mmpretrain"):
                try:
                    importlib.import_module("torchvision")
                except RuntimeError as error:
                    if "does not exist" not in str(error):
                        raise
                    for loaded in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                        del sys.modules[loaded]
                    _define_missing_operators()
            return importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            pytest.skip(why_missing(name, error))
