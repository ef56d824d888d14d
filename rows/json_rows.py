"""Rows of a JSON file: JSON lines, or one array of objects.

`JsonRows` finds them in one pass and reads one at a time. Only their places are kept, 24 bytes for each, and every
fault can be told by its line. `stream_json_rows` keeps nothing, for files whose rows are read front to back. A broken
row is an error when it is read, and does not hide the rows behind it.
"""

import json
import mmap
import re
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .bad_rows import UnusableRowError


Row = dict[str, Any]

MAX_ROW_BYTES = 2**28  # of one row, images as base64 included
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Whole strings are one token, so that brackets inside them do not count. A lone quote is a string that never ends.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_FIRST_GAP = re.compile(rb"\s*\Z")
_GAP = re.compile(rb"\s*,\s*\Z")
_ALLOWED = re.compile(rb"\s*,?\s*")
_OPENING, _CLOSING = b"[{", b"]}"
_WORD = re.compile(rb"\S")
# What a file that is no JSON begins with.
_OTHERS = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16",
}


class _Place(NamedTuple):
    """Bytes of a row in its file, what is wrong with them, and the line on which they begin."""

    start: int
    end: int
    fault: str
    line: int


class JsonRows:
    """The rows of one file.

    Args:
        path: The file: an array of objects, or one object per line (blank lines are left out).

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is something else than JSON as a whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder: Path = self.path.parent  # of the images
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        self._faults: dict[int, str] = {}
        with _mapped(self.path) as text:
            for place in _places(text):
                if place.fault:
                    self._faults[len(self._starts)] = place.fault
                self._starts.append(place.start)
                self._ends.append(place.end)
                self._lines.append(place.line)

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> int:
        """The line on which a row begins, counted from 1."""
        return self._lines[index]

    def read(self, index: int) -> Row:
        """Reads one row.

        Args:
            index: From 0 on.

        Returns:
            The object.

        Raises:
            UnusableRowError: If it is not one JSON object.
        """
        place = _Place(self._starts[index], self._ends[index], self._faults.get(index, ""), self._lines[index])
        _check(place)
        with self.path.open("rb") as file:
            file.seek(place.start)
            return _parsed(place, file.read(place.end - place.start))


def stream_json_rows(
    path: str | Path, piece: int = 0, pieces: int = 1
) -> Iterator[tuple[int, Row | UnusableRowError]]:
    """Reads rows front to back without an index, from the first one on at once.

    Args:
        path: As in `JsonRows`.
        piece: Of the rows, the first one to read.
        pieces: Readers that share the file: each takes every so many-th row.

    Yields:
        The line of each row and the row, or what is wrong with it.
    """
    with _mapped(Path(path)) as text:
        for place in islice(_places(text), piece, None, pieces):
            row: Row | UnusableRowError
            try:
                _check(place)
                row = _parsed(place, text[place.start : place.end])
            except UnusableRowError as error:
                row = error
            yield place.line, row


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The bytes of a file that can be JSON."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is no regular file, expected JSON lines or a JSON array.")
    if status.st_size == 0:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        kind = _other_kind(text[:512])
        if kind is not None:
            raise ValueError(f"{path} is {kind}, expected JSON lines or a JSON array, in UTF-8.")
        yield text


def _other_kind(head: bytes) -> str | None:
    """What a file is that cannot be JSON, by its first bytes."""
    kind = next((kind for start, kind in _OTHERS.items() if head.startswith(start)), None)
    if kind is None and b"ustar" in head[257:265]:
        kind = "a tar archive"
    if kind is None and b"\0" in head and not (head[:1] in b"[{" and head[1:2] != b"\0"):
        kind = "a binary file"
    return kind


def _places(text: mmap.mmap | bytes) -> Iterator[_Place]:
    """Where each row is."""
    begin = len(BYTE_ORDER_MARK) if text[:3] == BYTE_ORDER_MARK else 0
    first = _WORD.search(text, begin)
    is_array = first is not None and first[0] == b"["
    line, counted = 1, 0
    for start, end, fault in _array_rows(text, first.start()) if is_array else _line_rows(text, begin):
        line += _count_lines(text, counted, start)
        counted = start
        yield _Place(start, end, fault, line)


def _check(place: _Place) -> None:
    if place.fault:
        raise UnusableRowError(f"Broken JSON: {place.fault}.")
    if place.end - place.start > MAX_ROW_BYTES:
        raise UnusableRowError(f"The row has {place.end - place.start} bytes, at most {MAX_ROW_BYTES} are read.")


def _parsed(place: _Place, text: bytes) -> Row:
    """The object that begins at a place."""
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise UnusableRowError("Broken JSON: it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise UnusableRowError(f"Broken JSON: {error.msg} (line {place.line + error.lineno - 1}).") from error
    except UnicodeDecodeError as error:
        message = f"Not UTF-8: {error.reason} at byte {place.start + error.start} of the file."
        raise UnusableRowError(message) from error
    except ValueError as error:  # a number of too many digits
        raise UnusableRowError(f"Broken JSON: {error}.") from error
    if not isinstance(row, dict):
        raise UnusableRowError(f"A row must be a JSON object, got {type(row).__name__}.")
    return row


def _count_lines(text: mmap.mmap | bytes, begin: int, end: int) -> int:
    """Line breaks in a part of the file, of which a piece at a time is copied."""
    size = 2**20
    return sum(text[start : min(start + size, end)].count(b"\n") for start in range(begin, end, size))


def _line_rows(text: mmap.mmap | bytes, begin: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, "") of each line that is not blank."""
    while begin < len(text):
        end = text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        if _WORD.search(text, begin, end):
            yield begin, end, ""
        begin = end + 1


def _array_rows(text: mmap.mmap | bytes, begin: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, fault) of each element of an array; a fault outside the elements is a row of its own."""
    depth, gap, start, behind = 0, _FIRST_GAP, begin, begin + 1
    for token in _TOKEN.finditer(text, begin):
        kind = text[token.start()]
        if token.end() - token.start() == 1 and kind == ord('"'):
            start = start if depth > 1 else token.start()
            break
        opens, closes = kind in _OPENING, kind in _CLOSING
        if depth == 1:
            yield from _faults_between(text, behind, token.start(), _FIRST_GAP if closes else gap)
            if closes:
                yield from _faults_at_end(text, token.start())
                return
            start = token.start()
        depth += opens - closes
        if depth == 1 and start > begin:
            yield start, token.end(), ""
            gap, behind = _GAP, token.end()
    yield start, len(text), "what begins here has no end"


def _faults_between(
    text: mmap.mmap | bytes, begin: int, end: int, expected: re.Pattern[bytes]
) -> Iterator[tuple[int, int, str]]:
    """What stands between two elements; numbers and other bare words show here, because they are no tokens."""
    allowed = _ALLOWED.match(text, begin, end)
    if allowed is not None and not expected.match(text, begin, end):
        yield allowed.end(), end, "expected one `,` between two rows and nothing else"


def _faults_at_end(text: mmap.mmap | bytes, end: int) -> Iterator[tuple[int, int, str]]:
    rest = _WORD.search(text, end + 1)
    if text[end : end + 1] != b"]":
        yield end, len(text), "`}` closes the array, expected `]`"
    elif rest is not None:
        yield rest.start(), len(text), "something follows the end of the array"
