"""Command line: `python -m internvl.planning COMMAND`."""

import sys
from importlib import import_module

from .. import register
from ..console import exit_status
from .commands import planning_parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code, 2 where it is refused."""
    options = planning_parser().parse_args(arguments)
    register()
    return exit_status(lambda: import_module(options.module, __package__).run(options, print))


if __name__ == "__main__":
    sys.exit(main())
