"""Config files: inheritance, deletion, references, options, and messages that name file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastres.config import ConfigError, check_keys, format_config, load_config, merge_options, parse_options

BASE = """
model = dict(backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', eps=1e-3)), head=dict(topk=(1, 5)))
optimizer = dict(type='SGD', lr=0.1)
grad_clip = None
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_child_dicts_merge_and_values_replace(write):
    write("_base_/model.py", BASE)
    write("_base_/run.py", "runner = dict(max_epochs=3)\n")
    child = write(
        "child.py",
        "_base_ = ['_base_/model.py', './_base_/run.py']\n"
        "model = dict(backbone=dict(depth=18), head=dict(topk=(1,)))\ngrad_clip = dict(max_norm=1)\n",
    )
    config = load_config(child)
    backbone = config["model"]["backbone"]
    assert backbone == dict(type="ResNet", depth=18, norm_cfg=dict(type="BN", eps=1e-3))
    assert config["model"]["head"] == dict(topk=(1,))
    assert config["optimizer"] == dict(type="SGD", lr=0.1)
    assert config["grad_clip"] == dict(max_norm=1)
    assert config["runner"] == dict(max_epochs=3)
    assert "_base_" not in config


def test_inheritance_is_transitive_and_relative_to_each_file(write):
    write("a/root.py", "x = dict(a=1, b=1)\n")
    write("a/middle.py", "_base_ = 'root.py'\nx = dict(b=2)\n")
    assert load_config(write("b/leaf.py", "_base_ = '../a/middle.py'\nx = dict(c=3)\n")) == {
        "x": dict(a=1, b=2, c=3)
    }


def test_delete_replaces_the_inherited_dict(write):
    write("base.py", BASE)
    child = write(
        "child.py",
        "_base_ = 'base.py'\noptimizer = dict(_delete_=True, type='AdamW')\n"
        "model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=8)))\n"
        "fresh = dict(_delete_=True, a=dict(_delete_=True, b=1))\n",
    )
    config = load_config(child)
    assert config["optimizer"] == dict(type="AdamW")
    assert config["model"]["backbone"]["norm_cfg"] == dict(type="GN", num_groups=8)
    assert config["model"]["backbone"]["depth"] == 50
    assert config["fresh"] == dict(a=dict(b=1))


def test_base_references(write):
    write("base.py", BASE)
    child = write(
        "child.py", "_base_ = 'base.py'\nrate = {{_base_.optimizer.lr}}\nhalf = {{_base_.optimizer.lr}} / 2\n"
    )
    config = load_config(child)
    assert (config["rate"], config["half"]) == (0.1, 0.05)
    with pytest.raises(ConfigError, match=r"bad\.py, line 2: KeyError: _base_\.optimizer\.rl is not in"):
        load_config(write("bad.py", "_base_ = 'base.py'\nrate = {{_base_.optimizer.rl}}\n"))


def test_a_variable_used_twice_is_not_shared(write):
    path = write(
        "c.py", "norm = dict(type='BN')\nmodel = dict(a=dict(norm_cfg=norm), b=[dict(norm_cfg=norm)])\n"
    )
    config = load_config(path, ["model.a.norm_cfg.type=FusedBN"])
    assert config["model"]["a"]["norm_cfg"]["type"] == "FusedBN"
    assert config["model"]["b"][0]["norm_cfg"]["type"] == "BN"
    assert config["norm"]["type"] == "BN"
    config = load_config(path)
    config["model"]["a"]["norm_cfg"]["type"] = "GN"
    assert config["model"]["b"][0]["norm_cfg"]["type"] == config["norm"]["type"] == "BN"


def test_python_is_allowed_and_only_values_are_kept(write):
    path = write(
        "c.py",
        "import math\ndef f(n):\n    return [2**i for i in range(n)]\nclass K: pass\n_tmp = 3\nsteps = f(_tmp)\n",
    )
    assert load_config(path) == {"steps": [1, 2, 4]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("-2", -2),
        ("true", True),
        ("None", None),
        ("cosine", "cosine"),
        ("'3'", "3"),
        ("[1, 2]", [1, 2]),
        ("(1,2)", (1, 2)),
        ("1,2", [1, 2]),
        ("a,b,3", ["a", "b", 3]),
        ("dict(type='GN', num_groups=4)", dict(type="GN", num_groups=4)),
        ("[dict(a=dict(b=1))]", [dict(a=dict(b=1))]),
        ("x=y", "x=y"),
        ("", ""),
        ("data/train", "data/train"),
    ],
)
def test_option_values(text, value):
    parsed = parse_options([f"a.b={text}"])["a"]["b"]
    assert parsed == value and type(parsed) is type(value)


def test_options_reach_dicts_lists_and_new_keys():
    config = dict(data=dict(pipeline=[dict(size=8), dict(size=9)], sizes=(1, 2)), model=dict(norm_cfg=None))
    got = merge_options(
        config,
        ["data.pipeline.1.size=32", "data.sizes.0=5", "model.norm_cfg.type=GN", "new.key=1", "new.other=2"],
    )
    assert got["data"] == dict(pipeline=[dict(size=8), dict(size=32)], sizes=(5, 2))
    assert got["model"] == dict(norm_cfg=dict(type="GN"))
    assert got["new"] == dict(key=1, other=2)
    assert config["data"]["pipeline"][1] == dict(size=9), "the argument was changed"
    replaced = merge_options(got, ["model.norm_cfg=dict(_delete_=True, eps=1)"])
    assert replaced["model"] == dict(norm_cfg=dict(eps=1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("noequals", r"option 'noequals': expected key=value"),
        ("a..b=1", r"option 'a\.\.b=1': expected key=value"),
        ("=1", r"expected key=value"),
        ("lr.step=1", r"option 'lr\.step=1': key 'lr': cannot merge a dict into 0\.1 \(float\)"),
        ("steps.7=1", r"steps has 2 entries, there is no entry 7"),
        ("steps.x=1", r"key 'steps': cannot merge a dict into \[1, 2\]"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ConfigError, match=message):
        merge_options(dict(lr=0.1, steps=[1, 2]), [option])


def test_file_errors_name_file_line_and_key(write, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.py: no such config file$"):
        load_config(tmp_path / "nothing.py")
    with pytest.raises(
        ConfigError, match=r"gone\.py: no such config file \(named in _base_ of .*orphan\.py\)"
    ):
        load_config(write("orphan.py", "_base_ = 'gone.py'\n"))
    with pytest.raises(ConfigError, match=r"syntax\.py, line 2: "):
        load_config(write("syntax.py", "a = 1\nb = dict(\n"))
    with pytest.raises(ConfigError, match=r"run\.py, line 3: NameError: name 'unknown' is not defined"):
        load_config(write("run.py", "a = 1\n\nb = unknown\n"))
    with pytest.raises(ConfigError, match=r"bases\.py, line 1: _base_ must be a file name or a list"):
        load_config(write("bases.py", "_base_ = 3\n"))
    write("one.py", "_base_ = 'two.py'\n")
    with pytest.raises(ConfigError, match=r"circular _base_: .*one\.py -> .*two\.py -> .*one\.py"):
        load_config(write("two.py", "_base_ = 'one.py'\n").with_name("one.py"))
    write("m.py", BASE)
    write("n.py", "optimizer = dict(lr=1)\n")
    with pytest.raises(ConfigError, match=r"key 'optimizer' is set by both .*m\.py and .*n\.py"):
        load_config(write("both.py", "_base_ = ['m.py', 'n.py']\n"))
    with pytest.raises(
        ConfigError, match=r"kind\.py: key 'model\.backbone\.depth': cannot merge a dict into 50"
    ):
        load_config(write("kind.py", "_base_ = 'm.py'\nmodel = dict(backbone=dict(depth=dict(a=1)))\n"))


def test_format_round_trips(write):
    path = write(
        "c.py",
        BASE
        + "names = ['a' * 40, 'b' * 40, 'c' * 40]\none = (1,)\nempty = {}\nodd = {'a-b': 1, 3: dict(c="
        + repr("x" * 90)
        + ")}\n",
    )
    config = load_config(path)
    text = format_config(config)
    assert load_config(write("again.py", text)) == config
    assert max(map(len, text.splitlines())) <= 110
    assert "backbone=dict(" in text


def test_check_keys():
    assert check_keys(dict(a=1), ["a", "b"], "here") == dict(a=1)
    with pytest.raises(ConfigError, match=r"optimizer: unknown key 'momentom'; did you mean 'momentum'\?"):
        check_keys(dict(momentom=1), ["momentum", "lr"], "optimizer")
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'; known: lr, momentum"):
        check_keys(dict(zzz=1), ["momentum", "lr"], "optimizer")
    with pytest.raises(ConfigError, match=r"optimizer: key 'type' is missing"):
        check_keys(dict(lr=1), ["type", "lr"], "optimizer", required=["type"])
    assert check_keys(dict(any=1), None, "optimizer", required=["any"]) == dict(any=1)
    with pytest.raises(ConfigError, match=r"optimizer: expected a dict, got 3"):
        check_keys(3, [], "optimizer")
