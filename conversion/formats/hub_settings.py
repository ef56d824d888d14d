"""Configurations of the published Hub layouts in this package's spelling, and the marks of each layout.

Configurations are copied key by key. Keys without a meaning here are kept; what old releases of transformers wrote
into every configuration is dropped (tables in key_tables).
"""

from typing import Any

from transformers import PretrainedConfig

from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from ..readers.source import Source
from ..readers.tensors import LazyTensor
from ..repository.generation import OLD_GENERATION_DEFAULTS
from ..repository.result import CHAT, CONTRASTIVE, VISION
from .key_tables import MEANINGLESS_KEYS, OLD_DEFAULTS, OLD_VISION_DEFAULTS, ROTARY_ALIASES, ROTARY_KEYS


# Keys common to all configurations that mean something even where they hold their default.
KEPT_DEFAULTS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def without_old_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Drops what old releases of transformers wrote into every configuration, and settings of `generate`.

    Kinds of rotary positions get today's spelling.

    Args:
        config: The published configuration.
        defaults: Keys that mean nothing where they hold this value.
    """
    return {
        key: _todays_rotary(value) if key in ROTARY_KEYS else value
        for key, value in config.items()
        if key not in MEANINGLESS_KEYS
        and key not in OLD_GENERATION_DEFAULTS
        and not (key in defaults and value == defaults[key])
    }


def _todays_rotary(value: Any) -> Any:
    """Renames the kinds in `rope_scaling` or `rope_parameters`, which may lie deeper, by layer."""
    if not isinstance(value, dict):
        return value
    return {
        key: ROTARY_ALIASES.get(part, part)
        if key in ("type", "rope_type") and isinstance(part, str)
        else _todays_rotary(part)
        for key, part in value.items()
    }


def spelled_out(config: PretrainedConfig) -> dict[str, Any]:
    """Lists settings of a configuration, defaults included, without nested ones and those common to all classes."""
    common = PretrainedConfig().to_dict()
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in (*MEANINGLESS_KEYS, *config.sub_configs)
        and not key.startswith("_")
        and not (key in common and key not in KEPT_DEFAULTS and value == common[key])
    }


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Today's InternViT configuration from a published one."""
    # The earliest 6B releases have no `norm_type`; the class default is theirs.
    return {**without_old_defaults(config, OLD_VISION_DEFAULTS), "model_type": InternViTConfig.model_type}


def map_vision(source: Source) -> dict[str, Any]:
    """Today's config.json of an InternViT."""
    return vision_settings(source.config)


def with_stored_size(settings: dict[str, Any], positions: LazyTensor | None, side: int | None) -> dict[str, Any]:
    """Sets `image_size` of a tower to `side`, the `force_image_size` around it, where its positions have that size.

    The published code may stretch the positions before training, and leaves the old size in the tower's configuration.
    """
    patch_size = settings.get("patch_size", InternViTConfig.patch_size)
    if side and positions is not None and positions.shape[1:2] == ((side // patch_size) ** 2 + 1,):
        return {**settings, "image_size": side}
    return settings


def _tower_settings(source: Source) -> dict[str, Any]:
    positions = source.tensors.get("vision_model.embeddings.position_embedding")
    settings = vision_settings(source.config.get("vision_config") or {})
    return with_stored_size(settings, positions, source.config.get("force_image_size"))


def map_contrastive(source: Source) -> dict[str, Any]:
    """Today's config.json of an InternVL-C or InternVL-G."""
    return {**contrastive_settings(source.config), "vision_config": _tower_settings(source)}


def contrastive_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Today's InternVL-C/G configuration from a published one."""
    mapped = without_old_defaults(config, OLD_DEFAULTS)
    qllama = without_old_defaults(mapped.pop("qllama_config"), OLD_DEFAULTS)
    qllama["model_type"] = "qllama"
    # The published code overwrites the inner value with the outer one, or 2; results of this command have it inside.
    is_ours = config.get("model_type") == InternVLConfig.model_type
    frequency = qllama.get("cross_attention_frequency", 2) if is_ours else 2
    qllama["cross_attention_frequency"] = mapped.pop("cross_attention_frequency", frequency)
    qllama["num_query_token"] = mapped.pop("num_query_token", qllama.get("num_query_token", 96))
    return {
        # The published loader ties the head where this key is absent, and so loses the one that is stored.
        "tie_word_embeddings": False,
        **mapped,
        "vision_config": vision_settings(config.get("vision_config") or {}),
        "qllama_config": qllama,
        "model_type": InternVLConfig.model_type,
    }


def map_chat(source: Source) -> dict[str, Any]:
    """Today's config.json of an InternVL-Chat."""
    mapped = without_old_defaults(source.config, OLD_DEFAULTS)
    published = mapped.pop("llm_config", None) or mapped.pop("text_config", None) or {}
    decoder = without_old_defaults(published, OLD_DEFAULTS)
    if "model_type" not in decoder:
        decoder["model_type"] = "llama"  # what the published code takes it for
    return {
        "connector": "patches",
        "ps_version": "v1",
        **mapped,
        "vision_config": _tower_settings(source),
        "text_config": decoder,
        "tie_word_embeddings": bool(decoder.get("tie_word_embeddings", False)),
        "model_type": InternVLChatConfig.model_type,
    }


# Fields of `Format` that a published Hub layout shares with this package's format; names of tensors are the same.
CONTRASTIVE_MARKS: dict[str, Any] = {
    "result": CONTRASTIVE,
    "config_keys": ("qllama_config",),
    "tensor_names": ("text_projection", "vision_model.embeddings.class_embedding"),
    "map_config": map_contrastive,
}
CHAT_MARKS: dict[str, Any] = {
    "result": CHAT,
    "config_keys": ("llm_config", "text_config"),
    "tensor_names": ("mlp1.0.weight", "vision_model.embeddings.class_embedding"),
    "map_config": map_chat,
}
VISION_MARKS: dict[str, Any] = {
    "result": VISION,
    "config_keys": ("qk_normalization", "initializer_factor"),
    "tensor_names": ("embeddings.class_embedding", "embeddings.position_embedding"),
    "map_config": map_vision,
}
