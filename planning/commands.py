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
    for add in (add_memory, add_costs):
        add(commands)
    return parser


def add_memory(commands: Any) -> None:
    """Add `memory` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "memory",
        help="memory of a model, and where its modules go",
        description="Computes what a model needs and where it would go, from its configuration alone. "
        "Exit code 1 where the model does not fit.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, config.json or Hub name of a checkpoint, or a size such as internvl-14b",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument(
        "--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help=f"its kernel (default: {ATTENTIONS[0]})"
    )
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of a row (default: 1)")
    parser.add_argument("--tiles", type=int, default=1, metavar="N", help="tiles of each image (default: 1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default: 1)")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="positions of a row, images included (default: those, and 512 of text)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="DEVICE=SIZE,...",
        help="what each device has, e.g. cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB",
    )
    parser.add_argument(
        "--device-map", choices=DEVICE_MAPS, default="auto", help="how to fill the devices (default: auto)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.set_defaults(module=".memory")


def add_costs(commands: Any) -> None:
    """Add `costs` to the sub-commands."""
    parser: argparse.ArgumentParser = commands.add_parser("costs", help="memory and days of the full recipes")
    parser.add_argument("--gpus", metavar="N", type=int, default=Cluster.gpus, help="default: %(default)s")
    parser.add_argument(
        "--gpu-memory", metavar="GB", type=float, default=Cluster.gpu_memory, help="of each (default: %(default)s)"
    )
    parser.add_argument(
        "--peak-tflops",
        metavar="N",
        type=float,
        default=Cluster.peak_tflops,
        help="of each, dense bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--utilization",
        metavar="SHARE",
        type=float,
        default=Cluster.utilization,
        help="of the peak, recomputed operations counted (default: %(default)s)",
    )
    parser.add_argument(
        "--sharding", choices=SHARDINGS, default=Cluster.sharding, help="of states (default: %(default)s)"
    )
    parser.add_argument("--decoder", choices=DECODERS, default="13b", help="of stage 3 (default: %(default)s)")
    parser.add_argument("--text-length", metavar="N", type=int, help="tokens of text in a dialogue")
    parser.set_defaults(module=".costs")
