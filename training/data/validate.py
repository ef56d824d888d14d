"""Looking through data before a run: file, line and reason of every row that cannot be trained on."""

import argparse
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
from ...rows.json_rows import Row
from ...rows.row_tables import Rows, open_rows
from ...rows.shards import find_shards, place_of_row, read_shards
from ...rows.videos import frames_of_video
from .dialogue_rows import read_dialogue
from .dialogues import VIDEO_FRAMES, DialogueEncoder
from .mixtures import MixtureSource
from .pairs import PairStream
from .sources import encoder_of, sources_of


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
    faults: list[str] = []

    def report(fault: object) -> None:
        with tqdm.external_write_mode():
            print_fn(str(fault))
        faults.append("")

    encoder = _encoder(options)
    counts = []
    for source in sources_of(options.data, options.images):
        own = None if encoder is None else encoder_of(encoder, source, 0)
        for name in find_shards(source.data) if options.pairs else source.data:
            counts.append(
                _check_pairs(name, source, report) if options.pairs else _check_dialogues(name, source, own, report)
            )
            if not counts[-1]:
                report(f"{name}:1: There is no row in this file.")
    files = f"{len(counts)} file{'s' if len(counts) > 1 else ''}"
    print_fn(f"{sum(counts)} rows in {files}, {len(faults) or 'none'} bad.")
    return 1 if faults else 0


def _check_dialogues(
    name: str, source: MixtureSource, encoder: DialogueEncoder | None, report: Callable[[object], None]
) -> int:
    """Reports the bad rows of a file, and returns how many rows it has."""
    rows = open_rows(name)
    for fault in find_invalid_rows(rows, source.images, encoder):
        report(fault)
    return len(rows)


def _check_pairs(name: str, source: MixtureSource, report: Callable[[object], None]) -> int:
    """Reports the bad pairs of a file, and returns how many it has."""
    count, stream = 0, PairStream(name, images=source.images)
    rows = tqdm(read_shards([name]), desc=Path(name).name, unit="pair", leave=False, disable=None)
    for row in rows:
        count += 1
        try:
            stream.read_pair(row)
        except ValueError as error:
            report(f"{place_of_row(row)}: {printable(str(error))}")
    return count


def _encoder(options: argparse.Namespace) -> DialogueEncoder | None:
    if options.model is None:
        if options.max_length is not None:
            raise ValueError("`--max-length` counts tokens, for which `--model` must be given.")
        return None
    check_kind(options.model, "chat", door="`--model`")
    processor = AutoProcessor.from_pretrained(options.model)
    return DialogueEncoder(processor, options.max_length or processor.tokenizer.model_max_length)


__getattr__ = renamed_names(globals(), Fault="InvalidRow", find_faults="find_invalid_rows")
