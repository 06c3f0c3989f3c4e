"""Optimizer and learning-rate schedule from mmcls-style configs.

optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4, paramwise_cfg=dict(norm_decay_mult=0.))
optimizer_config = dict(grad_clip=dict(max_norm=1.0))
lr_config = dict(policy='CosineAnnealing', min_lr=0, warmup='linear', warmup_iters=500, warmup_ratio=0.1)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastres.config import ConfigError, check_keys

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
POLICIES: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "step": ("step", "gamma", "min_lr"),
    "CosineAnnealing": ("min_lr", "min_lr_ratio"),
    "poly": ("power", "min_lr"),
}
COMMON = ("policy", "by_epoch", "warmup", "warmup_iters", "warmup_ratio", "warmup_by_epoch")
WARMUPS = ("constant", "linear", "exp")


def build_optimizer(model: nn.Module, cfg: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Any optimizer of torch.optim by name. ``paramwise_cfg`` takes norm_decay_mult, bias_decay_mult, bias_lr_mult.

    Raises:
        ConfigError: unknown type or key, or a value the optimizer refuses.
    """
    options = check_keys(cfg, None, "optimizer", required=["type", "lr"])
    kind, paramwise = options.pop("type"), options.pop("paramwise_cfg", None) or {}
    known: dict[str, Any] = {
        k: v for k, v in vars(torch.optim).items() if inspect.isclass(v) and k != "Optimizer"
    }
    if kind not in known:
        raise ConfigError(f"optimizer.type: unknown optimizer {kind!r}; known: {', '.join(sorted(known))}")
    check_keys(options, [p for p in inspect.signature(known[kind]).parameters if p != "params"], "optimizer")
    check_keys(paramwise, ["norm_decay_mult", "bias_decay_mult", "bias_lr_mult"], "optimizer.paramwise_cfg")
    try:
        return known[kind](_parameter_groups(model, options, paramwise), **options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"optimizer: {kind}: {e}") from e


def _parameter_groups(
    model: nn.Module, cfg: Mapping[str, Any], paramwise: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups of parameters that share their multipliers of learning rate and weight decay, in order of the model."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr = decay = 1.0
            if isinstance(module, NORMS):
                decay = paramwise.get("norm_decay_mult", 1.0)
            elif name == "bias":
                lr, decay = paramwise.get("bias_lr_mult", 1.0), paramwise.get("bias_decay_mult", 1.0)
            groups.setdefault((lr, decay), []).append(parameter)
    built = []
    for (lr, decay), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters}
        if lr != 1:
            group["lr"] = cfg["lr"] * lr
        if decay != 1 and "weight_decay" in cfg:
            group["weight_decay"] = cfg["weight_decay"] * decay
        built.append(group)
    return built


def grad_clip(cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of clip_grad_norm_ from ``optimizer_config``, or None."""
    cfg = check_keys(cfg or {}, ["grad_clip", "type"], "optimizer_config")
    clip = cfg.get("grad_clip")
    if clip is None:
        return None
    return check_keys(clip, ["max_norm", "norm_type"], "optimizer_config.grad_clip", required=["max_norm"])


def build_schedule(
    cfg: Mapping[str, Any] | None, base_lr: float, steps_per_epoch: int, epochs: int
) -> Callable[[int], float]:
    """Factor on the learning rate for every step, counted from 0, by the formulas of mmcv's updater hooks.

    Args:
        cfg: ``lr_config``; policy 'fixed', 'step', 'CosineAnnealing' or 'poly', by epoch unless ``by_epoch=False``,
            with warm-up 'constant', 'linear' or 'exp' over ``warmup_iters`` steps (epochs with ``warmup_by_epoch``).
        base_lr: the optimizer's learning rate, to which ``min_lr`` is compared.
        steps_per_epoch, epochs: the length of the run.
    """
    cfg = check_keys(cfg or dict(policy="fixed"), None, "lr_config", required=["policy"])
    policy = cfg["policy"]
    if policy not in POLICIES:
        raise ConfigError(f"lr_config.policy: unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    check_keys(cfg, [*COMMON, *POLICIES[policy]], "lr_config")
    by_epoch = cfg.get("by_epoch", True)
    last = epochs if by_epoch else epochs * steps_per_epoch
    regular = _POLICY[policy](cfg, base_lr, max(last, 1))
    warmup = _build_warmup(cfg, steps_per_epoch)

    def factor(step: int) -> float:
        return regular(step // steps_per_epoch if by_epoch else step) * warmup(step)

    return factor


def _fixed(cfg: Mapping[str, Any], base_lr: float, last: int) -> Callable[[int], float]:
    return lambda t: 1.0


def _step(cfg: Mapping[str, Any], base_lr: float, last: int) -> Callable[[int], float]:
    step, gamma, floor = cfg.get("step"), cfg.get("gamma", 0.1), cfg.get("min_lr", 0.0) / base_lr
    if isinstance(step, int) and step > 0:
        return lambda t: max(floor, gamma ** (t // step))
    if isinstance(step, (list, tuple)) and all(isinstance(s, int) and s > 0 for s in step):
        return lambda t: max(floor, gamma ** sum(t >= s for s in step))
    raise ConfigError(f"lr_config.step: got {step!r}, wanted a positive integer or a list of them")


def _cosine(cfg: Mapping[str, Any], base_lr: float, last: int) -> Callable[[int], float]:
    if ("min_lr" in cfg) == ("min_lr_ratio" in cfg):
        raise ConfigError("lr_config: CosineAnnealing takes exactly one of min_lr and min_lr_ratio")
    floor = cfg["min_lr_ratio"] if "min_lr_ratio" in cfg else cfg["min_lr"] / base_lr
    return lambda t: floor + (1 - floor) * (1 + math.cos(math.pi * t / last)) / 2


def _poly(cfg: Mapping[str, Any], base_lr: float, last: int) -> Callable[[int], float]:
    floor, power = cfg.get("min_lr", 0.0) / base_lr, cfg.get("power", 1.0)
    return lambda t: floor + (1 - floor) * (1 - t / last) ** power


_POLICY = {"fixed": _fixed, "step": _step, "CosineAnnealing": _cosine, "poly": _poly}


def _build_warmup(cfg: Mapping[str, Any], steps_per_epoch: int) -> Callable[[int], float]:
    kind = cfg.get("warmup")
    if kind is None:
        return lambda step: 1.0
    if kind not in WARMUPS:
        raise ConfigError(f"lr_config.warmup: got {kind!r}, wanted None or one of {', '.join(WARMUPS)}")
    length, ratio = cfg.get("warmup_iters", 0), cfg.get("warmup_ratio", 0.1)
    if not isinstance(length, int) or length < 1 or not 0 < ratio <= 1:
        raise ConfigError(
            f"lr_config: warmup_iters: got {length!r}, wanted an integer >= 1; "
            f"warmup_ratio: got {ratio!r}, wanted 0 < ratio <= 1"
        )
    steps = length * steps_per_epoch if cfg.get("warmup_by_epoch", False) else length
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda done: ratio,
        "linear": lambda done: 1 - (1 - done) * (1 - ratio),
        "exp": lambda done: ratio ** (1 - done),
    }
    return lambda step: 1.0 if step >= steps else shapes[kind](step / steps)
