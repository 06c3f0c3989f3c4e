"""timm: a layer in place of ``BatchNormAct2d``, and fastres' norms under timm's names.

    from fastres.integrations import timm as fastres_timm

    fastres_timm.register()
    model = timm.create_model("regnety_008", norm_layer=fastres.FusedBatchNorm2d)

:func:`fastres.fuse_` does the same to a model that has been made, and finds more: convolution, norm and ReLU together.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from fastres._norm import FusedBatchNorm2d
from fastres._swap import FusedNormAct, fused_class

__all__ = ["batch_norm_act_class", "register"]


def batch_norm_act_class() -> type[nn.Module]:
    """The class ``FusedBatchNormAct2d``: timm's ``BatchNormAct2d``, its constructor included, on fused kernels.

    A plain ReLU is applied in the norm's pass; any other activation, and a drop layer, after it. ImportError without
    timm.
    """
    return fused_class(FusedNormAct, import_module("timm.layers").BatchNormAct2d)


def register() -> type[nn.Module]:
    """Teach timm that ``norm_layer=fastres.FusedBatchNorm2d`` (or ``'fusedbatchnorm2d'``) means that class where a norm
    with an activation is wanted.

    Returns:
        The class. Calling it again changes nothing.

    Raises:
        ImportError: no timm. RuntimeError: a timm whose tables are elsewhere.
    """
    cls, name = batch_norm_act_class(), FusedBatchNorm2d.__name__.lower()
    with_act: Any = import_module("timm.layers.create_norm_act")
    plain: Any = import_module("timm.layers.create_norm")
    try:
        with_act._NORM_ACT_MAP[name] = with_act._NORM_TO_NORM_ACT_MAP[name] = cls
        with_act._NORM_ACT_TYPES.add(cls)
        with_act._NORM_ACT_REQUIRES_ARG.add(cls)
        plain._NORM_MAP[name] = FusedBatchNorm2d
        plain._NORM_TYPES.add(FusedBatchNorm2d)
    except AttributeError as error:
        version = getattr(import_module("timm"), "__version__", "?")
        raise RuntimeError(
            f"register: timm {version} keeps its norms elsewhere ({error}); use fastres.fuse_"
        ) from error
    return cls
