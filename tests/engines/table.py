"""The table of chat servers in docs/serving.md, from benchmarks/results/serving.json."""

from typing import Any


COLUMNS = ("text", "one image", "several images", "streamed", "8 in parallel")


def table_of(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown: how many answers equal those of `generate`, by server, model and way of asking."""
    lines = [f"| server | model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for engine, report in results["engines"].items():
        counts: dict[str, dict[str, str]] = {}
        for line in report["lines"]:
            counts.setdefault(line["checkpoint"], {})[line["asked"]] = f"{line['equal']} of {line['of']}"
        for checkpoint, found in counts.items():
            if cells := [found[column] for column in COLUMNS if column in found]:
                lines.append(f"| `{engine}` | {checkpoint} | {' | '.join(cells)} |")
    return lines
