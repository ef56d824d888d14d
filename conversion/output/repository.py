"""Everything in the result but weights and tokenizer: code, configuration, processor, generation settings."""

import ast
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...conversation_internvl import get_conversation_template
from ...image_processing_internvl import InternVLImageProcessor
from ...processing_internvl import InternVLProcessor
from ..key_tables import IMAGE_PROCESSOR_AUTO_MAP, PROCESSOR_AUTO_MAP, REMOVED_GENERATION_KEYS
from ..layouts.hub_layouts import Layout, generation_settings
from ..sources.checkpoint_files import read_json
from ..sources.foreign_settings import FILES, is_own_code
from ..sources.source import Source
from .tokenizer_files import pad_left


PACKAGE = Path(__file__).resolve().parents[2]
# What is taken over from a source's preprocessor_config.json; how a picture becomes tiles is the configuration's to say.
KEPT_IMAGE_SETTINGS = ("image_mean", "image_std", "resample")


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes a JSON object as transformers does: sorted, indented by two."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def code_files(modules: Iterable[str]) -> list[Path]:
    """Files of modules and of all that they import from the same folder, which is what the remote loader follows.

    Args:
        modules: Names of modules at the root of the package.

    Returns:
        Their files, sorted.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        waiting += [node.module for node in nodes if node.level == 1 and node.module]
    return [PACKAGE / f"{module}.py" for module in sorted(found)]


def copy_code(target: Path, auto_maps: Iterable[dict[str, str]]) -> list[str]:
    """Copies the code that Auto classes need.

    Args:
        target: Folder of the result.
        auto_maps: Every `auto_map` of the result.

    Returns:
        Names of the files.
    """
    modules = {reference.partition(".")[0] for auto_map in auto_maps for reference in auto_map.values()}
    files = code_files(modules)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def keep_written_code(target: Path) -> None:
    """Takes every `auto_map` out of a result that names anything but a module lying in it.

    What comes from a source names modules of this package at most (see `foreign_settings`); of these, a form need not write all.

    Args:
        target: Folder of the result, its code written.
    """
    written = {file.stem for file in target.glob("*.py")}
    for file in sorted(target.glob("*.json")):
        if file.name not in FILES:
            continue
        content = read_json(file)
        if _drop_foreign(content, written):
            write_json(file, content)


def _drop_foreign(content: Any, written: set[str]) -> bool:
    """Takes them out of a content; whether there was any."""
    parts = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    found = [_drop_foreign(part, written) for part in parts]
    if isinstance(content, dict) and "auto_map" in content and not _is_written(content["auto_map"], written):
        del content["auto_map"]
        return True
    return any(found)


def _is_written(auto_map: Any, written: set[str]) -> bool:
    return is_own_code(auto_map) and all(place.partition(".")[0] in written for place in auto_map.values())


def image_processor_for(
    layout: Layout, config: Any, source: Source, image_size: int | None = None
) -> InternVLImageProcessor:
    """The image processor of a checkpoint.

    Mean, deviation and resampling are those of the source's preprocessor_config.json. Chat models: the mode follows the configuration
    (tiles; pad-to-square; plain resize), since that file describes CLIP's class, which published user code feeds with finished tiles.
    The others: the file's resize and crop, which published user code runs.

    Args:
        layout: Of the source.
        config: The result's configuration.
        source: The source.
        image_size: Size of pictures, where it is not that of the source.

    Returns:
        The image processor.
    """
    published = source.read_json("preprocessor_config.json")
    if image_size is not None:
        published = {**published, **{key: image_size for key in ("size", "crop_size") if key in published}}
    settings = {key: published[key] for key in KEPT_IMAGE_SETTINGS if published.get(key) is not None}
    for key in ("image_mean", "image_std"):
        _check_channels(source, key, settings.get(key))
    if layout.result.kind == "chat":
        # What came of the LLaVA code base says so in its own file when it is converted again.
        crops = "crop" in (layout.resize_mode, published.get("resize_mode"))
        return _chat_image_processor(config, settings, "crop" if crops else "squash")
    side = getattr(config, "force_image_size", None) or getattr(config, "vision_config", config).image_size
    if not published:
        # InternVL-C/G were evaluated on plainly resized pictures in retrieval, InternViT on crops; a class per pixel is wanted of all.
        is_whole = layout.result.kind == "contrastive" or layout.result.pipeline_tag == "image-segmentation"
        mode = "squash" if is_whole else "crop"
        return InternVLImageProcessor(size={"height": side, "width": side}, resize_mode=mode)
    settings["size"] = published.get("size", side)
    if published.get("do_center_crop", False):
        settings.update(resize_mode="crop", crop_size=published.get("crop_size", side))
    else:
        settings["resize_mode"] = published.get("resize_mode", "squash")
    return InternVLImageProcessor(**settings)


def _check_channels(source: Source, key: str, value: Any) -> None:
    """Refuses anything but a finite number for each of three colours, positive for the deviation."""
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
            f"`{key}` of `{source.folder / 'preprocessor_config.json'}` must be three numbers{' above 0' * (key == 'image_std')}, one for "
            f"each colour, got {value!r:.80}. Put the file in its place that was published with the weights."
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
    layout: Layout,
    config: Any,
    image_processor: InternVLImageProcessor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[dict[str, str]]:
    """Writes preprocessor_config.json and, with a tokenizer, processor_config.json and the chat template.

    Args:
        target: Folder of the result.
        layout: Of the source.
        config: The result's configuration.
        image_processor: Of the result.
        tokenizer: Of the result, or None.

    Returns:
        Every `auto_map` written.
    """
    image_settings = json.loads(image_processor.to_json_string())
    nested = {**image_settings, "auto_map": IMAGE_PROCESSOR_AUTO_MAP}
    has_processor = tokenizer is not None and layout.result.kind != "vision"
    write_json(
        target / "preprocessor_config.json",
        {**image_settings, "auto_map": {**IMAGE_PROCESSOR_AUTO_MAP, **(PROCESSOR_AUTO_MAP if has_processor else {})}},
    )
    if not has_processor:
        return [IMAGE_PROCESSOR_AUTO_MAP]
    if layout.result.kind == "chat":
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


def write_generation_config(
    target: Path, layout: Layout, config: Any, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes generation_config.json: where generation ends and what pads, and what the source says besides.

    Args:
        target: Folder of the result.
        layout: Of the source; a vision tower generates nothing.
        config: The result's configuration.
        source: The source.
        tokenizer: Of the result, or None: then the decoder's own end token is all that is known.
    """
    if layout.result.kind == "vision":
        return
    decoder = config.text_config
    parts = ("llm_config", "qllama_config", "text_config")
    nested = next((source.config[part] for part in parts if source.config.get(part)), source.config)
    settings = {**generation_settings(nested), **source.read_json("generation_config.json")}
    settings = {k: v for k, v in settings.items() if not k.startswith("_") and k not in REMOVED_GENERATION_KEYS}
    settings.pop("transformers_version", None)
    ends = _as_list(settings.get("eos_token_id", decoder.eos_token_id))
    if tokenizer is not None and layout.result.kind == "chat" and config.template:
        ends = get_conversation_template(config.template).end_token_ids(tokenizer) + ends
    ends = list(dict.fromkeys(ends))
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    pads = [pad, settings.get("pad_token_id"), decoder.pad_token_id, *ends, None]
    settings.update(
        bos_token_id=settings.get("bos_token_id", decoder.bos_token_id),
        eos_token_id=ends if len(ends) != 1 else ends[0],
        pad_token_id=next((value for value in pads if value is not None), None),
    )
    settings = {key: value for key, value in settings.items() if value not in (None, [])}
    GenerationConfig(**settings)  # raises where a value cannot be
    write_json(target / "generation_config.json", settings)


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
