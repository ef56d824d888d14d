"""Command line: `python -m internvl.reproduction run|report|ablation|funnel|maps|cards`."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .. import register
from ..console import exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.reproduction", description="The bundled checkpoint from nothing, and its results."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run, report, ablation, funnel, maps, cards = (
        commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        for name, summary in (
            ("run", "trains all stages of the bundled checkpoint and evaluates them"),
            ("report", "evaluates a run and writes its page of results"),
            ("ablation", "trains without one stage or another, at a small scale"),
            ("funnel", "trains stage 1 on polluted pairs, and on what the data funnel keeps of them"),
            ("maps", "draws where the bundled models looked in five bundled images"),
            ("cards", "writes the results into the cards of the bundled models"),
        )
    )
    for command in (run, ablation, funnel):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
        command.add_argument("--resume", action="store_true", help="resume from the last saved step in the folder")
        command.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
        command.add_argument("--fp32", action="store_true", help="for CPUs without fast bfloat16")
    cards.add_argument("--root", type=Path, metavar="DIR", help="top folder of the repository (default: this one)")
    maps.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png")
    report.add_argument("run", type=Path, metavar="RUN", help="folder that the command `run` wrote")
    report.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (default: RUN/results)")
    report.add_argument("--ablation", type=Path, metavar="FILE", help="report of the command `ablation`")
    report.add_argument("--resume", action="store_true", help="keep finished evaluations")
    ablation.add_argument("--scale", type=float, default=0.1, help="share of the run's steps (default: 0.1)")
    for command in (ablation, funnel):
        command.add_argument(
            "--seeds", type=int, default=3, metavar="N", help="number of seeds, from --seed (default: 3)"
        )
    for name, default, summary in (
        ("raw-pairs", 8000, "polluted pairs of a seed"),
        ("steps", 600, "steps of every training, of 64 pairs"),
        ("images", 300, "held-out images of each kind, and pairs"),
    ):
        text = f"{summary} (default: {default})"
        funnel.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    text = 'what is trained on beside all pairs, such as "rules of stage 1" (default: every variant)'
    funnel.add_argument("--variants", nargs="*", metavar="NAME", help=text)
    for name in ("questions", "pairs"):
        ablation.add_argument(f"--{name}", type=int, default=500, metavar="N", help="of the evaluation (default: 500)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code, 2 where it is refused."""
    options = _parser().parse_args(arguments)
    register()
    return exit_status(lambda: import_module(f".{options.command}", __package__).run(options))


if __name__ == "__main__":
    sys.exit(main())
