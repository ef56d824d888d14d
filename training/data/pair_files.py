"""Writes some of the rows of a shard, in the format of that shard; a file appears when all of it is there."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from ...extras import extra
from ...rows.shards import CSV_ENDINGS, FAULT_COLUMN, JSON_ENDINGS, PARQUET_ENDINGS, read_shards
from ...writing import write_whole


with extra("train"):
    import pyarrow
    from pyarrow import parquet

ROWS_COPIED_AT_ONCE = 256
Count = TypeVar("Count")  # a dataclass: what is remembered of a shard


class PairWriter(Protocol):
    """Writes pairs in the format of their shard."""

    def write(self, pairs: Any) -> None:
        """Adds an Arrow table, or raw rows."""

    def close(self) -> None:
        """Ends the file."""


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def write(self, pairs: Any) -> None:
        if self.file is None:
            # Captions, addresses and images hardly repeat: a dictionary of them costs time and room.
            self.file = parquet.ParquetWriter(self.path, pairs.schema, use_dictionary=False)
        self.file.write_table(pairs)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class _LineWriter:
    """JSON lines, or CSV."""

    def __init__(self, path: Path, delimiter: str | None) -> None:
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self.delimiter = delimiter
        self.table: csv.DictWriter | None = None

    def write(self, pairs: Any) -> None:
        for raw in pairs:
            row = {name: value for name, value in raw.items() if name not in ("__shard__", "__key__")}
            if self.delimiter is None:
                self.file.write(json.dumps(row) + "\n")
                continue
            if self.table is None:
                self.table = csv.DictWriter(self.file, list(row), delimiter=self.delimiter, lineterminator="\n")
                self.table.writeheader()
            self.table.writerow(row)

    def close(self) -> None:
        self.file.close()


class _TarWriter:
    def __init__(self, path: Path) -> None:
        self.file = tarfile.open(path, "w")  # noqa: SIM115

    def write(self, pairs: Any) -> None:
        for raw in pairs:
            for name, content in raw.items():
                if name not in ("__shard__", "__key__"):
                    member = tarfile.TarInfo(f"{raw['__key__']}.{name}")
                    member.size = len(content)
                    self.file.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self.file.close()


def ending_of(shard: str) -> str:
    """Returns the ending of what is written for a shard."""
    name = (shard.partition("?")[0] if "://" in shard else shard).lower()
    if name.endswith(PARQUET_ENDINGS):
        return ".parquet"
    if name.endswith(JSON_ENDINGS):
        return ".jsonl"
    return name[-4:] if name.endswith(tuple(CSV_ENDINGS)) else ".tar"


@contextmanager
def pair_writer(path: Path) -> Iterator[Callable[[Any], None]]:
    """Writes a file that appears when all of it is there; none if nothing was written."""
    for unfinished in path.parent.glob(
        f".{path.name}.*"
    ):  # of a run that was killed: a shard has one writer at a time
        unfinished.unlink()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    writer: PairWriter
    if path.suffix == ".parquet":
        writer = _ParquetWriter(beside)
    elif path.suffix == ".tar":
        writer = _TarWriter(beside)
    else:
        writer = _LineWriter(beside, CSV_ENDINGS.get(path.suffix))
    is_empty = True

    def write(pairs: Any) -> None:
        nonlocal is_empty
        if len(pairs):
            is_empty = False
            writer.write(pairs)

    try:
        yield write
        writer.close()
        path.unlink(missing_ok=True) if is_empty else beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_once(
    output: str, shard: str, number: int, kind: type[Count], work: Callable[[Callable[[Any], None]], Count]
) -> Count:
    """Writes the pairs of a shard, and then their count, unless both are there.

    Args:
        output: Folder that `begin_output` made.
        shard: The file.
        number: Of the shard, by which its files are named.
        kind: Of the count.
        work: Called with what takes pairs (see `pair_writer`); returns the count.

    Returns:
        The count.
    """
    done = Path(output, "done", f"{number:06d}.json")
    if count := finished_count(done, kind):
        return count
    with pair_writer(Path(output, "pairs", f"{number:06d}{ending_of(shard)}")) as write:
        count = work(write)
    write_whole(done, json.dumps(asdict(count)))  # type: ignore[call-overload]
    return count


def finished_count(file: Path, kind: type[Count]) -> Count | None:
    """Reads the count of a shard that is done; None if it is not, or its file was lost to a crash of the machine."""
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def copy_rows(shard: str, numbers: Container[int], write: Callable[[Any], None]) -> None:
    """Writes rows of a shard.

    Args:
        shard: The file.
        numbers: Of the rows, as `read_shards` counts them.
        write: Of `pair_writer`.
    """
    if ending_of(shard) != ".parquet":
        for number, row in enumerate(read_shards([shard])):
            refuse_cut_shard(shard, row)
            if number in numbers and FAULT_COLUMN not in row:
                write([row])
        return
    number = 0
    with fsspec.open(shard, "rb") as file:
        for batch in parquet.ParquetFile(file).iter_batches(ROWS_COPIED_AT_ONCE):
            kept = [number + place in numbers for place in range(len(batch))]
            write(chosen_rows(batch, pyarrow.array(kept, pyarrow.bool_())))
            number += len(batch)


def chosen_rows(batch: Any, is_chosen: Any) -> Any:
    """Returns the rows of an Arrow batch that are chosen, by an Arrow array of booleans, as a table."""
    table = pyarrow.Table.from_batches([batch])
    try:
        return table.filter(is_chosen)
    except pyarrow.ArrowNotImplementedError:  # of some types, such as string views
        runs = [(chosen, len(list(run))) for chosen, run in groupby(is_chosen.to_pylist())]
        starts = accumulate((length for _, length in runs), initial=0)
        parts = [table.slice(start, length) for start, (chosen, length) in zip(starts, runs, strict=False) if chosen]
        return pyarrow.concat_tables([table.slice(0, 0), *parts])


def refuse_cut_shard(shard: str, row: Mapping[str, Any]) -> None:
    """Raises an OSError if a raw row says that a remote shard cannot be read on."""
    if "://" in shard and FAULT_COLUMN in row and not row["__key__"]:
        raise cut_off(shard, row[FAULT_COLUMN])


def cut_off(shard: str, fault: object) -> OSError:
    """The error that a remote shard cannot be read to its end, which may be so for now only."""
    return OSError(f"`{shard}` cannot be read to its end: {fault}. Try again: finished shards are kept.")


def states_of(shards: Sequence[str]) -> list[list[str | int]]:
    """Returns what differs when shards have changed: of each its name and, on disk, its size and time."""
    stats = {shard: os.stat(shard) for shard in shards if "://" not in shard}
    return [[shard, *((stats[shard].st_size, stats[shard].st_mtime_ns) if shard in stats else ())] for shard in shards]


# What a command was asked for, by its name in the description of an output folder, in a user's words.
ASKED_FOR = {
    "against": "`--against`",
    "crops": "`--hashes-only`",
    "embeddings": "`--embeddings`",
    "images": "`--images`",
    "min_cosine": "`--min-cosine`",
    "min_sameness": "`--min-sameness`",
    "mode": "`--mode`",
    "place": "the model",
    "rules": "the rules",
    "shards": "the data",
    "stage": "`--stage`",
}


def begin_output(output: str, name: str, description: dict[str, Any]) -> None:
    """Makes the folder of a command that can be stopped, or checks that it belongs to the same one.

    Args:
        output: The folder.
        name: Of the file that describes what was asked for.
        description: That, as JSON has it.

    Raises:
        ValueError: If the folder holds something else.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    # Other processes may begin the same folder now; a kill may have left the file of one.
    is_taken = any(not entry.name.startswith(f".{file.name}.") for entry in folder.iterdir())
    if is_taken and not file.is_file():
        raise ValueError(f"`{folder}` is not empty, and holds no pairs of this command: name another folder.")
    if not file.is_file():
        write_whole(file, json.dumps(description, indent=2), keep=True)
    known, asked = _read_description(file), json.loads(json.dumps(description))
    if differing := sorted(key for key in known.keys() | asked.keys() if known.get(key) != asked.get(key)):
        changes = ", ".join(ASKED_FOR.get(key, key) for key in differing)
        raise ValueError(
            f"`{folder}` holds pairs of other data or by other rules: it was begun with other values of {changes}. "
            "Name another folder, or remove this one."
        )
    for name in ("pairs", "done"):
        (folder / name).mkdir(exist_ok=True)


def _read_description(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{file}` is damaged ({error}): name another folder.") from error


__all__ = [
    "begin_output",
    "chosen_rows",
    "copy_rows",
    "cut_off",
    "ending_of",
    "finished_count",
    "pair_writer",
    "refuse_cut_shard",
    "states_of",
    "write_once",
]
