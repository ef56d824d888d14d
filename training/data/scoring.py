"""`score`: fills in the similarity of image and caption where pairs have none, by an InternVL-C or -G.

    score.json                what was asked for
    pairs/000000.tar          all pairs of a shard, in its format, with `similarity`
    done/000000.json          their number

The rules of the funnel read this column. A pair whose image cannot be read keeps no value. A command that was stopped
goes on with the next shard; on several devices (`accelerate launch`) and machines (Ray Data), each takes its shards.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from tqdm import tqdm

from ...evaluation.embeddings import ModelPlace
from ...evaluation.indexing import Embedder, Job
from ...evaluation.vectors.sources import Columns, item_of_row
from ...extras import extra
from ...kinds import check_kind
from ...rows.json_rows import Row
from ...rows.pair_rows import JSON_COLUMN, metadata_of
from ...rows.shards import FAULT_COLUMN, find_shards, has_lines, read_shards, rows_of_batch
from .filters import MissingColumnError, as_number, value_of
from .pair_files import begin_output, ending_of, finished_count, states_of, write_once


with extra("train"):
    import pyarrow
    from pyarrow import parquet

DESCRIPTION = "score.json"
SCORE = "similarity"


@dataclass(frozen=True)
class ScoreJob:
    """What is scored, and how.

    Args:
        shards: Files, as `find_shards` names them.
        output: Folder.
        place: Of the model.
        mode: "InternVL-C", or "InternVL-G".
        images: Folder of the images that rows name by a path.
        batch_size: Images at a time.
        max_bad_rate: Largest share of pairs that cannot be read.
    """

    shards: tuple[str, ...]
    output: str
    place: ModelPlace
    mode: str = "InternVL-C"
    images: str | None = None
    batch_size: int = 64
    max_bad_rate: float = 0.01

    def embedder(self, device: str | torch.device) -> Embedder:
        """Loads the model."""
        job = Job((), "", mode=self.mode, batch_size=self.batch_size, max_bad_rate=self.max_bad_rate)
        return Embedder(*self.place.load(device), job)


@dataclass
class ScoreCount:
    """Pairs of a shard: all, those that got a score, and those that cannot be read."""

    rows: int = 0
    scored: int = 0
    broken: int = 0


class ShardScorer:
    """Scores a shard.

    Args:
        embedder: With the model.
        shard: The file.
        images: See `ScoreJob`.
        write: Takes the pairs.
    """

    def __init__(self, embedder: Embedder, shard: str, images: str | None, write: Callable[[Any], None]) -> None:
        self.embedder = embedder
        self.shard = shard
        self.columns = Columns(folder=images)
        self.write = write
        self.count = ScoreCount()

    def run(self) -> ScoreCount:
        """Reads the shard from front to back."""
        size = 4 * self.embedder.job.batch_size
        if ending_of(self.shard) == ".parquet":
            self._score_parquet(size)
            return self.count
        rows: list[Row] = []
        for row in read_shards([self.shard]):
            if FAULT_COLUMN not in row:
                rows.append(row)
            elif row["__key__"]:
                self.count.broken += 1
            else:
                raise OSError(f"`{self.shard}`: {row[FAULT_COLUMN]}")
            if len(rows) == size:
                self._score_rows(rows)
                rows = []
        self._score_rows(rows)
        return self.count

    def _score_rows(self, rows: list[Row]) -> None:
        if rows:
            scores = self.scores(rows)
            self.write([_with_score(row, score) for row, score in zip(rows, scores, strict=True)])

    def _score_parquet(self, size: int) -> None:
        number = 0
        with fsspec.open(self.shard, "rb") as file:
            try:
                source = parquet.ParquetFile(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"`{self.shard}` cannot be read: {error}") from error
            for batch in source.iter_batches(size):
                rows = rows_of_batch(batch, self.shard, number)
                number += len(rows)
                column = pyarrow.array(self.scores(rows), pyarrow.float64())
                table = pyarrow.Table.from_batches([batch])
                names = table.column_names
                if SCORE in names:
                    self.write(table.set_column(names.index(SCORE), SCORE, column))
                else:
                    self.write(table.append_column(SCORE, column))

    def scores(self, rows: Sequence[Row]) -> list[float | None]:
        """Returns the similarity of each pair: its own if it has one, else the model's; None if it cannot be read."""
        found: list[float | None] = [None] * len(rows)
        items = []
        for number, row in enumerate(rows):
            found[number] = _score_in(row)
            if found[number] is None:
                items.append(replace(item_of_row(row, self.columns), id=str(number)))
        items = [item for item in items if item.fault or not (item.image is None or item.text is None)]
        kept, vectors, broken = self.embedder.embed(items)
        if kept:
            cosines = np.einsum("nme,nme->n", vectors["image"], vectors["text"])
            for item, cosine in zip(kept, cosines.tolist(), strict=True):
                found[int(item.id)] = cosine
        self.count.rows += len(rows)
        self.count.scored += len(kept)
        self.count.broken += broken
        return found


def _score_in(row: Row) -> float | None:
    try:
        value = value_of(metadata_of(row), SCORE)
        return None if value is None else as_number(value)
    except (MissingColumnError, ValueError):
        return None


def _with_score(row: Row, score: float | None) -> Row:
    if not has_lines(row["__shard__"]):  # of a tar file
        if score is None:
            return row
        try:
            metadata = json.loads(row.get(JSON_COLUMN, b"{}"))
        except (RecursionError, ValueError):
            return row
        return {**row, JSON_COLUMN: json.dumps({**metadata, SCORE: score}).encode()}
    return {**row, SCORE: "" if score is None and ending_of(row["__shard__"]) != ".jsonl" else score}


def score_shard(job: ScoreJob, embedder: Embedder, number: int) -> ScoreCount:
    """Scores one shard of a job, unless it is done."""
    shard = job.shards[number]
    return write_once(
        job.output, shard, number, ScoreCount, lambda write: ShardScorer(embedder, shard, job.images, write).run()
    )


def begin_scoring(job: ScoreJob) -> None:
    """Makes the output folder, or checks that it belongs to the same job."""
    description = {"shards": states_of(job.shards), "place": asdict(job.place), "mode": job.mode, "images": job.images}
    begin_output(job.output, DESCRIPTION, description)


def score_data(job: ScoreJob, embedder: Embedder, rank: int = 0, world: int = 1) -> list[ScoreCount]:
    """Scores what is left of a job, or of this process's share of it.

    Args:
        job: What is scored, and how.
        embedder: Of the job.
        rank: Number of this process.
        world: Number of processes.

    Raises:
        OSError: If a shard cannot be read to its end.
        TooManyBadRowsError: If too many pairs cannot be read.
    """
    begin_scoring(job)
    shards = tqdm(range(rank, len(job.shards), world), "shards", leave=False, disable=None, delay=1)
    return [score_shard(job, embedder, number) for number in shards]


class _RayScorer:
    """An actor of Ray Data, with a model of its own."""

    def __init__(self, job: ScoreJob) -> None:
        self.job = job
        self.embedder = job.embedder("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        score_shard(self.job, self.embedder, row["shard"])
        return row


def score_by_ray(job: ScoreJob, workers: int, gpus: float) -> None:
    """Scores what is left of a job by workers of Ray Data, on the cluster that `ray.init` finds.

    Args:
        job: What is scored, and how; data and output lie where every machine finds them.
        workers: How many load the model.
        gpus: Of each; 0 for CPUs.

    Raises:
        MissingLibraryError: If Ray is not installed.
    """
    with extra("ray"):
        import ray

    begin_scoring(job)
    numbers = [{"shard": number} for number in range(len(job.shards))]
    shards = ray.data.from_items(numbers, override_num_blocks=len(numbers))
    settings: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
    shards.map(_RayScorer, fn_constructor_args=(job,), concurrency=workers, **settings).materialize()


def _finished(job: ScoreJob) -> Iterator[ScoreCount]:
    for file in sorted(Path(job.output, "done").glob("*.json")):
        if count := finished_count(file, ScoreCount):
            yield count


def score_job(options: argparse.Namespace, output: Path) -> ScoreJob:
    """Returns the job of a command line, if the model can do it.

    Raises:
        ValueError: If it cannot.
    """
    config = check_kind(options.model, "InternVL-C", "InternVL-G", door="scoring", subfolder=options.subfolder)
    if options.mode == "G" and not config.has_queries:
        raise ValueError("Mode G needs a model with queries, an InternVL-G; this one is an InternVL-C.")
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    return ScoreJob(
        shards=tuple(find_shards(options.data)),
        output=str(output),
        place=ModelPlace(model, options.subfolder, options.dtype),
        mode=f"InternVL-{options.mode}",
        images=options.images,
        batch_size=options.batch_size,
        max_bad_rate=options.max_bad_rate,
    )


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `score`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    from accelerate import PartialState

    job = score_job(options, options.output)
    if options.ray_workers:
        score_by_ray(job, options.ray_workers, options.ray_gpus)
    else:
        state = PartialState()
        score_data(job, job.embedder(state.device), state.process_index, state.num_processes)
    counts = list(_finished(job))
    if len(counts) < len(job.shards):
        return 0  # another process is at work on the others
    rows, scored, broken = (sum(getattr(count, name) for count in counts) for name in ("rows", "scored", "broken"))
    print_fn(f"{scored} of {rows} pairs got a similarity, {broken} cannot be read.")
    print_fn(f"The pairs are in {Path(job.output, 'pairs')}.")
    return 0


__all__ = ["ScoreJob", "score_by_ray", "score_data", "score_shard"]
