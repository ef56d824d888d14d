"""The vision tower of a raw checkpoint.

Sizes are read from shapes. Everything else comes from config.json beside the file (the yaml of the classification code
or the mmseg configuration as JSON, or arguments of the published class at its top), and else from the published sizes.
"""

from math import isqrt
from typing import Any

from ...configuration_internvl import InternViTConfig
from ..readers.foreign_settings import RAW_ARGUMENTS
from ..readers.source import Source
from .key_tables import PUBLISHED_NUM_HEADS


# -------------------------------------------------------------------------------------------------- what is read where
def constructor_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Collects arguments of the published model class from the spellings of all codes that store them.

    Returns:
        Argument to value, from the top, `backbone` of an mmseg configuration, and the yaml's MODEL (there in
        capitals).
    """
    model, data = section(config, "MODEL"), section(config, "DATA")
    yaml = {**section(model, "INTERN_VIT_6B"), **{key: model.get(key) for key in ("DROP_PATH_RATE", "NUM_CLASSES")}}
    found = {
        **{key.lower(): value for key, value in yaml.items()},
        "img_size": data.get("IMG_SIZE"),
        **section(mmseg_settings(config), "backbone"),
        **config,
    }
    return {key: value for key, value in found.items() if value is not None}


def mmseg_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The model's part of an mmseg configuration; empty for any other."""
    found = section(config, "model") or config
    return found if isinstance(found.get("backbone"), dict) else {}


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested part of a configuration; empty where there is none."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def size_of(source: Source, name: str, axis: int) -> int | None:
    """Size of a tensor along an axis; None where it is not there or has fewer axes."""
    shape = source.tensors[name].shape if name in source.tensors else ()
    return shape[axis] if axis < len(shape) else None


def _tower_prefix(source: Source) -> str:
    return "" if "cls_token" in source.tensors else "backbone."


# ----------------------------------------------------------------------------------------------------------- the tower
def tower_settings(source: Source) -> dict[str, Any]:
    """Configuration of the vision tower.

    Raises:
        ValueError: If config.json does not belong to the weights, or does not say what has to be known.
    """
    arguments = constructor_arguments(source.config)
    stated = {ours: arguments[name] for name, ours in RAW_ARGUMENTS.items() if name in arguments}
    found = _sizes_of_tower(source)
    contradictions = [
        f"`{name}` is {stated[ours]!r} there, {found.get(ours, 'a number')} in the weights"
        for name, ours in RAW_ARGUMENTS.items()
        if ours in stated and (type(stated[ours]) not in (int, float) or stated[ours] != found.get(ours, stated[ours]))
    ]
    if contradictions:
        raise ValueError(
            f"`{source.folder / 'config.json'}` does not describe `{source.files[0].name}`: "
            f"{'; '.join(contradictions)}. Take it away, or put the right one in its place."
        )
    if "num_attention_heads" not in stated:
        stated["num_attention_heads"] = num_heads(source)
    # Trust config.json's depth: a truncated file is then reported as missing keys.
    return {"num_hidden_layers": count_blocks(source), **found, **stated, "model_type": InternViTConfig.model_type}


def _sizes_of_tower(source: Source) -> dict[str, Any]:
    """Sizes that follow from shapes. Missing tensors are left to the comparison of keys."""
    prefix = _tower_prefix(source)
    block = f"{prefix}blocks.0."
    patch, num_positions = (
        size_of(source, f"{prefix}patch_embed.proj.weight", 3),
        size_of(source, f"{prefix}pos_embed", 1),
    )
    sizes = {
        "hidden_size": size_of(source, f"{prefix}cls_token", 2),
        "intermediate_size": size_of(source, f"{block}mlp.fc1.weight", 0),
        "num_channels": size_of(source, f"{prefix}patch_embed.proj.weight", 1),
        "patch_size": patch,
        "image_size": isqrt(num_positions - 1) * patch if num_positions and patch else None,
        "norm_type": "layer_norm" if f"{block}norm1.bias" in source.tensors else "rms_norm",
        "qkv_bias": f"{block}attn.qkv.bias" in source.tensors,
        "qk_normalization": f"{block}attn.q_norm.weight" in source.tensors,
    }
    return {key: value for key, value in sizes.items() if value is not None}


def count_blocks(source: Source, stack: str | None = None) -> int:
    """Blocks of the tower, or of another stack of layers."""
    stack = f"{_tower_prefix(source)}blocks." if stack is None else stack
    numbers = [name.removeprefix(stack).partition(".")[0] for name in source.tensors if name.startswith(stack)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def num_heads(source: Source) -> int:
    """Heads of a tower whose configuration does not say, by its width."""
    width = size_of(source, f"{_tower_prefix(source)}cls_token", 2) or 0
    if width not in PUBLISHED_NUM_HEADS and width % 128:
        raise ValueError(
            f"How many heads a tower of width {width} has cannot be read from `{source.files[0].name}`: name them "
            'with `--num-heads N`, or put them beside it as config.json, `{"num_heads": N}`.'
        )
    return PUBLISHED_NUM_HEADS.get(width, width // 128)
