"""The command line's arguments. Nothing here imports torch, so that a wrong argument is reported at once.

Each command names the module whose `run(options, print_fn)` does the work and returns the exit code.
"""

import argparse
from typing import Any

from .cluster import DECODERS, SHARDINGS, Cluster


DTYPES = ("float32", "bfloat16", "float16", "int8", "nf4")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def planning_parser() -> argparse.ArgumentParser:
    """Return the parser; `module` of what it parses names the module of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.planning",
        description="Computes what a model needs and what a run costs, before anything is downloaded.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_memory(commands)
    add_costs(commands)
    return parser


def add_memory(commands: Any) -> None:
    """Add `memory` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "memory",
        help="memory of a model, and where its modules go",
        description="Computes what a model needs and where it would go, from its configuration alone. "
        "Exit code 1 where the model does not fit.",
    )
    what = "folder, config.json or Hub name of a checkpoint, or a size such as internvl-14b"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument(
        "--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help=f"its kernel (default: {ATTENTIONS[0]})"
    )
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of a row (default: 1)")
    parser.add_argument("--tiles", type=int, default=1, metavar="N", help="tiles of each image (default: 1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default: 1)")
    what = "positions of a row, images included (default: those, and 512 of text)"
    parser.add_argument("--length", type=int, metavar="N", help=what)
    what = "what each device has, e.g. cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB"
    parser.add_argument("--max-memory", metavar="DEVICE=SIZE,...", help=what)
    parser.add_argument(
        "--device-map", choices=DEVICE_MAPS, default="auto", help="how to fill the devices (default: auto)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.set_defaults(module=".memory")


def add_costs(commands: Any) -> None:
    """Add `costs` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser("costs", help="memory and days of the full recipes")
    for name, metavar, what in (
        ("gpus", "N", ""),
        ("gpu_memory", "GB", "of each "),
        ("peak_tflops", "N", "of each, dense bfloat16 "),
        ("utilization", "SHARE", "of the peak, recomputed operations counted "),
    ):
        default = getattr(Cluster, name)
        option, number = f"--{name.replace('_', '-')}", type(default)
        parser.add_argument(option, metavar=metavar, type=number, default=default, help=f"{what}(default: {default})")
    sharding = Cluster.sharding
    parser.add_argument("--sharding", choices=SHARDINGS, default=sharding, help=f"of states (default: {sharding})")
    parser.add_argument("--decoder", choices=DECODERS, default="13b", help="of stage 3 (default: 13b)")
    parser.add_argument("--text-length", metavar="N", type=int, help="tokens of text in a dialogue")
    parser.set_defaults(module=".costs")
