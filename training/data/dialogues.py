"""Dialogues for stage 3: every usual form of a row becomes messages, messages become tensors, tensors a batch.

Rows may be LLaVA's and ShareGPT's (`conversations` of `from` and `value`), `messages` with `images`, OpenAI's lists of
content parts, or `query` and `response`. `read_dialogue` turns each into the messages that `apply_chat_template`
takes; `DialogueEncoder` tokenizes them once, and masks by that one tokenization: only what the assistant writes, its
end token included, has a label. `DialogueCollator` pads on the right, or packs.

Not covered: videos (give frames as images), sound, and tool calls.

Shapes: B rows, L tokens, T tiles of the whole batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

from ...conversation_internvl import IMAGE_PLACEHOLDER
from ...layers_internvl import IGNORE_INDEX
from ...messages_internvl import Message
from ...processing_internvl import InternVLProcessor
from ...renaming_internvl import renamed_arguments
from .bad_rows import BadRows, UnusableRowError
from .image_files import image_file, is_path
from .json_rows import JsonRows, Row
from .texts import check_text


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
SOURCE_KEYS = ("bytes", "image", "url", "path", "base64", "image_url")
UNSUPPORTED_KEYS = ("video", "videos", "audio", "audios")
TOO_LONG = ("drop", "cut", "error")
MAX_CHARACTERS = 200_000  # of all texts of a row; tokenizers take seconds for a megabyte

Part = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- the forms
def read_dialogue(row: Row, images: str | Path | None = None) -> list[Message]:
    """Turns a row of any usual form into messages for `InternVLProcessor.apply_chat_template`.

    Each `<image>` in a question is the place of the next image of the row; one line break behind it is dropped,
    because the chat template writes one. Where no question has an `<image>`, all images come before the first one.
    Content parts say themselves where their images are, and `<image>` is then plain text.

    Args:
        row: The row.
        images: Folder of the images that are given as paths, which must lie below it; None takes them as they are.

    Returns:
        Messages whose contents are lists of text and image parts.

    Raises:
        ValueError: If the row has none of the forms, or its parts do not fit together. The message says what is wrong.
    """
    for key in UNSUPPORTED_KEYS:
        if row.get(key):
            raise ValueError(f"`{key}` is not read here. Give the frames of a video as images.")
    turns = _turns_of(row)
    _check_order([role for role, _ in turns])
    length = sum(len(part.get("text", "")) for _, parts in turns for part in parts)
    if length > MAX_CHARACTERS:
        raise ValueError(f"The row has {length} characters of text, at most {MAX_CHARACTERS} are read.")
    has_parts = any(_is_image(part) for _, parts in turns for part in parts)
    if not has_parts:
        turns = _split_placeholders(turns)
    turns = _fill_images(turns, _images_of(row))
    messages = []
    for number, (role, parts) in enumerate(turns, start=1):
        _check_content(role, parts, number)
        for part in parts:
            check_text(part.get("text", ""), f"Message {number}")
        resolved = [_resolved(part, images) if _is_image(part) else part for part in parts]
        messages.append({"role": role, "content": resolved})
    return messages


def _turns_of(row: Row) -> list[tuple[str, list[Part]]]:
    """(role, parts) of each message."""
    if row.get("conversations") is not None:
        turns = [_turn(turn, "from", "value") for turn in _as_list(row, "conversations")]
    elif row.get("messages") is not None:
        turns = [_turn(turn, "role", "content") for turn in _as_list(row, "messages")]
    elif row.get("query") is not None:
        turns = _asked_and_answered(row.get("history") or [], (row["query"], row.get("response")))
    else:
        raise ValueError(
            f"A row needs `conversations`, `messages`, or `query` and `response`; this one has {', '.join(row)}."
        )
    if row.get("system") and not (turns and turns[0][0] == "system"):
        turns.insert(0, ("system", _parts_of(row["system"])))
    return turns


def _asked_and_answered(history: Any, last: tuple[Any, Any]) -> list[tuple[str, list[Part]]]:
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history
    ):
        raise ValueError(f"`history` must be a list of pairs of a query and a response, got {history!r:.80}.")
    pairs = [(_parts_of(query), _parts_of(response)) for query, response in [*history, last]]
    return [turn for query, response in pairs for turn in (("user", query), ("assistant", response))]


def _as_list(row: Row, key: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(f"`{key}` must be a list of messages that is not empty, got {row[key]!r:.80}.")
    return row[key]


def _turn(turn: Any, role_key: str, content_key: str) -> tuple[str, list[Part]]:
    """One message; both spellings are found in both lists."""
    if not isinstance(turn, dict):
        raise ValueError(f"A message must be an object with `{role_key}` and `{content_key}`, got {turn!r:.80}.")
    role = turn.get(role_key, turn.get("role", turn.get("from")))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"Unknown role {role!r}: expected one of {', '.join(ROLES)}.")
    return ROLES[role], _parts_of(turn.get(content_key, turn.get("content", turn.get("value"))))


def _parts_of(content: Any) -> list[Part]:
    """Text and image parts of a string or of a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"The content of a message must be a text or a list of parts, got {content!r:.80}.")
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image", "image": _source_of(part)})
        else:
            raise ValueError(f"A content part must be a text or an image, got {part!r:.80}.")
    return parts


def _is_image(part: Part) -> bool:
    return part["type"] == "image"


def _check_order(roles: list[str]) -> None:
    first = 1 if roles[:1] == ["system"] else 0
    for index, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise ValueError(
                f"Message {first + index + 1} is from `{role}`, expected `{expected}`: after a system message, if "
                "any, user and assistant take turns."
            )
    if len(roles) == first or roles[-1] != "assistant":
        raise ValueError("The last message must be an answer of the assistant, from which to learn.")


def _check_content(role: str, parts: list[Part], number: int) -> None:
    has_images = any(map(_is_image, parts))
    if has_images and role != "user":
        raise ValueError(f"Message {number} is from `{role}` and holds an image: only a user may show images.")
    if role != "system" and not has_images and not any(part["text"].strip() for part in parts):
        raise ValueError(f"The {'answer' if role == 'assistant' else 'question'} in message {number} is empty.")


# -------------------------------------------------------------------------------------------------------- the images
def _images_of(row: Row) -> list[Any]:
    """Images of a row that stand outside its messages."""
    given = [row[key] for key in ("image", "images") if row.get(key) is not None and row[key] not in ("", [])]
    if len(given) > 1:
        raise ValueError("A row has either `image` or `images`, this one has both.")
    shown = given[0] if given and isinstance(given[0], (list, tuple)) else given
    return [_source_of(image) for image in shown]


def _source_of(image: Any) -> Any:
    """What an image is read from; None where a part leaves it to the images of the row."""
    while isinstance(image, dict):
        key = next((key for key in SOURCE_KEYS if image.get(key) is not None), None)
        image = None if key is None else image[key]
        if key == "base64" and isinstance(image, str) and not image.startswith("data:"):
            image = f"data:;base64,{image}"  # no path
    return image


def _split_placeholders(turns: list[tuple[str, list[Part]]]) -> list[tuple[str, list[Part]]]:
    """Image parts without a source in place of each `<image>` in a question."""
    split = []
    for role, parts in turns:
        if role == "user":
            parts = [piece for part in parts for piece in _pieces(part["text"])]
        split.append((role, parts))
    return split


def _pieces(text: str) -> list[Part]:
    first, *others = text.split(IMAGE_PLACEHOLDER)
    pieces: list[Part] = [{"type": "text", "text": first}]
    for other in others:
        pieces += [{"type": "image", "image": None}, {"type": "text", "text": other.removeprefix("\n")}]
    kept = [piece for piece in pieces if _is_image(piece) or piece["text"]]
    return kept or pieces


def _fill_images(turns: list[tuple[str, list[Part]]], images: list[Any]) -> list[tuple[str, list[Part]]]:
    """Gives each image part without a source the next image of the row."""
    empty = [part for _, parts in turns for part in parts if _is_image(part) and part["image"] is None]
    places = sum(_is_image(part) for _, parts in turns for part in parts)
    if images and not places:
        shown = [{"type": "image", "image": image} for image in images]
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        return [(role, shown + parts if index == first else parts) for index, (role, parts) in enumerate(turns)]
    if len(empty) != len(images):
        raise ValueError(
            f"The questions have {len(empty)} place(s) for images (`{IMAGE_PLACEHOLDER}`, or image parts without a "
            f"source), and the row has {len(images)} image(s)."
        )
    for part, image in zip(empty, images, strict=True):
        part["image"] = image
    return turns


def _resolved(part: Part, images: str | Path | None) -> Part:
    """The part with the path of its file, which must be there."""
    source = part["image"]
    if source is None:
        raise ValueError("An image is null.")
    if not is_path(source):
        return part
    return {**part, "image": str(image_file(source, images))}


# --------------------------------------------------------------------------------------------------------- the tensors
class DialogueEncoder:
    """Rows to tensors, one at a time.

    Args:
        processor: Of the chat model; its chat template needs generation markers.
        max_length: Most tokens of a row; None for no limit.
        too_long: What becomes of longer rows. "drop": they are unusable. "cut": their end is cut off, but if that
            would cut an image's tokens, or leave nothing to learn, they are unusable. "error": the run stops.
        images: Folder of the images that are given as relative paths.
        **settings: Settings of the image processor, `max_num` for instance.

    Raises:
        ValueError: If `too_long` is none of these.
    """

    def __init__(
        self,
        processor: InternVLProcessor,
        max_length: int | None = None,
        too_long: str = "drop",
        images: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"`too_long` must be one of {', '.join(TOO_LONG)}, got `{too_long}`.")
        self.processor = processor
        self.max_length = max_length
        self.too_long = too_long
        self.images = images
        self.settings = settings

    def __call__(self, row: Row, images: str | Path | None = None) -> dict[str, torch.Tensor]:
        """Encodes one row.

        Args:
            row: Of any form that `read_dialogue` knows.
            images: Folder of this row's images, instead of the encoder's own.

        Returns:
            `input_ids` and `labels` (L,), -100 = not learned, and `pixel_values` (tiles, 3, H, W) if it has images.

        Raises:
            UnusableRowError: If this row cannot be used.
            ValueError: If it is longer than `max_length` and `too_long` is "error".
        """
        try:
            messages = read_dialogue(row, self.images if images is None else images)
            features = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_labels=True,
                processor_kwargs=dict(self.settings),
            )
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
    """Encoded rows of files, for `Trainer`.

    A row that cannot be used is counted, logged, and replaced by the next one that can, so that batches keep their
    size; `python -m internvl.training validate` names all of them beforehand.

    Args:
        files: JSON arrays or JSON lines.
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
        self.files = [JsonRows(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
        self.encoder = encoder
        self.images = images
        self.bad_rows = bad_rows or BadRows()
        self._ends = list(accumulate(len(file) for file in self.files))
        if not len(self):
            raise ValueError(f"There is no row in {', '.join(str(file.path) for file in self.files) or 'no file'}.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Encodes row `index`, or the next usable one behind it."""
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        for offset in range(len(self)):
            encoded = self._encode((index + offset) % len(self))
            if encoded is not None:
                return encoded
        raise ValueError(f"None of {len(self)} rows can be used.")

    def _encode(self, index: int) -> dict[str, torch.Tensor] | None:
        number = bisect_right(self._ends, index)
        file = self.files[number]
        position = index - (self._ends[number - 1] if number else 0)
        try:
            row = file.read(position)
            encoded = self.encoder(row, file.path.parent if self.images is None else self.images)
        except UnusableRowError as error:
            self.bad_rows.count(f"{file.path}:{file.line(position)}", error)
            return None
        self.bad_rows.count()
        return encoded


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
