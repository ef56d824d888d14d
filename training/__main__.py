"""Command line: `python -m internvl.training COMMAND`."""

import sys
from importlib import import_module

from .. import register
from ..console import exit_status
from .commands import training_parser, with_hyphens


INTERRUPTED = 130  # as shells have it


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line; None takes the process's own.

    Returns:
        Exit code of the command, 2 where it was refused, or 130 where training was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["costs"]:
        print("error: `costs` is now `python -m internvl.planning costs`.", file=sys.stderr)
        return 2
    parser = training_parser()
    options, flags = parser.parse_known_args(with_hyphens(arguments))
    if flags and not options.takes_trainer_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    options.flags = flags
    register()
    try:
        return exit_status(lambda: import_module(options.module, __package__).run(options, print))
    except KeyboardInterrupt:
        if not options.takes_trainer_flags:
            raise
        print("stopped: the same command with `--resume` goes on from the last checkpoint, if any.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
