"""Chat models with random weights, and the same weights in transformers' own class by this package's conversion."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration
from internvl.conversion import convert

from .harness import Options


IMAGE_TOKEN_ID = 3


def build_chat(
    vision: dict[str, Any], text: dict[str, Any], options: Options, **settings: Any
) -> InternVLChatForConditionalGeneration:
    """A chat model of which only the sizes are given: a tower of the flavour that native has too, and a Qwen2 decoder.

    Generation never ends before the number of tokens that is asked for.
    """
    torch.manual_seed(0)
    config = InternVLChatConfig(
        vision_config={"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, **vision},
        text_config={"model_type": "qwen2", "tie_word_embeddings": True, **text},
        image_token_id=IMAGE_TOKEN_ID,
        ps_version="v2",
        select_layer=-1,
        **settings,
    )
    with torch.device(options.device):
        model = InternVLChatForConditionalGeneration._from_config(config, dtype=options.dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build_pair(
    vision: dict[str, Any], text: dict[str, Any], options: Options
) -> tuple[InternVLChatForConditionalGeneration, InternVLForConditionalGeneration]:
    """Ours and transformers' own with the same weights, type and device, both as users have them: loaded from files.

    Memory that a file is mapped into is read at another speed than memory that was allocated, and one mapping at
    another than the next: the decoders, of one class, share their weights.
    """
    model = build_chat(vision, text, options)
    how = {"dtype": model.dtype, "device_map": model.device}
    with tempfile.TemporaryDirectory() as folder:
        own, native = Path(folder) / "own", Path(folder) / "native"
        model.save_pretrained(own)
        convert(own, native, to="native", show_progress=False)
        pair = type(model).from_pretrained(own, **how), InternVLForConditionalGeneration.from_pretrained(native, **how)
    ours, native_model = pair
    native_model.model.language_model.load_state_dict(ours.language_model.model.state_dict(), assign=True)
    native_model.lm_head.load_state_dict(ours.language_model.lm_head.state_dict(), assign=True)
    for loaded in pair:
        loaded.generation_config = model.generation_config
    return pair[0].eval(), pair[1].eval()
