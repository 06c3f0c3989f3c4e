"""The pages and docstrings: every ``>>>`` is run, every block of Python parses, every public name is on the site."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import fastres

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "fastres").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        ast.parse(block)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_examples_are_there():
    assert len(MODULES) >= 4
    assert sum(">>> " in page.read_text() for page in PAGES) >= 4


def test_every_public_name_is_on_the_site():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"^::: fastres\.(?:\w+\.)*(\w+)$", text, re.M))
    named |= {name for names in re.findall(r"members: \[(.*?)\]", text) for name in names.split(", ")}
    tables = {"MODELS", "NORM_LAYERS", "CONV_LAYERS", "ACTIVATION_LAYERS"}  # in the registry's own text
    assert set(fastres.__all__) - named - tables - {"__version__"} == set()
