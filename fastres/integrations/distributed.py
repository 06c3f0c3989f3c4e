"""Data parallel training on the CPU with synchronised norms.

On GPUs ``torch.nn.parallel.DistributedDataParallel`` takes :class:`fastres.FusedSyncBatchNorm` as it is. On the CPU it
refuses every ``nn.SyncBatchNorm``, since torch's own needs a GPU; the fused one does not.
"""

from __future__ import annotations

from torch import nn

from fastres._norm import FusedSyncBatchNorm

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch's, which on the CPU also takes models whose only synchronised norms are :class:`FusedSyncBatchNorm`."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        norms = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]
        if not all(isinstance(layer, FusedSyncBatchNorm) for layer in norms):
            super()._passing_sync_batchnorm_handle(module)
