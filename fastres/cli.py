"""The command line: ``python -m fastres COMMAND``.

A command is a module of ``fastres.commands``: its name is the module's, its help the first line of the docstring;
``add_arguments(parser)`` declares its arguments and ``run(args)`` returns the exit code. Adding a file adds a command.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from fastres import commands

__all__ = ["commands_by_name", "main"]


def commands_by_name() -> dict[str, ModuleType]:
    """Every command's module, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"fastres.commands.{name}") for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 a finding or a failure, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m fastres", description="ResNets on fused kernels.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands_by_name().items():
        text = module.__doc__ or ""
        sub = parsers.add_parser(
            name,
            help=text.strip().splitlines()[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"fastres {args.command}: {message}", file=sys.stderr)
        return 1
