"""Command line: `python -m internvl.publishing code DIR`."""

import argparse
import sys
from pathlib import Path

from .. import register


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.publishing", description="Looks at a folder that is a repository for the Hub."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    code = commands.add_parser(
        "code",
        help="the files that loading runs, and whose they are",
        description="Lists the files that loading DIR with trust_remote_code=True runs, with their SHA-256, says whether each is this "
        "package's own, and prints how to load the repository by its commit. Exit code 1 where something is not this package's.",
    )
    code.add_argument("folder", metavar="DIR", type=Path, help="folder of the repository")
    code.add_argument("--repo", metavar="NAME", help="its name on the Hub, for the snippet")
    code.add_argument("--revision", metavar="COMMIT", help="its commit on the Hub, for the snippet")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line; None takes the process's own.

    Returns:
        Exit code: 0 where all code is this package's, 1 where something is not, 2 where the folder could not be read.
    """
    options = build_parser().parse_args(arguments)
    register()
    from .code import list_code, pinned_snippet

    try:
        listing = list_code(options.folder)
        snippet = pinned_snippet(options.folder, options.repo, options.revision)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for line in listing.describe():
        print(line)
    print()
    print(snippet)
    return 0 if listing.is_ours else 1


if __name__ == "__main__":
    sys.exit(main())
