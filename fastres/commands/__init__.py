"""One module a command of ``python -m fastres``; see ``fastres.cli``."""
