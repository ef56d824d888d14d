"""Dialogues for stage 3: rows become messages (`dialogue_rows`), messages become tensors, tensors a batch.

`DialogueEncoder` tokenizes the messages of a row once, and masks by that one tokenization: only what the assistant
writes, its end token included, has a label. `DialogueCollator` pads on the right, or packs.

Shapes: B rows, L tokens, T tiles of the whole batch.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

from ...extras import MissingLibraryError
from ...image_loading_internvl import read_image, read_image_size, to_pil
from ...layers_internvl import IGNORE_INDEX
from ...messages_internvl import Message
from ...processing_internvl import InternVLProcessor
from ...renaming_internvl import renamed_arguments
from ...rows.bad_rows import BadRows, UnusableRowError
from ...rows.json_rows import Row
from ...rows.row_tables import Rows, open_all_rows
from ...rows.videos import check_library_of, frames_of_video
from .augmentation import Augmentation
from .dialogue_rows import read_dialogue


TOO_LONG = ("drop", "cut", "error")
VIDEO_FRAMES = (8, 32)  # of the published fine-tuning code
TOKENS_OF_FRAME = 8  # around those of its image: `Frame1: <img>...</img>` and a line break
TOKENS_OF_TEMPLATE = 64
CHARACTERS_OF_TOKEN = 4  # about


# --------------------------------------------------------------------------------------------------------- the tensors
class DialogueEncoder:
    """Rows to tensors, one at a time.

    Args:
        processor: Of the chat model; its chat template needs generation markers.
        max_length: Most tokens of a row; None for no limit.
        too_long: What becomes of longer rows. "drop": they are unusable. "cut": their end is cut off, but if that
            would cut an image's tokens, or leave nothing to learn, they are unusable. "error": the run stops.
        images: Folder of the images that are given as relative paths.
        video_frames: Fewest and most frames of a video. Each has its own number, as published, which lies between
            them; no more than `max_length` leaves room for.
        augment: Changes images and frames, see `Augmentation`; None takes them as they are.
        **settings: Settings of the image processor, `max_num` for instance.

    Raises:
        ValueError: If `too_long` is none of these, or `video_frames` are no such numbers.
    """

    def __init__(
        self,
        processor: InternVLProcessor,
        max_length: int | None = None,
        too_long: str = "drop",
        images: str | Path | None = None,
        video_frames: tuple[int, int] = VIDEO_FRAMES,
        augment: Augmentation | None = None,
        **settings: Any,
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"`too_long` must be one of {', '.join(TOO_LONG)}, got `{too_long}`.")
        if not 1 <= video_frames[0] <= video_frames[-1]:
            raise ValueError(f"`video_frames` must be the fewest and the most frames, from 1 on, got {video_frames}.")
        self.processor = processor
        self.max_length = max_length
        self.video_frames = tuple(video_frames)
        self.augment = augment
        self.too_long = too_long
        self.images = images
        self.settings = settings

    def __call__(
        self, row: Row, images: str | Path | None = None, sample: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Encodes one row.

        Args:
            row: Of any form that `read_dialogue` knows.
            images: Folder of this row's images, instead of the encoder's own.
            sample: `shard`, `key` and `epoch` of the row, which decide how its images are augmented.

        Returns:
            `input_ids` and `labels` (L,), -100 = not learned, and `pixel_values` (tiles, 3, H, W) if it has images.

        Raises:
            UnusableRowError: If this row cannot be used.
            ValueError: If it is longer than `max_length` and `too_long` is "error".
        """
        try:
            messages = self._with_frames(read_dialogue(row, self.images if images is None else images))
            if self.augment is not None:
                self._augment(messages, sample or {})
            features = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_labels=True,
                processor_kwargs=dict(self.settings),
            )
        except MissingLibraryError:  # of all rows, not of this one
            raise
        except ValueError as error:
            raise UnusableRowError(str(error)) from error
        encoded = {"input_ids": features["input_ids"][0], "labels": features["labels"][0]}
        if "pixel_values" in features:
            encoded["pixel_values"] = features["pixel_values"]
        if (encoded["labels"] == IGNORE_INDEX).all():
            raise UnusableRowError("The row has no answer from which to learn.")
        length = len(encoded["input_ids"])
        if self.max_length is not None and length > self.max_length:
            self._shorten(encoded, self.max_length)
        return encoded

    def length_of(self, messages: list[Message]) -> int:
        """About how many tokens messages have, without reading images.

        Raises:
            ValueError: If an image whose size decides about its tiles has none.
        """
        parts = [part for message in messages for part in message["content"]]
        tiles = sum(self._tiles_of(part) for part in parts)
        characters = sum(len(part.get("text", "")) for part in parts)
        return characters // CHARACTERS_OF_TOKEN + tiles * self.processor.image_seq_length

    def _tiles_of(self, part: dict[str, Any]) -> int:
        if part["type"] == "text":
            return 0
        if part["type"] == "video":
            is_list = isinstance(part["video"], list)
            return len(part["video"]) if is_list else sum(self.video_frames) // 2
        processor = self.processor.image_processor
        if self.settings.get("max_num", processor.max_num) == 1:
            return 1
        width, height = read_image_size(part["image"], "An image", processor.max_image_pixels)
        return processor.get_number_of_image_patches(height, width, dict(self.settings))

    def _with_frames(self, messages: list[Message]) -> list[Message]:
        """Reads the frames of the videos."""
        parts = [part for message in messages for part in message["content"]]
        videos = [part for part in parts if part["type"] == "video"]
        fewest, most = self.video_frames
        if videos and self.max_length is not None:
            # Tokens of texts by their characters, of which two make no more than one but in few languages.
            room = self.max_length - sum(len(part.get("text", "")) for part in parts) // 2 - TOKENS_OF_TEMPLATE
            room //= (self.processor.image_seq_length + TOKENS_OF_FRAME) * len(videos)
            most = max(fewest, min(most, room))
        for part in videos:
            part["video"] = frames_of_video(part["video"], (fewest, most))
        return messages

    def _augment(self, messages: list[Message], sample: Mapping[str, Any]) -> None:
        """Changes the images and frames of messages in place, each in its own way."""
        numbers = count()
        for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
            shown = part["video"] if part["type"] == "video" else [part["image"]]
            changed = [
                self._augmented(image, {**sample, "key": (sample.get("key"), next(numbers))}) for image in shown
            ]
            part[part["type"]] = changed if part["type"] == "video" else changed[0]

    def _augmented(self, image: Any, sample: dict[str, Any]) -> Image.Image:
        processor = self.processor.image_processor
        image = read_image(image, "An image", processor.max_image_pixels)
        image = to_pil(image, "An image", processor.max_image_pixels, True, None, processor.background_color)
        return self.augment({**sample, "image": image})  # type: ignore[misc]

    def _shorten(self, encoded: dict[str, torch.Tensor], max_length: int) -> None:
        ids, labels = encoded["input_ids"], encoded["labels"]
        message = f"The row has {len(ids)} tokens, `max_length` is {max_length}"
        if self.too_long == "error":
            raise ValueError(f'{message}. Raise it, lower `max_num`, or set `too_long` to "drop" or "cut".')
        if self.too_long == "drop":
            raise UnusableRowError(f"{message}.")
        if torch.isin(ids[max_length:], torch.tensor(self.processor.image_token_ids)).any():
            raise UnusableRowError(f"{message}, and the cut would go through an image.")
        if (labels[:max_length] == IGNORE_INDEX).all():
            raise UnusableRowError(f"{message}, and no answer is left before the cut.")
        encoded.update(input_ids=ids[:max_length], labels=labels[:max_length])


@renamed_arguments(broken_rows="bad_rows")
class DialogueDataset(Dataset):
    """Encoded rows of files or data sets, for `Trainer`.

    A row that cannot be used is counted, logged, and replaced by the next one that can, so that batches keep their
    size; `python -m internvl.training validate` names all of them beforehand.

    Args:
        files: JSON, parquet, or names of data sets, see `open_rows`.
        encoder: Makes the tensors.
        images: Folder of the images; None takes the folder of each file.
        bad_rows: The limit on unusable rows, and their count.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: If there is no row. While reading: if too many are unusable.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        encoder: DialogueEncoder,
        images: str | Path | None = None,
        bad_rows: BadRows | None = None,
    ) -> None:
        self.files = open_all_rows(files)
        self.encoder = encoder
        self.images = images
        self.bad_rows = bad_rows or BadRows()
        self._ends = list(accumulate(len(file) for file in self.files))
        for file in self.files:
            check_library_of(file)
        if not len(self):
            raise ValueError(f"There is no row in {', '.join(str(file.path) for file in self.files) or 'no file'}.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Encodes row `index`, or the next usable one behind it."""
        return self.encoded(index)

    def encoded(self, index: int, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Encodes row `index`, or the next usable one behind it.

        Args:
            index: From 0 on.
            epoch: Decides how images are augmented, together with the row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        for offset in range(len(self)):
            encoded = self._encode((index + offset) % len(self), epoch)
            if encoded is not None:
                return encoded
        raise ValueError(f"None of {len(self)} rows can be used: {self.bad_rows.told()}")

    def check_has_rows(self) -> None:
        """Looks for a first row that can be used, without counting it.

        Raises:
            ValueError: If there is none.
        """
        probe = copy(self)
        probe.bad_rows = BadRows(self.bad_rows.max_rate, self.bad_rows.grace, limit=self.bad_rows.limit)
        probe.encoded(0)

    def _locate(self, index: int) -> tuple[Rows, int]:
        """The source of a row, and its number there."""
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)

    def _encode(self, index: int, epoch: int) -> dict[str, torch.Tensor] | None:
        file, position = self._locate(index)
        try:
            row = file.read(position)
            sample = {"shard": file.path, "key": position, "epoch": epoch}
            encoded = self.encoder(row, file.folder if self.images is None else self.images, sample)
        except UnusableRowError as error:
            self.bad_rows.count(f"{file.path}:{file.line(position)}", error)
            return None
        self.bad_rows.count()
        return encoded

    @cached_property
    def lengths(self) -> list[int]:
        """About how many tokens each row has, for `group_by_length`; 0 for those that cannot be used.

        Rows are read, images are not: of those that are tiled, the size is read.
        """
        lengths = []
        for index in range(len(self)):
            file, position = self._locate(index)
            try:
                messages = read_dialogue(file.read(position), file.folder if self.images is None else self.images)
                lengths.append(self.encoder.length_of(messages))
            except ValueError:
                lengths.append(0)
        return lengths


# ----------------------------------------------------------------------------------------------------------- the batch
class DialogueCollator:
    """Rows to a batch.

    Packed, all rows stand in one row behind each other, without padding: positions begin anew for each, by which every
    decoder of transformers keeps them apart in attention, whichever kernel it uses. Kernels other than flash attention
    still compute the whole square, so that many short rows gain and few long ones do not.

    Args:
        encoder: Encodes rows that are not yet encoded, those of a `datasets.Dataset` for instance (`Trainer` then
            needs `remove_unused_columns=False`); what cannot be used ends the run.
        pack: Pack the rows of a batch instead of padding them.
    """

    def __init__(self, encoder: DialogueEncoder, pack: bool = False) -> None:
        self.encoder = encoder
        self.pack = pack

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            rows: B encoded rows, or rows of any form that `read_dialogue` knows.

        Returns:
            `input_ids`, `labels` (B, L), -100 = not learned, `attention_mask` (B, L), 1 = attend, and `pixel_values`
            (T, 3, H, W) if there are images. Packed: (1, sum of L), and `position_ids` in place of the mask.

        Raises:
            ValueError: If no row has a label, so that there is nothing to learn.
        """
        encoded = [row if "input_ids" in row else self.encoder(row) for row in rows]
        batch = self._packed(encoded) if self.pack else self._padded(encoded)
        if (batch["labels"] == IGNORE_INDEX).all():
            raise ValueError(
                f"None of the {len(encoded)} rows of a batch has a label: there is no answer to learn from."
            )
        tiles = [row["pixel_values"] for row in encoded if "pixel_values" in row]
        if tiles:
            batch["pixel_values"] = torch.cat(tiles)
        return batch

    def _padded(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        ids = [row["input_ids"] for row in rows]
        pad_id = self.encoder.processor.tokenizer.pad_token_id or 0  # the model goes by the mask
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE_INDEX),
        }

    def _packed(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        texts = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        # With a cache, decoders take the positions for those of one row: transformers then looks for no packing.
        return {**DataCollatorWithFlattening(return_tensors="pt")(texts), "use_cache": False}
