"""Chat checkpoints of the LLaVA code base: their names and their configuration in today's.

One flat config.json holds the decoder's keys and, as `mm_...`, those for images. The vision tower is InternViT, or
InternVL-14B with patches and QLLaMA's queries; its configuration lies elsewhere (`llava_parts` finds it).

Refused are other projectors than the released ones, start and end tokens around an image, and tilings of later LLaVA
code.
"""

from typing import Any

from ...configuration_internvl import InternVLChatConfig
from ..readers.adapters import LLAVA_TOWER_PREFIX
from ..readers.foreign_settings import LLAVA_KEYS
from ..readers.source import Source
from ..repository.result import CHAT
from .format import Format
from .hub_settings import contrastive_settings, vision_settings, with_stored_size, without_old_defaults
from .key_tables import LLAVA_IMAGE_SIZES, LLAVA_PROJECTORS, LLAVA_SUPPORTED, LLAVA_TEMPLATE, OLD_DEFAULTS
from .rules import rename, within


# Where `llava_parts` puts the tower's configuration.
TOWER_CONFIG = "vision_tower_config"
# The first rule that knows a name is used, so the decoder's come last.
_DECODER = (rename("model.*", "language_model.model.*"), rename("lm_head.*", "language_model.lm_head.*"))
_PATCHES_ONLY = (rename(f"{LLAVA_TOWER_PREFIX}*", "vision_model.*"), rename("model.mm_projector.*", "mlp1.*"))
_PATCHES_AND_QUERIES = (
    *within(
        LLAVA_TOWER_PREFIX,
        "",
        (
            rename("vision_model.*", "vision_model.*"),
            rename("qllama.model.*", "qllama.*"),
            rename("query_tokens", "query_tokens"),
        ),
    ),
    *within("model.mm_projector.", "", (rename("mlp1.*", "mlp1.*"), rename("mlp2.*", "mlp2.*"))),
)


def _map_llava(source: Source) -> dict[str, Any]:
    config = source.config
    _check_supported(source)
    flat = without_old_defaults(config, OLD_DEFAULTS)
    own = {key: flat.pop(key) for key in list(flat) if key.startswith(LLAVA_KEYS)}
    connector, projector_type = LLAVA_PROJECTORS[config["mm_projector_type"]]
    tower = config[TOWER_CONFIG]
    parts = contrastive_settings(tower) if "qllama_config" in tower else {"vision_config": vision_settings(tower)}
    positions = (
        f"{LLAVA_TOWER_PREFIX}{'vision_model.' if 'qllama_config' in tower else ''}embeddings.position_embedding"
    )
    vision = with_stored_size(parts["vision_config"], source.tensors.get(positions), tower.get("force_image_size"))
    mapped = {
        **{key: value for key, value in own.items() if key != TOWER_CONFIG},
        "connector": connector,
        "projector_type": projector_type,
        "select_layer": config["mm_vision_select_layer"],
        "downsample_ratio": 1.0,
        "ps_version": "v2",  # leaves the order of the patches as it is
        "pad2square": config.get("image_aspect_ratio") == "pad",
        "use_image_start_end": False,
        "template": LLAVA_TEMPLATE,
        "vision_config": vision,
        "text_config": {**flat, "model_type": "llama"},
        "tie_word_embeddings": bool(flat.get("tie_word_embeddings", False)),
        "model_type": InternVLChatConfig.model_type,
    }
    if connector != "patches":
        mapped["qllama_config"] = parts["qllama_config"]
    if vision.get("image_size") in LLAVA_IMAGE_SIZES:
        mapped["force_image_size"] = LLAVA_IMAGE_SIZES[vision["image_size"]]
    return mapped


def _check_supported(source: Source) -> None:
    """Raises with every setting that is not supported."""
    config = source.config
    supported = {**LLAVA_SUPPORTED, "mm_projector_type": (*LLAVA_PROJECTORS,)}
    wrong = [
        f"`{key}` is {config.get(key)!r}, supported: {', '.join(repr(value) for value in values)}"
        for key, values in supported.items()
        if config.get(key) not in values
    ]
    if not isinstance(config.get("mm_vision_select_layer"), int):
        wrong.append(f"`mm_vision_select_layer` is {config.get('mm_vision_select_layer')!r}, supported: a number")
    if wrong:
        raise ValueError(f"`{source.folder / 'config.json'}` cannot be converted: {'; '.join(wrong)}.")


LLAVA_FORMATS = (
    Format(
        name="InternVL-Chat of the LLaVA code base, InternVL-14B tower",
        result=CHAT,
        config_keys=("mm_vision_tower", "mm_projector_type"),
        tensor_names=(f"{LLAVA_TOWER_PREFIX}query_tokens", "model.mm_projector.mlp1.0.weight", "lm_head.weight"),
        map_config=_map_llava,
        rules=(*_PATCHES_AND_QUERIES, *_DECODER),
        lacks_image_token=True,
        resize_mode="crop",
    ),
    Format(
        name="InternVL-Chat of the LLaVA code base, InternViT tower",
        result=CHAT,
        config_keys=("mm_vision_tower", "mm_projector_type"),
        tensor_names=(f"{LLAVA_TOWER_PREFIX}embeddings.class_embedding", "model.mm_projector.0.weight"),
        map_config=_map_llava,
        rules=(*_PATCHES_ONLY, *_DECODER),
        lacks_image_token=True,
        resize_mode="crop",
    ),
)
