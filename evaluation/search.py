"""Command line: `python -m internvl.evaluation search DIR --text TEXT`, or `--image FILE`."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ..console import printable


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="embeddings, the output of `embed`")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", nargs="+", metavar="TEXT", help="what is looked for; several are several searches")
    query.add_argument("--image", nargs="+", metavar="IMAGE", help="files or addresses, what is looked for")
    parser.add_argument("--among", choices=("images", "texts"), default="images", help="(default: images)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many are shown (default: 10)")
    parser.add_argument(
        "--index", choices=("flat", "int8", "binary"),
        help="compare whole vectors, 8 bits, or signs and then the best whole (default: flat; binary if only signs "
        "are stored)",
    )  # fmt: skip
    parser.add_argument(
        "--candidates", type=int, default=100, metavar="N",
        help="with the index binary, compared whole for each that is shown (default: 100)",
    )  # fmt: skip
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="N",
        help="put the best N in order by the matching head of an InternVL-G (default: 0)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="MODEL", help="folder or Hub name, if the model is no longer where it was")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def run(options: argparse.Namespace) -> int | None:
    """Prints what is found, the best first: score, path and text, separated by tabs."""
    from ..extras import extra
    from ..image_loading_internvl import read_image_size
    from ..image_processing_internvl import InternVLImageProcessor
    from ..kinds import check_kind
    from ..rows.image_files import is_path

    with extra("search"):
        import faiss  # noqa: F401

    from .checkpoints import checkpoint_state
    from .embeddings import ModelPlace
    from .samples import json_text
    from .searching import Searcher, check_fits
    from .vectors.files import EmbeddingFolder

    if options.top < 1 or options.rerank < 0 or options.candidates < 1:
        raise ValueError("`--top` and `--candidates` must be at least 1, and `--rerank` at least 0.")
    side = options.among.removesuffix("s")
    folder = EmbeddingFolder(options.folder)
    description = folder.description
    settings = {"index": options.index, "candidates": options.candidates}
    Searcher(folder, **settings).check(side, options.rerank)
    model = options.model or description.model
    subfolder = "" if options.model else description.subfolder
    config = check_kind(model, "InternVL-C", "InternVL-G", door="`search`", subfolder=subfolder)
    check_fits(description, config, model)
    for image in options.image or ():
        if is_path(image):
            read_image_size(Path(image), image, InternVLImageProcessor.max_image_pixels)
    if description.state and not options.model and description.state != checkpoint_state(model, subfolder):
        raise ValueError(f"`{model}` holds other weights than those of these embeddings: embed again.")
    searcher = Searcher(folder, *ModelPlace(model, subfolder).load(), **settings)
    is_text = options.text is not None
    search = searcher.by_text if is_text else searcher.by_image
    for query in options.text if is_text else options.image:
        hits = search(query, side, options.top, options.rerank)
        for rank, hit in enumerate(hits, start=1):
            if options.json:
                row = {"query": query, "rank": rank, **asdict(hit)}
                sys.stdout.write(json_text(row) + "\n")
            else:
                text = "" if hit.text is None else f"\t{printable(hit.text)}"
                sys.stdout.write(f"{hit.score:.4f}\t{printable(hit.path)}{text}\n")
    return None
