"""The fused norms and drop path; everybody's name for this module is :mod:`fastres.modules`.

``FusedBatchNorm2d`` and ``FusedSyncBatchNorm`` are torch's classes with another forward: the same constructor,
parameters, buffers and state dict, so whatever treats a model's norms by their type treats these alike. A block does
not call them; it asks for :meth:`fused` and hands that to :mod:`fastres.functional` with the convolution before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.weak import WeakTensorKeyDictionary

from fastres import functional as FF
from fastres._registry import NORM_LAYERS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DropPath", "FusedBatchNorm2d", "FusedNorm", "FusedSyncBatchNorm", "convert_sync_batchnorm"]


_NO_BIAS = WeakTensorKeyDictionary()


def _zeros(weight: Tensor) -> Tensor:
    """The bias of a norm without one: the same tensor every time, for folded weights are kept by identity."""
    if torch.compiler.is_compiling():
        return torch.zeros_like(weight)
    zeros = _NO_BIAS.get(weight)
    if zeros is None or zeros.dtype != weight.dtype or zeros.device != weight.device:
        _NO_BIAS[weight] = zeros = torch.zeros_like(weight, requires_grad=False)
    return zeros


class FusedNorm(_BatchNorm):
    """What the fused norms share; ``relu`` applies a ReLU to the result in the same pass.

    ``skip_nonfinite_stats`` keeps the running statistics finite: a batch that would make one of them NaN or infinite,
    as a step that a loss scaler will skip does, leaves all of them and ``num_batches_tracked`` as they were. The
    result of the layer and its gradients are the same either way. Both may be set on a norm at any time.
    """

    relu: bool = False
    skip_nonfinite_stats: bool = False
    _modes: int = 0

    def train(self, mode: bool = True) -> Any:
        """As torch's. What was folded from this norm is folded anew after it, so a loop that evaluates with ``eval()``
        sees values that were written through ``.data``, as mmengine's EMAHook does, and which leave no other mark."""
        self.__dict__["_modes"] = self._modes + 1
        return super().train(mode)

    def group(self) -> ProcessGroup | None:
        """The process group over which a training step's statistics are merged, or None."""
        return None

    def fused(self) -> FF.BatchNorm:
        """This norm as the functions take it, by torch's rules: batch statistics in training and where there are no
        running ones; running ones updated in training unless ``track_running_stats`` is False."""
        training = self.training
        tracked = self.track_running_stats or not training
        # Not by attribute: nn.Module looks those up in three places, and this runs for every norm of every pass.
        own: Any = self._parameters
        buffers: Any = self._buffers
        weight = own["weight"] if "weight" in own else self.weight
        bias = own["bias"] if "bias" in own else self.bias
        mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean
        var = buffers["running_var"] if "running_var" in buffers else self.running_var
        batches = (
            buffers["num_batches_tracked"] if "num_batches_tracked" in buffers else self.num_batches_tracked
        )
        if weight is not None and bias is None:  # torch >= 2.13: BatchNorm2d(bias=False)
            bias = _zeros(weight)
        return FF.BatchNorm(
            weight,
            bias,
            mean if tracked else None,
            var if tracked else None,
            batches if tracked else None,
            self.momentum,
            self.eps,
            training=training or mean is None,
            group=self.group(),
            skip_nonfinite=self.skip_nonfinite_stats,
            modes=0 if torch.compiler.is_compiling() else self._modes,
        )

    def forward(self, input: Tensor) -> Any:
        """Batch norm (and ReLU) of ``input`` [N, C, H, W]; errors as :func:`fastres.functional.batch_norm`."""
        if isinstance(input, fx.Proxy):
            return self.node(input)
        return FF.batch_norm(input, self.fused(), self.relu)

    def node(self, x: fx.Proxy) -> fx.Proxy:
        """This module as one node of the graph that torch.fx is making, as torch's own norms are there."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} runs on fused functions and cannot be scripted; wanted "
            "torch.compile or torch.export, or norms of type 'BN'"
        )

    def extra_repr(self) -> str:
        """torch's, and which of the options are on."""
        options = [name for name in ("relu", "skip_nonfinite_stats") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{name}=True" for name in options)])


@NORM_LAYERS.register_module("FusedBN")
class FusedBatchNorm2d(FusedNorm, nn.BatchNorm2d, _BatchNorm):  # mm* match init_cfg layers with direct bases
    """``torch.nn.BatchNorm2d`` on fused kernels, with optional ReLU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``torch.nn.BatchNorm2d``; further
            keywords too, where the installed torch has them (``bias``).
        relu: apply ReLU to the result in the same pass.
        skip_nonfinite_stats: a batch whose statistics are NaN or infinite does not enter the running ones; off, it
            does, as in torch.

    Example:
        >>> norm = FusedBatchNorm2d(3, relu=True)
        >>> norm(torch.randn(2, 3, 4, 4)).min().item()
        0.0
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = False,
        skip_nonfinite_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.relu, self.skip_nonfinite_stats = relu, skip_nonfinite_stats


@NORM_LAYERS.register_module("FusedSyncBN")
class FusedSyncBatchNorm(FusedNorm, nn.SyncBatchNorm, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` on fused kernels, with optional ReLU; also on the CPU (gloo).

    Training statistics are merged over ``process_group`` (default: all ranks): one collective forward, one backward.
    Without an initialised process group, in a group of one and in eval mode it is :class:`FusedBatchNorm2d`. It works
    on the CPU too, except inside ``DistributedDataParallel``, which refuses CPU modules that hold a synchronised norm.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as
            ``torch.nn.SyncBatchNorm``; further keywords too, where the installed torch has them (``bias``).
        relu: apply ReLU to the result in the same pass.
        skip_nonfinite_stats: a batch whose statistics are NaN or infinite does not enter the running ones; off, it
            does, as in torch.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = False,
        skip_nonfinite_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, **kwargs
        )
        self.relu, self.skip_nonfinite_stats = relu, skip_nonfinite_stats

    def group(self) -> ProcessGroup | None:
        """The process group over which a training step's statistics are merged, or None."""
        dist = torch.distributed
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As :func:`convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every 2d batch norm in ``module`` by a :class:`FusedSyncBatchNorm` with the same parameters and buffers.

    Other batch norms (1d, 3d) become ``torch.nn.SyncBatchNorm``, which needs a GPU; norms that are synchronised already
    only change if they are torch's.

    Args:
        module: changed in place, except where it is itself a norm.
        process_group: the group to synchronise over; default all ranks.

    Returns:
        ``module``, or the new norm where ``module`` is one.
    """
    if isinstance(module, FusedSyncBatchNorm):
        return module
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return _synchronised(module, process_group)
    if isinstance(module, _BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def _synchronised(norm: nn.BatchNorm2d | nn.SyncBatchNorm, process_group: Any) -> FusedSyncBatchNorm:
    group = process_group or getattr(norm, "process_group", None)
    new = FusedSyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        affine=False,
        track_running_stats=False,
        process_group=group,
        relu=getattr(norm, "relu", False),
        skip_nonfinite_stats=getattr(norm, "skip_nonfinite_stats", False),
    )
    new.affine, new.track_running_stats = norm.affine, norm.track_running_stats
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    return new


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for whole samples and scale the others to keep the mean.

    Args:
        drop_prob: probability of dropping a sample's branch, 0 <= drop_prob < 1.

    Source: G. Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"DropPath: drop_prob is {drop_prob}; wanted 0 <= drop_prob < 1")
        self.drop_prob = drop_prob

    def _kept(self, x: Tensor) -> Tensor:
        # The draws of mmcls, so that a seed drops the same samples there, here, and on the fused path. Always float32:
        # half-precision draws would shift the probability.
        draws = torch.rand(x.shape[0], dtype=torch.float32, device=x.device)
        return (1 - self.drop_prob + draws).floor()

    def keep(self, x: Tensor) -> Tensor | None:
        """Factors [N] float32, 0 or 1 / (1 - drop_prob), for the samples of ``x`` [N, ...]; None outside training."""
        if self.drop_prob == 0 or not self.training:
            return None
        return self._kept(x) / (1 - self.drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, ...] with the factors of :meth:`keep` applied."""
        if self.drop_prob == 0 or not self.training:
            return x
        kept = self._kept(x).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x.div(1 - self.drop_prob) * kept

    def extra_repr(self) -> str:
        """The probability."""
        return f"drop_prob={self.drop_prob}"
