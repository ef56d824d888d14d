"""Shards of data as raw rows: WebDataset tar files, parquet, CSV and TSV files, local or remote, and JSON on disk.

Nothing is decoded here: a row is {"__shard__": where it comes from, "__key__": its name there} and the columns as
bytes and plain values, so that one broken image or text cannot end a shard. `datasets`' own reader of tar files
decodes texts and JSON while it reads and takes the columns from the first five samples, which noisy data does not
survive.
"""

import csv
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ..extras import extra
from .bad_rows import UnusableRowError
from .json_rows import MAX_ROW_BYTES, Row, stream_json_rows


Shard = str | tuple[str, int, int]  # the file; or the file, which piece of its rows, and of how many

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
PARQUET_ENDINGS = (".parquet",)
JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
CSV_ENDINGS = {".csv": ",", ".tsv": "\t"}  # and what separates their fields
ENDINGS = (*TAR_ENDINGS, *PARQUET_ENDINGS, *JSON_ENDINGS, *CSV_ENDINGS)
FAULT_COLUMN = "__fault__"
PARQUET_ROWS = 64  # read at once
MAX_HEADER_BYTES = 2**20  # of what a tar file says about a member
# What reading a damaged, hostile or unreachable shard raises. Errors of pyarrow derive from these.
SHARD_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zlib.error,
)


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Names the files that patterns stand for.

    Args:
        patterns: Paths or addresses (`hf://`, and whatever else fsspec knows; `https://` needs aiohttp), with `*` and
            `?` except in `https://`.

    Returns:
        The shards, in the order of the patterns and sorted within each.

    Raises:
        ImportError: If what fsspec needs for this kind of address is not installed.
        OSError: If a pattern stands for nothing.
        ValueError: If a file is no shard, by its ending.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = str(pattern)
        system, path = url_to_fs(pattern)
        if pattern.startswith(("http://", "https://")):
            shards.append(pattern)  # whose `?` begins a query; servers do not list their files
            continue
        found = sorted(system.glob(path))
        if not found:
            raise OSError(f"No shard found: there is no file `{pattern}`.")
        is_local = isinstance(system, LocalFileSystem)
        if is_local and (others := [name for name in found if not Path(name).is_file()]):
            raise OSError(f"`{others[0]}` is no regular file, and no shard.")
        shards += [system.unstrip_protocol(name) if "://" in pattern else name for name in found]
    for shard in shards:
        if not _ending(shard).endswith(ENDINGS):
            raise ValueError(f"`{shard}` must end in {', '.join(ENDINGS)} to be read as a shard.")
        if _ending(shard).endswith(JSON_ENDINGS) and "://" in shard:
            raise ValueError(f"`{shard}` must lie on disk, as JSON. Download it, or make it a tar or parquet file.")
    return shards


def has_lines(shard: str) -> bool:
    """Whether it is a text file, whose rows are told by their lines, and are read so fast that readers share them."""
    return _ending(shard).endswith((*JSON_ENDINGS, *CSV_ENDINGS))


def pieces_of(shard: str, readers: int) -> list[Shard]:
    """A piece of a shard for each reader; of a tar or parquet file, each reads the whole and keeps its own rows."""
    return [(shard, piece, readers) for piece in range(readers)]


def read_shard(shard: Shard) -> Iterator[Row]:
    """Reads one shard, front to back.

    Args:
        shard: Path or address, or a piece of `pieces_of`.

    Yields:
        Raw rows.

    Raises:
        One of `SHARD_ERRORS`: If the file is damaged or cannot be reached.
    """
    name, piece, pieces = (shard, 0, 1) if isinstance(shard, str) else shard
    ending = _ending(name)
    if ending.endswith(JSON_ENDINGS):
        yield from _read_json(name, piece, pieces)
        return
    with fsspec.open(name, "rb") as file:
        if ending.endswith(tuple(CSV_ENDINGS)):
            rows = _read_csv(file, name, CSV_ENDINGS[ending[-4:]])
        else:
            rows = (_read_parquet if ending.endswith(PARQUET_ENDINGS) else _read_tar)(file, name)
        yield from islice(rows, piece, None, pieces)


def read_shards(shards: Sequence[Shard]) -> Generator[Row, None, None]:
    """Reads shards one after the other.

    Args:
        shards: Paths or addresses, or pieces of `pieces_of`.

    Yields:
        Raw rows. A shard that is damaged or cannot be reached ends with a row that has the fault in `FAULT_COLUMN`.
    """
    for shard in shards:
        try:
            yield from read_shard(shard)
        except SHARD_ERRORS as error:
            name = shard if isinstance(shard, str) else shard[0]
            yield {"__shard__": name, "__key__": "", FAULT_COLUMN: f"The shard is damaged: {error}"}


def place_of_row(row: Row) -> str:
    """Where a raw row comes from, for messages: its line in a text file, its name in others."""
    if has_lines(row["__shard__"]) and row["__key__"]:
        return f"{row['__shard__']}:{row['__key__']}"
    return f"{row['__shard__']}, sample `{row['__key__']}`"


def _read_json(shard: str, piece: int, pieces: int) -> Iterator[Row]:
    for line, row in stream_json_rows(shard, piece, pieces):
        row = {FAULT_COLUMN: str(row)} if isinstance(row, UnusableRowError) else row
        yield {**row, "__shard__": shard, "__key__": str(line)}


def _read_csv(file: BinaryIO, shard: str, delimiter: str) -> Iterator[Row]:
    """Rows by the names in the first line; what is no UTF-8 becomes lone surrogates, which no text may hold."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(iter(lambda: text.readline(MAX_ROW_BYTES), ""), delimiter=delimiter)
    header = next(reader, [])
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = {FAULT_COLUMN: f"Broken CSV: {error}."}
        else:
            if not fields:
                continue  # a blank line
            row = dict(zip(header, fields, strict=False))
            if len(fields) != len(header):
                row = {FAULT_COLUMN: f"Broken CSV: {len(fields)} fields, and the first line names {len(header)}."}
        yield {**row, "__shard__": shard, "__key__": str(line)}


def _ending(shard: str) -> str:
    return shard.partition("?")[0].lower() if "://" in shard else shard.lower()


class _BoundedTarInfo(tarfile.TarInfo):
    """A member whose long names and attributes, which are read at once, are bounded, and whose header is whole: the
    library takes a file that was cut off within one for a file that ends.
    """

    _READ_AT_ONCE = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

    @classmethod
    def frombuf(cls, *settings: Any) -> "_BoundedTarInfo":
        """As in the library."""
        if 0 < len(settings[0]) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off within the header of a member")
        member = super().frombuf(*settings)
        if member.type in cls._READ_AT_ONCE and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a member's name or attributes take {member.size} bytes")
        return member


def _read_tar(file: BinaryIO, shard: str) -> Iterator[Row]:
    """Samples: neighbouring members whose names are equal up to the first dot."""
    row: Row = {}
    # A local file is read by seeking, which passes over what is too large; others come as a stream.
    with tarfile.open(fileobj=file, mode="r|*" if "://" in shard else "r:*", tarinfo=_BoundedTarInfo) as archive:
        for member in archive:
            # The archive remembers every member it has passed, which for a large shard is a lot of memory.
            archive.members = []  # type: ignore[attr-defined]
            folder, slash, name = member.name.rpartition("/")
            stem, dot, column = name.partition(".")
            if not member.isfile() or not stem or not dot or column.startswith("__"):
                continue
            key = folder + slash + stem
            if row and row["__key__"] != key:
                yield row
                row = {}
            row.update({"__shard__": shard, "__key__": key})
            size = sum(len(value) for value in row.values()) + member.size
            if size > MAX_ROW_BYTES:
                row[FAULT_COLUMN] = f"The sample is too large: {size} bytes, at most {MAX_ROW_BYTES} are read."
            else:
                content = archive.extractfile(member)
                row[column.lower()] = content.read() if content else b""
    if row:
        yield row


def _read_parquet(file: BinaryIO, shard: str) -> Iterator[Row]:
    with extra("train"):  # comes with `datasets`; tar files do without
        from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
        yield from rows_of_batch(batch, shard, number)
        number += len(batch)


def rows_of_batch(batch: Any, shard: str, start: int) -> list[Row]:
    """Raw rows of a batch that begins at the row `start` of a shard; one that cannot be read stands for its fault."""
    try:
        rows = batch.to_pylist()
    except SHARD_ERRORS as error:
        if len(batch) > 1:
            singles = ((batch.slice(place, 1), start + place) for place in range(len(batch)))
            return [row for single, number in singles for row in rows_of_batch(single, shard, number)]
        rows = [{FAULT_COLUMN: f"The row cannot be read: {error}"}]
    return [{**row, "__shard__": shard, "__key__": str(number)} for number, row in enumerate(rows, start)]
