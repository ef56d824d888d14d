"""Command line: `python -m internvl.conversion SOURCE OUT`."""

import argparse
import sys

from .convert import DTYPES, convert, plan_conversion


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.conversion",
        description="Converts a published InternVL checkpoint to a complete repository of this package.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the checkpoint, or its file with weights")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write; not needed with --dry-run")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer, instead of the source's own")
    parser.add_argument(
        "--image-token-id", metavar="N", type=int, help="id of <IMG_CONTEXT> where no tokenizer tells it"
    )
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="type of the weights (default: as they are)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest file with weights (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one conversion.

    Args:
        arguments: Of the command line; None takes the process's own.

    Returns:
        Exit code: 0, or 2 where the conversion was refused.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.out is None and not options.dry_run:
        parser.error("OUT is missing: name a folder to write, or look only with --dry-run")
    inputs = {"tokenizer": options.tokenizer, "image_token_id": options.image_token_id, "dtype": options.dtype}
    try:
        if options.dry_run:
            for line in plan_conversion(options.source, **inputs).describe():
                print(line)
            return 0
        convert(
            options.source,
            options.out,
            **inputs,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            report=print,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
