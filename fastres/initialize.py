"""Weight initialisation from ``init_cfg`` dicts, as mmcv and mmcls users write them.

    init_cfg = [
        dict(type="Kaiming", layer="Conv2d"),
        dict(type="Constant", val=1, layer=["_BatchNorm", "GroupNorm"]),
    ]
    init_cfg = dict(type="Pretrained", checkpoint="resnet50.pth", prefix="backbone")

``layer`` names classes; a module is meant if its class or one of its bases has the name. Without ``layer`` every module
that has a weight is meant. ``override`` (a dict or a list) names attributes that are initialised otherwise. Configs are
checked before the first weight changes. ``BaseModule`` carries an ``init_cfg`` and applies it in ``init_weights()``.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres._calling import listed, suggest, type_name
from fastres._registry import Registry

__all__ = ["INITIALIZERS", "BaseModule", "constant_init", "initialize", "is_pretrained", "load_pretrained"]

InitCfg = Mapping[str, Any] | Sequence[Mapping[str, Any]]

INITIALIZERS = Registry("initializer")
"""Initialisers by the ``type`` of an ``init_cfg``: functions ``f(module, **options)`` that set one module's own weight
and bias in place (``Pretrained``: the whole module)."""

_logger = logging.getLogger(__name__)


def _set_bias(module: nn.Module, bias: float, bias_prob: float | None = None) -> None:
    if isinstance(getattr(module, "bias", None), Tensor):
        value = bias if bias_prob is None else -math.log((1 - bias_prob) / bias_prob)
        nn.init.constant_(module.bias, value)  # type: ignore[arg-type]


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _by_distribution(
    distribution: str, normal: Callable[..., Any], uniform: Callable[..., Any]
) -> Callable[..., Any]:
    if distribution not in ("normal", "uniform"):
        raise ValueError(f"init_cfg: distribution is {distribution!r}; wanted 'normal' or 'uniform'")
    return normal if distribution == "normal" else uniform


@INITIALIZERS.register_module("Constant")
def constant_init(module: nn.Module, val: float, bias: float = 0.0, bias_prob: float | None = None) -> None:
    """Weight = ``val``; bias = ``bias``, or the logit of ``bias_prob``."""
    if (weight := _weight(module)) is not None:
        nn.init.constant_(weight, val)
    _set_bias(module, bias, bias_prob)


@INITIALIZERS.register_module("Normal")
def _normal(
    module: nn.Module, mean: float = 0.0, std: float = 1.0, bias: float = 0.0, bias_prob: float | None = None
) -> None:
    if (weight := _weight(module)) is not None:
        nn.init.normal_(weight, mean, std)
    _set_bias(module, bias, bias_prob)


@INITIALIZERS.register_module("TruncNormal")
def _trunc_normal(
    module: nn.Module,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    bias: float = 0.0,
    bias_prob: float | None = None,
) -> None:
    if (weight := _weight(module)) is not None:
        nn.init.trunc_normal_(weight, mean, std, a, b)
    _set_bias(module, bias, bias_prob)


@INITIALIZERS.register_module("Uniform")
def _uniform(
    module: nn.Module, a: float = 0.0, b: float = 1.0, bias: float = 0.0, bias_prob: float | None = None
) -> None:
    if (weight := _weight(module)) is not None:
        nn.init.uniform_(weight, a, b)
    _set_bias(module, bias, bias_prob)


@INITIALIZERS.register_module("Xavier")
def _xavier(
    module: nn.Module,
    gain: float = 1.0,
    bias: float = 0.0,
    bias_prob: float | None = None,
    distribution: str = "normal",
) -> None:
    fill = _by_distribution(distribution, nn.init.xavier_normal_, nn.init.xavier_uniform_)
    if (weight := _weight(module)) is not None:
        fill(weight, gain=gain)
    _set_bias(module, bias, bias_prob)


@INITIALIZERS.register_module("Kaiming")
def _kaiming(
    module: nn.Module,
    a: float = 0.0,
    mode: str = "fan_out",
    nonlinearity: str = "relu",
    bias: float = 0.0,
    bias_prob: float | None = None,
    distribution: str = "normal",
) -> None:
    fill = _by_distribution(distribution, nn.init.kaiming_normal_, nn.init.kaiming_uniform_)
    if (weight := _weight(module)) is not None:
        fill(weight, a=a, mode=mode, nonlinearity=nonlinearity)
    _set_bias(module, bias, bias_prob)


# ------------------------------------------------------------------------------------------------------ pretrained


def load_file(op: str, name: str, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote, tensors and plain values only; ValueError where it holds anything else or is none."""
    try:
        return torch.load(name, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        said = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"{op}: checkpoint {name!r} is not a file of tensors and plain values ({type(error).__name__}: {said}); "
            "wanted one, or, for a file that you trust with running code, the dict that "
            "torch.load(..., weights_only=False) reads from it"
        ) from error


def _from_torchvision(name: str, map_location: Any) -> Any:
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"init_cfg: Pretrained: checkpoint 'torchvision://{name}' needs torchvision ({error}); "
            "wanted that package, or the path of a file"
        ) from error
    weights = get_model_weights(name)
    return weights["IMAGENET1K_V1"].get_state_dict(map_location=map_location, check_hash=True)


def _read(checkpoint: Any, map_location: Any) -> Mapping[str, Any]:
    """The state dict of a checkpoint: itself a state dict, a file, a URL or ``torchvision://<name>``."""
    if isinstance(checkpoint, str | os.PathLike):
        name = os.fspath(checkpoint)
        if name.startswith("torchvision://"):
            content = _from_torchvision(name.removeprefix("torchvision://"), map_location)
        elif name.startswith(("http://", "https://")):
            content = torch.hub.load_state_dict_from_url(name, map_location=map_location, weights_only=True)
        elif "://" in name:
            raise ValueError(
                f"init_cfg: Pretrained: checkpoint is {name!r}; wanted a path, http(s):// or torchvision://"
            )
        elif not os.path.isfile(name):
            raise FileNotFoundError(f"init_cfg: Pretrained: checkpoint {name!r} is no file")
        else:
            content = load_file("init_cfg: Pretrained", name, map_location)
    else:
        content = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise TypeError(
            f"init_cfg: Pretrained: checkpoint holds {type_name(content)}; wanted a state dict, "
            "or a dict with one under 'state_dict' or 'model'"
        )
    return content


def load_pretrained(
    module: nn.Module, checkpoint: Any, prefix: str | None = None, map_location: Any = "cpu"
) -> None:
    """Load a checkpoint's weights into ``module``; keys that only one of them has are left alone and logged.

    Args:
        module: what to load into.
        checkpoint: a state dict, a file with one (bare, or under ``state_dict`` or ``model``), an http(s) URL, or
            ``torchvision://<model name>``. A ``module.`` before every key, as DDP saves them, is dropped.
        prefix: take the keys below it, ``"backbone"`` or ``"backbone."``.
        map_location: where ``torch.load`` puts the tensors.

    Raises:
        FileNotFoundError, TypeError: no such file; no state dict in it. ValueError: a file that needs code to be read.
        ValueError: no key below the prefix, no key that the module has, or a tensor of another shape. Then nothing
            has been loaded.
    """
    state = dict(_read(checkpoint, map_location))
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    if prefix:
        stem = prefix.rstrip(".") + "."
        below = {k.removeprefix(stem): v for k, v in state.items() if k.startswith(stem)}
        if not below:
            tops = sorted({k.split(".", 1)[0] for k in state})
            raise ValueError(
                f"init_cfg: Pretrained: no key of the checkpoint is below prefix {prefix!r}; it has {listed(tops)}"
            )
        state = below
    own = module.state_dict()
    if not own.keys() & state.keys():
        raise ValueError(
            f"init_cfg: Pretrained: no key of the checkpoint fits {type_name(module)}; it has "
            f"{listed(sorted(state)[:3])} ..., wanted {listed(list(own)[:3])} ..."
        )
    wrong = [
        f"{k} is {list(state[k].shape)}, wanted {list(own[k].shape)}"
        for k in own
        if isinstance(state.get(k), Tensor) and isinstance(own[k], Tensor) and state[k].shape != own[k].shape
    ]
    if wrong:
        raise ValueError(f"init_cfg: Pretrained: shapes differ: {'; '.join(wrong)}")
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing:
        warnings.warn(f"init_cfg: Pretrained: the checkpoint lacks {listed(missing)}", stacklevel=2)
    if unexpected:
        _logger.info("init_cfg: Pretrained: not used from the checkpoint: %s", listed(unexpected))


INITIALIZERS.register_module("Pretrained", module=load_pretrained)


# ---------------------------------------------------------------------------------------------------- application


class _Step(NamedTuple):
    """One checked config: which function, with what, on which modules."""

    function: Callable[..., None]
    options: dict[str, Any]
    layers: tuple[str, ...]
    target: nn.Module
    skip: bool  # the config has overrides only

    def run(self) -> None:
        if self.skip:
            return
        if self.function is load_pretrained:
            self.function(self.target, **self.options)
            return
        for module in self.target.modules():
            names = {c.__name__ for c in type(module).__mro__}
            if not self.layers or names.intersection(self.layers):
                self.function(module, **self.options)


def _step(module: nn.Module, cfg: Mapping[str, Any], skip: bool = False) -> _Step:
    options = dict(cfg)
    type_ = options.pop("type")
    layer = options.pop("layer", None)
    layers = () if layer is None else (layer,) if isinstance(layer, str) else tuple(layer)
    if not all(isinstance(name, str) for name in layers):
        raise TypeError(f"init_cfg: {type_}: layer is {layer!r}; wanted a class name or a list of them")
    function = type_ if callable(type_) else INITIALIZERS.get(type_)
    if function is None:
        known = INITIALIZERS.module_dict
        raise KeyError(
            f"init_cfg: type {type_!r} is not known{suggest(type_, known)}; wanted {listed(sorted(known))}"
        )
    signature = inspect.signature(function)
    for key in options:
        if key not in signature.parameters:
            accepted = list(signature.parameters)[1:]
            raise TypeError(
                f"init_cfg: {type_}: unknown key {key!r}{suggest(key, accepted)}; wanted {listed(accepted)}"
            )
    try:
        signature.bind(module, **options)
    except TypeError as error:
        raise TypeError(f"init_cfg: {type_}: {error}") from None
    if "distribution" in options:
        _by_distribution(options["distribution"], _normal, _uniform)
    return _Step(function, options, layers, module, skip)


def _steps(module: nn.Module, cfg: Any) -> list[_Step]:
    if not isinstance(cfg, Mapping):
        raise TypeError(f"init_cfg: got {type_name(cfg)} {cfg!r}; wanted a dict, or a list of dicts")
    if "type" not in cfg:
        raise KeyError(f"init_cfg: no key 'type', got the keys {listed(sorted(map(str, cfg)))}")
    own = {k: v for k, v in cfg.items() if k != "override"}
    override = cfg.get("override")
    steps = [_step(module, own, skip=override is not None and "layer" not in cfg)]
    for other in [override] if isinstance(override, Mapping) else override or []:
        options = dict(other)
        name = options.pop("name", None)
        if name is None:
            raise ValueError(f"init_cfg: override {other!r} has no key 'name'")
        if options and "type" not in options:
            raise ValueError(f"init_cfg: override {other!r} has no key 'type'")
        target: Any = module
        for part in name.split("."):
            target = getattr(target, part, None)
        if not isinstance(target, nn.Module):
            raise RuntimeError(f"init_cfg: override names {name!r}, which {type_name(module)} does not have")
        steps.append(_step(target, options or {k: v for k, v in own.items() if k != "layer"}))
    return steps


def initialize(module: nn.Module, init_cfg: InitCfg) -> None:
    """Initialise ``module`` and what is in it, in place.

    Args:
        module: any module.
        init_cfg: a dict with ``type`` (a name in ``INITIALIZERS``, or such a function), its options, and optionally
            ``layer`` and ``override``; or a list of them, applied in order.

    Raises:
        KeyError: no ``type``, or one that is not known (with the near matches).
        TypeError: not a dict; an option that the type does not take, or one missing.
        ValueError, RuntimeError: an override without a name or type; naming what the module does not have.
    """
    cfgs = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg
    if not isinstance(cfgs, list | tuple):
        raise TypeError(
            f"init_cfg: got {type_name(init_cfg)} {init_cfg!r}; wanted a dict, or a list of dicts"
        )
    steps = [step for cfg in cfgs for step in _steps(module, cfg)]
    for step in steps:
        step.run()


def is_pretrained(cfg: Mapping[str, Any]) -> bool:
    """Whether one ``init_cfg`` loads a checkpoint."""
    return isinstance(cfg, Mapping) and cfg.get("type") in ("Pretrained", "PretrainedInit", load_pretrained)


class BaseModule(nn.Module):
    """A module with an ``init_cfg``, which ``init_weights()`` applies; until then it has torch's own initialisation.

    Args:
        init_cfg: as :func:`initialize` takes it, or None.
    """

    def __init__(self, init_cfg: InitCfg | None = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg
        self._is_init = False

    @property
    def is_init(self) -> bool:
        """Whether ``init_weights`` has run; mmengine asks for this."""
        return self._is_init

    @property
    def loads_checkpoint(self) -> bool:
        """Whether the ``init_cfg`` loads a checkpoint."""
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else self.init_cfg or []
        return any(is_pretrained(cfg) for cfg in cfgs)

    def init_weights(self) -> None:
        """Initialise: this module's configs, then those of the modules inside, then a checkpoint if a config names one.

        A second call warns and does nothing, as in mmengine, so that a parent's call cannot undo an earlier one.
        """
        if self._is_init:
            warnings.warn(f"init_weights of {type_name(self)} has been called more than once", stacklevel=2)
            return
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else list(self.init_cfg or [])
        initialize(self, [cfg for cfg in cfgs if not is_pretrained(cfg)])
        _init_children(self)
        initialize(self, [cfg for cfg in cfgs if is_pretrained(cfg)])
        self._is_init = True


def _init_children(module: nn.Module) -> None:
    for child in module.children():
        if not hasattr(child, "init_weights"):
            _init_children(child)
        elif not getattr(child, "is_init", False):
            child.init_weights()  # type: ignore[operator]
