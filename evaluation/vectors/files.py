"""Embeddings on disk: parquet files of blocks of rows, beside a description of what they are.

    index.json                 model, mode, precision, sizes, and a digest of the data
    rows/PART-BLOCK.parquet    id, path, text, image_embed, text_embed (the last two as stored, see `quantization`)
    done/PART.json             how many blocks and rows a part has; written when all of them are read

Every file appears whole or not at all, so that a run goes on after a kill with what is not there, and processes need
not wait for each other. `search/` holds what the search makes of them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import extra
from ...rows.json_files import check_keys, read_json_file
from ...writing import write_whole
from .quantization import check_precision, stored_size
from .sources import EmbeddedItem


with extra("search"):
    import pyarrow
    from pyarrow import parquet

SIDES = ("image", "text")
INDEX = "index.json"
ROWS_READ_AT_ONCE = 16_384
LARGEST_COUNT = 10_000_000  # of parts, and of components
KINDS_OF_KEYS = {
    "a text": ("model", "mode", "precision", "data", "subfolder", "state"),
    "a number above 0": ("size", "vectors", "rows_per_file"),
    "a whole number": ("parts",),
}


@dataclass(frozen=True)
class Description:
    """What embeddings are.

    Args:
        model: Folder or name of the model.
        mode: "InternVL-C", "InternVL-G" or "queries".
        precision: See `quantization`.
        size: Components of a vector, E.
        vectors: Of an image, M; 1 except for "queries".
        rows_per_file: Rows of a block.
        parts: Of the data.
        data: Digest of them, see `fingerprint_of`.
        subfolder: Where in its folder the model lies.
        state: Of its files, see `checkpoint_state`; empty where it is not known.
    """

    model: str
    mode: str
    precision: str
    size: int
    vectors: int
    rows_per_file: int
    parts: int
    data: str
    subfolder: str = ""
    state: str = ""

    def vectors_of(self, side: str) -> int:
        """Returns how many vectors an image or a text has."""
        return self.vectors if side == "image" else 1


class EmbeddingFolder:
    """A folder of embeddings.

    Args:
        path: Of the folder.
        description: For writing; None reads the one that is there.

    Raises:
        OSError: If there is none.
        ValueError: If the folder holds something else, or other embeddings.
    """

    def __init__(self, path: str | Path, description: Description | None = None) -> None:
        self.path = Path(path)
        if description is not None:
            check_precision(description.precision, description.size)
            self._begin(description)
        self.description = self._read_description()

    def _begin(self, description: Description) -> None:
        index = self.path / INDEX
        if not index.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            others = [name for name in os.listdir(self.path) if not name.startswith(".")]
            if others and not index.is_file():  # another process may have begun meanwhile
                raise ValueError(f"`{self.path}` is not empty, and holds no embeddings: name another folder.")
            write_whole(index, json.dumps(asdict(description), indent=2), keep=True)
        for folder in ("rows", "done"):
            (self.path / folder).mkdir(exist_ok=True)
        found = self._read_description()
        differing = [name for name, value in asdict(description).items() if getattr(found, name) != value]
        if "state" in differing and not (found.state and description.state):
            differing.remove("state")
        if not differing:
            return
        told = [f"{name} {getattr(found, name)}, now {getattr(description, name)}" for name in differing]
        alone = {"data": "other data, columns, sides or type of weights", "state": "other weights of the same name"}
        what = alone.get(differing[0], "") if len(differing) == 1 else ""
        what = what or "; ".join(told)
        raise ValueError(f"`{self.path}` holds embeddings that differ ({what}): name another folder.")

    def _read_description(self) -> Description:
        file = self.path / INDEX
        if not file.is_file():
            raise OSError(f"`{self.path}` holds no embeddings: there is no `{file}`. Make them by `embed`.")
        try:
            found = read_json_file(file)
            known = {key: kind for kind, keys in KINDS_OF_KEYS.items() for key in keys}
            check_keys(str(file), found, known)
            description = Description(**{key: found[key] for key in known if key in found})
            check_precision(description.precision, description.size)
            if max(description.parts, description.size, description.vectors) > LARGEST_COUNT:
                raise ValueError(f"a number in it is above {LARGEST_COUNT}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{file}` is no description of embeddings: {error}.") from error
        return description

    # --------------------------------------------------------------------------------------------------------- writing
    def block_file(self, part: int, block: int) -> Path:
        """Returns the file of a block."""
        return self.path / "rows" / f"{part:06d}-{block:06d}.parquet"

    def write_block(
        self, part: int, block: int, items: Sequence[EmbeddedItem], embeds: dict[str, np.ndarray], bad_rows: int
    ) -> None:
        """Writes a block.

        Args:
            part: Its number.
            block: Its number.
            items: Of the rows.
            embeds: Of each side, what is stored for the items that have an image, or a text; (items, M, size).
            bad_rows: How many rows were left out.
        """
        has = {"image": [item.image is not None for item in items], "text": [item.text is not None for item in items]}
        columns: dict[str, Any] = {
            name: pyarrow.array([getattr(item, name) for item in items], pyarrow.string())
            for name in ("id", "path", "text")
        }
        columns |= {f"{side}_embed": self._column(embeds[side], has[side]) for side in embeds}
        counts = {**{f"{side}s": str(len(embeds.get(side, ()))) for side in SIDES}, "bad_rows": str(bad_rows)}
        table = pyarrow.table(columns).replace_schema_metadata({**counts, **self._metadata()})
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, use_dictionary=["path"])
        write_whole(self.block_file(part, block), sink.getvalue())

    def _metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self.description).items()}

    def _column(self, rows: np.ndarray, is_there: Sequence[bool]) -> "pyarrow.FixedSizeListArray":
        width = int(np.prod(rows.shape[1:]))
        values = np.zeros((len(is_there), width), rows.dtype)
        values[np.flatnonzero(is_there)] = rows.reshape(-1, width)
        mask = pyarrow.array(~np.asarray(is_there, bool))
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), width, mask=mask)

    def mark_done(self, part: int, blocks: int, rows: int) -> None:
        """Notes that a part was read to its end."""
        write_whole(self.path / "done" / f"{part:06d}.json", json.dumps({"blocks": blocks, "rows": rows}))

    # --------------------------------------------------------------------------------------------------------- reading
    def unfinished_parts(self) -> list[int]:
        """Returns the parts of which something is missing."""
        return [part for part in range(self.description.parts) if not self.is_done(part)]

    def is_done(self, part: int) -> bool:
        """Whether all of a part is there."""
        file = self.path / "done" / f"{part:06d}.json"
        try:
            done = read_json_file(file)
        except FileNotFoundError:
            return False
        if not isinstance(done, dict) or not isinstance(done.get("blocks"), int):
            raise ValueError(f"`{file}` does not say how many blocks there are: delete it, and embed again.")
        return all(self.block_file(part, block).is_file() for block in range(done["blocks"]))

    def files(self) -> list[Path]:
        """Returns the files of all blocks, in their order."""
        return sorted((self.path / "rows").glob("*.parquet"))

    def check_is_finished(self) -> None:
        """Raises a ValueError if something is missing."""
        if missing := self.unfinished_parts():
            raise ValueError(
                f"The embeddings in `{self.path}` are not finished: {len(missing)} of {self.description.parts} parts "
                "are missing. Give the same `embed` command again; it goes on where it stopped."
            )

    def read(self, side: str) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
        """Yields of every file the numbers of the rows that have an image, or a text, and what is stored for them."""
        shape = (-1, self.description.vectors_of(side), self._stored_size())
        for file in self.files():
            with _naming_damaged(file):
                source = parquet.ParquetFile(file)
                if f"{side}_embed" not in source.schema_arrow.names:
                    continue
                start = 0
                for batch in source.iter_batches(ROWS_READ_AT_ONCE, columns=[f"{side}_embed"]):
                    column = batch.column(0)
                    rows = start + np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                    values = column.flatten().to_numpy(zero_copy_only=False)  # without those of rows that have none
                    yield file, rows, values.reshape(shape)
                    start += len(batch)

    def count(self) -> dict[str, int]:
        """Returns how many "images" and "texts" there are, and how many "bad_rows" were left out."""
        totals = dict.fromkeys(("images", "texts", "bad_rows"), 0)
        for file in self.files():
            with _naming_damaged(file):
                found = parquet.read_schema(file).metadata or {}
                for name in totals:
                    totals[name] += int(found[name.encode()])
        return totals

    def _stored_size(self) -> int:
        return stored_size(self.description.size, self.description.precision)


def rows_at(file: Path, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Returns id, path and text of some rows of a file."""
    with _naming_damaged(file):
        return parquet.read_table(file, columns=["id", "path", "text"]).take(list(rows)).to_pylist()


@contextmanager
def _naming_damaged(file: Path) -> Iterator[None]:
    """Says of errors of pyarrow which file they are about."""
    try:
        yield
    except (AttributeError, LookupError, OSError, ValueError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"`{file}` is no block of embeddings, or damaged ({what}): delete it, and give the `embed` command again."
        ) from error


__all__ = ["SIDES", "Description", "EmbeddingFolder", "rows_at"]
