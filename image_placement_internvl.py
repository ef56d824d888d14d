"""Placing of image features among the embeddings of a text, and the checks that both fit.

Neither the placing nor its backward reads a value on the host, as indexing by a mask and `masked_scatter` do: the host
would wait for the vision tower. Shape letters as in modeling_internvit.
"""

from collections.abc import Callable

import torch

from .conversation_internvl import IMAGE_CONTEXT_TOKEN


PLACEHOLDERS_HINT = (
    "The number of image placeholders in the text differs from that of the image features. Pass the tiles of every "
    "image in the text, in order, and do not truncate the text. Run it uncompiled to see the numbers."
)
TILES_HINT = "`num_patches` does not sum to the number of tiles in `pixel_values`."
NO_IMAGE_TOKEN = (
    "`config.image_token_id` is not set, so images have no place in the text. Set it to the id of "
    f"`{IMAGE_CONTEXT_TOKEN}` in the tokenizer, or convert the checkpoint with `--image-token-id`."
)


def on_host(number: torch.Tensor) -> int | torch.Tensor:
    """The value of a single number; the tensor where it has no value yet (compiled, captured, on the meta device)."""
    is_captured = number.is_cuda and torch.cuda.is_current_stream_capturing()
    return number if torch.compiler.is_compiling() or number.is_meta or is_captured else int(number)


def check(condition: bool | torch.Tensor, hint: str, message: Callable[[], str]) -> None:
    """Raises a `ValueError` unless `condition` holds, which leaves the device as it was.

    A condition that is a tensor (compiled or captured code) is asserted by the device instead. It prints `hint`; on
    CUDA that process can run no further kernel.

    Args:
        condition: A boolean, or one as a tensor ().
        hint: What was expected and what to do, less than 256 characters, without numbers of the batch.
        message: The same with numbers.

    Raises:
        ValueError: It does not hold.
    """
    if isinstance(condition, torch.Tensor):
        torch._assert_async(condition, hint)
    elif not condition:
        raise ValueError(message())


def mismatch_message(found: list[int], num_features: int, per_tile: int) -> str:
    """Says what is wrong with `found` placeholders per sample where `num_features` features of images were given."""
    broken = [i for i, count in enumerate(found) if count % per_tile]
    sample = (
        f"Sample {broken[0]} has {found[broken[0]]} placeholders, no multiple of {per_tile}: was it truncated?"
        if broken
        else f"Placeholders per sample: {dict(enumerate(found))}."
    )
    return (
        f"The text has {sum(found)} image placeholders but {num_features} image features were given "
        f"({num_features // per_tile} tiles of {per_tile}). {sample} Pass the tiles of every image in the text, in "
        f"order, and {per_tile} placeholders for each."
    )


def place_in_order(
    inputs_embeds: torch.Tensor,
    is_image: torch.Tensor,
    found: int | torch.Tensor,
    features: torch.Tensor | None,
    per_tile: int,
) -> torch.Tensor:
    """Puts the features (tiles, per_tile, D), in order, where the `found` placeholders `is_image` (B, L) are.

    Raises:
        ValueError: Placeholders and features differ in number.
    """
    count = 0 if features is None else features.shape[:-1].numel()
    check(
        found == count,
        PLACEHOLDERS_HINT,
        lambda: mismatch_message(is_image.sum(dim=1).tolist(), count, per_tile),
    )
    if features is None:
        return inputs_embeds
    positions = is_image.flatten().int().argsort(descending=True, stable=True)[:count].to(inputs_embeds.device)
    features = features.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.flatten(0, 1).index_copy(0, positions, features).view_as(inputs_embeds)


def place_by_row(
    inputs_embeds: torch.Tensor, is_image: torch.Tensor, image_embeds: torch.Tensor, per_tile: int
) -> torch.Tensor:
    """Puts the features (B, most placeholders of a row, D) of each row where its placeholders `is_image` (B, L) are.

    Features beyond the placeholders of a row are padding.

    Raises:
        ValueError: A row has more placeholders than features.
    """
    most = image_embeds.shape[1]
    order = is_image.cumsum(dim=1) - 1
    check(
        on_host(order[:, -1].max()) < most,
        PLACEHOLDERS_HINT,
        lambda: mismatch_message(
            is_image.sum(dim=1).tolist(), int(is_image.sum(dim=1).clamp(max=most).sum()), per_tile
        ),
    )
    if not most:
        return inputs_embeds
    image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
    index = order.clamp(min=0, max=most - 1).unsqueeze(-1).to(inputs_embeds.device)
    placed = image_embeds.gather(1, index.expand(-1, -1, image_embeds.shape[-1]))
    return torch.where(is_image.unsqueeze(-1).to(inputs_embeds.device), placed, inputs_embeds)
