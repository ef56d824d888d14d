"""The vision tower of the default checkpoint: its shape, and where it starts."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..synthetic.scenes import TILE_SIZE


PATCH_SIZE = 28
VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "patch_size": PATCH_SIZE,
    "image_size": TILE_SIZE,
    "initializer_range": 0.05,  # more than in large models, since the layers are narrow
    "initializer_factor": 1.0,
}


@torch.no_grad()
def prepare_embeddings(model: PreTrainedModel) -> None:
    """Start the patch embedding so that places can be told apart at once and blank paper does not drown all else.

    Positions start as waves over rows and columns instead of noise. Paper is a large constant in every patch: the bias
    takes it away.
    """
    embeddings = model.vision_model.embeddings
    projection = embeddings.patch_embedding
    projection.weight.normal_(std=projection.weight[0].numel() ** -0.5)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    paper = (244 / 255 - mean) / std
    projection.bias.copy_(-projection.weight.sum(dim=(2, 3)) @ paper)
    side, width = TILE_SIZE // PATCH_SIZE, projection.out_channels
    frequencies = 1.5 * 64 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    embeddings.position_embedding[0, 1:] = 0.7 * torch.cat([rows, columns], dim=-1).flatten(0, 1)
