"""Command line: `python -m internvl.publishing code DIR`."""

import argparse
import sys
from pathlib import Path

from .. import register
from ..console import exit_status


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.publishing", description="Check a folder that is a repository for the Hub."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    code = commands.add_parser(
        "code",
        help="list the files that loading runs, and whose they are",
        description="List the files that loading DIR with trust_remote_code=True runs, with their SHA-256 and whether "
        "each is this package's own, and print how to load the repository by its commit. The exit status is 1 if a "
        "file is not this package's.",
    )
    code.add_argument("folder", metavar="DIR", type=Path, help="folder of the repository")
    code.add_argument("--repo", metavar="NAME", help="its name on the Hub, for the snippet")
    code.add_argument("--revision", metavar="COMMIT", help="its commit on the Hub, for the snippet")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0 if all code is this package's, 1 if some is not, 2 if the folder could not be read."""
    options = _parse_arguments(arguments)
    register()
    return exit_status(lambda: _print_code(options.folder, options.repo, options.revision))


def _print_code(folder: Path, repo: str | None, revision: str | None) -> int:
    from .code import list_code, pinned_snippet

    listing = list_code(folder)
    snippet = pinned_snippet(folder, repo, revision)
    for line in listing.describe():
        print(line)
    print()
    print(snippet)
    return 0 if listing.is_ours else 1


if __name__ == "__main__":
    sys.exit(main())
