"""The command line's arguments. Nothing here imports torch, so that a wrong argument is reported at once.

Each command names the module whose `run(options, print_fn)` does the work and returns the exit code.
"""

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..conversation_internvl import list_conversation_templates
from .models.parts import PARTS


LARGEST_SEED = 2**32 - 1  # of NumPy
LARGEST_RATE = 100  # what is larger is a slip, and overflows in the optimizer
METHODS = ("whole", "lora", "head")
SEGMENTATION_METHODS = ("linear", "head", "full", "few-shot")
TASKS = ("dialogue", "contrastive", "retrieval", "captions")
DIALOGUE_FILES = "JSON, JSON lines, parquet, names on the Hub, or a mixture file"
PAIR_FILES = "tar, parquet, JSON, JSON lines, CSV, or a mixture file"
SCALES = ("small", "full", "bundled")
LATER_SCALES = ("v1.2", "v2.5")  # of stage 3
RETRIEVAL_DATA = ("flickr30k", "flickr30k-cn", "coco")
SHARD_FILES = "tar, parquet, JSON, JSON lines, CSV or TSV"
FUNNEL_STAGES = (1, 2)  # whose data the funnel filters
PAPER_SOURCES = ("laion-en", "laion-coco", "coyo", "cc12m", "cc3m", "sbu", "wukong", "laion-multi")
TRAINER_FLAGS = (
    "Every flag of transformers' TrainingArguments is taken as well, under its own name, and overrides the recipe: "
    "--learning-rate 1e-5, --report-to tensorboard, --eval-strategy steps, --torch-compile..."
)


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
    return number


def positive_int(text: str) -> int:
    """A number of things of which there must be one."""
    return _whole_number(text, 1)


def count(text: str) -> int:
    """A number of things of which there may be none."""
    return _whole_number(text, 0)


def seed(text: str) -> int:
    """What random numbers begin with."""
    number = count(text)
    if number > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_SEED}, got {text!r}")
    return number


def share(text: str) -> float:
    """A share of rows."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text!r}")
    return number


def default_workers() -> int:
    """The CPUs of this process but one, at most eight: batches are prepared while the model trains."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def part_and_rate(text: str) -> tuple[str, float]:
    """A part of a model and its learning rate."""
    part, _, rate = text.partition("=")
    try:
        number = float(rate)
    except ValueError:
        number = math.nan
    if part not in PARTS or not 0 <= number <= LARGEST_RATE:
        rates = f"a number from 0 to {LARGEST_RATE}"
        message = f"must be PART=RATE, with one of {', '.join(PARTS)} and {rates}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return part, number


def with_hyphens(words: Iterable[str]) -> list[str]:
    """Return a command line whose flags are spelled with hyphens, where they may have underscores."""
    split = (word.partition("=") for word in words)
    return [
        (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value for flag, equals, value in split
    ]


def training_parser() -> argparse.ArgumentParser:
    """The command line's arguments; `module` of what it parses says where the command is."""
    parser = argparse.ArgumentParser(prog="python -m internvl.training", description="Training, and what prepares it.")
    parser.set_defaults(takes_trainer_flags=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        add_validate,
        add_funnel,
        add_score,
        add_dedup,
        add_prepare,
        add_finetune,
        add_stages,
        add_segmentation,
    ):
        add(commands)
    return parser


def add_validate(commands: Any) -> None:
    """Adds `validate` to the sub-commands of a command line."""
    parser = commands.add_parser("validate", help="file, line and reason of each row that cannot be trained on")
    parser.add_argument("data", metavar="DATA", nargs="+", help="data as a training command takes it")
    parser.add_argument("--pairs", action="store_true", help="image-text pairs (default: dialogues)")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: the folder of each file)")
    parser.add_argument("--model", metavar="DIR", help="encode the rows with this model's processor too")
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=positive_int,
        help="with --model: most tokens of a row (default: its tokenizer's limit)",
    )
    parser.set_defaults(module=".data.validate")


def add_funnel(commands: Any) -> None:
    """Adds `funnel` and `filter` to the sub-commands of a command line."""
    parser = commands.add_parser("funnel", help="what the filter rules of a stage remove from image-text shards")
    _add_filter_options(parser)
    parser.add_argument("--output", metavar="FILE", help="write the report to this JSON file")
    parser.set_defaults(writes_pairs=False)
    parser = commands.add_parser("filter", help="writes the pairs that the filter rules of a stage keep")
    _add_filter_options(parser)
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder of the kept pairs and of the report"
    )
    parser.set_defaults(writes_pairs=True)


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="+", help=f"{SHARD_FILES}; paths, patterns, addresses")
    parser.add_argument(
        "--stage", type=int, choices=FUNNEL_STAGES, default=2, help="rules up to this stage (default: 2)"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images that rows name by a path")
    _add_rule_options(parser)
    parser.add_argument(
        "--source", choices=PAPER_SOURCES, help="show the share that the paper kept of this source (default: of all)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the funnel to this image file")
    _add_max_bad_rate(parser)
    parser.add_argument(
        "--ray-workers", metavar="N", type=positive_int, help="filter by so many workers of Ray Data, a shard each"
    )
    parser.set_defaults(module=".data.filtering")


def _add_max_bad_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-rate",
        metavar="SHARE",
        type=share,
        default=0.01,
        help="of rows that cannot be used, of at least 1,000 rows: more of them end the run (default: 0.01)",
    )


def _add_rule_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", metavar="FILE", help="JSON table of rules, instead of the package's own")
    parser.add_argument(
        "--without",
        metavar="COLUMN",
        action="append",
        default=[],
        help="the data lacks it; its rules then pass (may be given several times)",
    )


def add_score(commands: Any) -> None:
    """Adds `score` to the sub-commands of a command line."""
    parser = commands.add_parser("score", help="fills in the similarity of image and caption where pairs have none")
    _add_score_options(parser)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the pairs")
    parser.add_argument("--ray-workers", metavar="N", type=positive_int, help="score by so many workers of Ray Data")
    parser.add_argument("--ray-gpus", metavar="N", type=float, default=1, help="GPUs of each of these (default: 1)")
    parser.set_defaults(module=".data.scoring")


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="+", help=f"{SHARD_FILES}; paths, patterns, addresses")
    parser.add_argument("--model", metavar="DIR", required=True, help="InternVL-C or -G: folder or name on the Hub")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    parser.add_argument("--mode", choices=("C", "G"), default="C", help="of images (default: C)")
    parser.add_argument("--images", metavar="DIR", help="folder of the images that rows name by a path")
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=64, help="(default: 64)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the model (default: that of its weights)",
    )  # fmt: skip
    _add_max_bad_rate(parser)


def add_prepare(commands: Any) -> None:
    """Adds `prepare` to the sub-commands of a command line."""
    parser = commands.add_parser(
        "prepare", help="scores, filters and deduplicates: raw pairs to those of stages 1 and 2"
    )
    _add_score_options(parser)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of all steps")
    _add_rule_options(parser)
    parser.add_argument(
        "--against", metavar="DATA", nargs="+", default=[], help="evaluation sets, whose images are left out"
    )
    parser.add_argument("--hashes-only", action="store_true", help="do not look for crops among the duplicates")
    parser.add_argument("--plot", metavar="FILE", help="draw what each step leaves, beside the paper's share")
    parser.set_defaults(module=".data.preparing")


def add_dedup(commands: Any) -> None:
    """Adds `dedup` to the sub-commands of a command line."""
    parser = commands.add_parser(
        "dedup", help="leaves out images that are nearly the same, and those of evaluation sets"
    )
    parser.add_argument("data", metavar="DATA", nargs="+", help=f"{SHARD_FILES}; paths, patterns, addresses")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder of the kept pairs and of the report"
    )
    parser.add_argument(
        "--against", metavar="DATA", nargs="+", default=[],
        help="evaluation sets, whose images are left out: folders of images, files as DATA, names of data sets",
    )  # fmt: skip
    parser.add_argument("--images", metavar="DIR", help="folder of the images that rows name by a path")
    parser.add_argument(
        "--min-sameness",
        metavar="SHARE",
        type=float,
        default=0.9,
        help="from which images are the same (default: 0.9)",
    )
    parser.add_argument(
        "--hashes-only",
        action="store_true",
        help="look for other sizes, qualities and mirrors alone, and not for crops",
    )
    parser.add_argument(
        "--embeddings",
        metavar="DIR",
        help="of the same data, by `evaluation embed`: also leave out what looks alike to it",
    )
    parser.add_argument(
        "--min-cosine", metavar="COSINE", type=float, default=0.97, help="of such embeddings (default: 0.97)"
    )
    _add_max_bad_rate(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw how alike the pairs of images are that were found")
    parser.set_defaults(module=".data.dedup")


def add_finetune(commands: Any) -> None:
    """Adds `finetune` to the sub-commands of a command line."""
    parser = _add_training(commands, "finetune", "a finished model goes on learning, from your data")
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="chat model, InternVL-C or InternVL-G: folder or name on the Hub"
    )
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", required=True, help="dialogues (chat models) or image-text pairs"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="default: dialogue, contrastive (InternVL-C) or retrieval (InternVL-G)"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="whole model, LoRA adapters, or the head alone (default: lora above a billion parameters, else whole)",
    )
    parser.add_argument("--train", metavar="PART", nargs="+", choices=PARTS, default=[], help="these parts instead")
    parser.add_argument(
        "--freeze", metavar="PART", nargs="+", choices=PARTS, default=[], help="leave these as they are"
    )
    parser.add_argument(
        "--epochs", metavar="N", type=positive_int, default=1, help="passes over the data (default: 1)"
    )
    parser.add_argument("--image-size", metavar="N", type=positive_int, help="side of the images or tiles in pixels")
    parser.add_argument("--max-tiles", metavar="N", type=positive_int, help="most tiles of an image")
    parser.add_argument(
        "--video-frames", metavar="N", nargs="+", type=positive_int, help="frames of a video: one number, or two"
    )
    parser.add_argument(
        "--max-length", metavar="N", type=positive_int, help="most tokens of a dialogue (default: 4096)"
    )
    parser.add_argument("--pack", action="store_true", help="pack the dialogues of a batch into one row")
    _add_matryoshka_dims(parser)
    parser.set_defaults(module=".finetune_command", stage="finetune")


def add_stages(commands: Any) -> None:
    """Adds `stage1`, `stage2`, `stage3`, `retrieval` and `captions` to the sub-commands of a command line."""
    parser = _add_stage(commands, "stage1", "contrastive training of InternViT and LLaMA", "pairs")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: that of MODEL or LLAMA)")
    parser.add_argument("--model", metavar="DIR", help="InternVL-C to go on from (default: start from nothing)")
    parser.add_argument("--llama", metavar="DIR", help="LLaMA that the text encoder starts from")
    _add_matryoshka_dims(parser)
    parser = _add_stage(commands, "stage2", "queries and cross-attention of QLLaMA", "pairs")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 1")
    parser.add_argument("--llama", metavar="DIR", help="LLaMA whose language head is taken (default: a fresh one)")
    _add_matryoshka_dims(parser)
    parser = _add_stage(commands, "retrieval", "fine-tuning for retrieval", "pairs")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 2")
    parser.add_argument("--image-size", metavar="N", type=positive_int, help="side of the images (full: 364, or 224)")
    parser.add_argument(
        "--dataset",
        choices=RETRIEVAL_DATA,
        default=RETRIEVAL_DATA[0],
        help="train for as long as on this data (full; default: flickr30k)",
    )
    parser.add_argument("--heads-only", action="store_true", help="train the text projection alone (full: at 224 px)")
    _add_matryoshka_dims(parser)
    parser = _add_stage(commands, "captions", "fine-tuning for captions", "pairs")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 2")
    parser.add_argument("--image-size", metavar="N", type=positive_int, help="side of the images (full: 364)")
    parser = _add_stage(commands, "stage3", "instruction tuning of a chat model", "dialogues")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 2")
    parser.add_argument(
        "--decoder", metavar="DIR", help="causal language model with its tokenizer (bundled: optional)"
    )
    parser.add_argument(
        "--connector",
        choices=("patches", "queries_and_patches"),
        default="patches",
        help="InternVL-Chat, simple (patches, the default) or full",
    )
    parser.add_argument(
        "--freeze-language",
        action=argparse.BooleanOptionalAction,
        help="leave the decoder as it is (default: at scale full, with the full configuration)",
    )
    parser.add_argument(
        "--also-train", choices=("qllama", "vision"), help="with a frozen decoder: what learns beside the projector"
    )
    parser.add_argument("--template", choices=list_conversation_templates(), help="conversation template")
    parser.add_argument(
        "--video-frames", metavar="N", nargs="+", type=positive_int, help="frames of a video: one number, or two"
    )


def _add_matryoshka_dims(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--matryoshka-dims", metavar="N", nargs="+", type=positive_int, default=[],
        help="lengths to which embeddings can be cut afterwards, such as 384 192 96",
    )  # fmt: skip


def fraction(text: str) -> float:
    """A share in (0, 1], as a number or as `1/16`."""
    above, _, below = text.partition("/")
    try:
        share = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and at most 1, such as 1/16, got {text!r}")
    return share


def add_segmentation(commands: Any) -> None:
    """Adds `segmentation` to the sub-commands of a command line."""
    parser = commands.add_parser(
        "segmentation", help="a head on InternViT that names every pixel", epilog=TRAINER_FLAGS, allow_abbrev=False
    )
    parser.set_defaults(takes_trainer_flags=True, module=".segmentation_command")
    parser.add_argument("--model", metavar="DIR", required=True, help="InternViT: folder or name on the Hub")
    parser.add_argument("--data", metavar="DIR", required=True, help="ADE20K, or data in its layout")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--method",
        choices=SEGMENTATION_METHODS,
        default="linear",
        help="linear head or UperNet (head) on a frozen tower, UperNet and tower (full), or linear head and tower on "
        "a share of the images (few-shot); default: linear",
    )
    parser.add_argument(
        "--fraction", metavar="SHARE", type=fraction, default=1.0, help="of the images, such as 1/16 (default: all)"
    )
    parser.add_argument("--image-size", metavar="N", type=positive_int, help="side of the crops (default: 504)")
    parser.add_argument("--steps", metavar="N", type=positive_int, help="steps, instead of the recipe's")
    parser.add_argument("--batch-size", metavar="N", type=positive_int, help="images of a step (default: 16)")
    parser.add_argument(
        "--eval-images", metavar="N", type=positive_int, help="validation images at --eval-steps (default: all)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what a stopped run left in the folder")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=count,
        default=default_workers(),
        help="processes that prepare batches while the model trains (default here: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=seed, default=0)


def _add_stage(commands: Any, name: str, what: str, data: str) -> argparse.ArgumentParser:
    parser = _add_training(commands, name, what)
    files = PAIR_FILES if data == "pairs" else DIALOGUE_FILES
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", help=f"{data}: {files} (bundled: none, scenes are generated)"
    )
    scales = {"retrieval": SCALES[:2], "captions": SCALES[:2], "stage3": (*SCALES, *LATER_SCALES)}.get(name, SCALES)
    parser.add_argument("--scale", "--recipe", choices=scales, default="small", help="of the recipe (default: small)")
    if data == "pairs":
        parser.add_argument("--funnel", type=int, choices=FUNNEL_STAGES, help="leave out pairs by this stage's rules")
    parser.set_defaults(module=".stage_command", stage=name, funnel=None)
    return parser


def _add_training(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Adds a command that trains, with what all of them take."""
    parser = commands.add_parser(name, help=what, epilog=TRAINER_FLAGS, allow_abbrev=False)
    parser.set_defaults(takes_trainer_flags=True)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: the folder of each file)")
    parser.add_argument("--streaming", action="store_true", help="read dialogues front to back, without an index")
    parser.add_argument("--eval-data", metavar="FILE", nargs="+", default=[], help="held-out data to be measured on")
    _add_max_bad_rate(parser)
    parser.add_argument("--resume", action="store_true", help="go on from what a stopped run left in the folder")
    parser.add_argument("--steps", metavar="N", type=positive_int, help="steps of each phase, instead of the recipe's")
    parser.add_argument(
        "--batch-size", metavar="N", type=positive_int, help="samples of a step, instead of the recipe's"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=count,
        default=default_workers(),
        help="processes that prepare batches while the model trains (default here: %(default)s)",
    )
    parser.add_argument(
        "--learning-rates", metavar="PART=RATE", nargs="+", type=part_and_rate, default=[], help="of single parts"
    )
    parser.add_argument("--profile-steps", metavar="N", type=count, default=0, help="record N steps of each phase")
    parser.add_argument("--seed", metavar="N", type=seed, default=0)
    parser.add_argument("--lora-rank", metavar="N", type=count, default=0, help="train LoRA adapters of this rank")
    parser.add_argument(
        "--lora-parts", metavar="PART", nargs="+", choices=PARTS, default=[], help="parts that get them"
    )
    return parser
