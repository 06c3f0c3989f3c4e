"""``--compare``: the same seed trained with BN and with FusedBN, step by step beside each other.

Both sides take every step on the same batch, in turns, so whatever else the machine does falls on both alike. Only
the step itself (forward, backward, update) is timed, after a warm-up whose effects are undone.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.config import ConfigError, format_config
from training.engine import Metrics, Trainer
from training.errors import TrainingError
from training.loading import BrokenImages, Data
from training.memory import peak_memory, saved_bytes
from training.plots import comparison_curves
from training.progress import Progress
from training.report import CsvLog, header, table, written
from training.runtime import Runtime, random_state, set_random_state
from training.settings import Settings

PAIRS = (("BN", "FusedBN"), ("SyncBN", "FusedSyncBN"))
SWAPPED = (*PAIRS[0], *PAIRS[1], "BN2d")
WARM_UP = 3
# The project's rule (tests/tolerance.py): |ours - ref64| <= 2 |eager - ref64| + FLOOR max |ref64|, in max norms.
FACTOR = 2.0
FLOOR = {"off": 1e-6, "bf16": 8e-3, "fp16": 1e-3}


@dataclass
class Side:
    name: str
    trainer: Trainer
    random: dict[str, Any]
    memory: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One timed step with this side's own random numbers. Returns the loss."""
        runtime = self.trainer.runtime
        set_random_state(self.random, runtime.device)
        runtime.wait()
        start = time.perf_counter()
        loss, _ = self.trainer.step(images, labels)
        runtime.wait()
        self.seconds.append(time.perf_counter() - start)
        self.random = random_state(runtime.device)
        return loss


@dataclass(frozen=True)
class Agreement:
    """How far the losses of the first steps lie from float64's, and whether the rule holds."""

    steps: int
    eager: float
    fused: float
    allowed: float
    between: float

    @property
    def holds(self) -> bool:
        return self.fused <= self.allowed  # False for NaN


def compare(settings: Settings, runtime: Runtime, data: Data, progress: Progress) -> int:
    """Trains both sides, prints and writes the comparison.

    Returns:
        0; or 1 where an accuracy is below ``compare.min_accuracy`` or the losses disagree.
    """
    start = time.perf_counter()
    config = settings.config
    names = _pair_of(config["model"])
    progress.print(header(settings, runtime, data, f"{names[0]} (eager) and {names[1]} (fastres)"))
    sides = [_warmed_up(name, settings, runtime, data) for name in names]
    reference = _reference(names[0], settings, runtime, data, progress)
    logs = _logs(settings, names) if runtime.is_main else None
    broken = BrokenImages(progress)
    for epoch in range(settings.epochs):
        _train_epoch(sides, epoch, settings, runtime, data, progress, broken)
        for side in sides:
            side.metrics.append(side.trainer.evaluate(broken.watch(data.val)))
        progress.print(_epoch_line(sides, epoch, settings.epochs, len(data.train)))
        if logs is not None:
            _write_epoch(logs, sides, epoch, len(data.train), reference)
    agreement = judge(sides[0].losses, sides[1].losses, reference, FLOOR[config["amp"]])
    if logs is None:
        return 0
    picture = _picture(settings, sides, logs, reference, agreement, progress)
    progress.print(_result_table(sides, runtime, data))
    progress.print(_agreement_line(names, agreement))
    if broken.lines:
        progress.print(f"broken images skipped: {len(broken.lines)}")
    progress.print(written([picture, logs[0].path, logs[1].path, settings.work_dir / "config.py"]))
    wanted = config["compare"]["min_accuracy"]
    failures = verdict(sides, agreement, wanted)
    for failure in failures:
        progress.print(f"FAILED: {failure}")
    if not failures:
        good = "losses agree" if agreement is not None else "losses not judged"
        good += "" if wanted is None else f", both reach {wanted:g} % test accuracy"
        progress.print(f"ok: {good}; {time.perf_counter() - start:.0f} s in all")
    return 1 if failures else 0


def swap_norm(model_cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The model's config with every batch norm in `SWAPPED` replaced by ``name``; the other keys stay.

    Raises:
        ConfigError: the config names norms, and none of them can be swapped.
    """
    seen: list[str] = []
    count = 0

    def walk(value: Any) -> Any:
        nonlocal count
        if isinstance(value, Mapping):
            new = {k: walk(v) for k, v in value.items()}
            norm = new.get("norm_cfg")
            if isinstance(norm, dict) and "type" in norm:
                seen.append(str(norm["type"]))
                if _local(norm["type"]) in SWAPPED:
                    count += 1
                    new["norm_cfg"] = {**norm, "type": name}
            return new
        return type(value)(map(walk, value)) if type(value) in (list, tuple) else value

    swapped = walk(model_cfg)
    if not seen:
        swapped["backbone"]["norm_cfg"] = dict(type=name)
    elif not count:
        raise ConfigError(f"model: --compare swaps BN and FusedBN, the config has {', '.join(seen)} only")
    return swapped


def judge(
    eager: Sequence[float], fused: Sequence[float], reference: Sequence[float], floor: float
) -> Agreement | None:
    """The rule of the tolerance table on the losses of the steps that have a reference; None without one."""
    steps = len(reference)
    if not steps:
        return None
    eager_error = _distance(eager[:steps], reference)
    allowed = FACTOR * eager_error + floor * max(map(abs, reference))
    between = _distance(fused[:steps], eager[:steps])
    return Agreement(steps, eager_error, _distance(fused[:steps], reference), allowed, between)


def verdict(sides: Sequence[Side], agreement: Agreement | None, min_accuracy: float | None) -> list[str]:
    """What is wrong with the result; nothing if it is as it should be."""
    failures = []
    for side in sides:
        accuracy = side.metrics[-1].accuracy[0]
        if not all(map(math.isfinite, side.losses)):
            failures.append(f"{side.name}: a loss is not finite")
        if min_accuracy is not None and not accuracy >= min_accuracy:
            failures.append(f"{side.name}: accuracy {accuracy:.2f} % is below {min_accuracy:g} %")
    if agreement is not None and not agreement.holds:
        failures.append(
            f"losses disagree: {sides[1].name} is {agreement.fused:.2e} from float64, allowed {agreement.allowed:.2e}"
        )
    return failures


# --- training -----------------------------------------------------------------------------------------------


def _pair_of(model_cfg: Mapping[str, Any]) -> tuple[str, str]:
    text = str(model_cfg)
    return PAIRS[1] if "SyncBN" in text else PAIRS[0]


def _local(name: Any) -> Any:
    return name.removeprefix("fastres.") if isinstance(name, str) else name


def _build(
    name: str, settings: Settings, runtime: Runtime, data: Data, dtype: torch.dtype = torch.float32
) -> Trainer:
    model_cfg = swap_norm(settings.config["model"], name)
    normalization = data.train_set.pipeline.normalization
    return Trainer(settings, runtime, model_cfg, len(data.train), normalization, dtype)


def _warmed_up(name: str, settings: Settings, runtime: Runtime, data: Data) -> Side:
    """A side after a few steps and an evaluation that were measured for memory, then undone."""
    runtime.wait()
    before = torch.cuda.memory_allocated(runtime.device) if runtime.on_cuda else 0
    trainer = _build(name, settings, runtime, data)
    start = copy.deepcopy(trainer.state())
    images, labels = trainer.prepare(next(data.train.epoch(0)))
    for _ in range(WARM_UP):
        trainer.step(images, labels)
    memory = (
        peak_memory(trainer, images, labels, before)
        if runtime.on_cuda
        else saved_bytes(trainer, images, labels)
    )
    trainer.load_state(start)
    return Side(name, trainer, start["random"][runtime.rank], memory)


def _reference(
    name: str, settings: Settings, runtime: Runtime, data: Data, progress: Progress
) -> list[float]:
    """Losses of the first steps in float64. Empty where none was asked for or the memory does not suffice."""
    steps = min(settings.config["compare"]["reference_steps"], len(data.train))
    if not steps:
        return []
    losses = []
    try:
        trainer = _build(name, settings, runtime, data, torch.float64)
        with progress.bar("reference in float64", steps) as bar:
            for _, batch in zip(range(steps), data.train.epoch(0), strict=False):
                losses.append(trainer.step(*trainer.prepare(batch))[0])
                bar.update()
    except torch.OutOfMemoryError:
        progress.print(
            "no float64 reference: not enough GPU memory at this batch size; losses are not judged"
        )
        return []
    return runtime.mean(torch.stack(losses)).tolist()


def _train_epoch(
    sides: list[Side],
    epoch: int,
    settings: Settings,
    runtime: Runtime,
    data: Data,
    progress: Progress,
    broken: BrokenImages,
) -> None:
    losses: list[list[Tensor]] = [[], []]
    with progress.bar(f"epoch {epoch + 1}/{settings.epochs}", len(data.train)) as bar:
        for step, batch in enumerate(broken.watch(data.train.epoch(epoch))):
            images, labels = sides[0].trainer.prepare(batch)
            # First one, then the other goes first: the second finds the batch in the cache.
            for i in (0, 1) if step % 2 == 0 else (1, 0):
                losses[i].append(sides[i].step(images, labels))
            if step % settings.config["log_config"]["interval"] == 0:
                shown = [f"{s.name} {data.train.images_per_step / s.seconds[-1]:,.0f} img/s" for s in sides]
                bar.set_postfix_str("  ".join(shown))
            bar.update()
    for side, tensors in zip(sides, losses, strict=True):
        side.losses += runtime.mean(torch.stack([t.double() for t in tensors])).tolist()


# --- showing ------------------------------------------------------------------------------------------------


def _logs(settings: Settings, names: Sequence[str]) -> tuple[CsvLog, CsvLog]:
    def columns(*kinds: str) -> list[str]:
        return [f"{kind}_{name}" for kind in kinds for name in names]

    folder = settings.work_dir
    (folder / "config.py").write_text(format_config(settings.config), encoding="utf-8")
    steps = CsvLog(folder / "steps.csv", ["step", "epoch", *columns("loss", "seconds"), "loss_fp64"])
    return steps, CsvLog(folder / "epochs.csv", ["epoch", *columns("loss", "accuracy")])


def _write_epoch(
    logs: tuple[CsvLog, CsvLog], sides: list[Side], epoch: int, steps: int, reference: Sequence[float]
) -> None:
    for i in range(epoch * steps, (epoch + 1) * steps):
        exact: Any = reference[i] if i < len(reference) else ""
        logs[0].write(
            [i + 1, epoch + 1, *(s.losses[i] for s in sides), *(s.seconds[i] for s in sides), exact]
        )
    logs[1].write(
        [epoch + 1, *(_epoch_loss(s, steps) for s in sides), *(s.metrics[-1].accuracy[0] for s in sides)]
    )


def _epoch_loss(side: Side, steps: int) -> float:
    return statistics.fmean(side.losses[-steps:])


def _epoch_line(sides: list[Side], epoch: int, epochs: int, steps: int) -> str:
    parts = [
        f"{s.name}: loss {_epoch_loss(s, steps):7.4f}  test {s.metrics[-1].accuracy[0]:6.2f} %" for s in sides
    ]
    return f"epoch {epoch + 1:{len(str(epochs))}}/{epochs}   " + "   ".join(parts)


def _result_table(sides: list[Side], runtime: Runtime, data: Data) -> str:
    images, steps = data.train.images_per_step, len(data.train)
    eager, fused = sides
    rates = [sorted(images / t for t in s.seconds) for s in sides]
    quartiles = [_quartiles(r) for r in rates]
    ratios = _quartiles([a / b for a, b in zip(eager.seconds, fused.seconds, strict=True)])
    memory = "peak memory of a step, MiB" if runtime.on_cuda else "saved for backward, MiB"
    rows = [["", f"{eager.name} (eager)", f"{fused.name} (fastres)", "ratio"]]
    rows.append(["images/s, median step", *(f"{q[1]:,.0f}" for q in quartiles), f"{ratios[1]:.2f}"])
    spread = [f"{low:,.0f} - {high:,.0f}" for low, _, high in quartiles]
    rows.append(["  middle half of steps", *spread, f"{ratios[0]:.2f} - {ratios[2]:.2f}"])
    ratio = fused.memory / eager.memory if eager.memory else math.nan
    rows.append([memory, *(f"{s.memory / 2**20:,.1f}" for s in sides), f"{ratio:.2f}"])
    rows.append(["training loss, last epoch", *(f"{_epoch_loss(s, steps):.4f}" for s in sides), ""])
    rows.append(["test loss", *(f"{s.metrics[-1].loss:.4f}" for s in sides), ""])
    for i, k in enumerate(eager.trainer.topk):
        label = "test accuracy" if k == 1 else f"test accuracy, top {k}"
        rows.append([label, *(f"{s.metrics[-1].accuracy[i]:.2f} %" for s in sides), ""])
    rows.append(
        ["best test accuracy", *(f"{max(m.accuracy[0] for m in s.metrics):.2f} %" for s in sides), ""]
    )
    return table(rows)


def _agreement_line(names: Sequence[str], agreement: Agreement | None) -> str:
    if agreement is None:
        return "losses were not judged: no float64 reference"
    a = agreement
    apart = "are equal to the last bit" if a.between == 0 else f"differ by at most {a.between:.1e}"
    return (
        f"losses of the first {a.steps} steps {apart};\n"
        f"  from float64: {names[0]} {a.eager:.1e}, {names[1]} {a.fused:.1e}, "
        f"allowed {a.allowed:.1e} (2 x {names[0]} + floor)"
    )


def _picture(
    settings: Settings,
    sides: list[Side],
    logs: tuple[CsvLog, CsvLog],
    reference: Sequence[float],
    agreement: Agreement | None,
    progress: Progress,
) -> Path | None:
    eager, fused = sides
    errors = [_distances(side.losses, reference) for side in sides] if reference else []
    allowed = agreement.allowed if agreement is not None else math.nan
    title = f"{settings.path.stem}, seed {settings.seed}: {eager.name} (eager) and {fused.name} (fastres)"
    names = [s.name for s in sides]
    path = settings.work_dir / "compare.png"
    return comparison_curves(path, title, names, logs[0].rows(), logs[1].rows(), errors, allowed, progress)


def _distances(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=False)]


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """max |a - b|, NaN if any is."""
    distances = _distances(a, b)
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def check(settings: Settings) -> None:
    """Objects to settings that a comparison cannot have, before data are loaded."""
    if not isinstance(settings.config["compare"]["min_accuracy"], (int, float, type(None))):
        value = settings.config["compare"]["min_accuracy"]
        raise TrainingError(f"compare.min_accuracy: got {value!r}, wanted a percentage")
    swap_norm(settings.config["model"], "FusedBN")
