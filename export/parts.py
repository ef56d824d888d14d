"""The parts of a model that are exported: what each takes, what it gives, and inputs to compare it with.

Weights and numbers are float32, the type in which every runtime has every operator.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim


Inputs = tuple[torch.Tensor, ...]

MOST_PATCHES_OF_A_SIDE = 1024  # at the published patch of 14 pixels, an image of 14,336
# Grids (rows, columns) of patches. The first is traced; on all of them a program is compared with its model.
GRIDS = ((4, 3), (2, 2), (2, 7), (9, 4))
# Lengths of texts, likewise.
LENGTHS = (9, 2, 17)


class VisionTower(nn.Module):
    """`pixel_values` -> `last_hidden_state` (B, N, D), `pooler_output` (B, D)."""

    def __init__(self, vision_model: Any) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values: torch.Tensor) -> Inputs:
        outputs = self.vision_model(pixel_values, return_dict=True)
        return outputs.last_hidden_state, outputs.pooler_output


class ImageEmbedding(nn.Module):
    """`pixel_values` -> `image_embeds` (B, E), as `get_image_features` gives them."""

    def __init__(self, model: Any, mode: str) -> None:
        super().__init__()
        self.model = model
        self.mode = mode

    def forward(self, pixel_values: torch.Tensor) -> Inputs:
        return (self.model.get_image_features(pixel_values, mode=self.mode),)


class TextEmbedding(nn.Module):
    """`input_ids`, `attention_mask` -> `text_embeds` (B, E), as `get_text_features` gives them for whole texts.

    Texts without the prefix or the end token are taken as they are.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.completes_texts = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Inputs:
        return (self.model.get_text_features(input_ids, attention_mask),)


@dataclass(frozen=True)
class ExportedPart:
    """A part of a model that becomes a program.

    Args:
        name: Of its file.
        module: What is exported.
        inputs: Names of what it takes, in order.
        outputs: Names of what it gives, in order.
        dynamic_shapes: For `torch.export.export`: by input, the dimension of each axis that may vary.
        examples: Gives inputs of various sizes, those to trace first.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]
    examples: Callable[[], Iterator[Inputs]]


def _of_images(name: str, module: nn.Module, outputs: tuple[str, ...], config: Any) -> ExportedPart:
    """A part that takes images; their sides are at least two patches, for torch makes a program for 1 apart."""
    patch, own = config.patch_size, config.image_size // config.patch_size
    rows, columns = (Dim(side, min=2, max=MOST_PATCHES_OF_A_SIDE) for side in ("rows", "columns"))

    def examples() -> Iterator[Inputs]:
        generator = torch.Generator().manual_seed(0)
        for batch, (height, width) in zip((2, 1, 3, 1, 1), (*GRIDS, (own, own)), strict=True):
            yield (torch.randn(batch, config.num_channels, patch * height, patch * width, generator=generator),)

    shape = {0: Dim("batch", min=1), 2: patch * rows, 3: patch * columns}
    return ExportedPart(name, module, ("pixel_values",), outputs, (shape,), examples)


def _of_texts(model: Any, longest: int) -> ExportedPart:
    batch, length = Dim("batch", min=1), Dim("length", min=2, max=longest)
    vocab_size = model.config.qllama_config.vocab_size

    def examples() -> Iterator[Inputs]:
        generator = torch.Generator().manual_seed(0)
        for rows, width in zip((3, 1, 2), LENGTHS, strict=True):
            ids = torch.randint(0, vocab_size, (rows, width), generator=generator)
            mask = torch.ones_like(ids)
            if width > 4:
                mask[0, -width // 2 :] = 0  # padded on the right, as the processor does, and on the left
                mask[-1, : width // 3] = 0
            yield ids, mask

    shapes = ({0: batch, 1: length},) * 2
    inputs = ("input_ids", "attention_mask")
    return ExportedPart("text_embeddings", TextEmbedding(model), inputs, ("text_embeds",), shapes, examples)


def parts_of(model: Any, part: str, mode: str) -> list[ExportedPart]:
    """The parts of a model.

    Args:
        model: A vision tower, or a model that has one.
        part: "vision" or "embeddings", which are two programs.
        mode: "C" or "G", of embeddings.
    """
    if part == "vision":
        tower = getattr(model, "vision_model", model)
        return [_of_images("vision", VisionTower(tower), ("last_hidden_state", "pooler_output"), tower.config)]
    images = _of_images("image_embeddings", ImageEmbedding(model, mode), ("image_embeds",), model.config.vision_config)
    return [images, _of_texts(model, model.config.qllama_config.max_position_embeddings)]
