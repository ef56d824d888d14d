"""Where is it? `python -m internvl.evaluation grounding MODEL --data FILE.jsonl`.

A chat model is asked for the box of what an expression describes, and is right if that box and the true one overlap by
half of what they cover together (IoU 0.5). The file is in RefCOCO's published layout, JSON lines with "image", "sent"
(the expression), "bbox" ([x1, y1, x2, y2] in pixels), and "width" and "height" of the image, without which they are
read from its file. Prompt and answers are the published ones: `<ref>...</ref>`, and `<box>[[x1, y1, x2, y2]]</box>` in
thousandths of the image.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..rows.image_files import image_file
from ..rows.json_files import is_finite_number
from ..rows.json_rows import UnusableRowError, stream_json_rows
from ..rows.texts import check_text


if TYPE_CHECKING:  # `--help` and bad data need no torch
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from .samples import Sample, SampleLog

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
LONGEST_ANSWER = 100  # tokens, as published
THRESHOLD = 0.5


@dataclass(frozen=True)
class Expression:
    """What is looked for in an image.

    Args:
        name: Id of its results: the image and the line of the file.
        image: As the file names it.
        path: Of the image.
        text: The expression.
        box: (x1, y1, x2, y2) in pixels of an image of `size`.
        size: (width, height).
    """

    name: str
    image: str
    path: Path
    text: str
    box: tuple[float, float, float, float]
    size: tuple[float, float]


def read_expressions(path: str | Path, images: str | Path | None = None) -> list[Expression]:
    """Reads a file of expressions, without decoding images.

    Args:
        path: JSON lines, see the module.
        images: Folder below which the images are named; None is that of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no row, or a row is bad; the message names its line.
    """
    folder = Path(path).parent if images is None else Path(images)
    found = [_expression(row, f"{path}, line {line}", line, folder) for line, row in stream_json_rows(path)]
    if not found:
        raise ValueError(f"{path} holds no expressions: nothing can be measured.")
    return found


def _expression(row: dict[str, Any] | UnusableRowError, place: str, line: int, folder: Path) -> Expression:
    if isinstance(row, UnusableRowError):
        raise ValueError(f"{place}: {row}") from row
    for key in ("image", "sent"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'{place}: a row needs "{key}", a text.')
    check_text(row["sent"], f'{place}: "sent"')
    box = _numbers(row.get("bbox"), 4, f'{place}: "bbox" has to be four numbers, x1, y1, x2 and y2')
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f'{place}: "bbox" has to be x1 < x2 and y1 < y2, got {list(box)}.')
    try:
        file = image_file(row["image"], folder)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    sides = [row.get("width"), row.get("height")]
    if sides == [None, None]:
        from ..image_loading_internvl import read_image_size
        from ..image_processing_internvl import InternVLImageProcessor

        sides = list(read_image_size(file, row["image"], InternVLImageProcessor.max_image_pixels))
    width, height = _numbers(sides, 2, f'{place}: "width" and "height" have to be numbers')
    if not (width > 0 and height > 0):
        raise ValueError(f'{place}: "width" and "height" have to be above 0, got {width:g} and {height:g}.')
    x1, y1, x2, y2 = box
    return Expression(f"{row['image']}#{line}", row["image"], file, row["sent"], (x1, y1, x2, y2), (width, height))


def _numbers(value: Any, count: int, message: str) -> list[float]:
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(is_finite_number(one) and not isinstance(one, bool) for one in value):
        raise ValueError(f"{message}, got {value!r}.")
    return [float(one) for one in value]


def state_of(expressions: Sequence[Expression]) -> str:
    """Returns a short text that changes when expressions, their boxes or images do."""
    from .data.items import Item
    from .feature_store import fingerprint_of_items

    images = fingerprint_of_items(Item(one.name, one.path) for one in expressions)
    return hashlib.sha256(f"{images} {list(expressions)!r}".encode("utf-8", "backslashreplace")).hexdigest()[:16]


def ground_expressions(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    expressions: Sequence[Expression],
    batch_size: int = 8,
    **image_settings: Any,
) -> Iterator["Sample"]:
    """Asks a chat model for boxes, greedily; yields a sample of each expression once its batch is answered.

    Its scores are "accuracy@0.5" and "IoU", the mean overlap; its cluster is the image. `image_settings` go to the
    image processor.
    """
    from ..image_loading_internvl import read_image
    from ..image_processing_internvl import InternVLImageProcessor
    from .dialogue import answer_questions
    from .embeddings import batches
    from .metrics import box_in, box_overlap

    for batch in batches(expressions, batch_size, "grounding"):
        limit = InternVLImageProcessor.max_image_pixels
        images = [cast("Image.Image", read_image(one.path, one.image, limit)) for one in batch]
        items = [(image, PROMPT.format(one.text)) for image, one in zip(images, batch, strict=True)]
        answers = answer_questions(model, processor, items, batch_size, LONGEST_ANSWER, **image_settings)
        for one, answer in zip(batch, answers, strict=True):
            overlap = box_overlap(box_in(answer, *one.size), one.box)
            yield {
                "id": one.name,
                "cluster": one.image,
                "scores": {"accuracy@0.5": int(overlap >= THRESHOLD), "IoU": overlap},
                "image": str(one.path),
                "question": one.text,
                "expected": list(one.box),
                "answer": answer,
            }


def measure_grounding(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    expressions: Sequence[Expression],
    log: "SampleLog",
    batch_size: int = 8,
    **image_settings: Any,
) -> dict[str, dict[str, Any]]:
    """Asks for the boxes of what `log` has no results of; returns the metrics of all, as from `metrics_of`."""
    from .reports import metrics_of

    left = [one for one in expressions if one.name not in log.done]
    for sample in ground_expressions(model, processor, left, batch_size, **image_settings):
        log.add(sample)
    return metrics_of(log.done[one.name] for one in expressions)


# ------------------------------------------------------------------------------------------------------------- command
def add_grounding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `grounding`."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a chat model")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines in RefCOCO's layout")
    parser.add_argument("--images", type=Path, metavar="DIR", help="that image names start from (default: of FILE)")
    parser.add_argument("--limit", type=int, metavar="N", help="expressions, spread evenly over all")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--max-num", type=int, metavar="N", help="tiles of an image (default: the model's own)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: as they are saved)",
    )  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="(default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the report (default: MODEL-FILE.json)")


def run(options: argparse.Namespace) -> None:
    """Measures grounding, prints the report, and writes it beside its samples.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If a row is bad, a number is not above 0, or the model is no chat model.
    """
    for name in ("limit", "batch_size", "max_num"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be above 0, got {getattr(options, name)}.")
    expressions = read_expressions(options.data, options.images)
    if options.limit and options.limit < len(expressions):
        expressions = [expressions[place * len(expressions) // options.limit] for place in range(options.limit)]

    from ..kinds import check_kind
    from .checkpoints import checkpoint_state
    from .data.items import Item, check_items
    from .reports import check_report_place, new_report, samples_file, write_report
    from .samples import SampleLog, json_text

    files = {one.image: one.path for one in expressions}
    check_items([Item(name, path) for name, path in files.items()], str(options.data))
    check_kind(options.model, "chat", door="the task grounding", subfolder=options.subfolder)
    output = options.output or Path(f"{Path(options.model).name or 'model'}-{options.data.stem}.json")
    check_report_place(output, "grounding")
    settings = {
        "task": "grounding",
        "model": f"{options.model}/{options.subfolder}" if options.subfolder else options.model,
        "state": checkpoint_state(options.model, options.subfolder),
        "data": str(options.data),
        "data_state": state_of(expressions),
        **{name: getattr(options, name) for name in ("limit", "batch_size", "max_num", "dtype")},
    }
    with SampleLog(samples_file(output), settings) as log:
        tiles = {} if options.max_num is None else {"max_num": options.max_num}
        metrics = measure_grounding(*_load_chat(options), expressions, log, options.batch_size, **tiles)
    samples, title = samples_file(output).name, options.data.stem
    report = new_report("grounding", settings["model"], settings, metrics, samples=samples, title=title)
    write_report(output, report)
    sys.stdout.write(json_text(report, indent=2) + "\n")


def _load_chat(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    from .commands import named_device

    device = named_device(options.device)
    where = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder}
    model = AutoModel.from_pretrained(**where, dtype=options.dtype).eval()
    return model.to(device), AutoProcessor.from_pretrained(**where)
