"""What each image token of a one-tile image shows: dense supervision that teaches the vision tower to see first.

A tower that starts from nothing learns from answers alone only after very many of them: nothing tells it which tokens
an answer came from. Here every token of the 8 x 8 grid says which object covers it, one linear head per attribute.
The heads serve training only.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...layers_internvl_chat import pixel_shuffle
from ...modeling_internvl_chat import InternVLChatForConditionalGeneration
from ...synthetic.scenes import COLOURS, NUMBERS, PLACES, SHAPES, TILE_SIZE, WORDS, Scene, SceneObject, text_extent


GRID = 8
STEP = TILE_SIZE / GRID
_VALUES: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "digit": tuple("0123456789"),
    "text": (*WORDS, *map(str, NUMBERS)),
    "size": ("small", "big"),
    "middle": ("shape", "digit", "text"),
}
ATTRIBUTES = tuple(_VALUES)
_INDEX = {name: {value: index + 1 for index, value in enumerate(values)} for name, values in _VALUES.items()}
# Overlaps below a quarter of a token are not labelled.
_LEAST_OVERLAP = STEP / 4


def token_labels(scene: Scene) -> torch.Tensor:
    """Label the image tokens of a scene seen as one tile.

    Args:
        scene: The scene. Text in an image larger than a tile is not labelled, since it cannot be read there.

    Returns:
        (64, attributes), row by row: 0 where the attribute has no value, else the value's index + 1.
    """
    labels = torch.zeros(GRID, GRID, len(ATTRIBUTES), dtype=torch.long)
    scale = TILE_SIZE / scene.width, TILE_SIZE / scene.height
    for item in scene.objects:
        if item.is_text and min(scale) < 1:
            continue
        extent = text_extent(item.value, item.size) if item.is_text else (item.size, item.size)
        columns, rows = (
            _covered(centre * factor, size * factor)
            for centre, size, factor in zip(item.centre, extent, scale, strict=True)
        )
        for name, value in _values_of(item).items():
            labels[rows, columns, ATTRIBUTES.index(name)] = _INDEX[name][value]
        middle = int(item.centre[1] * scale[1] // STEP), int(item.centre[0] * scale[0] // STEP)
        kind = "text" if item.is_text else item.kind
        labels[(*middle, ATTRIBUTES.index("middle"))] = _INDEX["middle"][kind]
    return labels.flatten(0, 1)


def _covered(centre: float, size: float) -> slice:
    """Return the tokens along one axis that something covers, at least the one with its centre."""
    first = int((centre - size / 2 + _LEAST_OVERLAP) // STEP)
    last = int((centre + size / 2 - _LEAST_OVERLAP) // STEP)
    middle = int(centre // STEP)
    return slice(max(0, min(first, middle)), min(GRID, max(last, middle) + 1))


def _values_of(item: SceneObject) -> dict[str, str]:
    values = {"place": PLACES[item.place]}
    if item.kind == "shape":
        values |= {"shape": item.value, "colour": item.colour}
    elif item.kind == "digit":
        values["digit"] = item.value
    else:
        values |= {"text": item.value, "size": "small" if item.is_small else "big"}
    return values


class TokenReader(nn.Module):
    """A chat model's vision tower and projector with one linear head per attribute on each image token.

    Args:
        model: The chat model; its tower and projector are trained in place.
    """

    def __init__(self, model: InternVLChatForConditionalGeneration) -> None:
        super().__init__()
        self.config = model.config
        self.vision_model = model.vision_model
        self.mlp1: nn.Module = model.mlp1
        width = model.config.text_config.hidden_size
        self.token_heads = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in _VALUES.items()})

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the activations of the tower in the backward pass, as `PreTrainedModel` does."""
        self.vision_model.gradient_checkpointing_enable(**settings)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Name what the tokens show.

        Args:
            pixel_values: (B, 3, 448, 448).
            labels: (B, 64, attributes) as from `token_labels`.
            **kwargs: Trainer's own; not used.

        Returns:
            "loss", and "correct" (attributes,): the share of right tokens among those that have a value.
        """
        patches = self.vision_model(pixel_values, return_dict=True).last_hidden_state[:, 1:]
        features = self.mlp1(pixel_shuffle(patches, self.config.downsample_ratio, self.config.ps_version))
        losses, correct = [], []
        for index, name in enumerate(ATTRIBUTES):
            expected = labels[..., index].flatten()
            logits = self.token_heads[name](features).flatten(0, 1).float()
            has_value = expected > 0
            token_losses = nn.functional.cross_entropy(logits, expected, reduction="none")
            # Most tokens show nothing, so each side is averaged by itself.
            for part in (token_losses[has_value], token_losses[~has_value]):
                losses.append(part.sum() / max(1, len(part)))
            correct.append((logits.argmax(-1) == expected)[has_value].float().sum() / max(1, int(has_value.sum())))
        return {"loss": torch.stack(losses).sum(), "correct": torch.stack(correct).detach()}

    @torch.no_grad()
    def name_tokens(self, embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start the words for what can be seen where the tower puts it, so that answering begins as copying.

        Args:
            embeddings: (V, D), the decoder's tied input and output embeddings; changed in place.
            tokenizer: Its tokenizer. Values of several tokens are left as they are.
        """
        length = embeddings.norm(dim=1).mean()
        for name in ("shape", "colour", "digit", "text"):
            weight = self.token_heads[name].get_parameter("weight")[1:]  # without "nothing"
            directions = nn.functional.normalize(weight - weight.mean(dim=0), dim=1)
            for value, direction in zip(_VALUES[name], directions, strict=True):
                for text in (value, f" {value}"):
                    ids = tokenizer(text, add_special_tokens=False).input_ids
                    if len(ids) == 1:
                        embeddings[ids[0]] = length * direction
