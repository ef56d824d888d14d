"""InternVL-C and InternVL-G in one model."""

import torch
from specs.common import MACHINE, NO_SUCH_PART
from specs.qllama import SIZES as QLLAMA
from specs.vision import IMAGE_SIZE, PATCH_SIZE, VISION


CONFIG = "configuration_internvl.InternVLConfig"
MODELS = ["modeling_internvl.InternVLModel"]
AUTO = {"AutoModel": MODELS[0], "AutoModelForZeroShotImageClassification": MODELS[0]}
GROUPS = ("model", "configuration")
NUM_TEXT = 7


def make_config(config_class: type) -> object:
    return config_class(
        vision_config=dict(VISION), qllama_config=dict(QLLAMA), clip_embed_dim=24, attn_pool_num_heads=4
    )


def make_inputs(config: object, batch_size: int) -> dict:
    ids = torch.randint(3, QLLAMA["vocab_size"], (batch_size, NUM_TEXT))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "mode": "InternVL-G",
    }


TESTER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
MODEL_ATTRS = {"_is_composite": True}
SKIPS = {**MACHINE, **NO_SUCH_PART}
