"""Rows of dialogue data, in every usual form, to the messages that `apply_chat_template` takes.

Rows may be LLaVA's and ShareGPT's (`conversations` of `from` and `value`), `messages` with `images`, OpenAI's lists of
content parts, `query` and `response`, or Cauldron's `texts` of `user` and `assistant`. Images are in `image` or
`images`, videos in `video` or `videos`, or both in content parts. Not covered: sound, and tool calls.
"""

import re
from pathlib import Path
from typing import Any

from ...conversation_internvl import IMAGE_PLACEHOLDER
from ...messages_internvl import Message
from ...rows.image_files import image_file, is_path
from ...rows.json_rows import Row
from ...rows.texts import check_text


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
SOURCE_KEYS = ("bytes", "image", "video", "url", "path", "base64", "image_url", "video_url")
UNSUPPORTED_KEYS = ("audio", "audios")
VIDEO_PLACEHOLDER = "<video>"
KIND_OF_PLACEHOLDER = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}
KIND_OF_PART = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
MAX_CHARACTERS = 200_000  # of all texts of a row; tokenizers take seconds for a megabyte

_PLACEHOLDER = re.compile("({})".format("|".join(KIND_OF_PLACEHOLDER)))

Part = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- the forms
def read_dialogue(row: Row, images: str | Path | None = None) -> list[Message]:
    """Turns a row of any usual form into messages for `InternVLProcessor.apply_chat_template`.

    Each `<image>` in a question is the place of the next image of the row, and each `<video>` that of the next video;
    one line break behind it is dropped, because the chat template writes one. Where no question has an `<image>`, all
    images come before the first one; videos likewise. Content parts say themselves where their images and videos are,
    and `<image>` is then plain text.

    Args:
        row: The row.
        images: Folder of the images and videos that are given as paths, which must lie below it; None takes them as
            they are.

    Returns:
        Messages whose contents are lists of text, image and video parts. A video is a path, bytes, or a list of
        frames.

    Raises:
        ValueError: If the row has none of the forms, or its parts do not fit together. The message says what is wrong.
    """
    for key in UNSUPPORTED_KEYS:
        if row.get(key):
            raise ValueError(f"`{key}` is not read here.")
    turns = _turns_of(row)
    _check_order([role for role, _ in turns])
    length = sum(len(part.get("text", "")) for _, parts in turns for part in parts)
    if length > MAX_CHARACTERS:
        raise ValueError(f"The row has {length} characters of text, at most {MAX_CHARACTERS} are read.")
    has_parts = any(_is_shown(part) for _, parts in turns for part in parts)
    if not has_parts:
        turns = _split_placeholders(turns)
    for kind in ("video", "image"):
        turns = _filled(turns, kind, _given(row, kind))
    messages = []
    for number, (role, parts) in enumerate(turns, start=1):
        _check_content(role, parts, number)
        for part in parts:
            check_text(part.get("text", ""), f"Message {number}")
        resolved = [_resolved(part, images) if _is_shown(part) else part for part in parts]
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
        elif isinstance(kind, str) and kind in KIND_OF_PART:
            kind = KIND_OF_PART[kind]
            parts.append({"type": kind, kind: _source_of(part)})
        else:
            raise ValueError(f"A content part must be a text or an image or video, got {part!r:.80}.")
    return parts


def _is_shown(part: Part) -> bool:
    return part["type"] != "text"


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
    shown = next((part["type"] for part in parts if _is_shown(part)), None)
    if shown and role != "user":
        article = "an" if shown == "image" else "a"
        raise ValueError(
            f"Message {number} is from `{role}` and holds {article} {shown}: only a user may show {shown}s."
        )
    if role != "system" and not shown and not any(part["text"].strip() for part in parts):
        raise ValueError(f"The {'answer' if role == 'assistant' else 'question'} in message {number} is empty.")


# --------------------------------------------------------------------------------------------- the images and videos
def _given(row: Row, kind: str) -> list[Any]:
    """Images or videos of a row that stand outside its messages."""
    given = [row[key] for key in (kind, f"{kind}s") if row.get(key) is not None and row[key] not in ("", [])]
    if len(given) > 1:
        raise ValueError(f"A row has either `{kind}` or `{kind}s`, this one has both.")
    shown = given[0] if given and isinstance(given[0], (list, tuple)) else given
    return [_source_of(source) for source in shown]


def _source_of(image: Any) -> Any:
    """What an image or video is read from; None where a part leaves it to those of the row."""
    while isinstance(image, dict):
        key = next((key for key in SOURCE_KEYS if image.get(key) is not None), None)
        image = None if key is None else image[key]
        if key == "base64" and isinstance(image, str) and not image.startswith("data:"):
            image = f"data:;base64,{image}"  # no path
    return image


def _split_placeholders(turns: list[tuple[str, list[Part]]]) -> list[tuple[str, list[Part]]]:
    """Parts without a source in place of each `<image>` and `<video>` in a question."""
    split = []
    for role, parts in turns:
        if role == "user":
            parts = [piece for part in parts for piece in _pieces(part["text"])]
        split.append((role, parts))
    return split


def _pieces(text: str) -> list[Part]:
    first, *others = _PLACEHOLDER.split(text)
    pieces: list[Part] = [{"type": "text", "text": first}]
    for placeholder, other in zip(others[::2], others[1::2], strict=True):
        kind = KIND_OF_PLACEHOLDER[placeholder]
        pieces += [{"type": kind, kind: None}, {"type": "text", "text": other.removeprefix("\n")}]
    kept = [piece for piece in pieces if _is_shown(piece) or piece["text"]]
    return kept or pieces


def _filled(turns: list[tuple[str, list[Part]]], kind: str, sources: list[Any]) -> list[tuple[str, list[Part]]]:
    """Gives each image part, or video part, without a source the next one of the row."""
    places = [part for _, parts in turns for part in parts if part["type"] == kind]
    empty = [part for part in places if part[kind] is None]
    if sources and not places:
        shown = [{"type": kind, kind: source} for source in sources]
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        return [(role, shown + parts if index == first else parts) for index, (role, parts) in enumerate(turns)]
    if len(empty) != len(sources):
        raise ValueError(
            f"The questions have {len(empty)} place(s) for {kind}s (`<{kind}>`, or {kind} parts without a source), "
            f"and the row has {len(sources)} {kind}(s)."
        )
    for part, source in zip(empty, sources, strict=True):
        part[kind] = source
    return turns


def _resolved(part: Part, images: str | Path | None) -> Part:
    """The part with the path of its file, which must be there; those of its frames where it is a list of them."""
    kind = part["type"]
    source = part[kind]
    if source is None:
        raise ValueError(f"{'An' if kind == 'image' else 'A'} {kind} is null.")
    if kind == "video" and isinstance(source, (list, tuple)):
        frames = [_resolved({"type": "image", "image": _source_of(frame)}, images) for frame in source]
        return {**part, kind: [frame["image"] for frame in frames]}
    if is_path(source):
        return {**part, kind: str(image_file(source, images, kind))}
    if kind == "video" and not isinstance(source, bytes):
        raise ValueError(f"A video must be a file, its bytes, or a list of frames, got {source!r:.80}.")
    return part
