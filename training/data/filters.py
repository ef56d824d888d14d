"""The paper's data funnel as data: a table of filter rules over the metadata of image-text pairs, and what each
removed.

The paper (section 3.3 and its supplement) trains stage 1 on 4.98 of 6.03 billion pairs and stage 2 on 1.03 billion of
them. It names the columns that it filters on, but no cut-off for any of them: the cut-offs of `FILTERS` are this
package's choice, each with its reason, and a table of one's own takes their place (`read_filters`). Not covered:
removing images of the evaluation sets, and judging what a caption says.
"""

import argparse
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...extras import extra
from ...renaming_internvl import renamed_arguments, renamed_names
from ...rows.bad_rows import BadRows
from ...rows.pair_rows import IMAGE_COLUMNS, add_size, caption_in, image_source, metadata_of
from ...rows.shards import find_shards, place_of_row, read_shards


STAGES = (1, 2)  # whose data the funnel filters
PAPER_PAIRS = {0: 6.03e9, 1: 4.98e9, 2: 1.03e9}  # before the funnel, and what stages 1 and 2 trained on

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


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
    """

    column: str
    comparison: str
    value: float | str
    stage: int
    why: str
    is_optional: bool = False

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise ValueError(f"`comparison` must be one of {', '.join(COMPARISONS)}, got `{self.comparison}`.")
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {STAGES}, got {self.stage!r}.")

    @property
    def name(self) -> str:
        """The rule in a few characters."""
        return f"{self.column} {self.comparison} {self.value}"


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
# Columns computed from others.
DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "shorter_side": (("width", "height"), lambda width, height: min(width, height)),
    "aspect_ratio": (("width", "height"), lambda width, height: max(width, height) / max(min(width, height), 1)),
    "caption_length": (("caption",), lambda caption: len(caption.strip())),
}


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
        try:
            rules.append(Filter(**entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Filter {number} of `{path}` is none: {error}") from error
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

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows of a stream that pass."""
        return (row for row in rows if self.keeps(row))

    def report(self) -> dict[str, Any]:
        """The count so far: "stage", "seen", "kept", "kept_share", "paper_kept_share", and "rules".

        Each rule has its fields, "removed" (rows of which it is the first that fails) and "removed_share" of the rows
        seen, "failing" (rows that fail it, whatever the others say) and "failing_share", "missing" (rows without a
        value), "left", the rows that are left behind it, and "skipped", whether it judged none because all lack its
        column.
        """
        left, rows = self.seen, []
        for rule, tally in zip(self.rules, self._tallies, strict=True):
            left -= tally.removed
            shares = {"removed_share": self._share(tally.removed), "failing_share": self._share(tally.failing)}
            is_skipped = 0 < self.seen == tally.missing and rule.is_optional
            rows.append({**asdict(rule), **asdict(tally), **shares, "left": left, "skipped": is_skipped})
        return {
            "stage": self.stage,
            "seen": self.seen,
            "kept": self.kept,
            "kept_share": self._share(self.kept),
            "paper_kept_share": PAPER_PAIRS[self.stage] / PAPER_PAIRS[0],
            "rules": rows,
        }

    def _share(self, count: int) -> float:
        return count / self.seen if self.seen else 0.0

    @staticmethod
    def _value(row: Mapping[str, Any], rule: Filter) -> Any:
        """What the rule compares; None where there is nothing."""
        try:
            return _value_of(row, rule.column)
        except MissingColumnError as error:
            if rule.is_optional:
                return None
            raise MissingColumnError(
                f"The rule `{rule.name}` finds no {error}; the data has {', '.join(map(str, row))}. Rename the "
                "column, or make the rule optional."
            ) from error


def _holds(rule: Filter, value: Any) -> bool:
    if value is None:
        return rule.is_optional
    try:
        return bool(COMPARISONS[rule.comparison](value, rule.value))
    except TypeError as error:
        raise ValueError(f"The column `{rule.column}` cannot be compared: it is {value!r:.80}.") from error


def _value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value that a rule compares, None where the column is there without a value."""
    if column in DERIVED and column not in row:
        sources, compute = DERIVED[column]
        values = [_value_of(row, source) for source in sources]
        try:
            return None if any(value is None for value in values) else compute(*values)
        except (ArithmeticError, AttributeError, TypeError) as error:
            raise ValueError(f"The column `{column}` cannot be computed from {values!r:.80}.") from error
    names = COLUMNS.get(column, (column,))
    name = next((name for name in names if name in row), None)
    if name is None:
        raise MissingColumnError(f"column `{column}`" + (f" (nor {', '.join(names[1:])})" if len(names) > 1 else ""))
    value = row[name]
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _listed(rules: Iterable[Filter]) -> str:
    return ", ".join(dict.fromkeys(rule.column for rule in rules))


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draws the funnel: rows left behind each rule.

    Args:
        report: What `Funnel.report` returned.
        path: File to write; its ending says the format.
    """
    with extra("plot"):
        from matplotlib.figure import Figure

    rules = report["rules"]
    seen = max(report["seen"], 1)
    labels = ["all", *(_name_of(row) + " (skipped)" * row["skipped"] for row in rules)]
    left = [1.0, *(row["left"] / seen for row in rules)]
    colours = ["0.6", *("tab:blue" if row["stage"] == 1 else "tab:orange" for row in rules)]
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(left)), left, color=colours)
    axes.set_yticks(range(len(left)), labels)
    axes.bar_label(bars, labels=[f"{share:.1%}" for share in left], padding=3)
    for stage in range(1, report["stage"] + 1):
        share = PAPER_PAIRS[stage] / PAPER_PAIRS[0]
        axes.axvline(share, color="0.3", linestyle=":")
        axes.text(share, len(labels) - 0.4, f" paper, stage {stage}", fontsize="small", va="top")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="share of the pairs left", title=f"Data funnel up to stage {report['stage']}")
    figure.savefig(path)


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
            row = metadata_of(raw)
            row["caption"] = caption_in(row)
            if any(row.get(column) is not None for column in IMAGE_COLUMNS):
                add_size(row, image_source(row))
        except ValueError as error:
            bad_rows.count(place_of_row(raw), error)
            continue
        bad_rows.count()
        yield row


def _name_of(row: Mapping[str, Any]) -> str:
    return f"{row['column']} {row['comparison']} {row['value']}"


def _outcome_of(row: Mapping[str, Any]) -> str:
    """What a rule of the report did, in words: a rule that judged nothing removed nothing, which is not the same."""
    if row["skipped"]:
        return "skipped: the data has no such column"
    outcome = f"removed {row['removed']:>9} ({row['removed_share']:6.2%})"
    passed = row["missing"] if row["is_optional"] else 0
    return outcome + (f", {passed} without a value passed" if passed else "")


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `funnel`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    rules = FILTERS if options.rules is None else read_filters(options.rules)
    funnel, bad_rows = Funnel(options.stage, with_optional(rules, options.without)), BadRows()
    rows = metadata_rows(find_shards(options.data), bad_rows)
    for row in tqdm(rows, desc="funnel", unit="pair", leave=False, disable=None):
        try:
            funnel.keeps(row)
        except MissingColumnError:  # of all rows, not of this one
            raise
        except ValueError as error:
            bad_rows.count(place_of_row(row), error)
    report = {**funnel.report(), "broken": bad_rows.broken}
    for row in report["rules"]:
        print_fn(f"stage {row['stage']}  {_name_of(row):<26} {_outcome_of(row)}")
    print_fn(
        f"{report['kept']} of {report['seen']} pairs are kept ({report['kept_share']:.2%}), {report['broken']} broken."
    )
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot_report(report, options.plot)
    return 0


__getattr__ = renamed_names(globals(), RULES="FILTERS", Rule="Filter", read_rules="read_filters")
