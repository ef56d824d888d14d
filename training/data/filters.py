"""The paper's data funnel as data: a table of filter rules over the metadata of image-text pairs, and what each
removed.

The paper (section 3.3 and its supplement) trains stage 1 on 4.98 of 6.03 billion pairs and stage 2 on 1.03 billion of
them. It names the columns that it filters on, but no cut-off for any of them: the cut-offs of `FILTERS` are this
package's choice, each with its reason, and a table of one's own takes their place (`read_filters`).

`Funnel` judges one row after the other, as a training stream needs it; `filter_expressions` compiles the same table
for whole columns. Duplicates and images of evaluation sets are found by `near_duplicates`.
"""

import json
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import regex

from ...renaming_internvl import renamed_arguments, renamed_names
from ...rows.bad_rows import BadRows
from ...rows.json_rows import Row
from ...rows.pair_rows import IMAGE_COLUMNS, add_size, caption_in, image_source, metadata_of
from ...rows.shards import place_of_row, read_shards
from .caption_patterns import CAPTION_PATTERNS


STAGES = (1, 2)  # whose data the funnel filters
PAPER_PAIRS = {0: 6.03e9, 1: 4.98e9, 2: 1.03e9}  # before the funnel, and what stages 1 and 2 trained on
# The same by source (table 2 of the paper).
PAPER_SOURCES: dict[str, tuple[float, float, float]] = {
    "laion-en": (2.3e9, 1.94e9, 91e6),
    "laion-coco": (663e6, 550e6, 550e6),
    "coyo": (747e6, 535e6, 200e6),
    "cc12m": (12.4e6, 11.1e6, 11.1e6),
    "cc3m": (3.0e6, 2.6e6, 2.6e6),
    "sbu": (1.0e6, 1.0e6, 1.0e6),
    "wukong": (100e6, 69.4e6, 69.4e6),
    "laion-multi": (2.2e9, 1.87e9, 100e6),
}


@cache
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _has(text: str, pattern: str) -> bool:
    return _compiled(pattern).search(text.strip()) is not None


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
    "has": _has,
    "lacks": lambda text, pattern: not _has(text, pattern),
}
PATTERN_COMPARISONS = ("has", "lacks")  # with a regular expression, in a syntax that Rust and `regex` share
NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"  # in texts, such as the fields of CSV


@dataclass(frozen=True)
class Filter:
    """A row of the table: rows of data for which the comparison does not hold are removed.

    Args:
        column: What is compared: a name of `COLUMNS` or `DERIVED`, or any column of the data.
        comparison: One of `COMPARISONS`, column on the left.
        value: What it is compared with.
        stage: The first stage whose data it filters; the stages after it inherit the rule.
        why: Where the rule comes from.
        is_optional: Whether data without this column passes. Otherwise it is an error.
        label: What reports call it; empty for column, comparison and value.
    """

    column: str
    comparison: str
    value: float | str
    stage: int
    why: str
    is_optional: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("column", "comparison", "why", "label"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be a text, got {getattr(self, name)!r:.80}.")
        if not isinstance(self.is_optional, bool):
            raise ValueError(f"`is_optional` must be true or false, got {self.is_optional!r:.80}.")
        if self.comparison not in COMPARISONS:
            raise ValueError(f"`comparison` must be one of {', '.join(COMPARISONS)}, got `{self.comparison}`.")
        if isinstance(self.stage, bool) or self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {STAGES}, got {self.stage!r}.")
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float, str)):
            raise ValueError(f"`value` must be a number or a text, got {self.value!r:.80}.")
        if not isinstance(self.value, str) and not abs(self.value) <= sys.float_info.max:
            raise ValueError(f"`value` must be a finite number, got {self.value!r:.80}.")
        if self.comparison in PATTERN_COMPARISONS:
            self._check_pattern()

    def _check_pattern(self) -> None:
        if not isinstance(self.value, str):
            raise ValueError(f"`value` must be a regular expression for `{self.comparison}`, got {self.value!r}.")
        try:
            _compiled(self.value)
        except regex.error as error:
            raise ValueError(f"`value` is no regular expression: {error}.") from error

    @property
    def name(self) -> str:
        """The rule in a few characters."""
        return self.label or f"{self.column} {self.comparison} {str(self.value)[:40]}"

    @property
    def is_on_text(self) -> bool:
        """Whether it compares texts, and not numbers."""
        return isinstance(self.value, str)


# Stage 1 removes the extremes only and keeps most pairs; stage 2 is strict (paper, section 3.3).
FILTERS = (
    Filter(
        "similarity", ">=", 0.20, 1, "CLIP similarity; LAION itself cut at 0.26 to 0.28, other sources did not cut"
    ),
    Filter("watermark", "<=", 0.95, 1, "probability of a watermark: only where it is nearly certain"),
    Filter("unsafe", "<=", 0.95, 1, "probability of unsafe content: only where it is nearly certain"),
    Filter(
        "aesthetic", ">=", 3.0, 1, "LAION's aesthetic score from 1 to 10: below 3 are mostly scans and placeholders"
    ),
    Filter("shorter_side", ">=", 64, 1, "LAION dropped smaller images too; they are blown up to 196 px in stage 1"),
    Filter("aspect_ratio", "<=", 5, 1, "banners, which a square resize distorts beyond recognition"),
    Filter("caption_length", ">=", 5, 1, "characters; LAION dropped shorter captions too"),
    Filter(
        "caption_length", "<=", 1000, 1, "characters; more than 80 tokens, most of which the text encoder cuts off"
    ),
    Filter("similarity", ">=", 0.28, 2, "LAION's cut for English pairs, now for every source"),
    Filter("watermark", "<=", 0.5, 2, "more likely marked than not: captioning learns to repeat marks"),
    Filter("unsafe", "<=", 0.5, 2, "more likely unsafe than not"),
    Filter("aesthetic", ">=", 4.5, 2, "the cut of LAION's aesthetic subsets"),
    Filter("shorter_side", ">=", 224, 2, "the image size of stage 2: nothing is blown up"),
    Filter("aspect_ratio", "<=", 3, 2, "a square resize changes shapes by three at most"),
    Filter("caption_length", ">=", 15, 2, "characters; shorter captions are mostly file names and single words"),
    Filter("caption_length", "<=", 300, 2, "characters; fits the text encoder whole"),
    Filter("symbol_share", "<=", 0.4, 2, "readability; digits and signs: part numbers and tables"),
    Filter("distinct_word_share", ">=", 0.3, 2, "boilerplate; a caption that repeats itself describes nothing"),
    *(
        Filter("caption", "lacks", pattern.expression, 2, pattern.why, label=f"caption lacks {name}")
        for name, pattern in CAPTION_PATTERNS.items()
    ),
)

# Names under which the usual data sets carry a column; the first that a row has is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "similarity": ("similarity", "clip_similarity", "clip_similarity_vitb32", "clip_similarity_vitl14"),
    "watermark": ("watermark", "pwatermark", "watermark_score", "watermark_probability"),
    "unsafe": ("unsafe", "punsafe", "nsfw_score", "nsfw_score_opennsfw2", "unsafe_probability"),
    "aesthetic": ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
    "width": ("original_width", "width", "WIDTH"),
    "height": ("original_height", "height", "HEIGHT"),
    "caption": ("caption", "txt", "text", "TEXT", "alt_text"),
}
NON_LETTERS = r"[^\p{L}\p{M}\p{Z}\x00-\x20\x85]"


def as_number(value: Any) -> float | None:
    """Returns a value of a row as a number; None for NaN, and for a text that is empty or says NaN.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("", "nan"):
            return None
        if not _compiled(f"^{NUMBER}$").search(text):
            raise ValueError(f"It is no number: {text!r:.80}.")
        return float(text)
    if isinstance(value, (bytes, list, tuple, dict)):
        raise ValueError(f"It is no number, but of type {type(value).__name__}.")
    try:
        number = float(value)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"It is no number: {error}.") from error
    return None if math.isnan(number) else number


def _of_size(compute: Callable[[float, float], float]) -> Callable[[Any, Any], float | None]:
    def value(width: Any, height: Any) -> float | None:
        numbers = as_number(width), as_number(height)
        return None if None in numbers else compute(*numbers)  # type: ignore[arg-type]

    return value


def _symbol_share(caption: str) -> float:
    text = caption.strip()
    return len(_compiled(NON_LETTERS).findall(text)) / max(len(text), 1)


def _distinct_word_share(caption: str) -> float:
    words = caption.strip().split(" ")
    return len(set(words)) / len(words)


# Columns computed from others.
DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., float | None]]] = {
    "shorter_side": (("width", "height"), _of_size(min)),
    "aspect_ratio": (
        ("width", "height"),
        _of_size(lambda width, height: max(width, height) / max(min(width, height), 1)),
    ),
    "caption_length": (("caption",), lambda caption: len(caption.strip())),
    "symbol_share": (("caption",), _symbol_share),
    "distinct_word_share": (("caption",), _distinct_word_share),
}


def paper_share(stage: int, source: str | None = None) -> float:
    """Returns the share of pairs that the paper kept for a stage, of all or of one of `PAPER_SOURCES`."""
    counts = PAPER_PAIRS if source is None else PAPER_SOURCES[source]
    return counts[stage] / counts[0]


class MissingColumnError(ValueError):
    """The data lacks what a rule compares."""


def read_filters(path: str | Path) -> tuple[Filter, ...]:
    """Reads a table of rules.

    Args:
        path: JSON file: a list of objects with the fields of `Filter`.

    Returns:
        The rules, in the order of the file.

    Raises:
        ValueError: If an entry is no rule.
    """
    known = {field.name for field in fields(Filter)}
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(table, list) or not all(isinstance(entry, dict) for entry in table):
        raise ValueError(f"`{path}` must hold a list of objects with the fields {', '.join(sorted(known))}.")
    rules = []
    for number, entry in enumerate(table, start=1):
        needed = {field.name for field in fields(Filter) if field.default is MISSING}
        if not needed <= set(entry) <= known:
            raise ValueError(
                f"Filter {number} of `{path}` must have the fields {', '.join(sorted(needed))}, may have "
                f"{', '.join(sorted(known - needed))}, and has {', '.join(sorted(entry))}."
            )
        try:
            rules.append(Filter(**entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Filter {number} of `{path}` cannot be used: {error}") from error
    return tuple(rules)


def with_optional(rules: Iterable[Filter], columns: Iterable[str]) -> tuple[Filter, ...]:
    """The rules, those on certain columns made optional.

    Args:
        rules: A table.
        columns: What the data at hand lacks.

    Returns:
        The new table.

    Raises:
        ValueError: If no rule is on one of the columns.
    """
    rules, columns = tuple(rules), set(columns)
    unknown = columns - {rule.column for rule in rules}
    if unknown:
        raise ValueError(f"No rule is on {', '.join(sorted(unknown))}; the table knows {_listed(rules)}.")
    return tuple(replace(rule, is_optional=True) if rule.column in columns else rule for rule in rules)


@dataclass
class _Tally:
    """What a rule did: rows it removed as the first to fail, rows it alone would remove, rows without a value."""

    removed: int = 0
    failing: int = 0
    missing: int = 0


class Funnel:
    """The rules of one stage, and the count of what they did.

    Where a row lacks the column of a rule, that is an error, or the row passes if the rule is optional. Where the
    column is there and its value is missing (null, NaN), the row is removed, or passes if the rule is optional.

    Args:
        stage: Rules of this stage and those before it are applied, in the order of the table.
        rules: The table.
    """

    def __init__(self, stage: int, rules: Sequence[Filter] = FILTERS) -> None:
        if stage not in STAGES:
            raise ValueError(f"`stage` must be one of {STAGES}, got {stage!r}.")
        self.stage = stage
        self.rules = tuple(sorted((rule for rule in rules if rule.stage <= stage), key=lambda rule: rule.stage))
        self.seen = 0
        self.kept = 0
        self._tallies = [_Tally() for _ in self.rules]

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Judges one row, and counts it.

        Args:
            row: Metadata of a pair.

        Returns:
            Whether it passes all rules.

        Raises:
            MissingColumnError: If a rule that is not optional finds no column.
            ValueError: If a value cannot be compared; the row is not counted then.
        """
        values = [self._value(row, rule) for rule in self.rules]
        verdicts = [_holds(rule, value) for rule, value in zip(self.rules, values, strict=True)]
        self.seen += 1
        passes = True
        for tally, value, holds in zip(self._tallies, values, verdicts, strict=True):
            tally.missing += value is None
            if holds:
                continue
            tally.failing += 1
            tally.removed += passes
            passes = False
        self.kept += passes
        return passes

    def add(self, seen: int, kept: int, tallies: Sequence[Mapping[str, int]]) -> None:
        """Adds a count of the same rules, such as `filter_expressions` makes: for each rule "removed", "failing" and
        "missing"."""
        self.seen += seen
        self.kept += kept
        for tally, more in zip(self._tallies, tallies, strict=True):
            tally.removed += more["removed"]
            tally.failing += more["failing"]
            tally.missing += more["missing"]

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows of a stream that pass."""
        return (row for row in rows if self.keeps(row))

    def report(self) -> dict[str, Any]:
        """The count so far: "stage", "seen", "kept", "kept_share", "paper_kept_share", and "rules".

        Each rule has its fields, "removed" (rows of which it is the first that fails) and "removed_share" of the rows
        seen, "failing" (rows that fail it, whatever the others say) and "failing_share", "missing" (rows without a
        value), "left", the rows that are left behind it, "skipped", whether it judged none because all lack its
        column, and "name".
        """
        left, rows = self.seen, []
        for rule, tally in zip(self.rules, self._tallies, strict=True):
            left -= tally.removed
            shares = {"removed_share": self._share(tally.removed), "failing_share": self._share(tally.failing)}
            is_skipped = 0 < self.seen == tally.missing and rule.is_optional
            rows.append(
                {**asdict(rule), "name": rule.name, **asdict(tally), **shares, "left": left, "skipped": is_skipped}
            )
        return {
            "stage": self.stage,
            "seen": self.seen,
            "kept": self.kept,
            "kept_share": self._share(self.kept),
            "paper_kept_share": paper_share(self.stage),
            "rules": rows,
        }

    def _share(self, count: int) -> float:
        return count / self.seen if self.seen else 0.0

    @staticmethod
    def _value(row: Mapping[str, Any], rule: Filter) -> Any:
        """What the rule compares, a number or a text; None where there is nothing."""
        try:
            return compared_value(row, rule.column, rule.is_on_text)
        except MissingColumnError as error:
            if rule.is_optional:
                return None
            raise missing_column(rule, str(error), row) from error


def _holds(rule: Filter, value: Any) -> bool:
    return rule.is_optional if value is None else bool(COMPARISONS[rule.comparison](value, rule.value))


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value that a rule compares, None where the column is there without a value."""
    if column in DERIVED and column not in row:
        sources, compute = DERIVED[column]
        values = [value_of(row, source) for source in sources]
        try:
            return None if any(value is None for value in values) else compute(*values)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"The column `{column}` cannot be computed from {values!r:.80}.") from error
    names = COLUMNS.get(column, (column,))
    found = [row[name] for name in names if name in row]
    if not found:
        raise MissingColumnError(name_of_column(column))
    return next((value for value in found if not (value is None or value != value)), None)


def compared_value(row: Mapping[str, Any], column: str, is_text: bool) -> float | str | None:
    """The value of a column as a text, or as a number; None where there is nothing.

    Raises:
        MissingColumnError: If there is no such column.
        ValueError: If the value is something else.
    """
    value = value_of(row, column)
    try:
        if not is_text:
            return None if value is None else as_number(value)
        if value is not None and not isinstance(value, str):
            raise ValueError("It is no text.")
    except ValueError as error:
        raise ValueError(f"The column `{column}` cannot be compared: it is {value!r:.80}.") from error
    return value


def name_of_column(column: str) -> str:
    """The column and its other names, for messages."""
    names = COLUMNS.get(column, (column,))
    return f"column `{column}`" + (f" (nor {', '.join(names[1:])})" if len(names) > 1 else "")


def missing_column(
    rule: Filter, missing: str, columns: Iterable[str], without: Sequence[str] = ()
) -> MissingColumnError:
    """The error of a rule that finds no column.

    Args:
        rule: It.
        missing: Of `name_of_column`.
        columns: That the data has.
        without: Columns of all rules that find none; by default that of this rule.
    """
    options = " ".join(f"--without {column}" for column in dict.fromkeys(without or [rule.column]))
    scored = ", have `score` fill it in" * (rule.column == "similarity")
    return MissingColumnError(
        f"The rule `{rule.name}` finds no {missing}; the data has {', '.join(sorted(map(str, columns)))}. Rename the "
        f"column{scored}, or let all pairs pass that lack it: `{options}` of `funnel`, `filter` and `prepare`."
    )


def _listed(rules: Iterable[Filter]) -> str:
    return ", ".join(dict.fromkeys(rule.column for rule in rules))


def metadata_row(raw: Row, images: str | None = None) -> Row:
    """Returns the metadata of a raw row of `shards`, with "caption", and with "width" and "height" out of the image's
    header where there is an image.

    Args:
        raw: The row.
        images: Folder of the images that rows name by a path; None takes the folder of the shard.

    Raises:
        ValueError: If the row is broken.
    """
    row = metadata_of(raw)
    row["caption"] = caption_in(row)
    if any(row.get(column) is not None for column in IMAGE_COLUMNS):
        add_size(row, image_source(row, folder=images))
    return row


@renamed_arguments(broken_rows="bad_rows")
def metadata_rows(shards: Sequence[str], bad_rows: BadRows) -> Iterator[Mapping[str, Any]]:
    """Metadata of every pair in shards; images are not decoded, and need not be there.

    Args:
        shards: Files, see `find_shards`.
        bad_rows: The limit on rows whose metadata cannot be read, and their count.

    Yields:
        Rows for `Funnel`.
    """
    for raw in read_shards(shards):
        try:
            row = metadata_row(raw)
        except ValueError as error:
            bad_rows.count(place_of_row(raw), error)
            continue
        bad_rows.count()
        yield row


__getattr__ = renamed_names(globals(), RULES="FILTERS", Rule="Filter", read_rules="read_filters")
