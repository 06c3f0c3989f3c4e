"""Checkpoints: written whole or not at all, and holding everything that decides the numbers after them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.errors import TrainingError

FORMAT = "fastres training state 1"
# Differences in these keys change what the numbers mean, or where in the data a run stands.
FIXED = ("model", "data", "seed", "amp")
FREE = ("data.workers_per_gpu", "data.strict")


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes beside ``path``, then renames: a reader finds the old file or the new one, never a part of either."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state, format=FORMAT), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write the checkpoint {path}: {e.strerror or e}") from e
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut, too
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU. Reads plain values and tensors only, so a file from elsewhere runs no code.

    Raises:
        TrainingError: missing, damaged, or not written by this program.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds on damaged files
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise TrainingError(f"{path}: cannot be read as a checkpoint: {reason}") from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path}: not a checkpoint of this program (no {FORMAT!r} in it)")
    return state


def check_config(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> list[str]:
    """Compares the config of a checkpoint with this run's.

    Returns:
        One line for each difference a run may go on with, such as another learning rate.

    Raises:
        TrainingError: a difference in model, data, seed or precision.
    """
    old, new = _leaves(saved), _leaves(now)
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and not k.startswith(FREE)]
    lines = [f"{k}: {old.get(k, 'absent')!r} -> {new.get(k, 'absent')!r}" for k in changed]
    fixed = [line for k, line in zip(changed, lines, strict=True) if k.partition(".")[0] in FIXED]
    if fixed:
        raise TrainingError(
            f"{path}: was written by a run with another config; cannot resume it with\n  "
            + "\n  ".join(fixed)
        )
    return lines


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """``{"a.b": 1}`` of ``{"a": {"b": 1}}``; lists count as leaves."""
    if not isinstance(value, Mapping) or (not value and key):
        return {key: value}
    leaves: dict[str, Any] = {}
    for k, v in value.items():
        leaves.update(_leaves(v, f"{key}.{k}" if key else str(k)))
    return leaves
