"""generation_config.json of a result."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...conversation_internvl import get_conversation_template
from ..readers.source import Source
from .code import write_json
from .result import Result


# Settings of `generate`, with the defaults of old; others than these move to generation_config.json.
OLD_GENERATION_DEFAULTS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}


# Of these, searches that transformers itself no longer has.
REMOVED_GENERATION_KEYS = ("diversity_penalty", "num_beam_groups")


def generation_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` in a published decoder configuration that differ from the defaults of their time."""
    return {
        key: config[key] for key, value in OLD_GENERATION_DEFAULTS.items() if key in config and config[key] != value
    }


def write_generation_config(
    target: Path, result: Result, config: Any, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes generation_config.json: the source's settings, with the end and padding tokens of the result.

    A vision tower generates nothing; without a tokenizer only the decoder's end token is known.
    """
    if result.kind == "vision":
        return
    decoder = config.get_text_config()
    parts = ("llm_config", "qllama_config", "text_config")
    nested = next((source.config[part] for part in parts if source.config.get(part)), source.config)
    settings = {**generation_settings(nested), **source.read_json("generation_config.json")}
    settings = {k: v for k, v in settings.items() if not k.startswith("_") and k not in REMOVED_GENERATION_KEYS}
    settings.pop("transformers_version", None)
    ends = _as_list(settings.get("eos_token_id", decoder.eos_token_id))
    if tokenizer is not None and result.kind == "chat" and config.template:
        ends = get_conversation_template(config.template).end_token_ids(tokenizer) + ends
    ends = list(dict.fromkeys(ends))
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    pads = [pad, settings.get("pad_token_id"), decoder.pad_token_id, *ends, None]
    settings.update(
        bos_token_id=settings.get("bos_token_id", decoder.bos_token_id),
        eos_token_id=ends if len(ends) != 1 else ends[0],
        pad_token_id=next((value for value in pads if value is not None), None),
    )
    settings = {key: value for key, value in settings.items() if value not in (None, [])}
    GenerationConfig(**settings)  # raises where a value cannot be
    write_json(target / "generation_config.json", settings)


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
