"""InternVL-Chat in the simple configuration, its processor and its image processor."""

import torch
from fixtures_text import make_tokenizer
from internvl.conversation_internvl import get_conversation_template
from specs.common import MACHINE, NO_SUCH_PART
from specs.vision import IMAGE_SIZE, PATCH_SIZE, VISION


CONFIG = "configuration_internvl.InternVLChatConfig"
MODELS = ["modeling_internvl_chat.InternVLChatForConditionalGeneration"]
AUTO = {
    "AutoModel": MODELS[0],
    "AutoModelForImageTextToText": MODELS[0],
}
GROUPS = ("model", "generation", "training", "tensor_parallel", "configuration", "processor", "image_processor")
# The mixins write ids of their own, all small or below RANDOM_IDS_BELOW; a placeholder among them would ask for a picture.
IMAGE_TOKENS, IMAGE_TOKEN = 4, 98
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


def make_config(config_class: type) -> object:
    return config_class(vision_config=dict(VISION), text_config=dict(TEXT), image_token_id=IMAGE_TOKEN)


def make_inputs(config: object, batch_size: int) -> dict:
    ids = torch.randint(5, 98, (batch_size, 7 + config.num_image_token))
    ids[:, : config.num_image_token] = IMAGE_TOKEN
    return {
        "pixel_values": torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


TESTER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_image_tokens": IMAGE_TOKENS}
MODEL_ATTRS = {"_is_composite": True}
CONFIGURATION = {}

IMAGE_PROCESSOR = "image_processing_internvl.InternVLImageProcessor"
IMAGE_SETTINGS = {"size": {"height": 20, "width": 20}, "resize_mode": "squash"}

PROCESSOR = "image_processing_internvl.InternVLImageProcessor"
IMAGE_SETTINGS = {"size": {"height": 20, "width": 20}, "resize_mode": "squash"}


def image_output_shape(images: list) -> tuple:
    return len(images), 3, 20, 20


PROCESSOR = "processing_internvl.InternVLProcessor"
PROCESSOR_SETTINGS = {
    "image_seq_length": IMAGE_TOKENS,
    "chat_template": get_conversation_template("internvl").to_jinja(),
}


def make_components(load_class: object) -> dict:
    return {
        "image_processor": load_class(IMAGE_PROCESSOR)(size={"height": 28, "width": 28}, max_num=1),
        "tokenizer": make_tokenizer(),
    }


NOT_RUN = {
    "test_model_base_model_prefix": "the parts lie side by side under their published names; no headless model is inside",
    "test_new_models_require_torchvision_backend": "pixels are those of the published Pillow path, so there is one backend",
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
    "test requires librosa": "no sound",
    "test requires Torchcodec": "videos are given as frames",
    "*less than 2 backends": "pixels are those of the published Pillow path, so there is one backend",
    "*torchvision backend is not available": "pixels are those of the published Pillow path, so there is one backend",
    "No validation found for `preprocess` method": "settings are validated, but not by the two mechanisms this test looks for",
    "*does not have dict size or list image_mean*": "sizes are immutable, so no instance can change another's",
}
