"""Plots of the results page: learning curves of the stages, dialogue by kind of question, and the ablation.

Needs matplotlib (the extra `plot`). Each function draws one figure and returns it; `plot_all` writes those that have
data.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..extras import extra
from ..modeling_internvl import MODES


Log = Mapping[str, Any]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Computes mean and standard deviation of a sample; a single value has deviation 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def phases_of(log: Log) -> dict[str, list[dict[str, float]]]:
    """Returns the entries of `Trainer` by phase, without the recipe and settings."""
    return {name: rows for name, rows in log.items() if isinstance(rows, list)}


def series(log: Log, key: str, phases: Sequence[str] = ()) -> tuple[list[float], list[float]]:
    """Returns steps and values of a key of `Trainer`'s entries over some phases, or all, one after the other."""
    steps, values, start = [], [], 0.0
    for name, rows in phases_of(log).items():
        if phases and name not in phases:
            continue
        for row in rows:
            if key in row:
                steps.append(start + row["step"])
                values.append(row[key])
        start += rows[-1]["step"]
    return steps, values


def _figure(title: str, num_axes: int) -> tuple[Any, list[Any]]:
    with extra("plot"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title)
    return figure, [figure.add_subplot(1, num_axes, index + 1) for index in range(num_axes)]


def _draw_curves(axes: Any, log: Log, keys: Mapping[str, str], **labels: Any) -> None:
    """Draws a line for each key, named in the legend, and marks where phases begin."""
    for key, name in keys.items():
        steps, values = series(log, key)
        axes.plot(steps, values, label=name, marker="." if len(steps) < 40 else "")
    start = 0.0
    for index, (name, rows) in enumerate(phases_of(log).items()):
        if index:
            axes.axvline(start, color="0.7", linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "va": "bottom"}
        axes.annotate(f" {name}", (start, 1.0), fontsize="small", color="0.4", **where)
        start += rows[-1]["step"]
    axes.set(xlabel="step", xlim=(0, start), **labels)
    axes.legend(fontsize="small")


def _draw_shares(axes: Any, highest: float = 1.02, label: str = "share of held-out images") -> None:
    axes.set(ylim=(0, highest), ylabel=label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def plot_stage1(log: Log) -> Any:
    """Draws loss and zero-shot accuracy of stage 1."""
    figure, (left, right) = _figure("Stage 1: contrastive", 2)
    _draw_curves(left, log, {"loss": "InfoNCE"}, ylabel="loss")
    kinds = {f"zero_shot_{kind}": kind for kind in ("digit", "shape", "colour")}
    _draw_curves(right, log, kinds)
    right.axhline(0.95, color="0.5", linewidth=0.8)
    _draw_shares(right)
    return figure


def plot_stage2(log: Log) -> Any:
    """Draws the losses of stage 2, and retrieval by InternVL-C and -G."""
    figure, (left, right) = _figure("Stage 2: generative", 2)
    losses = {
        "loss_itc": "contrastive (ITC)",
        "loss_itm": "matching (ITM)",
        "loss_itg": "captioning (ITG)",
        "loss_itc_tower": "contrastive, InternVL-C",
    }
    _draw_curves(left, log, losses, ylabel="loss", yscale="log")
    _draw_curves(right, log, {f"recall_at_1_{mode}": f"{mode}, R@1" for mode in MODES})
    _draw_shares(right)
    return figure


def plot_stage3(logs: Mapping[str, Log]) -> Any:
    """Draws the losses of stage 3 in each configuration."""
    figure, (left, right) = _figure("Stage 3: dialogue", 2)
    for name, log in logs.items():
        for axes, phases in ((left, ("seeing",)), (right, ("connecting", "answering"))):
            axes.plot(*series(log, "loss", phases), label=name)
    left.set(xlabel="step", ylabel="loss", title="naming what each image token shows")
    right.set(xlabel="step", ylabel="loss", yscale="log", title="answering")
    right.legend()
    return figure


def _draw_bars(axes: Any, labels: Sequence[str], bars: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws a group of bars for each label, with error bars where the deviation is not 0."""
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        centres = [place - 0.4 + (index + 0.5) * width for place in range(len(labels))]
        heights, errors = zip(*values, strict=True)
        axes.bar(centres, heights, width, label=name, yerr=errors if any(errors) else None, capsize=2)
    axes.set_xticks(range(len(labels)), [label.replace("_", " ") for label in labels])
    _draw_shares(axes, 1.05, "right answers")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(bars))


def _accuracies(reports: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns mean and deviation over reports of dialogue, by kind and of all."""
    found = {kind: [report["by_kind"][kind]["accuracy"] for report in reports] for kind in reports[0]["by_kind"]}
    found["all"] = [report["accuracy"] for report in reports]
    return {kind: mean_and_deviation(values) for kind, values in found.items()}


def plot_dialogue(report: Mapping[str, Any]) -> Any:
    """Draws dialogue by kind of question, for each configuration, with tiles and without."""
    figure, (axes,) = _figure("Dialogue by kind of question", 1)
    bars = {
        f"{stage}, {tiles.replace('_', ' ')}": _accuracies([part[tiles]])
        for tiles in ("with_tiles", "one_tile")
        for stage, part in report.items()
    }
    _draw_bars(axes, list(next(iter(bars.values()))), {name: list(kinds.values()) for name, kinds in bars.items()})
    return figure


def plot_ablation(report: Mapping[str, Any]) -> Any:
    """Draws dialogue and retrieval without one stage or another; error bars are standard deviations over seeds."""
    seeds = len(next(iter(report.values())))
    figure, (axes,) = _figure(f"Stages left out: mean and deviation of {seeds} seeds", 1)
    bars = {}
    for variant, reports in report.items():
        bars[variant] = _accuracies(list(reports.values()))
        for mode in next(iter(reports.values()))["recall_at_1"]:
            recalls = [part["recall_at_1"][mode] for part in reports.values()]
            bars[variant][f"R@1\n{mode}"] = mean_and_deviation(recalls)
    _draw_bars(axes, list(next(iter(bars.values()))), {name: list(kinds.values()) for name, kinds in bars.items()})
    return figure


def plot_all(results: Mapping[str, Any], run: Path, output: Path) -> list[Path]:
    """Writes every figure that has data, of the results of `report.evaluate_run` and the logs in the folder `run`.

    Returns:
        The files written.
    """
    from ..training.checkpoints import LOG_FILE  # with it come Trainer and accelerate

    logs = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob(f"*/{LOG_FILE}"))
    }
    chats = {name: logs[name] for name in ("full", "simple") if name in logs}
    figures: list[tuple[str, Any, Callable[[Any], Any]]] = [
        ("stage1", logs.get("stage1"), plot_stage1),
        ("stage2", logs.get("stage2"), plot_stage2),
        ("stage3", chats, plot_stage3),
        ("dialogue", results.get("dialogue"), plot_dialogue),
        ("ablation", results.get("ablation"), plot_ablation),
    ]
    written = []
    for name, source, draw in figures:
        if source:
            written.append(output / f"{name}.png")
            draw(source).savefig(written[-1], dpi=110)
    return written
