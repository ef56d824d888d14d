"""Figures of what the data commands left out, drawn by matplotlib (the extra `plot`)."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ...extras import extra
from ...writing import check_writable, write_whole
from .filters import paper_share


def check_plot(path: str | Path, output: str | Path | None) -> None:
    """Check that a figure can be drawn into a file, before there is work to lose.

    Args:
        path: The file.
        output: What else the command writes, a file or a folder.

    Raises:
        ValueError: If its ending names no format that is drawn, it is the output, or matplotlib is not installed.
        OSError: If it cannot be written.
    """
    with extra("plot"):
        from matplotlib.backend_bases import FigureCanvasBase

    endings = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"})  # which takes LaTeX
    if _format_of(path) not in endings:
        named = ", ".join(f".{name}" for name in endings)
        raise ValueError(f"`--plot` {path} must end in one of {named} to be drawn into.")
    if output is not None and Path(path).absolute() == Path(output).absolute():
        raise ValueError(f"`--plot` and `--output` are both {path}: give each its own.")
    check_writable(Path(path))


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draws the funnel: rows left behind each rule.

    Args:
        report: What `Funnel.report` returned.
        path: File to write; its ending says the format.
    """
    rules = report["rules"]
    seen = max(report["seen"], 1)
    labels = ["all", *(row["name"] + " (skipped)" * row["skipped"] for row in rules)]
    left = [1.0, *(row["left"] / seen for row in rules)]
    colours = ["0.6", *("tab:blue" if row["stage"] == 1 else "tab:orange" for row in rules)]
    axes = _new_axes(8, 1.2 + 0.32 * len(labels))
    bars = axes.barh(range(len(left)), left, color=colours)
    axes.set_yticks(range(len(left)), labels)
    axes.bar_label(bars, labels=[f"{share:.1%}" for share in left], padding=3)
    source = report.get("source")
    for stage in range(1, report["stage"] + 1):
        share = paper_share(stage, source)
        axes.axvline(share, color="0.3", linestyle=":")
        axes.text(share, len(labels) - 0.4, f" paper, stage {stage}", fontsize="small", va="top")
    axes.invert_yaxis()
    title = f"Data funnel up to stage {report['stage']}" + (f", {source}" if source else "")
    axes.set(xlim=(0, 1.1), xlabel="share of the pairs left", title=title)
    _save(axes, path)


def plot_sameness(report: Mapping[str, Any], path: str | Path) -> None:
    """Draws how alike the images that `dedup` left out are to what is kept."""
    axes = _new_axes(6, 3)
    axes.hist(report["sameness"], bins=40, range=(0.5, 1))
    axes.set(xlabel="sameness", ylabel="images", title=f"{len(report['sameness'])} of {report['seen']} left out")
    _save(axes, path)


def plot_cuts(cuts: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws what each step of `prepare` left, beside the paper's share.

    Args:
        cuts: In their order, with "step", "share" and "paper_share".
        path: File to write; its ending says the format.
    """
    axes = _new_axes(7, 1 + 0.5 * len(cuts))
    bars = axes.barh([cut["step"] for cut in cuts], [cut["share"] for cut in cuts], color="tab:blue")
    axes.bar_label(bars, labels=[f"{cut['share']:.1%}" for cut in cuts], padding=3)
    for place, cut in enumerate(cuts):
        if cut["paper_share"] is not None:
            axes.plot([cut["paper_share"]] * 2, [place - 0.4, place + 0.4], color="0.2", linestyle=":")
            axes.text(cut["paper_share"], place - 0.4, " paper", fontsize="small", va="top")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.2), xlabel="share of the pairs left")
    _save(axes, path)


def _new_axes(width: float, height: float) -> Any:
    with extra("plot"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _save(axes: Any, path: str | Path) -> None:
    drawn = BytesIO()
    axes.figure.savefig(drawn, format=_format_of(path))
    write_whole(Path(path), drawn.getvalue())


def _format_of(path: str | Path) -> str:
    return Path(path).suffix.lower().removeprefix(".")


__all__ = ["check_plot", "plot_cuts", "plot_report", "plot_sameness"]
