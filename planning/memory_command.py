"""What a model needs and where it would go, before anything is downloaded: `python -m internvl.planning.memory_command MODEL [...]`.

MODEL is a folder with a `config.json`, that file, the Hub name of a checkpoint of this package, or one of the published sizes. The
work is in planner.py, which needs torch: it is imported once the arguments are read.
"""

import argparse
import json
import logging
import sys

from .. import register


DTYPES = ("float32", "bfloat16", "float16", "int8", "nf4")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.planning.memory_command",
        description="Says what a model needs and where it would go, from its configuration alone.",
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
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 where the model does not fit the devices, 2 for a refusal."""
    options = parse_arguments(arguments)
    register()
    from transformers.utils import logging as transformers_logging

    from .memory import describe, inspect_model, parse_max_memory

    transformers_logging.set_verbosity_error()
    # It would warn that the devices to plan for are not in this machine.
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    try:
        report = inspect_model(
            options.model,
            dtype=options.dtype,
            attention=options.attention,
            images=options.images,
            tiles=options.tiles,
            batch=options.batch,
            length=options.length,
            max_memory=None if options.max_memory is None else parse_max_memory(options.max_memory),
            device_map=options.device_map,
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    text = json.dumps(report.as_dict(), indent=2) if options.json else "\n".join(describe(report))
    sys.stdout.write(f"{text}\n")
    return 1 if report.fits is False else 0


if __name__ == "__main__":
    sys.exit(main())
