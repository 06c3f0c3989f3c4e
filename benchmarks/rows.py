"""Rows of measurements: JSON lines, one file a run, never overwritten.

The first line of a file is the run: environment, git commit, date, command. Every other line is a row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastres.environment import environment, gpu_state

__all__ = ["RESULTS", "Writer", "commit", "key", "read"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
_KEY = ("suite", "case", "alternative", "batch", "size", "dtype", "mode")


def commit() -> str:
    """The checked-out commit, ``+`` after it where the working tree differs; FASTRES_COMMIT outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=30
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30
        )
    except OSError:
        return os.environ.get("FASTRES_COMMIT", "")
    if head.returncode:
        return os.environ.get("FASTRES_COMMIT", "")
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures; rows of two runs with the same key may be compared."""
    return tuple(row.get(k) for k in _KEY)


class Writer:
    """Appends rows to a new file in ``folder``; each is on disk before the next measurement begins."""

    def __init__(self, folder: Path, suite: str, device: torch.device) -> None:
        now = datetime.now(timezone.utc)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.suite = suite
        self.head = {
            "kind": "run", "schema": SCHEMA, "suite": suite, "device": name, "commit": commit(),
            "date": now.isoformat(timespec="seconds"), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "environment": environment(),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        label = re.sub(r"[^a-z0-9]+", "-", f"{suite}-{name}".lower()).strip("-")
        self.path, self.empty = folder / f"{now:%Y%m%dT%H%M%S%f}-{label}.jsonl", True
        self._file = self.path.open("x")
        self._write(self.head)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def row(self, **values: Any) -> dict[str, Any]:
        """Write one row, of another suite than the file's where it says so; on a GPU with its clocks at this moment."""
        row = {"kind": "row", "suite": self.suite, **values}
        if self.head["device"] != "cpu":
            row["gpu_state"] = gpu_state()
        self._write(row)
        self.empty = False
        return row

    def close(self) -> None:
        """Close the file; one without a row is removed."""
        self._file.close()
        if self.empty:
            self.path.unlink()


def read(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every run under ``folder``, oldest first: its head and its rows. ValueError names a line that is not JSON."""
    for path in sorted(folder.rglob("*.jsonl")):
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if rows and rows[0].get("kind") == "run":
            yield {**rows[0], "file": path.name}, [r for r in rows[1:] if r.get("kind") == "row"]
