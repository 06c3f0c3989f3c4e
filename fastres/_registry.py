"""The registries and the builders; everybody's name for this module is :mod:`fastres.registry`.

Code inside the package imports from here, not from there: mmengine learns of us by the first import of
``fastres.registry``, and ``import fastres`` must not use that up. Needs torch only.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastres._calling import checked_call, listed, named_parameters, path_of, suggest, takes, type_name

SCOPE = "fastres"


# ---------------------------------------------------------------------------------------------------------- registry


class Registry:
    """A table from names to classes (or functions) that can build from a config dict.

    Args:
        name: what the entries are ("norm layer"); used in messages.
        build_func: called by :meth:`build` as ``build_func(cfg, *args, registry=self, **kwargs)``;
            default :func:`build_from_cfg`.
        locations: modules that register entries when they are imported; imported when a name is not found.
    """

    def __init__(
        self, name: str, build_func: Callable[..., Any] | None = None, locations: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._build_func: Callable[..., Any] = build_from_cfg if build_func is None else build_func
        self._locations = tuple(locations)
        self._module_dict: dict[str, Callable[..., Any]] = {}
        # Called with each new name, which is how mmengine hears of it.
        self.publish: Callable[[str], None] | None = None

    @property
    def name(self) -> str:
        """What the entries are."""
        return self._name

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """The table itself: name -> class or function."""
        return self._module_dict

    def __len__(self) -> int:
        return len(self._module_dict)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __repr__(self) -> str:
        rows = [(name, path_of(module)) for name, module in sorted(self._module_dict.items())]
        widths = [max(map(len, column)) for column in zip(("name", "object"), *rows, strict=True)]
        table = [("name", "object"), ("-" * widths[0], "-" * widths[1]), *rows]
        entries = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
        lines = [f"{name:<{widths[0]}}  {path}" for name, path in table]
        return "\n".join([f"Registry {self._name!r} ({entries})", *lines])

    def get(self, key: str) -> Callable[..., Any] | None:
        """The entry called ``key`` (with or without the scope ``fastres.``), or None. TypeError if not a str."""
        if not isinstance(key, str):
            raise TypeError(f"Registry.get ({self._name}): key must be a str, got {type_name(key)}")
        name = key.removeprefix(f"{SCOPE}.")
        if name not in self._module_dict:
            for location in self._locations:
                importlib.import_module(location)
        return self._module_dict.get(name)

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the object that ``cfg`` describes. Arguments and errors: :func:`build_from_cfg`."""
        return self._build_func(cfg, *args, registry=self, **kwargs)

    def register_module(
        self,
        name: str | Sequence[str] | None = None,
        force: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> Any:
        """Register a class or function, as a call (``module=...``, returned as it is) or as a decorator.

        Args:
            name: the name or names to register it under; default its ``__name__``.
            force: replace an entry of the same name instead of raising.
            module: what to register; None gives a decorator.

        Raises:
            TypeError: ``force`` not a bool, ``name`` not a str or list of str, ``module`` not callable.
            ValueError: an empty name, or no name at all in the list.
            KeyError: a name is taken and ``force`` is False. Then none of the names is registered.
        """
        where = f"register_module ({self._name})"
        if not isinstance(force, bool):
            raise TypeError(f"{where}: force must be a bool, got {type_name(force)}")
        names = _checked_names(where, name)
        if module is not None:
            self._add(module, names, force, where)
            return module

        def decorate(decorated: Callable[..., Any]) -> Callable[..., Any]:
            self._add(decorated, names, force, where)
            return decorated

        return decorate

    def _add(self, module: Callable[..., Any], names: list[str] | None, force: bool, where: str) -> None:
        if not callable(module):
            raise TypeError(
                f"{where}: module must be a class or a function, got {type_name(module)} {module!r}"
            )
        if names is None:
            own_name = getattr(module, "__name__", None)
            if own_name is None:
                raise TypeError(f"{where}: {module!r} has no __name__; pass name=")
            names = [own_name]
        for name in names:
            if name in self._module_dict and not force:
                raise KeyError(
                    f"{where}: {name!r} is already registered as {path_of(self._module_dict[name])}; "
                    "pass force=True to replace it"
                )
        for name in names:
            self._module_dict[name] = module
            if self.publish is not None:
                self.publish(name)

    def _resolve(self, type_: Any, where: str) -> Callable[..., Any]:
        """The class or function for the value of a config's ``type`` key."""
        if isinstance(type_, str):
            entry = self.get(type_)
            if entry is None:
                raise KeyError(
                    f"{where}: {self._name} type {type_!r} is not registered"
                    f"{suggest(_local_name(type_), self._module_dict)}; registered: {listed(sorted(self._module_dict))}"
                )
            return entry
        if inspect.isclass(type_) or inspect.isroutine(type_):
            return type_
        raise TypeError(f"{where}: cfg['type'] must be a str, a class or a function, got {type_name(type_)}")


def build_from_cfg(
    cfg: Mapping[str, Any], registry: Registry, default_args: Mapping[str, Any] | None = None
) -> Any:
    """Call the class that ``cfg["type"]`` names (or is) with the other keys as keyword arguments.

    Args:
        cfg: dict with a ``type`` key; not changed.
        registry: where to look the type up.
        default_args: values for keys that ``cfg`` lacks; not changed.

    Raises:
        TypeError: ``cfg`` or ``default_args`` is no dict, ``registry`` no :class:`Registry`, ``type`` neither str nor
            callable, or the class does not take the keys (the message names them).
        KeyError: no ``type``, or a type that is not registered (the message lists the near matches).
    """
    if not isinstance(registry, Registry):
        raise TypeError(f"build_from_cfg: registry must be a fastres Registry, got {type_name(registry)}")
    where = f"build {registry.name}"
    if default_args is not None and not isinstance(default_args, dict):
        raise TypeError(f"{where}: default_args must be a dict or None, got {type_name(default_args)}")
    label, factory, kwargs = _take_type(where, cfg, registry, default_args)
    return checked_call(label, factory, (), {}, kwargs)


def _build_model_from_cfg(cfg: Any, registry: Registry, default_args: Mapping[str, Any] | None = None) -> Any:
    """As :func:`build_from_cfg`; a list of configs gives their ``nn.Sequential``."""
    if isinstance(cfg, list):
        return torch.nn.Sequential(*(build_from_cfg(one, registry, default_args) for one in cfg))
    return build_from_cfg(cfg, registry, default_args)


def _local_name(type_: Any) -> Any:
    return type_.removeprefix(f"{SCOPE}.") if isinstance(type_, str) else type_


def _checked_names(where: str, name: Any) -> list[str] | None:
    if name is None:
        return None
    names = [name] if isinstance(name, str) else name
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        hint = "; write @registry.register_module() with parentheses" if callable(name) else ""
        raise TypeError(f"{where}: name must be a str or a list of str, got {type_name(name)} {name!r}{hint}")
    if not names or not all(names):
        raise ValueError(f"{where}: name must not be empty, got {name!r}")
    return list(names)


def _take_type(
    where: str, cfg: Any, registry: Registry, default_args: Mapping[str, Any] | None = None
) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """Split a config into (label for messages, class, a new dict of the other keys)."""
    if not isinstance(cfg, dict):
        raise TypeError(f"{where}: cfg must be a dict with the key 'type', got {type_name(cfg)} {cfg!r}")
    kwargs = {**dict((default_args or {}).items()), **dict(cfg.items())}
    if "type" not in kwargs:
        raise KeyError(f"{where}: cfg has no key 'type', got the keys {listed(sorted(map(str, kwargs)))}")
    type_ = kwargs.pop("type")
    factory = registry._resolve(type_, where)
    shown = type_ if isinstance(type_, str) else getattr(type_, "__name__", repr(type_))
    return f"{where}: {shown}", factory, kwargs


# ------------------------------------------------------------------------------------------------ tables and builders

NORM_LOCATIONS = ("fastres.modules",)
MODEL_LOCATIONS = ("fastres.models", "fastres.variants", "fastres.classifier")
NORM_LAYERS = Registry("norm layer", locations=NORM_LOCATIONS)
CONV_LAYERS = Registry("conv layer")
ACTIVATION_LAYERS = Registry("activation layer")
MODELS = Registry("model", _build_model_from_cfg, locations=MODEL_LOCATIONS)
BACKBONES = NECKS = HEADS = LOSSES = CLASSIFIERS = MODELS  # one table under the names of mmcls 0.x

_TORCH_NORMS = {
    "BN": "BatchNorm2d",
    "BN1d": "BatchNorm1d",
    "BN2d": "BatchNorm2d",
    "BN3d": "BatchNorm3d",
    "SyncBN": "SyncBatchNorm",
    "GN": "GroupNorm",
    "LN": "LayerNorm",
    "IN": "InstanceNorm2d",
    "IN1d": "InstanceNorm1d",
    "IN2d": "InstanceNorm2d",
    "IN3d": "InstanceNorm3d",
}
_TORCH_CONVS = {"Conv": "Conv2d", "Conv1d": "Conv1d", "Conv2d": "Conv2d", "Conv3d": "Conv3d"}
_TORCH_ACTIVATIONS = {
    **{
        name: name for name in ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "GELU")
    },
    **{name: name for name in ("SiLU", "Mish", "Sigmoid", "Tanh", "Hardtanh", "Softplus", "Hardsigmoid")},
    **{"Hardswish": "Hardswish", "Identity": "Identity"},
    **{"Swish": "SiLU", "HSigmoid": "Hardsigmoid", "HSwish": "Hardswish"},  # mmcv's names
}
for _registry, _classes in (
    (NORM_LAYERS, _TORCH_NORMS),
    (CONV_LAYERS, _TORCH_CONVS),
    (ACTIVATION_LAYERS, _TORCH_ACTIVATIONS),
):
    for _name, _class in _classes.items():
        _registry.register_module(_name, module=getattr(torch.nn, _class))


def build_norm_layer(
    cfg: Mapping[str, Any], num_features: int, postfix: int | str = ""
) -> tuple[str, torch.nn.Module]:
    """Build a norm layer from a config.

    Args:
        cfg: dict with ``type`` (a name in ``NORM_LAYERS``, or a class), the class's own arguments, and optionally
            ``requires_grad`` (bool, default True, set on every parameter). ``eps`` is 1e-5 if not given. Not changed.
        num_features: number of channels, the first argument of the class (``num_channels`` of ``GN``).
        postfix: appended to the abbreviation to make the layer's name.

    Returns:
        (name, layer), such as ``("bn1", BatchNorm2d(64))``; the abbreviation is :func:`infer_abbr` of the class.

    Raises:
        TypeError: ``cfg`` is no dict, ``type`` is neither str nor class, ``requires_grad`` is no bool, or the class
            does not take the keys.
        KeyError: no ``type``, or an unknown one.
        AssertionError: ``postfix`` is neither int nor str, or ``num_groups`` is missing for ``GN``.

    Example:
        >>> name, layer = build_norm_layer(dict(type="GN", num_groups=4), 64, postfix=1)
        >>> name, layer.num_groups, layer.eps
        ('gn1', 4, 1e-05)
    """
    where = "build_norm_layer"
    label, layer_class, kwargs = _take_type(where, cfg, NORM_LAYERS)
    abbr = infer_abbr(layer_class)
    if not isinstance(postfix, int | str):
        raise AssertionError(f"{where}: postfix must be an int or a str, got {type_name(postfix)}")
    requires_grad = kwargs.pop("requires_grad", True)
    if not isinstance(requires_grad, bool):
        raise TypeError(f"{label}: requires_grad must be a bool, got {requires_grad!r}")
    if "eps" not in kwargs and takes(layer_class, "eps"):
        kwargs["eps"] = 1e-5

    if layer_class is torch.nn.GroupNorm or _local_name(cfg["type"]) == "GN":
        if "num_groups" not in kwargs:
            raise AssertionError(f"{label}: cfg needs the key 'num_groups', got {listed(list(cfg))}")
        layer = checked_call(label, layer_class, (), {"num_channels": num_features}, kwargs)
    else:
        layer = checked_call(label, layer_class, (num_features,), {}, kwargs)
    if layer_class is torch.nn.SyncBatchNorm or _local_name(cfg["type"]) == "SyncBN":
        if hasattr(layer, "_specify_ddp_gpu_num"):  # torch before 1.9, and norms written against it
            layer._specify_ddp_gpu_num(1)
    for parameter in layer.parameters():
        parameter.requires_grad = requires_grad
    return f"{abbr}{postfix}", layer


def infer_abbr(class_type: Any) -> str:
    """The short name of a norm class; TypeError if it is not a class.

    The class's ``_abbr_`` if it has one; else ``in``, ``bn``, ``gn`` or ``ln`` by the torch class it derives from; else
    by ``batch``, ``group``, ``layer`` or ``instance`` in its own name; else ``norm_layer``.
    """
    if not inspect.isclass(class_type):
        raise TypeError(f"infer_abbr: class_type must be a class, got {type_name(class_type)} {class_type!r}")
    if hasattr(class_type, "_abbr_"):
        return class_type._abbr_
    nn = torch.nn
    for base, abbr in ((_InstanceNorm, "in"), (_BatchNorm, "bn"), (nn.GroupNorm, "gn"), (nn.LayerNorm, "ln")):
        if issubclass(class_type, base):
            return abbr
    for word, abbr in (("batch", "bn"), ("group", "gn"), ("layer", "ln"), ("instance", "in")):
        if word in class_type.__name__.lower():
            return abbr
    return "norm_layer"


def build_conv_layer(cfg: Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Build a convolution: ``cfg`` gives the type (None: ``Conv2d``) and its extra arguments, ``args`` and ``kwargs``
    the rest, in_channels first. Errors as :func:`build_from_cfg`; a key that is also in ``kwargs`` is a TypeError."""
    cfg = dict(type="Conv2d") if cfg is None else cfg
    label, layer_class, extra = _take_type("build_conv_layer", cfg, CONV_LAYERS)
    return checked_call(label, layer_class, args, kwargs, extra)


def build_activation_layer(cfg: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Build an activation layer; None means ``ReLU``. Errors as :func:`build_from_cfg`.

    ``inplace`` is True if the class takes it and ``cfg`` does not say. mmcv's ConvModule does the same, while its bare
    builder leaves the class's own default.
    """
    cfg = dict(type="ReLU") if cfg is None else cfg
    label, layer_class, kwargs = _take_type("build_activation_layer", cfg, ACTIVATION_LAYERS)
    if "inplace" in named_parameters(layer_class)[0]:
        kwargs.setdefault("inplace", True)
    return checked_call(label, layer_class, (), {}, kwargs)


def build_model(cfg: Any, default_args: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Build from ``MODELS``; a list of configs gives an ``nn.Sequential``. Errors as :func:`build_from_cfg`."""
    return MODELS.build(cfg, default_args=default_args)


# The names of mmcls 0.x.
build_backbone = build_neck = build_head = build_loss = build_classifier = build_model
