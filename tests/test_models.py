"""ResNet and its variants: the contract's signature, attributes, keys and errors, and what a model goes through."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import shutil

import pytest
import torch
from torch import nn

import fastres
from fastres import functional as FF
from fastres.models import ConvModule, ResNet
from fastres.modules import BasicBlock, Bottleneck, DropPath, FusedBatchNorm2d
from fastres.registry import MODELS
from fastres.variants import ResNet_CIFAR, ResNetV1c, ResNetV1d, ResNeXt, SELayer, SEResNet
from tests.parity import randomize

TINY = dict(stem_channels=8, base_channels=4)
VARIANTS = {
    "resnet18": lambda **o: ResNet(18, **TINY, **o),
    "resnet34": lambda **o: ResNet(34, **TINY, **o),
    "resnet50": lambda **o: ResNet(50, **TINY, **o),
    "resnet101": lambda **o: ResNet(101, **TINY, **o),
    "resnet152": lambda **o: ResNet(152, **TINY, **o),
    "v1c": lambda **o: ResNetV1c(depth=18, **TINY, **o),
    "v1d": lambda **o: ResNetV1d(depth=50, **TINY, **o),
    "cifar": lambda **o: ResNet_CIFAR(18, **TINY, **o),
    "resnext50": lambda **o: ResNeXt(50, groups=2, width_per_group=2, **TINY, **o),
    "resnext101": lambda **o: ResNeXt(101, groups=2, width_per_group=2, **TINY, **o),
    "se50": lambda **o: SEResNet(50, se_ratio=4, **TINY, **o),
    "se101": lambda **o: SEResNet(101, se_ratio=4, **TINY, **o),
}
IMAGES = torch.randn(2, 3, 33, 47)  # odd sizes


def tiny(**options):
    return ResNet(18, **TINY, **options)


# -------------------------------------------------------------------------------------------------------- the contract


def test_signature():
    empty = inspect.Parameter.empty
    parameters = inspect.signature(ResNet).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    init = defaults.pop("init_cfg")
    assert defaults == dict(
        depth=empty, in_channels=3, stem_channels=64, base_channels=64, expansion=None, num_stages=4,
        strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), out_indices=(3,), style="pytorch", deep_stem=False,
        avg_down=False, frozen_stages=-1, conv_cfg=None, norm_cfg=dict(type="FusedBN", requires_grad=True),
        norm_eval=False, with_cp=False, zero_init_residual=True, drop_path_rate=0.0,
    )  # fmt: skip
    assert [(c["type"], c["layer"]) for c in init] == [
        ("Kaiming", ["Conv2d"]),
        ("Constant", ["_BatchNorm", "GroupNorm"]),
    ]


@pytest.mark.parametrize(("depth", "entries"), [(18, 120), (34, 216), (50, 318), (101, 624), (152, 930)])
def test_state_dict_entries(depth, entries):
    """torchvision's counts, less fc.weight and fc.bias."""
    with torch.device("meta"):
        keys = list(ResNet(depth).state_dict())
    assert len(keys) == entries
    assert keys[:6] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
    ]  # fmt: skip
    last = "bn3" if depth >= 50 else "bn2"
    expected = {"layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var"}
    assert expected | {f"layer4.1.{last}.num_batches_tracked"} <= set(keys)
    assert ("layer1.0.downsample.0.weight" in keys) == (depth >= 50)


def test_state_dict_of_the_variants():
    with torch.device("meta"):
        v1d, cifar = ResNetV1d(depth=50).state_dict(), ResNet_CIFAR(18).state_dict()
        se, resnext = SEResNet(50).state_dict(), ResNeXt(50).state_dict()
    assert {
        f"stem.{i}.{k}" for i in range(3) for k in ("conv.weight", "bn.weight", "bn.running_mean")
    } <= set(v1d)
    assert "conv1.weight" not in v1d and v1d["stem.0.conv.weight"].shape == (32, 3, 3, 3)
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.2.bias"} <= set(v1d)
    assert {"layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"} <= set(v1d)  # stride 1: no pooling
    assert cifar["conv1.weight"].shape == (64, 3, 3, 3)
    assert se["layer1.0.se_layer.conv1.conv.weight"].shape == (16, 256, 1, 1)
    assert "layer4.2.se_layer.conv2.conv.bias" in se
    assert resnext["layer1.0.conv2.weight"].shape == (128, 4, 3, 3)
    assert resnext["layer4.0.conv2.weight"].shape == (1024, 32, 3, 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs(name):
    model = VARIANTS[name](out_indices=(0, 2, 3)).eval()
    outs = model(IMAGES)
    assert type(outs) is tuple and len(outs) == 3
    first = 1 if name == "cifar" else 4
    width = 4 * model.expansion
    for out, stage in zip(outs, (0, 2, 3), strict=True):
        s = first * 2**stage
        assert out.shape == (2, width * 2**stage, -(-33 // s), -(-47 // s))
    assert model.feat_dim == outs[-1].shape[1]
    assert model.stem_obstacle() == ""
    assert {b.fused_obstacle() for n in model.res_layers for b in getattr(model, n)} == {""}


@pytest.mark.parametrize(("channels", "hidden"), [(256, 16), (64, 8), (304, 24), (2048, 128)])
def test_squeezed_channels(channels, hidden):
    """A multiple of eight, and not more than a tenth below channels / 16."""
    layer = SELayer(channels)
    assert layer.conv1.conv.out_channels == layer.conv2.conv.in_channels == hidden


def test_attributes():
    model = ResNet(50, **TINY, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=[2])
    assert (model.depth, model.block, model.expansion) == (50, Bottleneck, 4)
    assert model.stage_blocks == (3, 4, 6) and model.res_layers == ["layer1", "layer2", "layer3"]
    assert model.feat_dim == 64 and not hasattr(model, "layer4") and model.norm1 is model.bn1
    assert tiny(expansion=1).feat_dim == 32
    assert ResNet(50, **TINY, expansion=2).feat_dim == 64
    assert tiny(norm_cfg=dict(type="GN", num_groups=2)).norm1_name == "gn1"
    assert tiny(in_channels=1)(torch.randn(2, 1, 32, 32))[0].shape == (2, 32, 1, 1)


def test_geometry_options():
    model = ResNet(50, **TINY, style="caffe", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    assert model.layer2[0].conv1.stride == (2, 2) and model.layer2[0].conv2.stride == (1, 1)
    assert model.layer3[0].conv2.dilation == (2, 2) and model.layer4[2].conv2.padding == (4, 4)
    assert model.eval()(IMAGES)[0].shape[2:] == (5, 6)


def test_drop_path_rises_linearly():
    model = tiny(drop_path_rate=0.7)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for n in model.res_layers for b in getattr(model, n)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    assert not any(isinstance(m, DropPath) for m in tiny().modules())


def test_options_of_mmdet_and_mmseg(tmp_path):
    state = tiny().state_dict()
    model = ResNet(
        depth=50, **TINY, style="caffe", norm_eval=True, frozen_stages=1, out_indices=(0, 1, 2, 3),
        strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True, multi_grid=(1, 2, 4), dcn=None,
        plugins=None, stage_with_dcn=(False, False, False, False),
    )  # fmt: skip
    assert [b.conv2.dilation[0] for b in model.layer3] == [1, 2, 2, 2, 2, 2]
    assert [b.conv2.dilation[0] for b in model.layer4] == [1, 2, 4]
    loaded = tiny(pretrained=state)
    loaded.init_weights()
    assert torch.equal(loaded.layer1[0].bn2.weight, state["layer1.0.bn2.weight"])


def test_layer_depths():
    r50, r152, r18 = ResNet(50, **TINY), ResNet(152, **TINY), tiny()
    depths = {
        "backbone.conv1.weight": 0, "backbone.bn1.bias": 0, "backbone.layer1.2.bn3.weight": 1,
        "backbone.layer2.0.downsample.0.weight": 2, "backbone.layer2.3.conv1.weight": 3,
        "backbone.layer3.2.conv1.weight": 4, "backbone.layer3.5.conv1.weight": 5,
        "backbone.layer4.2.conv3.weight": 6, "head.fc.weight": 7,
    }  # fmt: skip
    for name, depth in depths.items():
        assert r50.get_layer_depth(name, "backbone.") == (depth, 8), name
    assert r50.get_layer_depth("layer4.0.conv1.weight") == (6, 8)
    assert r152.get_layer_depth("layer3.35.conv1.weight") == (2 + 2 + 8, 15)
    assert r18.get_layer_depth("layer3.1.conv1.weight") == (3, 6)


def test_configs():
    model = MODELS.build(dict(type="ResNet", depth=18, **TINY))
    assert type(model) is ResNet and type(model.bn1) is FusedBatchNorm2d
    for name in ("ResNetV1c", "ResNetV1d", "ResNet_CIFAR", "ResNeXt", "SEResNet", "BasicBlock", "Bottleneck"):
        assert MODELS.get(name) is not None, name
    eager = MODELS.build(dict(type="fastres.ResNet", depth=18, norm_cfg=dict(type="BN"), **TINY))
    assert type(eager.bn1) is nn.BatchNorm2d and "BatchNorm2d" in eager.layer1[0].fused_obstacle()
    assert all(hasattr(fastres, name) for name in fastres.__all__)


def test_a_users_block_and_backbone():
    @MODELS.register_module()
    class Mine(BasicBlock):
        expansion = 1

    @MODELS.register_module()
    class Net(ResNet):
        arch_settings = {10: (Mine, (1, 1, 1, 1))}

        def make_res_layer(self, **kwargs):
            return super().make_res_layer(**{**kwargs, "avg_down": True})

    try:
        model = MODELS.build(dict(type="Net", depth=10, **TINY))
        named = MODELS.build(dict(type="ResNet", depth=18, block="Mine", **TINY))
    finally:
        del MODELS.module_dict["Mine"], MODELS.module_dict["Net"]
    assert type(model.layer2[0]) is type(named.layer2[1]) is Mine
    assert type(model.layer2[0].downsample[0]) is nn.AvgPool2d
    assert model(IMAGES)[0].shape == named(IMAGES)[0].shape


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ResNet(20), KeyError, "depth is 20; wanted one of 18, 34, 50, 101, 152"),
        (lambda: ResNeXt(18), KeyError, "depth is 18; wanted one of 50"),
        (lambda: SEResNet(34), KeyError, "depth is 34"),
        (lambda: tiny(num_stages=0), AssertionError, "num_stages is 0; wanted 1 to 4"),
        (lambda: tiny(num_stages=5), AssertionError, "num_stages is 5"),
        (lambda: tiny(num_stages=3), AssertionError, "strides is .* wanted num_stages = 3 values"),
        (lambda: tiny(strides=(1, 2)), AssertionError, "strides"),
        (lambda: tiny(dilations=(1, 1, 1)), AssertionError, "dilations"),
        (lambda: tiny(out_indices=(0, 4)), AssertionError, "out_indices is .* wanted 0 to 3"),
        (lambda: tiny(out_indices=(-1,)), AssertionError, "out_indices"),
        (lambda: tiny(out_indices=()), AssertionError, "out_indices is .* wanted 0 to 3"),
        (lambda: tiny(out_indices=3), TypeError, "out_indices is 3; wanted a tuple or list of int"),
        (lambda: tiny(strides=2), TypeError, "strides is 2; wanted a tuple or list of int"),
        (lambda: tiny(dilations="1112"), TypeError, "dilations is '1112'; wanted a tuple or list of int"),
        (lambda: tiny(frozen_stages=5), AssertionError, "frozen_stages is 5"),
        (lambda: tiny(norm_cfg=None), TypeError, "dict"),
        (lambda: tiny(norm_cfg="BN"), TypeError, "dict"),
        (lambda: tiny(norm_cfg={}), KeyError, "type"),
        (lambda: tiny(norm_cfg=dict(type="FusdBN")), KeyError, "did you mean 'FusedBN'"),
        (lambda: ResNet(50, style="tf"), AssertionError, "style is 'tf'"),
        (lambda: ResNet_CIFAR(18, deep_stem=True), AssertionError, "deep_stem is True"),
        (lambda: ResNetV1c(50), TypeError, "positional"),
        (lambda: ResNetV1d(depth=18, deep_stem=False), TypeError, "multiple values .*deep_stem"),
        (lambda: tiny(dcn=dict(type="DCN")), ValueError, "dcn is .*not supported"),
        (lambda: tiny(plugins=[dict(cfg=1)]), ValueError, "plugins is .*not supported"),
        (lambda: tiny(stage_with_dcn=(False, True, True, True)), ValueError, "stage_with_dcn is"),
        (lambda: tiny(norm_cgf=dict(type="BN")), TypeError, "'norm_cgf' .did you mean 'norm_cfg'"),
        (lambda: ResNetV1d(depth=18, froze_stages=1), TypeError, "ResNetV1d: .*did you mean 'frozen_stages'"),
        (lambda: MODELS.build(dict(type="ResNet", depth=18, stem_chanels=8)), TypeError, "mean 'stem_channels'"),
        (lambda: MODELS.build(dict(type="Resnet", depth=18)), KeyError, "did you mean 'ResNet'"),
        (lambda: tiny(multi_grid=(1, 2, 4)), AssertionError, "multi_grid"),
        (lambda: tiny(pretrained="x", init_cfg=dict(type="Normal")), AssertionError, "pretrained and init_cfg"),
        (lambda: tiny(block="Basicblock"), KeyError, "did you mean 'BasicBlock'"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --------------------------------------------------------------------------------------------------- training and modes


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("frozen", [-1, 0, 1, 4])
@pytest.mark.parametrize("deep_stem", [False, True])
def test_frozen_stages(frozen, deep_stem):
    model = tiny(frozen_stages=frozen, deep_stem=deep_stem)
    assert model.train() is model and model.training
    stem = [model.stem] if deep_stem else [model.bn1]
    layers = [getattr(model, name) for name in model.res_layers]
    assert all(m.training == (frozen < 0) for m in stem)
    assert [m.training for m in layers] == [i > frozen for i in range(1, 5)]
    for name in trainable(model):
        top = name.split(".")[0]
        stage = int(top[5:]) if top.startswith("layer") else 0
        assert stage > frozen, name
    assert len(trainable(model)) > 0 or frozen == 4
    before = copy.deepcopy(model.state_dict())
    (y,) = model(IMAGES)
    if frozen < 4:
        y.sum().backward()
    changed = {n for n, t in model.state_dict().items() if "running" in n and not torch.equal(t, before[n])}
    assert all(int(n[5]) > frozen if n.startswith("layer") else frozen < 0 for n in changed)
    assert bool(changed) == (frozen < 4)


@pytest.mark.parametrize("norm", ["FusedBN", "BN"])
def test_norm_eval(norm):
    model = tiny(norm_eval=True, norm_cfg=dict(type=norm)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.layer1.training and not any(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    before = copy.deepcopy(model.state_dict())
    model(IMAGES)[0].square().sum().backward()
    assert model.bn1.weight.grad is not None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not tiny().train().eval().training


def test_requires_grad_of_norm_cfg():
    model = tiny(norm_cfg=dict(type="FusedBN", requires_grad=False))
    assert not any("bn" in n or "downsample.1" in n for n in trainable(model))
    model(IMAGES)[0].sum().backward()
    assert model.bn1.weight.grad is None and model.conv1.weight.grad is not None


def test_checkpointing_of_a_net():
    one, two = tiny(), tiny(with_cp=True)
    two.load_state_dict(randomize(one).state_dict())
    for model in (one, two):
        model(IMAGES)[0].square().sum().backward()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_the_activation_can_be_chosen():
    model = tiny(act_cfg=dict(type="SiLU"), deep_stem=True)
    assert type(model.stem[0].activate) is type(model.layer1[0].relu) is nn.SiLU
    assert model.stem_obstacle() == "stem.0 activate is SiLU"
    assert model(IMAGES)[0].shape == (2, 32, 2, 2)


# -------------------------------------------------------------------------------------------------------- the stem


def stem_cases():
    return {
        "norm": (lambda m: m.bn1.register_forward_hook(lambda *a: None), "bn1 has hooks"),
        "relu": (lambda m: m.relu.register_forward_hook(lambda *a: None), "relu has hooks"),
        "other norm": (lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8)), "bn1 is GroupNorm"),
        "pool": (lambda m: m.maxpool.register_forward_hook(lambda *a: None), ""),
        "other pool": (lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)), ""),
        "wider pool": (lambda m: setattr(m, "maxpool", nn.MaxPool2d(5, 2, 2)), ""),
    }


@pytest.mark.parametrize("case", stem_cases())
def test_a_changed_stem(case):
    change, reason = stem_cases()[case]
    model = randomize(tiny())
    change(model)
    assert model.stem_obstacle() == reason
    pooled = []
    model.layer1.register_forward_pre_hook(lambda m, args: pooled.append(args[0]))
    expected = model.maxpool(torch.relu(copy.deepcopy(model.bn1)(model.conv1(IMAGES))))
    model(IMAGES)
    torch.testing.assert_close(pooled[0], expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["bn1", "relu", "maxpool", "conv1", "layer1", "layer2.0", "layer2.0.bn1"])
def test_a_hooked_module_is_called_once(name, training):
    model, seen = tiny().train(training), []
    model.get_submodule(name).register_forward_pre_hook(lambda *a: seen.append(a))
    with torch.set_grad_enabled(training):
        model(IMAGES)
    assert len(seen) == 1


def test_hooks_in_a_deep_stem():
    model, seen = tiny(deep_stem=True), []
    expected = copy.deepcopy(model)(IMAGES)[0]
    for module in (model.stem, model.stem[1], model.stem[2].bn, model.stem[0].activate):
        handle = module.register_forward_hook(lambda *a: seen.append(a[0]))
        torch.testing.assert_close(copy.deepcopy(model)(IMAGES)[0], expected)
        assert len(seen) == 1
        handle.remove()
        seen.clear()


def test_conv_module_without_norm_or_activation():
    x = torch.randn(2, 3, 4, 4)
    m = ConvModule(3, 4, 1)
    assert (
        m.conv.bias is not None
        and torch.equal(m(x), torch.relu(m.conv(x)))
        and m.fused_obstacle() == "no norm"
    )
    m = ConvModule(3, 4, 1, norm_cfg=dict(type="FusedBN"), act_cfg=None)
    torch.testing.assert_close(m(x), copy.deepcopy(m.bn)(m.conv(x)))


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "three dimensions": (torch.randn(3, 32, 32), ValueError, "4 dimensions"),
    "channels": (torch.randn(2, 4, 32, 32), ValueError, "wanted 3 channels"),
    "integers": (torch.ones(2, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
    "dtype": (torch.randn(2, 3, 32, 32, dtype=torch.float64), TypeError, "wanted float32"),
    "device": (torch.empty(2, 3, 32, 32, device="meta"), ValueError, "wanted device cpu"),
    "list": ([1, 2], TypeError, "list"),
    "one value": (torch.randn(1, 3, 32, 32), ValueError, "1 value per channel in layer4.0.bn1"),
    "one pixel": (torch.randn(1, 3, 1, 1), ValueError, "1 value per channel in layer1.0.bn1"),
}


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize("norm", ["FusedBN", "BN"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, norm, deep_stem):
    x, error, words = BAD[case]
    model = tiny(norm_cfg=dict(type=norm), deep_stem=deep_stem)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words) as caught:
        model(x)
    assert str(caught.value).startswith("ResNet: input is") and "wanted" in str(caught.value)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_one_image_is_fine_where_something_is_left_to_average():
    assert tiny()(torch.randn(1, 3, 33, 32))[0].shape == (1, 32, 2, 1)
    assert ResNet_CIFAR(18, **TINY)(torch.randn(1, 3, 9, 8))[0].shape == (1, 32, 2, 1)
    assert tiny().eval()(torch.randn(1, 3, 32, 32))[0].shape == (1, 32, 1, 1)
    assert tiny(frozen_stages=4)(torch.randn(1, 3, 32, 32))[0].shape == (1, 32, 1, 1)


def test_another_first_convolution():
    model = tiny()
    model.conv1 = nn.Conv2d(5, 8, 7, 2, 3, bias=False)
    assert model(torch.randn(2, 5, 32, 32))[0].shape == (2, 32, 1, 1)


# ------------------------------------------------------------------------------------------- what a model goes through


def test_copies():
    model = randomize(tiny(out_indices=(1, 3))).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(IMAGES)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other(IMAGES), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["aten", "reference"])
def test_autocast(route, dtype):
    model, eager = randomize(tiny(drop_path_rate=0.1)), tiny(norm_cfg=dict(type="BN"), drop_path_rate=0.1)
    eager.load_state_dict(model.state_dict())
    outs = []
    for m in (model, eager):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype), FF.backend(route):
            (y,) = m(IMAGES)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        outs.append(y.detach().float())
        assert all(p.grad.dtype == p.dtype for p in m.parameters())
        assert m.bn1.running_mean.dtype == torch.float32
    torch.testing.assert_close(*outs, rtol=0.1, atol=0.1 * float(outs[1].abs().max()))


def test_channels_last_stays():
    model = tiny(out_indices=(0, 3)).to(memory_format=torch.channels_last)
    for route in ("aten", "reference"):
        with FF.backend(route):
            outs = model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outs)


def step(model, x):
    (y,) = model(x)
    y.square().mean().backward()
    return y.detach()


@pytest.mark.parametrize(
    ("route", "options"),
    [
        ("aten", dict(deep_stem=True, avg_down=True)),
        ("reference", dict()),
        ("reference", dict(with_cp=True)),
        ("aten", dict(norm_cfg=dict(type="BN"))),
    ],
)
def test_compile(route, options):
    model = randomize(
        ResNet(18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,), **TINY, **options)
    )
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    with FF.backend(route):
        y = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
        expected = step(twin, x)
    torch.testing.assert_close(y, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
@pytest.mark.slow
def test_compile_with_inductor():
    model = randomize(BasicBlock(4, 4))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4, 8, 8)
    y, expected = (m(x) for m in (torch.compile(model, fullgraph=True), twin))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for out in (y, expected):
        out.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_export():
    model = randomize(tiny(out_indices=(1, 3))).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(3, 3, 33, 33),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 33, 33)
    for a, b in zip(exported.module()(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


def test_the_routes_of_a_net():
    model = tiny()
    with FF.backend("reference"), FF.record_routes() as log:
        model(IMAGES)
    assert [c.op for c in log].count("add_relu") == 8 and [c.op for c in log].count("max_pool") == 1
    keys = {id(m.weight) for m in model.modules() if isinstance(m, FusedBatchNorm2d)}
    assert all(c.key in keys and c.route == "reference" for c in log)


def test_repr_names_the_norm():
    assert "FusedBatchNorm2d(8, eps=1e-05" in repr(tiny())
