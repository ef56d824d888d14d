"""Training models and batches for tests: tiny ones, and those recorded from the published code
(golden/internvl_14b_training...).
"""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from internvl.configuration_internvl import InternVLConfig
from internvl.training.models.pretraining import InternVLForGenerativeTraining, InternVLForRetrievalTraining

from . import tiny


GOLDEN = Path(__file__).parent / "golden"
# What the published code counts as an empty text (QUIRKS of stage 2): `<s></s>`, and `<s> summarize : </s>` of that
# tokenizer.
PREFIXES = {"matching_prefix_length": 2, "summarize_prefix_length": 5}


def tiny_model(cls: type, num_query_token: int = 5, **settings) -> torch.nn.Module:
    """A tiny training model with random weights, in training mode."""
    parts = {"vision_config": dict(tiny.VISION), "qllama_config": dict(tiny.QLLAMA)}
    config = InternVLConfig(**parts, num_query_token=num_query_token, clip_embed_dim=12, attn_pool_num_heads=4)
    model = tiny.randomize(cls(config, **settings)).train()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    return model


def contrastive_batch(batch: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels(batch, seed=seed), "input_ids": tiny.text_ids(batch, seed=seed)}


def caption_batch(batch: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = generative_batch(batch, seed)
    return {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask", "labels")}


def generative_batch(batch: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of stage 2 whose texts have lengths of their own, padded on the right."""
    names = {"positive": 6, "negative": 9, "summarize": 8, "": 7}
    inputs = {"pixel_values": tiny.pixels(batch, seed=seed)}
    for number, (name, longest) in enumerate(names.items()):
        rows = [tiny.text_ids(1, longest - i % 3, seed=100 * seed + 10 * number + i)[0] for i in range(batch)]
        prefix = f"{name}_" if name else ""
        inputs |= {prefix + key: value for key, value in tiny.pad(rows, "right").items()}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"][:, :2] = -100
    return inputs


def retrieval_batch(batch: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of retrieval fine-tuning, two captions for some of the images."""
    inputs = generative_batch(batch, seed)
    kept = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "labels")}
    return kept | {"image_ids": torch.arange(batch) // 2}


@cache
def tensors(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "io.safetensors")


@cache
def notes(case: str) -> dict:
    return json.loads((GOLDEN / case / "case.json").read_text())


def golden_model(tag: str, **settings) -> torch.nn.Module:
    """The recorded checkpoint as the training model of a case."""
    config = json.loads((GOLDEN / "internvl_14b" / "config.json").read_text())
    for part in (config, config["vision_config"], config["qllama_config"]):
        part.pop("model_type")
    if tag == "retrieval":
        model = InternVLForRetrievalTraining(InternVLConfig(**config), **settings)
    else:
        model = InternVLForGenerativeTraining(InternVLConfig(**config), **PREFIXES, **settings)
    model.load_state_dict(load_file(GOLDEN / "internvl_14b" / "model.safetensors"))
    return model.train()


def golden_inputs(case: str, prefix: str) -> dict[str, torch.Tensor]:
    """A recorded batch; the published retrieval model takes three inputs that it does not use."""
    unused = ("input_ids", "attention_mask", "labels") if "retrieval" in prefix else ()
    given = {key.split(".in.")[1]: value for key, value in tensors(case).items() if key.startswith(f"{prefix}.in.")}
    return {key: value for key, value in given.items() if key not in unused}
