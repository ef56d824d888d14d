"""Files of the published Hub layouts beside weights, configuration and tokenizer."""

from pathlib import Path

from ...configuration_internvl import InternVLChatConfig
from ...conversation_internvl import IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER, get_conversation_template
from ...image_processing_internvl import InternVLImageProcessor
from ..readers.checkpoint_files import is_plain
from ..repository.code import PACKAGE, copy_code, write_json
from ..repository.result import Result


# Modules for the names in `auto_map`, by which even engines that build the model themselves load the configuration.
_CONFIG = '''\
"""The configuration under its published name."""

from .configuration_internvl import {own} as _{own}


class {published}(_{own}):
    """As in configuration_internvl."""

    model_type = "{model_type}"
'''
_TOWER = '''\
"""The model under its published name."""

from .configuration_intern_vit import InternVisionConfig
from .modeling_internvit import InternVisionModel as _InternVisionModel


class InternVisionModel(_InternVisionModel):
    """As in modeling_internvit."""

    config: InternVisionConfig
    config_class = InternVisionConfig
'''
_VISION_MODULES = {
    "configuration_intern_vit.py": _CONFIG.format(
        own="InternViTConfig", published="InternVisionConfig", model_type="intern_vit_6b"
    ),
    "modeling_intern_vit.py": _TOWER,
}
# Class of the model to modules and their text. InternVL-14B has the names of this package, but for its tower, whose
# configuration names modules too, as in chat models.
PUBLISHED_MODULES = {
    "InternVisionModel": _VISION_MODULES,
    "InternVLModel": _VISION_MODULES,
    "InternVLChatForConditionalGeneration": {
        **_VISION_MODULES,
        "configuration_internvl_chat.py": _CONFIG.format(
            own="InternVLChatConfig", published="InternVLChatConfig", model_type="internvl_chat"
        ),
    },
}
# Where a file of this package has the published name already, and the class in it another one.
PUBLISHED_NAMES = {"InternVLChatForConditionalGeneration": ("modeling_internvl_chat.py", "InternVLChatModel")}


def write_published_code(folder: Path, result: Result) -> None:
    """Copies the code of this package, and gives it the published names."""
    own = result.model_class.__name__
    copy_code(folder, [result.auto_map])
    for name, text in PUBLISHED_MODULES.get(own, {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    if own in PUBLISHED_NAMES:
        name, published = PUBLISHED_NAMES[own]
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(_published_name(own, published))


def own_contents(name: str) -> list[bytes]:
    """Contents that a file of this name may have where this package wrote it, in any format."""
    texts = {modules[name] for modules in PUBLISHED_MODULES.values() if name in modules}
    contents = [text.encode("utf-8") for text in sorted(texts)]
    if is_plain(name) and (PACKAGE / name).is_file():
        content = (PACKAGE / name).read_bytes()
        contents.append(content)
        named = [(own, published) for own, (file, published) in PUBLISHED_NAMES.items() if file == name]
        contents += [content + _published_name(own, published).encode("utf-8") for own, published in named]
    return contents


def _published_name(own: str, published: str) -> str:
    return f"\n{published} = {own}  # its published name\n"


def write_published_template(folder: Path, config: InternVLChatConfig) -> None:
    """Writes the chat template, if any. It marks images as the published code and engines do, with `<image>`."""
    if config.template is not None:
        text = get_conversation_template(config.template).to_jinja().replace(IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def write_clip_settings(folder: Path, image_processor: InternVLImageProcessor) -> None:
    """Writes preprocessor_config.json for CLIP's image processor, which the published snippets use."""
    size = dict(image_processor.size)
    side = size.get("shortest_edge") or size.get("height")
    crop = dict(image_processor.crop_size or {}).get("height", side)
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": crop,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(image_processor.image_mean),
            "image_std": list(image_processor.image_std),
            "resample": int(image_processor.resample),
            "size": side,
        },
    )
