"""Facts about published checkpoints, as data."""

from typing import Any

from .rules import rename, within


# ------------------------------------------------------------------------------------------------------------- tensors
# The published training code (left) calls the tower's tensors otherwise; what is beside the tower is called alike.
RAW_TOWER = (
    rename("cls_token", "embeddings.class_embedding"),
    rename("pos_embed", "embeddings.position_embedding"),
    rename("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    rename("blocks.{}.ls1.gamma", "encoder.layers.{}.ls1"),
    rename("blocks.{}.ls2.gamma", "encoder.layers.{}.ls2"),
    rename("blocks.{}.*", "encoder.layers.{}.*"),
)
RAW_CLASSIFIER = (
    *within("", "vision_model.", RAW_TOWER),
    *(rename(name, name) for name in ("attn_pooling.*", "clip_projector.*", "norm.*", "head.*")),
)
RAW_LINEAR_SEGMENTER = (*within("backbone.", "vision_model.", RAW_TOWER), rename("decode_head.*", "decode_head.*"))
RAW_PYRAMID = within("backbone.", "", (*RAW_TOWER, *(rename(f"up{i}.*", f"up{i}.*") for i in range(1, 5))))
# mmsegmentation (left) calls the layers of a UperNet otherwise than transformers' `UperNetForSemanticSegmentation`.
_UPERNET_LAYERS = (
    "decode_head.psp_modules.{}.1",
    "decode_head.bottleneck",
    "decode_head.lateral_convs.{}",
    "decode_head.fpn_convs.{}",
    "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.{}",
)
RAW_UPERNET = (
    *within("", "backbone.", RAW_PYRAMID),
    *(rename(f"{head}.conv_seg.*", f"{head}.classifier.*") for head in ("decode_head", "auxiliary_head")),
    *(rename(f"{layer}.conv.*", f"{layer}.conv.*") for layer in _UPERNET_LAYERS),
    *(rename(f"{layer}.bn.*", f"{layer}.batch_norm.*") for layer in _UPERNET_LAYERS),
)
RAW_CONTRASTIVE = (
    *within("", "vision_model.", RAW_TOWER),
    rename("transformer.*", "qllama.model.*"),
    *(rename(name, name) for name in ("clip_projector.*", "text_projection", "logit_scale")),
)
# Buffers that old releases of transformers saved and every model computes again.
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
# Parts of a whole InternVL-14B that a chat model does not use.
LLAVA_UNUSED_TOWER_PARTS = {
    "qllama.model.embed_tokens.": "in a chat model QLLaMA reads no text",
    "qllama.lm_head.": "in a chat model QLLaMA writes no text",
    **dict.fromkeys(
        ("clip_projector.", "clip_projector2.", "itm_head.", "text_projection", "logit_scale"),
        "a chat model does not compare images with texts",
    ),
}

# ------------------------------------------------------------------------------------------------------ configurations
# Width of a published tower to its heads; heads of InternViT-6B are 128 wide, those of the 300M flavour 64.
PUBLISHED_NUM_HEADS = {3200: 25, 1024: 16}
# Depth of a tower to the block (from 0) that the published linear segmentation head reads.
PUBLISHED_LINEAR_BLOCK = {48: 44}
# Name of a projector to `connector` and `projector_type` of today's configuration.
LLAVA_PROJECTORS = {
    "mlp2x_gelu": ("patches", "mlp2x_gelu"),
    "mlp2x_gelu_ln": ("patches", "layer_norm_mlp"),
    "two_mlp": ("queries_and_patches", "mlp2x_gelu"),
}
# Other settings to the values that are supported; `None` also where the key is absent.
LLAVA_SUPPORTED = {
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch"),
}
# Its code uses towers of 224 pixels at 336, regardless of their configuration.
LLAVA_IMAGE_SIZES = {224: 336}
# All of its releases speak as Vicuna does.
LLAVA_TEMPLATE = "vicuna_v1"
# `PretrainedConfig` once wrote all of its keys into every nested configuration. These mean nothing for the model: they
# belong to the machine, the code or the release that wrote the file.
MEANINGLESS_KEYS = frozenset(
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_internal _attn_implementation_autoset "
    "_experts_implementation_internal architectures attn_implementation auto_map dtype torch_dtype "
    "transformers_version".split()
)
# Keys of rotary positions before and since transformers 5, and kinds that have another name today.
ROTARY_KEYS = ("rope_scaling", "rope_parameters")
ROTARY_ALIASES = {"su": "longrope"}
# These mean nothing where they hold their old default.
OLD_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "task_specific_params": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}
# The same for a vision tower, which has no tokens.
OLD_VISION_DEFAULTS: dict[str, Any] = {
    **OLD_DEFAULTS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
