"""InternVL-C and InternVL-G in one model."""

import torch
from specs import qllama
from specs.vision import IMAGE_SIZE, PATCH_SIZE, VISION


CONFIG = "configuration_internvl.InternVLConfig"
MODELS = ["modeling_internvl.InternVLModel"]
AUTO = {"AutoModel": MODELS[0], "AutoModelForZeroShotImageClassification": MODELS[0]}
GROUPS = ("model", "configuration")
NUM_TEXT = 7


def make_config(config_class: type) -> object:
    return config_class(
        vision_config=dict(VISION), qllama_config=dict(qllama.SIZES), clip_embed_dim=24, attn_pool_num_heads=4
    )


def make_inputs(config: object, batch_size: int) -> dict:
    ids = torch.randint(3, qllama.SIZES["vocab_size"], (batch_size, NUM_TEXT))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "mode": "InternVL-G",
    }


TESTER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
# `additional_model_inputs`: some tests pass the main input alone; this model compares two.
MODEL_ATTRS = {"_is_composite": True, "additional_model_inputs": ["pixel_values"]}
TOWERS = "of the towers, which `vision_model` and `qllama` give and the specifications `vision` and `qllama` test"
TENSOR = (
    "returns the embedding itself, as the published method does; hidden states come from `vision_model` and `qllama`"
)
NOT_RUN = {
    "test_attention_outputs": f"attentions are {TOWERS}",
    "test_hidden_states_output": f"hidden states are {TOWERS}",
    "test_retain_grad_hidden_states_attentions": f"hidden states are {TOWERS}",
    **{
        f"test_get_{kind}_features_{what}": TENSOR
        for kind in ("image", "text")
        for what in ("output_0", "output_1", "output_2", "hidden_states", "attentions")
    },
    **qllama.NOT_RUN,
}
SKIPS = {
    **qllama.SKIPS,
    "InternVLModel does not propagate hidden states*": f"hidden states are {TOWERS}",
    "No decoder-only language modeling head*": "scores images and texts; the head is tested with QLLaMA",
    "This model doesn't use `inputs_embeds`": "takes images and token ids",
    "Model does not have both a non-text modality tower and a language sub-model*": "looks for transformers' names",
    "Model does not support output_attentions": f"attentions are {TOWERS}",
}
