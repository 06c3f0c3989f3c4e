"""Command line and config file become one checked config: what the rest of the program, and a checkpoint, go by."""

from __future__ import annotations

import difflib
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastres.config import ConfigError, check_keys, load_config
from training.data import FOLDER_TYPES, class_folders
from training.errors import TrainingError

SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("samples_per_gpu", "workers_per_gpu", "strict", "train", "val", "test"),
    "runner": ("type", "max_epochs"),
    "evaluation": ("interval", "metric", "metric_options"),
    "checkpoint_config": ("interval", "step_interval"),
    "log_config": ("interval", "hooks"),
    "compare": ("min_accuracy", "reference_steps"),
}
DEFAULTS: dict[str, Any] = {
    "optimizer_config": dict(grad_clip=None),
    "lr_config": dict(policy="fixed"),
    "evaluation": dict(interval=1),
    "checkpoint_config": dict(interval=1, step_interval=None),
    "log_config": dict(interval=10),
    "compare": dict(min_accuracy=None, reference_steps=100),
    "seed": 0,
    "amp": "off",
    "channels_last": False,
    "compile": False,
}
REQUIRED = ("model", "data", "optimizer", "runner")
KNOWN = (*REQUIRED, *DEFAULTS, "work_dir")
AMP = ("off", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """A run. ``config`` is complete and holds plain values only."""

    config: dict[str, Any]
    path: Path
    work_dir: Path
    device: str = "auto"
    resume: str | None = None
    overwrite: bool = False
    adopt_classes: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        return self.config["runner"]["max_epochs"]

    @property
    def batch(self) -> int:
        return self.config["data"]["samples_per_gpu"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def channels(self) -> int:
        return self.config["model"]["backbone"].get("in_channels", 3)


def resolve(args: Namespace) -> Settings:
    """The settings of a command line.

    Raises:
        ConfigError: naming file and key.
        TrainingError: an option that does not fit.
    """
    path = Path(args.config)
    loaded = load_config(path, args.cfg_options or [])
    try:
        config = _complete(loaded)
        for name in ("seed", "amp"):
            if getattr(args, name) is not None:
                config[name] = getattr(args, name)
        for name in ("channels_last", "compile"):
            config[name] = getattr(args, name) or config[name]
        if args.epochs is not None:
            config["runner"]["max_epochs"] = args.epochs
        if args.min_accuracy is not None:
            config["compare"]["min_accuracy"] = args.min_accuracy
        if args.strict_data:
            config["data"]["strict"] = True
        notes: list[str] = []
        if args.data is not None:
            _replace_data(config, args.data, notes)
        _check_values(config)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    stem = path.stem + ("_compare" if args.compare else "")
    work_dir = Path(args.work_dir or config.pop("work_dir", None) or Path("work_dirs", stem))
    config.pop("work_dir", None)
    if args.compare and args.resume is not None:
        raise TrainingError("--compare trains both norms side by side from the start; it cannot --resume")
    return Settings(
        config, path, work_dir, args.device, args.resume, args.overwrite, args.data is not None, notes
    )


def _complete(loaded: dict[str, Any]) -> dict[str, Any]:
    """The known sections of a config with their defaults. Other names are the file's own variables."""
    for key in loaded:
        near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.8)
        if key not in KNOWN and near:
            raise ConfigError(f"unknown key {key!r}; did you mean {near[0]!r}?")
    if loaded.get("fp16") is not None:
        raise ConfigError("fp16: use amp = 'fp16', which chooses its loss scale itself")
    for key in ("load_from", "resume_from"):
        if loaded.get(key) is not None:
            raise ConfigError(f"{key}: not supported; --resume goes on with a run, init_cfg loads weights")
    for key in REQUIRED:
        if key not in loaded:
            raise ConfigError(f"key {key!r} is missing")
    config = {k: loaded[k] for k in KNOWN if k in loaded}
    for key, default in DEFAULTS.items():
        given = config.get(key)
        config[key] = {**default, **given} if isinstance(default, dict) and isinstance(given, dict) else given
        if given is None:
            config[key] = dict(default) if isinstance(default, dict) else default
    for key, allowed in SECTIONS.items():
        check_keys(config[key], allowed, key)
    check_keys(
        config["model"], ["type", "backbone", "neck", "head"], "model", required=["type", "backbone", "head"]
    )
    for part in ("backbone", "head"):
        check_keys(config["model"][part], None, f"model.{part}", required=["type"])
    check_keys(config["data"], SECTIONS["data"], "data", required=["samples_per_gpu", "train", "val"])
    config["data"] = {"workers_per_gpu": 0, "strict": False, **config["data"]}
    config["data"].pop("test", None)
    return config


def _check_values(config: dict[str, Any]) -> None:
    def integer(section: str, key: str, least: int, or_none: bool = False) -> None:
        value = config[section].get(key)
        if value is None and or_none:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{section}.{key}: got {value!r}, wanted an integer >= {least}")

    integer("runner", "max_epochs", 1)
    integer("data", "samples_per_gpu", 1)
    integer("data", "workers_per_gpu", 0)
    integer("evaluation", "interval", 1)
    integer("checkpoint_config", "interval", 1)
    integer("checkpoint_config", "step_interval", 1, or_none=True)
    integer("log_config", "interval", 1)
    integer("compare", "reference_steps", 0)
    if config["runner"].get("type", "EpochBasedRunner") != "EpochBasedRunner":
        raise ConfigError(
            f"runner.type: got {config['runner']['type']!r}, only 'EpochBasedRunner' is supported"
        )
    if config["amp"] not in AMP:
        raise ConfigError(f"amp: got {config['amp']!r}, wanted one of {', '.join(AMP)}")
    if not isinstance(config["seed"], int) or config["seed"] < 0:
        raise ConfigError(f"seed: got {config['seed']!r}, wanted an integer >= 0")


# --- data from the command line -----------------------------------------------------------------------------


def _replace_data(config: dict[str, Any], flag: str, notes: list[str]) -> None:
    """Puts the data of ``--data`` into the config, with pipelines of its own unless they are for such data already."""
    kind, _, folder = flag.partition(":")
    data, size = config["data"], image_size(config)
    before = data["train"].get("type")
    common = {part: data[part].get("pipeline") for part in ("train", "val")}
    if kind == "digits" and not folder:
        parts: dict[str, dict[str, Any]] = {
            "train": dict(type="Digits", split="train"),
            "val": dict(type="Digits", split="test"),
        }
        same = before == "Digits"
    elif kind == "synthetic" and not folder:
        head = config["model"]["head"]
        shape = dict(image_size=size, num_classes=head.get("num_classes", 1000))
        steps = 20 * data["samples_per_gpu"]
        parts = {
            "train": dict(type="Synthetic", length=steps, **shape),
            "val": dict(type="Synthetic", length=data["samples_per_gpu"], **shape),
        }
        same = True  # the pipeline only names the normalization
    elif kind == "imagefolder" and folder:
        parts = _image_folders(Path(folder), notes)
        same = before in FOLDER_TYPES
    else:
        raise TrainingError(f"--data {flag}: expected digits, imagefolder:DIR or synthetic")
    own = _pipelines(kind, size, config)
    for name, part in parts.items():
        data[name] = dict(part, pipeline=common[name] if same and common[name] else own[name])


def _image_folders(root: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """DIR/train and DIR/val; or, where DIR holds the class folders themselves, a split of them."""
    train, val = root / "train", root / "val"
    if train.is_dir() or val.is_dir():
        for part in (train, val):
            if not part.is_dir():
                raise TrainingError(
                    f"{part}: no such folder; expected {train} and {val} with a folder for each class"
                )
        return {
            "train": dict(type="ImageFolder", data_prefix=str(train)),
            "val": dict(type="ImageFolder", data_prefix=str(val)),
        }
    class_folders(root)
    notes.append(
        f"{root} has no train and val folders: every class's images are split, a fifth for validation"
    )
    return {
        part: dict(type="ImageFolder", data_prefix=str(root), part=part, held_out=0.2)
        for part in ("train", "val")
    }


def image_size(config: dict[str, Any]) -> int:
    """Pixels on each side of a training image, from the last sizing step of the pipeline or the synthetic data."""
    train = config["data"]["train"]
    if not isinstance(train, dict):
        raise ConfigError(f"data.train: expected a dict, got {train!r}")
    if "image_size" in train:
        return train["image_size"]
    for step in reversed(train.get("pipeline") or []):
        size = step.get("size", step.get("crop_size")) if isinstance(step, dict) else None
        if size is not None:
            return size if isinstance(size, int) else size[0]
    return 224


def _pipelines(kind: str, size: int, config: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Usual augmentation for data of ``kind`` at ``size``, with the config's normalization."""
    steps = config["data"]["train"].get("pipeline") or []
    channels = config["model"]["backbone"].get("in_channels", 3)
    half = dict(type="Normalize", mean=[127.5] * channels, std=[127.5] * channels)
    given = [s for s in steps if isinstance(s, dict) and s.get("type") == "Normalize"]
    normalize = given[0] if given and len(given[0].get("mean", ())) == channels else half
    if kind == "digits":
        shift = dict(type="RandomCrop", size=size, padding=max(1, size // 8))
        resize = [] if size == 8 else [dict(type="Resize", size=size)]
        return {"train": [*resize, shift, normalize], "val": [*resize, normalize]}
    return {
        "train": [
            dict(type="RandomResizedCrop", size=size),
            dict(type="RandomFlip", flip_prob=0.5),
            normalize,
        ],
        "val": [
            dict(type="Resize", size=(round(size * 8 / 7), -1)),
            dict(type="CenterCrop", crop_size=size),
            normalize,
        ],
    }
