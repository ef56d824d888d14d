"""Prepares the messages of a dialogue for a chat template, and derives training targets from the rendered prompt.

Before rendering, messages are checked (only here), literal image tokens in texts are escaped, and a video becomes its
frames in the published form (`Frame1: ` and an image, `Frame2: ` and an image...). After rendering, the characters
written by the assistant become masks and labels of tokens.

Not covered: reading video files. Rendering is done by the chat template.
"""

import reprlib
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging

from .chat_templates_internvl import TemplateNames
from .conversation_internvl import escape_image_tokens
from .image_loading_internvl import flatten_images, group_images
from .layers_internvl import IGNORE_INDEX


logger = logging.get_logger(__name__)

Message = dict[str, Any]


_IMAGE_SOURCES = ("image", "url", "path", "base64", "image_url")
_VIDEO_SOURCES = ("video", "url", "path")
# Keys that are read from a content part of each type.
_PART_KEYS = {"text": ("text",), "image": _IMAGE_SOURCES, "image_url": _IMAGE_SOURCES, "video": _VIDEO_SOURCES}
_MOST_NESTING = 32


def is_nothing(value: Any, depth: int = 0) -> bool:
    """Whether an argument is missing: None, or an empty container, including nested empty ones."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth < _MOST_NESTING and all(is_nothing(item, depth + 1) for item in value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim > 0 and len(value) == 0
    return value is None or (isinstance(value, Mapping) and not value)


def as_conversations(conversation: Any) -> tuple[list[list[Any]], bool]:
    """Returns a dialogue or a batch of dialogues as a list of lists of messages, and whether it was a batch.

    A dialogue is a list of messages or an object with `messages`.
    """
    if hasattr(conversation, "messages"):
        conversation = conversation.messages
    if not _is_list(conversation):
        raise ValueError(
            "A conversation must be a list of messages, `{'role': ..., 'content': ...}`, or a list of such lists, got "
            f"{_shown(conversation)}."
        )
    if not conversation:
        raise ValueError("The conversation is empty. Pass at least one message.")
    is_batched = any(_is_list(row) or hasattr(row, "messages") for row in conversation)
    conversations = [getattr(row, "messages", row) for row in conversation] if is_batched else [conversation]
    for index, row in enumerate(conversations):
        if not _is_list(row) or not row:
            what = "is empty" if _is_list(row) else f"must be a list of messages, got {_shown(row)}"
            raise ValueError(f"Conversation {index} {what}. Pass at least one message for each.")
    return [list(row) for row in conversations], is_batched


def prepare_conversations(
    conversations: list[list[Any]], names: TemplateNames
) -> tuple[list[list[Message]], list[bool]]:
    """Checks and copies messages, escapes their texts and splits videos into frames.

    Args:
        conversations: Lists of messages.
        names: Names that the chat template reads; a message may have no others.

    Returns:
        The copies, and for each image, in order, whether it is a frame of a video.

    Raises:
        ValueError: If a message is malformed, or holds something that the template would ignore.
    """
    is_frame: list[bool] = []
    prepared = []
    for row, messages in enumerate(conversations):
        of_row = f" of conversation {row}" if len(conversations) > 1 else ""
        prepared.append(
            [
                _prepare_message(message, f"Message {index}{of_row}", names, is_frame)
                for index, message in enumerate(messages)
            ]
        )
    return prepared, is_frame


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _prepare_message(message: Any, where: str, names: TemplateNames, is_frame: list[bool]) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with `role` and `content`, got {_shown(message)}.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} needs a `role`, such as `system`, `user` or `assistant`, got {_shown(message)}.")
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    dropped = [str(name) for name, value in others.items() if not is_nothing(value) and name not in names.words]
    if dropped:
        raise ValueError(
            f"{where} (role `{role}`) has `{'`, `'.join(dropped)}`, which the chat template does not read. Leave it "
            "out, write it into the content, or pass a `chat_template` that renders it."
        )
    content = message.get("content")
    if content is None and not all(map(is_nothing, others.values())):
        return dict(message)  # for example an answer that consists of tool calls
    if isinstance(content, str):
        return {**message, "content": _escape(content)}
    if not _is_list(content) or not content:
        raise ValueError(
            f"`content` of {where[0].lower()}{where[1:]} (role `{role}`) must be a string or a list of parts, such as "
            f"`{{'type': 'text', 'text': ...}}`, got {_shown(content)}."
        )
    parts: list[Message] = []
    for part in content:
        parts.extend(_prepare_part(part, where, names, is_frame))
    return {**message, "content": _escape_parts(parts)}


def _prepare_part(part: Any, where: str, names: TemplateNames, is_frame: list[bool]) -> list[Message]:
    """Checks one part of a content. A video becomes several parts."""
    if not isinstance(part, Mapping):
        raise ValueError(
            f"{where} has a content part that is no dict with a `type`: {_shown(part)}. A text is written "
            "`{'type': 'text', 'text': ...}`."
        )
    # Rows of a data set have the keys of all part types, with None for those of other types.
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if isinstance(kind, str) and kind in _PART_KEYS:
        _check_keys(part, where, names)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a text part whose `text` is no string: {_shown(part.get('text'))}.")
    elif kind in ("image", "image_url"):
        is_frame.append(False)
        return [_image_part(part, where)]
    elif kind == "video":
        return _frames_as_parts(part, where, is_frame)
    elif not isinstance(kind, str) or kind not in names.words or kind == "audio":
        # Of audio the base class opens the file or address, although nothing here takes it.
        raise ValueError(
            f"{where} has a content part of an unknown type, {_shown(kind)}: expected `text`, `image`, `image_url` or "
            "`video`."
        )
    return [part]


def _check_keys(part: Message, where: str, names: TemplateNames) -> None:
    """Raises a ValueError for keys of a part that nothing reads, such as an image in a text part."""
    kind = part["type"]
    of_others = {name for keys in _PART_KEYS.values() for name in keys}.difference(_PART_KEYS[kind])
    dropped = [
        str(name)
        for name, value in part.items()
        if name not in ("type", *_PART_KEYS[kind])
        and (name in of_others or name not in names.words)
        and not (is_nothing(value) or (isinstance(value, str) and not value))
    ]
    if dropped:
        raise ValueError(
            f"{where} has a part of type `{kind}` with `{'`, `'.join(dropped)}`, which nothing reads there. Give "
            "every text, image and video as a separate part, and settings as arguments of the call."
        )


def _only_source(part: Message, where: str, what: str, names: tuple[str, ...]) -> str | None:
    """Returns the key that holds the content of a part, None if there is none."""
    sources = [name for name in names if name in part]
    if len(sources) > 1:
        raise ValueError(
            f"{where} has {what} part with several {what.split()[1]}s: `{'`, `'.join(sources)}`. Give one of them."
        )
    return sources[0] if sources else None


def _image_part(part: Message, where: str) -> Message:
    """Renames the key of an image to one that transformers reads.

    A part without an image marks the place of one that is passed beside the messages.
    """
    source = _only_source(part, where, "an image", _IMAGE_SOURCES)
    part = {**part, "type": "image"}
    if source == "image_url":
        given = part.pop("image_url")
        address = given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(address, str):
            raise ValueError(
                f"{where} has an `image_url` that is neither a string nor a dict with a `url`: {_shown(given)}."
            )
        part["url"] = address
    return part


def images_beside(images: Any, conversations: list[list[Message]]) -> list[list[Any]]:
    """Distributes images (flat or nested per conversation) that are passed beside the messages.

    Raises:
        ValueError: If the messages hold images themselves, which these would replace.
    """
    found = [
        [part for message in messages for part in message.get("content") or () if _is_image(part)]
        for messages in conversations
    ]
    if any(name in part for parts in found for part in parts for name in _IMAGE_SOURCES):
        raise ValueError(
            "`images` was given, but the messages hold images too, which it would replace. Put every image into its "
            'message, or `{"type": "image"}` alone in each place of one of `images`.'
        )
    if len(found) == 1:
        return [flatten_images(images)]
    groups, is_nested = group_images(images)
    if is_nested:
        return groups
    flat = iter(groups[0])
    groups = [list(islice(flat, len(parts))) for parts in found]
    groups[-1].extend(flat)  # surplus images are reported with the placeholders
    return groups


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _frames_as_parts(part: Message, where: str, is_frame: list[bool]) -> list[Message]:
    """Converts a video to its published form: one image per frame, each preceded by its number."""
    source = _only_source(part, where, "a video", _VIDEO_SOURCES)
    video: Any = None if source is None else part[source]
    is_array = isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4
    if not (is_array or isinstance(video, (list, tuple))) or len(video) == 0:
        raise ValueError(
            f"{where} has a video part, which must hold its frames: a list of images, or an array (frames, height, "
            f"width, channels), got {type(video).__name__}. Video files are not read here: decode them with a library "
            "of your choice and pass the frames."
        )
    parts: list[Message] = []
    for number, frame in enumerate(video, start=1):
        parts += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image", "image": frame}]
        is_frame.append(True)
    return parts


def _escape(text: str) -> str:
    escaped = escape_image_tokens(text)
    if escaped != text:
        logger.warning_once(
            "A message holds an image token such as `<image>` in its text. In messages it stands for no image and is "
            'read as text (`< image>`): give an image as a separate part, `{"type": "image", "image": ...}`.'
        )
    return escaped


def _escape_parts(parts: list[Message]) -> list[Message]:
    """Escapes the text parts. Adjacent parts that form an image token only together become one part."""
    escaped: list[Message] = []
    for is_text, run in groupby(parts, key=lambda part: part["type"] == "text"):
        neighbours = list(run)
        if is_text:
            neighbours = [{**part, "text": _escape(part["text"])} for part in neighbours]
            joined = "".join(part["text"] for part in neighbours)
            if escape_image_tokens(joined) != joined:
                neighbours = [{"type": "text", "text": _escape(joined)}]
        escaped.extend(neighbours)
    return escaped


def assistant_masks(spans: list[Any], token_offsets: Any, replacements: Any) -> list[np.ndarray]:
    """Marks the tokens of each sample that overlap a span of the assistant with 1, the others with 0.

    Args:
        spans: Per sample, (start, end) characters in the prompt before images are expanded, in order.
        token_offsets: Per sample, (start, end) characters of each token in the expanded prompt.
        replacements: Per sample, the replacements of the base class, in order.
    """
    masks = []
    for row, sample_spans in enumerate(spans):
        offsets = np.asarray(token_offsets[row]).reshape(-1, 2)
        shifted = _shift(np.array(sample_spans, dtype=np.int64).reshape(-1, 2), replacements[row : row + 1])
        # First span that ends after the start of each token. Spans do not overlap, so no later one starts earlier.
        first = np.searchsorted(shifted[:, 1], offsets[:, 0], side="right")
        starts = np.append(shifted[:, 0], np.iinfo(np.int64).max)[first]
        # Padding and added special tokens span no characters, (0, 0), and overlap nothing.
        masks.append((starts < offsets[:, 1]).astype(np.int64))
    return masks


def _shift(positions: np.ndarray, replaced: list[list[dict[str, Any]]]) -> np.ndarray:
    """Shifts positions in the prompt by the growth of the placeholders before them."""
    entries = [entry for of_sample in replaced for entry in of_sample]
    ends = np.array([entry["span"][1] for entry in entries], dtype=np.int64)
    gained = np.array([0, *(entry["new_span"][1] - entry["span"][1] for entry in entries)], dtype=np.int64)
    return positions + gained[np.searchsorted(ends, positions, side="right")]


def add_training_targets(features: BatchFeature, masks: list[np.ndarray], with_masks: bool, with_labels: bool) -> None:
    """Adds `assistant_masks` and `labels` of the same type as the ids.

    Args:
        features: Model inputs, changed in place.
        masks: Per sample, 1 for each token that the assistant wrote.
        with_masks: Add `assistant_masks` (B, L).
        with_labels: Add `labels` (B, L): the ids where the mask is 1, -100 elsewhere.

    Raises:
        ValueError: If labels are requested and every token is masked.
    """
    ids = features["input_ids"]
    if with_masks:
        features["assistant_masks"] = _like(ids, masks)
    if not with_labels:
        return
    if not any(mask.any() for mask in masks):
        raise ValueError(
            "There is nothing to learn in this batch: no token of an assistant is left. Add assistant messages, raise "
            "`max_length`, or use a chat template with generation markers."
        )
    labels = [np.where(mask.astype(bool), np.asarray(row), IGNORE_INDEX) for row, mask in zip(ids, masks, strict=True)]
    features["labels"] = _like(ids, labels)


def _like(ids: Any, rows: list[np.ndarray]) -> Any:
    if isinstance(ids, torch.Tensor):
        return torch.from_numpy(np.stack(rows)).to(ids.dtype)
    return np.stack(rows).astype(ids.dtype) if isinstance(ids, np.ndarray) else [row.tolist() for row in rows]
