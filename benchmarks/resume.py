"""A pytest plugin that goes on where a run was stopped: `-p benchmarks.resume --passed FILE`.

Tests that have passed are written to the file as they do, with the commit, and left out of the next run of that commit
in an unchanged working tree.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rows import commit

__all__ = ["Passed"]


class Passed:
    """The tests that have passed at this commit; a line each, after the commit's."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, commit()
        lines = path.read_text().splitlines() if path.exists() else []
        known = bool(self.at) and not self.at.endswith("+") and lines[:1] == [self.at]
        self.tests = set(lines[1:] if known else ())
        if not known:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self.at}\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        before = [i for i in items if i.nodeid in self.tests]
        items[:] = [i for i in items if i.nodeid not in self.tests]
        config.hook.pytest_deselected(items=before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, help="file of the tests that have passed")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--passed"):
        config.pluginmanager.register(Passed(path.resolve()), "passed tests")
