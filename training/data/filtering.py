"""`funnel` and `filter`: judges the pairs of shards by the rules, and writes those that are kept.

    filter.json               what was asked for
    pairs/000000.parquet      kept pairs of a shard, in the format of that shard
    done/000000.json          its counts
    report.json

A shard's files appear whole, the counts last, so that a command that was stopped goes on with the next shard: no kept
pair is lost, and none comes twice. Ray Data judges shards on many machines in the same way.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from ...extras import extra
from ...rows.bad_rows import BadRows, TooManyBadRowsError
from ...rows.json_rows import Row
from ...rows.pair_rows import IMAGE_COLUMNS, JSON_COLUMN
from ...rows.shards import (
    SHARD_ERRORS,
    find_shards,
    place_of_row,
    read_shards,
    rows_of_batch,
)
from ...writing import write_whole
from .filter_expressions import (
    ROWS_AT_ONCE,
    Verdict,
    check_columns,
    check_columns_of_rows,
    check_patterns,
    input_columns,
    judge_inputs,
    row_inputs,
    table_inputs,
)
from .filters import COLUMNS, FILTERS, Filter, Funnel, paper_share, read_filters, with_optional
from .pair_files import begin_output, chosen_rows, cut_off, ending_of, refuse_cut_shard, states_of, write_once
from .plots import check_plot, plot_report


with extra("filter"):
    import polars as pl
    import pyarrow
    from pyarrow import compute, parquet

BATCH_BYTES = 2**26  # of a table that is judged at once
MAX_BATCH_ROWS = 2**17
PLAIN_KINDS = tuple(
    getattr(pyarrow.types, f"is_{name}")
    for name in (
        *("boolean", "integer", "floating", "decimal", "null", "fixed_size_binary"),
        *("string", "large_string", "string_view", "binary", "large_binary", "binary_view"),
    )
)
DESCRIPTION, REPORT = "filter.json", "report.json"


@dataclass(frozen=True)
class FilterJob:
    """What is filtered, and how.

    Args:
        shards: Files, as `find_shards` names them.
        stage: Rules up to this stage are applied.
        rules: The table.
        output: Folder of the kept pairs; None counts only.
        max_bad_rate: Largest share of rows that cannot be read.
        images: Folder of the images that rows name by a path; None takes the folder of each shard.
    """

    shards: tuple[str, ...]
    stage: int = 2
    rules: tuple[Filter, ...] = FILTERS
    output: str | None = None
    max_bad_rate: float = 0.01
    images: str | None = None

    @cached_property
    def applied(self) -> tuple[Filter, ...]:
        """The rules of the stages up to this one, in their order."""
        return Funnel(self.stage, self.rules).rules

    def description(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        rules = [asdict(rule) for rule in self.applied]
        return {"shards": states_of(self.shards), "stage": self.stage, "rules": rules, "images": self.images}


@dataclass
class ShardCount:
    """What the rules did to a shard; see `Funnel.report`."""

    seen: int
    kept: int
    broken: int
    tallies: list[dict[str, int]]
    reasons: dict[str, int]


# ------------------------------------------------------------------------------------------------------------- judging
class ShardFilter:
    """Judges a shard.

    Args:
        job: What is asked for.
        shard: The file.
        write: Takes the kept pairs, as an Arrow table or as raw rows.
    """

    def __init__(self, job: FilterJob, shard: str, write: Callable[[Any], None]) -> None:
        self.job = job
        self.shard = shard
        self.write = write
        self.funnel = Funnel(job.stage, job.rules)
        self.bad_rows = BadRows(max_rate=job.max_bad_rate, limit="`--max-bad-rate`")
        self.columns: set[str] = set()

    def run(self) -> ShardCount:
        """Reads the shard from front to back."""
        if ending_of(self.shard) == ".parquet":
            self._judge_parquet()
        else:
            for rows in _batches_of(read_shards([self.shard])):
                self._judge_rows(rows, rows)
        tallies = [
            {name: row[name] for name in ("removed", "failing", "missing")} for row in self.funnel.report()["rules"]
        ]
        bad_rows = self.bad_rows
        return ShardCount(self.funnel.seen, self.funnel.kept, bad_rows.broken, tallies, dict(bad_rows.reasons))

    def _judge_parquet(self) -> None:
        number = 0
        for schema, batch in self._parquet_batches():
            if self._is_by_row(schema) or not self._judge_table(batch, schema, number):
                self._judge_rows(rows_of_batch(batch, self.shard, number), batch)
            number += len(batch)

    def _parquet_batches(self) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Yields the types of all columns, and a batch of those that are needed."""
        try:
            with fsspec.open(self.shard, "rb") as opened:
                source = opened if "://" in self.shard else self.shard
                with parquet.ParquetFile(source, memory_map="://" not in self.shard) as file:
                    _check_names(file.schema_arrow.names)
                    schema = pl.from_arrow(_comparable(file.schema_arrow.empty_table())).schema
                    is_whole = self._is_by_row(schema) or self.job.output is not None
                    wanted = None if is_whole else input_columns(schema, self.job.applied)
                    for batch in file.iter_batches(_rows_of_batch(file, wanted), columns=wanted):
                        yield schema, batch
        except SHARD_ERRORS as error:
            self._count_damage(error)

    def _count_damage(self, error: object) -> None:
        if "://" in self.shard:
            raise cut_off(self.shard, error)
        self.bad_rows.count(self.shard, f"The shard is damaged: {error}")

    def _is_by_row(self, schema: Mapping[str, Any]) -> bool:
        """Whether rows hold metadata as JSON, or sizes stand in their images."""
        needed = set(input_columns(dict.fromkeys([*COLUMNS["width"], *COLUMNS["height"]]), self.job.applied))
        lacks_size = needed and not all(set(COLUMNS[side]) & set(schema) for side in ("width", "height"))
        return JSON_COLUMN in schema or bool(lacks_size and set(IMAGE_COLUMNS) & set(schema))

    def _judge_table(self, batch: Any, schema: Mapping[str, Any], start: int) -> bool:
        """Judges a batch by its columns; returns whether it could."""
        check_columns(self.job.applied, schema)
        needed = batch.select(input_columns(schema, self.job.applied))
        try:
            needed.validate(full=True)
            table = pl.from_arrow(_comparable(needed))
            inputs = table_inputs(table.lazy(), schema, self.job.applied)
            verdict = judge_inputs(inputs, self.job.applied, schema)
        except (pyarrow.ArrowInvalid, pl.exceptions.PolarsError):
            return False
        self._count(verdict, lambda row: f"{self.shard}, sample `{start + row}`")
        if self.job.output is not None:
            self.write(chosen_rows(batch, verdict.kept.to_arrow()))
        return True

    def _judge_rows(self, rows: list[Row], written: Any) -> None:
        """Judges raw rows; what is written of them are themselves, or the batch that they come from."""
        refuse_cut_shard(self.shard, rows[-1])
        inputs, columns = row_inputs(rows, self.job.applied, self.job.images)
        self.columns |= columns
        if columns:
            check_columns(self.job.applied, self.columns)
        verdict = judge_inputs(inputs, self.job.applied, columns)
        self._count(verdict, lambda row: place_of_row(rows[row]))
        if isinstance(written, list):
            self.write([row for row, is_kept in zip(rows, verdict.kept, strict=True) if is_kept])
        elif self.job.output is not None:
            self.write(chosen_rows(written, verdict.kept.to_arrow()))

    def _count(self, verdict: Verdict, place: Callable[[int], str]) -> None:
        self.funnel.add(verdict.seen, int(verdict.kept.sum()), verdict.tallies)
        self.bad_rows.seen += verdict.seen
        for row in verdict.faults.is_not_null().arg_true():
            self.bad_rows.count(place(row), verdict.faults[row])


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two columns have the name `{twice[0]}`")


def _comparable(table: Any) -> Any:
    """An Arrow table or batch as polars can read it, which ends at some types, such as foreign time zones.

    Columns that no rule can compare become dates, which none can either, and keep their nulls.
    """
    for number, column in enumerate(table.schema):
        kind, values = column.type, table.column(number)
        if pyarrow.types.is_decimal256(kind):
            table = table.set_column(number, column.name, values.cast(pyarrow.float64()))
        elif not _is_plain(kind):
            dates = compute.if_else(values.is_valid(), *(pyarrow.scalar(day, pyarrow.date32()) for day in (0, None)))
            table = table.set_column(number, column.name, dates)
    return table


def _is_plain(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return any(is_kind(kind) for is_kind in PLAIN_KINDS)


def _rows_of_batch(file: Any, columns: Sequence[str] | None) -> int:
    """How many rows are judged at once: as many as fit in `BATCH_BYTES`."""
    metadata = file.metadata
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            if columns is None or column.path_in_schema.split(".")[0] in columns:
                total += column.total_uncompressed_size
    return max(64, min(MAX_BATCH_ROWS, BATCH_BYTES * max(metadata.num_rows, 1) // max(total, 1)))


def _batches_of(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, (bytes, str)))
        if len(batch) >= ROWS_AT_ONCE or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def filter_shard(job: FilterJob, number: int) -> ShardCount:
    """Filters one shard of a job.

    Args:
        job: What is asked for.
        number: Of the shard.

    Returns:
        What the rules did.

    Raises:
        MissingColumnError: If a rule that is not optional finds no column.
        TooManyBadRowsError: If too many rows cannot be read.
    """
    shard = job.shards[number]
    if job.output is None:
        return ShardFilter(job, shard, lambda _: None).run()
    return write_once(job.output, shard, number, ShardCount, lambda write: ShardFilter(job, shard, write).run())


def begin_filtering(job: FilterJob) -> None:
    """Checks the rules of a job, and makes its output folder or checks whose it is; see `begin_output`.

    Rules that miss a column are told before the folder is made, so that it can be asked for again without them.
    """
    check_patterns(job.applied)
    if job.output is not None:
        with closing(read_shards(job.shards[:1])) as rows:
            check_columns_of_rows(rows, job.applied, job.images)
        begin_output(job.output, DESCRIPTION, job.description())


def filter_data(job: FilterJob) -> dict[str, Any]:
    """Filters what is left of a job, and returns its report.

    Raises:
        OSError: If a shard cannot be read.
        ValueError: As `filter_shard` and `begin_filtering`.
    """
    begin_filtering(job)
    numbers = range(len(job.shards))
    counts = [filter_shard(job, number) for number in tqdm(numbers, "shards", leave=False, disable=None, delay=1)]
    return filter_report(job, counts)


def filter_by_ray(job: FilterJob, workers: int) -> dict[str, Any]:
    """Filters what is left of a job by workers of Ray Data, on the cluster that `ray.init` finds.

    Args:
        job: What is asked for; data and output lie where every machine finds them.
        workers: How many shards are filtered at a time.

    Raises:
        MissingLibraryError: If Ray is not installed.
        OSError, ValueError: As in `filter_data`.
    """
    with extra("ray"):
        import ray

    begin_filtering(job)
    numbers = [{"shard": number} for number in range(len(job.shards))]
    shards = ray.data.from_items(numbers, override_num_blocks=len(numbers))
    done = shards.map(_RayFilter, fn_constructor_args=(job,), concurrency=workers, num_cpus=1)
    counts = {row["shard"]: json.loads(row["count"]) for row in done.take_all()}
    return filter_report(job, [ShardCount(**counts[number]) for number in sorted(counts)])


class _RayFilter:
    """An actor of Ray Data."""

    def __init__(self, job: FilterJob) -> None:
        self.job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "count": json.dumps(asdict(filter_shard(self.job, row["shard"])))}


def filter_report(job: FilterJob, counts: Sequence[ShardCount]) -> dict[str, Any]:
    """Returns `Funnel.report` of all shards, and "broken" and "reasons" beside it.

    Raises:
        TooManyBadRowsError: If more of all rows are broken than allowed.
    """
    funnel, bad_rows = Funnel(job.stage, job.rules), BadRows(max_rate=job.max_bad_rate, limit="`--max-bad-rate`")
    for count in counts:
        funnel.add(count.seen, count.kept, count.tallies)
        bad_rows.seen += count.seen + count.broken
        bad_rows.broken += count.broken
        bad_rows.reasons.update(count.reasons)
    if bad_rows.broken > bad_rows.max_rate * max(bad_rows.seen, bad_rows.grace):
        raise TooManyBadRowsError(
            f"{bad_rows.broken} of {bad_rows.seen} rows are broken, more than the {bad_rows.max_rate:.2%} of "
            f"`--max-bad-rate`: {', '.join(f'{number} x {name}' for name, number in bad_rows.reasons.most_common())}."
        )
    return {**funnel.report(), "broken": bad_rows.broken, "reasons": dict(bad_rows.reasons)}


# --------------------------------------------------------------------------------------------------------- the command
def _outcome_of(row: Mapping[str, Any]) -> str:
    """What a rule of the report did, in words: a rule that judged nothing removed nothing, which is not the same."""
    if row["skipped"]:
        return "skipped: the data has no such column"
    outcome = f"removed {row['removed']:>9} ({row['removed_share']:6.2%})"
    passed = row["missing"] if row["is_optional"] else 0
    return outcome + (f", {passed} without a value passed" if passed else "")


def _show(report: Mapping[str, Any], print_fn: Callable[[str], None]) -> None:
    for row in report["rules"]:
        print_fn(f"stage {row['stage']}  {row['name']:<30} {_outcome_of(row)}")
    print_fn(
        f"{report['kept']} of {report['seen']} pairs are kept ({report['kept_share']:.2%}), {report['broken']} broken."
    )
    if "source" in report:
        print_fn(f"The paper kept {report['paper_kept_share']:.2%} of {report['source']}.")


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `funnel` or `filter`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    if options.plot:
        check_plot(options.plot, options.output)
    rules = FILTERS if options.rules is None else read_filters(options.rules)
    folder = options.output if options.writes_pairs else None
    job = FilterJob(
        shards=tuple(find_shards(options.data)),
        stage=options.stage,
        rules=with_optional(rules, options.without),
        output=None if folder is None else str(folder),
        max_bad_rate=options.max_bad_rate,
        images=options.images,
    )
    report = filter_by_ray(job, options.ray_workers) if options.ray_workers else filter_data(job)
    if options.source:
        share = paper_share(options.stage, options.source)
        report |= {"source": options.source, "paper_kept_share": share}
    _show(report, print_fn)
    file = options.output if folder is None else Path(folder, REPORT)
    if file:
        write_whole(Path(file), json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot_report(report, options.plot)
    if folder is not None:
        print_fn(f"The kept pairs are in {Path(folder, 'pairs')}.")
    return 0


__all__ = ["FilterJob", "ShardCount", "filter_by_ray", "filter_data", "filter_shard"]
