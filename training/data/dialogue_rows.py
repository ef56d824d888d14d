"""Rows of dialogue data, in every usual form, to the messages that `apply_chat_template` takes.

Rows may be LLaVA's and ShareGPT's (`conversations` of `from` and `value`), `messages` with `images`, OpenAI's lists of
content parts, `query` and `response`, or Cauldron's `texts` of `user` and `assistant`. Not covered: videos (give
frames as images), sound, and tool calls.
"""

from pathlib import Path
from typing import Any

from ...conversation_internvl import IMAGE_PLACEHOLDER
from ...messages_internvl import Message
from .image_files import image_file, is_path
from .json_rows import Row
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
    elif row.get("texts") is not None:
        pairs = [_pair_of_texts(pair) for pair in _as_list(row, "texts")]
        turns = _asked_and_answered(pairs[:-1], pairs[-1])
    else:
        raise ValueError(
            "A row needs `conversations`, `messages`, `query` and `response`, or `texts`; this one has "
            f"{', '.join(row)}."
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


def _pair_of_texts(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, dict):
        raise ValueError(f"`texts` must be a list of objects with `user` and `assistant`, got {pair!r:.80}.")
    return pair.get("user"), pair.get("assistant")


def _as_list(row: Row, key: str) -> list[Any]:
    found = row[key]
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        # A sequence of objects, as `datasets` stores it.
        found = [dict(zip(found, turn, strict=True)) for turn in zip(*found.values(), strict=True)]
    if not isinstance(found, list) or not found:
        raise ValueError(f"`{key}` must be a list of messages that is not empty, got {found!r:.80}.")
    return found


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
