"""Rows of a JSON file, found in one pass and read one at a time: JSON lines, or one array of objects.

Only the places of the rows are kept, 24 bytes for each, so that a file of any size can be opened, and every fault can
be told by its line. A broken row is an error when it is read, and does not hide the rows behind it.
"""

import json
import mmap
import re
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        self._faults: dict[int, str] = {}
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{self.path} is no regular file, expected JSON lines or a JSON array.")
        if status.st_size == 0:
            return
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            self._check_is_json(text)
            begin = len(BYTE_ORDER_MARK) if text[:3] == BYTE_ORDER_MARK else 0
            first = _WORD.search(text, begin)
            if first is not None and first[0] == b"[":
                self._index(text, _array_rows(text, first.start()))
            else:
                self._index(text, _line_rows(text, begin))

    def _check_is_json(self, text: mmap.mmap) -> None:
        head = text[:512]
        kind = next((kind for start, kind in _OTHERS.items() if head.startswith(start)), None)
        if kind is None and b"ustar" in head[257:265]:
            kind = "a tar archive"
        if kind is None and b"\0" in head and not (head[:1] in b"[{" and head[1:2] != b"\0"):
            kind = "a binary file"
        if kind is not None:
            raise ValueError(f"{self.path} is {kind}, expected JSON lines or a JSON array, in UTF-8.")

    def _index(self, text: mmap.mmap, rows: Iterator[tuple[int, int, str]]) -> None:
        line, counted = 1, 0
        for start, end, fault in rows:
            line += _count_lines(text, counted, start)
            counted = start
            if fault:
                self._faults[len(self._starts)] = fault
            self._starts.append(start)
            self._ends.append(end)
            self._lines.append(line)

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
        start, end = self._starts[index], self._ends[index]
        if index in self._faults:
            raise UnusableRowError(f"Broken JSON: {self._faults[index]}.")
        if end - start > MAX_ROW_BYTES:
            raise UnusableRowError(f"The row has {end - start} bytes, at most {MAX_ROW_BYTES} are read.")
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            row = json.loads(text)
        except RecursionError as error:
            raise UnusableRowError("Broken JSON: it is nested too deeply.") from error
        except json.JSONDecodeError as error:
            raise UnusableRowError(
                f"Broken JSON: {error.msg} (line {self.line(index) + error.lineno - 1})."
            ) from error
        except UnicodeDecodeError as error:
            raise UnusableRowError(f"Not UTF-8: {error.reason} at byte {start + error.start} of the file.") from error
        except ValueError as error:  # a number of too many digits
            raise UnusableRowError(f"Broken JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UnusableRowError(f"A row must be a JSON object, got {type(row).__name__}.")
        return row


def _count_lines(text: mmap.mmap, begin: int, end: int) -> int:
    """Line breaks in a part of the file, of which a piece at a time is copied."""
    size = 2**20
    return sum(text[start : min(start + size, end)].count(b"\n") for start in range(begin, end, size))


def _line_rows(text: mmap.mmap, begin: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, "") of each line that is not blank."""
    while begin < len(text):
        end = text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        if _WORD.search(text, begin, end):
            yield begin, end, ""
        begin = end + 1


def _array_rows(text: mmap.mmap, begin: int) -> Iterator[tuple[int, int, str]]:
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
    text: mmap.mmap, begin: int, end: int, expected: re.Pattern[bytes]
) -> Iterator[tuple[int, int, str]]:
    """What stands between two elements; numbers and other bare words show here, because they are no tokens."""
    allowed = _ALLOWED.match(text, begin, end)
    if allowed is not None and not expected.match(text, begin, end):
        yield allowed.end(), end, "expected one `,` between two rows and nothing else"


def _faults_at_end(text: mmap.mmap, end: int) -> Iterator[tuple[int, int, str]]:
    rest = _WORD.search(text, end + 1)
    if text[end : end + 1] != b"]":
        yield end, len(text), "`}` closes the array, expected `]`"
    elif rest is not None:
        yield rest.start(), len(text), "something follows the end of the array"
