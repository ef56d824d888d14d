"""Tables of tensor names and configuration keys between transformers' own InternVL and the chat models here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .rules import TensorFunction, TensorRule, rename, within


# ------------------------------------------------------------------------------------------------------------- tensors
def _fused(parts: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    return torch.cat(list(parts))


def _third(index: int) -> TensorFunction:
    return lambda parts, settings: parts[0].chunk(3)[index]


_KINDS = ("weight", "bias")
_LAYER, _OURS = "encoder.layer.{}.", "encoder.layers.{}."
# Parts of a block: native name, and name here.
_BLOCK = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VISION = (
    rename("embeddings.cls_token", "embeddings.class_embedding"),
    rename("embeddings.position_embeddings", "embeddings.position_embedding"),
    rename("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight"),
    rename("embeddings.patch_embeddings.projection.bias", "embeddings.patch_embedding.bias"),
    *(
        TensorRule(
            tuple(f"{_LAYER}attention.{name}_proj.{kind}" for name in "qkv"),
            (f"{_OURS}attn.qkv.{kind}",),
            rightward=(_fused,),
            leftward=(_third(0), _third(1), _third(2)),
        )
        for kind in _KINDS
    ),
    *(rename(f"{_LAYER}{left}.{kind}", f"{_OURS}{right}.{kind}") for left, right in _BLOCK.items() for kind in _KINDS),
    rename(f"{_LAYER}lambda_1", f"{_OURS}ls1"),
    rename(f"{_LAYER}lambda_2", f"{_OURS}ls2"),
)
_PROJECTOR = tuple(
    rename(f"{left}.{kind}", f"{right}.{kind}")
    for left, right in {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}.items()
    for kind in _KINDS
)
# Native names (left) and ours.
_TODAY = (
    *within("model.vision_tower.", "vision_model.", _VISION),
    *within("model.multi_modal_projector.", "mlp1.", _PROJECTOR),
    rename("model.language_model.*", "language_model.model.*"),
    rename("lm_head.*", "language_model.lm_head.*"),
)
# The same in the first releases, to which transformers still renames as it saves, and from which as it loads.
_FIRST_PREFIXES = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def _first_spelling(name: str) -> str:
    today, first = next(pair for pair in _FIRST_PREFIXES.items() if name.startswith(pair[0]))
    return first + name.removeprefix(today)


def spelling_of_today(name: str) -> str:
    """A native name as the model has it, from any of its two spellings."""
    for today, first in _FIRST_PREFIXES.items():
        if name.startswith(first):
            return today + name.removeprefix(first)
    return name


# On the way back, the first rule that knows a name is used, so the first spelling is only read.
NATIVE_RULES = (*_TODAY, *(replace(rule, left=tuple(map(_first_spelling, rule.left))) for rule in _TODAY))
# Of which one set must be there.
_MARKS = ("model.vision_tower.embeddings.cls_token", "model.multi_modal_projector.linear_1.weight")
NATIVE_NAMES = (_MARKS, tuple(map(_first_spelling, _MARKS)))

# ------------------------------------------------------------------------------------------------------ configurations
# Native key to ours. Both configurations keep keys that they do not know, so all others pass unchanged.
VISION_KEYS = {
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "projection_dropout": "dropout",
    "layer_scale_init_value": "initializer_factor",
    **{
        key: key
        for key in (
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels hidden_act norm_type "
            "layer_norm_eps attention_dropout initializer_range image_size patch_size"
        ).split()
    },
}
TOP_KEYS = {
    "vision_feature_layer": "select_layer",
    "downsample_ratio": "downsample_ratio",
    "image_token_id": "image_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
# What has one value there, and means what has one value here.
FIXED_VISION = {
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,  # no final norm
    "hidden_dropout_prob": 0.0,
}
FIXED_TOP = {"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
FIXED_OURS = {
    "connector": "patches",
    "projector_type": "layer_norm_mlp",
    "ps_version": "v2",
    "use_image_start_end": True,
    "mask_image_token_logit": False,
}
# The native q/k norm has its eps built in.
QK_NORM_EPS = 1e-6
# Marks that begin a turn, and the conversation template of the releases that write them.
TURN_MARKS = {"<|im_start|>": "internvl2_5"}
# Settings of decoders whose head does more than multiply, which the native model leaves out.
HEAD_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
