"""Completes a checkpoint of the LLaVA code base with the projector and the vision tower that lie beside it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..readers.adapters import LLAVA_TOWER_PREFIX, merge_adapters
from ..readers.checkpoint_files import read_json
from ..readers.opening import open_source
from ..readers.source import Source
from ..readers.tensors import TensorReader, Tensors, is_equal
from .key_tables import DERIVED_BUFFERS, LLAVA_UNUSED_TOWER_PARTS, RAW_TOWER
from .llava_formats import TOWER_CONFIG
from .raw_towers import tower_settings
from .recognition import recognise
from .rules import inverse, translate


PROJECTOR_FILE = "mm_projector.bin"
TOWER_CONFIG_FILE = f"{TOWER_CONFIG}.json"
PROJECTOR_PREFIX = "model.mm_projector."
HEAD_WIDTH = 128  # of LLaMA, in every size
CONFIG_ADVICE = "Name the config.json of the vision tower with `--vision-config FILE`."


def complete_llava(
    source: Source, vision_tower: str | Path | None = None, vision_config: str | Path | None = None
) -> Source:
    """Completes a checkpoint of the LLaVA code base; returns any other source as it is.

    Args:
        source: An opened source, adapters merged.
        vision_tower: Checkpoint whose vision tower is used instead of the one in the source.
        vision_config: config.json of the vision tower, or the folder with it.

    Returns:
        The source, with the tower's configuration under `vision_tower_config` in its own.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a part is missing or contradicts another, or a setting has no effect.
    """
    has_decoder = "model.embed_tokens.weight" in source.tensors
    has_projector = any(name.startswith(PROJECTOR_PREFIX) for name in source.tensors)
    if not has_projector and not ("mm_vision_tower" in source.config and has_decoder):
        for name, value in (("vision_tower", vision_tower), ("vision_config", vision_config)):
            if value is not None:
                raise ValueError(f"`{name}` has no effect: `{source.folder}` is no checkpoint of the LLaVA code base.")
        return source
    if not has_decoder:
        raise ValueError(
            f"`{source.folder}` holds a projector and no language model: it is the result of pre-training, from which "
            "fine-tuning starts. Convert the folder of the fine-tuned model."
        )
    source, config = _with_tower(_with_projector(source), vision_tower)
    config = (
        _read_config(vision_config) if vision_config is not None else config or source.read_json(TOWER_CONFIG_FILE)
    )
    source = replace(source, config={**source.config, TOWER_CONFIG: config or _config_from_shapes(source)})
    return _without_unused(source)


def _with_projector(source: Source) -> Source:
    file = source.folder / PROJECTOR_FILE
    if not file.is_file() or file in source.files:
        return source
    added = open_source(file).tensors
    both = [name for name in added if name in source.tensors]
    reader = TensorReader()
    different = [name for name in both if not is_equal(reader, added[name], source.tensors[name])]
    if different:
        raise ValueError(
            f"`{file}` and {source.files[0].name} do not agree in {', '.join(different)}. Take away the file that is "
            "not of this model."
        )
    notes = [f"{PROJECTOR_FILE} repeats what the other files hold."] if both else []
    new = {name: tensor for name, tensor in added.items() if name not in source.tensors}
    return replace(
        source,
        tensors={**source.tensors, **new},
        files=[*source.files, file],
        notes=[*source.notes, *notes],
    )


def _with_tower(source: Source, vision_tower: str | Path | None) -> tuple[Source, dict[str, Any]]:
    """Adds the tower, and returns its configuration where that is known by now."""
    own = [name for name in source.tensors if name.startswith(LLAVA_TOWER_PREFIX)]
    if vision_tower is None:
        if own:
            return source, {}
        raise ValueError(
            f"`{source.folder}` has no vision tower: config.json names {source.config.get('mm_vision_tower')!r}. "
            "Download that and name its folder with `--vision-tower DIR`."
        )
    opened = merge_adapters(open_source(vision_tower))
    found_format = recognise(opened)
    if found_format.result.kind not in ("vision", "contrastive"):
        raise ValueError(
            f"`vision_tower` must be an InternViT or InternVL-14B checkpoint, got {found_format.name} in "
            f"`{opened.folder}`."
        )
    settings = found_format.map_config(opened)
    weights = {name: x for name, x in opened.tensors.items() if not name.endswith(DERIVED_BUFFERS)}
    translation = translate(weights, found_format.rules, settings)
    # What no rule knows is taken along, to be listed with everything else that does not fit.
    tower = {**{name: weights[name] for name in translation.unknown}, **translation.tensors}
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in own}
    joined = replace(
        source,
        tensors={**kept, **{LLAVA_TOWER_PREFIX + name: tensor for name, tensor in tower.items()}},
        files=[*source.files, *opened.files],
        doubled=[*source.doubled, *opened.doubled],
        left_out={**source.left_out, **dict.fromkeys(own, "another vision tower was asked for")},
        notes=[*source.notes, f"The vision tower is that of {opened.folder}."],
    )
    return joined, settings


def _without_unused(source: Source) -> Source:
    """Names the tensors of a whole InternVL-14B that a chat model does not use."""
    reasons = {
        name: reason
        for name in source.tensors
        for part, reason in LLAVA_UNUSED_TOWER_PARTS.items()
        if name.startswith(LLAVA_TOWER_PREFIX + part)
    }
    kept: Tensors = {name: tensor for name, tensor in source.tensors.items() if name not in reasons}
    return replace(source, tensors=kept, left_out={**source.left_out, **reasons})


# ------------------------------------------------------------------------------------------- the tower's configuration
def _read_config(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no `{file}`. {CONFIG_ADVICE}")
    config = read_json(file)
    if "qllama_config" not in config and "hidden_size" not in config:
        raise ValueError(f"`{file}` describes no vision tower: it has neither `hidden_size` nor `qllama_config`.")
    return config


def _config_from_shapes(source: Source) -> dict[str, Any]:
    """The configuration of a tower of a published size; shapes give all but the number of heads."""
    tower = {
        name.removeprefix(LLAVA_TOWER_PREFIX): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(LLAVA_TOWER_PREFIX)
    }
    if "query_tokens" not in tower:
        return _vision_from_shapes(source, tower)
    _, num_queries, width = tower["query_tokens"].shape
    if width % HEAD_WIDTH:
        raise ValueError(f"How many heads a QLLaMA of width {width} has cannot be read from shapes. {CONFIG_ADVICE}")
    layers, crossed = (_layers_with(tower, part) for part in ("mlp.gate_proj.weight", "cross_attn.q_proj.weight"))
    return {
        "vision_config": _vision_from_shapes(
            source, {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
        ),
        "qllama_config": {
            "hidden_size": width,
            "num_attention_heads": width // HEAD_WIDTH,
            "num_hidden_layers": len(layers),
            "intermediate_size": tower["qllama.model.layers.0.mlp.gate_proj.weight"].shape[0],
            "num_query_token": num_queries,
        },
        "cross_attention_frequency": crossed[1] if len(crossed) > 1 else len(layers),
    }


def _vision_from_shapes(source: Source, tower: Tensors) -> dict[str, Any]:
    raw = translate(tower, inverse(RAW_TOWER)).tensors
    try:
        return tower_settings(replace(source, config={}, tensors=raw))
    except ValueError as error:
        raise ValueError(
            f"`{source.folder}` has no {TOWER_CONFIG_FILE}, and shapes do not give all of it. {CONFIG_ADVICE}"
        ) from error


def _layers_with(tower: Tensors, part: str) -> list[int]:
    """Numbers of the layers of QLLaMA that hold a tensor."""
    matches = (re.fullmatch(rf"qllama\.model\.layers\.(\d+)\.{re.escape(part)}", name) for name in tower)
    return sorted(int(match[1]) for match in matches if match)
