"""Command line: `python -m internvl.export MODEL OUT`."""

import argparse
import sys

from .. import register
from ..console import exit_status


FORMATS = ("torch", "onnx")
PARTS = ("vision", "embeddings")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.export",
        description="Writes the vision tower or the embeddings of a model as programs for torch.export.load or ONNX "
        "Runtime, which take any batch and image size, and compares them with the model.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a model of this package")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--subfolder", metavar="NAME", default="", help="folder of the model inside MODEL")
    parser.add_argument(
        "--to", choices=FORMATS, default=FORMATS[0], help=f"format of the programs (default: {FORMATS[0]})"
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="vision: hidden states of the tower; embeddings: vectors of images and of texts (default: embeddings "
        "where the model has them)",
    )
    parser.add_argument(
        "--mode", choices=("C", "G"), help="of the embeddings of images (default: G where the model has queries)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit status, 2 where something is refused or a program differs."""
    options = _parser().parse_args(arguments)
    register()

    def run() -> int:
        from .programs import export_model

        return export_model(options, print)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
