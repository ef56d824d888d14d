"""The rules of the funnel as polars expressions over whole columns: the rows that `Funnel` keeps, counted alike.

Rules compare inputs: numbers in float64 without NaN, texts, and captions without blanks around them. `table_inputs`
makes them from the columns of a table, `row_inputs` from rows that may hold anything, and `judge_inputs` judges both.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...extras import extra
from ...rows.json_rows import Row
from ...rows.pair_rows import MAX_CAPTION, TEXT_COLUMNS
from .filters import (
    COLUMNS,
    COMPARISONS,
    DERIVED,
    NON_LETTERS,
    NUMBER,
    PATTERN_COMPARISONS,
    Filter,
    MissingColumnError,
    compared_value,
    metadata_row,
    missing_column,
    name_of_column,
)


with extra("filter"):
    import polars as pl

FAULT = "fault"
ROWS_AT_ONCE = 1024  # of files that are read row by row
BLANKS = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())  # what `str.strip` takes away
NO_CAPTION = "A column is missing: the row has no caption."


@dataclass(frozen=True)
class Input:
    """What rules compare: a column as a number or as a text."""

    column: str
    is_text: bool

    @property
    def name(self) -> str:
        """Its name in the table of inputs."""
        return f"{'text' if self.is_text else 'number'} {self.column}"


@dataclass(frozen=True)
class Verdict:
    """What rules say of the rows of a table.

    Args:
        kept: Of each row, whether it passes all rules.
        faults: What is wrong with each row; null for those that are sound.
        seen: Sound rows.
        tallies: Of each rule "removed", "failing" and "missing", see `Funnel.report`.
    """

    kept: pl.Series
    faults: pl.Series
    seen: int
    tallies: list[dict[str, int]]


def inputs_of(rules: Iterable[Filter], columns: Iterable[str]) -> tuple[Input, ...]:
    """Returns what rules compare.

    Args:
        rules: Of a funnel.
        columns: Of the data; what is there is not computed from others.
    """
    columns = set(columns)
    found = [Input("caption", True)]  # without one a row is broken
    for rule in rules:
        found += _inputs_of_rule(rule, columns)
    return tuple(dict.fromkeys(found))


def _inputs_of_rule(rule: Filter, columns: Collection[str]) -> list[Input]:
    if rule.column in DERIVED and rule.column not in columns:
        sources, _ = DERIVED[rule.column]
        return [Input(source, source == "caption") for source in sources]
    return [Input(rule.column, rule.is_on_text)]


def check_columns(rules: Iterable[Filter], columns: Iterable[str]) -> None:
    """Raises a `MissingColumnError` if a rule that is not optional finds no column."""
    columns = list(columns)
    missing = [
        (rule, wanted.column)
        for rule in rules
        for wanted in inputs_of([rule], columns)[1:]
        if not rule.is_optional and not set(COLUMNS.get(wanted.column, (wanted.column,))) & set(columns)
    ]
    if missing:
        rule, column = missing[0]
        raise missing_column(rule, name_of_column(column), columns, [rule.column for rule, _ in missing])


def check_columns_of_rows(
    raw_rows: Iterable[Row], rules: Sequence[Filter], images: str | None = None, known: Iterable[str] = ()
) -> None:
    """Raises a `MissingColumnError` if a rule that is not optional finds no column in the first rows of a shard.

    Args:
        raw_rows: Rows of `shards`, of which no more are read than it takes.
        rules: Of a funnel.
        images: See `metadata_row`.
        known: Columns that the rows will have by then.
    """
    columns: set[str] = set()
    missing = None
    for raw in islice(raw_rows, ROWS_AT_ONCE):
        columns |= row_inputs([raw], rules, images)[1]
        try:
            check_columns(rules, columns.union(known))
            return
        except MissingColumnError as error:
            missing = error
    if missing is not None and columns:
        raise missing


def check_patterns(rules: Iterable[Filter]) -> None:
    """Raises a ValueError if a rule's regular expression is not one of polars too."""
    for rule in rules:
        if rule.comparison in PATTERN_COMPARISONS:
            try:
                pl.select(pl.lit("").str.contains(str(rule.value)))
            except (pl.exceptions.PolarsError, UnicodeEncodeError) as error:
                reason = " ".join(str(error).split("This error occurred")[0].split())
                raise ValueError(f"The rule `{rule.name}` is not for whole columns: {reason:.200}.") from error


# ------------------------------------------------------------------------------------------------------------- judging
def judge_inputs(inputs: pl.LazyFrame, rules: Sequence[Filter], columns: Iterable[str]) -> Verdict:
    """Judges rows.

    Args:
        inputs: Of `table_inputs` or `row_inputs`.
        rules: Of a funnel, in its order.
        columns: Of the data.
    """
    columns = set(columns)
    flags: dict[str, pl.Expr] = {}
    for number, rule in enumerate(rules):
        flags[f"missing {number}"], flags[f"holds {number}"] = rule_expressions(rule, columns)
    found = inputs.select(pl.col(FAULT), **flags).collect()
    is_sound = found[FAULT].is_null()
    passes, left, tallies = is_sound, int(is_sound.sum()), []
    for number in range(len(rules)):
        holds, is_missing = found[f"holds {number}"], found[f"missing {number}"]
        passes = passes & holds
        still = int(passes.sum())
        failing = int((is_sound & ~holds).sum())
        tallies.append({"removed": left - still, "failing": failing, "missing": int((is_sound & is_missing).sum())})
        left = still
    return Verdict(passes, found[FAULT], int(is_sound.sum()), tallies)


def rule_expressions(rule: Filter, columns: Collection[str]) -> tuple[pl.Expr, pl.Expr]:
    """Returns where a rule finds no value, and where it holds, as expressions on inputs.

    Args:
        rule: Of a funnel.
        columns: Of the data.
    """
    # Not where the value is null, which is the same: words would be counted twice.
    is_missing = pl.any_horizontal(pl.col(one.name).is_null() for one in _inputs_of_rule(rule, columns))
    return is_missing, _comparison(rule, _value(rule, columns)).fill_null(rule.is_optional)


def _value(rule: Filter, columns: Collection[str]) -> pl.Expr:
    """What a rule compares, null where there is nothing."""
    if rule.column not in DERIVED or rule.column in columns:
        return pl.col(Input(rule.column, rule.is_on_text).name)
    caption = pl.col(Input("caption", True).name)
    width, height = (pl.col(Input(side, False).name) for side in ("width", "height"))
    has_size = width.is_not_null() & height.is_not_null()
    shorter = pl.min_horizontal(width, height)
    words = caption.str.split(" ").list
    values: dict[str, Callable[[], pl.Expr]] = {
        "shorter_side": lambda: pl.when(has_size).then(shorter),
        "aspect_ratio": lambda: pl.when(has_size).then(
            pl.max_horizontal(width, height) / pl.max_horizontal(shorter, pl.lit(1.0))
        ),
        "caption_length": lambda: caption.str.len_chars().cast(pl.Float64),
        "symbol_share": lambda: caption.str.count_matches(NON_LETTERS) / caption.str.len_chars(),
        "distinct_word_share": lambda: words.n_unique() / words.len(),
    }
    return values[rule.column]()


def _comparison(rule: Filter, value: pl.Expr) -> pl.Expr:
    if rule.comparison in PATTERN_COMPARISONS:
        found = value.str.strip_chars(BLANKS).str.contains(str(rule.value))
        return found if rule.comparison == "has" else ~found
    return COMPARISONS[rule.comparison](value, pl.lit(rule.value if rule.is_on_text else float(rule.value)))


# -------------------------------------------------------------------------------------------------------------- tables
def table_inputs(table: pl.LazyFrame, schema: Mapping[str, Any], rules: Sequence[Filter]) -> pl.LazyFrame:
    """Makes the inputs of rules from the columns of a table.

    Args:
        table: With columns of any types.
        schema: Its types, by name.
        rules: Of a funnel.
    """
    values, faults = {}, []
    for wanted in inputs_of(rules, schema):
        if wanted.column == "caption":
            value, fault = _caption(schema)
        else:
            value, fault = _first_there(wanted, schema)
        values[wanted.name] = value
        faults.append(fault)
    return table.select(pl.coalesce(faults).alias(FAULT), **values)


def input_columns(schema: Mapping[str, Any], rules: Sequence[Filter]) -> list[str]:
    """Returns the columns of a table that `table_inputs` reads."""
    wanted = set(TEXT_COLUMNS)
    for one in inputs_of(rules, schema):
        wanted |= set(COLUMNS.get(one.column, (one.column,)))
    return [name for name in schema if name in wanted]


def _caption(schema: Mapping[str, Any]) -> tuple[pl.Expr, pl.Expr]:
    """The caption without blanks around it, and its fault, as `caption_in` has them."""
    value, fault = pl.lit(None, pl.String), pl.lit(NO_CAPTION)
    for name in reversed([name for name in TEXT_COLUMNS if name in schema]):
        column, kind = pl.col(name), schema[name]
        problem: pl.Expr
        if kind in (pl.String, pl.Binary, pl.Categorical, pl.Enum):
            text = column.cast(pl.String, strict=False).str.strip_chars(BLANKS)
            problem = (
                pl.when(text.is_null()).then(pl.lit("The caption is not UTF-8."))
                .when(text == "").then(pl.lit("The caption is empty."))
                .when(text.str.len_chars() > MAX_CAPTION).then(pl.lit("The caption is too long."))
            )  # fmt: skip
        else:
            text, problem = pl.lit(None, pl.String), pl.lit("The caption is no text.")
        value = pl.when(column.is_null()).then(value).otherwise(text)
        fault = pl.when(column.is_null()).then(fault).otherwise(problem)
    return value, fault


def _first_there(wanted: Input, schema: Mapping[str, Any]) -> tuple[pl.Expr, pl.Expr]:
    """The first of the names of a column that has a value, and its fault."""
    value: pl.Expr = pl.lit(None, pl.String if wanted.is_text else pl.Float64)
    fault: pl.Expr = pl.lit(None, pl.String)
    names = COLUMNS.get(wanted.column, (wanted.column,))
    for name in reversed([name for name in names if name in schema]):
        column, kind = pl.col(name), schema[name]
        is_there = column.is_not_null() & column.is_not_nan() if kind.is_float() else column.is_not_null()
        own_value, is_broken = (_text if wanted.is_text else _number)(column, kind)
        problem = pl.when(is_broken).then(pl.lit(f"The column `{wanted.column}` cannot be compared."))
        value = pl.when(is_there).then(own_value).otherwise(value)
        fault = pl.when(is_there).then(problem).otherwise(fault)
    return value, fault


def _text(column: pl.Expr, kind: Any) -> tuple[pl.Expr, pl.Expr]:
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return column.cast(pl.String), pl.lit(False)
    return pl.lit(None, pl.String), column.is_not_null()


def _number(column: pl.Expr, kind: Any) -> tuple[pl.Expr, pl.Expr]:
    """A column as numbers, and where it holds something else; see `as_number`."""
    if kind.is_numeric() or kind in (pl.Boolean, pl.Null):
        return column.cast(pl.Float64), pl.lit(False)
    if kind in (pl.String, pl.Categorical, pl.Enum):
        text = column.cast(pl.String).str.strip_chars(BLANKS)
        is_number = text.str.contains(f"^{NUMBER}$")
        is_missing = text.str.to_lowercase().is_in(["", "nan"])
        return pl.when(is_number).then(text.cast(pl.Float64, strict=False)), ~is_number & ~is_missing
    return pl.lit(None, pl.Float64), column.is_not_null()


# ---------------------------------------------------------------------------------------------------------------- rows
def row_inputs(
    raw_rows: Sequence[Row], rules: Sequence[Filter], images: str | None = None
) -> tuple[pl.LazyFrame, set[str]]:
    """Makes the inputs of rules from raw rows of `shards`.

    Args:
        raw_rows: The rows.
        rules: Of a funnel.
        images: See `metadata_row`.

    Returns:
        The inputs, and the columns that the rows have.
    """
    rows: list[Row] = []
    faults: list[str | None] = []
    for raw in raw_rows:
        try:
            rows.append(metadata_row(raw, images))
            faults.append(None)
        except ValueError as error:
            rows.append({})
            faults.append(str(error))
    columns: set[str] = set().union(*rows)
    wanted = inputs_of(rules, columns)
    values: dict[str, list[Any]] = {one.name: [] for one in wanted}
    for number, row in enumerate(rows):
        for one in wanted:
            value = None
            try:
                value = compared_value(row, one.column, one.is_text)
            except MissingColumnError:
                pass
            except ValueError as error:
                faults[number] = faults[number] or str(error)
            values[one.name].append(value)
    kinds = {one.name: pl.String if one.is_text else pl.Float64 for one in wanted}
    return pl.DataFrame({FAULT: faults, **values}, schema={FAULT: pl.String, **kinds}).lazy(), columns


__all__ = [
    "ROWS_AT_ONCE",
    "Input",
    "Verdict",
    "check_columns",
    "check_columns_of_rows",
    "check_patterns",
    "input_columns",
    "inputs_of",
    "judge_inputs",
    "row_inputs",
    "rule_expressions",
    "table_inputs",
]
