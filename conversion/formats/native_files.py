"""Files of transformers' native InternVL processor. It needs no remote code, but torchvision, for its videos."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...configuration_internvl import InternVLChatConfig
from ...conversation_internvl import get_conversation_template
from ...image_processing_internvl import InternVLImageProcessor
from ..readers.checkpoint_files import read_json
from ..repository.code import write_json
from ..repository.tokenizer import NATIVE_TOKENS, VIDEO_TOKEN


# What the template of a conversation refuses here, the native processor replaces.
_NO_MORE_PARTS = "{%- else -%}\n{{- raise_exception('Unknown content part"
_VIDEO_PART = "{%- elif part['type'] == 'video' -%}\n{{- " + json.dumps(VIDEO_TOKEN + "\n") + " -}}\n"


def native_notes(config: InternVLChatConfig) -> list[str]:
    """Lists where the native image processor differs from the one here."""
    notes = []
    if config.pad2square and not config.dynamic_image_size:
        notes.append("The native image processor cannot pad images to squares: pass images that are square.")
    if config.dynamic_image_size and not config.use_thumbnail:
        notes.append(
            "The native image processor always adds a thumbnail to tiles; this checkpoint was trained without."
        )
    if config.template is None:
        notes.append("`template` is not set, so the result has no chat template.")
    return notes


def write_native_files(
    folder: Path,
    config: InternVLChatConfig,
    image_processor: InternVLImageProcessor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Writes settings of the native processors, and names the image tokens in those of the tokenizer.

    Without a tokenizer, which is written before, no processor is written.
    """
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "processor_class": "InternVLProcessor",
        "resample": int(image_processor.resample),
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    # The native processor always asks for tiles; one of them is the whole image.
    smallest, largest = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
    tiles = {"crop_to_patches": config.dynamic_image_size, "min_patches": smallest, "max_patches": largest}
    write_json(
        folder / "preprocessor_config.json", {**common, **tiles, "image_processor_type": "GotOcr2ImageProcessor"}
    )
    if tokenizer is None:
        return
    write_json(folder / "video_preprocessor_config.json", {**common, "video_processor_type": "InternVLVideoProcessor"})
    write_json(
        folder / "processor_config.json",
        {"image_seq_length": config.num_image_token, "processor_class": "InternVLProcessor"},
    )
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**settings, **NATIVE_TOKENS, "padding_side": "left"})
    if config.template is not None:
        template = get_conversation_template(config.template).to_jinja()
        text = template.replace(_NO_MORE_PARTS, _VIDEO_PART + _NO_MORE_PARTS)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
