"""The one place that imports Triton, so that fastres imports where Triton does not exist.

``triton`` and ``tl`` are the real modules on Linux. Elsewhere they are stand-ins under which ``@triton.jit`` still
decorates: the operators are registered, their plain-torch CPU implementations run, and launching a kernel raises.

``INTERPRET`` is True when TRITON_INTERPRET=1 was set before this import; Triton binds it when a kernel is decorated.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["HAS_TRITON", "INTERPRET", "TRITON_ERROR", "tl", "triton"]

TRITON_ERROR = ""
try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

    HAS_TRITON = True
except ImportError as error:
    HAS_TRITON = False
    TRITON_ERROR = f"{type(error).__name__}: {error}"

    class _Missing:
        """Answers any attribute, so that annotations and decorators in kernel files evaluate."""

        def __getattr__(self, name: str) -> Any:
            return _Missing()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

        def __getitem__(self, item: Any) -> Any:
            raise RuntimeError(f"this launch needs Triton, which could not be imported ({TRITON_ERROR})")

    triton, tl = _Missing(), _Missing()  # type: ignore[assignment, unused-ignore]

INTERPRET: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
