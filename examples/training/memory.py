"""What a training step needs in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from training.engine import Trainer


def peak_memory(trainer: Trainer, images: Tensor, labels: Tensor, before: int) -> int:
    """Bytes the CUDA allocator held at most during a step: weights, optimizer, gradients, activations.

    Args:
        before: bytes that were allocated before this trainer was built.
    """
    device = trainer.runtime.device
    torch.cuda.reset_peak_memory_stats(device)
    trainer.step(images, labels)
    trainer.runtime.wait()
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(trainer: Trainer, images: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward, every storage once, without weights.

    The CPU's allocator has no counter, and the resident size of a process hides these bytes under its libraries.
    """
    own = {t.untyped_storage().data_ptr() for t in (*trainer.model.parameters(), *trainer.model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(images, labels)
    return sum(s.nbytes() for s in storages.values())
