"""Changes to a model that a user asks for, or that its new format needs, before it is written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from ...configuration_internvl import InternViTConfig, InternVLChatConfig
from ...layers_internvit import resize_patch_kernel, resize_position_grid
from ..readers.tensors import Tensors, computed


@dataclass
class Draft:
    """A model in today's names, before it is compared with its class.

    Args:
        settings: Its configuration.
        tensors: Name to tensor.
        dropped: Name to reason, of tensors that the result will not hold.
        notes: Remarks for the user.
        image_size: Size of its images, where that was changed.
    """

    settings: dict[str, Any]
    tensors: Tensors
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    image_size: int | None = None


# Changes a draft in place.
Edit = Callable[[Draft], None]


def resize_tower(image_size: int | None = None, patch_size: int | None = None) -> Edit:
    """Resizes learned positions and the patch kernel as the published tools do: bicubic, in fp32, no antialiasing.

    Args:
        image_size: Size of images in pixels. None keeps it where the patch size divides it, else the number of
            patches.
        patch_size: Size of patches in pixels; None keeps it.
    """

    def edit(draft: Draft) -> None:
        vision = draft.settings.get("vision_config", draft.settings)
        old_patch = vision.get("patch_size", InternViTConfig.patch_size)
        old_size = vision.get("image_size", InternViTConfig.image_size)
        patch = _checked("patch_size", old_patch if patch_size is None else patch_size)
        size = old_size if old_size % patch == 0 else old_size // old_patch * patch
        size = _checked("image_size", size if image_size is None else image_size)
        if size % patch:
            raise ValueError(f"`image_size` ({size}) must be a multiple of the patch size ({patch}).")
        _resize_positions(draft, size // patch)
        _resize_kernel(draft, patch)
        if image_size is not None and draft.settings.get("force_image_size"):
            draft.settings["force_image_size"] = draft.image_size = size
        if size != old_size:
            draft.image_size = size
        vision.update(image_size=size, patch_size=patch)

    return edit


def _checked(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a number of pixels, got {value!r}.")
    return value


def _resize_positions(draft: Draft, side: int) -> None:
    for name in [name for name in draft.tensors if f".{name}".endswith(".embeddings.position_embedding")]:
        tensor = draft.tensors[name]
        old_side = isqrt(max(tensor.shape[1] - 1, 0)) if len(tensor.shape) == 3 else side
        if old_side != side:
            draft.tensors[name] = computed(lambda grid: resize_position_grid(grid, side, side), tensor)
            draft.notes.append(f"Resized {name} from {old_side} x {old_side} to {side} x {side} patches.")


def _resize_kernel(draft: Draft, size: int) -> None:
    for name in [name for name in draft.tensors if f".{name}".endswith(".embeddings.patch_embedding.weight")]:
        tensor = draft.tensors[name]
        if len(tensor.shape) == 4 and tensor.shape[-1] != size:
            draft.tensors[name] = computed(lambda kernel: resize_patch_kernel(kernel, size), tensor)
            draft.notes.append(f"Resized {name} from {tensor.shape[-1]} to {size} pixels.")


def drop_blocks_above(draft: Draft) -> None:
    """Leaves out the tower's blocks above the one whose output the decoder sees; `select_layer` becomes -1.

    Raises:
        ValueError: If there are none to leave out, because it is no chat model or its queries read the last block.
    """
    settings = draft.settings
    if settings.get("model_type") != InternVLChatConfig.model_type:
        raise ValueError(
            "`drop_unused_blocks` has no effect: only a chat model has a tower of which not all blocks are used."
        )
    connector = settings.get("connector", InternVLChatConfig.connector)
    if connector != "patches":
        raise ValueError(
            f"`drop_unused_blocks` cannot leave out blocks: with `connector` {connector!r} the queries read the last "
            "one."
        )
    vision = settings["vision_config"]
    depth = vision.get("num_hidden_layers", InternViTConfig.num_hidden_layers)
    selected = settings.get("select_layer", InternVLChatConfig.select_layer)
    used = selected if selected >= 0 else depth + 1 + selected
    if not 0 < used <= depth:
        raise ValueError(f"`select_layer` ({selected}) must name one of the {depth} blocks for `drop_unused_blocks`.")
    settings["select_layer"] = -1
    if used == depth:
        draft.notes.append(f"All {depth} blocks of the vision tower are used: none was left out.")
        return
    for index in range(used, depth):
        start = f"vision_model.encoder.layers.{index}."
        reason = f"above block {used}, whose output the decoder sees"
        draft.dropped |= {name: reason for name in draft.tensors if name.startswith(start)}
    _cut_tower(vision, depth, used)


def _cut_tower(vision: dict[str, Any], depth: int, used: int) -> None:
    """Configuration of the first `used` of `depth` blocks."""
    if vision.get("drop_path_schedule", InternViTConfig.drop_path_schedule) == "linear":
        # The rate of a block rises with its place in the whole tower; what is left keeps its rates.
        rate = vision.get("drop_path_rate", InternViTConfig.drop_path_rate)
        vision["drop_path_rate"] = rate * (used - 1) / (depth - 1)
    vision["num_hidden_layers"] = used
    # `save_pretrained` names the last block as a feature map, whoever asked for one.
    gone = {f"stage{index}" for index in range(used + 1, depth + 1)}
    if gone & set(vision.get("out_features") or ()):
        for key in ("out_features", "out_indices", "stage_names"):
            vision.pop(key, None)
