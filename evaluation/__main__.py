"""Command line: `python -m internvl.evaluation TASK MODEL`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePath

from .. import register
from ..console import exit_status
from ..kinds import check_kind
from ..renaming_internvl import RenamedOption
from ..writing import write_whole
from .checkpoints import checkpoint_state
from .commands import (
    CONTRASTIVE,
    add_data_arguments,
    add_task_arguments,
    measure_card,
    measure_on_data,
    positive,
    print_protocols,
)


@dataclass(frozen=True)
class Task:
    """A task of the command line.

    Args:
        summary: One line of help.
        numbers: The numbers of its run on generated scenes, besides `--seed`, with their defaults; none if it has no
            such run.
        kinds: Models that this run takes, see `check_kind`.
        module: Which holds `evaluate_MODULE`, the run on generated scenes.
        takes_data: Whether it is measured on data too, with `--data`.
        keeps_samples: Whether `report_MODULE` writes a report of the run on generated scenes with its samples.
    """

    summary: str
    numbers: dict[str, int] = field(default_factory=dict)
    kinds: tuple[str, ...] = CONTRASTIVE
    module: str = ""
    takes_data: bool = True
    keeps_samples: bool = False


SCENES = {"images": 500, "batch_size": 64}
CAPTIONS = Task("captions", {"images": 200, "batch_size": 64}, ("InternVL-G",), "captioning")
PROBE = Task("a linear probe of frozen InternViT features", {"train_images": 1500, **SCENES}, module="linear_probe")
TASKS = {
    "zero_shot": Task("zero-shot classification", SCENES, module="zero_shot"),
    "retrieval": Task("image-text retrieval, both ways", {"pairs": 500, "batch_size": 64}, module="retrieval"),
    "caption": CAPTIONS,
    "captioning": CAPTIONS,
    "dialogue": Task(
        "questions about images",
        {"questions": 500, "batch_size": 8},
        ("chat",),
        "dialogue",
        takes_data=False,
        keeps_samples=True,
    ),
    "pointing": Task(
        "whether maps of what was read point at what was named",
        {"images": 100},
        ("InternVL-G", "chat"),
        "pointing",
        takes_data=False,
        keeps_samples=True,
    ),
    "probe": PROBE,
    "linear_probe": PROBE,
    "segmentation": Task("semantic segmentation", {"batch_size": 1}),
}
SHARED = ("batch_size",)  # of generated scenes and of data
OLD_NAMES = {"captioning": "caption", "linear_probe": "probe"}
OLD_OPTIONS = {"images": "--pictures", "train_images": "--train-pictures"}
# Commands of a module each, which has `add_COMMAND_arguments` and `run`.
COMMANDS = {
    "compare": "says whether B is better than A, by the samples of two reports",
    "grounding": "boxes that a chat model answers, over files in RefCOCO's layout",
    "embed": "images and texts as vectors on disk",
    "look": "draws where a model looked in an image",
    "page": "a page of a report, with every sample",
    "search": "searches what `embed` wrote, by texts or images",
}

WITHOUT_MODEL = ("compare", "protocols")  # these import neither torch nor transformers


def _parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.evaluation", description="Measures what a checkpoint gets right."
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        where = " on generated scenes, or with --data on yours" if task.takes_data else " on generated scenes"
        summary = f"the former name of {OLD_NAMES[name]}" if name in OLD_NAMES else task.summary
        command = tasks.add_parser(name, help=summary, description=f"Measures {task.summary}{where}.")
        _add_model(command)
        for option, default in {"seed": 0, **task.numbers}.items():
            flag = f"--{option.replace('_', '-')}"
            shown = f"(default: {default})" if option in SHARED else f"of generated scenes (default: {default})"
            kind = int if option == "seed" else positive
            command.add_argument(flag, type=kind, default=default, metavar="N", help=shown)
            if option in OLD_OPTIONS:
                old = OLD_OPTIONS[option]
                command.add_argument(old, dest=option, type=int, action=RenamedOption, help=argparse.SUPPRESS)
        command.add_argument("--output", type=Path, metavar="FILE", help="write the report to this JSON file too")
        if task.takes_data:
            add_data_arguments(command)
            add_task_arguments(command, OLD_NAMES.get(name, name))
    command = tasks.add_parser("card", help="every protocol whose data are there, beside the paper's figures")
    _add_model(command)
    add_data_arguments(command, is_card=True)
    command.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: 64)")
    command.add_argument("--output", type=Path, metavar="DIR", help="a report each (default: MODEL-card)")
    command.add_argument("--harness-results", nargs="+", metavar="FILE", help="results of other harnesses, shown too")
    tasks.add_parser("protocols", help="lists the protocols, and where their data are looked for")
    for name, summary in COMMANDS.items():
        command = tasks.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in arguments[:1]:
            getattr(import_module(f".{name}", __package__), f"add_{name}_arguments")(command)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="folder or Hub name of a checkpoint")
    command.add_argument("--subfolder", default="", help="where in the folder the model lies")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code, 2 where the checkpoint or the data are refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    if options.task not in WITHOUT_MODEL:
        register()
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int | None:
    if options.task in COMMANDS:
        return import_module(f".{options.task}", __package__).run(options)
    if options.task == "protocols":
        return print_protocols()
    if options.task == "card":
        return measure_card(options)
    task = TASKS[options.task]
    if getattr(options, "data", None) is not None:
        options.task = OLD_NAMES.get(options.task, options.task)
        return measure_on_data(options)
    if not task.module:
        raise ValueError(f"There are no generated data of the task {options.task}: name yours by --data.")
    _evaluate_generated(options, task)
    return None


def _evaluate_generated(options: argparse.Namespace, task: Task) -> None:
    from transformers import AutoModel, AutoProcessor

    from .reports import check_report_place

    if options.output:
        check_report_place(options.output, task.module if task.keeps_samples else None)
    where = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder}
    check_kind(options.model, *task.kinds, door="this evaluation", subfolder=options.subfolder)
    module = import_module(f".{task.module}", __package__)
    numbers = {name: getattr(options, name) for name in ("seed", *task.numbers)}
    loaded = AutoModel.from_pretrained(**where).eval(), AutoProcessor.from_pretrained(**where)
    if options.output and task.keeps_samples:
        name = str(PurePath(options.model, options.subfolder))
        state = checkpoint_state(options.model, options.subfolder)
        report = getattr(module, f"report_{task.module}")(*loaded, options.output, name, state, **numbers)
    else:
        report = getattr(module, f"evaluate_{task.module}")(*loaded, **numbers)
    text = json.dumps(report, indent=2)
    print(text)
    if options.output and not task.keeps_samples:
        write_whole(options.output, f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
