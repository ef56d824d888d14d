"""Messages of a dialogue: made safe for a chat template before, turned into training targets afterwards.

Before: literal image tokens in texts are escaped, and a video becomes its frames in the published form (`Frame1: ` and
a picture, `Frame2: ` and a picture...). Afterwards: the characters that an assistant wrote become masks and labels of
tokens.

Not covered: reading video files, and rendering, which is the chat template's work.
"""

from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature

from .conversation_internvl import escape_image_tokens


Message = dict[str, Any]

IGNORED_LABEL = -100  # what the losses of transformers and torch leave out


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of dialogues, rather than one dialogue."""
    if not conversation:
        raise ValueError("The conversation is empty. Pass at least one message.")
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def prepare_conversations(conversations: Any) -> tuple[list[list[Message]], list[bool]]:
    """Copies with escaped texts and videos taken apart.

    Args:
        conversations: Lists of messages.

    Returns:
        The copies, and for each picture, in order, whether it is a frame of a video.

    Raises:
        ValueError: If a video part does not hold frames.
    """
    is_frame: list[bool] = []
    prepared = []
    for conversation in conversations:
        messages = getattr(conversation, "messages", conversation)
        prepared.append([_prepare_message(message, is_frame) for message in messages])
    return prepared, is_frame


def _prepare_message(message: Message, is_frame: list[bool]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": escape_image_tokens(content)}
    if content is None:
        return dict(message)
    parts: list[Message] = []
    for part in content:
        if part.get("type") == "video":
            parts.extend(_frames_as_parts(part, is_frame))
        else:
            if part.get("type") in ("image", "image_url"):
                is_frame.append(False)
            parts.append(dict(part))
    return {**message, "content": _escape_parts(parts)}


def _frames_as_parts(part: Message, is_frame: list[bool]) -> list[Message]:
    """The published form of a video: one picture per frame, each announced by its number."""
    parts: list[Message] = []
    for number, frame in enumerate(_frames_of(part), start=1):
        parts.append({"type": "text", "text": f"Frame{number}: "})
        parts.append({"type": "image", "image": frame})
        is_frame.append(True)
    return parts


def _frames_of(part: Message) -> list[Any]:
    video = next((part[name] for name in ("video", "url", "path") if part.get(name) is not None), None)
    if isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4:
        return list(video)
    if isinstance(video, (list, tuple)) and len(video) > 0:
        return list(video)
    raise ValueError(
        "A video part must hold its frames: a list of images, or an array (frames, height, width, channels), got "
        f"{type(video).__name__}. Video files are not read here: decode them with a library of your choice and pass "
        "the frames."
    )


def _escape_parts(parts: list[Message]) -> list[Message]:
    """Escapes the text parts; neighbours that only together hold an image token become one part."""
    escaped: list[Message] = []
    for is_text, run in groupby(parts, key=lambda part: part.get("type") == "text"):
        neighbours = list(run)
        if is_text:
            neighbours = [{**part, "text": escape_image_tokens(part["text"])} for part in neighbours]
            joined = "".join(part["text"] for part in neighbours)
            if escape_image_tokens(joined) != joined:
                neighbours = [{"type": "text", "text": escape_image_tokens(joined)}]
        escaped.extend(neighbours)
    return escaped


def assistant_masks(spans: list[Any], token_offsets: Any, replacements: Any) -> list[list[int]]:
    """Marks the tokens that overlap a span of the assistant.

    Args:
        spans: For each sample, (start, end) characters in the prompt before images are expanded.
        token_offsets: For each sample, (start, end) characters of each token in the expanded prompt.
        replacements: For each sample, what the base class replaced, in order.

    Returns:
        For each sample, 1 or 0 for each token.
    """
    masks = []
    for row, sample_spans in enumerate(spans):
        replaced = replacements[row] if row < len(replacements) else []
        shifted = [tuple(_shift(position, replaced) for position in span) for span in sample_spans]
        offsets = token_offsets[row].tolist() if hasattr(token_offsets[row], "tolist") else token_offsets[row]
        # Padding and added special tokens have no characters (0, 0) and overlap nothing.
        masks.append([int(any(first < end and last > start for start, end in shifted)) for first, last in offsets])
    return masks


def _shift(position: int, replaced: list[dict[str, Any]]) -> int:
    """A position in the prompt, after the placeholders before it were replaced."""
    passed = [entry for entry in replaced if entry["span"][1] <= position]
    return position + (passed[-1]["new_span"][1] - passed[-1]["span"][1] if passed else 0)


def add_training_targets(features: BatchFeature, masks: list[list[int]], with_masks: bool, with_labels: bool) -> None:
    """Adds `assistant_masks` and `labels`, of the same type as the ids.

    Args:
        features: Model inputs, changed in place.
        masks: For each sample, 1 for each token that an assistant wrote.
        with_masks: Add `assistant_masks` (B, L).
        with_labels: Add `labels` (B, L): the ids where the mask is 1, else -100.

    Raises:
        ValueError: If labels are wanted and no token is left to learn.
    """
    ids = features["input_ids"]
    if with_masks:
        features["assistant_masks"] = _like(ids, masks)
    if not with_labels:
        return
    if not any(any(mask) for mask in masks):
        raise ValueError(
            "There is nothing to learn in this batch: no token of an assistant is left. Add assistant messages, raise "
            "`max_length`, or use a chat template with generation markers."
        )
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    labels = [
        [index if kept else IGNORED_LABEL for index, kept in zip(row, mask, strict=True)]
        for row, mask in zip(rows, masks, strict=True)
    ]
    features["labels"] = _like(ids, labels)


def _like(ids: Any, rows: list[list[int]]) -> Any:
    if isinstance(ids, torch.Tensor):
        return torch.tensor(rows, dtype=ids.dtype)
    return np.array(rows, dtype=ids.dtype) if isinstance(ids, np.ndarray) else rows


__all__ = ["IGNORED_LABEL", "Message", "add_training_targets", "assistant_masks", "is_batch", "prepare_conversations"]
