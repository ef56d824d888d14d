"""Parts of a model, each under the names that it has alone: vision tower, projector, QLLaMA and decoder.

What belongs to a part, but has no place in its class, is listed beside it: InternVL-C's pooling beside the tower, the
queries and heads of InternVL-G beside QLLaMA.
"""

from dataclasses import dataclass, field
from typing import Any

from ..readers.tensors import Tensors
from .content import Content


PART_NAMES = ("vision", "projector", "qllama", "decoder")
TOWER, POOLING = "vision_model.", "clip_projector."
PROJECTORS = ("mlp1.", "mlp2.")
PROJECTOR_TYPE = "internvl_projector"  # `model_type` of a projector alone
# Of QLLaMA, outside its class.
QUERIES, HEADS = "query_tokens", ("clip_projector2.", "itm_head.", "text_projection", "logit_scale")
# Settings of the whole model that a part depends on.
POOLING_KEYS = ("clip_embed_dim", "attn_pool_num_heads")
PROJECTOR_KEYS = ("connector", "projector_type", "downsample_ratio", "ps_version", "select_layer")
# Of a vision model, what its heads need.
HEAD_KEYS = "classifier_pooling feature_pyramid id2label label2id out_features out_indices problem_type stage_names"
FACT_KEYS = ("architectures", "auto_map", "dtype")


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A part of a model.

    Args:
        name: One of `PART_NAMES`.
        settings: Its configuration.
        tensors: Its tensors under the names that they have in its own class.
        beside: Tensors that belong to it, under their names in the whole model.
    """

    name: str
    settings: dict[str, Any]
    tensors: Tensors
    beside: Tensors = field(default_factory=dict)


def take_part(content: Content, name: str) -> ModelPart:
    """Takes a part out of a model.

    Raises:
        ValueError: If the model has no such part.
    """
    found = {"vision": _vision, "projector": _projector, "qllama": _qllama, "decoder": _decoder}[name](content)
    if not found.tensors:
        raise ValueError(f"There is no part `{name}` in {content.source_format.name} (`{content.source.folder}`).")
    return found


def starting(tensors: Tensors, *starts: str) -> Tensors:
    """The tensors whose names begin with one of these."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}


def without_start(tensors: Tensors, start: str) -> Tensors:
    """The tensors whose names begin with this, without it."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _pooling_settings(content: Content) -> dict[str, Any]:
    return {key: getattr(content.config, key) for key in POOLING_KEYS} if content.result.kind == "contrastive" else {}


def _vision(content: Content) -> ModelPart:
    settings = {**content.settings.get("vision_config", content.settings), **_pooling_settings(content)}
    tower = without_start(content.tensors, TOWER) or starting(content.tensors, "embeddings.", "encoder.")
    kept = {key: value for key, value in settings.items() if key not in (*HEAD_KEYS.split(), *FACT_KEYS)}
    return ModelPart(name="vision", settings=kept, tensors=tower, beside=starting(content.tensors, POOLING))


def _projector(content: Content) -> ModelPart:
    if content.result.kind != "chat":
        return ModelPart(name="projector", settings={}, tensors={})
    settings = {key: getattr(content.config, key) for key in PROJECTOR_KEYS}
    settings["model_type"] = PROJECTOR_TYPE
    return ModelPart(name="projector", settings=settings, tensors=starting(content.tensors, *PROJECTORS))


def _qllama(content: Content) -> ModelPart:
    start = "qllama."
    config = getattr(content.config, "qllama_config", None)
    tensors = without_start(content.tensors, start)
    if config is None or not tensors:
        return ModelPart(name="qllama", settings={}, tensors={})
    if content.result.kind == "chat":  # there it is a model without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    shape = ("num_query_token", "cross_attention_frequency", "vision_hidden_size")
    settings = {
        **content.settings["qllama_config"],
        **{key: getattr(config, key) for key in shape},
        **_pooling_settings(content),
        "model_type": config.model_type,
    }
    kept = {key: value for key, value in settings.items() if key not in FACT_KEYS}
    return ModelPart(name="qllama", settings=kept, tensors=tensors, beside=starting(content.tensors, QUERIES, *HEADS))


def _decoder(content: Content) -> ModelPart:
    if content.result.kind != "chat":
        return ModelPart(name="decoder", settings={}, tensors={})
    settings = {
        **content.settings["text_config"],
        "model_type": content.config.text_config.model_type,
        "tie_word_embeddings": content.config.tie_word_embeddings,
    }
    kept = {key: value for key, value in settings.items() if key not in FACT_KEYS}
    return ModelPart(name="decoder", settings=kept, tensors=without_start(content.tensors, "language_model."))
