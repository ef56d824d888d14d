"""Command line: `python -m internvl.evaluation embed MODEL --data DATA --output DIR`.

On several devices: `accelerate launch --num_processes 8 -m internvl.evaluation embed ...`.
"""

import argparse
import sys
from pathlib import Path

from ..console import printable
from .commands import DTYPES


SHORT_MODES = {"C": "InternVL-C", "G": "InternVL-G", "queries": "queries"}


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of an InternVL-C or -G")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA",
        help="folders of images and texts, files (JSON lines, JSON, CSV, TSV, parquet, tar, with `*`), names of data "
        "sets, or addresses (hf://, https://)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the embeddings")
    parser.add_argument(
        "--mode", choices=SHORT_MODES, default="C",
        help="of images; queries gives one vector for each query of QLLaMA (default: C)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("float32", "float16", "int8", "binary"), default="float16",
        help="in which vectors are stored (default: float16)",
    )  # fmt: skip
    parser.add_argument("--only", choices=("images", "texts"), help="(default: both)")
    parser.add_argument("--dims", type=int, metavar="N", help="cut vectors, if the checkpoint was trained for it")
    parser.add_argument("--images", metavar="DIR", help="folder of the images that rows name by a path")
    parser.add_argument("--image-column", metavar="NAME", help="of rows (default: the first that is known)")
    parser.add_argument("--text-column", metavar="NAME", help="of rows (default: the first that is known)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--rows-per-file", type=int, default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument("--max-bad-rate", type=float, default=0.01, metavar="SHARE", help="of rows (default: 0.01)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (default: that of its weights)")
    parser.add_argument("--ray-workers", type=int, metavar="N", help="embed by so many workers of Ray Data")
    parser.add_argument(
        "--ray-gpus", type=float, default=1, metavar="N", help="GPUs of each of these workers (default: 1)"
    )


def run(options: argparse.Namespace) -> int | None:
    """Embeds data; a command that was stopped goes on where it was."""
    from accelerate import PartialState

    from ..extras import extra
    from ..kinds import check_kind

    with extra("search"):
        import pyarrow  # noqa: F401

    from .embeddings import ModelPlace
    from .indexing import Job, begin, embed_by_ray, embed_data
    from .vectors.sources import Columns

    config = check_kind(options.model, "InternVL-C", "InternVL-G", door="`embed`", subfolder=options.subfolder)
    names = {f"{side}_column": getattr(options, f"{side}_column") for side in ("image", "text")}
    columns = {side: (names[f"{side}_column"],) for side in ("image", "text") if names[f"{side}_column"]}
    job = Job(
        data=tuple(options.data),
        output=str(options.output),
        mode=SHORT_MODES[options.mode],
        precision=options.precision,
        dims=options.dims,
        sides=(options.only.removesuffix("s"),) if options.only else ("image", "text"),
        columns=Columns(**columns, folder=options.images),
        rows_per_file=options.rows_per_file,
        batch_size=options.batch_size,
        max_bad_rate=options.max_bad_rate,
    )
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    place = ModelPlace(model, options.subfolder, options.dtype)
    folder, _ = begin(job, place, config)
    state = PartialState()
    if folder.unfinished_parts():
        if options.ray_workers:
            folder = embed_by_ray(job, place, config, options.ray_workers, options.ray_gpus)
        else:
            model_and_processor = place.load(state.device)
            folder = embed_data(*model_and_processor, job, place, state.process_index, state.num_processes)
    if missing := folder.unfinished_parts():
        if state.num_processes == 1:
            raise ValueError(f"{len(missing)} parts are missing in `{folder.path}`: give the command again.")
        return None  # another process is at work on them
    count = folder.count()
    left_out = f", {count['bad_rows']} rows left out" if count["bad_rows"] else ""
    if not count["images"] + count["texts"]:
        raise ValueError(f"Nothing in {printable(', '.join(options.data))} could be embedded{left_out}.")
    sys.stdout.write(f"{folder.path}: {count['images']} images, {count['texts']} texts{left_out}\n")
    return None
