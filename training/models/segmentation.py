"""InternViT with a head that names every pixel: the published linear head, or transformers' UperNet.

Differences to the published code: the loss is the mean over pixels that have a class, there over all pixels; heads
compute in the type of autocast, there in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation

from ...configuration_internvl import InternViTConfig
from ...layers_internvit import resize_position_grid
from ...modeling_internvit import InternViTBackbone, InternViTForSemanticSegmentation
from ..recipes.segmentation import SegmentationRecipe
from .parameter_groups import decays, freeze_idle, layers_above


UPERNET_CHANNELS = 1536
UPERNET_DROPOUT = 0.1
HEAD_DEVIATION = 0.01  # of the weights of mmsegmentation's classifiers
LINEAR_BLOCKS = {48: 45}  # blocks below the linear head of a frozen tower, by the depth of the tower
PYRAMID = ("up1.", "up2.", "up3.", "up4.")


def build_segmenter(recipe: SegmentationRecipe, folder: str | Path, names: Sequence[str]) -> PreTrainedModel:
    """Puts a fresh head on an InternViT, and freezes what the recipe does not train.

    Args:
        recipe: The recipe.
        folder: Of the InternViT.
        names: Of the classes.
    """
    labels = dict(enumerate(names))
    settings = {"drop_path_rate": recipe.drop_path_rate, **_names_of(labels)}
    if recipe.head == "linear":
        depth = InternViTConfig.from_pretrained(folder).num_hidden_layers
        block = depth if recipe.trains_tower else LINEAR_BLOCKS.get(depth, depth)
        config = InternViTConfig.from_pretrained(folder, out_indices=[block], **settings)
        model: Any = InternViTForSemanticSegmentation.from_pretrained(folder, config=config, dtype=torch.float32)
        tower = model.vision_model
    else:
        model = _build_upernet(folder, labels, settings)
        model.auxiliary_head.in_index = recipe.auxiliary_map
        tower = model.backbone
    init_heads(model)
    _fit_positions(tower, recipe.image_size)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(recipe.trains_tower or name.startswith(PYRAMID))
    if recipe.head == "linear":
        freeze_idle(model)
    return model


def _build_upernet(folder: str | Path, labels: dict[int, str], settings: dict[str, Any]) -> Any:
    depth = InternViTConfig.from_pretrained(folder).num_hidden_layers
    maps = [depth * place // 4 for place in range(1, 5)]  # published: 12, 24, 36 and 48
    config = InternViTConfig.from_pretrained(folder, feature_pyramid="plain", out_indices=maps, **settings)
    with torch.device("meta"):  # its own backbone, of random weights, would fill the memory a second time
        model: Any = UperNetForSemanticSegmentation(upernet_config(config, UPERNET_CHANNELS, labels))
    model.backbone = InternViTBackbone.from_pretrained(folder, config=config, dtype=torch.float32)
    model.config.backbone_config = model.backbone.config  # the image size may change
    for head in (model.decode_head, model.auxiliary_head):
        head.to_empty(device="cpu")
        # As in mmsegmentation; transformers' head has none.
        head.classifier.register_forward_pre_hook(_drop_channels)
    return model


def upernet_config(backbone_config: Any, channels: int, labels: dict[int, str]) -> UperNetConfig:
    """Returns the configuration of the published UperNet over a backbone with a feature pyramid."""
    return UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=channels,
        auxiliary_channels=channels,
        auxiliary_in_channels=backbone_config.hidden_size,
        **_names_of(labels),
    )


def _names_of(labels: dict[int, str]) -> dict[str, Any]:
    return {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}


def _drop_channels(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (F.dropout2d(inputs[0], UPERNET_DROPOUT, module.training),)


@torch.no_grad()
def init_heads(model: nn.Module) -> None:
    """Draws what is above the tower as mmsegmentation does: small classifiers, He's deviation for what ReLU follows,
    and for the pyramid what the published backbone takes.
    """
    tower = ("vision_model.", "backbone.embeddings.", "backbone.encoder.")
    for name, module in model.named_modules():
        if name.startswith(tower):
            continue
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.ConvTranspose2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            module.weight.normal_(std=(2 / fan_out) ** 0.5)
        elif name.endswith((".classifier", ".conv_seg")):
            module.weight.normal_(std=HEAD_DEVIATION)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            module.bias.zero_()


@torch.no_grad()
def _fit_positions(tower: Any, image_size: int) -> None:
    """Resizes the learned positions to the size that is trained on, as the published code does when it loads."""
    config, embeddings = tower.config, tower.embeddings
    if image_size == config.image_size:
        return
    if image_size % config.patch_size:
        raise ValueError(f"`image_size` {image_size} must be whole patches of {config.patch_size} pixels.")
    side = image_size // config.patch_size
    embeddings.position_embedding = nn.Parameter(resize_position_grid(embeddings.position_embedding, side, side))
    config.image_size = image_size


def segmentation_groups(model: Any, recipe: SegmentationRecipe) -> list[dict[str, Any]]:
    """Builds parameter groups for an optimizer: one per learning rate, and decay or none.

    As in the published code positions and the class token decay too, and what is above the blocks, the pyramid
    included, has the full learning rate.
    """
    config = getattr(model.config, "backbone_config", model.config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix("vision_model.").removeprefix("backbone.")
        num_above = 0
        if inner != name and not inner.startswith(PYRAMID):
            _, num_above = layers_above(f"vision_model.{inner}", {"vision": config.num_hidden_layers})
        rate = recipe.learning_rate * recipe.layer_decay**num_above
        decay = recipe.weight_decay if decays(inner, parameter, with_inputs=True) else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


__all__ = ["build_segmenter", "init_heads", "segmentation_groups", "upernet_config"]
