"""From data sets to batches on the device: the order of images, worker processes, normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from training.data import Images, Sample, Synthetic, build_dataset
from training.errors import TrainingError
from training.progress import Progress
from training.runtime import Runtime
from training.settings import Settings
from training.transforms import Normalization

Keys = list[tuple[int, int]]


class Batch(NamedTuple):
    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    broken: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Called by DataLoader."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.broken)


class TrainOrder(Sampler[Keys]):
    """Full batches of a fresh permutation every epoch, which (seed, epoch) alone determine.

    A step takes the next ``batch * world`` images and every process its share of them, so the images of a step do not
    depend on how they are spread. The last images, too few for a step, wait for the next permutation.
    """

    def __init__(self, count: int, batch: int, seed: int, runtime: Runtime) -> None:
        self.count, self.batch, self.seed, self.runtime = count, batch, seed, runtime
        self.steps = count // (batch * runtime.world)
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[Keys]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.first, self.steps):
            start = (step * self.runtime.world + self.runtime.rank) * self.batch
            yield [(self.epoch, index) for index in order[start : start + self.batch]]


class EvaluationOrder(Sampler[Keys]):
    """Every image once, in order; process r of w takes images r, r + w, r + 2w and so on."""

    def __init__(self, count: int, batch: int, runtime: Runtime) -> None:
        self.mine = range(runtime.rank, count, runtime.world)
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)

    def __iter__(self) -> Iterator[Keys]:
        for start in range(0, len(self.mine), self.batch):
            yield [(0, index) for index in self.mine[start : start + self.batch]]


class TrainBatches:
    """The batches of one process. ``len`` is the number of steps in an epoch."""

    def __init__(
        self, dataset: Images, batch: int, workers: int, runtime: Runtime, strict: bool = False
    ) -> None:
        total = batch * runtime.world
        if len(dataset) < total:
            raise TrainingError(
                f"the training data have {len(dataset)} images, fewer than one step takes ({total}); "
                f"use smaller batches: --cfg-options data.samples_per_gpu={max(1, len(dataset) // runtime.world)}"
            )
        self.images_per_step = total
        self.strict = strict
        self.order = TrainOrder(len(dataset), batch, dataset.seed, runtime)
        self.synthetic = _synthetic_pool(dataset, batch, runtime) if isinstance(dataset, Synthetic) else None
        if self.synthetic is None:
            self.loader = _loader(dataset, self.order, workers, runtime)

    def __len__(self) -> int:
        return self.order.steps

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``first`` on."""
        self.order.epoch, self.order.first = epoch, first
        if self.synthetic is not None:
            for step in range(first, len(self)):
                yield self.synthetic[step % len(self.synthetic)]
            return
        for batch in self.loader:
            batch = _checked(batch, self.strict)
            if len(batch.images) < self.order.batch:
                raise TrainingError(f"too many broken images in a row, the last: {batch.broken[-1]}")
            yield batch


class EvaluationBatches:
    """Every image of a data set once; broken ones are left out."""

    def __init__(
        self, dataset: Images, batch: int, workers: int, runtime: Runtime, strict: bool = False
    ) -> None:
        self.strict = strict
        order = EvaluationOrder(len(dataset), batch, runtime)
        self.count = len(order)
        self.synthetic = _synthetic_pool(dataset, batch, runtime) if isinstance(dataset, Synthetic) else None
        if self.synthetic is None:
            self.loader = _loader(dataset, order, workers, runtime)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        if self.synthetic is not None:
            yield from (self.synthetic[i % len(self.synthetic)] for i in range(self.count))
            return
        for batch in self.loader:
            yield _checked(batch, self.strict)


@dataclass
class Data:
    train: TrainBatches
    val: EvaluationBatches
    train_set: Images
    val_set: Images


def load_data(settings: Settings, runtime: Runtime) -> Data:
    """The batches of a run. Where the data came from the command line, the head takes on their number of classes.

    Raises:
        ConfigError, TrainingError: data that are missing, unusable, or of another number of classes than the head.
    """
    data = settings.config["data"]
    common = dict(channels=settings.channels, seed=settings.seed)
    train_set = build_dataset(data["train"], where="data.train", training=True, **common)
    val_set = build_dataset(
        data["val"], where="data.val", training=False, classes=train_set.classes, **common
    )
    head, classes = settings.config["model"]["head"], len(train_set.classes)
    if head.get("num_classes") != classes:
        if not settings.adopt_classes:
            raise TrainingError(
                f"{settings.path}: model.head.num_classes: got {head.get('num_classes')}, the data have {classes}"
            )
        settings.notes.append(
            f"model.head.num_classes: {head.get('num_classes')} -> {classes}, as in the data"
        )
        head["num_classes"] = classes
    options = dict(workers=data["workers_per_gpu"], runtime=runtime, strict=data["strict"])
    train = TrainBatches(train_set, settings.batch, **options)
    val = EvaluationBatches(val_set, settings.batch, **options)
    return Data(train, val, train_set, val_set)


class BrokenImages:
    """The images that could not be read, each named once, with reasons."""

    def __init__(self, progress: Progress, shown: int = 10) -> None:
        self.lines: set[str] = set()
        self._progress, self._shown = progress, shown

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, while what is broken in them is noted and the first few are printed."""
        for batch in batches:
            for line in set(batch.broken) - self.lines:
                self.lines.add(line)
                if len(self.lines) <= self._shown:
                    self._progress.print(f"broken image skipped: {line}")
            yield batch


class Prepare:
    """Moves a batch to the device and normalizes it there to float32: bytes travel, not floats."""

    def __init__(
        self,
        normalization: Normalization,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device, self.layout = device, layout
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in normalization)
        self.scale, self.shift = 1 / std, -mean / std

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(torch.float32, memory_format=self.layout).mul_(self.scale).add_(self.shift)
        return images, batch.labels.to(self.device, non_blocking=True)


def collate(samples: list[Sample]) -> Batch:
    """A batch of the samples that have an image."""
    kept = [(s.image, s.label) for s in samples if s.image is not None]
    sizes = {tuple(image.shape) for image, _ in kept}
    if len(sizes) > 1:
        shown = " and ".join(f"{w}x{h}" for _, h, w in sorted(sizes)[:2])
        raise TrainingError(
            f"images leave the pipeline in different sizes ({shown}); end it with a crop or a Resize to a fixed size"
        )
    images = torch.stack([image for image, _ in kept]) if kept else torch.empty(0, 0, 0, 0, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in kept], dtype=torch.int64)
    return Batch(images, labels, tuple(b for s in samples for b in s.broken))


def _collate_for_process_boundary(samples: list[Sample]) -> Batch | str:
    """`collate`, with its message in place of its exception, which a worker could only send as a traceback."""
    try:
        return collate(samples)
    except TrainingError as e:
        return str(e)


def _checked(batch: Batch | str, strict: bool) -> Batch:
    if isinstance(batch, str):
        raise TrainingError(batch)
    if strict and batch.broken:
        raise TrainingError(f"broken image (refused by --strict-data): {batch.broken[0]}")
    return batch


def _loader(dataset: Images, order: Sampler[Keys], workers: int, runtime: Runtime) -> DataLoader:
    collate_fn: Callable[[list[Sample]], Batch | str] = _collate_for_process_boundary
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=runtime.on_cuda,
        persistent_workers=workers > 0,
        # Without one of its own, every pass over the loader draws from the global generator, and a run that was
        # resumed in the middle of an epoch makes one pass more.
        generator=torch.Generator(),
    )


def _synthetic_pool(dataset: Synthetic, batch: int, runtime: Runtime, count: int = 4) -> list[Batch]:
    """A few batches that already lie on the device."""
    generator = torch.Generator().manual_seed(dataset.seed * 1_000_003 + runtime.rank)
    shape = (batch, dataset.channels, dataset.image_size, dataset.image_size)
    pool = []
    for _ in range(count):
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(len(dataset.classes), (batch,), generator=generator)
        pool.append(Batch(images.to(runtime.device), labels.to(runtime.device)))
    return pool
