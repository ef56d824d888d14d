"""Command line: `python -m internvl.training COMMAND`."""

import argparse
import sys

from . import costs, funnel, stages, validation


# Each has `add_command`, which adds sub-commands whose `run(options, tell)` returns the exit code.
COMMANDS = (validation, funnel, stages, costs)


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m internvl.training", description="Training, and what prepares it.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line; None takes the process's own.

    Returns:
        Exit code of the command, or 2 where it was refused.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options, print)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
