"""Command line: `python -m internvl.conversion SOURCE OUT`."""

import argparse
import sys
import warnings
from dataclasses import fields
from typing import Any

from .. import register
from ..console import exit_status


DTYPES = ("auto", "float32", "float16", "bfloat16")
CONNECTORS = ("patches", "queries", "queries_and_patches")
PARTS = ("vision", "projector", "qllama", "decoder")
TARGETS = ("internvl", "published", "native")  # the first is this package's own format


def path(text: str) -> str:
    """Takes the name of a place. An empty one, as of an unset variable, would mean the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a name, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.conversion",
        description="Converts a published InternVL checkpoint to a complete repository of this package.",
        epilog="`python -m internvl.conversion assemble --help`: a new model of parts of others. (A folder of this "
        "name is reached as `./assemble`.)",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=path,
        help="folder of the checkpoint, its file with weights, or user/name on the Hub",
    )
    parser.add_argument("out", metavar="OUT", type=path, nargs="?", help="folder to write; not needed with --dry-run")
    _add_source_options(parser)
    parser.add_argument("--extract", choices=PARTS, help="write this part of the model alone")
    parser.add_argument(
        "--to", choices=TARGETS, default=TARGETS[0], help="format of the result (default: this package's)"
    )
    parser.add_argument("--llama-decoder", action="store_true", help="write an InternLM2 decoder as a plain LLaMA")
    parser.add_argument(
        "--verify",
        metavar="RECORDED",
        nargs="?",
        const="",
        help="load the result, compare every tensor with the source and, with a safetensors file of recorded "
        "`in.NAME` and `out.NAME`, the outputs",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository, e.g. user/name")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub, make a new repository private")
    parser.add_argument(
        "--with-heads",
        action="store_true",
        help="of a UperNet of mmsegmentation keep the heads too: the result is transformers' UperNet, which loads "
        "where this package is installed",
    )
    _add_result_options(parser)
    return parser


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    """Options of what is written."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: as they are)")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest file with weights (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--image-size", metavar="N", type=int, help="resize the vision tower's positions to images of N pixels"
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what SOURCE is and what it lacks."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=path, help="folder of a tokenizer, instead of the source's own"
    )
    parser.add_argument(
        "--image-token-id", metavar="N", type=int, help="id of <IMG_CONTEXT> where no tokenizer has it"
    )
    parser.add_argument("--head", metavar="FILE", help="classification head to put on a raw backbone")
    parser.add_argument(
        "--num-heads", metavar="N", type=int, help="attention heads of the tower of a raw file without a config.json"
    )
    parser.add_argument(
        "--patch-size", metavar="N", type=int, help="resize the vision tower's patch kernel to N pixels"
    )
    parser.add_argument(
        "--drop-unused-blocks",
        action="store_true",
        help="leave out blocks of a chat model's vision tower above the one that is used",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="checkpoint that SOURCE, the folder of a LoRA adapter, belongs to"
    )
    parser.add_argument(
        "--lora-alpha", metavar="N", type=float, help="alpha of LoRA adapters, instead of what their settings say"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="vision tower of a LLaVA checkpoint that has none, or in place of its own",
    )
    parser.add_argument(
        "--vision-config", metavar="FILE", help="config.json of a LLaVA checkpoint's vision tower, or its folder"
    )


def _assembly_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.conversion assemble",
        description="Makes a new model of parts of others. With a decoder it is an InternVL-Chat, which stage 3 "
        "starts from; without one an InternVL-C or -G, which stage 2 starts from. What no part holds starts from "
        "random values and is listed. Every part is a folder, or user/name on the Hub.",
    )
    parser.add_argument("out", metavar="OUT", type=path, nargs="?", help="folder to write; not needed with --dry-run")
    parser.add_argument(
        "--vision", metavar="DIR", type=path, required=True, help="an InternViT, or any model with one"
    )
    parser.add_argument(
        "--qllama", metavar="DIR", type=path, help="a QLLaMA, any model with one, or a LLaMA that is to become one"
    )
    parser.add_argument(
        "--decoder", metavar="NAME", type=path, help="a causal language model of transformers, or a chat model"
    )
    parser.add_argument(
        "--projector",
        metavar="DIR",
        type=path,
        help="projector to keep, alone or of a chat model (default: a new one)",
    )
    parser.add_argument(
        "--connector",
        choices=CONNECTORS,
        help="what the decoder sees of a tile (default: queries_and_patches with --qllama, else patches)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=path, help="folder of a tokenizer, instead of that of a part"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template (default: by the tokenizer's tokens)"
    )
    parser.add_argument("--max-tiles", metavar="N", type=int, default=12, help="most tiles of an image (default: 12)")
    parser.add_argument(
        "--select-layer", metavar="N", type=int, help="hidden state of the tower that gives the patches (default: -1)"
    )
    parser.add_argument(
        "--downsample-ratio", metavar="R", type=float, help="pixel shuffle factor per side (default: 0.5)"
    )
    parser.add_argument(
        "--num-query-token", metavar="N", type=int, help="number of new queries of a QLLaMA that has none"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random values (default: 0)")
    parser.add_argument(
        "--verify", action="store_true", help="load the result and compare every tensor with the parts"
    )
    _add_result_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one conversion, with the arguments of the process or these; returns 0, or 2 where it was refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_assembly = arguments[:1] == ["assemble"]
    parser = _assembly_parser() if is_assembly else _parser()
    options = parser.parse_args(arguments[is_assembly:])
    if options.out is None and not options.dry_run:
        parser.error("OUT is missing: name a folder to write, or look only with --dry-run")
    register()
    # What torch finds odd in a broken file is said in the one line about it.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\b")
    return exit_status(lambda: (_assemble if is_assembly else _convert)(options))


def _choices(kind: type, options: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line that are fields of a class."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}


def _writing(options: argparse.Namespace) -> dict[str, Any]:
    """How a result is written."""
    return {"max_shard_size": options.max_shard_size, "overwrite": options.overwrite, "report": print}


def _assemble(options: argparse.Namespace) -> None:
    from .assemble import AssemblyOptions, assemble_model, plan_assembly

    choices = _choices(AssemblyOptions, options)
    if options.dry_run:
        print(*plan_assembly(AssemblyOptions(**choices)).describe(), sep="\n")
        return
    assemble_model(options.out, **choices, **_writing(options), verify=options.verify)


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert
    from .plan import ConversionOptions, plan_conversion
    from .repository.publish import create_repository, upload
    from .upernet import convert_upernet

    if options.with_heads:
        if options.out is None:
            raise ValueError("`--with-heads` writes a model: name a folder to write.")
        convert_upernet(options.source, options.out, overwrite=options.overwrite, report=print)
        return
    choices = _choices(ConversionOptions, options)
    if options.dry_run:
        print(*plan_conversion(options.source, ConversionOptions(**choices)).describe(), sep="\n")
        return
    if options.push_to_hub:
        create_repository(options.push_to_hub, options.private)
    out = convert(
        options.source,
        options.out,
        **choices,
        **_writing(options),
        verify=options.verify is not None,
        recorded=options.verify or None,
    )
    if options.push_to_hub:
        print(f"Uploaded: {upload(out, options.push_to_hub)}")


if __name__ == "__main__":
    sys.exit(main())
