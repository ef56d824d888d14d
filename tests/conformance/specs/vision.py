"""InternViT: the tower, its backbone and its heads for classification and segmentation."""

import unittest

import torch
from specs.common import MACHINE, NO_SUCH_PART, NO_TEXT, NOT_COMPOSITE
from torch import nn


CONFIG = "configuration_internvl.InternViTConfig"
MODELS = [
    "modeling_internvit.InternViTForImageClassification",
    "modeling_internvit.InternVisionModel",
    "modeling_internvit.InternViTForSemanticSegmentation",
]
BACKBONE = "modeling_internvit.InternViTBackbone"
AUTO = {
    "AutoModel": MODELS[1],
    "AutoModelForImageClassification": MODELS[0],
    "AutoBackbone": BACKBONE,
    "AutoModelForSemanticSegmentation": MODELS[2],
}
GROUPS = ("model", "backbone", "configuration")
IMAGE_SIZE, PATCH_SIZE = 28, 7
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


def make_config(config_class: type) -> object:
    return config_class(**VISION)


def make_inputs(config: object, batch_size: int) -> dict:
    return {"pixel_values": torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)}


TESTER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "seq_length": 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2}


def check_embeddings(self: unittest.TestCase) -> None:
    """In place of the mixin's, which expects token embeddings: transformers' own vision towers do the same."""
    config, _ = self.model_tester.prepare_config_and_inputs_for_common()
    for model_class in self.all_model_classes:
        model = model_class(config)
        self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
        self.assertIsNone(model.get_output_embeddings())


MODEL_ATTRS = {"test_resize_embeddings": False, "test_model_get_set_embeddings": check_embeddings}
CONFIGURATION = {"hidden_size": 32, "num_attention_heads": 4}
SKIPS = {**MACHINE, **NO_SUCH_PART, **NO_TEXT, **NOT_COMPOSITE}
