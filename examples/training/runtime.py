"""Devices, processes and random seeds."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import TrainingError, optional


@dataclass(frozen=True)
class Runtime:
    """This process: its device, and its place among the processes of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes. In place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes. In place."""
        return self.sum(values).div_(self.world)

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Gives every process rank 0's running statistics, which is what a checkpoint holds."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Returns when the device has finished what was asked of it."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


@contextmanager
def start(device_name: str = "auto") -> Iterator[Runtime]:
    """The runtime of this process; joins the process group where `torchrun` started it.

    Args:
        device_name: 'auto' (a GPU where there is one), 'cpu', 'cuda' or 'cuda:1'.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(device_name, local)
    if world == 1:
        yield Runtime(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Runtime(device, dist.get_rank(), world)
        # Together: torchrun stops every process when one of them fails, and rank 0 may still be writing.
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    finally:
        dist.destroy_process_group()
        # Gloo's threads take the GIL to free their last work. One that is late for it, when the interpreter shuts
        # down, aborts the process (https://github.com/pytorch/pytorch/issues/190489), and nothing can be joined:
        # DistributedDataParallel never lets go of its group. Asleep, this thread leaves the GIL to them.
        time.sleep(0.1)


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise TrainingError(f"--device {name}: {e}") from e
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
            raise TrainingError(f"--device {name}: {why}; use --device cpu")
        index = local if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise TrainingError(
                f"--device: process {local} wants GPU {index}, there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", index)
    return device


# --- random numbers -----------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)  # every device
    if (numpy := optional("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, as plain values and tensors."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := optional("numpy")) is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(cached))
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    numpy = optional("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
