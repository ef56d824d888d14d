"""Checkpoints of the published training code: classification, segmentation and contrastive stage 1 (`.pth`)."""

from typing import Any

from ...configuration_internvl import InternVLConfig
from ..readers.source import Source
from ..repository.result import CLASSIFICATION, CONTRASTIVE, PYRAMID, SEGMENTATION, VISION
from .format import Format
from .hub_settings import without_old_defaults
from .key_tables import (
    OLD_DEFAULTS,
    PUBLISHED_LINEAR_BLOCK,
    RAW_CLASSIFIER,
    RAW_CONTRASTIVE,
    RAW_LINEAR_SEGMENTER,
    RAW_PYRAMID,
    RAW_TOWER,
)
from .raw_towers import (
    constructor_arguments,
    count_blocks,
    mmseg_settings,
    num_heads,
    section,
    size_of,
    tower_settings,
)
from .rules import within


# Configuration of the text encoder of stage 1, beside the weights.
LLM_CONFIG_FILE = "llm_config.json"


def assumptions(source: Source) -> list[str]:
    """Lists the settings that were assumed from the published sizes, for the user to check."""
    arguments = constructor_arguments(source.config)
    lines = []
    if "num_heads" not in arguments:
        lines.append(f"heads of the tower: {num_heads(source)} (`--num-heads N` sets it)")
    if "clip_projector.cross_attn.proj.weight" in source.tensors and "attn_pool_num_heads" not in arguments:
        lines.append(f"heads of the CLIP pooling: {_pool_heads(source)['attn_pool_num_heads']}")
    if "transformer.embed_tokens.weight" in source.tensors and not source.read_json(LLM_CONFIG_FILE):
        lines.append(
            f"the text encoder's configuration, from its shapes and LLaMA-7B's, as {LLM_CONFIG_FILE} is missing"
        )
    if "backbone.cls_token" in source.tensors and "out_indices" not in arguments:
        lines.append("the blocks that give the feature maps")
    return [f"Neither weights nor config.json say this, so the published value was taken: {line}." for line in lines]


def classifier_pooling(source: Source) -> str:
    """What a classification head reads, one of `InternViTConfig.classifier_pooling`.

    Raises:
        ValueError: If the tower cannot give the head's width.
    """
    if any(name.startswith("attn_pooling.") for name in source.tensors):
        return "attention_pooling"
    width, hidden_size = size_of(source, "norm.weight", 0), size_of(source, "cls_token", 2) or 0
    widths = {
        "cls_patch_concat": 2 * hidden_size,
        "clip_projector": size_of(source, "clip_projector.cross_attn.proj.weight", 0),
    }
    fitting = [name for name, wanted in widths.items() if wanted == width]
    if not fitting:
        raise ValueError(
            f"The head in `{source.files[-1].name}` reads {width} numbers, but the tower gives "
            f"{widths['cls_patch_concat']} (class token and mean patch) or {widths['clip_projector'] or 'none'} (CLIP "
            "pooling). It belongs to another backbone."
        )
    target = constructor_arguments(source.config).get("cls_target")
    return target if target in fitting else fitting[0]


def _pool_heads(source: Source) -> dict[str, Any]:
    """Settings of the CLIP pooling, as far as they differ from the published ones."""
    arguments = constructor_arguments(source.config)
    heads = arguments.get("attn_pool_num_heads", InternVLConfig.attn_pool_num_heads)
    width = size_of(source, "cls_token", 2) or 0
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"A CLIP pooling of width {width} cannot have {heads} heads: put the right number beside the weights as "
            'config.json, `{"attn_pool_num_heads": N}`.'
        )
    return {
        "attn_pool_num_heads": heads,
        "clip_embed_dim": size_of(source, "clip_projector.cross_attn.proj.weight", 0),
    }


def _wanted_sizes(source: Source) -> dict[str, int]:
    """Image and patch size that the published code resizes a backbone to when it loads."""
    arguments = constructor_arguments(source.config)
    wanted = {"image_size": arguments.get("img_size"), "patch_size": arguments.get("patch_size")}
    return {key: value for key, value in wanted.items() if value is not None}


# -------------------------------------------------------------------------------------------------------- what uses it
def _map_tower(source: Source) -> dict[str, Any]:
    settings = tower_settings(source)
    if "out_indices" in constructor_arguments(source.config):
        settings["out_indices"] = _feature_blocks(source, 1)
    return settings


def _map_classifier(source: Source) -> dict[str, Any]:
    pooling = classifier_pooling(source)
    return {
        **tower_settings(source),
        **(_pool_heads(source) if pooling == "clip_projector" else {}),
        "classifier_pooling": pooling,
        "num_labels": _num_labels(source, "head.weight"),
    }


def _map_linear_segmenter(source: Source) -> dict[str, Any]:
    return {
        **tower_settings(source),
        "num_labels": _num_labels(source, "decode_head.conv_seg.weight"),
        "out_indices": _feature_blocks(source, 1),
    }


def _map_pyramid(source: Source) -> dict[str, Any]:
    is_normed = "backbone.up3.1.weight" in source.tensors
    return {
        **tower_settings(source),
        "feature_pyramid": "final_norm" if is_normed else "plain",
        "out_indices": _feature_blocks(source, 4),
    }


def _num_labels(source: Source, name: str) -> int:
    found, stated = size_of(source, name, 0), constructor_arguments(source.config).get("num_classes")
    stated = section(mmseg_settings(source.config), "decode_head").get("num_classes", stated)
    if stated is not None and stated != found:
        raise ValueError(
            f"config.json says {stated} classes, `{name}` has {found}. Put the right config.json beside it."
        )
    return found or 0


def _feature_blocks(source: Source, count: int) -> list[int]:
    """`out_indices`, where 0 is what goes into the first block: one more than in the published code.

    Args:
        source: The source.
        count: How many feature maps are needed; 1 takes any number of them.
    """
    arguments = constructor_arguments(source.config)
    if count > 1:
        arguments |= section(source.config, "fpn_variant")
    depth, stated = tower_settings(source)["num_hidden_layers"], arguments.get("out_indices")
    if stated is None or (count > 1 and isinstance(stated, list) and len(stated) != count):
        if count == 1:
            return [PUBLISHED_LINEAR_BLOCK.get(depth, depth - 1) + 1]
        return [depth * (place + 1) // count for place in range(count)]  # published UperNet: 12, 24, 36 and 48
    if not stated or not isinstance(stated, list) or not all(index in range(depth) for index in stated):
        raise ValueError(f"config.json says `out_indices` {stated!r}, but the tower has blocks 0 to {depth - 1}.")
    return [index + 1 for index in stated]


# ------------------------------------------------------------------------------------------------- contrastive stage 1
def _map_contrastive(source: Source) -> dict[str, Any]:
    return {
        "vision_config": tower_settings(source),
        "qllama_config": _text_settings(source),
        **_pool_heads(source),
        "tie_word_embeddings": False,
        "model_type": InternVLConfig.model_type,
    }


def _text_settings(source: Source) -> dict[str, Any]:
    layer = "transformer.layers.0."
    sizes = {
        "vocab_size": size_of(source, "transformer.embed_tokens.weight", 0),
        "hidden_size": size_of(source, "transformer.embed_tokens.weight", 1),
        "intermediate_size": size_of(source, f"{layer}mlp.gate_proj.weight", 0),
        "num_hidden_layers": count_blocks(source, "transformer.layers."),
    }
    settings = {key: value for key, value in sizes.items() if value is not None}
    settings |= without_old_defaults(source.read_json(LLM_CONFIG_FILE), OLD_DEFAULTS)
    width = settings.get("hidden_size", 0)
    if "num_attention_heads" not in settings:
        if width % 128:
            raise ValueError(
                f"How many heads a text encoder of width {width} has cannot be read from its weights: put the "
                f"configuration of its LLaMA beside them as {LLM_CONFIG_FILE}."
            )
        settings["num_attention_heads"] = width // 128  # LLaMA of every size
    # The published code takes every token above 0 for text, regardless of the tokenizer's padding token.
    return {**settings, "pad_token_id": 0, "num_query_token": 0, "model_type": "qllama"}


CONTRASTIVE_RAW = Format(
    name="InternVL-C, raw stage-1 layout",
    result=CONTRASTIVE,
    tensor_names=("cls_token", "transformer.embed_tokens.weight", "text_projection"),
    map_config=_map_contrastive,
    rules=RAW_CONTRASTIVE,
)
CLASSIFIER_RAW = Format(
    name="InternViT with a classification head, raw layout",
    result=CLASSIFICATION,
    tensor_names=("cls_token", "head.weight", "norm.weight"),
    map_config=_map_classifier,
    rules=RAW_CLASSIFIER,
    wanted_sizes=_wanted_sizes,
)
TOWER_RAW = Format(
    name="InternViT, raw layout",
    result=VISION,
    tensor_names=("cls_token", "pos_embed"),
    map_config=_map_tower,
    rules=RAW_TOWER,
    wanted_sizes=_wanted_sizes,
)
LINEAR_SEGMENTER_RAW = Format(
    name="InternViT with a linear segmentation head, raw layout",
    result=SEGMENTATION,
    tensor_names=("backbone.cls_token", "decode_head.conv_seg.weight"),
    map_config=_map_linear_segmenter,
    rules=RAW_LINEAR_SEGMENTER,
)
PYRAMID_RAW = Format(
    name="InternViT with a feature pyramid, raw segmentation layout",
    result=PYRAMID,
    tensor_names=("backbone.cls_token", "backbone.up1.0.weight"),
    map_config=_map_pyramid,
    rules=RAW_PYRAMID,
)
SEGMENTATION_TOWER_RAW = Format(
    name="InternViT, raw segmentation layout",
    result=VISION,
    tensor_names=("backbone.cls_token", "backbone.pos_embed"),
    map_config=_map_tower,
    rules=within("backbone.", "", RAW_TOWER),
)
# The first that matches is taken: a tower with more beside it stands before one with less.
RAW_FORMATS = (
    CONTRASTIVE_RAW,
    CLASSIFIER_RAW,
    TOWER_RAW,
    PYRAMID_RAW,
    LINEAR_SEGMENTER_RAW,
    SEGMENTATION_TOWER_RAW,
)
