"""Registries that turn config dicts into layers and models, in the way mmcv and mmcls users know.

``NORM_LAYERS``, ``CONV_LAYERS``, ``ACTIVATION_LAYERS`` and ``MODELS`` map the ``type`` of a config dict to a class::

    name, norm = build_norm_layer(dict(type="FusedBN", eps=1e-3), num_features=64, postfix=1)  # "bn1", the layer
    backbone = MODELS.build(dict(type="ResNet", depth=18))

Register your own and name it in a config::

    @NORM_LAYERS.register_module()
    class MyNorm(torch.nn.Module): ...

    build_norm_layer(dict(type="MyNorm"), 64)

A name may carry our scope, so that one config serves here and in mmengine: ``"fastres.FusedBN"`` is ``"FusedBN"``.
Unknown names and keys are refused before the class is called, with the near matches, and no config is ever changed.

Where mmengine is importable, everything registered here is also found by it (:func:`register_into_mmengine`).
"""

import logging
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fastres._registry import (
    ACTIVATION_LAYERS,
    BACKBONES,
    CLASSIFIERS,
    CONV_LAYERS,
    HEADS,
    LOSSES,
    MODEL_LOCATIONS,
    MODELS,
    NECKS,
    NORM_LAYERS,
    NORM_LOCATIONS,
    SCOPE,
    Registry,
    build_activation_layer,
    build_backbone,
    build_classifier,
    build_conv_layer,
    build_from_cfg,
    build_head,
    build_loss,
    build_model,
    build_neck,
    build_norm_layer,
    infer_abbr,
)

__all__ = [
    "ACTIVATION_LAYERS",
    "BACKBONES",
    "CLASSIFIERS",
    "CONV_LAYERS",
    "HEADS",
    "LOSSES",
    "MODELS",
    "NECKS",
    "NORM_LAYERS",
    "Registry",
    "build_activation_layer",
    "build_backbone",
    "build_classifier",
    "build_conv_layer",
    "build_from_cfg",
    "build_head",
    "build_loss",
    "build_model",
    "build_neck",
    "build_norm_layer",
    "infer_abbr",
    "register_into_mmengine",
]

_logger = logging.getLogger(__name__)


def register_into_mmengine() -> Any:
    """Make everything registered here, now and later, known to mmengine as ``fastres.<name>``.

    mmengine resolves ``type='fastres.ResNet'`` by importing ``fastres.registry`` and asking the child of its root
    ``MODELS`` with the scope ``fastres``. This function makes that child once and returns it; calling it again only
    brings it up to date. A name without the scope keeps meaning mm's own class under mm's own default scopes.

    Importing this module calls it where mmengine is importable, so it is needed only if mmengine became importable
    later. The child has one table where we have four; a name found in several means the first of ``MODELS``,
    ``NORM_LAYERS``, ``CONV_LAYERS`` and ``ACTIVATION_LAYERS``. ImportError where mmengine is missing or broken.
    """
    mm = import_module("mmengine.registry")
    registries = (MODELS, NORM_LAYERS, CONV_LAYERS, ACTIVATION_LAYERS)
    child = mm.MODELS.children.get(SCOPE)
    if child is None:
        locations = [*NORM_LOCATIONS, *MODEL_LOCATIONS]
        child = mm.Registry("model", parent=mm.MODELS, scope=SCOPE, locations=locations)

    hooks = mm.HOOKS.children.get(SCOPE)
    if hooks is None:
        hooks = mm.Registry("hook", parent=mm.HOOKS, scope=SCOPE, locations=["fastres.integrations.mmengine"])

        @hooks.register_module(name="FuseHook")
        def fuse_hook(**options: Any) -> Any:
            # By name: the hook lies above this module, and is made when a config asks for it.
            return import_module("fastres.integrations.mmengine").fuse_hook_class()(**options)

    def publish(name: str) -> None:
        first = next(registry for registry in registries if name in registry.module_dict)
        child.register_module(name=name, module=first.module_dict[name], force=True)

    for registry in registries:
        registry.publish = publish
        for name in registry.module_dict:
            publish(name)
    return child


def _connect_mmengine() -> None:
    # mmengine runs no code of ours but the first import of this module, so the child must exist from then on, even if
    # mmengine itself is imported only later. Hence its registry is imported here where it is installed (0.15 s). The
    # package itself imports _registry and not this module, so that `import fastres` stays free of mmengine.
    in_use = sys.modules.get("mmengine") is not None
    try:
        if not in_use and find_spec("mmengine") is None:
            return
        with warnings.catch_warnings():
            if not in_use:
                warnings.simplefilter("ignore")  # on pkg_resources; this user did not ask for mmengine
            register_into_mmengine()
    except Exception as error:
        message = f"type='fastres.*' will not resolve in mmengine: {type(error).__name__}: {error}"
        if in_use:
            warnings.warn(message, stacklevel=2)
        else:
            _logger.debug(message)


_connect_mmengine()
