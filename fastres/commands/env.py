"""Versions, processor, GPU, backend and tuning table in use.

``--json`` prints the same for programs.
"""

from __future__ import annotations

import argparse
import json

from fastres.commands._text import columns
from fastres.environment import environment

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [[k.replace("_", " "), "none" if v == "" else str(v)] for k, v in found.items()]
    print(columns(rows))
    return 0
