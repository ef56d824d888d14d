"""`prepare`: the whole way from raw pairs to those of stages 1 and 2.

    scored/pairs     with the similarity of image and caption
    extremes/pairs   what the rules of stage 1 keep
    stage1/pairs     without near duplicates and images of evaluation sets: the data of stage 1
    stage2/pairs     what the rules of stage 2 keep: the data of stage 2
    cuts.json        what each step left

Every step is the command of its own that it is named after, and goes on where it was stopped.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePath

import torch

from ...evaluation.vectors.sources import Columns, item_of_row
from ...rows.image_files import is_path
from ...rows.shards import find_shards, read_shards
from ...writing import write_whole
from .dedup import DedupJob, dedup_data
from .filter_expressions import check_columns_of_rows
from .filtering import FilterJob, filter_data
from .filters import FILTERS, Filter, paper_share, read_filters, with_optional
from .pair_files import ending_of
from .plots import check_plot, plot_cuts
from .scoring import SCORE, score_data, score_job


CUTS = "cuts.json"


def _pairs_of(folder: Path) -> tuple[str, ...]:
    """The shards that a step wrote.

    Raises:
        ValueError: If nothing is left.
    """
    if not any((folder / "pairs").iterdir()):
        raise ValueError(f"No pairs are left in `{folder}`: its rules removed all.")
    return tuple(find_shards(str(folder / "pairs" / "*")))


def check_first_rows(shards: Sequence[str], rules: Sequence[Filter], images: str | None = None) -> str | None:
    """Checks before any pair is scored that the later steps find what they need, by the first rows of shards.

    Args:
        shards: Files, of which one for each folder and format is opened.
        rules: Of both stages.
        images: Folder of the images that rows name by a path.

    Returns:
        That folder; by default the folder of the shards if their rows name images by a path, which later steps read
        from shards that lie elsewhere.

    Raises:
        MissingColumnError: If a rule that is not optional finds no column.
        ValueError: If rows name images by a path, and shards lie in several folders.
    """
    folders = {str(Path(shard).resolve().parent) for shard in shards if "://" not in shard}
    found = images
    for shard in {(PurePath(shard).parent, ending_of(shard)): shard for shard in reversed(shards)}.values():
        with closing(read_shards([shard])) as rows:
            first = list(islice(rows, 1))
            check_columns_of_rows(chain(first, rows), rules, images, (SCORE,))
        named = item_of_row(first[0], Columns(folder=images)).image if first else None
        if images is None and folders and isinstance(named, str) and is_path(named):
            if len(folders) > 1:
                raise ValueError(
                    f"The rows of `{shard}` name images by a path, and the data lie in {len(folders)} folders: name "
                    "the folder below which all images lie by `--images`."
                )
            found = next(iter(folders))
    return found


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `prepare`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    if options.plot:
        check_plot(options.plot, options.output)
    output = options.output
    rules = with_optional(FILTERS if options.rules is None else read_filters(options.rules), options.without)
    scoring = score_job(options, output / "scored")
    images = check_first_rows(scoring.shards, rules, options.images)
    embedder = scoring.embedder("cuda" if torch.cuda.is_available() else "cpu")
    total = max(sum(count.rows for count in score_data(scoring, embedder)), 1)
    rates = {"images": images, "max_bad_rate": options.max_bad_rate}
    extremes = FilterJob(_pairs_of(output / "scored"), 1, rules, str(output / "extremes"), **rates)
    left: list[tuple[str, int, float | None]] = []
    left.append(("rules of stage 1", filter_data(extremes)["kept"], None))
    unique = DedupJob(
        _pairs_of(output / "extremes"),
        str(output / "stage1"),
        against=tuple(options.against),
        crops=not options.hashes_only,
        **rates,
    )
    left.append(("duplicates, evaluation sets", dedup_data(unique)["kept"], paper_share(1)))
    strict = replace(extremes, shards=_pairs_of(output / "stage1"), stage=2, output=str(output / "stage2"))
    left.append(("rules of stage 2", filter_data(strict)["kept"], paper_share(2)))
    cuts = [{"step": "raw", "pairs": total, "share": 1.0, "paper_share": 1.0}]
    cuts += [{"step": step, "pairs": kept, "share": kept / total, "paper_share": share} for step, kept, share in left]
    write_whole(output / CUTS, json.dumps(cuts, indent=2) + "\n")
    for cut in cuts:
        beside = "" if cut["paper_share"] is None else f", the paper {cut['paper_share']:.2%}"
        print_fn(f"{cut['step']:<30} {cut['pairs']:>10} pairs ({cut['share']:.2%}{beside})")
    if options.plot:
        plot_cuts(cuts, options.plot)
    folder = f", with `--images {images}`" if images else ""
    print_fn(f"Stage 1 trains on {output / 'stage1' / 'pairs'}, stage 2 on {output / 'stage2' / 'pairs'}{folder}.")
    return 0


__all__ = ["check_first_rows"]
