"""Pictures of learning curves. Without matplotlib there is none, and a line that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from training.errors import missing, optional
from training.progress import Progress

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
Rows = Sequence[Mapping[str, float]]


def _pyplot(progress: Progress) -> ModuleType | None:
    matplotlib = optional("matplotlib")
    if matplotlib is None:
        progress.print(missing("matplotlib", "the picture of the learning curves"))
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update(
        {
            "figure.dpi": 130,
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return pyplot


def learning_curves(path: Path, title: str, steps: Rows, epochs: Rows, progress: Progress) -> Path | None:
    """Loss of every step and epoch, accuracy of every epoch. Returns the path, or None without matplotlib."""
    pyplot = _pyplot(progress)
    if pyplot is None:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    per_epoch = max(1, round(len(steps) / max(len(epochs), 1)))
    x = [s["step"] / per_epoch for s in steps]
    left.plot(
        x, [s["loss"] for s in steps], color=COLOURS[0], alpha=0.25, linewidth=0.8, label="training, steps"
    )
    _line(left, epochs, "train_loss", COLOURS[0], "training", shift=-0.5)  # a mean over the epoch
    _line(left, epochs, "val_loss", COLOURS[1], "validation")
    _line(right, epochs, "train_top1", COLOURS[0], "training", shift=-0.5)
    _line(right, epochs, "val_top1", COLOURS[1], "validation")
    _label(left, "loss")
    _label(right, "top-1 accuracy, %")
    figure.suptitle(title)
    return _save(figure, path, pyplot)


def comparison_curves(
    path: Path,
    title: str,
    names: Sequence[str],
    steps: Rows,
    epochs: Rows,
    errors: Sequence[Sequence[float]],
    allowed: float,
    progress: Progress,
) -> Path | None:
    """Losses and accuracies of both sides in one picture, and how far their first losses lie from float64's.

    Args:
        names: the eager side and the fused one.
        steps, epochs: rows with ``loss_NAME`` and ``accuracy_NAME`` for every name.
        errors: for every name a distance from float64 for each of the first steps; empty without a reference.
        allowed: the most that the rule allows the fused side.
    """
    pyplot = _pyplot(progress)
    if pyplot is None:
        return None
    panels = 3 if errors else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    per_epoch = max(1, round(len(steps) / max(len(epochs), 1)))
    x = [s["step"] / per_epoch for s in steps]
    styles: list[dict[str, Any]] = [
        dict(color=COLOURS[0], linewidth=3.5, alpha=0.45),
        dict(color=COLOURS[1], linewidth=1.2),
    ]
    for side, (name, style) in enumerate(zip(names, styles, strict=True)):
        thin = {**style, "linewidth": style["linewidth"] * 0.6, "alpha": 0.35}
        axes[0].plot(x, [s[f"loss_{name}"] for s in steps], **thin)
        # An epoch's mean belongs to its middle, its test accuracy to its end.
        middle = [e["epoch"] - 0.5 for e in epochs]
        axes[0].plot(middle, [e[f"loss_{name}"] for e in epochs], label=name, **style)
        accuracies = [e[f"accuracy_{name}"] for e in epochs]
        label = f"{name}, {accuracies[-1]:.2f} % at the end"
        axes[1].plot([e["epoch"] for e in epochs], accuracies, label=label, **style)
        if errors:
            # A logarithmic axis has no zero.
            shown = [max(v, 1e-9) for v in errors[side]]
            axes[2].plot(range(1, len(shown) + 1), shown, label=name, **style)
    _label(axes[0], "training loss (epochs, and faintly steps)")
    _label(axes[1], "test accuracy, %")
    if errors:
        axes[2].axhline(allowed, color="grey", linestyle="--", linewidth=1, label=f"allowed for {names[1]}")
        axes[2].set_yscale("log")
        _label(axes[2], "loss: distance from float64", "step of the first epoch")
    figure.suptitle(title)
    return _save(figure, path, pyplot)


def _line(axes: Any, rows: Rows, key: str, colour: str, label: str, shift: float = 0.0) -> None:
    have = [r for r in rows if key in r]
    if have:
        axes.plot(
            [r["epoch"] + shift for r in have],
            [r[key] for r in have],
            "o-",
            color=colour,
            markersize=3,
            label=label,
        )


def _label(axes: Any, y: str, x: str = "epoch") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.lines:
        axes.legend()


def _save(figure: Any, path: Path, pyplot: ModuleType) -> Path:
    figure.savefig(path)
    pyplot.close(figure)
    return path
