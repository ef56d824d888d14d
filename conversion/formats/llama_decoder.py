"""An InternLM2 decoder as the LLaMA that it is, and back.

InternLM2 computes what a LLaMA computes; its q, k and v are one matrix, and its tensors have other names. Engines and
transformers' native InternVL know the LLaMA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from ...configuration_internlm2 import InternLM2Config
from .edits import Draft
from .rules import TensorFunction, TensorRule, inverse, rename, translate, within


def _grouped(packed: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(rows, ...) -> (key/value heads, query heads of each + 2, head width, ...)."""
    heads = settings["num_key_value_heads"]
    return packed.unflatten(0, (heads, settings["num_attention_heads"] // heads + 2, -1))


def _query(parts: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    return _grouped(parts[0], settings)[:, :-2].flatten(0, 2)


def _key(parts: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    return _grouped(parts[0], settings)[:, -2].flatten(0, 1)


def _value(parts: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    return _grouped(parts[0], settings)[:, -1].flatten(0, 1)


def _packed(parts: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    heads = settings["num_key_value_heads"]
    per_head = settings["num_attention_heads"] // heads
    query, key, value = (
        part.unflatten(0, (heads, count, -1)) for part, count in zip(parts, (per_head, 1, 1), strict=True)
    )
    return torch.cat([query, key, value], dim=1).flatten(0, 2)


_SPLIT: tuple[TensorFunction, ...] = (_query, _key, _value)
_LAYER = "model.layers.{}."

# InternLM2 (left) and LLaMA (right), as causal language models. Biases are there where the configuration says so.
INTERNLM2_AS_LLAMA = (
    rename("model.tok_embeddings.weight", "model.embed_tokens.weight"),
    *(
        TensorRule(
            (f"{_LAYER}attention.wqkv.{kind}",),
            tuple(f"{_LAYER}self_attn.{name}_proj.{kind}" for name in "qkv"),
            rightward=_SPLIT,
            leftward=(_packed,),
        )
        for kind in ("weight", "bias")
    ),
    rename(f"{_LAYER}attention.wo.weight", f"{_LAYER}self_attn.o_proj.weight"),
    rename(f"{_LAYER}attention.wo.bias", f"{_LAYER}self_attn.o_proj.bias"),
    rename(f"{_LAYER}feed_forward.w1.weight", f"{_LAYER}mlp.gate_proj.weight"),
    rename(f"{_LAYER}feed_forward.w3.weight", f"{_LAYER}mlp.up_proj.weight"),
    rename(f"{_LAYER}feed_forward.w2.weight", f"{_LAYER}mlp.down_proj.weight"),
    rename(f"{_LAYER}attention_norm.weight", f"{_LAYER}input_layernorm.weight"),
    rename(f"{_LAYER}ffn_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename("output.weight", "lm_head.weight"),
)
# The same inside a chat model, whose other tensors stay.
_CHAT_RULES = (*within("language_model.", "language_model.", INTERNLM2_AS_LLAMA), rename("*", "*"))
# Keys whose defaults differ between the two.
_OTHER_DEFAULTS = ("vocab_size", "max_position_embeddings", "rms_norm_eps")


def internlm2_as_llama(draft: Draft) -> None:
    """An edit: an InternLM2 decoder becomes a LLaMA, any other decoder stays as it is."""
    if _decoder_type(draft) == InternLM2Config.model_type:
        decoder_as_llama(draft)
        draft.notes.append("The InternLM2 decoder is written as the LLaMA that it is.")


def decoder_as_llama(draft: Draft) -> None:
    """An edit: the InternLM2 decoder of a chat model becomes a LLaMA; nothing that the model computes changes.

    Raises:
        ValueError: If the decoder is no InternLM2, or its tensors do not fit its configuration.
    """
    if _decoder_type(draft) != InternLM2Config.model_type:
        raise ValueError("`llama_decoder` has no effect: the model has no InternLM2 decoder.")
    settings = dict(draft.settings["text_config"])
    resolved = _translate(draft, InternLM2Config, _CHAT_RULES)
    settings.pop("bias", None)
    draft.settings["text_config"] = {
        **settings,
        **{key: getattr(resolved, key) for key in _OTHER_DEFAULTS},
        "attention_bias": resolved.bias,
        "model_type": LlamaConfig.model_type,
    }


def llama_as_internlm2(draft: Draft) -> None:
    """The inverse edit, for a decoder that once was an InternLM2; a LLaMA that cannot be one stays as it is.

    Raises:
        ValueError: If the decoder's tensors do not fit its configuration.
    """
    if _decoder_type(draft) != LlamaConfig.model_type:
        return
    settings = {key: value for key, value in draft.settings["text_config"].items() if key != "attention_bias"}
    decoder = LlamaConfig(
        **{key: value for key, value in draft.settings["text_config"].items() if key != "model_type"}
    )
    if decoder.mlp_bias or decoder.head_dim * decoder.num_attention_heads != decoder.hidden_size:
        return
    resolved = _translate(draft, LlamaConfig, inverse(_CHAT_RULES))
    draft.settings["text_config"] = {
        **settings,
        **{key: getattr(resolved, key) for key in _OTHER_DEFAULTS},
        "bias": resolved.attention_bias,
        "model_type": InternLM2Config.model_type,
    }


def _decoder_type(draft: Draft) -> str | None:
    return (draft.settings.get("text_config") or {}).get("model_type")


def _translate(draft: Draft, config_class: type[LlamaConfig], rules: Sequence[TensorRule]) -> Any:
    """Gives the tensors of a draft the names of the other format; returns the decoder's configuration."""
    settings = {key: value for key, value in draft.settings["text_config"].items() if key != "model_type"}
    try:
        config: Any = config_class(**settings)
        translation = translate(draft.tensors, rules, config.to_dict())
    except (StrictDataclassError, TypeError, RuntimeError) as error:
        raise ValueError(f"config.json does not describe this {config_class.model_type} decoder: {error}") from error
    if translation.incomplete:
        raise ValueError(f"The decoder lacks tensors: {', '.join(translation.incomplete)}.")
    draft.tensors = translation.tensors
    return config
