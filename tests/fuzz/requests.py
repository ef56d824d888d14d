"""Requests to an Inference Endpoint: bodies of which some values are odd."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..conftest import ROOT
from ..fixtures_endpoint import load_handler
from ..fixtures_images import data_address
from .mutations import with_odd_values


# What a refusal must speak of.
NAMED = r"request|`\w+`|message|[Ii]mage|[Tt]ext|tokens|seconds"


def _chat_body(image: str) -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Which colour?"},
    ]
    return {"inputs": messages, "parameters": {"max_new_tokens": 2, "temperature": 0.5, "max_num": 1, "task": "chat"}}


def _contrastive_bodies(image: str) -> list[dict[str, Any]]:
    return [
        {"inputs": {"texts": ["a", "b"], "images": [image]}, "parameters": {"mode": "InternVL-C", "normalize": True}},
        {"inputs": ["a", image], "parameters": {"task": "embeddings"}},
        {"inputs": [image], "parameters": {"candidate_labels": ["a", "b"], "hypothesis_template": "one {}"}},
        {"inputs": image, "parameters": {"task": "caption", "max_new_tokens": 2, "prompt": "English caption:"}},
    ]


def _answer(handler: Any, body: Any) -> None:
    handler(body)  # what a call returns would be a fault


def inputs(seed: int, count: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Bodies for the bundled chat model and InternVL-G, in turns."""
    image = data_address(ROOT / "examples" / "star.png")
    generator = random.Random(f"{seed}/requests")
    chat, contrastive = load_handler(ROOT), load_handler(ROOT, "internvl_g")
    for number in range(count):
        is_chat = number % 2 == 0
        body = _chat_body(image) if is_chat else _contrastive_bodies(image)[number // 2 % 4]
        body = with_odd_values(body, generator, generator.choice([0.03, 0.1, 0.3]))
        call = partial(_answer, chat if is_chat else contrastive, body)
        yield f"{number}: {str(body).replace(image, 'IMAGE')}"[:300], call, NAMED


__all__ = ["inputs"]
