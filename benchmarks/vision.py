"""InternViT against the vision tower in transformers (`InternVLVisionModel`): same weights, same pictures.

The width of InternViT-300M (1024, LayerNorm) at 448 px, with few blocks so that a laptop finishes.
"""

from collections.abc import Iterator
from functools import partial

import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvl import InternVisionModel, InternViTConfig

from .harness import Options, Row, speed_row


NUM_LAYERS = 6
BATCHES = (1, 8)
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}


def build_models(num_layers: int, device: str) -> tuple[InternVisionModel, InternVLVisionModel]:
    """Ours and transformers' own with the same weights."""
    ours = InternVisionModel(
        InternViTConfig(
            **SIZES, num_hidden_layers=num_layers, norm_type="layer_norm", qk_normalization=False, qkv_bias=True
        )
    )
    native = InternVLVisionModel(InternVLVisionConfig(**SIZES, num_hidden_layers=num_layers, attention_bias=True))
    native.load_state_dict(to_native(ours.state_dict()))
    return ours.eval().to(device), native.eval().to(device)


def to_native(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names; q, k and v are one matrix here and three there."""
    renamed = {}
    names = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "encoder.layers": "encoder.layer",
        "attn.proj": "attention.projection_layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." not in name:
            renamed[name] = tensor
            continue
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
    return renamed


@torch.no_grad()
def rows(options: Options) -> Iterator[Row]:
    """Both towers, eager, for one tile and for eight."""
    torch.manual_seed(0)
    ours, native = build_models(NUM_LAYERS, options.device)
    for batch in BATCHES:
        pixels = torch.randn(batch, 3, SIZES["image_size"], SIZES["image_size"], device=options.device)
        difference = (ours(pixels).last_hidden_state - native(pixels).last_hidden_state).abs().max().item()
        if difference > 1e-3:
            raise SystemExit(f"The two models differ by {difference}: nothing to compare.")
        name = f"vision forward, 300M shape, {batch} tile(s), against native"
        yield speed_row(
            name, partial(ours, pixels), partial(native, pixels), options, target=1.0, largest_difference=difference
        )
