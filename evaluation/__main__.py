"""Command line: `python -m internvl.evaluation TASK MODEL`."""

import argparse
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .. import register
from ..console import exit_status
from ..kinds import check_kind
from ..renaming_internvl import RenamedOption


@dataclass(frozen=True)
class Task:
    """A task of the command line, run by `evaluate_TASK` of the module called TASK.

    Args:
        summary: One line of help.
        numbers: Its options besides `--seed`, with their defaults.
        kinds: Models that it takes, see `check_kind`.
    """

    summary: str
    numbers: dict[str, int]
    kinds: tuple[str, ...] = ("InternVL-C", "InternVL-G")


TASKS = {
    "zero_shot": Task(
        "zero-shot classification of held-out generated images in five languages", {"images": 500, "batch_size": 64}
    ),
    "retrieval": Task("image-text retrieval over held-out scenes in five languages", {"pairs": 500, "batch_size": 64}),
    "captioning": Task(
        "captions of held-out scenes in five languages", {"images": 200, "batch_size": 64}, ("InternVL-G",)
    ),
    "dialogue": Task("questions about held-out generated images", {"questions": 500, "batch_size": 8}, ("chat",)),
    "linear_probe": Task(
        "linear probe of frozen InternViT features", {"train_images": 1500, "images": 500, "batch_size": 64}
    ),
}
OLD_OPTIONS = {"images": "--pictures", "train_images": "--train-pictures"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.evaluation", description="Measures what a checkpoint gets right."
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        command = tasks.add_parser(name, help=task.summary, description=f"Measures {task.summary}.")
        command.add_argument("model", metavar="MODEL", help="folder or Hub name of a checkpoint")
        command.add_argument("--subfolder", default="", help="where in the folder the model lies")
        for option, default in {"seed": 0, **task.numbers}.items():
            name = f"--{option.replace('_', '-')}"
            command.add_argument(name, type=int, default=default, metavar="N", help=f"(default: {default})")
            if option in OLD_OPTIONS:
                old = OLD_OPTIONS[option]
                command.add_argument(old, dest=option, type=int, action=RenamedOption, help=argparse.SUPPRESS)
        command.add_argument("--output", type=Path, metavar="FILE", help="write the report to this JSON file too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code, 2 where the checkpoint is refused."""
    options = vars(_parser().parse_args(arguments))
    register()
    return exit_status(lambda: _evaluate(**options))


def _evaluate(task: str, model: str, subfolder: str, output: Path | None, **numbers: int) -> None:
    from transformers import AutoModel, AutoProcessor

    where = {"pretrained_model_name_or_path": model, "subfolder": subfolder}
    check_kind(model, *TASKS[task].kinds, door="this evaluation", subfolder=subfolder)
    evaluate = getattr(import_module(f".{task}", __package__), f"evaluate_{task}")
    report = evaluate(AutoModel.from_pretrained(**where).eval(), AutoProcessor.from_pretrained(**where), **numbers)
    text = json.dumps(report, indent=2)
    if output:
        output.write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
