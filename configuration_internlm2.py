# Copyright 2026 The InternVL package authors. MIT license.
"""Configuration of InternLM2, the decoder of InternVL-Chat V1-5 and several 2.x releases; transformers has none.

InternLM2 is a LLaMA whose q, k and v are one interleaved matrix and whose parameters have other names.
"""

from typing import Any

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """InternLM2 decoder (published `configuration_internlm2.py`).

    Args:
        bias: Whether the attention projections have a bias.
    """

    model_type = "internlm2"
    hub_auto_map = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
    base_model_tp_plan = {
        "tok_embeddings": "embedding_rowwise",
        "layers.*.attention.wqkv": "colwise",  # grouped by key/value head, so a contiguous split keeps groups whole
        "layers.*.attention.wo": "rowwise",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
    }

    vocab_size: int = 92544
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), and that of `num_key_value_heads` ({self.num_key_value_heads})."
            )


__all__ = ["InternLM2Config"]
