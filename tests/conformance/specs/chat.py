"""InternVL-Chat in the simple configuration, its processor and its image processor.

The decoder is a mixture of experts, as in the largest of the later releases, so that the tests of experts run too;
`chat_full` has a dense one.
"""

from collections.abc import Callable
from typing import Any

import torch
from fixtures_text import make_tokenizer
from specs.common import MACHINE, NO_SUCH_PART
from specs.vision import IMAGE_SIZE, PATCH_SIZE, VISION


CONFIG = "configuration_internvl.InternVLChatConfig"
MODELS = [
    "modeling_internvl_chat.InternVLChatForConditionalGeneration",
    "modeling_internvl_chat.InternVLChatBaseModel",
]
AUTO = {"AutoModel": MODELS[1], "AutoModelForImageTextToText": MODELS[0]}
GROUPS = ("model", "generation", "training", "tensor_parallel", "configuration", "processor", "image_processor")
# The mixins write ids of their own: 0 to 19, the last of the vocabulary, random ones. A placeholder among them would
# ask for an image.
IMAGE_TOKENS, IMAGE_TOKEN = 4, 30
RANDOM_IDS_BELOW = IMAGE_TOKEN
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def make_config(config_class: type) -> object:
    return config_class(vision_config=dict(VISION), text_config={**TEXT, **EXPERTS}, image_token_id=IMAGE_TOKEN)


def make_inputs(config: object, batch_size: int) -> dict:
    ids = torch.randint(IMAGE_TOKEN + 1, 98, (batch_size, 7 + config.num_image_token))
    ids[:, : config.num_image_token] = IMAGE_TOKEN
    return {
        "pixel_values": torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


TESTER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_image_tokens": IMAGE_TOKENS}


def prepare_for_class(self: object, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
    """As in the mixin. Where a test passes the ids alone, the images of their placeholders are added: the model
    refuses to go on without them."""
    from tests.test_modeling_common import ModelTesterMixin

    inputs = ModelTesterMixin._prepare_for_class(self, inputs, model_class, return_labels)
    if "input_ids" in inputs and "pixel_values" not in inputs:
        count = int((inputs["input_ids"] == IMAGE_TOKEN).sum()) // self.model_tester.num_image_tokens
        inputs["pixel_values"] = torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return inputs


MODEL_ATTRS = {"_is_composite": True, "_prepare_for_class": prepare_for_class}
CONFIGURATION = {}

IMAGE_PROCESSOR = "image_processing_internvl.InternVLImageProcessor"
# One tile per image, which is the number that the mixin counts on; the other modes are in `image_modes`.
IMAGE_SETTINGS = {"tiles": {"size": {"height": 20, "width": 20}, "resize_mode": "tiles", "max_num": 1}}

PROCESSOR = "processing_internvl.InternVLProcessor"


def processor_settings(load_class: Callable[[str], Any]) -> dict:
    template = load_class("conversation_internvl.get_conversation_template")("internvl")
    return {"image_seq_length": IMAGE_TOKENS, "chat_template": template.to_jinja()}


def make_components(load_class: Callable[[str], Any]) -> dict:
    return {
        "image_processor": load_class(IMAGE_PROCESSOR)(size={"height": 28, "width": 28}, max_num=1),
        "tokenizer": make_tokenizer(),
    }


NOT_RUN = {
    "test_model_base_model_prefix": "the parts have their published names: the class with the head holds no other",
}
SKIPS = {
    **MACHINE,
    **NO_SUCH_PART,
    "Model is not an encoder-decoder": "no encoder-decoder",
    "*does not have partial rope supported": "the decoder's own affair",
    "*does not support SDPA": "the message of a test for models of one part; the one for composite models runs",
    "*video_processor attribute not present*": "videos are given as frames",
    "*has no video processor": "videos are given as frames",
    "*feature_extractor attribute not present*": "no sound",
    "*has no audio processor": "no sound",
    "audio_processor attribute not present*": "no sound",
    "Chat template does not support tools": "the published templates have no tools",
    "Processor doesn't accept videos at input": "videos are given as frames",
    "test requires librosa": "no sound",
    "test requires Torchcodec": "videos are given as frames",
    "No validation found for `preprocess` method": "settings are validated, but not as it looks for",
    "*does not have dict size or list image_mean*": "sizes are immutable, so no instance can change another's",
}
