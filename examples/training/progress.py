"""Lines and progress bars on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.errors import missing, optional


class Progress:
    """Lines and bars on the terminal of rank 0; nothing elsewhere. Bars only on a terminal and with tqdm."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self._tqdm = optional("tqdm") if shown else None
        if shown and self._tqdm is None and sys.stderr.isatty():
            self.print(missing("tqdm", "a progress bar"))

    def print(self, text: str = "") -> None:
        if not self.shown:
            return
        if self._tqdm is not None:
            self._tqdm.tqdm.write(text)
        else:
            print(text)
        sys.stdout.flush()

    @contextmanager
    def bar(self, title: str, total: int, initial: int = 0) -> Iterator[Any]:
        """An object with ``update()`` and ``set_postfix_str(text)``."""
        if self._tqdm is None:
            yield _NoBar()
            return
        with self._tqdm.tqdm(
            total=total,
            initial=initial,
            desc=title,
            leave=False,
            dynamic_ncols=True,
            disable=None,
            bar_format="{desc} |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}",
        ) as bar:
            yield bar


class _NoBar:
    def update(self) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass
