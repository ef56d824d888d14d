# Copyright 2026 The InternVL package authors. MIT license.
"""Configurations of InternViT, QLLaMA, InternVL-C/G and InternVL-Chat.

The class defaults are the released 1.0 sizes (InternViT-6B, QLLaMA-8B). Keys of published configurations that mean
nothing here (LoRA ranks, `use_flash_attn`...) are kept as plain attributes, so a configuration survives a round trip.
Impossible shapes are refused when the configuration is built, so that no layer has to check them.
"""

from copy import deepcopy
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig
from transformers.utils.versions import require_version


# Every entry into the package passes this file. Releases before 5.17 write remote code to disk before asking for
# trust.
require_version("transformers>=5.19,<6", "The InternVL package is tested on transformers 5.19.0 to 5.23.0.")

from transformers.backbone_utils import BackboneConfigMixin  # noqa: E402  (absent before the supported range)
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .configuration_internlm2 import InternLM2Config  # noqa: E402


MODES = ("InternVL-C", "InternVL-G")
NORM_TYPES = ("rms_norm", "layer_norm")
DROP_PATH_SCHEDULES = ("linear", "uniform")
CONNECTORS = ("patches", "queries", "queries_and_patches")
PROJECTOR_TYPES = ("layer_norm_mlp", "mlp2x_gelu")
PIXEL_SHUFFLE_VERSIONS = ("v1", "v2")
CLASSIFIER_POOLINGS = ("cls_patch_concat", "attention_pooling", "clip_projector")
FEATURE_PYRAMIDS = (None, "plain", "final_norm")


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor <= 0 or value % divisor:
        raise ValueError(f"`{name}` ({value}) must be a multiple of `{divisor_name}` ({divisor}).")


class InternViTConfig(BackboneConfigMixin, PretrainedConfig):
    """Vision tower (paper section 3.2; published `configuration_intern_vit.py`).

    Args:
        image_size: Height and width in pixels of the position grid; other sizes are resized to at run time.
        norm_type: "rms_norm" (6B) or "layer_norm" (300M) for the two norms of a block. The q/k norm is always RMS.
        qk_normalization: Whether q and k are RMS-normalised over the full width before the split into heads.
        drop_path_rate: Stochastic depth of the last block.
        drop_path_schedule: "linear" lets the rate of the blocks rise from 0, "uniform" gives all the same.
        initializer_factor: Initial value of both layer scales.
        out_features, out_indices: Feature maps of the backbone, among "stem", "stage1", ..., one per block; the last
            of them is what the segmentation head reads.
        classifier_pooling: What the classification head reads: "cls_patch_concat" (the class token and the mean
            patch), "attention_pooling" (all tokens, as many heads and as wide as the tower) or "clip_projector" (the
            pooling of InternVL-C).
        attn_pool_num_heads, clip_embed_dim: Heads and width of the pooling "clip_projector".
        feature_pyramid: None leaves the backbone's maps at one size. "plain" brings four maps to 4, 2, 1 and 1/2 times
            the patch grid; "final_norm" also normalises each of them.
        semantic_loss_ignore_index: Label of the pixels that the segmentation loss leaves out.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"
    published_model_types = ()  # others that its checkpoints name
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    hub_auto_map = {  # what `config.json` of a repository says, see hub_internvl
        "AutoConfig": "configuration_internvl.InternViTConfig",
        "AutoModel": "modeling_internvit.InternVisionModel",
        "AutoBackbone": "modeling_internvit.InternViTBackbone",
        "AutoModelForImageClassification": "modeling_internvit.InternViTForImageClassification",
        "AutoModelForSemanticSegmentation": "modeling_internvit.InternViTForSemanticSegmentation",
    }
    # Every process computes whole attention: the q/k norm spans all heads, and the 25 heads of the 6B do not divide by
    # 2, 4 or 8. The weights and their products are sharded.
    base_model_tp_plan = {
        "encoder.layers.*.attn.qkv": "colwise_gather_output",
        "encoder.layers.*.attn.proj": "rowwise_split_input",
        "encoder.layers.*.mlp.fc1": "colwise",
        "encoder.layers.*.mlp.fc2": "rowwise",
    }

    hidden_size: int = 3200
    intermediate_size: int = 12800
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_schedule: str = "linear"
    initializer_range: float = 0.02
    initializer_factor: float = 0.1
    classifier_pooling: str = "cls_patch_concat"
    attn_pool_num_heads: int = 16
    clip_embed_dim: int = 768
    feature_pyramid: str | None = None
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_choice("norm_type", self.norm_type, NORM_TYPES)
        _check_choice("drop_path_schedule", self.drop_path_schedule, DROP_PATH_SCHEDULES)
        _check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _check_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        _check_choice("classifier_pooling", self.classifier_pooling, CLASSIFIER_POOLINGS)
        if self.classifier_pooling == "clip_projector":
            _check_multiple("hidden_size", self.hidden_size, "attn_pool_num_heads", self.attn_pool_num_heads)
        _check_choice("feature_pyramid", self.feature_pyramid, FEATURE_PYRAMIDS)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        kwargs.pop("stage_names", None)  # derived, also when an edited config.json changed the depth
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def drop_path_rates(self) -> list[float]:
        """Stochastic depth of each block."""
        depth, rate = self.num_hidden_layers, self.drop_path_rate
        if self.drop_path_schedule == "uniform":
            return [rate] * depth
        return [rate * i / max(depth - 1, 1) for i in range(depth)]

    @property
    def num_patches(self) -> int:
        """Patches of an image of `image_size`, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def out_indices_from_front(self) -> list[int]:
        """`out_indices` with negative entries counted from the front: the blocks to run for each feature map."""
        return [index % len(self.stage_names) for index in self.out_indices]

    def verify_out_features_out_indices(self) -> None:
        """As in transformers, on every change of either; the feature pyramid needs four maps."""
        super().verify_out_features_out_indices()
        if self.feature_pyramid is not None and self._out_indices is not None and len(self._out_indices) != 4:
            raise ValueError(
                f"`feature_pyramid` {self.feature_pyramid!r} needs four feature maps, got {len(self._out_indices)}: "
                f"give four `out_indices` or `out_features`, not {self._out_indices}."
            )


class QLlamaConfig(LlamaConfig):
    """QLLaMA (paper section 3.2): a LLaMA with learned queries and cross-attention to the vision tower.

    Args:
        num_query_token: Learned queries in front of the text. 0 makes it a plain LLaMA text encoder (InternVL-C alone,
            stage 1).
        cross_attention_frequency: Layers 0, f, 2f... hold a cross-attention; none does without queries.
        vision_hidden_size: Width of the vision features the cross-attention reads.
    """

    model_type = "qllama"
    hub_auto_map = {
        "AutoConfig": "configuration_internvl.QLlamaConfig",
        "AutoModel": "modeling_qllama.QLlamaModel",
        "AutoModelForCausalLM": "modeling_qllama.QLlamaForCausalLM",
    }
    base_config_key = "qllama_config"
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions"]
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.cross_attn.q_proj": "colwise",
        "layers.*.cross_attn.k_proj": "colwise",
        "layers.*.cross_attn.v_proj": "colwise",
        "layers.*.cross_attn.o_proj": "rowwise",
    }

    vocab_size: int = 49954
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    num_query_token: int = 96
    cross_attention_frequency: int = 2
    vision_hidden_size: int = 3200

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.cross_attention_frequency < 1:
            raise ValueError(f"`cross_attention_frequency` must be at least 1, got {self.cross_attention_frequency}.")
        if self.num_query_token < 0:
            raise ValueError(f"`num_query_token` must be at least 0, got {self.num_query_token}.")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"QLLaMA has plain rotary positions (`rope_type` 'default'), got {rope_type!r}.")

    @property
    def has_queries(self) -> bool:
        """Whether there are queries, which attend to the image."""
        return self.num_query_token > 0

    def has_cross_attention(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` holds a cross-attention."""
        return self.has_queries and layer_idx % self.cross_attention_frequency == 0


def _as_vision_config(value: PretrainedConfig | dict | None) -> PretrainedConfig:
    return InternViTConfig(**(value or {})) if value is None or isinstance(value, dict) else value


def _as_qllama_config(
    value: PretrainedConfig | dict | None, vision_hidden_size: int, **top_level: Any
) -> PretrainedConfig:
    """A QLLaMA configuration; values of the enclosing configuration override those inside, as published."""
    top_level = {key: setting for key, setting in top_level.items() if setting is not None}
    if value is None or isinstance(value, dict):
        return QLlamaConfig(**{**(value or {}), "vision_hidden_size": vision_hidden_size, **top_level})
    changed = {"vision_hidden_size": vision_hidden_size, **top_level}
    if all(getattr(value, key) == setting for key, setting in changed.items()):
        return value
    value = deepcopy(value)  # another model may share it
    for key, setting in changed.items():
        setattr(value, key, setting)
    return value


def _as_text_config(value: PretrainedConfig | dict | None) -> PretrainedConfig:
    """The decoder's configuration, of any `model_type` that `AutoConfig` knows, or "internlm2"."""
    if value is not None and not isinstance(value, dict):
        return value
    settings = dict(value or {})
    # Published `llm_config` blocks name the attention of the machine they were saved on; here it is chosen at the top.
    settings.pop("attn_implementation", None)
    model_type = settings.pop("model_type", "llama")
    if model_type == InternLM2Config.model_type:
        return InternLM2Config(**settings)
    return AutoConfig.for_model(model_type, **settings)


class InternVL14BConfig(PretrainedConfig):
    """InternVL-C and InternVL-G in one model ("InternVL-14B"); with `num_query_token` 0 InternVL-C alone (stage 1).

    Args:
        vision_config: InternViT configuration or its dictionary.
        qllama_config: QLLaMA configuration or its dictionary; also reached as `text_config`.
        clip_embed_dim: Width of the joint embedding.
        attn_pool_num_heads: Heads of both attention poolings.
        label_smoothing: Of the contrastive loss in training.
        max_txt_len: Text length of generative training.
        force_image_size: Size of the images the model is used with; None takes `vision_config.image_size`.
        default_mode: "InternVL-C" or "InternVL-G", the features of images where a call names no mode; also those of
            sentence-transformers and of the embeddings API.
        matryoshka_dims: Lengths to which the model was trained to have its embeddings cut, see `--dims` of
            `python -m internvl.evaluation embed`; training goes on with them.
        num_query_token, cross_attention_frequency: Shorthands that override the values inside `qllama_config`.
    """

    model_type = "internvl_14b"
    published_model_types = ("internvl",)
    # So `Trainer.evaluate` collects the similarities alone, a row per image.
    keys_to_ignore_at_inference = ["logits_per_text", "image_embeds", "text_embeds"]
    sub_configs = {"vision_config": InternViTConfig, "qllama_config": QLlamaConfig}
    attribute_map = {"text_config": "qllama_config"}
    hub_auto_map = {
        "AutoConfig": "configuration_internvl.InternVLConfig",
        "AutoModel": "modeling_internvl.InternVLModel",
        "AutoModelForZeroShotImageClassification": "modeling_internvl.InternVLModel",
    }

    vision_config: Any = None
    qllama_config: Any = None
    clip_embed_dim: int = 768
    attn_pool_num_heads: int = 16
    label_smoothing: float = 0.0
    max_txt_len: int = 32
    force_image_size: int | None = None
    default_mode: str = MODES[0]
    matryoshka_dims: list[int] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_vision_config(self.vision_config)
        self.qllama_config = _as_qllama_config(
            self.qllama_config,
            self.vision_config.hidden_size,
            num_query_token=kwargs.pop("num_query_token", None),
            cross_attention_frequency=kwargs.pop("cross_attention_frequency", None),
        )
        heads, of_part = self.attn_pool_num_heads, "hidden_size of the {} part"
        _check_multiple(of_part.format("vision"), self.vision_config.hidden_size, "attn_pool_num_heads", heads)
        _check_choice("default_mode", self.default_mode, MODES)
        sizes = [] if self.matryoshka_dims is None else self.matryoshka_dims
        is_list = isinstance(sizes, (list, tuple))
        if not is_list or not all(type(size) is int and 0 < size <= self.clip_embed_dim for size in sizes):
            raise ValueError(
                f"`matryoshka_dims` are lengths from 1 to `clip_embed_dim` {self.clip_embed_dim}, got "
                f"{self.matryoshka_dims}."
            )
        if self.has_queries:
            _check_multiple(of_part.format("QLLaMA"), self.qllama_config.hidden_size, "attn_pool_num_heads", heads)
        super().__post_init__(**kwargs)
        # Kept in `config.json` only: in tasks that this model does not have, stock pipelines would take the name for
        # transformers' `InternVLModel` and build it with 8 B random weights.
        self.architectures = None

    @property
    def num_query_token(self) -> int:
        """Learned queries of QLLaMA; settable: stage 2 starts from `from_pretrained(stage1, num_query_token=96)`."""
        return self.qllama_config.num_query_token

    @num_query_token.setter
    def num_query_token(self, value: int) -> None:
        self.qllama_config.num_query_token = value

    @property
    def has_queries(self) -> bool:
        """Whether it is InternVL-G too, and not InternVL-C alone."""
        return self.qllama_config.has_queries


# The public name. transformers has a configuration `InternVLConfig` too, and its Auto classes look models up by the
# name of a configuration's class: they would build transformers' chat model from this configuration.
InternVLConfig = InternVL14BConfig


class InternVLChatConfig(PretrainedConfig):
    """InternVL-Chat: vision tower, connector and any causal language model.

    Args:
        vision_config: InternViT configuration or its dictionary.
        text_config: Configuration of the decoder or its dictionary; `llm_config` (the published key) is the same
            thing.
        qllama_config: QLLaMA configuration or its dictionary; only with a connector that holds queries.
        connector: What the decoder sees of a tile: "patches" (InternVL-Chat, simple), "queries", or
            "queries_and_patches" (full, queries first, as in the published LLaVA code base).
        projector_type: "layer_norm_mlp" (LayerNorm-Linear-GELU-Linear) or "mlp2x_gelu" (without the norm, LLaVA code
            base).
        select_layer: Hidden state of the vision tower that gives the patches; -1 is the output of the last block, -4
            that of the fourth from the end.
        downsample_ratio: Pixel shuffle factor per side; 1.0 keeps every patch.
        ps_version: "v2", or "v1" which leaves the shuffled grid transposed (InternVL-Chat up to V1-2).
        template: Name in `conversation_internvl`.
        force_image_size: Tile size in pixels; None takes `vision_config.image_size`.
        dynamic_image_size, use_thumbnail, min_dynamic_patch, max_dynamic_patch, pad2square: How the images were tiled
            in training; the image processor of the checkpoint holds the same values.
        image_token_id: Id of the placeholder `<IMG_CONTEXT>`; also reached as `img_context_token_id`. The published
            code does not store it.
        use_image_start_end: Whether `<img>` and `</img>` stand around an image; not so in the LLaVA code base.
        mask_image_token_logit: Whether the placeholder has the lowest logit always: where conversion added it to the
            vocabulary, its row of the head was never trained.
    """

    # Not the published "internvl_chat", which transformers may claim for a model (huggingface/transformers#47047).
    model_type = "internvl_chat_model"
    published_model_types = ("internvl_chat",)
    # So `Trainer.evaluate` collects logits alone. Features of every image would fill the memory.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "router_logits",
        "aux_loss",
    ]
    sub_configs = {"vision_config": InternViTConfig, "text_config": AutoConfig, "qllama_config": QLlamaConfig}
    attribute_map = {"llm_config": "text_config", "img_context_token_id": "image_token_id"}
    hub_auto_map = {
        "AutoConfig": "configuration_internvl.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_internvl_chat.InternVLChatForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_internvl_chat.InternVLChatForConditionalGeneration",
    }

    vision_config: Any = None
    text_config: Any = None
    qllama_config: Any = None
    connector: str = "patches"
    projector_type: str = "layer_norm_mlp"
    select_layer: int = -1
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    template: str | None = None
    force_image_size: int | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    pad2square: bool = False
    image_token_id: int | None = None
    use_image_start_end: bool = True
    mask_image_token_logit: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_vision_config(self.vision_config)
        self.text_config = _as_text_config(kwargs.pop("llm_config", self.text_config))
        _check_choice("connector", self.connector, CONNECTORS)
        if self.connector != "patches":
            self.qllama_config = _as_qllama_config(self.qllama_config, self.vision_config.hidden_size)
            if not self.qllama_config.has_queries:
                raise ValueError(
                    f"`connector` {self.connector!r} needs queries, but `qllama_config.num_query_token` is 0."
                )
        elif self.qllama_config is not None:
            raise ValueError(
                f"`qllama_config` needs a `connector` with queries {list(CONNECTORS[1:])}, got 'patches'."
            )
        _check_choice("projector_type", self.projector_type, PROJECTOR_TYPES)
        _check_choice("ps_version", self.ps_version, PIXEL_SHUFFLE_VERSIONS)
        if "img_context_token_id" in kwargs:
            self.image_token_id = kwargs.pop("img_context_token_id")
        self._check_grid()
        super().__post_init__(**kwargs)

    def _check_grid(self) -> None:
        depth, patch_size = self.vision_config.num_hidden_layers, self.vision_config.patch_size
        if not isinstance(self.select_layer, int) or not -depth - 1 <= self.select_layer <= depth:
            raise ValueError(
                f"`select_layer` ({self.select_layer!r}) must lie within the {depth} blocks of the vision tower, "
                "and be a whole number."
            )
        _check_multiple("force_image_size", self.image_size, "patch_size", patch_size)
        side = self.image_size // patch_size * self.downsample_ratio
        if not 0 < self.downsample_ratio <= 1 or side != int(side):
            raise ValueError(
                f"`downsample_ratio` ({self.downsample_ratio}) must be in (0, 1] and map the "
                f"{self.image_size // patch_size} patches per side to a whole number."
            )

    @property
    def image_size(self) -> int:
        """Tile size in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def num_vision_layers(self) -> int:
        """Blocks of the vision tower that give the patches, `select_layer` counted from the front."""
        depth = self.vision_config.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else depth + 1 + self.select_layer

    @property
    def num_image_token(self) -> int:
        """Positions of the decoder that one tile takes."""
        patches = int(self.image_size // self.vision_config.patch_size * self.downsample_ratio) ** 2
        queries = self.qllama_config.num_query_token if self.connector != "patches" else 0
        return {"patches": patches, "queries": queries, "queries_and_patches": queries + patches}[self.connector]


# `transformers serve` chooses by these names how to load and to prompt a model, before its code is loaded.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[InternVLChatConfig.model_type] = "InternVLChatForConditionalGeneration"
# `Trainer` compares each position with the next label under label smoothing only for models of these names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(
    {
        InternVLChatConfig.model_type: "InternVLChatForConditionalGeneration",
        QLlamaConfig.model_type: "QLlamaForCausalLM",
        InternLM2Config.model_type: "InternLM2ForCausalLM",
    }
)

__all__ = ["InternLM2Config", "InternVLChatConfig", "InternVLConfig", "InternViTConfig", "QLlamaConfig"]
