"""One training step, evaluation, and the state of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.classifier import ImageClassifier, topk_correct
from fastres.config import ConfigError
from fastres.registry import MODELS
from training.errors import TrainingError
from training.loading import Batch, Prepare
from training.optim import build_optimizer, build_schedule, grad_clip
from training.runtime import Runtime, random_state, seed_everything, set_random_state
from training.settings import Settings
from training.transforms import Normalization

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Metrics(NamedTuple):
    """Means over the images of a pass. ``accuracy`` is in percent, one value for each k."""

    loss: float
    accuracy: tuple[float, ...]
    images: int


def build_model(model_cfg: Mapping[str, Any], seed: int) -> ImageClassifier:
    """The classifier of a config with weights that ``seed`` determines.

    Raises:
        ConfigError: what the registry or a constructor objects to, naming the key ``model``.
    """
    seed_everything(seed)
    try:
        model = MODELS.build(dict(model_cfg))
        if not isinstance(model, ImageClassifier) or not model.with_head:
            raise TypeError(f"type: got {model_cfg['type']!r}, wanted an ImageClassifier with a head")
        model.init_weights()
    except (KeyError, TypeError, ValueError, AssertionError, OSError) as e:
        raise ConfigError(f"model: {e if isinstance(e, OSError) or not e.args else e.args[0]}") from e
    return model


class Trainer:
    """A model with its optimizer, schedule and loss scale, on one device, alone or in step with other processes.

    Args:
        settings: the run.
        runtime: this process.
        model_cfg: the model's config, which in a comparison is not ``settings.config['model']``.
        steps_per_epoch: for the schedule.
        normalization: of the training data.
        dtype: float64 for a reference: the same float32 start and images, then float64 throughout, without autocast
            and compilation.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        model_cfg: Mapping[str, Any],
        steps_per_epoch: int,
        normalization: Normalization,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = settings.config
        self.runtime, self.dtype = runtime, dtype
        layout = torch.channels_last if config["channels_last"] else torch.contiguous_format
        self.model = build_model(model_cfg, settings.seed).to(runtime.device, dtype, memory_format=layout)
        self.topk = self.model.head.topk
        self.prepare = Prepare(normalization, runtime.device, layout)
        self.optimizer = build_optimizer(self.model, config["optimizer"])
        factor = build_schedule(
            config["lr_config"], config["optimizer"]["lr"], steps_per_epoch, settings.epochs
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.clip = grad_clip(config["optimizer_config"])
        amp = "off" if dtype == torch.float64 else config["amp"]
        self.amp_dtype = AMP_DTYPES[amp]
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=amp == "fp16")
        self.net: nn.Module = self.model
        if runtime.world > 1:
            ids = [runtime.device.index] if runtime.on_cuda else None
            self.net = DistributedDataParallel(self.model, device_ids=ids)
        if config["compile"] and dtype != torch.float64:
            self.net = torch.compile(self.net)  # type: ignore[assignment]
        # Weights were drawn alike everywhere; drop path and dropout must differ between processes.
        seed_everything(settings.seed + 1_000_003 * (runtime.rank + 1))

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.runtime.device.type, self.amp_dtype)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, logits) through DDP and the compiled model where there are such."""
        with self.autocast():
            scores = self.net(images.to(self.dtype))
        return self.model.head.loss(scores, labels)["loss"], scores

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update on prepared images. Returns this process's (mean loss, number right for each k), on the device."""
        self.net.train()
        loss, scores = self.forward(images, labels)
        self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return loss.detach(), topk_correct(scores.detach(), labels, self.topk)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Loss and accuracy over all images of all processes, in eval mode."""
        self.runtime.synchronize_buffers(self.model)
        self.model.eval()
        totals = torch.zeros(2 + len(self.topk), dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            if not len(batch.labels):
                continue
            images, labels = self.prepare(batch)
            with self.autocast():
                scores = self.model(images.to(self.dtype))
            totals[0] += len(labels)
            totals[1] += self.model.head.loss(scores, labels)["loss"].double() * len(labels)
            totals[2:] += topk_correct(scores, labels, self.topk)
        count, loss, *correct = self.runtime.sum(totals).tolist()
        if not count:
            raise TrainingError("the validation data hold no readable image")
        return Metrics(loss / count, tuple(100 * c / count for c in correct), int(count))

    def state(self) -> dict[str, Any]:
        """Everything that decides later steps, of all processes. To be called by all of them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.scaler.state_dict(),
            "random": self.runtime.gather(random_state(self.runtime.device)),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over `state`. TrainingError where it is of another model or another number of processes."""
        if len(state["random"]) != self.runtime.world:
            raise TrainingError(
                f"the checkpoint is of a run with {len(state['random'])} processes, this one has {self.runtime.world}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as e:
            raise TrainingError(f"the checkpoint does not fit the model: {e}") from e
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"][self.runtime.rank], self.runtime.device)
