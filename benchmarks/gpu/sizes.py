"""What is measured: the released sizes, or tiny ones that run anywhere."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..harness import sizes_of


MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


def released(model: str, part: str) -> dict[str, Any]:
    """A part of a configuration of `configs/models`."""
    return json.loads((MODELS / f"{model}.json").read_text(encoding="utf-8"))[part]


@dataclass(frozen=True)
class ModelSizes:
    """ModelSizes of models and inputs; the defaults are the released ones.

    Args:
        vision: InternViT-6B at 448 px.
        qllama: QLLaMA, 8 B with its queries and cross-attention.
        decoder: The decoder of a 13 B chat model.
        checked_vision: A tower in which implementations are compared.
        checked_text: Width, depth and vocabulary of the QLLaMA and decoder in which they are compared.
        batches: Tiles of a forward.
        prompt: Tokens before the decoding.
        prefill: Tokens of the prompt that is read at once.
        new_tokens: Decoded tokens of a round.
        copied_bytes: Of the copy that bandwidth is measured with.
        pairs: Image-text pairs of a stage-1 step.
        chunk: Pairs that are encoded at a time in that step.
        dialogue: Tokens of a row of a stage-3 step.
        dialogue_tiles: Tiles of that row.
    """

    vision: dict[str, Any] = field(default_factory=lambda: released("internvl-chat-13b", "vision_config"))
    qllama: dict[str, Any] = field(default_factory=lambda: released("internvl-14b", "qllama_config"))
    decoder: dict[str, Any] = field(default_factory=lambda: released("internvl-chat-13b", "text_config"))
    checked_vision: dict[str, Any] = field(default_factory=lambda: sizes_of(1024, 4096, 4, 16, image_size=448))
    checked_text: dict[str, Any] = field(default_factory=lambda: sizes_of(1024, 2816, 4, 16, vocab_size=4096))
    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 128
    prefill: int = 2048
    new_tokens: int = 32
    copied_bytes: int = 4 * 2**30
    pairs: int = 128
    chunk: int = 32
    dialogue: int = 2048
    dialogue_tiles: int = 4


STAND_IN = ModelSizes(
    vision=sizes_of(64, 128, 3, 4, image_size=56, patch_size=14),
    qllama=sizes_of(64, 128, 2, 4, vocab_size=99, num_query_token=4),
    decoder=sizes_of(64, 128, 2, 4, vocab_size=99, num_key_value_heads=4, model_type="llama"),
    checked_vision=sizes_of(64, 128, 2, 4, image_size=56, patch_size=14),
    checked_text=sizes_of(64, 128, 2, 4, vocab_size=99),
    batches=(1, 2),
    prompt=5,
    prefill=8,
    new_tokens=3,
    copied_bytes=4096,
    pairs=4,
    chunk=2,
    dialogue=40,
    dialogue_tiles=2,
)
