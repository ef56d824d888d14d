"""The layouts of published checkpoints: how each is recognised by its content, and what becomes of its configuration.

A layout is recognised by keys of config.json and names of tensors, never by the name of a folder. Its configuration is copied key by
key into today's spelling; keys that mean nothing here are kept, what old releases of transformers wrote into every configuration is
dropped (tables in key_tables).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from ..modeling_internvit import InternVisionModel
from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from .key_tables import (
    LORA_MARKS,
    MEANINGLESS_KEYS,
    OLD_DEFAULTS,
    OLD_GENERATION_DEFAULTS,
    OLD_VISION_DEFAULTS,
)
from .source import Source


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published layout.

    Args:
        name: How it is called in messages.
        kind: "vision", "contrastive" or "chat".
        config_keys: Keys of config.json of which one must be there.
        tensor_names: Tensors that must be there.
        config_class: Class of the result's configuration.
        model_class: Class that `AutoModel` gives for the result.
        pipeline_tag: Task on the Hub.
        map_config: Today's configuration from the published one.
    """

    name: str
    kind: str
    config_keys: tuple[str, ...]
    tensor_names: tuple[str, ...]
    config_class: Any
    model_class: type[PreTrainedModel]
    pipeline_tag: str
    map_config: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto classes of the result."""
        return dict(self.config_class.hub_auto_map)

    def matches(self, source: Source) -> bool:
        """Whether a source has this layout."""
        return any(key in source.config for key in self.config_keys) and all(
            name in source.tensors for name in self.tensor_names
        )


def without_old_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what transformers once wrote into all of them.

    Args:
        config: As published.
        defaults: Keys that say nothing where they hold this value.

    Returns:
        What is left; settings of `generate` are not among it.
    """
    return {
        key: value
        for key, value in config.items()
        if key not in MEANINGLESS_KEYS
        and key not in OLD_GENERATION_DEFAULTS
        and not (key in defaults and value == defaults[key])
    }


def generation_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` in a published decoder configuration that differ from the defaults of their time."""
    return {
        key: config[key] for key, value in OLD_GENERATION_DEFAULTS.items() if key in config and config[key] != value
    }


def _vision(config: dict[str, Any]) -> dict[str, Any]:
    # The earliest 6B releases have no `norm_type`; the class default is theirs.
    return without_old_defaults(config, OLD_VISION_DEFAULTS)


def _map_vision(config: dict[str, Any]) -> dict[str, Any]:
    return {**_vision(config), "model_type": InternViTConfig.model_type}


def _map_contrastive(config: dict[str, Any]) -> dict[str, Any]:
    mapped = without_old_defaults(config, OLD_DEFAULTS)
    qllama = without_old_defaults(mapped.pop("qllama_config"), OLD_DEFAULTS)
    qllama["model_type"] = "qllama"
    # The published code overwrites the value inside, with 2 if there is none outside; a result of this command has it inside.
    is_ours = config.get("model_type") == InternVLConfig.model_type
    frequency = qllama.get("cross_attention_frequency", 2) if is_ours else 2
    qllama["cross_attention_frequency"] = mapped.pop("cross_attention_frequency", frequency)
    qllama["num_query_token"] = mapped.pop("num_query_token", qllama.get("num_query_token", 96))
    return {
        # The published loader ties the head where this key is absent, and so loses the one that is stored.
        "tie_word_embeddings": False,
        **mapped,
        "vision_config": _map_vision(mapped.get("vision_config") or {}),
        "qllama_config": qllama,
        "model_type": InternVLConfig.model_type,
    }


def _map_chat(config: dict[str, Any]) -> dict[str, Any]:
    mapped = without_old_defaults(config, OLD_DEFAULTS)
    published = mapped.pop("llm_config", None) or mapped.pop("text_config", None) or {}
    decoder = without_old_defaults(published, OLD_DEFAULTS)
    if "model_type" not in decoder:
        decoder["model_type"] = "llama"  # what the published code takes it for
    return {
        "connector": "patches",
        "ps_version": "v1",
        **mapped,
        "vision_config": _map_vision(mapped.get("vision_config") or {}),
        "text_config": decoder,
        "tie_word_embeddings": bool(decoder.get("tie_word_embeddings", False)),
        "model_type": InternVLChatConfig.model_type,
    }


LAYOUTS = (
    Layout(
        name="InternVL-14B, published Hub layout",
        kind="contrastive",
        config_keys=("qllama_config",),
        tensor_names=("query_tokens", "text_projection", "vision_model.embeddings.class_embedding"),
        config_class=InternVLConfig,
        model_class=InternVLModel,
        pipeline_tag="zero-shot-image-classification",
        map_config=_map_contrastive,
    ),
    Layout(
        name="InternVL-Chat, published Hub layout",
        kind="chat",
        config_keys=("llm_config", "text_config"),
        tensor_names=("mlp1.0.weight", "vision_model.embeddings.class_embedding"),
        config_class=InternVLChatConfig,
        model_class=InternVLChatForConditionalGeneration,
        pipeline_tag="image-text-to-text",
        map_config=_map_chat,
    ),
    Layout(
        name="InternViT, published Hub layout",
        kind="vision",
        config_keys=("qk_normalization", "initializer_factor"),
        tensor_names=("embeddings.class_embedding", "embeddings.position_embedding"),
        config_class=InternViTConfig,
        model_class=InternVisionModel,
        pipeline_tag="image-feature-extraction",
        map_config=_map_vision,
    ),
)


def recognise(source: Source) -> Layout:
    """The layout of a source.

    Args:
        source: An opened source.

    Returns:
        The layout.

    Raises:
        ValueError: If adapters are wrapped into it, or no layout fits; the message says what is supported.
    """
    _refuse_lora(source.tensors)
    for layout in LAYOUTS:
        if layout.matches(source):
            return layout
    described = "; ".join(
        f"{layout.name} (config.json with `{'` or `'.join(layout.config_keys)}`, tensors {', '.join(layout.tensor_names)})"
        for layout in LAYOUTS
    )
    has_config = f"`model_type` {source.config.get('model_type')!r}" if source.config else "no config.json"
    names = ", ".join(list(source.tensors)[:3])
    raise ValueError(
        f"The layout of `{source.folder}` is unknown: it has {has_config} and {len(source.tensors)} tensors ({names}...). Supported: "
        f"{described}."
    )


def _refuse_lora(names: Iterable[str]) -> None:
    wrapped = [name for name in names if any(mark in name for mark in LORA_MARKS)]
    if wrapped:
        raise ValueError(
            "LoRA-wrapped checkpoints are not supported by this command yet: merge the adapters first, with the code that made them. "
            f"Wrapped tensors ({len(wrapped)}): {', '.join(wrapped)}."
        )
