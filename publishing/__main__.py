"""Command line: `python -m internvl.publishing code|check|push DIR`."""

import argparse
import sys
from pathlib import Path

from .. import register
from ..console import exit_status, printable


CHECK = (
    "say whether a folder is fit for the Hub",
    "Look for faults in DIR: strays, links out of it, access tokens, checksums, index and names of the weights, code "
    "that is not this package's, the card, and whether every model loads in a fresh process. Nothing is asked of the "
    "Hub. The exit status is 1 if there is a fault.",
)
PUSH = (
    "check a folder, and send it to the Hub",
    "Check DIR as `check` does, and send its files to REPO if there is no fault. Run again, a push that broke off "
    "goes on. Log in with `hf auth login` first, or set HF_TOKEN.",
)


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
    check, push = (
        commands.add_parser(name, help=summary, description=text)
        for name, summary, text in (("check", *CHECK), ("push", *PUSH))
    )
    for command in (check, push):
        command.add_argument("folder", metavar="DIR", type=Path, help="folder of the repository")
        command.add_argument("--no-load", action="store_true", help="do not load the models in a fresh process")
        command.add_argument("--trust", action="store_true", help="code that is not this package's is no fault")
    push.add_argument("repo", metavar="REPO", help="user/name on the Hub; made if it is not there")
    push.add_argument("--dry-run", action="store_true", help="list what would be sent, and ask nothing of the Hub")
    push.add_argument("--private", action="store_true", help="a repository that is made is private")
    push.add_argument("--revision", metavar="BRANCH", help="an existing branch (default: the main one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0 if all is well, 1 if something was found, 2 if the folder could not be read."""
    options = _parse_arguments(arguments)
    register()
    if options.command == "code":
        return exit_status(lambda: _print_code(options.folder, options.repo, options.revision))
    return exit_status(lambda: _inspect(options))


def _print_code(folder: Path, repo: str | None, revision: str | None) -> int:
    from .code import list_code, pinned_snippet

    listing = list_code(folder)
    snippet = pinned_snippet(folder, repo, revision)
    for line in listing.describe():
        print(line)
    print()
    print(snippet)
    return 0 if listing.is_ours else 1


def _inspect(options: argparse.Namespace) -> int:
    from .check import inspect_folder
    from .push import push_folder

    found = inspect_folder(options.folder, load=not options.no_load, trust=options.trust)
    if options.command == "push" and options.dry_run:
        for name in found.files:
            size = (found.folder / name).stat().st_size if (found.folder / name).is_file() else 0
            print(f"{size:>14,}  {printable(name)}")
    for line in found.describe():
        print(line)
    if found.faults:
        return 1
    if options.command == "push" and not options.dry_run:
        print(f"Sent: {push_folder(found, options.repo, options.private, options.revision)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
