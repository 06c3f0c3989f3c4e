"""Imports point down only, optional packages stay optional, and importing fastres is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastres"

# Bottom to top, as the design has it. A module may import from its own and from lower layers. Patterns are module
# names below fastres; the first that matches counts, "x.*" also covers x itself.
LAYERS: list[tuple[str, ...]] = [
    ("_version", "config", "_allocator"),
    ("kernels._*", "reference", "reference_conv", "reference_pointwise", "kernels"),
    ("kernels.*",),
    ("_routing", "_convolution", "_cpu"),
    ("_foldable",),
    ("_folding", "_inference"),
    ("_batch_norm",),
    ("_casts",),
    ("_pending",),
    ("_whole",),
    ("_basic_block", "_bottleneck", "_moment_forms"),
    ("_block_end",),
    ("functional", "functional.*"),
    ("registry", "_registry", "_calling"),
    ("_norm", "_fusable", "initialize", "_network"),
    ("modules", "_residual"),
    ("models", "variants"),
    ("classifier", "classifier.*"),
    (
        "convert",
        "_matching",
        "_plan",
        "_reading",
        "_swap",
        "checkpoints",
        "integrations.*",
        "deploy",
        "graphs",
    ),
    ("",),  # fastres/__init__.py: gathers the public names
    ("environment", "selfcheck", "routes", "tuning", "_timing", "_trials", "_workload", "_jobs", "images"),
    ("__main__", "cli", "commands", "commands.*"),
]
# Of these no module of fastres may import any at top level, whatever else is installed.
OPTIONAL = {
    "mmengine", "mmcv", "mmcls", "mmpretrain", "timm", "torchvision", "matplotlib", "tqdm", "sklearn", "PIL", "numpy",
    "scipy", "pytest", "ninja",
}  # fmt: skip
OUTSIDE = {"examples", "benchmarks", "tests"}


def matches(module: str, pattern: str) -> bool:
    if pattern.endswith("_*"):
        return module.startswith(pattern[:-1])
    if pattern.endswith(".*"):
        return module == pattern[:-2] or module.startswith(pattern[:-1])
    return module == pattern


def layer(module: str) -> int:
    """Index of a module's layer; the module is named below fastres, '' being fastres itself."""
    for i, patterns in enumerate(LAYERS):
        if any(matches(module, p) for p in patterns):
            return i
    raise AssertionError(f"fastres.{module} is in no layer: add it to LAYERS in {Path(__file__).name}")


def module_name(path: Path, package: Path) -> str:
    parts = list(path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, package: Path) -> bool:
    base = package.joinpath(*name.split(".")) if name else package
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


def imported(path: Path, package: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute module, only for type checkers) of every import in a file, those in functions too."""
    name = module_name(path, package)
    here = ["fastres", *(name.split(".") if name else [])]
    parent = here if path.name == "__init__.py" else here[:-1]
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for body in node.body
        for inner in ast.walk(body)
    }
    for node in ast.walk(tree):
        checked = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, checked
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = parent[: len(parent) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from fastres import functional` names a module, `from fastres.functional import f` a function in one.
                inside = base == "fastres" or base.startswith("fastres.")
                below = full.removeprefix("fastres.")
                yield node.lineno, full if inside and is_module(below, package) else base, checked


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import: those in functions do not."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def upward_imports(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        name = module_name(path, package)
        own = layer(name)
        for line, target, typing_only in imported(path, package):
            root, _, below = target.partition(".")
            if root in OUTSIDE:
                wrong.append(
                    f"{path.relative_to(package.parent)}:{line} imports {target}, which lies outside"
                )
            elif root == "fastres" and not typing_only and below != name and layer(below) > own:
                wrong.append(f"{path.relative_to(package.parent)}:{line} imports {target}, which lies above")
    return wrong


def optional_imports(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        for node in top_level(ast.parse(path.read_text(), str(path))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [
                f"{path.relative_to(package.parent)}:{node.lineno} imports {n} at import time"
                for n in names
                if n.partition(".")[0] in OPTIONAL
            ]
    return wrong


def test_imports_point_down():
    assert upward_imports(PACKAGE) == []


def test_optional_packages_are_imported_where_they_are_used():
    assert optional_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        (
            "functional.py",
            "from fastres.modules import BasicBlock",
            "imports fastres.modules, which lies above",
        ),
        ("functional.py", "import fastres.models", "imports fastres.models, which lies above"),
        ("functional.py", "from fastres import models", "imports fastres.models, which lies above"),
        ("functional.py", "from . import modules", "imports fastres.modules, which lies above"),
        (
            "functional.py",
            "def f():\n    from .modules import BasicBlock",
            "imports fastres.modules, which lies above",
        ),
        (
            "kernels/batch_norm.py",
            "from ..functional import conv_bn",
            "imports fastres.functional, which lies above",
        ),
        (
            "kernels/_jit.py",
            "from .batch_norm import op",
            "imports fastres.kernels.batch_norm, which lies above",
        ),
        ("registry.py", "import fastres", "imports fastres, which lies above"),
        ("modules.py", "def f():\n    import tests.tolerance", "imports tests.tolerance, which lies outside"),
    ],
)
def test_the_layer_check_bites(tmp_path, file, source, message):
    package = tmp_path / "fastres"
    (package / "kernels").mkdir(parents=True)
    names = ("__init__", "functional", "registry", "modules", "models")
    names += ("kernels/__init__", "kernels/_jit", "kernels/batch_norm")
    for name in names:
        (package / f"{name}.py").write_text("")
    (package / "models.py").write_text("from fastres import functional\nfrom .modules import BasicBlock\n")
    assert upward_imports(package) == []
    (package / file).write_text(source)
    (found,) = upward_imports(package)
    assert message in found


@pytest.mark.parametrize(
    "source",
    [
        "import matplotlib.pyplot as plt",
        "try:\n    from tqdm import tqdm\nexcept ImportError:\n    pass",
        "import numpy",
    ],
)
def test_the_optional_check_bites(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    assert len(optional_imports(tmp_path)) == 1
    (tmp_path / "a.py").write_text(f"def f():\n{textwrap.indent(source, '    ')}")
    assert optional_imports(tmp_path) == []


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_a_second_more_than_torch():
    code = """
        import time, torch
        start = time.process_time()
        import fastres
        print(time.process_time() - start)
    """
    seconds = min(float(python(code)) for _ in range(3))
    assert seconds < 1.0, f"import fastres took {seconds:.2f} s after import torch"


def test_import_loads_no_optional_package():
    """Against torch alone: torch itself loads numpy where it is installed."""
    loaded = python("""
        import sys, torch
        before = set(sys.modules)
        import fastres
        print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
    """).split()
    assert OPTIONAL.isdisjoint(loaded)


def test_import_and_train_step_without_triton():
    """As on a machine that has no Triton: import, and the CPU path still trains."""
    out = python("""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ImportError("triton is blocked")

        sys.meta_path.insert(0, Blocker())
        import torch, fastres
        assert "triton" not in sys.modules
        net = fastres.ResNet(18)
        x = torch.randn(2, 3, 32, 32)
        out = net(x)
        out = out[-1] if isinstance(out, (tuple, list)) else out
        out.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        print("trained")
    """)
    assert out.strip() == "trained"
