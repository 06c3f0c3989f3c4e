"""Python config files as in mmcls: inheritance by ``_base_``, replacement by ``_delete_``, ``key.sub=value``.

A config is a Python file whose top-level names are its keys. It is executed, so load only files you trust.
The result of `load_config` is a plain dict of plain dicts, lists and values; no two entries share an object.
"""

from __future__ import annotations

import ast
import difflib
import os
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ConfigError", "check_keys", "format_config", "load_config", "merge_options", "parse_options"]

BASE, DELETE = "_base_", "_delete_"


class ConfigError(ValueError):
    """A config file, a key in it or a ``key=value`` option is wrong; the message names file and key."""


def load_config(path: str | os.PathLike[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file with everything it inherits, then applies ``key.sub=value`` options.

    ``_base_ = 'file'`` or a list of files, relative to the file that names them, are read first and merged: dicts
    key by key, everything else replaced. ``_delete_=True`` inside a dict replaces the inherited dict instead.
    ``{{_base_.key.sub}}`` stands for an inherited value. Names that begin with an underscore, modules, functions
    and classes are not part of the config.

    Args:
        path: the config file.
        options: as given to ``--cfg-options``, see `parse_options`.

    Raises:
        ConfigError: missing file, syntax error, an exception while it runs, circular or conflicting bases, a dict
            that would replace a value of another kind, a malformed option.
    """
    config = _load(Path(path), ())
    return merge_options(config, options)


def merge_options(config: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A copy of ``config`` with ``key.sub=value`` options merged in; numbers index lists (``data.pipeline.0.size``)."""
    merged = _plain(config)
    for option in options:
        merged = _merge(merged, _parse_option(option), f"option {option!r}", "", lists=True)
    return merged


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Turns ``["a.b=1", "c=x,y"]`` into ``{"a": {"b": 1}, "c": ["x", "y"]}``.

    Values are Python literals, ``dict(...)`` included; ``true``, ``false`` and ``none`` in any case; a comma makes a
    list; anything else is a string.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        parsed = _merge(parsed, _parse_option(option), f"option {option!r}", "")
    return parsed


def check_keys(
    mapping: object, allowed: Iterable[str] | None, where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """``mapping`` as a dict, after checking that it is one, has only ``allowed`` keys (None: any) and all ``required``.

    Raises:
        ConfigError: naming ``where``, the key, and the nearest known keys.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a dict, got {mapping!r}")
    known = list(mapping if allowed is None else allowed)
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{_suggest(str(key), known)}")
    for key in required:
        if key not in mapping:
            raise ConfigError(f"{where}: key {key!r} is missing")
    return dict(mapping)


def format_config(config: Mapping[str, Any], width: int = 100) -> str:
    """The config as the text of a config file; loading that file gives an equal config."""
    return "".join(f"{key} = {_format(value, 0, width - len(key) - 3)}\n" for key, value in config.items())


# --- reading ------------------------------------------------------------------------------------------------


def _load(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(str(p) for p in (*children, resolved))
        raise ConfigError(f"{path}: circular {BASE}: {chain}")
    if not path.is_file():
        asked = f" (named in {BASE} of {children[-1]})" if children else ""
        raise ConfigError(f"{path}: no such config file{asked}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as e:
        raise ConfigError(f"{path}, line {e.lineno}: {e.msg}") from e

    inherited: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for base in _bases(tree, path):
        base_path = path.parent / base
        loaded = _load(base_path, (*children, resolved))
        for key in loaded:
            if key in inherited:
                raise ConfigError(f"{path}: key {key!r} is set by both {origin[key]} and {base_path}")
            origin[key] = base_path
        inherited.update(loaded)
    return _merge(inherited, _execute(tree, path, inherited), str(path), "")


def _bases(tree: ast.Module, path: Path) -> list[str]:
    """The value of ``_base_``, read without running the file: its bases must be known before its body runs."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == BASE for t in node.targets
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = None
            bases = [value] if isinstance(value, str) else value
            if not isinstance(bases, (list, tuple)) or not all(isinstance(b, str) for b in bases):
                raise ConfigError(
                    f"{path}, line {node.lineno}: {BASE} must be a file name or a list of file names"
                )
            return list(bases)
    return []


class _BaseReferences(ast.NodeTransformer):
    """Replaces ``{{_base_.key.sub}}``, which Python parses as a set of a set, by a look-up of the inherited value."""

    def visit_Set(self, node: ast.Set) -> ast.AST:
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            names = ast.unparse(inner.elts[0]).split(".")
            if names[0] == BASE and len(names) > 1:
                call = ast.Call(
                    ast.Name("__inherited__", ast.Load()), [ast.Constant(".".join(names[1:]))], []
                )
                return ast.copy_location(call, node)
        return self.generic_visit(node)


def _execute(tree: ast.Module, path: Path, inherited: dict[str, Any]) -> dict[str, Any]:
    def look_up(key: str) -> Any:
        value: Any = inherited
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise KeyError(f"{BASE}.{key} is not in the inherited config")
            value = value[name]
        return _plain(value)

    names: dict[str, Any] = {"__file__": str(path), "__name__": path.stem, "__inherited__": look_up}
    code = compile(ast.fix_missing_locations(_BaseReferences().visit(tree)), str(path), "exec")
    try:
        exec(code, names)
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{path}{where}: {type(e).__name__}: {e.args[0] if e.args else e}") from e
    skipped = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, skipped)}


# --- merging ------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A copy down to the leaves without ``_delete_`` marks, which mean nothing where nothing is inherited.

    Unlike deepcopy's it shares nothing: two uses of one variable become independent.
    """
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k != DELETE}
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    return value


def _merge(base: Any, new: Any, source: str, key: str, lists: bool = False) -> Any:
    """``new`` over ``base``; ``source`` and ``key`` are for messages; ``lists`` lets digits index into lists."""
    if not isinstance(new, dict) or key and new.get(DELETE, False):
        return _plain(new)
    if lists and isinstance(base, (list, tuple)) and new and all(str(k).isdigit() for k in new):
        items = list(base)
        for k, v in new.items():
            if int(k) >= len(items):
                raise ConfigError(f"{source}: {key} has {len(items)} entries, there is no entry {k}")
            items[int(k)] = _merge(items[int(k)], v, source, f"{key}.{k}", lists)
        return type(base)(items)
    if not isinstance(base, dict):
        raise ConfigError(
            f"{source}: key {key!r}: cannot merge a dict into {base!r} ({type(base).__name__}); "
            f"{DELETE}=True in the dict replaces it"
        )
    merged = dict(base)
    for k, v in new.items():
        path = f"{key}.{k}" if key else str(k)
        # An inherited None is "not set": a dict simply takes its place.
        merged[k] = _merge(merged[k], v, source, path, lists) if merged.get(k) is not None else _plain(v)
    return merged


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; known: {', '.join(sorted(known))}"
    )


# --- values -------------------------------------------------------------------------------------------------


def _parse_option(option: str) -> dict[str, Any]:
    key, equals, text = option.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"option {option!r}: expected key=value or key.sub=value")
    nested: Any = _parse_value(text.strip())
    for name in reversed(names):
        nested = {name: nested}
    return nested


class _DictCalls(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            if all(k.arg is not None for k in node.keywords):
                keys: list[ast.expr | None] = [ast.Constant(k.arg) for k in node.keywords]
                return ast.copy_location(ast.Dict(keys, [k.value for k in node.keywords]), node)
        return node


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(_DictCalls().visit(ast.parse(text, mode="eval")))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if "," in text and not any(c in text for c in "()[]{}'\""):
            return [_parse_value(part.strip()) for part in text.split(",")]
        return text
    return list(value) if isinstance(value, tuple) and not text.startswith("(") else value


def _format(value: Any, indent: int, room: int) -> str:
    flat = _format_flat(value)
    if len(flat) <= room or not value or not isinstance(value, (dict, list, tuple)):
        return flat
    inner, pad = " " * (indent + 4), " " * indent
    if isinstance(value, dict):
        keyword = all(str(k).isidentifier() for k in value)
        names = [f"{k}=" if keyword else f"{k!r}: " for k in value]
        items = [
            n + _format(v, indent + 4, 95 - indent - len(n))
            for n, v in zip(names, value.values(), strict=True)
        ]
        opening, closing = ("dict(", ")") if keyword else ("{", "}")
    else:
        items = [_format(v, indent + 4, 95 - indent) for v in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
    return opening + "\n" + "".join(f"{inner}{item},\n" for item in items) + pad + closing


def _format_flat(value: Any) -> str:
    if isinstance(value, dict):
        if value and all(str(k).isidentifier() for k in value):
            return "dict(" + ", ".join(f"{k}={_format_flat(v)}" for k, v in value.items()) + ")"
        return "{" + ", ".join(f"{k!r}: {_format_flat(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_flat, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_format_flat, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
