"""A UperNet of mmsegmentation over InternViT, heads included, as transformers' `UperNetForSemanticSegmentation`.

The result is a folder that loads where this package is installed: transformers' class holds our backbone, and has no
place for code of ours.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from ..configuration_internvl import InternViTConfig
from .formats.key_tables import RAW_UPERNET
from .formats.raw_formats import PYRAMID_RAW
from .formats.raw_towers import size_of
from .formats.rules import translate
from .readers.damages import describing
from .readers.opening import open_source
from .readers.source import Source
from .readers.tensors import TensorReader
from .repository.processor import image_processor_for
from .repository.target import complete_or_nothing, place_of


logger = logging.getLogger(__name__)

POOLED_SIDES = (1, 2, 3, 6)  # of the pyramid pooling, of all published configurations
NEEDED = ("decode_head.conv_seg.weight", "decode_head.fpn_bottleneck.conv.weight")


def convert_upernet(
    source: str | Path, out: str | Path, overwrite: bool = False, report: Callable[[str], None] = logger.info
) -> Path:
    """Converts a published UperNet.

    Args:
        source: Its file (`.pth`), or a folder that holds no other.
        out: Folder of the result; must not exist, be empty, or be allowed to be replaced.
        overwrite: Replace what `out` holds.
        report: Takes messages to the user.

    Returns:
        `out`.

    Raises:
        OSError: The file is missing or cannot be read, or `out` is not free.
        ValueError: The file is no such model, or a tensor does not fit.
    """
    source, out = Path(source), Path(out)
    place = place_of(out, overwrite, [source])
    opened = open_source(source)
    if not PYRAMID_RAW.matches(opened) or not all(name in opened.tensors for name in NEEDED):
        raise ValueError(
            f"`{source}` holds no UperNet of mmsegmentation over an InternViT with a feature pyramid: its tensors "
            f"{', '.join((*PYRAMID_RAW.tensor_names, *NEEDED))} are not all there."
        )
    with describing(opened.folder):
        config = upernet_config_of(opened)
        model = _filled(opened, config)
    processor = image_processor_for(PYRAMID_RAW.result, "squash", config.backbone_config, opened)
    with complete_or_nothing(out, place, overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    report(f"Wrote {out}: UperNet with {config.num_labels} classes.")
    return out


def upernet_config_of(source: Source) -> UperNetConfig:
    """Builds the configuration of a published UperNet from its backbone's settings and its shapes.

    Raises:
        ValueError: If its pooling has another number of scales.
    """
    scales = {name.split(".")[2] for name in source.tensors if name.startswith("decode_head.psp_modules.")}
    if len(scales) != len(POOLED_SIDES):
        raise ValueError(
            f"The UperNet in `{source.files[-1].name}` pools to {len(scales)} scales instead of {len(POOLED_SIDES)}."
        )
    backbone = InternViTConfig.from_dict(PYRAMID_RAW.map_config(source))
    has_auxiliary = "auxiliary_head.conv_seg.weight" in source.tensors
    return UperNetConfig(
        backbone_config=backbone,
        pool_scales=POOLED_SIDES,
        hidden_size=size_of(source, NEEDED[1], 0),
        num_labels=size_of(source, NEEDED[0], 0),
        use_auxiliary_head=has_auxiliary,
        auxiliary_channels=size_of(source, "auxiliary_head.conv_seg.weight", 1) or 1,
        auxiliary_in_channels=backbone.hidden_size,
    )


def _filled(source: Source, config: UperNetConfig) -> Any:
    """The model with the tensors of a source, all of which it must take."""
    with torch.device("meta"):
        model = UperNetForSemanticSegmentation(config)
    translation = translate(source.tensors, RAW_UPERNET)
    expected = model.state_dict()
    missing = sorted(expected.keys() - translation.tensors.keys())
    unknown = sorted({*translation.unknown, *(translation.tensors.keys() - expected.keys())})
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = [name for name, tensor in translation.tensors.items() if shapes.get(name, tensor.shape) != tensor.shape]
    for what, names in {"are missing": missing, "have no place": unknown, "have another shape": wrong}.items():
        if names:
            raise ValueError(f"{len(names)} tensors of the UperNet {what}: {', '.join(names[:3])}.")
    reader = TensorReader()
    model.load_state_dict({name: tensor.load(reader) for name, tensor in translation.tensors.items()}, assign=True)
    return model.eval()
