"""Command line: `python -m internvl.reproduction run|report|ablation ...`; each command is a module."""

import runpy
import sys


COMMANDS = ("run", "report", "ablation")


def main() -> None:
    """Run one command with the arguments that follow it."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        is_help = command in ("-h", "--help")
        print(
            f"usage: python -m internvl.reproduction {{{','.join(COMMANDS)}}} ...",
            file=sys.stdout if is_help else sys.stderr,
        )
        raise SystemExit(0 if is_help else 2)
    del sys.argv[1]
    runpy.run_module(f"{__package__}.{command}", run_name="__main__")


if __name__ == "__main__":
    main()
