"""Command line: `python -m internvl.serving COMMAND`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import register
from ..console import exit_status


# Of each command the module, imported where it is asked for, which has `run`; what adds its options; its summary.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "embeddings": (
        ".embeddings_api",
        "add_embeddings_arguments",
        "texts and images as vectors, in the form of OpenAI's embeddings API",
    ),
    "page": (
        ".app.command",
        "add_app_arguments",
        "a page: chat, classification, search in a folder, captions",
    ),
}


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m internvl.serving", description="Serves models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, add_options, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"Serves {summary}.")
        if name in arguments[:1]:
            getattr(import_module(module, __package__), add_options)(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status, 2 where a model or a setting is refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    register()
    return exit_status(lambda: import_module(COMMANDS[options.command][0], __package__).run(options))


if __name__ == "__main__":
    sys.exit(main())
