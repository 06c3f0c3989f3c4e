"""A run: epochs, logs, checkpoints, and going on where a killed run stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastres.config import format_config
from training import checkpoint
from training.engine import Metrics, Trainer
from training.errors import TrainingError
from training.loading import BrokenImages, Data
from training.progress import Progress
from training.report import CsvLog
from training.runtime import Runtime
from training.settings import Settings


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


@dataclass
class Position:
    """Where a run stands, and the sums of the epoch it is in."""

    epoch: int = 0
    step: int = 0  # within the epoch
    loss_sum: float = 0.0
    correct: list[float] = field(default_factory=list)
    steps_summed: int = 0
    best: float = -1.0
    best_epoch: int = 0

    def end_epoch(self) -> None:
        self.epoch += 1
        self.step = self.steps_summed = 0
        self.loss_sum, self.correct = 0.0, []


class Run:
    """Trains to the last epoch. ``work_dir`` gets config.py, steps.csv, epochs.csv, last.pt and best.pt.

    Every file is written by the process of rank 0 alone.
    """

    def __init__(self, settings: Settings, runtime: Runtime, data: Data, progress: Progress) -> None:
        self.settings, self.runtime, self.data, self.progress = settings, runtime, data, progress
        self.last, self.best = settings.work_dir / "last.pt", settings.work_dir / "best.pt"
        self.position = Position()
        self.broken = BrokenImages(progress)
        self.trainer = Trainer(
            settings,
            runtime,
            settings.config["model"],
            len(data.train),
            data.train_set.pipeline.normalization,
        )
        resumed = self._resume()
        names = [f"top{k}" for k in self.trainer.topk]
        epochs = ["epoch", "lr", "train_loss", *(f"train_{n}" for n in names), "val_loss"]
        epochs += [*(f"val_{n}" for n in names), "images_per_s", "seconds"]
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._since, self._images = time.perf_counter(), 0
        if runtime.is_main:
            done = self.position.epoch * len(data.train) + self.position.step
            self.steps_log = CsvLog(
                settings.work_dir / "steps.csv",
                ["step", "epoch", "lr", "loss", *names, "images_per_s"],
                done if resumed else 0,
            )
            self.epochs_log = CsvLog(
                settings.work_dir / "epochs.csv", epochs, self.position.epoch if resumed else 0
            )
            (settings.work_dir / "config.py").write_text(format_config(settings.config), encoding="utf-8")

    def _resume(self) -> bool:
        """Takes over a checkpoint where one is asked for, and guards those of earlier runs. True if it did."""
        settings = self.settings
        if settings.resume is None:
            if self.last.exists() and not settings.overwrite:
                raise TrainingError(
                    f"{self.last} holds an earlier run; --resume goes on with it, --overwrite starts over, "
                    "--work-dir puts this one elsewhere"
                )
            return False
        path = self.last if settings.resume == "auto" else Path(settings.resume)
        if settings.resume == "auto" and not path.exists():
            self.progress.print(f"nothing to resume in {settings.work_dir}: starting from the beginning")
            return False
        state = checkpoint.load(path)
        for line in checkpoint.check_config(state["config"], settings.config, path):
            self.progress.print(f"resuming with another {line}")
        self.position = Position(**state["position"])
        self.trainer.load_state(state)
        where = f"epoch {self.position.epoch}" + (
            f", step {self.position.step}" if self.position.step else ""
        )
        self.progress.print(f"resuming {path} after {where} of {settings.epochs} epochs")
        return True

    def fit(self) -> list[dict[str, float]]:
        """Trains; returns the rows of epochs.csv. Raises `Stopped` after saving where SIGINT or SIGTERM came."""
        settings = self.settings
        with _stop_requests(self.runtime) as requests:
            while self.position.epoch < settings.epochs:
                self._train_epoch(requests)
                epoch = self.position.epoch + 1
                final = epoch == settings.epochs
                evaluate = final or epoch % settings.config["evaluation"]["interval"] == 0
                metrics = self.trainer.evaluate(self.broken.watch(self.data.val)) if evaluate else None
                self._end_epoch(metrics)
                improved = False
                if metrics is not None and metrics.accuracy[0] > self.position.best:
                    improved, self.position.best, self.position.best_epoch = True, metrics.accuracy[0], epoch
                self.position.end_epoch()
                if improved or final or epoch % settings.config["checkpoint_config"]["interval"] == 0:
                    self._save(best=improved)
                if requests and not final:
                    raise Stopped(requests[0])
        return self.epochs_log.rows() if self.runtime.is_main else []

    def _train_epoch(self, requests: list[int]) -> None:
        position, config = self.position, self.settings.config
        every, save_every = config["log_config"]["interval"], config["checkpoint_config"]["step_interval"]
        steps = len(self.data.train)
        self._epoch_start = time.perf_counter()
        self._epoch_first, self._since, self._images = position.step, self._epoch_start, 0
        with self.progress.bar(
            f"epoch {position.epoch + 1}/{self.settings.epochs}", steps, position.step
        ) as bar:
            for batch in self.broken.watch(self.data.train.epoch(position.epoch, position.step)):
                lr = self.trainer.lr
                loss, correct = self.trainer.step(*self.trainer.prepare(batch))
                position.step += 1
                self._images += self.data.train.images_per_step
                self._pending.append((position.epoch * steps + position.step, lr, loss, correct))
                # The signal is heeded between steps, where the state is whole.
                save = bool(requests) or (save_every and position.step % save_every == 0)
                if position.step % every == 0 or position.step == steps or save:
                    bar.set_postfix_str(self._flush())
                bar.update()
                if save and position.step < steps:
                    self._save()
                    if requests:
                        raise Stopped(requests[0])
        self._epoch_seconds = time.perf_counter() - self._epoch_start

    def _flush(self) -> str:
        """Reads the losses back from the device, which waits for it, and writes them. Returns a line for the bar."""
        losses = self.runtime.mean(torch.stack([p[2].double() for p in self._pending])).tolist()
        correct = self.runtime.sum(torch.stack([p[3] for p in self._pending])).tolist()
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        position, total = self.position, self.data.train.images_per_step
        for (step, lr, *_), loss, right in zip(self._pending, losses, correct, strict=True):
            position.loss_sum += loss
            position.correct = [
                a + b for a, b in zip(position.correct or [0] * len(right), right, strict=True)
            ]
            position.steps_summed += 1
            if self.runtime.is_main:
                shares = [100 * r / total for r in right]
                self.steps_log.write([step, position.epoch + 1, lr, loss, *shares, rate])
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} in step {step} (epoch {position.epoch + 1}, learning rate {lr:g}); "
                    "a smaller learning rate, a warm-up or gradient clipping may help"
                )
        self._pending.clear()
        return f"loss {losses[-1]:.4f}  {rate:,.0f} img/s"

    def _end_epoch(self, metrics: Metrics | None) -> None:
        position, total = self.position, self.data.train.images_per_step
        loss = position.loss_sum / position.steps_summed
        train = [100 * c / (position.steps_summed * total) for c in position.correct]
        rate = (position.step - self._epoch_first) * total / max(self._epoch_seconds, 1e-9)
        lr = self._last_lr()
        val: list[Any] = [""] * (1 + len(train)) if metrics is None else [metrics.loss, *metrics.accuracy]
        row = [position.epoch + 1, lr, loss, *train, *val, rate, self._epoch_seconds]
        self.broken.lines = set().union(*self.runtime.gather(self.broken.lines))
        if self.runtime.is_main:
            self.epochs_log.write(row)
        shown = "" if metrics is None else f"  val loss {metrics.loss:7.4f}  val {metrics.accuracy[0]:6.2f} %"
        self.progress.print(
            f"epoch {position.epoch + 1:{len(str(self.settings.epochs))}}/{self.settings.epochs}"
            f"  loss {loss:7.4f}  train {train[0]:6.2f} %{shown}  {rate:9,.0f} img/s  lr {lr:.2g}"
        )

    def _last_lr(self) -> float:
        """The learning rate of the step before the schedule's last move."""
        scheduler = self.trainer.scheduler
        return float(scheduler.base_lrs[0]) * scheduler.lr_lambdas[0](scheduler.last_epoch - 1)

    def _save(self, best: bool = False) -> None:
        state = self.trainer.state()  # by all processes
        if not self.runtime.is_main:
            return
        state.update(config=self.settings.config, position=asdict(self.position))
        checkpoint.save(state, self.last)
        if best:
            checkpoint.save(state, self.best)


@contextmanager
def _stop_requests(runtime: Runtime) -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to; a second SIGINT interrupts at once.

    Processes of one run would heed a signal at different steps and wait for each other, so there it stays as it was.
    """
    requests: list[int] = []
    if runtime.world > 1:
        yield requests
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
