"""Install other people's packages for the tests that run beside them, into a folder of their own.

    python tests/set_up_peers.py            into the folder ``peers`` of this Python's environment

``tests/run.py`` puts the folder in front of the path for the phase ``peers`` alone: mmengine needs a setuptools from
before 81, and a package that came along must not make a test pass that would fail without it. What cannot be had on
this machine is named, and its tests are skipped with that reason; the exit code is 1 then, so that make tries again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

# Everything is pinned and nothing else is installed, so that torch and numpy stay the environment's own.
GROUPS: dict[str, list[str]] = {
    "mmengine": [
        "setuptools==80.9.0",  # the last but one with pkg_resources
        "mmengine==0.10.7", "mmcv-lite==2.2.0", "mmpretrain==1.2.0", "addict==2.4.0", "einops==0.8.2",
        "importlib-metadata==10.2.0", "lazy-importer==0.1.0", "mat4py==0.6.0", "model-index==0.1.11",
        "opencv-python-headless==5.0.0.93", "ordered-set==4.1.0", "platformdirs==4.14.8", "PyYAML==6.0.4",
        "rich==15.0.0", "termcolor==3.3.0", "yapf==0.43.0",
    ],
    "torchvision": ["torchvision==0.28.0", "PyYAML==6.0.4"],
    "timm": ["timm==1.0.31", "PyYAML==6.0.4"],
}  # fmt: skip
FOLDER = Path(sys.prefix, "peers")
MISSING = "missing.json"  # in the folder: group -> why it could not be installed


def set_up(folder: Path) -> dict[str, str]:
    """Install every group into ``folder``, anew. Returns the groups that could not be had, with the reason."""
    shutil.rmtree(folder, ignore_errors=True)
    missing: dict[str, str] = {}
    for group, packages in GROUPS.items():
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        command += ["--no-deps", "--upgrade", "--target", str(folder), *packages]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            missing[group] = errors[-1] if errors else f"pip failed with exit code {done.returncode}"
            print(f"{group} cannot be installed: {missing[group]}")
    shutil.rmtree(folder / "tests", ignore_errors=True)  # model-index brings its own, which would hide ours
    folder.mkdir(exist_ok=True)
    (folder / MISSING).write_text(json.dumps(missing))
    return missing


if __name__ == "__main__":
    sys.exit(1 if set_up(FOLDER) else 0)
