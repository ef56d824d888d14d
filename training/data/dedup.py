"""`dedup`: leaves out images that are nearly the same as others of the data, or as images of evaluation sets.

    dedup.json                    what was asked for
    fingerprints/000000.parquet   of the images of a shard; `against-000000.parquet` of an evaluation set
    pairs/000000.tar              kept pairs of a shard, in the format of that shard
    removed.jsonl                 each image that is left out, what it is the same as, and how alike both are
    report.json

Of images that are the same the largest is kept, the first of the largest. Files appear whole: a command that was
stopped goes on with what is not there.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...evaluation.vectors.files import EmbeddingFolder
from ...evaluation.vectors.indexes import StoredVectors, search_vectors
from ...evaluation.vectors.sources import Columns, EmbeddedItem, Part, find_parts, fingerprint_of, item_of_row
from ...extras import extra
from ...image_loading_internvl import read_image, to_pil
from ...image_processing_internvl import InternVLImageProcessor
from ...rows.bad_rows import BadRows
from ...rows.shards import find_shards, read_shards
from ...writing import write_whole
from .fingerprints import SIDE, fingerprint
from .near_duplicates import MIN_SAMENESS, NEIGHBOURS, Fingerprints, groups_of, near_duplicates
from .pair_files import begin_output, copy_rows, refuse_cut_shard, states_of, write_once
from .plots import check_plot, plot_sameness


with extra("filter"):
    import pyarrow
    from pyarrow import parquet

DESCRIPTION, REMOVED, REPORT = "dedup.json", "removed.jsonl", "report.json"
IMAGES_AT_ONCE = 64
GRID_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class DedupJob:
    """What is looked for, and where.

    Args:
        shards: Files, as `find_shards` names them.
        output: Folder.
        against: Evaluation sets, see `find_parts`.
        images: Folder of the images that rows name by a path.
        min_sameness: From which two images are the same, see `sameness`.
        crops: Whether crops are looked for, too.
        embeddings: Folder of embeddings of the same data; images alike in these are left out, too.
        min_cosine: Of these.
        max_bad_rate: Largest share of images that cannot be read.
    """

    shards: tuple[str, ...]
    output: str
    against: tuple[str, ...] = ()
    images: str | None = None
    min_sameness: float = MIN_SAMENESS
    crops: bool = True
    embeddings: str | None = None
    min_cosine: float = 0.97
    max_bad_rate: float = 0.01

    @property
    def columns(self) -> Columns:
        """Where rows hold their images."""
        return Columns(folder=self.images)

    def __post_init__(self) -> None:
        for name in ("min_sameness", "min_cosine"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Images:
    """Images of data, without those that cannot be read.

    Args:
        parts: Number of the shard of each, (B,).
        numbers: Of each in its shard, (B,).
        ids: Of each.
        pixels: Of each, (B,).
        prints: Of all.
        broken: How many cannot be read.
    """

    parts: np.ndarray
    numbers: np.ndarray
    ids: list[str]
    pixels: np.ndarray
    prints: Fingerprints
    broken: int

    def __len__(self) -> int:
        return len(self.ids)


# -------------------------------------------------------------------------------------------------------- fingerprints
def _decoded(item: EmbeddedItem) -> tuple[int, bytes] | str:
    """Pixels and fingerprint, or what is wrong."""
    if item.fault or item.image is None:
        return item.fault or "There is no image."
    limit = InternVLImageProcessor.max_image_pixels
    try:
        image = to_pil(read_image(item.image, "The image", limit), "The image", limit, True, None)
    except ValueError as error:
        return str(error)
    return image.width * image.height, fingerprint(image).tobytes()


def write_fingerprints(items: Iterable[EmbeddedItem], file: Path, bad_rows: BadRows) -> None:
    """Writes the fingerprints of images.

    Args:
        items: With images.
        file: Parquet.
        bad_rows: The limit on images that cannot be read, and their count.
    """
    columns: dict[str, list[Any]] = {"number": [], "id": [], "pixels": [], "grid": []}
    rest, number, broken = iter(items), 0, 0
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(rest, IMAGES_AT_ONCE)):
            for item, found in zip(batch, pool.map(_decoded, batch), strict=True):
                is_bad = isinstance(found, str)
                bad_rows.count(item.id if is_bad else None, found if is_bad else "")
                broken += is_bad
                if not isinstance(found, str):
                    for name, value in zip(columns, (number, item.id, *found), strict=True):
                        columns[name].append(value)
                number += 1
    kinds = {"number": pyarrow.int64(), "id": pyarrow.string(), "pixels": pyarrow.int64()}
    schema = pyarrow.schema({**kinds, "grid": pyarrow.binary(GRID_BYTES)}, metadata={"broken": str(broken)})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns, schema=schema), sink)
    write_whole(file, sink.getvalue())


def read_fingerprints(files: Sequence[Path]) -> Images:
    """Reads what `write_fingerprints` wrote for shards."""
    tables = [parquet.read_table(file) for file in files]
    grids = [np.frombuffer(b"".join(table["grid"].to_pylist()), np.uint8) for table in tables]
    return Images(
        parts=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        numbers=_joined([table["number"].to_numpy() for table in tables]),
        ids=[name for table in tables for name in table["id"].to_pylist()],
        pixels=_joined([table["pixels"].to_numpy() for table in tables]),
        prints=Fingerprints(_joined(grids).astype(np.uint8).reshape(-1, 3, SIDE, SIDE)),
        broken=sum(int(table.schema.metadata[b"broken"]) for table in tables),
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _fingerprint_all(job: DedupJob, parts: Sequence[Part]) -> tuple[Images, Images]:
    """Makes the fingerprints that are not there, of the data and of the parts of the evaluation sets."""
    folder = Path(job.output, "fingerprints")

    def rows_of(shard: str) -> Iterator[EmbeddedItem]:
        for row in read_shards([shard]):
            refuse_cut_shard(shard, row)
            yield item_of_row(row, job.columns)

    sources: list[tuple[Path, Callable[[], Iterable[EmbeddedItem]]]] = [
        (folder / f"{number:06d}.parquet", lambda shard=shard: rows_of(shard))  # type: ignore[misc]
        for number, shard in enumerate(job.shards)
    ]
    sources += [(folder / f"against-{number:06d}.parquet", part.read) for number, part in enumerate(parts)]
    for file, read in tqdm(sources, "fingerprints", leave=False, disable=None, delay=1):
        if not file.is_file():
            write_fingerprints(read(), file, BadRows(max_rate=job.max_bad_rate, limit="`--max-bad-rate`"))
    files = [file for file, _ in sources]
    return read_fingerprints(files[: len(job.shards)]), read_fingerprints(files[len(job.shards) :])


# ----------------------------------------------------------------------------------------------------------- decisions
def embedding_pairs(job: DedupJob, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Finds pairs of images whose embeddings are close, see `near_duplicates`.

    Raises:
        OSError: If there are no embeddings.
        ValueError: If they are not finished, hold several vectors for an image, or are of other data.
    """
    folder = EmbeddingFolder(str(job.embeddings))
    vectors = StoredVectors(folder, "image")
    if vectors.stored.shape[1] > 1:
        raise ValueError(f"`{folder.path}` holds several vectors for an image: embed in mode C or G.")
    number_of = {name: number for number, name in enumerate(ids)}
    names = [item["id"] for item in vectors.items(np.arange(len(vectors)))]
    numbers = np.array([number_of.get(name, -1) for name in names], np.int64)
    if len(ids) and not (numbers >= 0).any():
        raise ValueError(f"`{folder.path}` holds embeddings of other data: none of the images is in it.")
    pairs, scores = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for start, block in vectors.blocks():
        score, found = search_vectors(block[:, 0], vectors, NEIGHBOURS)
        query, place = np.nonzero(score >= job.min_cosine)
        pair = np.sort(np.stack([numbers[start + query], numbers[found[query, place]]], axis=1), axis=1)
        is_pair = (pair[:, 0] >= 0) & (pair[:, 0] != pair[:, 1])
        pairs.append(pair[is_pair])
        scores.append(score[query, place][is_pair])
    return np.concatenate(pairs), np.concatenate(scores)


def _removed(job: DedupJob, images: Images, others: Images) -> list[dict[str, Any]]:
    """Each image that is left out, and why."""
    removed: dict[int, dict[str, Any]] = {}
    pairs, scores = near_duplicates(images.prints, others.prints, job.min_sameness, job.crops)
    for place in np.argsort(scores, kind="stable").tolist():  # the most alike last
        number, other = pairs[place].tolist()
        removed[number] = {"kind": "evaluation", "same_as": others.ids[other], "sameness": float(scores[place])}
    pairs, scores = near_duplicates(images.prints, None, job.min_sameness, job.crops)
    if job.embeddings:
        more, more_scores = embedding_pairs(job, images.ids)
        pairs, scores = np.concatenate([pairs, more]), np.concatenate([scores, more_scores])
    best_of = dict.fromkeys(pairs.ravel().tolist(), 0.0)
    for pair, score in zip(pairs.tolist(), scores.tolist(), strict=True):
        for number in pair:
            best_of[number] = max(best_of[number], score)
    is_left = ~np.isin(pairs, list(removed)).any(axis=1)
    groups = groups_of(len(images), pairs[is_left])
    order = np.lexsort((np.arange(len(images)), -images.pixels))
    kept: dict[int, int] = {}
    for number in order.tolist():
        if number in removed:
            continue
        best = kept.setdefault(int(groups[number]), number)
        if best != number:
            removed[number] = {"kind": "duplicate", "same_as": images.ids[best], "sameness": best_of[number]}
    return [{"number": number, "id": images.ids[number], **removed[number]} for number in sorted(removed)]


def dedup_data(job: DedupJob) -> dict[str, Any]:
    """Leaves out what is there twice, and what evaluation sets have.

    Returns:
        The report: "seen", "kept", "broken", "duplicates", "evaluation" (images of the data that evaluation sets
        have), "against" (their images), and "sameness", how alike the pairs were.

    Raises:
        OSError: If there are no such data.
        TooManyBadRowsError: If too many images cannot be read.
        ValueError: If the folder holds something else.
    """
    parts = find_parts(job.against, Columns(), 4096) if job.against else []
    description = {
        "shards": states_of(job.shards), "against": fingerprint_of(parts, {}), "images": job.images,
        "min_sameness": job.min_sameness, "crops": job.crops, "embeddings": job.embeddings,
        "min_cosine": job.min_cosine,
    }  # fmt: skip
    begin_output(job.output, DESCRIPTION, description)
    images, others = _fingerprint_all(job, parts)
    removed = _removed(job, images, others)
    lines = [json.dumps({name: value for name, value in row.items() if name != "number"}) for row in removed]
    write_whole(Path(job.output, REMOVED), "".join(f"{line}\n" for line in lines))
    is_kept = np.ones(len(images), bool)
    is_kept[[row["number"] for row in removed]] = False
    for part, shard in enumerate(tqdm(job.shards, "pairs", leave=False, disable=None, delay=1)):
        chosen = set(images.numbers[(images.parts == part) & is_kept].tolist())
        write_once(job.output, shard, part, CopyCount, partial(_copied, shard, chosen))
    kinds = [row["kind"] for row in removed]
    return {
        "seen": len(images),
        "kept": int(is_kept.sum()),
        "broken": images.broken,
        "duplicates": kinds.count("duplicate"),
        "evaluation": kinds.count("evaluation"),
        "against": len(others),
        "sameness": [round(row["sameness"], 4) for row in removed],
    }


@dataclass
class CopyCount:
    """Kept pairs of a shard."""

    kept: int


def _copied(shard: str, numbers: set[int], write: Callable[[Any], None]) -> CopyCount:
    copy_rows(shard, numbers, write)
    return CopyCount(len(numbers))


# --------------------------------------------------------------------------------------------------------- the command
def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `dedup`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    if options.plot:
        check_plot(options.plot, options.output)
    job = DedupJob(
        shards=tuple(find_shards(options.data)),
        output=str(options.output),
        against=tuple(options.against),
        images=options.images,
        min_sameness=options.min_sameness,
        crops=not options.hashes_only,
        embeddings=options.embeddings,
        min_cosine=options.min_cosine,
        max_bad_rate=options.max_bad_rate,
    )
    report = dedup_data(job)
    write_whole(options.output / REPORT, json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot_sameness(report, options.plot)
    print_fn(f"Near duplicates of other images: {report['duplicates']}.")
    if job.against:
        print_fn(f"Images of evaluation sets ({report['against']}) that the data hold: {report['evaluation']}.")
    print_fn(f"{report['kept']} of {report['seen']} pairs are kept, {report['broken']} broken.")
    print_fn(f"The kept pairs are in {options.output / 'pairs'}.")
    return 0


__all__ = ["DedupJob", "dedup_data", "embedding_pairs", "read_fingerprints", "write_fingerprints"]
