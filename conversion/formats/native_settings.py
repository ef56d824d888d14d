"""Configurations of transformers' own InternVL, both ways.

The native model is the simple configuration of InternVL-Chat with pixel shuffle "v2"; what it cannot express is
refused with the reason. So is "v1": there the shuffled grid stands transposed in the text, and as the decoder counts
positions along the text, no change of weights makes up for that.
"""

from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig

from ...configuration_internvl import InternViTConfig, InternVLChatConfig
from ..readers.source import Source
from .hub_settings import without_old_defaults
from .key_tables import MEANINGLESS_KEYS, OLD_DEFAULTS, OLD_VISION_DEFAULTS
from .native_tables import (
    FIXED_OURS,
    FIXED_TOP,
    FIXED_VISION,
    HEAD_SETTINGS,
    QK_NORM_EPS,
    TOP_KEYS,
    TURN_MARKS,
    VISION_KEYS,
)


def native_obstacles(config: InternVLChatConfig) -> list[str]:
    """Why a chat model cannot become a native one; empty where it can."""
    vision, decoder = config.vision_config, config.text_config
    fold = 1 / config.downsample_ratio
    scaled = [name for name in HEAD_SETTINGS if getattr(decoder, name, None) not in (None, 1, 1.0)]
    reasons = {
        f"`connector` is {config.connector!r}, and the native model has no QLLaMA": config.connector != "patches",
        f"`projector_type` is {config.projector_type!r}, and the native projector begins with a LayerNorm": (
            config.projector_type != "layer_norm_mlp"
        ),
        f"`ps_version` is {config.ps_version!r}, and the native model lays pixel-shuffled patches row by row; the "
        "decoder would see them at other positions": config.ps_version != "v2",
        f"`layer_norm_eps` is {vision.layer_norm_eps:g}, and the eps of the native q/k norm is {QK_NORM_EPS:g}": (
            vision.qk_normalization and vision.layer_norm_eps != QK_NORM_EPS
        ),
        f"`downsample_ratio` is {config.downsample_ratio:g}, and the native model takes 1 over a whole number that "
        "floats hold exactly": (
            int(fold) != round(fold) or config.image_size // vision.patch_size % config.downsample_ratio != 0
        ),
        "images stand between no `<img>` and `</img>`, and the native processor writes them": (
            not config.use_image_start_end
        ),
        "`mask_image_token_logit` is set, and the native model gives the image token a logit": (
            config.mask_image_token_logit
        ),
        f"the decoder has `{'`, `'.join(scaled)}`, and the native model takes logits as its head gives them": bool(
            scaled
        ),
    }
    return [reason for reason, is_true in reasons.items() if is_true]


def to_native(settings: dict[str, Any], config: InternVLChatConfig) -> dict[str, Any]:
    """The native config.json of a chat model that can become one."""
    dropped = {"vision_config", "text_config", "qllama_config", "img_context_token_id", "model_type", *FIXED_OURS}
    vision = _swapped(settings["vision_config"], config.vision_config, VISION_KEYS)
    for key in ("image_size", "patch_size"):
        vision[key] = [vision[key], vision[key]]
    top = _swapped({key: value for key, value in settings.items() if key not in dropped}, config, TOP_KEYS)
    return {
        **top,
        **FIXED_TOP,
        "image_seq_length": config.num_image_token,
        "vision_config": {**vision, **FIXED_VISION, "model_type": InternVLVisionConfig.model_type},
        "text_config": {**settings["text_config"], "tie_word_embeddings": config.tie_word_embeddings},
        "model_type": InternVLConfig.model_type,
        "architectures": ["InternVLForConditionalGeneration"],
    }


def _swapped(settings: dict[str, Any], config: Any, keys: dict[str, str]) -> dict[str, Any]:
    """Settings under their native keys, defaults spelled out; keys that mean the same in both stay."""
    others = {key: value for key, value in settings.items() if key not in (*keys.values(), *MEANINGLESS_KEYS)}
    return {**others, **{native: getattr(config, ours) for native, ours in keys.items()}}


def map_native(source: Source) -> dict[str, Any]:
    """Configuration of a chat model, from a native checkpoint.

    Raises:
        ValueError: If the checkpoint uses what the chat models here have not; the message has all of it.
    """
    published = source.config
    vision = _resolved(published.get("vision_config") or {}, InternVLVisionConfig, VISION_KEYS, FIXED_VISION)
    top = _resolved(published, InternVLConfig, TOP_KEYS, FIXED_TOP)
    _check_fixed({"vision_config.": (vision, FIXED_VISION), "": (top, FIXED_TOP)})
    text = without_old_defaults(top.pop("text_config", None) or {}, OLD_DEFAULTS)
    text.setdefault("model_type", "qwen2")
    has_head = any(name.endswith("lm_head.weight") for name in source.tensors)
    is_tied = bool(top["tie_word_embeddings"]) or not has_head
    mapped = {
        **{ours: vision[native] for native, ours in VISION_KEYS.items()},
        **{key: value for key, value in vision.items() if key not in (*VISION_KEYS, *FIXED_VISION)},
        "model_type": InternViTConfig.model_type,
    }
    ours = {
        **{ours: top[native] for native, ours in TOP_KEYS.items()},
        **{key: value for key, value in top.items() if key not in (*TOP_KEYS, *FIXED_TOP, "image_seq_length")},
        **FIXED_OURS,
        "vision_config": mapped,
        "text_config": {**text, "tie_word_embeddings": is_tied},
        "tie_word_embeddings": is_tied,
        "model_type": InternVLChatConfig.model_type,
    }
    return {
        "template": _template(source),
        **_tiling(source),
        **_image_size(ours, top["image_seq_length"]),
        **ours,
    }


def _resolved(
    settings: dict[str, Any], config_class: Any, keys: dict[str, str], fixed: dict[str, Any]
) -> dict[str, Any]:
    """A native configuration with its defaults spelled out, one number for equal sides."""
    defaults = {key: getattr(config_class, key) for key in (*keys, *fixed)}
    defaults |= {"image_seq_length": InternVLConfig.image_seq_length} if config_class is InternVLConfig else {}
    old = OLD_VISION_DEFAULTS if config_class is InternVLVisionConfig else OLD_DEFAULTS
    given = without_old_defaults(settings, old)
    resolved = {
        **defaults,
        **{key: value for key, value in given.items() if key not in ("vision_config", "model_type")},
    }
    for key in ("image_size", "patch_size"):
        sides = resolved.get(key)
        if isinstance(sides, (list, tuple)) and len(set(sides)) == 1:
            resolved[key] = sides[0]
    return resolved


def _check_fixed(parts: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    wrong = [
        f"`{prefix}{key}` {settings[key]!r} (must be {value!r})"
        for prefix, (settings, fixed) in parts.items()
        for key, value in fixed.items()
        if settings[key] != value
    ]
    wrong += [
        f"`{prefix}{key}` {settings[key]!r} (must be one whole number)"
        for prefix, (settings, _) in parts.items()
        for key in ("image_size", "patch_size", "vision_feature_layer")
        if isinstance(settings.get(key, 0), (list, tuple))
    ]
    if wrong:
        raise ValueError(f"This native checkpoint has what InternVL-Chat here has not: {', '.join(wrong)}.")


def _tiling(source: Source) -> dict[str, Any]:
    """Settings of tiles, which native checkpoints keep with their image processor alone."""
    nested = source.read_json("processor_config.json").get("image_processor") or {}
    settings = {**nested, **source.read_json("preprocessor_config.json")}
    return {
        "dynamic_image_size": True,  # the native processor always asks for tiles
        "use_thumbnail": True,
        "min_dynamic_patch": settings.get("min_patches", 1),
        "max_dynamic_patch": settings.get("max_patches", 12),
    }


def _template(source: Source) -> str | None:
    """Name of the conversation template, recognised by the marks of turns in the Jinja template."""
    path = source.folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for name in ("chat_template.json", "tokenizer_config.json"):
        text += str(source.read_json(name).get("chat_template", ""))
    return next((name for mark, name in TURN_MARKS.items() if mark in text), None)


def _image_size(settings: dict[str, Any], image_seq_length: int) -> dict[str, Any]:
    """Size of the images, from the number of image tokens, where it is not that of the positions."""
    vision = settings["vision_config"]
    side = round(image_seq_length**0.5 / settings["downsample_ratio"]) * vision["patch_size"]
    return {} if side == vision["image_size"] else {"force_image_size": side}
