"""Tiny models of every class with random weights, and inputs that fit them. Odd lengths and a batch of three, so that
mixed-up dimensions show.
"""

import torch

from internvl.configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig, QLlamaConfig
from internvl.modeling_internvit import (
    InternVisionModel,
    InternViTBackbone,
    InternViTForImageClassification,
    InternViTForSemanticSegmentation,
)
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatBaseModel, InternVLChatForConditionalGeneration
from internvl.modeling_qllama import QLlamaForCausalLM


IMAGE_TOKEN_ID = 90
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14, "initializer_factor": 1.0,
}  # fmt: skip
QLLAMA = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_query_token": 5, "vision_hidden_size": 32,
}  # fmt: skip
DECODERS = {
    name: {
        "model_type": name, "vocab_size": 99, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }
    for name in ("llama", "internlm2", "qwen2", "qwen3")
}  # fmt: skip
DECODERS["qwen3_moe"] = {
    **DECODERS["qwen3"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter and running statistic random values: fresh models hold zeros and ones that would hide
    errors.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ls1", "ls2"))
            parameter.copy_(1 + 0.1 * noise if is_scale else noise / max([*parameter.shape[-1:], 4]) ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)
    return model.eval()


def vision_config(**changes) -> InternViTConfig:
    return InternViTConfig(**{**VISION, **changes})


def vision_model(**changes) -> InternVisionModel:
    return randomize(InternVisionModel(vision_config(**changes)))


def classifier(pooling: str = "cls_patch_concat", **changes) -> InternViTForImageClassification:
    settings = {
        "num_labels": 4,
        "classifier_pooling": pooling,
        "attn_pool_num_heads": 2,
        "clip_embed_dim": 12,
        **changes,
    }
    return randomize(InternViTForImageClassification(vision_config(**settings)))


def segmenter(**changes) -> InternViTForSemanticSegmentation:
    settings = {"num_labels": 5, "out_indices": [2], **changes}
    return randomize(InternViTForSemanticSegmentation(vision_config(**settings)))


def pyramid_backbone(kind: str = "final_norm", **changes) -> InternViTBackbone:
    settings = {"out_indices": [0, 1, 2, 3], **changes}
    return randomize(InternViTBackbone(vision_config(feature_pyramid=kind, **settings)))


def qllama_model(**changes) -> QLlamaForCausalLM:
    return randomize(QLlamaForCausalLM(QLlamaConfig(**{**QLLAMA, **changes})))


def internvl_model(**changes) -> InternVLModel:
    config = InternVLConfig(
        vision_config=dict(VISION), qllama_config=dict(QLLAMA), clip_embed_dim=12, attn_pool_num_heads=4, **changes
    )
    model = randomize(InternVLModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    return model


def chat_config(decoder: str = "llama", connector: str = "patches", **changes) -> InternVLChatConfig:
    settings = {
        "vision_config": dict(VISION),
        "text_config": dict(DECODERS[decoder]),
        "qllama_config": None if connector == "patches" else dict(QLLAMA),
        "connector": connector,
        "image_token_id": IMAGE_TOKEN_ID,
        "template": "internvl2_5",
        "ps_version": "v2",
    }
    return InternVLChatConfig(**{**settings, **changes})


def chat_model(decoder: str = "llama", connector: str = "patches", **changes) -> InternVLChatForConditionalGeneration:
    model = randomize(InternVLChatForConditionalGeneration(chat_config(decoder, connector, **changes)))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def chat_base_model(decoder: str = "llama", connector: str = "patches", **changes) -> InternVLChatBaseModel:
    return randomize(InternVLChatBaseModel(chat_config(decoder, connector, **changes)))


def pixels(count: int = 3, height: int = 56, width: int = 56, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def text_ids(batch: int = 3, length: int = 7, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def summary_ids(batch: int = 3, length: int = 7, seed: int = 2) -> torch.Tensor:
    """Texts to compare: they end in the end token, at which their feature is read."""
    ids = text_ids(batch, length, seed)
    ids[:, -1] = 2
    return ids


def chat_rows(model: InternVLChatForConditionalGeneration, tiles: list[list[int]]) -> list[torch.Tensor]:
    """One row of ids per sample, with the placeholders of its images among random text of a length of its own."""
    rows = []
    for number, images in enumerate(tiles):
        row = [text_ids(1, 2 + number, seed=10 + number)[0]]
        for image, count in enumerate(images):
            row += [torch.full((count * model.num_image_token,), IMAGE_TOKEN_ID), text_ids(1, 3, seed=20 + image)[0]]
        rows.append(torch.cat(row))
    return rows


def pad(rows: list[torch.Tensor], side: str = "left", pad_id: int = 0) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def chat_inputs(
    model: InternVLChatForConditionalGeneration, tiles: list[list[int]] | None = None, side: str = "left"
) -> dict:
    """A batch with unequal tile counts: one image of two tiles, text only, two images."""
    tiles = [[2], [], [1, 3]] if tiles is None else tiles
    inputs = pad(chat_rows(model, tiles), side)
    if sum(map(sum, tiles)):
        inputs["pixel_values"] = pixels(sum(map(sum, tiles)))
    return inputs


MODELS = {
    "InternVisionModel": (vision_model, lambda model: {"pixel_values": pixels()}),
    "InternViTBackbone": (
        lambda: randomize(InternViTBackbone(vision_config(out_indices=[1, 3]))),
        lambda model: {"pixel_values": pixels()},
    ),
    "InternViTBackbone-pyramid": (pyramid_backbone, lambda model: {"pixel_values": pixels()}),
    "InternViTForImageClassification": (classifier, lambda model: {"pixel_values": pixels()}),
    "InternViTForImageClassification-attention": (
        lambda: classifier("attention_pooling"),
        lambda model: {"pixel_values": pixels()},
    ),
    "InternViTForImageClassification-clip": (
        lambda: classifier("clip_projector"),
        lambda model: {"pixel_values": pixels()},
    ),
    "InternViTForSemanticSegmentation": (segmenter, lambda model: {"pixel_values": pixels()}),
    "QLlamaForCausalLM": (
        qllama_model,
        lambda model: {
            "input_ids": text_ids(),
            "query_embeds": pixels(3, 1, 40)[:, :, 0].reshape(3, 5, 24),
            "vision_hidden_states": pixels(3, 32, 6, seed=3)[:, 0].transpose(1, 2),
        },
    ),
    "InternVLModel-C": (
        internvl_model,
        lambda model: {"input_ids": summary_ids(4), "pixel_values": pixels(), "mode": "C"},
    ),
    "InternVLModel-C-alone": (
        lambda: internvl_model(num_query_token=0),
        lambda model: {"input_ids": summary_ids(4), "pixel_values": pixels(), "mode": "C"},
    ),
    "InternVLModel-G": (
        internvl_model,
        lambda model: {"input_ids": summary_ids(4), "pixel_values": pixels(), "mode": "G"},
    ),
    "chat-llama": (chat_model, chat_inputs),
    "chat-internlm2": (lambda: chat_model("internlm2"), chat_inputs),
    "chat-qwen2": (lambda: chat_model("qwen2"), chat_inputs),
    "chat-qwen3": (lambda: chat_model("qwen3"), chat_inputs),
    "chat-qwen3-moe": (lambda: chat_model("qwen3_moe"), chat_inputs),
    "chat-queries": (lambda: chat_model(connector="queries"), chat_inputs),
    "chat-full": (lambda: chat_model(connector="queries_and_patches"), chat_inputs),
    "chat-base": (chat_base_model, chat_inputs),
    "chat-base-full": (lambda: chat_base_model("internlm2", "queries_and_patches"), chat_inputs),
    "chat-plain-mlp": (
        lambda: chat_model(projector_type="mlp2x_gelu", downsample_ratio=1.0, select_layer=-2),
        chat_inputs,
    ),
}


def main_output(outputs) -> torch.Tensor:
    """The tensor that says most about a model's output."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)
    return outputs.feature_maps[-1]
