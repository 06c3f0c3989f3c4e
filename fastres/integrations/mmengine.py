"""mmengine: a hook that fuses the model of a Runner, whatever package it comes from.

    custom_hooks = [dict(type="fastres.FuseHook", channels_last=True)]

mmengine finds it by its scope; no import is needed. Models of fastres need no hook.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastres.convert import channels_last_, fuse_

__all__ = ["fuse_hook_class"]

_hook: type | None = None


def fuse_hook_class() -> type:
    """The class ``FuseHook``, which mmengine's ``HOOKS`` know as ``fastres.FuseHook``. ImportError without mmengine."""
    global _hook
    if _hook is None:
        base: Any = import_module("mmengine.hooks").Hook

        class FuseHook(base):
            """Before a run: :func:`fastres.fuse_` on the model, its report into the log.

            Args:
                channels_last: also put the model and its inputs into channels_last.
            """

            priority = "VERY_HIGH"

            def __init__(self, channels_last: bool = False) -> None:
                self.channels_last = channels_last

            def before_run(self, runner: Any) -> None:
                report = fuse_(runner.model)
                runner.logger.info(f"{report}")
                if self.channels_last:
                    channels_last_(runner.model)

        _hook = FuseHook
    return _hook
