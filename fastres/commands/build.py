"""Compile the loops that a CPU trains and infers faster by; needs a C++ compiler and a second or two.

Nothing else builds them, and everything runs without them. They go to FASTRES_CACHE, else to ``fastres`` in the user's
cache directory, and are used from then on, until sources or processor change; FASTRES_NATIVE=off leaves them alone.
CXX names another compiler. A container builds them on the kind of machine that it will run on.
"""

from __future__ import annotations

import argparse

from fastres.kernels import _native

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    path = _native.build()
    print(f"built {path}")
    obstacle = _native.native_obstacle()
    if obstacle:
        print(f"not used: {obstacle}")
    return int(bool(obstacle) and _native._Setting.native != "off")
