"""Runs the bundled checkpoint on the bundled images: `python -m internvl.demo`.

Prints the questions about each image with the model's answers, and draws how each image was tiled to
`demo_output/tiles.png`.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from . import register
from .chat import DEFAULT_CHECKPOINT, Conversation, check_model
from .console import exit_status
from .renaming_internvl import RenamedOption, renamed_arguments


if TYPE_CHECKING:
    from .image_processing_internvl import InternVLImageProcessor


MARGIN, CAPTION, PANEL = 24, 26, 360  # pixels of the drawing


@renamed_arguments(picture="image")
def draw_tiling(image: Image.Image, name: str, processor: "InternVLImageProcessor") -> Image.Image:
    """Draws the tiles of an image, and beside them its thumbnail if it has one."""
    from .image_processing_internvl import choose_grid  # imports torch and transformers

    tile = processor.size["height"]
    columns, rows = choose_grid(*image.size, processor.min_num, processor.max_num, tile)
    scale = PANEL / max(columns, rows) / tile
    side = round(tile * scale)
    resized = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    gap = 6
    has_thumbnail = columns * rows > 1 and processor.use_thumbnail
    width = columns * (side + gap) + (2 * gap + PANEL // 2 if has_thumbnail else 0)
    panel = Image.new("RGB", (max(width, PANEL), CAPTION + rows * (side + gap)), "white")
    draw = ImageDraw.Draw(panel)
    count = columns * rows + has_thumbnail
    tiling = f"{columns} x {rows} tiles" + (" + thumbnail" if has_thumbnail else "") if count > 1 else "1 tile"
    draw.text((0, 2), f"{name}  {image.width} x {image.height}: {tiling}", "black", ImageFont.load_default(16))
    for row in range(rows):
        for column in range(columns):
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            place = (column * (side + gap), CAPTION + row * (side + gap))
            panel.paste(resized.crop(box), place)
            draw.rectangle((*place, place[0] + side - 1, place[1] + side - 1), outline="#c03030", width=2)
    if has_thumbnail:
        thumbnail = image.convert("RGB").resize((PANEL // 2, PANEL // 2), Image.Resampling.BICUBIC)
        place = (columns * (side + gap) + gap, CAPTION)
        panel.paste(thumbnail, place)
        draw.rectangle((*place, place[0] + PANEL // 2 - 1, place[1] + PANEL // 2 - 1), outline="#3050c0", width=2)
    return panel


def stack(panels: list[Image.Image]) -> Image.Image:
    """Stacks the panels on one white sheet."""
    width = max(panel.width for panel in panels) + 2 * MARGIN
    sheet = Image.new("RGB", (width, sum(panel.height + MARGIN for panel in panels) + MARGIN), "white")
    top = MARGIN
    for panel in panels:
        sheet.paste(panel, (MARGIN, top))
        top += panel.height + MARGIN
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line: answers every question and draws how the images were tiled; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.demo", description="Show the bundled checkpoint at work."
    )
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="DIR", help="chat checkpoint (default: the bundled)"
    )
    parser.add_argument(
        "--images",
        default=DEFAULT_CHECKPOINT / "examples",
        type=Path,
        metavar="DIR",
        help="images with a questions.json (default: the bundled)",
    )
    parser.add_argument("--pictures", dest="images", type=Path, action=RenamedOption, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output",
        default=Path("demo_output"),
        type=Path,
        metavar="DIR",
        help="where tiles.png is written (default: demo_output)",
    )
    options = parser.parse_args(arguments)
    register()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return exit_status(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    """Prints the answers and saves the drawing."""
    from .evaluation.metrics import is_correct

    check_model(options.model)
    conversation = Conversation(options.model, max_new_tokens=16)
    rows = json.loads((options.images / "questions.json").read_text(encoding="utf-8"))
    panels, num_correct = [], 0
    for file, questions in groupby(rows, key=lambda row: row["file"]):
        print(f"\n{file}")
        path = options.images / file
        for row in questions:
            conversation.restart()
            answer = conversation.ask(row["question"], [str(path)])
            hint = "" if is_correct(answer, row["answer"]) else f"   (correct: {row['answer']})"
            num_correct += not hint
            print(f"  {row['question']}\n    {answer}{hint}")
        image_processor = conversation.processor.image_processor
        panels.append(draw_tiling(image_processor.fetch_images(path), file, image_processor))
    options.output.mkdir(parents=True, exist_ok=True)
    stack(panels).save(options.output / "tiles.png")
    print(f"\n{num_correct} of {len(rows)} answers correct. Tilings: {options.output / 'tiles.png'}")


if __name__ == "__main__":
    sys.exit(main())
