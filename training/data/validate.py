"""Looking through dialogue data before a run: file, line and reason of every row that cannot be trained on."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import AutoProcessor

from ...console import printable
from ...extras import MissingLibraryError
from ...image_loading_internvl import read_image
from ...image_processing_internvl import InternVLImageProcessor
from ...kinds import check_kind
from ...renaming_internvl import renamed_names
from .dialogue_rows import read_dialogue
from .dialogues import VIDEO_FRAMES, DialogueEncoder
from .json_rows import Row
from .row_tables import Rows, open_rows
from .videos import frames_of_video


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be trained on."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {printable(self.reason)}"


def find_invalid_rows(
    rows: Rows, images: str | Path | None = None, encoder: DialogueEncoder | None = None
) -> Iterator[InvalidRow]:
    """Reads every row and every image of a file, on a terminal behind a progress bar.

    Args:
        rows: The file.
        images: Folder of the images; None takes the file's own.
        encoder: Encodes each row too, so that rows that are too long for a model are found.

    Yields:
        A fault for each row that has one, in the order of the file.
    """
    images = rows.folder if images is None else images
    for index in tqdm(range(len(rows)), desc=rows.path.name, unit="row", leave=False, disable=None):
        try:
            row = rows.read(index)
            if encoder is None:
                _read_images(row, images)
            else:
                encoder(row, images)
        except MissingLibraryError:
            raise
        except ValueError as error:
            yield InvalidRow(rows.path, rows.line(index), str(error))


def _read_images(row: Row, images: str | Path) -> None:
    for message in read_dialogue(row, images):
        for part in message["content"]:
            shown = [part["image"]] if part["type"] == "image" else []
            if part["type"] == "video":
                shown = frames_of_video(part["video"], VIDEO_FRAMES)
            for source in shown:
                name = f"The image `{source}`" if isinstance(source, str) and len(source) <= 200 else "An image"
                read_image(source, name, InternVLImageProcessor.max_image_pixels)


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs `validate`.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code: 0, or 1 where a row is bad or there is none.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: If an argument is impossible.
    """
    encoder = _encoder(options)
    num_rows, bad = 0, Counter[str]()
    for name in options.data:
        rows = open_rows(name)
        num_rows += len(rows)
        for fault in find_invalid_rows(rows, options.images, encoder):
            with tqdm.external_write_mode():
                print_fn(str(fault))
            bad[name] += 1
        if not len(rows):
            print_fn(f"{name}:1: There is no row in this file.")
            bad[name] += 1
    files = f"{len(options.data)} file{'s' if len(options.data) > 1 else ''}"
    print_fn(f"{num_rows} rows in {files}, {bad.total() or 'none'} bad.")
    return 1 if bad else 0


def _encoder(options: argparse.Namespace) -> DialogueEncoder | None:
    if options.model is None:
        if options.max_length is not None:
            raise ValueError("`--max-length` counts tokens, for which `--model` must be given.")
        return None
    check_kind(options.model, "chat", door="`--model`")
    processor = AutoProcessor.from_pretrained(options.model)
    return DialogueEncoder(processor, options.max_length or processor.tokenizer.model_max_length)


__getattr__ = renamed_names(globals(), Fault="InvalidRow", find_faults="find_invalid_rows")
