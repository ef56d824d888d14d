"""Configurations of the published Hub layouts, made of this package's, and what those layouts cannot express."""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from .hub_settings import KEPT_DEFAULTS, spelled_out


# -------------------------------------------------------------------------------------------------------------- config
# What the published classes write about themselves.
_VISION = {
    "architectures": ["InternVisionModel"],
    "auto_map": {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    },
    "model_type": "intern_vit_6b",
    "use_flash_attn": True,
}
_INTERNLM2 = {
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
}
_CONTRASTIVE = {
    "architectures": ["InternVLModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl.InternVLConfig",
        "AutoModel": "modeling_internvl.InternVLModel",
    },
    "model_type": "internvl",
    "use_backbone_lora": 0,
    "use_qllama_lora": 0,
}
_CHAT = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "model_type": "internvl_chat",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
# Keys of this package alone; the published code, or the tokenizer, fixes their values.
_OWN_VISION_KEYS = (
    "attn_pool_num_heads classifier_pooling clip_embed_dim drop_path_schedule feature_pyramid out_features "
    "out_indices semantic_loss_ignore_index stage_names"
).split()
_OWN_CHAT_KEYS = "connector image_token_id mask_image_token_logit projector_type use_image_start_end".split()


def published_vision(config: InternViTConfig) -> dict[str, Any]:
    """The published config.json of an InternViT."""
    settings = spelled_out(config)
    return {
        **_VISION,
        **{key: value for key, value in settings.items() if key not in (*_OWN_VISION_KEYS, *KEPT_DEFAULTS)},
    }


def _decoder(config: PretrainedConfig) -> dict[str, Any]:
    """A language model's config.json with rotary positions in the old spelling, `rope_theta` and `rope_scaling`."""
    settings = spelled_out(config)
    rope = settings.pop("rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        rope = dict(rope)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        settings["rope_theta"] = rope.pop("rope_theta")
        settings["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    elif rope is not None:
        settings["rope_parameters"] = rope
    if set(settings.get("layer_types") or ()) == {"full_attention"}:
        settings.pop("layer_types")  # later than the published code
    if config.model_type == "internlm2":
        return {**_INTERNLM2, "architectures": ["InternLM2ForCausalLM"], **settings}
    return {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)], **settings}


def published_contrastive(config: InternVLConfig) -> dict[str, Any]:
    """The published config.json of an InternVL-14B."""
    qllama = _decoder(config.qllama_config)
    qllama.pop("vision_hidden_size")
    return {
        **_CONTRASTIVE,
        **spelled_out(config),
        "vision_config": published_vision(config.vision_config),
        "qllama_config": {**qllama, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "hidden_size": config.qllama_config.hidden_size,
        # The published code takes them from here.
        "num_query_token": config.qllama_config.num_query_token,
        "cross_attention_frequency": config.qllama_config.cross_attention_frequency,
        "model_type": _CONTRASTIVE["model_type"],
    }


def published_chat(config: InternVLChatConfig) -> dict[str, Any]:
    """The published config.json of an InternVL-Chat."""
    settings = {key: value for key, value in spelled_out(config).items() if key not in _OWN_CHAT_KEYS}
    return {
        **_CHAT,
        **settings,
        "vision_config": published_vision(config.vision_config),
        "llm_config": _decoder(config.text_config),
        "hidden_size": config.text_config.hidden_size,
        "model_type": _CHAT["model_type"],
    }


# ------------------------------------------------------------------------------------------------------------- reasons
def contrastive_obstacles(config: InternVLConfig) -> list[str]:
    """Reasons why a model is no published InternVL-14B."""
    if config.qllama_config.num_query_token:
        return []
    return ["it has no queries (InternVL-C, stage 1), which the published InternVL-14B always has"]


def chat_obstacles(config: InternVLChatConfig) -> list[str]:
    """Reasons why a model is no published InternVL-Chat."""
    reasons = {
        f"`connector` is {config.connector!r}, and the published InternVL-Chat has no QLLaMA": config.connector
        != "patches",
        f"`projector_type` is {config.projector_type!r}, and the published projector begins with a LayerNorm": (
            config.projector_type != "layer_norm_mlp"
        ),
        "images stand between no `<img>` and `</img>`, and in the published InternVL-Chat they do": (
            not config.use_image_start_end
        ),
    }
    return [reason for reason, is_true in reasons.items() if is_true]
