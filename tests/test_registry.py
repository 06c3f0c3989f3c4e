"""The registries and builders keep the contract of mmcv 1.x and mmcls 0.x, errors included, and mmengine finds them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres import registry
from fastres._calling import named_parameters
from fastres.registry import (
    ACTIVATION_LAYERS,
    BACKBONES,
    CLASSIFIERS,
    CONV_LAYERS,
    HEADS,
    LOSSES,
    MODELS,
    NECKS,
    NORM_LAYERS,
    Registry,
    build_activation_layer,
    build_backbone,
    build_conv_layer,
    build_from_cfg,
    build_model,
    build_norm_layer,
    infer_abbr,
)
from tests.peers import peer

ROOT = Path(__file__).resolve().parent.parent
ELEVEN = {
    "BN": nn.BatchNorm2d,
    "BN1d": nn.BatchNorm1d,
    "BN2d": nn.BatchNorm2d,
    "BN3d": nn.BatchNorm3d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "LN": nn.LayerNorm,
    "IN": nn.InstanceNorm2d,
    "IN1d": nn.InstanceNorm1d,
    "IN2d": nn.InstanceNorm2d,
    "IN3d": nn.InstanceNorm3d,
}


@pytest.fixture
def restored():
    """The shared tables as they were, after a test that registers in them."""
    tables = [NORM_LAYERS, CONV_LAYERS, ACTIVATION_LAYERS, MODELS]
    before = [dict(table.module_dict) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.module_dict.clear()
        table.module_dict.update(entries)


class Scale(nn.Module):
    """A norm layer of a user: one weight per channel, and neither eps nor momentum."""

    def __init__(self, num_features: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_features,), start))


# ---------------------------------------------------------------------------------------------------------- Registry


def test_register_as_call_and_as_decorator():
    table = Registry("thing")
    assert table.register_module("A", module=Scale) is Scale
    assert table.register_module(module=Scale) is Scale

    @table.register_module()
    class B:
        pass

    @table.register_module(name=["C", "D"])
    def c():
        return 3

    assert set(table.module_dict) == {"A", "Scale", "B", "C", "D"} and len(table) == 5
    assert table.get("A") is Scale and table.get("B") is B and table.get("C") is table.get("D") is c
    assert "A" in table and "missing" not in table and 3 not in table
    assert table.get("missing") is None and table.name == "thing"
    assert table.build(dict(type="D")) == 3


def test_names_with_our_scope_are_the_same_names():
    assert NORM_LAYERS.get("fastres.BN") is nn.BatchNorm2d and "fastres.BN" in NORM_LAYERS
    assert "mmcv.BN" not in NORM_LAYERS and "fastres.fastres.BN" not in NORM_LAYERS
    assert type(build_norm_layer(dict(type="fastres.GN", num_groups=2), 4)[1]) is nn.GroupNorm


def test_a_taken_name_needs_force():
    table = Registry("thing")
    table.register_module("A", module=nn.ReLU)
    with pytest.raises(KeyError, match=r"'A' is already registered as torch.*\.ReLU; pass force=True"):
        table.register_module("A", module=nn.Tanh)
    with pytest.raises(KeyError, match="already registered"):
        table.register_module(["New", "A"], module=nn.Tanh)
    assert table.module_dict == {"A": nn.ReLU}  # not even the free name of the two
    with pytest.raises(KeyError, match="already registered"):
        table.register_module("A")(nn.Tanh)
    table.register_module("A", force=True, module=nn.Tanh)
    assert table.get("A") is nn.Tanh


@pytest.mark.parametrize("force", [1, 0, None, "yes"])
def test_force_must_be_a_bool(force):
    with pytest.raises(TypeError, match="force must be a bool, got"):
        Registry("thing").register_module("A", force=force, module=nn.ReLU)


@pytest.mark.parametrize("name", [3, ["A", 3], {"A": 1}, nn.ReLU])
def test_name_must_be_a_str_or_a_list_of_str(name):
    with pytest.raises(TypeError, match="name must be a str or a list of str"):
        Registry("thing").register_module(name, module=nn.ReLU)


def test_decorator_without_parentheses_is_told_so():
    with pytest.raises(TypeError, match="with parentheses"):

        @Registry("thing").register_module
        class A:
            pass


@pytest.mark.parametrize("name", ["", [], ["A", ""]])
def test_name_must_not_be_empty(name):
    with pytest.raises(ValueError, match="must not be empty"):
        Registry("thing").register_module(name, module=nn.ReLU)


def test_module_must_be_callable_and_have_a_name():
    table = Registry("thing")
    for wrong in (3, "ReLU", {"a": 1}):
        with pytest.raises(TypeError, match="module must be a class or a function, got"):
            table.register_module("A", module=wrong)
        with pytest.raises(TypeError, match="module must be a class or a function, got"):
            table.register_module("A")(wrong)
    relu6 = functools.partial(nn.Hardtanh, 0.0, 6.0)
    with pytest.raises(TypeError, match="has no __name__; pass name="):
        table.register_module(module=relu6)
    assert len(table) == 0
    table.register_module("relu6", module=relu6)
    assert table.build(dict(type="relu6")).max_val == 6.0


def test_get_wants_a_str():
    with pytest.raises(TypeError, match="key must be a str, got int"):
        NORM_LAYERS.get(3)


def test_repr_is_a_table():
    table = Registry("thing")
    assert repr(table).splitlines() == ["Registry 'thing' (0 entries)", "name  object", "----  ------"]
    table.register_module("Long name", module=nn.ReLU)
    table.register_module("A", module=functools.partial(max, 1))
    lines = repr(table).splitlines()
    assert lines[0] == "Registry 'thing' (2 entries)"
    assert lines[3].startswith("A          functools.partial(")
    assert lines[4] == "Long name  torch.nn.modules.activation.ReLU"
    assert all(f"\n{name} " in repr(NORM_LAYERS) for name in ELEVEN)


def test_a_missing_name_imports_the_locations(monkeypatch):
    table = Registry("thing", locations=("fastres_test_location",))
    with pytest.raises(ModuleNotFoundError, match="fastres_test_location"):
        table.get("Late")
    loads = []

    class Finder:
        """Provides the module, and registers when it is executed."""

        def find_spec(self, name, path=None, target=None):
            return importlib.util.spec_from_loader(name, self) if name == "fastres_test_location" else None

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            loads.append(module.__name__)
            assert table.get("Late") is None  # a look-up while it loads does not load it again
            table.register_module("Late", module=nn.ReLU)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "fastres_test_location", raising=False)
    table.register_module("Early", module=nn.Tanh)
    assert table.get("Early") is nn.Tanh and loads == []
    assert table.get("Late") is nn.ReLU and table.get("Never") is None and loads == ["fastres_test_location"]
    del sys.modules["fastres_test_location"]


# -------------------------------------------------------------------------------------------------------- build, MODELS


def test_build_from_cfg():
    cfg, defaults = dict(type="BN", eps=0.5), dict(type="GN", eps=0.1, num_features=3)
    layer = NORM_LAYERS.build(cfg, default_args=defaults)
    assert type(layer) is nn.BatchNorm2d and layer.eps == 0.5 and layer.num_features == 3
    assert cfg == dict(type="BN", eps=0.5) and defaults == dict(type="GN", eps=0.1, num_features=3)
    assert type(build_from_cfg(dict(num_features=3), NORM_LAYERS, dict(type="BN1d"))) is nn.BatchNorm1d
    assert type(build_from_cfg(dict(type=nn.Linear, in_features=1, out_features=2), MODELS)) is nn.Linear


@pytest.mark.parametrize(
    ("cfg", "kwargs", "error", "message"),
    [
        ("BN", {}, TypeError, "cfg must be a dict with the key 'type', got str 'BN'"),
        (None, {}, TypeError, "cfg must be a dict with the key 'type', got NoneType"),
        ([("type", "BN")], {}, TypeError, "cfg must be a dict"),
        (dict(eps=1e-3), {}, KeyError, "cfg has no key 'type', got the keys 'eps'"),
        ({}, {}, KeyError, "cfg has no key 'type', got the keys none"),
        (dict(type=3), {}, TypeError, r"cfg\['type'\] must be a str, a class or a function, got int"),
        (dict(type=None), {}, TypeError, r"cfg\['type'\] must be .* got NoneType"),
        (dict(type="BN"), dict(default_args=[1]), TypeError, "default_args must be a dict or None, got list"),
        (
            dict(type="BN"),
            {},
            TypeError,
            "BN: missing a required argument: 'num_features'; wanted: 'num_features', 'eps'",
        ),
    ],
)
def test_build_errors(cfg, kwargs, error, message):
    with pytest.raises(error, match=message):
        NORM_LAYERS.build(cfg, **kwargs)


def test_build_from_cfg_wants_our_registry():
    with pytest.raises(TypeError, match="registry must be a fastres Registry, got dict"):
        build_from_cfg(dict(type="BN"), {"BN": nn.BatchNorm2d})


def test_models_have_the_names_of_mmcls(restored):
    assert MODELS is BACKBONES is NECKS is HEADS is LOSSES is CLASSIFIERS

    @BACKBONES.register_module()
    class TinyNet(nn.Module):
        def __init__(self, width, norm_cfg=None):
            super().__init__()
            self.width, self.norm_cfg = width, norm_cfg

    cfg = dict(type="TinyNet", width=3, norm_cfg=dict(type="BN"))
    for build in (MODELS.build, build_model, build_backbone, registry.build_neck, registry.build_head):
        net = build(cfg)
        assert type(net) is TinyNet and net.width == 3 and net.norm_cfg == dict(type="BN")
    assert cfg == dict(type="TinyNet", width=3, norm_cfg=dict(type="BN"))
    two = MODELS.build([cfg, dict(type="fastres.TinyNet", width=4)])
    assert type(two) is nn.Sequential and [net.width for net in two] == [3, 4]
    with pytest.raises(TypeError, match=r"TinyNet: unknown config key 'widht' \(did you mean 'width'\?\)"):
        registry.build_classifier(dict(type="TinyNet", widht=3))


def test_a_build_func_of_ones_own():
    table = Registry("thing", build_func=lambda cfg, extra=0, *, registry: (cfg, extra, registry))
    assert table.build("cfg", 5) == ("cfg", 5, table)


# ------------------------------------------------------------------------------------------ what a class does not take


def test_unknown_keys_are_named_before_anything_is_built(restored):
    built = []

    @NORM_LAYERS.register_module()
    class Counting(nn.BatchNorm2d):
        def __init__(self, num_features, eps=1e-5, momentum=0.1):
            built.append(num_features)
            super().__init__(num_features, eps, momentum)

    cfg = dict(type="Counting", momentun=0.2, colour="red")
    with pytest.raises(TypeError) as caught:
        build_norm_layer(cfg, 4)
    assert str(caught.value) == (
        "build_norm_layer: Counting: unknown config key 'momentun' (did you mean 'momentum'?), 'colour'; "
        "wanted: 'eps', 'momentum'"
    )
    assert built == [] and cfg == dict(type="Counting", momentun=0.2, colour="red")
    with pytest.raises(TypeError, match="unknown config key 3; wanted: 'eps', 'momentum'"):
        build_norm_layer({"type": "Counting", 3: 4}, 4)
    with pytest.raises(TypeError, match="Counting: multiple values for argument 'num_features'"):
        build_norm_layer(dict(type="Counting", num_features=4), 4)
    assert built == []
    assert build_norm_layer(dict(type="Counting", momentum=0.2), 4)[1].momentum == 0.2 and built == [4]


def test_classes_that_hand_on_kwargs():
    """The parameters of the base classes count, and a refusal inside becomes the same message."""

    class Wide(nn.BatchNorm2d):
        def __init__(self, num_features, factor=1, **kwargs):
            super().__init__(num_features * factor, **kwargs)

    assert list(named_parameters(Wide)[0])[:4] == ["num_features", "factor", "eps", "momentum"]
    name, layer = build_norm_layer(dict(type=Wide, factor=2, momentum=0.3), 4)
    assert name == "bn" and layer.num_features == 8 and layer.momentum == 0.3 and layer.eps == 1e-5
    with pytest.raises(TypeError, match=r"Wide: unknown config key 'momentun' \(did you mean 'momentum'\?\)"):
        build_norm_layer(dict(type=Wide, momentun=0.3), 4)


def test_a_class_may_use_kwargs_up_itself():
    class Painted(nn.BatchNorm2d):
        def __init__(self, num_features, **kwargs):
            self.__dict__["colour"] = kwargs.pop("colour", None)
            super().__init__(num_features, **kwargs)

    layer = build_norm_layer(dict(type=Painted, colour="red", eps=0.5), 4)[1]
    assert layer.colour == "red" and layer.eps == 0.5


def test_other_type_errors_of_a_class_pass_unchanged():
    class Picky(nn.Module):
        def __init__(self, num_features, **kwargs):
            raise TypeError("colour must be a str")

    with pytest.raises(TypeError, match=r"^colour must be a str$"):
        build_norm_layer(dict(type=Picky, colour=3), 4)


# ---------------------------------------------------------------------------------------------------------- norm layers


def test_the_eleven_names():
    assert {name: NORM_LAYERS.get(name) for name in ELEVEN} == ELEVEN


@pytest.mark.parametrize("name", sorted(ELEVEN))
def test_build_norm_layer(name):
    cfg = dict(type=name, requires_grad=False)
    cfg.update(dict(num_groups=2) if name == "GN" else dict() if name == "LN" else dict(affine=True))
    before = dict(cfg)
    abbr = {"B": "bn", "S": "bn", "G": "gn", "L": "ln", "I": "in"}[name[0]]
    for postfix in ("", 1, "_a"):
        got, layer = build_norm_layer(cfg, 4, postfix=postfix)
        assert got == f"{abbr}{postfix}" and type(layer) is ELEVEN[name] and layer.eps == 1e-5
        assert [p.requires_grad for p in layer.parameters()] == [False, False]
        assert cfg == before
    cfg.update(eps=0.25)
    del cfg["requires_grad"]
    layer = build_norm_layer(cfg, 4)[1]
    assert layer.eps == 0.25 and [p.requires_grad for p in layer.parameters()] == [True, True]
    assert layer.weight.shape == (4,)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (None, TypeError, "build_norm_layer: cfg must be a dict with the key 'type', got NoneType"),
        ("BN", TypeError, "build_norm_layer: cfg must be a dict with the key 'type', got str 'BN'"),
        ({}, KeyError, "build_norm_layer: cfg has no key 'type'"),
        (dict(type="bn"), KeyError, r"norm layer type 'bn' is not registered \(did you mean 'BN'"),
        (
            dict(type="fastres.SynchBN"),
            KeyError,
            r"'fastres.SynchBN' is not registered \(did you mean 'SyncBN'",
        ),
        (dict(type="xyz"), KeyError, "'xyz' is not registered; registered: 'BN', 'BN1d'"),
        (dict(type=3), TypeError, r"cfg\['type'\] must be a str, a class or a function, got int"),
        (dict(type=max), TypeError, "class_type must be a class, got builtin_function_or_method"),
        (dict(type="BN", requires_grad=1), TypeError, "BN: requires_grad must be a bool, got 1"),
        (dict(type="GN"), AssertionError, "GN: cfg needs the key 'num_groups', got 'type'"),
        (dict(type="GN", num_groups=2, num_channels=4), TypeError, "GN: 'num_channels' given twice"),
        (dict(type="LN", momentum=0.1), TypeError, "LN: unknown config key 'momentum'; wanted: 'eps'"),
    ],
)
def test_build_norm_layer_errors(cfg, error, message):
    with pytest.raises(error, match=message):
        build_norm_layer(cfg, 4)


@pytest.mark.parametrize("postfix", [None, 1.0, [1]])
def test_postfix_must_be_an_int_or_a_str(postfix):
    with pytest.raises(AssertionError, match="postfix must be an int or a str"):
        build_norm_layer(dict(type="BN"), 4, postfix=postfix)


def test_a_class_as_type_and_a_norm_of_ones_own(restored):
    assert type(build_norm_layer(dict(type=nn.BatchNorm3d), 4)[1]) is nn.BatchNorm3d
    assert build_norm_layer(dict(type=nn.GroupNorm, num_groups=2), 4)[1].num_groups == 2
    assert build_norm_layer(dict(type=nn.Identity), 4)[0] == "norm_layer"
    NORM_LAYERS.register_module(module=Scale)
    name, layer = build_norm_layer(dict(type="Scale", start=2.0), 3)  # takes no eps, so it is given none
    assert name == "norm_layer" and layer.weight.tolist() == [2.0, 2.0, 2.0]

    @NORM_LAYERS.register_module("TwoGroups")
    class TwoGroups(nn.GroupNorm):
        def __init__(self, num_features, num_groups=2, eps=1e-5):
            super().__init__(num_groups, num_features, eps)

    name, layer = build_norm_layer(dict(type="TwoGroups"), 4)  # positional, unlike GN itself
    assert name == "gn" and (layer.num_groups, layer.num_channels) == (2, 4)


def test_sync_bn_is_told_its_gpu_number(restored):
    class OldSync(nn.SyncBatchNorm):
        told = None

        def _specify_ddp_gpu_num(self, number):
            self.told = number

    NORM_LAYERS.register_module("OldSync", module=OldSync)
    assert build_norm_layer(dict(type="OldSync"), 4)[1].told is None
    NORM_LAYERS.register_module("SyncBN", module=OldSync, force=True)
    assert build_norm_layer(dict(type="SyncBN"), 4)[1].told == 1


def test_infer_abbr():
    class Named(nn.BatchNorm2d):
        _abbr_ = "named"

    cases = {
        Named: "named",
        nn.InstanceNorm1d: "in",
        nn.SyncBatchNorm: "bn",
        nn.GroupNorm: "gn",
        nn.LayerNorm: "ln",
    }
    for word, abbr in {
        "MyBatchThing": "bn",
        "GroupWise": "gn",
        "PerLayer": "ln",
        "FastINSTANCE": "in",
        "Rms": "norm_layer",
    }.items():
        cases[type(word, (nn.Module,), {})] = abbr
    assert {cls: infer_abbr(cls) for cls in cases} == cases
    for wrong in (3, "BN", nn.ReLU(), max):
        with pytest.raises(TypeError, match="class_type must be a class, got"):
            infer_abbr(wrong)


# -------------------------------------------------------------------------------------------------- convs, activations


def test_build_conv_layer():
    for name in ("Conv1d", "Conv2d", "Conv3d"):
        assert type(build_conv_layer(dict(type=name), 2, 4, 3)) is getattr(nn, name)
    assert type(build_conv_layer(dict(type="Conv"), 2, 4, 3)) is nn.Conv2d
    cfg = dict(type=nn.Conv2d, padding_mode="reflect")
    conv = build_conv_layer(cfg, 2, 4, kernel_size=3, padding=1, bias=False)
    assert conv.padding_mode == "reflect" and conv.bias is None and conv.padding == (1, 1)
    assert cfg == dict(type=nn.Conv2d, padding_mode="reflect")
    conv = build_conv_layer(None, 2, 4, 1, stride=2)
    assert type(conv) is nn.Conv2d and conv.stride == (2, 2)


@pytest.mark.parametrize(
    ("cfg", "kwargs", "error", "message"),
    [
        ("Conv2d", {}, TypeError, "build_conv_layer: cfg must be a dict"),
        (dict(stride=2), {}, KeyError, "cfg has no key 'type', got the keys 'stride'"),
        (
            dict(type="Conv2D"),
            {},
            KeyError,
            r"conv layer type 'Conv2D' is not registered \(did you mean 'Conv2d'",
        ),
        (
            dict(type="Conv", stried=2),
            {},
            TypeError,
            r"Conv: unknown config key 'stried' \(did you mean 'stride'\?\)",
        ),
        (
            dict(type="Conv", stride=2),
            dict(stride=1),
            TypeError,
            "Conv: 'stride' given twice, by the config and",
        ),
        (dict(type="Conv", kernel_size=1), {}, TypeError, "Conv: multiple values for argument 'kernel_size'"),
    ],
)
def test_build_conv_layer_errors(cfg, kwargs, error, message):
    with pytest.raises(error, match=message):
        build_conv_layer(cfg, 2, 4, 3, **kwargs)


@pytest.mark.parametrize("name", sorted(ACTIVATION_LAYERS.module_dict))
def test_every_activation_builds_and_inplace_goes_only_where_it_is_taken(name):
    cfg = dict(type=name)
    layer = build_activation_layer(cfg)
    assert cfg == dict(type=name) and layer(torch.randn(2, 3)).shape == (2, 3)
    without = {"GELU", "PReLU", "Sigmoid", "Softplus", "Tanh", "Identity"}
    assert getattr(layer, "inplace", None) is (None if name in without else True)
    if name not in without:
        assert build_activation_layer(dict(type=name, inplace=False)).inplace is False


def test_build_activation_layer():
    assert type(build_activation_layer()) is type(build_activation_layer(None)) is nn.ReLU
    for name, torch_class in {"Swish": nn.SiLU, "HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid}.items():
        assert type(build_activation_layer(dict(type=name))) is torch_class
    for name in set(ACTIVATION_LAYERS.module_dict) - {"Swish", "HSwish", "HSigmoid"}:
        assert ACTIVATION_LAYERS.get(name) is getattr(nn, name)
    assert build_activation_layer(dict(type=nn.LeakyReLU, negative_slope=0.3)).negative_slope == 0.3
    for cfg, error, message in (
        ("ReLU", TypeError, "build_activation_layer: cfg must be a dict"),
        ({}, KeyError, "has no key 'type'"),
        (dict(type="Relu"), KeyError, r"\(did you mean 'ReLU'"),
        (dict(type="Tanh", inplace=True), TypeError, "Tanh: unknown config key 'inplace'; wanted: none"),
    ):
        with pytest.raises(error, match=message):
            build_activation_layer(cfg)


# ------------------------------------------------------------------------------------------------------------- mmengine


def python(code: str) -> list[str]:
    """Lines printed by a process of its own: what counts is which module was imported first."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_itself_does_not_import_the_mmengine_side():
    """`import fastres` would load mmengine, and mmengine's own import of fastres.registry would run no code."""
    wrong = []
    for path in sorted((ROOT / "fastres").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)}
            else:
                names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if names & {"fastres.registry", "registry"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: import from fastres._registry instead")
    assert wrong == []


@pytest.mark.parametrize("in_use", [False, True])
def test_a_broken_mmengine_does_not_break_us(monkeypatch, recwarn, in_use):
    """Nothing is said unless the process uses mmengine."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        monkeypatch.delitem(sys.modules, name)
    if in_use:
        monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    else:
        monkeypatch.setattr(registry, "find_spec", lambda name: object())

    def broken(name):
        raise ModuleNotFoundError("No module named 'pkg_resources'")

    monkeypatch.setattr(registry, "import_module", broken)
    registry._connect_mmengine()
    assert [str(w.message) for w in recwarn] == in_use * [
        "type='fastres.*' will not resolve in mmengine: ModuleNotFoundError: No module named 'pkg_resources'"
    ]
    with pytest.raises(ModuleNotFoundError):
        registry.register_into_mmengine()


@pytest.fixture
def mm():
    """mmengine's root of models, with fastres' child in it as it was before."""
    root = peer("mmengine.registry").MODELS
    child = registry.register_into_mmengine()
    before = dict(child.module_dict)
    yield root
    child.module_dict.clear()
    child.module_dict.update(before)


@pytest.mark.peers
def test_one_child_and_no_second(mm):
    child = mm.children["fastres"]
    assert registry.register_into_mmengine() is child is registry.register_into_mmengine()
    assert child.scope == "fastres" and child.parent is mm
    for table in (MODELS, NORM_LAYERS, CONV_LAYERS, ACTIVATION_LAYERS):
        assert table.module_dict.items() <= child.module_dict.items()


@pytest.mark.peers
def test_mmengine_sees_what_is_registered_later(mm, restored):
    NORM_LAYERS.register_module("LateNorm", module=Scale)
    assert mm.get("fastres.LateNorm") is Scale
    layer = mm.build(dict(type="fastres.LateNorm", num_features=3, start=4.0))
    assert layer.weight.tolist() == [4.0, 4.0, 4.0]
    NORM_LAYERS.register_module("LateNorm", module=nn.BatchNorm1d, force=True)
    assert mm.get("fastres.LateNorm") is nn.BatchNorm1d
    MODELS.register_module(
        "LateNorm", module=nn.Linear
    )  # the same name in two of our tables: MODELS comes first
    assert mm.get("fastres.LateNorm") is nn.Linear
    NORM_LAYERS.register_module("LateNorm", module=Scale, force=True)
    assert mm.get("fastres.LateNorm") is nn.Linear and NORM_LAYERS.get("LateNorm") is Scale


@pytest.mark.peers
def test_names_without_scope_stay_those_of_mm(mm, restored):
    from mmengine.registry import DefaultScope
    from mmengine.registry import Registry as MMRegistry

    theirs = type("TheirBN", (nn.BatchNorm2d,), {})
    other = MMRegistry("model", parent=mm, scope="fastres_test_mm")
    sys.modules["fastres_test_mm"] = types.ModuleType("fastres_test_mm")
    sys.modules["fastres_test_mm.registry"] = types.ModuleType("fastres_test_mm.registry")
    try:
        other.register_module("BN", module=theirs)
        NORM_LAYERS.register_module("OnlyOurs", module=Scale)
        with DefaultScope.overwrite_default_scope("fastres_test_mm"):
            assert type(mm.build(dict(type="BN", num_features=2))) is theirs
            assert type(mm.build(dict(type="fastres.BN", num_features=2))) is nn.BatchNorm2d
            assert type(other.build(dict(type="fastres.OnlyOurs", num_features=2))) is Scale
            with pytest.raises(KeyError, match="OnlyOurs is not in the fastres_test_mm"):
                mm.build(dict(type="OnlyOurs", num_features=2))
        with DefaultScope.overwrite_default_scope("fastres"):
            assert type(mm.build(dict(type="OnlyOurs", num_features=2))) is Scale
        assert type(mm.build(dict(type="OnlyOurs", num_features=2, _scope_="fastres"))) is Scale
    finally:
        del (
            mm.children["fastres_test_mm"],
            sys.modules["fastres_test_mm"],
            sys.modules["fastres_test_mm.registry"],
        )


@pytest.mark.peers
@pytest.mark.parametrize(
    "first",
    [
        "import fastres, mmengine.registry",
        "import fastres.registry, mmengine.registry",
        "import mmengine.registry",
    ],
)
def test_mmengine_finds_us_whatever_was_imported_first(first):
    """No custom_imports: mmengine imports fastres.registry itself, and then the modules that register."""
    peer("mmengine.registry")
    out = python(f"""
        {first}
        from mmengine.registry import MODELS, DefaultScope
        norm = MODELS.build(dict(type="fastres.FusedBN", num_features=3))
        net = MODELS.build(dict(type="fastres.ResNet", depth=18, norm_cfg=dict(type="fastres.FusedBN")))
        with DefaultScope.overwrite_default_scope("fastres"):
            MODELS.build(dict(type="ResNet", depth=18))
        print(type(norm).__module__, type(net).__name__, list(MODELS.children).count("fastres"))
    """)
    assert out[-1].split()[0].startswith("fastres.") and out[-1].split()[1:] == ["ResNet", "1"]
