"""Reports of tasks: one JSON with figures and their intervals, beside the file of its samples."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .samples import Sample, values_by_metric
from .statistics import mean_interval


Report = dict[str, Any]
KEYS = ("task", "model", "settings", "metrics")


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


def features_folder(samples: str | Path) -> Path:
    """The folder of the embeddings of an unfinished run, beside the file of its samples."""
    return Path(samples).with_suffix(".features")


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_report(path: str | Path) -> Report:
    """Reads a report.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no report of this package.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no report: it is no JSON ({error}).") from error
    missing = [key for key in KEYS if key not in report] if isinstance(report, dict) else list(KEYS)
    if missing or not isinstance(report["metrics"], dict):
        raise ValueError(
            f"{path} is no report of `python -m internvl.evaluation TASK --output`: it lacks {', '.join(missing)}."
        )
    for name, metric in report["metrics"].items():
        if not isinstance(metric, dict) or not isinstance(metric.get("value"), (int, float)):
            raise ValueError(f'{path}: the metric {name!r} has no number called "value".')
        bounds = metric.get("interval")
        numbers = [one for one in bounds if isinstance(one, (int, float))] if isinstance(bounds, list) else []
        if bounds is not None and not (len(numbers) == 2 == len(bounds)):
            raise ValueError(f'{path}: the "interval" of the metric {name!r} is no list of two numbers.')
    if not isinstance(report["settings"], dict):
        raise ValueError(f'{path}: "settings" has to be a JSON object.')
    if not isinstance(report.get("published") or {}, dict):
        raise ValueError(f'{path}: "published" has to be a JSON object.')
    return report


__all__ = ["Report", "features_folder", "metrics_of", "new_report", "read_report", "samples_file", "write_report"]
