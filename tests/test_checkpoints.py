"""Checkpoints to and from torchvision, timm, mmpretrain and detectron2: round trips, reports, errors."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastres
from fastres.checkpoints import FORMATS, CheckpointError, LoadReport, export_state_dict, load_checkpoint
from tests.parity import randomize
from tests.peers import peer


def classifier(depth: int = 18, kind: str = "ResNet", **options) -> nn.Module:
    channels = 512 if depth < 50 else 2048
    model = fastres.build_classifier(
        dict(
            type="ImageClassifier",
            backbone=dict(type=kind, depth=depth, **options),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=7, in_channels=channels),
        )
    )
    return randomize(model)


def same(a: nn.Module, b: nn.Module, but: str = "nothing") -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x if but not in k)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["ResNet", "ResNetV1d", "SEResNet"])
def test_round_trips_are_bitwise(format, kind):
    depth = 50 if kind == "SEResNet" else 18
    a, b = classifier(depth, kind), classifier(depth, kind)
    randomize(b, seed=3)
    if kind != "ResNet" and format in ("torchvision", "detectron2"):
        with pytest.raises(ValueError, match=f"{format} has no net with"):
            export_state_dict(a, format)
        return
    report = load_checkpoint(b, export_state_dict(a, format))
    assert report.fits and not report.left_out
    counts = "num_batches_tracked" if format == "detectron2" else "nothing"
    assert same(a, b, but=counts)


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module.model.", "module.backbone."])
def test_wrappers_are_seen_through(wrap):
    a, b = randomize(fastres.ResNet(18)), fastres.ResNet(18)
    state = {wrap + key: value for key, value in a.state_dict().items()}
    load_checkpoint(b, dict(state_dict=state, epoch=3))
    assert same(a, b)


def test_prefix_chooses():
    a, other, b = randomize(fastres.ResNet(18)), fastres.ResNet(18), fastres.ResNet(18)
    state = {f"encoder_q.{k}": v for k, v in a.state_dict().items()}
    state |= {f"encoder_k.{k}": v for k, v in other.state_dict().items()}
    load_checkpoint(b, state, prefix="encoder_q")
    assert same(a, b)
    with pytest.raises(CheckpointError, match="no key is below prefix 'encoder_x'"):
        load_checkpoint(b, state, prefix="encoder_x")
    ambiguous = {f"model.{k}": v for k, v in a.state_dict().items()} | a.state_dict()
    with pytest.raises(CheckpointError, match="both mean 'conv1.weight'"):
        load_checkpoint(b, ambiguous)


def test_the_report_names_every_key_and_its_nearest():
    a, b = randomize(fastres.ResNet(18)), randomize(fastres.ResNet(18), seed=3)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    state = OrderedDict(a.state_dict())
    state["layer1.0.bnn1.weight"] = state.pop("layer1.0.bn1.weight")
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(CheckpointError, match="1 missing, 1 unexpected, 1 misshaped") as caught:
        load_checkpoint(b, state)
    report = caught.value.report
    assert isinstance(report, LoadReport) and not report.fits
    assert report.missing == [("layer1.0.bn1.weight", "layer1.0.bnn1.weight")]
    assert report.unexpected == [("layer1.0.bnn1.weight", "layer1.0.bn1.weight")]
    assert report.misshaped == [("conv1.weight", [64, 1, 7, 7], [64, 3, 7, 7])]
    text = str(report)
    assert "nearest: layer1.0.bnn1.weight" in text and "is [64, 1, 7, 7], wanted [64, 3, 7, 7]" in text
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items()), "nothing was loaded"
    loose = load_checkpoint(b, state, strict=False)
    assert len(loose.loaded) == len(before) - 2
    assert torch.equal(b.layer2[0].conv1.weight, a.layer2[0].conv1.weight)
    assert torch.equal(b.conv1.weight, before["conv1.weight"])


def test_dtypes_are_noted_and_kinds_are_kept():
    a, b = randomize(fastres.ResNet(18)), randomize(fastres.ResNet(18), seed=3)
    half = {k: v.half() if v.is_floating_point() else v for k, v in a.state_dict().items()}
    before = {k: v.clone() for k, v in b.state_dict().items()}
    for dtype in (torch.int32, torch.complex64, torch.bool):
        with pytest.raises(CheckpointError, match=f"'conv1.weight' is {str(dtype)[6:]}; wanted float32"):
            load_checkpoint(b, half | {"conv1.weight": a.conv1.weight.detach().to(dtype)}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items()), "nothing was loaded"
    assert load_checkpoint(b, half).notes == ["100 tensors went from float16 to float32"]
    assert torch.equal(b.conv1.weight, half["conv1.weight"].float())
    assert not load_checkpoint(b, a.state_dict()).notes


def test_heads():
    a, backbone = classifier(), fastres.ResNet(18)
    report = load_checkpoint(backbone, export_state_dict(a, "torchvision"))
    assert report.left_out == ["fc.weight", "fc.bias"] and same(a.backbone, backbone)
    b = classifier()
    randomize(b, seed=3)
    head = b.head.fc.weight.clone()
    load_checkpoint(b, export_state_dict(a, "torchvision"), head=False)
    assert torch.equal(b.head.fc.weight, head) and same(a.backbone, b.backbone)
    with pytest.raises(CheckpointError, match=r"missing +head.fc.weight"):
        load_checkpoint(b, backbone.state_dict())


def test_detectron2_and_its_channel_order():
    a, b = randomize(fastres.ResNet(50, style="caffe")), fastres.ResNet(50, style="caffe")
    state = export_state_dict(a, "detectron2")
    assert "res2.0.shortcut.norm.running_mean" in state and "stem.conv1.norm.weight" in state
    assert state["res5.2.conv3.norm.bias"] is not None and not any("num_batches" in key for key in state)
    report = load_checkpoint(b, {"model": {f"backbone.bottom_up.{k}": v.numpy() for k, v in state.items()}})
    assert report.format == "detectron2" and "BGR" in str(report)
    x = torch.randn(1, 3, 32, 32)
    a.eval(), b.eval()
    assert torch.equal(a(x)[0], b(x)[0])
    assert not load_checkpoint(b, state, flip_input_channels=True).notes
    torch.testing.assert_close(b(x.flip(1))[0], a(x)[0], rtol=1e-4, atol=1e-4)


def test_files(tmp_path):
    a, b = randomize(fastres.ResNet(18)), fastres.ResNet(18)
    torch.save(dict(state_dict=a.state_dict()), tmp_path / "a.pth")
    load_checkpoint(b, tmp_path / "a.pth")
    assert same(a, b)
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_checkpoint(b, "nowhere.pth")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_checkpoint(b, str(tmp_path / "a.pkl"))
    (tmp_path / "b.pth").write_bytes(b"garbage")
    torch.save(a, tmp_path / "whole.pth")  # a module: reading it could run anything
    for name in ("b.pth", "whole.pth"):
        with pytest.raises(ValueError, match=f"{name}' is not a file of tensors .* weights_only=False"):
            load_checkpoint(b, tmp_path / name)
        with pytest.raises(ValueError, match="init_cfg: Pretrained: checkpoint .* is not a file of tensors"):
            fastres.ResNet(18, pretrained=str(tmp_path / name)).init_weights()
    with pytest.raises(TypeError, match="model is dict; wanted an nn.Module"):
        load_checkpoint({}, a.state_dict())
    with pytest.raises(TypeError, match="checkpoint is list; wanted a path or a dict"):
        load_checkpoint(b, [1])
    with pytest.raises(ValueError, match="format is 'keras'; wanted one of torchvision, timm"):
        export_state_dict(b, "keras")
    with pytest.raises(ValueError, match="is none of a ResNet's"):
        export_state_dict(nn.Linear(2, 2), "timm")


# -------------------------------------------------------------------------------------------------------- beside peers


def both_ways(theirs: nn.Module, ours: nn.Module, format: str, back: nn.Module) -> None:
    randomize(theirs)
    load_checkpoint(ours, theirs.state_dict())
    state = export_state_dict(ours, format)
    wanted = theirs.state_dict()
    assert state.keys() == wanted.keys(), state.keys() ^ wanted.keys()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    back.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 64, 64)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        got = ours(x)
        torch.testing.assert_close(got, theirs(x), rtol=1e-3, atol=1e-3)


@pytest.mark.peers
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision(depth):
    make = getattr(peer("torchvision.models"), f"resnet{depth}")
    both_ways(make(num_classes=7), classifier(depth), "torchvision", make(num_classes=7))


@pytest.mark.peers
@pytest.mark.parametrize("name, kind, depth", [("resnet50", "ResNet", 50), ("resnet18d", "ResNetV1d", 18)])
def test_timm(name, kind, depth):
    timm = peer("timm")
    make = timm.create_model
    both_ways(make(name, num_classes=7), classifier(depth, kind), "timm", make(name, num_classes=7))


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, dict(deep_stem=True, avg_down=True)])
def test_mmpretrain(options):
    models = peer("mmpretrain.models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = randomize(models.ResNet(50, **options))
    theirs.eval()
    ours = fastres.ResNet(50, **options).eval()
    assert load_checkpoint(ours, theirs.state_dict()).fits
    state = export_state_dict(ours, "mmpretrain")
    assert {re.sub("^backbone.", "", k) for k in state} == set(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-3, atol=1e-3)
