"""What a run shows and writes as text: header, progress bars, tables, CSV files."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastres
from training.errors import TrainingError
from training.loading import Data
from training.runtime import Runtime
from training.settings import Settings


class CsvLog:
    """A CSV file whose first column counts up from 1. Every row is on disk when `write` returns.

    Args:
        path: the file.
        columns: its header.
        keep: rows to keep of what is there; those after, written between the last checkpoint and a kill, are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: int = 0) -> None:
        self.path, self.columns = path, list(columns)
        kept = [r for r in read_csv(path) if int(r[columns[0]]) <= keep] if keep and path.exists() else []
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([[row.get(c, "") for c in self.columns] for row in kept])
        os.replace(temporary, path)
        self._file = open(path, "a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def write(self, values: Sequence[Any]) -> None:
        self._writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in values])
        self._file.flush()

    def rows(self) -> list[dict[str, float]]:
        """Everything in the file as numbers; empty cells are left out."""
        return [{k: float(v) for k, v in row.items() if v} for row in read_csv(self.path)]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Whole rows only: a kill may have cut off the last one."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(lines) if None not in row.values() and None not in row]


# --- header and tables --------------------------------------------------------------------------------------


def header(settings: Settings, runtime: Runtime, data: Data, norm: str, parameters: int | None = None) -> str:
    """What runs where, in one screen."""
    config = settings.config
    backbone = config["model"]["backbone"]
    name = f"{backbone['type']}-{backbone['depth']}" if "depth" in backbone else str(backbone["type"])
    size = "" if parameters is None else f", {parameters / 1e6:.2f} M parameters"
    images = (
        f"{type(data.train_set).__name__}, {len(data.train_set):,} for training, {len(data.val_set):,} for validation, "
        f"{len(data.train_set.classes)} classes, batches of {data.train.images_per_step}"
    )
    optimizer, schedule = config["optimizer"], config["lr_config"]["policy"]
    precision = {"off": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast"}[config["amp"]]
    layout = "channels_last" if config["channels_last"] else "NCHW"
    rows = [
        ("versions", versions()),
        ("device", describe_device(runtime)),
        ("config", str(settings.path)),
        ("model", f"{name}{size}, norm {norm}"),
        ("data", images),
        (
            "training",
            f"{settings.epochs} epochs, {optimizer['type']}, learning rate {optimizer['lr']:g} ({schedule}), "
            f"seed {settings.seed}",
        ),
        ("precision", f"{precision}, {layout}{', torch.compile' if config['compile'] else ''}"),
        ("writes to", str(settings.work_dir)),
    ]
    lines = [f"{k:<10} {v}" for k, v in rows] + [f"{'note':<10} {n}" for n in settings.notes]
    rule = "─" * min(100, max(map(len, lines)))
    return "\n".join([rule, *lines, rule])


def versions() -> str:
    parts = [f"fastres {fastres.__version__}", f"torch {torch.__version__}"]
    try:
        parts.append(f"triton {importlib.metadata.version('triton')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no triton")
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def describe_device(runtime: Runtime) -> str:
    several = f", {runtime.world} processes" if runtime.world > 1 else ""
    if runtime.on_cuda:
        properties = torch.cuda.get_device_properties(runtime.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{several}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}{several}"


def describe_norms(model: nn.Module) -> str:
    """The kinds of norm layer in a model with their numbers, such as '20 FusedBatchNorm2d'."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return ", ".join(f"{n} x {k}" for k, n in counts.items()) or "none"


def table(rows: Sequence[Sequence[str]], header_rows: int = 1) -> str:
    """Columns aligned, the first to the left, with rules around the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([rule, *lines[:header_rows], rule, *lines[header_rows:], rule])


def final_table(epochs: Sequence[Mapping[str, float]], best_epoch: int, broken: int, seconds: float) -> str:
    """Last and best epoch of a run."""
    last = epochs[-1]
    best = next((r for r in epochs if int(r["epoch"]) == best_epoch), last)
    columns = [("last epoch", last), ("best epoch", best)]
    rows = [["", *(f"{name} ({int(r['epoch'])})" for name, r in columns)]]
    rows.append(["training loss", *(_number(r, "train_loss", ".4f") for _, r in columns)])
    rows.append(["validation loss", *(_number(r, "val_loss", ".4f") for _, r in columns)])
    for key in [k for k in last if k.startswith("val_top")]:
        rows.append(
            [f"validation accuracy, top {key[7:]}", *(_number(r, key, ".2f", " %") for _, r in columns)]
        )
    rows.append(["images/s, with loading", *(_number(r, "images_per_s", ",.0f") for _, r in columns)])
    if broken:
        rows.append(["broken images skipped", str(broken), ""])
    rows.append(["time of this session", f"{seconds:.0f} s", ""])
    return table(rows)


def written(paths: Sequence[Path | None]) -> str:
    return "written:\n" + "\n".join(f"  {p}" for p in paths if p is not None and p.exists())


def _number(row: Mapping[str, float], key: str, spec: str, unit: str = "") -> str:
    return f"{row[key]:{spec}}{unit}" if key in row else "-"


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise TrainingError(f"cannot make the folder {path}: {e.strerror or e}") from e
