"""Maps of attention_maps drawn over their images: one, a sheet of several, or a page."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .attention_maps import AttentionMap, answer_maps, caption_maps, joined
from .html_files import data_address, write_html


# Colours of low to high values: five of viridis.
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
# Of a sheet of several images: the longer side of each, and its texts, in pixels and letters.
CELL = 200
MARGIN = 8
LINE_HEIGHT = 18
LINE_LENGTH = 26


def drawer(model: str, subfolder: str = "") -> Callable[[Image.Image, Mapping[str, Any]], Image.Image | None]:
    """Loads a model, and returns what draws where it looked for the answer, text or caption of a sample.

    Raises:
        ValueError: It has no maps.
    """
    from transformers import AutoModel, AutoProcessor

    from ..kinds import check_kind, kind_of

    where = {"pretrained_model_name_or_path": model, "subfolder": subfolder}
    kind = kind_of(check_kind(model, "InternVL-G", "chat", door="a map", subfolder=subfolder))
    loaded = AutoModel.from_pretrained(**where, dtype="float32").eval(), AutoProcessor.from_pretrained(**where)

    def draw(image: Image.Image, sample: Mapping[str, Any]) -> Image.Image | None:
        answer = sample.get("answer", sample.get("expected"))
        text = sample.get("text", sample.get("caption"))
        maps: list[AttentionMap] = []
        if kind == "chat" and isinstance(sample.get("question"), str) and isinstance(answer, str):
            maps = answer_maps(*loaded, image, sample["question"], answer)
        elif kind == "InternVL-G" and isinstance(text, str):
            maps = caption_maps(*loaded, image, text)
        return drawn_over(image, joined(maps)) if maps else None

    return draw


def drawn_over(image: Image.Image, found: AttentionMap) -> Image.Image:
    """Draws a map over an image: the higher, the more coloured; what has no part in it is left pale grey."""
    heat = found.over(image.size).numpy()
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.6 + 255 * 0.4
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, steps, HEAT[:, channel]) for channel in range(3)], axis=-1)
    share = np.sqrt(heat)[..., None] * 0.75
    return Image.fromarray((grey * (1 - share) + colours * share).round().astype(np.uint8))


def sheet_of(cells: Sequence[tuple[str, Image.Image]], columns: int = 6) -> Image.Image:
    """Draws images side by side, row by row, with a text below each."""
    small = [(textwrap.wrap(text, LINE_LENGTH), ImageOps.contain(cell, (CELL, CELL))) for text, cell in cells]
    width, height = (max(cell.size[axis] for _, cell in small) for axis in (0, 1))
    below = LINE_HEIGHT * max(1, *(len(lines) for lines, _ in small)) + MARGIN
    columns = min(columns, len(cells))
    step = width + MARGIN, height + below + MARGIN
    sheet = Image.new("RGB", (columns * step[0] + MARGIN, -(-len(cells) // columns) * step[1] + MARGIN), "white")
    font = ImageFont.load_default(14)
    for place, (lines, cell) in enumerate(small):
        x, y = MARGIN + place % columns * step[0], MARGIN + place // columns * step[1]
        sheet.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
        for number, line in enumerate(lines):
            middle = (x + width / 2, y + height + LINE_HEIGHT * (number + 0.5) + MARGIN / 2)
            ImageDraw.Draw(sheet).text(middle, line, "black", font, "mm")
    return sheet


def cells_of(image: Image.Image, maps: Sequence[AttentionMap]) -> list[tuple[str, Image.Image]]:
    """An image and its maps, with their texts, for `sheet_of`."""
    return [("", image.convert("RGB")), *((found.text, drawn_over(image, found)) for found in maps)]


def write_maps_page(output: Path, rows: Sequence[tuple[str, Image.Image, Sequence[AttentionMap]]]) -> None:
    """Writes a page with a row for each image: its title, the image, and its maps."""
    figures = [
        {
            "title": title,
            "figures": [
                {"source": data_address(image), "text": ""},
                *({"source": data_address(drawn_over(image, found)), "text": found.text} for found in maps),
            ],
        }
        for title, image, maps in rows
    ]
    write_html(output, title="Where it looked", rows=figures)
