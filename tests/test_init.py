"""init_cfg: the initialisers, layers and overrides, checkpoints, and init_weights of a model."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import nn

from fastres.initialize import INITIALIZERS, BaseModule, initialize, load_pretrained
from fastres.models import ResNet
from fastres.modules import BasicBlock
from fastres.variants import ResNetV1d, SEResNet
from tests.parity import randomize

TINY = dict(stem_channels=8, base_channels=4)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(2, 32))
    )


def stats(t):
    t = t.detach()
    return float(t.mean()), float(t.std())


# ------------------------------------------------------------------------------------------------------- initialisers


@pytest.mark.parametrize(
    ("cfg", "mean", "std"),
    [
        (dict(type="Kaiming"), 0, math.sqrt(2 / (64 * 9))),
        (dict(type="Kaiming", mode="fan_in", nonlinearity="linear"), 0, math.sqrt(1 / (16 * 9))),
        (
            dict(type="Kaiming", distribution="uniform", a=1, nonlinearity="leaky_relu"),
            0,
            math.sqrt(1 / (64 * 9)),
        ),
        (dict(type="Xavier", gain=2), 0, 2 * math.sqrt(2 / (80 * 9))),
        (dict(type="Xavier", distribution="uniform"), 0, math.sqrt(2 / (80 * 9))),
        (dict(type="Normal", mean=3, std=0.5), 3, 0.5),
        (dict(type="TruncNormal", std=0.1, a=-10, b=10), 0, 0.1),
        (dict(type="Uniform", a=-1, b=3), 1, 4 / math.sqrt(12)),
    ],
)
def test_distributions(cfg, mean, std):
    model = net()
    initialize(model, dict(cfg, layer="Conv2d", bias=0.25))
    got_mean, got_std = stats(model[0].weight)
    assert got_std == pytest.approx(std, rel=0.05) and abs(got_mean - mean) < 0.05 * std
    assert (model[0].bias == 0.25).all()


def test_uniform_is_bounded_and_truncated_is_truncated():
    model = net()
    initialize(model, dict(type="TruncNormal", std=1.0, a=-0.5, b=0.25))
    assert float(model[0].weight.min()) >= -0.5 and float(model[0].weight.max()) <= 0.25


def test_constant_and_bias_probability():
    model = net()
    initialize(model, dict(type="Constant", val=2.0, layer=["BatchNorm2d", "Linear"], bias_prob=0.01))
    assert (model[1].weight == 2).all() and (model[2][0].weight == 2).all()
    assert model[1].bias.unique().tolist() == pytest.approx([-math.log(99)])
    assert not (model[0].weight == 2).any()


def test_layers_match_base_classes():
    """'_BatchNorm' finds every batch norm, ours too."""
    model = nn.Sequential(BasicBlock(4, 4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    initialize(model, dict(type="Constant", val=3, layer="_BatchNorm"))
    assert all((m.weight == 3).all() for m in (model[0].bn1, model[0].bn2, model[1]))
    assert (model[2].weight == 1).all()


def test_no_layer_means_every_module_with_a_weight():
    model = net()
    initialize(model, dict(type="Constant", val=4))
    assert all((m.weight == 4).all() for m in model.modules() if hasattr(m, "weight"))


def test_a_list_is_applied_in_order_and_norms_without_weight_are_passed_over():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    initialize(model, [dict(type="Constant", val=1), dict(type="Constant", val=2, layer="BatchNorm2d")])
    assert (model[1].weight == 2).all()


def test_override():
    block = BasicBlock(4, 4)
    initialize(
        block,
        dict(type="Constant", val=1, layer="Conv2d", override=[dict(type="Constant", name="conv2", val=5)]),
    )
    assert (block.conv1.weight == 1).all() and (block.conv2.weight == 5).all()
    initialize(block, dict(type="Constant", val=7, override=dict(name="conv1")))
    assert (block.conv1.weight == 7).all() and (block.conv2.weight == 5).all()
    nested = nn.Sequential(block)
    initialize(nested, dict(type="Constant", val=8, override=dict(name="0.conv2")))
    assert (block.conv2.weight == 8).all()


def test_a_users_initialiser():
    @INITIALIZERS.register_module("Answer")
    def answer(module, value=42):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, value)

    try:
        model = net()
        initialize(model, dict(type="Answer"))
        assert (model[2][0].weight == 42).all()
        initialize(model, dict(type=answer, value=43))
        assert (model[2][0].weight == 43).all()
    finally:
        del INITIALIZERS.module_dict["Answer"]


@pytest.mark.parametrize(
    ("cfg", "error", "words"),
    [
        ("Kaiming", TypeError, "wanted a dict"),
        (["Kaiming"], TypeError, "wanted a dict"),
        (dict(layer="Conv2d"), KeyError, "no key 'type'"),
        (dict(type="Kaimin"), KeyError, "did you mean 'Kaiming'"),
        (dict(type="Constant", layer="Conv2d"), TypeError, "'val'"),
        (dict(type="Constant", val=1, biass=2), TypeError, "unknown key 'biass' .did you mean 'bias'"),
        (dict(type="Constant", val=1, layer=[nn.Conv2d]), TypeError, "layer"),
        (dict(type="Kaiming", distribution="gauss"), ValueError, "'gauss'"),
        (dict(type="Constant", val=1, override=dict(type="Constant", val=2)), ValueError, "no key 'name'"),
        (dict(type="Constant", val=1, override=dict(name="0", val=2)), ValueError, "no key 'type'"),
        (dict(type="Constant", val=1, override=dict(name="head")), RuntimeError, "'head', which Sequential"),
    ],
)
def test_a_bad_config_changes_nothing(cfg, error, words):
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cfgs = [dict(type="Constant", val=9), cfg] if isinstance(cfg, dict) else cfg
    with pytest.raises(error, match=words) as caught:
        initialize(model, cfgs)
    assert "init_cfg" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------- checkpoints


def resnet(**options):
    return ResNet(18, **TINY, **options)


@pytest.fixture
def state():
    return randomize(resnet()).state_dict()


def loaded(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "ddp"])
@pytest.mark.parametrize("where", ["file", "path", "dict"])
def test_pretrained(tmp_path, state, wrap, where):
    if wrap == "ddp":
        content = {f"module.{k}": v for k, v in state.items()}
    else:
        content = state if wrap == "bare" else {wrap: state, "epoch": 3}
    checkpoint = content
    if where != "dict":
        checkpoint = tmp_path / "weights.pth"
        torch.save(content, checkpoint)
        checkpoint = str(checkpoint) if where == "file" else checkpoint
    model = resnet(init_cfg=dict(type="Pretrained", checkpoint=checkpoint))
    model.init_weights()
    assert loaded(model, state)


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_prefix(state, prefix):
    whole = {f"backbone.{k}": v for k, v in state.items()} | {"head.fc.weight": torch.zeros(2, 2)}
    model = resnet(init_cfg=dict(type="Pretrained", checkpoint=whole, prefix=prefix))
    model.init_weights()
    assert loaded(model, state)


def test_extra_keys_are_left_and_missing_ones_are_named(state):
    partial = {k: v for k, v in state.items() if k != "bn1.weight" and "num_batches" not in k}
    model = resnet()
    with pytest.warns(UserWarning, match="lacks 'bn1.weight'$"):
        load_pretrained(model, {**partial, "fc.weight": torch.zeros(2)})
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("checkpoint", "options", "error", "words"),
    [
        ("nowhere/weights.pth", {}, FileNotFoundError, "nowhere/weights.pth"),
        ("open-mmlab://resnet50", {}, ValueError, "wanted a path, http"),
        ([1, 2], {}, TypeError, "wanted a state dict"),
        ({1: 2}, {}, TypeError, "wanted a state dict"),
        ({"a.b": torch.zeros(1)}, {}, ValueError, "no key of the checkpoint fits ResNet"),
        (
            {"model.x": torch.zeros(1)},
            {"prefix": "backbone"},
            ValueError,
            "below prefix 'backbone'; it has 'model'",
        ),
        (
            {"bn1.weight": torch.zeros(3), "bn1.bias": torch.ones(8)},
            {},
            ValueError,
            "bn1.weight is .3., wanted .8.",
        ),
    ],
)
def test_a_bad_checkpoint_changes_nothing(checkpoint, options, error, words):
    model = resnet(init_cfg=None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=words):
        load_pretrained(model, checkpoint, **options)
    assert loaded(model, before)


def test_torchvision_and_urls(monkeypatch, state):
    class Weights:
        @staticmethod
        def get_state_dict(map_location, check_hash):
            assert check_hash
            return state

    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.get_model_weights = lambda name: {"IMAGENET1K_V1": Weights} if name == "resnet18" else {}
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    model = resnet(pretrained="torchvision://resnet18")
    model.init_weights()
    assert loaded(model, state)
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **o: state if o["weights_only"] else {}
    )
    model = resnet(pretrained="https://example.org/weights.pth")
    model.init_weights()
    assert loaded(model, state)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="needs torchvision"):
        load_pretrained(resnet(), "torchvision://resnet18")


# ------------------------------------------------------------------------------------------------------- init_weights


def test_the_default_of_a_resnet():
    torch.manual_seed(0)
    model = ResNet(18)
    model.init_weights()
    assert model.is_init
    for name in ("conv1", "layer3.1.conv2", "layer4.0.downsample.0"):
        w = model.get_submodule(name).weight
        assert float(w.std()) == pytest.approx(math.sqrt(2 / (w.shape[0] * w[0, 0].numel())), rel=0.05)
    for block in (*model.layer1, *model.layer4):
        assert (block.bn1.weight == 1).all() and (block.bn2.weight == 0).all() and (block.bn2.bias == 0).all()
    assert (model.layer2[0].downsample[1].weight == 1).all()


@pytest.mark.parametrize("make", [lambda **o: ResNet(50, **TINY, **o), lambda **o: ResNetV1d(depth=50, **TINY, **o),
                                  lambda **o: SEResNet(50, **TINY, **o)])  # fmt: skip
def test_zero_init_residual(make):
    model, kept = make(), make(zero_init_residual=False)
    model.init_weights(), kept.init_weights()
    assert (model.layer2[1].bn3.weight == 0).all() and (model.layer2[1].bn2.weight == 1).all()
    assert (kept.layer2[1].bn3.weight == 1).all()
    x = torch.randn(2, 16, 8, 8).abs()
    assert torch.equal(model.layer1[1](x), x)


def test_zero_init_residual_spares_a_checkpoint(state):
    """Also where the checkpoint is one config of a list; and a checkpoint has the last word."""
    for cfg in (dict(type="Pretrained", checkpoint=state),
                [dict(type="Pretrained", checkpoint=state), dict(type="Constant", val=0, layer="Conv2d")]):  # fmt: skip
        model = resnet(init_cfg=cfg)
        model.init_weights()
        assert loaded(model, state)


def test_zero_init_residual_of_other_norms():
    model = resnet(norm_cfg=dict(type="GN", num_groups=2))
    model.init_weights()
    assert (model.layer1[0].gn2.weight == 0).all() and (model.layer1[0].gn1.weight == 1).all()
    model = resnet(norm_cfg=dict(type="FusedBN", affine=False))
    model.init_weights()
    assert model.layer1[0].bn2.weight is None


def test_init_weights_runs_once():
    model = resnet()
    model.init_weights()
    nn.init.constant_(model.conv1.weight, 5)
    with pytest.warns(UserWarning, match="more than once"):
        model.init_weights()
    assert (model.conv1.weight == 5).all()


def test_inner_configs_come_after_outer_ones():
    class Inner(BaseModule):
        def __init__(self):
            super().__init__(dict(type="Constant", val=2, layer="Linear"))
            self.fc = nn.Linear(2, 2)

    class Outer(BaseModule):
        def __init__(self):
            super().__init__(dict(type="Constant", val=1, layer="Linear"))
            self.fc, self.inner = nn.Linear(2, 2), nn.Sequential(Inner())

    model = Outer()
    model.init_weights()
    assert (model.fc.weight == 1).all() and (model.inner[0].fc.weight == 2).all() and model.inner[0].is_init


def test_no_config_leaves_torchs_initialisation():
    torch.manual_seed(1)
    a = resnet(init_cfg=None, zero_init_residual=False)
    before = a.conv1.weight.clone()
    a.init_weights()
    assert torch.equal(a.conv1.weight, before)
