"""The paper card: every protocol whose data are there, our figure beside the paper's, each with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..console import printable
from ..rows.json_files import is_finite_number
from .reports import Report


ALWAYS_SHOWN = ("top-1", "R@1", "CIDEr", "accuracy", "mIoU")
HEADER = ("protocol", "metric", "here", "95 % interval", "paper", "")


def card_rows(report: Report) -> list[tuple[str, ...]]:
    """The lines of a report: every metric with a published figure, and the main ones of the others.

    A published figure stands beside ours only where it was measured in the same way; what differs is said.
    """
    rows = []
    for name, metric in report["metrics"].items():
        figure = published_figure(report, name)
        is_shown = name.endswith(ALWAYS_SHOWN) or "harness" in report["settings"]
        if figure is not None or is_shown:
            rows.append(metric_row(report, name, metric))
    return rows


def published_figure(report: Report, name: str) -> float | None:
    """The published figure of a metric, of its mode where it names one."""
    published = report.get("published") or {}
    mode, _, own = name.partition("/")
    of_mode = published.get(mode)
    figure = of_mode.get(own) if own and isinstance(of_mode, dict) else published.get(name)
    return figure if is_finite_number(figure) else None


def metric_row(report: Report, name: str, metric: Mapping[str, Any]) -> tuple[str, ...]:
    """Title, metric, our figure with its interval, the published one, and notes of what differs."""
    figure = published_figure(report, name)
    scale = float(metric.get("scale") or 100.0)
    bounds = [scale * bound for bound in metric.get("interval") or ()]
    interval = " to ".join(f"{bound:.1f}" for bound in bounds)
    paper = "" if figure is None or metric.get("comparable") is False else f"{figure:.1f}"
    notes = [*(metric.get("notes") or ()), *(_differences(report) if figure is not None else ())]
    if figure is not None and paper and bounds and not notes:
        notes.append("agrees" if bounds[0] <= figure <= bounds[1] else "differs")
    title = report.get("title") or report.get("protocol") or report["task"]
    return (str(title), name, f"{scale * metric['value']:.1f}", interval, paper, "; ".join(notes))


def _differences(report: Report) -> list[str]:
    """How the run differs from the published one."""
    settings, found = report["settings"], []
    count, all_of_them = settings.get("images"), settings.get("published_images")
    if count and all_of_them and count != all_of_them:
        found.append(f"{count:,} of {all_of_them:,} images")
    elif settings.get("limit"):
        found.append(f"{settings['limit']:,} images")
    own, theirs = settings.get("image_size"), settings.get("published_image_size")
    if own and theirs and own != theirs:
        found.append(f"at {own} px, the paper at {theirs}")
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines in columns, as wide as their widest entry, of what a terminal can take."""
    rows = [[printable(entry) for entry in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join(lines)


def card(reports: Sequence[Report]) -> str:
    """The card of several reports."""
    return table([HEADER, *(row for report in reports for row in card_rows(report))])
