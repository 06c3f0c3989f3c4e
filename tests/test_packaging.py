"""The distribution: sdist and wheel build, the wheel runs away from the repository, versions stand in one place."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastres
from tests.set_up_peers import GROUPS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it; the tree itself is not written to."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    names = ["fastres", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_what_is_in_the_distributions(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fastres").rglob("*.py")}
    loops = {str(p.relative_to(ROOT)) for p in (ROOT / "fastres" / "csrc").iterdir()}
    assert loops and {"fastres/py.typed"} | modules | loops <= set(names)
    assert not [name for name in names if not re.match(r"fastres/|fastres-[\d.]+\.dist-info/", name)]
    assert fastres.__version__ in wheel.name and fastres.__version__ in sdist.name
    assert any(name.endswith("/LICENSE") for name in tarfile.open(sdist).getnames())
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(built, tmp_path):
    """Nothing but the wheel is installed there; torch is lent, by a path, so that it is not downloaded again."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, wheel], check=True)
    site = next((tmp_path / "env").rglob("site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = """
import fastres, torch, pathlib, importlib.metadata
print(fastres.__file__)
print(fastres.__version__ == importlib.metadata.version("fastres"))
print(pathlib.Path(fastres.__file__).with_name("py.typed").is_file())
net = fastres.ResNet(depth=18)
net(torch.randn(2, 3, 32, 32))[0].sum().backward()
"""
    options = dict(capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    done = subprocess.run([python, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    where, same, typed = done.stdout.split()
    assert where.startswith(str(site)) and same == typed == "True"
    done = subprocess.run([python, "-m", "fastres", "env"], **options)
    assert done.returncode == 0 and fastres.__version__ in done.stdout


def test_versions_stand_in_one_place():
    mentions = []
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "fastres").rglob("*.py")]:
        mentions += [path.name] * path.read_text().count(f'"{fastres.__version__}"')
    assert mentions == ["_version.py"]


def test_pins_agree():
    """The extra for mm packages and what the tests install are one set; the constraints know every development tool."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {p for p in extras["mm"] if "==" in p}
    assert pinned and pinned <= set(GROUPS["mmengine"])
    constrained = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    needed = {p for name in ("train", "bench", "docs", "test") for p in extras[name] if "fastres" not in p}
    names = {re.split(r"[\[=<>;]", p)[0].lower() for p in needed} - {"setuptools"}
    assert names <= set(constrained), names - set(constrained)
