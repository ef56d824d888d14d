"""Reports of tasks: one JSON with figures and their intervals, beside the file of its samples."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..rows.json_files import check_keys, is_finite_number, read_json_file
from ..writing import check_writable, write_whole
from .protocols.protocol import check_published
from .samples import Sample, json_text, values_by_metric
from .statistics import mean_interval


Report = dict[str, Any]
KEYS = ("task", "model", "settings", "metrics")
KINDS_OF_KEYS = {
    "task": "a text",
    "model": "a text",
    "settings": "an object",
    "published": "an object",
    "protocol": "a text",
    "title": "a text",
    "samples": "a text",
}
KINDS_IN_SETTINGS = {
    "protocol": "a text",
    "limit": "a whole number",
    "images": "a whole number",
    "published_images": "a whole number",
    "image_size": "a whole number",
    "published_image_size": "a whole number",
}


def metrics_of(samples: Iterable[Sample]) -> dict[str, dict[str, Any]]:
    """Summarises samples.

    Returns:
        For every metric its "value" (the mean), the 95 % "interval" of it, None where one sample or cluster alone
        shows none, and how many "samples" it is of.
    """
    summary = {}
    for metric, (scores, clusters) in values_by_metric(samples).items():
        low, high = mean_interval(scores, clusters)
        if min(scores) >= 0:
            low = max(low, 0.0)
        if set(scores) <= {0.0, 0.5, 1.0}:  # shares
            high = min(high, 1.0)
        mean = sum(scores) / len(scores)
        interval = [low, high] if math.isfinite(high - low) else None
        summary[metric] = {"value": mean, "interval": interval, "samples": len(scores)}
    return summary


def new_report(task: str, model: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], **more: Any) -> Report:
    """A report; `more` has its "protocol", "title", "published" figures and "samples" file, and what a task adds."""
    kept = {"protocol": None, "published": None, "samples": None, **more}
    return {"task": task, "model": model, "settings": dict(settings), "metrics": dict(metrics), **kept}


def samples_file(report: str | Path) -> Path:
    """The file of the samples beside a report."""
    return Path(report).with_suffix(".samples.jsonl")


def samples_of(path: Path, report: Report) -> Path:
    """The file of a report's samples, which lies beside it."""
    name = report.get("samples")
    return path.parent / Path(name).name if isinstance(name, str) else samples_file(path)


def features_folder(samples: str | Path) -> Path:
    """The folder of the embeddings of an unfinished run, beside the file of its samples."""
    return Path(samples).with_suffix(".features")


def check_report_place(path: Path, task: str | None) -> None:
    """Check that the report of a task can be written, before a model is loaded; an earlier one of it may be there.

    Args:
        path: Of the report.
        task: Which it names; None where it has the figures alone.

    Raises:
        OSError: If it cannot.
        ValueError: If something else is there.
    """
    check_writable(path)
    if not path.exists():
        return
    try:
        known = read_json_file(path) if task is None else read_report(path)
    except ValueError as error:
        raise ValueError(f"{error} Name another file by --output.") from error
    if not isinstance(known, dict) or known.get("task") != task:
        raise ValueError(f"{path} is the report of another task, or none: name another file by --output.")


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, whole or not at all."""
    write_whole(Path(path), json_text(report, indent=2, allow_nan=False) + "\n")


def read_report(path: str | Path) -> Report:
    """Reads a report.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no report of this package.
    """
    path = Path(path)
    report = read_json_file(path)
    missing = [key for key in KEYS if report.get(key) is None] if isinstance(report, dict) else list(KEYS)
    if not missing and not isinstance(report["metrics"], dict):
        missing = ["metrics by name"]
    if missing:
        raise ValueError(
            f"{path} is no report of `python -m internvl.evaluation TASK --output`: it lacks {', '.join(missing)}."
        )
    for name, metric in report["metrics"].items():
        _check_metric(f"{path}: the metric {name!r}", metric)
    check_keys(str(path), report, KINDS_OF_KEYS)
    check_card_settings(str(path), report["settings"])
    check_published(str(path), report.get("published") or {})
    return report


def check_card_settings(place: str, settings: Mapping[str, Any]) -> None:
    """Checks the settings that a card reads; raises a ValueError if one is of another kind."""
    check_keys(f"{place}, settings", settings, KINDS_IN_SETTINGS)


def _check_metric(place: str, metric: Any) -> None:
    if not isinstance(metric, dict) or not is_finite_number(metric.get("value")):
        raise ValueError(f'{place} has no number called "value".')
    bounds = metric.get("interval")
    numbers = [one for one in bounds if is_finite_number(one)] if isinstance(bounds, list) else []
    if bounds is not None and not (len(numbers) == 2 == len(bounds)):
        raise ValueError(f'{place}: its "interval" is no list of two numbers.')
    check_keys(place, metric, {"scale": "a number", "notes": "a list of texts", "samples": "a whole number"})


__all__ = [
    "Report",
    "check_card_settings",
    "check_report_place",
    "features_folder",
    "metrics_of",
    "new_report",
    "read_report",
    "samples_file",
    "samples_of",
    "write_report",
]
