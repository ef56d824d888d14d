"""Per-sample results: JSON lines that grow as a task runs, and with which a task that was stopped goes on.

The first line holds the settings, every other one a sample: its "id", its "scores" by metric, where it applies the
"cluster" of samples that are not independent of it (as a rule their image), and what a reader wants to see, such as
"image", "question", "expected" and "answer".
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from ..rows.json_files import is_finite_number
from ..writing import lock_file


Sample = dict[str, Any]
SETTINGS = "settings"


def read_samples(path: str | Path) -> tuple[dict[str, Any], list[Sample]]:
    """Reads the results of a task.

    Args:
        path: Written by a `SampleLog`. A last line that was torn off by a kill is left out.

    Returns:
        The settings and the samples.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds something else, or a sample twice.
    """
    path = Path(path)
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # what follows is empty, or torn, perhaps within a letter
    try:
        lines = whole.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds no results of samples: it is no UTF-8 ({error}).") from error
    rows = [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]
    if not rows:
        return {}, []
    if set(rows[0]) != {SETTINGS} or not isinstance(rows[0][SETTINGS], dict):
        raise ValueError(f"{path} holds no results of samples: its first line has to hold their settings.")
    samples = rows[1:]
    seen: set[str] = set()
    for number, sample in enumerate(samples, start=2):
        _check(path, number, sample)
        if sample["id"] in seen:
            raise ValueError(f"{path}, line {number}: the sample {sample['id']!r} is there twice.")
        seen.add(sample["id"])
    return rows[0][SETTINGS], samples


def differing_settings(found: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What differs between the settings of results and those of a run, in words; empty if nothing does."""
    names = sorted(key for key in {*found, *given} if found.get(key) != given.get(key))
    return ", ".join(f"{key} {found.get(key)!r}, now {given.get(key)!r}" for key in names)


class SampleLog:
    """The results of a task on disk, one sample after another.

    Args:
        path: Of the file; it is continued if it is there.
        settings: What decides the results, such as model, data and batch size; JSON.

    Attributes:
        done: The samples of an earlier run that was stopped, by their ids.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If it belongs to other settings, or is none.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings)))
        self._file: TextIO | None = None
        self._read()

    def _read(self) -> None:
        """Takes over what is in the file."""
        found, samples = read_samples(self.path) if self.path.exists() else ({}, [])
        differing = differing_settings(found, self.settings)
        if differing and samples:
            raise ValueError(
                f"{self.path} holds results of other settings ({differing}): delete it, or name another file."
            )
        self.done: dict[str, Sample] = {sample["id"]: sample for sample in samples}
        # A run that ended before its first result keeps nobody from another.
        self.is_new = bool(differing) or not (found or samples)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a", encoding="utf-8", newline="\n")
        try:
            lock_file(file, self.path)
            self._read()  # another run may have written meanwhile
            _cut_torn_line(self.path, keep=not self.is_new)
        except (OSError, ValueError):
            file.close()
            raise
        self._file = file
        if self.is_new:
            self._write({SETTINGS: self.settings})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def add(self, sample: Mapping[str, Any]) -> None:
        """Writes a sample: "id", "scores" by metric, and anything else that JSON takes.

        Raises:
            ValueError: If it was written before, or has no id or scores.
        """
        _check(self.path, len(self.done) + 2, sample)
        if sample["id"] in self.done:
            raise ValueError(f"The sample {sample['id']!r} was measured twice: ids have to differ.")
        self._write(sample)
        self.done[sample["id"]] = dict(sample)

    def check_done(self, fields: Sequence[str] = (), metrics: Sequence[str] = ()) -> None:
        """Checks that the samples of an earlier run have what a task reads of them.

        Raises:
            ValueError: If one lacks a field, or a score, as of another version of this package.
        """
        for sample in self.done.values():
            lacking = [name for name in fields if name not in sample]
            lacking += [name for name in metrics if name not in sample["scores"]]
            if lacking:
                what = f"{self.path}: the sample {sample['id']!r} lacks {lacking[0]!r}"
                raise ValueError(f"{what}: delete the file, and measure again.")

    def left(self, ids: Iterable[str]) -> Iterator[tuple[int, str]]:
        """Yields the samples that are still to be measured, as their places and ids."""
        return ((place, name) for place, name in enumerate(ids) if name not in self.done)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is not open: write samples within `with SampleLog(...) as log`.")
        self._file.write(json_text(row, allow_nan=False) + "\n")
        self._file.flush()


def json_text(content: Any, **settings: Any) -> str:
    """Returns JSON that can be written as UTF-8, with escapes where a text has half a character."""
    text = json.dumps(content, ensure_ascii=False, **settings)
    is_unicode = text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text)
    return text if is_unicode else json.dumps(content, **settings)


def values_by_metric(samples: Iterable[Sample]) -> dict[str, tuple[list[float], list[str]]]:
    """Returns, for every metric in the order of its first sample, the scores and the clusters of its samples."""
    found: dict[str, tuple[list[float], list[str]]] = {}
    for sample in samples:
        for metric, score in sample["scores"].items():
            scores, clusters = found.setdefault(metric, ([], []))
            scores.append(float(score))
            clusters.append(str(sample.get("cluster", sample["id"])))
    return found


def _parsed(path: Path, number: int, line: str) -> Sample:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: a JSON object is expected, not {type(row).__name__}.")
    return row


def _check(path: Path, number: int, sample: Mapping[str, Any]) -> None:
    scores = sample.get("scores")
    is_scored = isinstance(scores, dict) and all(map(is_finite_number, scores.values()))
    if not isinstance(sample.get("id"), str) or not is_scored:
        raise ValueError(f'{path}, line {number}: a sample needs an "id", a text, and "scores", a number per metric.')
    if not isinstance(sample.get("cluster", ""), (str, int)):
        raise ValueError(f'{path}, line {number}: the "cluster" of a sample has to be a text or a number.')


def _cut_torn_line(path: Path, keep: bool) -> None:
    """Cuts off what follows the last end of a line, so that the next sample begins a line; or all of it."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1 if keep else 0)
        os.fsync(file.fileno())


__all__ = ["Sample", "SampleLog", "differing_settings", "json_text", "read_samples", "values_by_metric"]
