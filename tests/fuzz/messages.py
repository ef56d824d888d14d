"""Messages: image tokens where no image belongs, and messages of every wrong form."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from internvl.processing_internvl import InternVLProcessor

from ..fixtures_processing import SEQ, SQUARE, make_processor
from .mutations import with_odd_values


TOKENS = [
    "<image>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
    "<IMG_CONTEXT>" * 300,
    "<<image>image><IMG_<IMG_CONTEXT>CONTEXT>",
]
# What a refusal must speak of.
NAMED = r"[Mm]essage \d|[Cc]onversation|Text \d|Image \d|sample \d|`tools`|`documents`|assistant"
Call = tuple[list[dict[str, Any]], dict[str, Any]]


def _text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def places(token: str) -> dict[str, Call]:
    """Dialogues about one image, with the token in every place that holds a text: 23."""
    image = {"type": "image", "image": SQUARE}
    asked = {"role": "user", "content": [image, _text("What?")]}
    answered = {"role": "assistant", "content": [_text("A bus.")]}
    half = len(token) // 2
    tool = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}

    def user(*parts: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}]

    calls = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": token}}}]}
    return {
        "text before the image": (user(_text(token), image), {}),
        "text after the image": (user(image, _text(token)), {}),
        "texts around it": (user(_text(token[:half]), image, _text(token[half:])), {}),
        "two neighbours": (user(image, _text(token[:half]), _text(token[half:])), {}),
        "three neighbours": (user(image, _text(token[:1]), _text(token[1:half]), _text(token[half:])), {}),
        "text alone": ([{"role": "user", "content": token}, answered, asked], {}),
        "system text": ([{"role": "system", "content": token}, asked], {}),
        "system part": ([{"role": "system", "content": [_text(token)]}, asked], {}),
        "answer text": ([asked, {"role": "assistant", "content": token}], {}),
        "answer part": ([asked, {"role": "assistant", "content": [_text(token)]}], {}),
        "second question": ([asked, answered, {"role": "user", "content": token}], {}),
        "second question's part": ([asked, answered, *user(_text(token))], {}),
        "two messages": (
            [{"role": "system", "content": token[:half]}, *user(_text(token[half:]), image)],
            {},
        ),
        "name": ([{**asked, "name": token}], {}),
        "role": ([{"role": token, "content": "a"}, asked], {}),
        "tool's answer": ([asked, answered, {"role": "tool", "content": token}], {}),
        "tool's part": ([asked, answered, {"role": "tool", "content": [_text(token)]}], {}),
        "tool's description": (
            [asked],
            {"tools": [{**tool, "function": {**tool["function"], "description": token}}]},
        ),
        "tool's name": ([asked], {"tools": [{**tool, "function": {**tool["function"], "name": token}}]}),
        "arguments of a tool call": ([asked, {"role": "assistant", "content": "a", **calls}], {}),
        "thoughts": ([asked, {"role": "assistant", "content": "a", "reasoning_content": token}], {}),
        "documents": ([asked], {"documents": [{"title": token, "text": token}]}),
        "keys of an image": (user({**image, "text": token, "alt": token}, _text("What?")), {}),
    }


def _count(processor: InternVLProcessor, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str | None:
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    rows = inputs["input_ids"]
    ids = list(rows[0]) if isinstance(rows[0], list) else rows
    vocabulary = processor.tokenizer.get_vocab()
    counts = {token: ids.count(vocabulary[token]) for token in ("<IMG_CONTEXT>", "<img>", "</img>")}
    right = {"<IMG_CONTEXT>": SEQ, "<img>": 1, "</img>": 1}
    return None if counts == right else f"one image of one tile becomes {counts}"


def injections() -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Each token in each place: 161. The placeholders of the prompt are those of the image."""
    processor = make_processor()
    for token in TOKENS:
        for place, (messages, settings) in places(token).items():
            yield f"{token[:40]!r} in {place}", partial(_count, processor, messages, settings), NAMED


def _dialogue() -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You look."},
        {"role": "user", "content": [{"type": "image", "image": SQUARE}, _text("What?")]},
        {"role": "assistant", "content": [_text("A bus.")]},
        {"role": "user", "content": "Which colour?"},
    ]


def _encode(processor: InternVLProcessor, messages: Any, settings: dict[str, Any]) -> None:
    processor.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)


def malformed(seed: int, count: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Dialogues in which some values are odd."""
    processor = make_processor()
    generator = random.Random(f"{seed}/messages")
    for number in range(count):
        messages = with_odd_values(_dialogue(), generator, generator.choice([0.03, 0.1, 0.3]))
        settings = {"return_labels": True} if number % 5 == 4 else {}
        yield f"{number}: {messages!r}"[:300], partial(_encode, processor, messages, settings), NAMED


__all__ = ["injections", "malformed"]
