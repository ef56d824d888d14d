"""Where a vision tower starts: as in BEiT, or for generated scenes with embeddings that need no discovery."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


PAPER = 244 / 255  # gray value of the background of generated scenes


@torch.no_grad()
def init_as_beit(model: PreTrainedModel) -> None:
    """Draw the weights of a vision tower as BEiT does (arXiv 2106.08254, section 2.5), whose initialisation the paper
    takes.

    Weights are normal and cut off at one deviation; what ends a branch of block number n (from 1) is divided by the
    root of 2n, so that deep towers begin with small updates of their residual stream.

    Args:
        model: Model with a `vision_model`; changed in place.
    """
    tower, std = model.vision_model, model.config.vision_config.initializer_range
    weights = [module.weight for module in tower.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for weight in (*weights, tower.embeddings.class_embedding, tower.embeddings.position_embedding):
        nn.init.trunc_normal_(weight, std=std, a=-std, b=std)
    for number, layer in enumerate(tower.encoder.layers, start=1):
        layer.attn.proj.weight.div_(math.sqrt(2 * number))
        layer.mlp.fc2.weight.div_(math.sqrt(2 * number))


@torch.no_grad()
def init_embeddings_for_scenes(model: PreTrainedModel) -> None:
    """Start the patch and position embeddings so that places differ at once and blank paper does not drown all else.

    Positions start as waves over rows and columns instead of noise. Paper is a large constant in every patch, which
    the bias removes.

    Args:
        model: Model with a `vision_model`; changed in place.
    """
    embeddings = model.vision_model.embeddings
    projection = embeddings.patch_embedding
    projection.weight.normal_(std=projection.weight[0].numel() ** -0.5)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    projection.bias.copy_(-projection.weight.sum(dim=(2, 3)) @ ((PAPER - mean) / std))
    config = model.config.vision_config
    side, width = config.image_size // config.patch_size, projection.out_channels
    frequencies = 1.5 * 64 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    embeddings.position_embedding[0, 1:] = 0.7 * torch.cat([rows, columns], dim=-1).flatten(0, 1)
