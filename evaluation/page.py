"""A page of a report: `python -m internvl.evaluation page REPORT.json`.

One HTML file without anything from elsewhere: figures with their intervals, and every sample with its image, texts and
scores, worst first, to be filtered and searched. Texts of models and data are shown as texts: they go into the page
escaped, and the only script that a browser runs there is the page's own.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..writing import check_writable
from .card import metric_row
from .commands import positive
from .reports import Report, read_report, samples_of
from .samples import Sample, read_samples, values_by_metric


if TYPE_CHECKING:  # `--help` and a report that is not there need no torch
    from PIL import Image

    from .sample_images import SampleImages


WAYS = ("embed", "link", "none")
NOT_FIELDS = ("id", "scores", "image")


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("report", type=Path, metavar="REPORT.json", help="written by a task's --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: REPORT.html)")
    parser.add_argument("--data", metavar="ROOT", help="where the images lie, if not where they were measured")
    parser.add_argument(
        "--images", choices=WAYS, default="embed", help="small copies in the page, or links to files (default: embed)"
    )
    parser.add_argument("--look", metavar="MODEL", help="draw where this model looked for its worst answers or texts")
    parser.add_argument("--subfolder", default="", help="where in the folder that model lies")
    parser.add_argument("--look-limit", type=positive, default=24, metavar="N", help="(default: 24)")


def run(options: argparse.Namespace) -> None:
    """Writes the page of a report."""
    output = options.output or options.report.with_suffix(".html")
    check_writable(output)
    report, samples = report_and_samples(options.report)
    if output.resolve() in (options.report.resolve(), samples_of(options.report, report).resolve()):
        raise ValueError(f"{output} is the report or its samples: name another file by --output.")
    from .sample_images import SampleImages

    images = SampleImages({**report["settings"], "task": report["task"]}, options.report.parent, options.data)
    maps = {}
    if options.look:
        from .map_drawing import drawer

        maps = _maps(worst(samples, options.look_limit), images, drawer(options.look, options.subfolder))
    write_page(report, samples, images, output, options.images, maps)
    print(f"{len(samples)} samples: {output}")  # noqa: T201


def write_page(
    report: Report,
    samples: Sequence[Sample],
    images: "SampleImages",
    output: Path,
    way: str = "embed",
    maps: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the page of a report, whole or not at all.

    Args:
        report: Of a task.
        samples: Its samples.
        images: Finds their images.
        output: The HTML file.
        way: One of `WAYS`: small copies of images in the page, links to the files, or none.
        maps: Addresses of further images, by the ids of samples.
    """
    from .html_files import write_html

    sources = {} if way == "none" else _sources(samples, images, way == "link", output.parent)
    write_html(output, title=title_of(report), **_header(report), data=_data(samples, sources, maps))


def report_and_samples(path: Path) -> tuple[Report, list[Sample]]:
    """Reads a report and the samples that lie beside it, under the name that it gives or the usual one.

    Raises:
        OSError: If a file is not there.
        ValueError: If a file is no report or no samples.
    """
    report = read_report(path)
    beside = samples_of(path, report)
    if not beside.exists():
        raise FileNotFoundError(f"{path} has no samples beside it: there is no {beside}.")
    return report, read_samples(beside)[1]


def worst(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """So many samples with the lowest scores, by the metric that the page opens with."""
    metric = next(iter(values_by_metric(samples)), None)
    scored = [sample for sample in samples if metric in sample["scores"]]
    return sorted(scored, key=lambda sample: sample["scores"][metric])[:limit]


def image_name(sample: Sample) -> str:
    """The name of a sample's image; samples about one image share it."""
    image = sample.get("image")
    return image if isinstance(image, str) else str(sample.get("cluster", sample["id"]))


def title_of(report: Report) -> str:
    """What a report is of, in one line."""
    what = report.get("title") or report.get("protocol") or report["task"]
    return f"{what}: {report['model']}"


def _header(report: Report) -> dict[str, Any]:
    """Figures, as on the card, and settings of a report, as the template takes them."""
    rows = []
    for name, metric in report["metrics"].items():
        _, _, value, interval, published, notes = metric_row(report, name, metric)
        rows.append([name, value, interval, metric.get("samples", ""), published, notes])
    lines = [f"{key}: {report[key]}" for key in ("task", "protocol") if report.get(key)]
    return {
        "metrics": rows,
        "has_published": any(row[4] or row[5] for row in rows),
        "lines": lines,
        "settings": list(report["settings"].items()),
    }


def _data(samples: Sequence[Sample], sources: Mapping[str, str], maps: Mapping[str, str]) -> dict[str, Any]:
    """What the script of the page reads: samples, the addresses of images, and the names of metrics."""
    place = {name: number for number, name in enumerate(sources)}
    rows = [
        {
            "id": sample["id"],
            "image": place.get(image_name(sample)),
            "map": maps.get(sample["id"]),
            "scores": sample["scores"],
            "fields": _fields(sample),
        }
        for sample in samples
    ]
    return {"samples": rows, "images": list(sources.values()), "metrics": list(values_by_metric(samples))}


def _fields(sample: Sample) -> dict[str, Any]:
    """What is shown of a sample beside its id, image and scores; not its cluster where that is its image."""
    fields = {name: value for name, value in sample.items() if name not in NOT_FIELDS}
    if fields.get("cluster") in (image_name(sample), sample["id"]):
        del fields["cluster"]
    return fields


def _sources(samples: Iterable[Sample], images: "SampleImages", is_linked: bool, folder: Path) -> dict[str, str]:
    """The addresses of the images of samples, by their names; those that are not there are left out."""
    from .embeddings import batches
    from .html_files import data_address

    found = {}
    for (name,) in batches(list(dict.fromkeys(map(image_name, samples))), 1, "reading images"):
        path = images.file_of(name) if is_linked else None
        if path is not None:
            found[name] = quote(Path(os.path.relpath(path, folder)).as_posix())
        elif (image := images.read(name)) is not None:
            found[name] = data_address(image)
    return found


def _maps(
    samples: Sequence[Sample], images: "SampleImages", draw: "Callable[[Image.Image, Sample], Image.Image | None]"
) -> dict[str, str]:
    """The addresses of what is drawn over the images of samples, by their ids."""
    from .embeddings import batches
    from .html_files import data_address

    found = {}
    for (sample,) in batches(samples, 1, "drawing maps"):
        image = images.read(image_name(sample))
        drawn = None if image is None else draw(image, sample)
        if drawn is not None:
            found[sample["id"]] = data_address(drawn)
    return found
