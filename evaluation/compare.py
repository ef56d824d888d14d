"""Is B better than A, on the same samples? `python -m internvl.evaluation compare A.json B.json`.

Each argument is a report with the results of its samples beside it, or the file of these alone (`.jsonl`). Every
metric that single samples have is compared, paired by their ids and clustered as they say, see `statistics`. Metrics
of all samples at once, such as an mIoU, are named and left out.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..console import printable
from ..writing import check_writable
from .reports import read_report, samples_file, samples_of, write_report
from .samples import Sample, read_samples
from .statistics import Comparison, compare_scores, holm


ALPHA = 0.05
POINTS = 100  # of a score of 1
SAME_IN_BOTH = ("question", "expected", "caption")  # what a sample of one id shows and asks


@dataclass(frozen=True)
class Results:
    """What is compared: a task's samples by id, and the metrics of the report.

    The task is empty where a file of samples does not name it.
    """

    path: Path
    task: str
    model: str
    samples: dict[str, Sample]
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedMetric:
    """A metric of B against A.

    Args:
        task: The task or protocol.
        metric: Its name.
        comparison: What `compare_scores` found.
        p_value: That of the comparison, adjusted after Holm, see `compare_results`.
        p_equivalent: The same of equivalence; None without a margin.
    """

    task: str
    metric: str
    comparison: Comparison
    p_value: float
    p_equivalent: float | None

    @property
    def verdict(self) -> str:
        """Returns "equivalent", "better", "worse" or "not decided"."""
        if self.p_equivalent is not None and self.p_equivalent <= ALPHA:
            return "equivalent"
        return self.direction or "not decided"

    @property
    def direction(self) -> str:
        """Returns "better" or "worse" where a difference is shown, also one within the margin; else an empty text."""
        if self.p_value > ALPHA:
            return ""
        return "better" if self.comparison.difference > 0 else "worse"


# ------------------------------------------------------------------------------------------------------------- reading
def read_results(path: str | Path) -> Results:
    """Reads a report and the samples beside it, or a file of samples alone.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is none, or names no samples.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        settings, samples = read_samples(path)
        report: dict[str, Any] = {"task": settings.get("task"), "model": settings.get("model"), "metrics": {}}
    else:
        report = read_report(path)
        if not isinstance(report.get("samples"), str):
            raise ValueError(f"{path} names no results of its samples, and a comparison needs them.")
        _, samples = read_samples(samples_of(path, report))
    if not samples:
        raise ValueError(f"{path} has no samples to compare.")
    task, model = str(report.get("protocol") or report.get("task") or ""), str(report.get("model") or path.stem)
    return Results(path, task, model, {sample["id"]: sample for sample in samples}, tuple(report["metrics"]))


def check_same_samples(first: Results, second: Results) -> None:
    """Checks that two results are of the same samples.

    Raises:
        ValueError: The tasks differ, an id is in one of them only, or a sample is another one in the second.
    """
    both = f"{first.path} and {second.path}"
    if first.task and second.task and first.task != second.task:
        raise ValueError(f"{both} are of different tasks, {first.task} and {second.task}.")
    only = [sorted(one.samples.keys() - other.samples.keys()) for one, other in ((first, second), (second, first))]
    if any(only):
        said = " and ".join(
            f"{len(names)} only in the {place} (such as {names[0]!r})"
            for names, place in zip(only, ("first", "second"), strict=True)
            if names
        )
        raise ValueError(f"{both} are not of the same samples: {said}.")
    for name, sample in first.samples.items():
        other = second.samples[name]
        for key in (*SAME_IN_BOTH, "cluster"):
            if key in sample and key in other and sample[key] != other[key]:
                raise ValueError(f"{both} are not of the same samples: of {name!r} the {key} differs.")


# ----------------------------------------------------------------------------------------------------------- comparing
def metrics_in_both(first: Results, second: Results) -> list[str]:
    """Returns the metrics that the samples of both have, in the order of the first.

    Raises:
        ValueError: There is none, or one that is of other samples in the second.
    """
    ids = [_ids_by_metric(results) for results in (first, second)]
    found = [metric for metric in ids[0] if metric in ids[1]]
    if not found:
        raise ValueError(
            f"{first.path} and {second.path} have no metric in common: {', '.join(ids[0])}; {', '.join(ids[1])}."
        )
    for metric in found:
        if ids[0][metric] != ids[1][metric]:
            raise ValueError(f"{first.path} and {second.path} have {metric!r} of different samples.")
    return found


def _ids_by_metric(results: Results) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, sample in results.samples.items():
        for metric in sample["scores"]:
            found.setdefault(metric, set()).add(name)
    return found


def compare_results(
    pairs: Iterable[tuple[Results, Results]], margin: float | None = None, metrics: Sequence[str] = ()
) -> list[list[ComparedMetric]]:
    """Compares pairs of results; p values are adjusted for all of their metrics together.

    Metrics of a part of the samples, such as `accuracy/count` beside `accuracy`, are adjusted among themselves: that
    they are shown too makes nothing less certain of the whole.

    Args:
        pairs: A and B, as often as there are tasks.
        margin: Points (hundredths of a score) below which a difference does not matter.
        metrics: Those to compare; all if there are none.

    Returns:
        The compared metrics of every pair.

    Raises:
        ValueError: The two of a pair are not of the same samples, or lack a metric.
    """
    found = [list(_compare_pair(*pair, margin, metrics)) for pair in pairs]
    rows = [row for of_pair in found for row in of_pair]
    wholes = {(task, metric) for task, metric, _ in rows}
    families: dict[bool, list[int]] = {True: [], False: []}
    for place, (task, metric, _) in enumerate(rows):
        families[any((task, whole) in wholes for whole in _wholes_of(metric))].append(place)
    adjusted = {}
    for places in families.values():
        p_values = holm([rows[place][2].p_value for place in places])
        beyond = holm([rows[place][2].p_equivalent or 0.0 for place in places])  # 0 without a margin
        for place, *both in zip(places, p_values, beyond, strict=True):
            adjusted[place] = ComparedMetric(*rows[place], both[0], None if margin is None else both[1])
    in_order = iter(sorted(adjusted.items()))
    return [[next(in_order)[1] for _ in of_pair] for of_pair in found]


def _wholes_of(metric: str) -> list[str]:
    """What a metric may be a part of: `a/b` and `a` for `a/b/c`."""
    parts = metric.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _compare_pair(
    first: Results, second: Results, margin: float | None, metrics: Sequence[str]
) -> Iterable[tuple[str, str, Comparison]]:
    check_same_samples(first, second)
    known = metrics_in_both(first, second)
    if missing := [metric for metric in metrics if metric not in known]:
        raise ValueError(f"{first.path} and {second.path} have no {missing[0]!r}, but {', '.join(known)}.")
    for metric in dict.fromkeys(metrics or known):
        samples = [sample for sample in first.samples.values() if metric in sample["scores"]]
        ours, theirs = ([one.samples[sample["id"]]["scores"][metric] for sample in samples] for one in (first, second))
        clusters = [sample.get("cluster", sample["id"]) for sample in samples]
        found = compare_scores(ours, theirs, clusters, None if margin is None else margin / POINTS)
        yield first.task or first.path.stem, metric, found


# -------------------------------------------------------------------------------------------------------------- output
def format_comparison(rows: Iterable[ComparedMetric], margin: float | None) -> str:
    """Formats compared metrics as a table in Markdown, in points."""
    lines = [
        "| task | metric | A | B | difference | 95 % interval | p | detectable | B is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row.comparison
        low, high = (f"{POINTS * end:+.2f}" for end in found.interval)
        cells = (
            printable(row.task).replace("|", "\\|"),
            printable(row.metric).replace("|", "\\|"),
            f"{POINTS * found.first:.2f}",
            f"{POINTS * found.second:.2f}",
            f"{POINTS * found.difference:+.2f}",
            f"{low} to {high}",
            f"{row.p_value:.2g}",
            f"{POINTS * found.detectable:.2f}",
            _said(row, margin),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(row: ComparedMetric, margin: float | None) -> str:
    if row.verdict == "equivalent":
        return f"equivalent within {margin:g}" + f" (yet {row.direction})" * bool(row.direction)
    return row.verdict


def comparison_as_json(row: ComparedMetric) -> dict[str, Any]:
    """A compared metric as JSON; what is not finite becomes null."""
    content = {
        **asdict(row.comparison),
        "difference": row.comparison.difference,
        "p_holm": row.p_value,
        "p_equivalent_holm": row.p_equivalent,
        "verdict": row.verdict,
    }
    content["interval"] = [_finite(end) for end in row.comparison.interval]
    return {key: _finite(value) if isinstance(value, float) else value for key, value in content.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compare`."""
    parser.add_argument(
        "reports",
        nargs="+",
        type=Path,
        metavar="REPORT",
        help="A.json B.json, and as many more pairs; of each a report of a task, or its file of samples",
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="also test whether the two are equivalent: differ by less than this, in hundredths of a score",
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="compare this one alone; may be repeated"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the comparison to this JSON file too")


def run(options: argparse.Namespace) -> None:
    """Compares reports, prints the table, and writes the file.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If files are not in pairs, no reports, or not of the same samples, or the margin is not positive.
    """
    if len(options.reports) % 2:
        raise ValueError(f"Reports are compared in pairs, A.json B.json, got {len(options.reports)}.")
    if options.margin is not None and not 0 < options.margin < math.inf:
        raise ValueError(f"`--margin` must be above 0, got {options.margin:g}.")
    if options.output:
        check_writable(options.output)
        given = (file.resolve() for path in options.reports for file in (path, samples_file(path)))
        if options.output.resolve() in given:
            raise ValueError(f"`--output` {options.output} is one of the reports, or its samples: name another file.")
    results = [read_results(path) for path in options.reports]
    pairs = list(zip(results[::2], results[1::2], strict=True))
    found = compare_results(pairs, options.margin, options.metric)
    if options.output:
        content = [
            {
                "task": first.task,
                **{key: {"report": str(one.path), "model": one.model} for key, one in (("a", first), ("b", second))},
                "metrics": {row.metric: comparison_as_json(row) for row in rows},
            }
            for (first, second), rows in zip(pairs, found, strict=True)
        ]
        write_report(options.output, {"margin_in_points": options.margin, "pairs": content})
    rows = [row for of_pair in found for row in of_pair]
    lines = format_comparison(rows, options.margin), "", *_notes(pairs, rows, bool(options.metric))
    sys.stdout.write("\n".join(lines) + "\n")


def _notes(pairs: Iterable[tuple[Results, Results]], rows: Sequence[ComparedMetric], is_choice: bool) -> Iterable[str]:
    yield (
        f"In points, hundredths of a score. p: adjusted after Holm for {len(rows)} comparison(s), parts of a metric "
        "among themselves. detectable: the smallest difference that these samples show with probability 0.8."
    )
    compared = {row.metric for row in rows}
    for number, (first, second) in enumerate(pairs, start=1):
        sides = [f"{side}: {printable(f'{one.model} ({one.path})')}" for side, one in (("A", first), ("B", second))]
        yield f"{number}. {', '.join(sides)}"
        left_out = [name for name in first.metrics if name not in compared]
        if left_out and not is_choice:
            yield f"   left out, as single samples do not have them: {printable(', '.join(left_out))}"
