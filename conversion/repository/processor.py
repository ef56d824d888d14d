"""Processor and image processor of a result."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...conversation_internvl import get_conversation_template
from ...image_processing_internvl import InternVLImageProcessor
from ...processing_internvl import InternVLProcessor
from ..readers.source import Source
from .code import write_json
from .result import Result
from .tokenizer import pad_left


# Those of the models are part of their configurations (`hub_auto_map`).
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_internvl.InternVLImageProcessor"}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_internvl.InternVLProcessor"}


# Kept from a source's preprocessor_config.json; the configuration says how an image becomes tiles.
KEPT_IMAGE_SETTINGS = ("image_mean", "image_std", "resample")


def image_processor_for(
    result: Result, resize_mode: str, config: Any, source: Source, image_size: int | None = None
) -> InternVLImageProcessor:
    """Builds the image processor of a checkpoint.

    Mean, standard deviation and resampling are those of the source's preprocessor_config.json. For chat models the
    mode follows the configuration (tiles, padding to a square, or plainly `resize_mode`): the file describes CLIP's
    class, to which published user code passes finished tiles. For others it follows the file's resize and crop, which
    published user code runs. `image_size` is given where it is not that of the source.
    """
    published = source.read_json("preprocessor_config.json")
    if image_size is not None:
        published = {**published, **{key: image_size for key in ("size", "crop_size") if key in published}}
    settings = {key: published[key] for key in KEPT_IMAGE_SETTINGS if published.get(key) is not None}
    for key in ("image_mean", "image_std"):
        _check_channels(source, key, settings.get(key))
    if result.kind == "chat":
        # What came of the LLaVA code base says so in its own file when it is converted again.
        crops = "crop" in (resize_mode, published.get("resize_mode"))
        return _chat_image_processor(config, settings, "crop" if crops else "squash")
    side = getattr(config, "force_image_size", None) or getattr(config, "vision_config", config).image_size
    if not published:
        # InternVL-C/G were evaluated on resized images in retrieval, InternViT on crops; segmentation needs whole
        # images.
        is_whole = result.kind == "contrastive" or result.pipeline_tag == "image-segmentation"
        mode = "squash" if is_whole else "crop"
        return InternVLImageProcessor(size={"height": side, "width": side}, resize_mode=mode)
    settings["size"] = published.get("size", side)
    if published.get("do_center_crop", False):
        settings.update(resize_mode="crop", crop_size=published.get("crop_size", side))
    else:
        settings["resize_mode"] = published.get("resize_mode", "squash")
    return InternVLImageProcessor(**settings)


def _check_channels(source: Source, key: str, value: Any) -> None:
    """Checks for three finite numbers, one for each colour, positive for the deviation."""
    if value is None:
        return
    is_right = (
        isinstance(value, list)
        and len(value) == 3
        and all(type(part) in (int, float) and math.isfinite(part) for part in value)
        and (key == "image_mean" or all(part > 0 for part in value))
    )
    if not is_right:
        raise ValueError(
            f"`{key}` of `{source.folder / 'preprocessor_config.json'}` must be three "
            f"numbers{' above 0' * (key == 'image_std')}, one for each colour, got {value!r:.80}. Put the file in its "
            "place that was published with the weights."
        )


def _chat_image_processor(config: Any, settings: dict[str, Any], resize_mode: str) -> InternVLImageProcessor:
    settings = {**settings, "size": {"height": config.image_size, "width": config.image_size}}
    if config.dynamic_image_size:
        return InternVLImageProcessor(
            **settings,
            resize_mode="tiles",
            min_num=config.min_dynamic_patch,
            max_num=config.max_dynamic_patch,
            use_thumbnail=config.use_thumbnail,
        )
    mode = "pad" if config.pad2square else resize_mode
    return InternVLImageProcessor(**settings, resize_mode=mode, crop_size=settings["size"] if mode == "crop" else None)


def write_processor(
    target: Path,
    result: Result,
    config: Any,
    image_processor: InternVLImageProcessor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[dict[str, str]]:
    """Writes preprocessor_config.json and, with a tokenizer, processor_config.json and the chat template.

    Returns every `auto_map` written.
    """
    image_settings = json.loads(image_processor.to_json_string())
    nested = {**image_settings, "auto_map": IMAGE_PROCESSOR_AUTO_MAP}
    has_processor = tokenizer is not None and result.kind != "vision"
    write_json(
        target / "preprocessor_config.json",
        {**image_settings, "auto_map": {**IMAGE_PROCESSOR_AUTO_MAP, **(PROCESSOR_AUTO_MAP if has_processor else {})}},
    )
    if not has_processor:
        return [IMAGE_PROCESSOR_AUTO_MAP]
    if result.kind == "chat":
        template = get_conversation_template(config.template).to_jinja() if config.template else None
        processor = InternVLProcessor(
            image_processor,
            tokenizer,
            image_seq_length=config.num_image_token,
            chat_template=template,
            use_image_start_end=config.use_image_start_end,
        )
        pad_left(target)
        if template:
            (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        processor = InternVLProcessor(image_processor, tokenizer, mode="contrastive")
    settings = processor.to_dict()
    settings.pop("chat_template", None)
    write_json(
        target / "processor_config.json", {**settings, "auto_map": PROCESSOR_AUTO_MAP, "image_processor": nested}
    )
    return [IMAGE_PROCESSOR_AUTO_MAP, PROCESSOR_AUTO_MAP]
