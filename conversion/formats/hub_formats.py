"""The layouts of published checkpoints: how each is recognised by its content, and what becomes of its configuration.

A layout is recognised by keys of config.json and names of tensors, never by the name of a folder. Its configuration is copied key by
key into today's spelling; keys that mean nothing here are kept, what old releases of transformers wrote into every configuration is
dropped (tables in key_tables).
"""

from typing import Any

from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from ..readers.source import Source
from ..readers.tensors import LazyTensor
from ..repository.generation import OLD_GENERATION_DEFAULTS
from ..repository.result import CHAT, CLASSIFICATION, CONTRASTIVE, PYRAMID, SEGMENTATION, VISION
from .format import Layout
from .key_tables import MEANINGLESS_KEYS, OLD_DEFAULTS, OLD_VISION_DEFAULTS, ROTARY_ALIASES, ROTARY_KEYS


def without_old_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what transformers once wrote into all of them.

    Args:
        config: As published.
        defaults: Keys that say nothing where they hold this value.

    Returns:
        What is left, names of rotary positions in today's spelling; settings of `generate` are not among it.
    """
    return {
        key: _todays_rotary(value) if key in ROTARY_KEYS else value
        for key, value in config.items()
        if key not in MEANINGLESS_KEYS
        and key not in OLD_GENERATION_DEFAULTS
        and not (key in defaults and value == defaults[key])
    }


def _todays_rotary(value: Any) -> Any:
    """`rope_scaling` or `rope_parameters` with the name of its kind that transformers has today; its kinds may lie deeper, by layer."""
    if not isinstance(value, dict):
        return value
    return {
        key: ROTARY_ALIASES.get(part, part)
        if key in ("type", "rope_type") and isinstance(part, str)
        else _todays_rotary(part)
        for key, part in value.items()
    }


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Today's InternViT configuration from a published one."""
    # The earliest 6B releases have no `norm_type`; the class default is theirs.
    return {**without_old_defaults(config, OLD_VISION_DEFAULTS), "model_type": InternViTConfig.model_type}


def _map_vision(source: Source) -> dict[str, Any]:
    return vision_settings(source.config)


def with_stored_size(settings: dict[str, Any], positions: LazyTensor | None, side: int | None) -> dict[str, Any]:
    """InternViT's configuration with the size that its positions were stored for.

    The published code may stretch the positions before training, and leaves the old size in the tower's configuration.

    Args:
        settings: Of the tower.
        positions: Its position embedding.
        side: `force_image_size` of the configuration around it; taken where it is the size of the positions.
    """
    patch_size = settings.get("patch_size", InternViTConfig.patch_size)
    if side and positions is not None and positions.shape[1:2] == ((side // patch_size) ** 2 + 1,):
        return {**settings, "image_size": side}
    return settings


def _tower_settings(source: Source) -> dict[str, Any]:
    positions = source.tensors.get("vision_model.embeddings.position_embedding")
    settings = vision_settings(source.config.get("vision_config") or {})
    return with_stored_size(settings, positions, source.config.get("force_image_size"))


def _map_contrastive(source: Source) -> dict[str, Any]:
    return {**contrastive_settings(source.config), "vision_config": _tower_settings(source)}


def contrastive_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Today's InternVL-C/G configuration from a published one."""
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
        "vision_config": vision_settings(config.get("vision_config") or {}),
        "qllama_config": qllama,
        "model_type": InternVLConfig.model_type,
    }


def _map_chat(source: Source) -> dict[str, Any]:
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


HUB_LAYOUTS = (
    Layout(
        name="InternVL-14B, published Hub layout",
        result=CONTRASTIVE,
        config_keys=("qllama_config",),
        tensor_names=("text_projection", "vision_model.embeddings.class_embedding"),
        map_config=_map_contrastive,
    ),
    Layout(
        name="InternVL-Chat, published Hub layout",
        result=CHAT,
        config_keys=("llm_config", "text_config"),
        tensor_names=("mlp1.0.weight", "vision_model.embeddings.class_embedding"),
        map_config=_map_chat,
    ),
    Layout(
        name="InternVL-Chat that reads queries alone, layout of this package",
        result=CHAT,
        config_keys=("connector",),
        tensor_names=("mlp2.0.weight", "query_tokens", "vision_model.embeddings.class_embedding"),
        map_config=_map_chat,
    ),
    Layout(
        name="InternViT with a classification head, layout of this package",
        result=CLASSIFICATION,
        config_keys=("qk_normalization", "classifier_pooling"),
        tensor_names=("vision_model.embeddings.class_embedding", "head.weight", "norm.running_mean"),
        map_config=_map_vision,
    ),
    Layout(
        name="InternViT with a linear segmentation head, layout of this package",
        result=SEGMENTATION,
        config_keys=("qk_normalization", "out_indices"),
        tensor_names=("vision_model.embeddings.class_embedding", "decode_head.conv_seg.weight"),
        map_config=_map_vision,
    ),
    Layout(
        name="InternViT with a feature pyramid, layout of this package",
        result=PYRAMID,
        config_keys=("feature_pyramid",),
        tensor_names=("embeddings.class_embedding", "up1.0.weight"),
        map_config=_map_vision,
    ),
    Layout(
        name="InternViT, published Hub layout",
        result=VISION,
        config_keys=("qk_normalization", "initializer_factor"),
        tensor_names=("embeddings.class_embedding", "embeddings.position_embedding"),
        map_config=_map_vision,
    ),
)
