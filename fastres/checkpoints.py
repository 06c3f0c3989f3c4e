"""Load ResNet checkpoints of other packages into fastres nets, and save fastres nets for them.

    report = load_checkpoint(model, "resnet50.pth")          # torchvision, timm, mmpretrain, detectron2: found out
    state = export_state_dict(model, "timm")                 # and back, bitwise

Each package names the same tensors differently. Every name is brought to one common form, in which the names of
checkpoint and model meet; a round trip moves tensors and never computes. ``model`` is a fastres backbone or classifier,
or anything else whose keys are of one of these forms. mmpretrain's names are the common ones below ``backbone.`` and
``head.``.

    common form                      torchvision               timm                      detectron2
    conv1.weight                     the same                  the same                  stem.conv1.weight
    bn1.bias                         the same                  the same                  stem.conv1.norm.bias
    stem.1.conv.weight               none                      conv1.3.weight            none
    layer1.0.bn2.weight              the same                  the same                  res2.0.conv2.norm.weight
    layer1.0.downsample.conv.weight  layer1.0.downsample.0...  layer1.0.downsample.0/1   res2.0.shortcut.weight
    fc.weight                        the same                  the same                  linear.weight

detectron2's caffe models want images in BGR order, 0 to 255, less the mean and not divided by the deviation, and have
the stride on the first 1x1 (``style='caffe'``). ``flip_input_channels`` turns over the first convolution's input
channels, so that RGB images can be fed; scale and mean stay the caller's.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastres.initialize import load_file

__all__ = ["FORMATS", "CheckpointError", "LoadReport", "export_state_dict", "load_checkpoint"]

FORMATS = ("torchvision", "timm", "mmpretrain", "detectron2", "fastres")
_WRAPPERS = {"module", "_orig_mod", "model", "backbone", "head", "state_dict", "bottom_up"}
_RULES = [(re.compile(pattern), target) for pattern, target in (
    (r"^stem\.conv1\.norm\.(\w+)$", r"bn1.\1"),  # detectron2
    (r"^stem\.conv1\.weight$", r"conv1.weight"),
    (r"^res5\.(\d+)\.", r"layer4.\1."), (r"^res4\.(\d+)\.", r"layer3.\1."),
    (r"^res3\.(\d+)\.", r"layer2.\1."), (r"^res2\.(\d+)\.", r"layer1.\1."),
    (r"^(layer\d\.\d+)\.conv(\d)\.norm\.(\w+)$", r"\1.bn\2.\3"),
    (r"^(layer\d\.\d+)\.shortcut\.norm\.(\w+)$", r"\1.downsample.norm.\2"),
    (r"^(layer\d\.\d+)\.shortcut\.weight$", r"\1.downsample.conv.weight"),
    (r"^linear\.(weight|bias)$", r"fc.\1"),
    (r"^conv1\.0\.(\w+)$", r"stem.0.conv.\1"), (r"^conv1\.1\.(\w+)$", r"stem.0.bn.\1"),  # timm's deep stem
    (r"^conv1\.3\.(\w+)$", r"stem.1.conv.\1"), (r"^conv1\.4\.(\w+)$", r"stem.1.bn.\1"),
    (r"^conv1\.6\.(\w+)$", r"stem.2.conv.\1"),
    (r"^(layer\d\.\d+)\.se\.fc(\d)\.(\w+)$", r"\1.se_layer.conv\2.conv.\3"),
)]  # fmt: skip
_KNOWN = re.compile(
    r"^(conv1\.(weight|bias)|bn1\.\w+|stem\.\d\.(conv|bn)\.\w+|fc\.(weight|bias)"
    r"|layer\d\.\d+\.(conv\d\.\w+|bn\d\.\w+|downsample\.(conv|norm|\d)\.\w+|se_layer\.conv\d\.conv\.\w+))$"
)


class CheckpointError(ValueError):
    """A checkpoint that does not fit; ``report`` has the details. Nothing has been loaded."""

    def __init__(self, message: str, report: LoadReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class LoadReport:
    """What became of every key.

    Attributes:
        format: the format that was recognised.
        loaded: keys of the model that were filled.
        missing: keys of the model that the checkpoint lacks, each with the nearest of its unused names.
        unexpected: keys of the checkpoint that the model lacks, each with the nearest of the model's unfilled names.
        misshaped: (key, shape in the checkpoint, shape in the model).
        left_out: keys of the checkpoint that were meant to be left, such as a head's for a backbone.
        notes: what else there is to know.
    """

    format: str
    loaded: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    misshaped: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or misshaped."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        counts = (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.misshaped)} misshaped"
        )
        lines = [f"{self.format} checkpoint: {len(self.loaded)} tensors loaded, {counts}"]
        for kind, rows in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"  {kind:<10}  {key}" + (f"   nearest: {near}" if near else "") for key, near in rows]
        lines += [
            f"  {'misshaped':<10}  {key}   is {got}, wanted {want}" for key, got, want in self.misshaped
        ]
        if self.left_out:
            shown = ", ".join(self.left_out[:4]) + (" ..." if len(self.left_out) > 4 else "")
            lines.append(f"  left out    {shown}")
        return "\n".join(lines + [f"  note        {note}" for note in self.notes])


# --------------------------------------------------------------------------------------------------------------- names


def _stripped(key: str) -> str:
    parts = key.split(".")
    while len(parts) > 2 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _common(keys: Mapping[str, Any]) -> dict[str, str]:
    """Common form to key, for every key. A deep stem in timm's form makes its ``bn1`` the stem's last norm."""
    short = {key: _stripped(key) for key in keys}
    deep = any(name.startswith("conv1.0.") for name in short.values())
    first: dict[str, int] = {}  # a downsample branch's lowest index: that of its convolution
    for name in short.values():
        if match := re.match(r"^(layer\d\.\d+\.downsample)\.(\d)\.", name):
            first[match[1]] = min(first.get(match[1], 9), int(match[2]))
    found: dict[str, str] = {}
    for key, name in short.items():
        for pattern, target in _RULES:
            name = pattern.sub(target, name)
        if deep and name.startswith("bn1."):
            name = f"stem.2.bn.{name.removeprefix('bn1.')}"
        if match := re.match(r"^(layer\d\.\d+\.downsample)\.(\d)\.(\w+)$", name):
            name = f"{match[1]}.{'conv' if int(match[2]) == first[match[1]] else 'norm'}.{match[3]}"
        if name in found:
            raise CheckpointError(
                f"keys {found[name]!r} and {key!r} both mean {name!r}; wanted prefix= to choose one"
            )
        found[name] = key
    return found


def _recognised(keys: Mapping[str, Any]) -> str:
    names = [_stripped(key) for key in keys]
    if any(re.match(r"^(stem\.conv1\.norm|res\d\.\d+)\.", name) for name in names):
        return "detectron2"
    if any(key.startswith("backbone.") for key in keys):
        return "mmpretrain"
    if any(re.match(r"^(conv1\.0\.|layer\d\.\d+\.se\.)", name) for name in names):
        return "timm"
    return "torchvision"


def _nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, 1)
    return near[0] if near else ""


# ------------------------------------------------------------------------------------------------------------- loading


def _read(checkpoint: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors by name: a file's, or those of a dict, which may have them under ``state_dict``."""
    op = "load_checkpoint"
    if isinstance(checkpoint, str | os.PathLike):
        name = os.fspath(checkpoint)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{op}: checkpoint {name!r} is no file")
        if name.endswith((".pkl", ".pickle")):
            raise ValueError(
                f"{op}: checkpoint {name!r} is a pickle, which can run code when read; wanted a .pth or .safetensors "
                "file, or the dict of arrays in it"
            )
        if name.endswith(".safetensors"):
            checkpoint = _safetensors(name)
        else:
            checkpoint = load_file(op, name)
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(key, str) for key in checkpoint):
        raise TypeError(
            f"{op}: checkpoint is {type(checkpoint).__name__}; wanted a path or a dict of tensors"
        )
    return {key: torch.as_tensor(value) for key, value in checkpoint.items() if hasattr(value, "shape")}


def _safetensors(name: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file as load
    except ImportError as error:
        raise ImportError(f"load_checkpoint: {name!r} needs the package safetensors ({error})") from error
    return load(name)


def _kind(value: Tensor) -> str:
    for kind in ("complex", "floating_point"):
        if getattr(value, f"is_{kind}")():
            return kind
    return "bool" if value.dtype == torch.bool else "integer"


def _note_dtypes(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], pairs: list[tuple[str, str]]
) -> list[str]:
    """Words for the values that a copy rounds or widens; CheckpointError for those that it would change in kind."""
    changes: dict[tuple[str, str], int] = {}
    for key, name in pairs:
        value, target = state[name], own[key]
        if _kind(value) != _kind(target):
            raise CheckpointError(
                f"load_checkpoint: {name!r} is {str(value.dtype)[6:]}; wanted {str(target.dtype)[6:]}, as the model"
            )
        if value.dtype != target.dtype:
            change = (str(value.dtype)[6:], str(target.dtype)[6:])
            changes[change] = changes.get(change, 0) + 1
    return [f"{count} tensors went from {a} to {b}" for (a, b), count in changes.items()]


def load_checkpoint(
    model: nn.Module,
    checkpoint: Any,
    *,
    prefix: str = "",
    head: bool = True,
    strict: bool = True,
    flip_input_channels: bool = False,
) -> LoadReport:
    """Copy a checkpoint's values into ``model``, whatever its names.

    Args:
        model: a fastres ResNet or classifier, or a net with names of a known form.
        checkpoint: a file (.pth, .safetensors), or a dict of tensors or arrays, as it is or under ``state_dict`` or
            ``model``. Wrappers' names (``module.``, ``_orig_mod.``, ``backbone.`` ...) are seen through.
        prefix: take only keys below it.
        head: False leaves a classification layer as it is.
        strict: a key missing, unexpected or misshaped is an error; else it is reported and the rest is loaded.
        flip_input_channels: turn over the input channels of the first convolution (BGR to RGB).

    Returns:
        The report. ``num_batches_tracked`` may be missing (frozen norms have none) and then stays as it is.

    Raises:
        CheckpointError: does not fit, or holds a tensor of another kind (integers for floats); carries the report where
            there is one. Nothing has been loaded.
        FileNotFoundError, TypeError, ValueError: no such file, or nothing readable in it. A file that needs code to be
            read, such as mmengine's training checkpoints, is refused: read it yourself and pass the dict.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model is {type(model).__name__}; wanted an nn.Module")
    state = _read(checkpoint)
    if prefix:
        stem = prefix.rstrip(".") + "."
        state = {key.removeprefix(stem): value for key, value in state.items() if key.startswith(stem)}
        if not state:
            raise CheckpointError(f"load_checkpoint: no key is below prefix {prefix!r}")
    own = model.state_dict()
    ours, theirs = _common(own), _common(state)
    report = LoadReport(_recognised(state))
    has_head = any(name.startswith("fc.") for name in ours)
    unfilled = [key for name, key in ours.items() if name not in theirs]
    unused = [key for name, key in theirs.items() if name not in ours]
    for name, key in ours.items():
        if name.startswith("fc.") and not head:
            continue
        if name not in theirs:
            if not name.endswith("num_batches_tracked"):
                report.missing.append((key, _nearest(key, unused)))
        elif state[theirs[name]].shape != own[key].shape:
            report.misshaped.append((key, list(state[theirs[name]].shape), list(own[key].shape)))
        else:
            report.loaded.append(key)
    for name, key in theirs.items():
        if name.startswith("fc.") and not (head and has_head) or key.startswith("data_preprocessor."):
            report.left_out.append(key)
        elif name not in ours:
            report.unexpected.append((key, _nearest(key, unfilled)))
    if report.format == "detectron2" and not flip_input_channels:
        report.notes.append(
            "detectron2's caffe models want BGR images; flip_input_channels=True turns to RGB"
        )
    if strict and not report.fits:
        hint = "" if has_head or not head else " (or head=False)"
        raise CheckpointError(f"load_checkpoint: {type(model).__name__}: {report}{hint}", report)
    common = {key: name for name, key in ours.items()}
    report.notes += _note_dtypes(state, own, [(key, theirs[common[key]]) for key in report.loaded])
    with torch.no_grad():
        for key in report.loaded:
            value = state[theirs[common[key]]]
            if flip_input_channels and common[key] in ("conv1.weight", "stem.0.conv.weight"):
                value = value.flip(1)
            own[key].copy_(value)
    return report


# -------------------------------------------------------------------------------------------------------------- saving


def export_state_dict(model: nn.Module, format: str) -> dict[str, Tensor]:
    """The state dict of ``model`` under another package's names.

    Args:
        model: a fastres ResNet or classifier, or a net with names of a known form.
        format: one of ``FORMATS``; ``fastres`` is a bare backbone's own names.

    Returns:
        name -> the model's own tensors, not copies. ``detectron2`` has no ``num_batches_tracked``.

    Raises:
        ValueError: no such format, or the model has a part that the format has no name for.
    """
    if format not in FORMATS:
        raise ValueError(f"export_state_dict: format is {format!r}; wanted one of {', '.join(FORMATS)}")
    own = model.state_dict()
    common = _common(own)
    # With pooling in the shortcuts the convolution comes second; timm then has an identity where none is needed.
    pooled = any(re.search(r"downsample\.1\.weight$", key) and own[key].dim() == 4 for key in own)
    exported: dict[str, Tensor] = {}
    for name, key in common.items():
        if not _KNOWN.match(name):
            raise ValueError(
                f"export_state_dict: key {key!r} is none of a ResNet's; format {format!r} has no name for it"
            )
        if (new := _rendered(name, _stripped(key), format, pooled)) is not None:
            exported[new] = own[key]
    return exported


def _rendered(name: str, key: str, format: str, pooled: bool) -> str | None:
    """One name in a format; None where it has none and needs none. ``key`` is the model's own, unwrapped."""
    if format == "torchvision" and (pooled or name.startswith("stem.") or ".se_layer." in name):
        raise ValueError(
            f"export_state_dict: torchvision has no net with {key!r}; wanted format 'timm' or 'mmpretrain'"
        )
    if format == "detectron2":
        if pooled or name.startswith("stem.") or ".se_layer." in name:
            raise ValueError(f"export_state_dict: detectron2 has no net with {key!r}")
        if name.endswith("num_batches_tracked"):
            return None
        name = re.sub(r"^fc\.", "linear.", name)
        name = re.sub(r"^conv1\.", "stem.conv1.", re.sub(r"^bn1\.", "stem.conv1.norm.", name))
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
        return name.replace(".downsample.conv.", ".shortcut.").replace(".downsample.norm.", ".shortcut.norm.")
    if format == "timm":
        if match := re.match(r"^stem\.(\d)\.(conv|bn)\.(\w+)$", name):
            if match[1] + match[2] == "2bn":
                return f"bn1.{match[3]}"
            return f"conv1.{3 * int(match[1]) + (match[2] == 'bn')}.{match[3]}"
        name = re.sub(r"\.se_layer\.conv(\d)\.conv\.", r".se.fc\1.", name)
        name = name.replace(".downsample.conv.", f".downsample.{int(pooled)}.")
        return name.replace(".downsample.norm.", f".downsample.{1 + int(pooled)}.")
    if format == "mmpretrain":
        return f"head.{name}" if name.startswith("fc.") else f"backbone.{_numbered(name, key)}"
    return _numbered(name, key)


def _numbered(name: str, key: str) -> str:
    """The common form with the model's own index in a shortcut."""
    if match := re.search(r"\.downsample\.(\d)\.", key):
        return re.sub(r"\.downsample\.(conv|norm)\.", f".downsample.{match[1]}.", name)
    return re.sub(
        r"\.downsample\.norm\.", ".downsample.1.", name.replace(".downsample.conv.", ".downsample.0.")
    )
