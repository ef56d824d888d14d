"""QLLaMA, with queries in front of the text and an image to look at."""

import torch
from specs.common import MACHINE, NO_SUCH_PART, NOT_COMPOSITE


CONFIG = "configuration_internvl.QLlamaConfig"
MODELS = ["modeling_qllama.QLlamaForCausalLM", "modeling_qllama.QLlamaModel"]
AUTO = {"AutoModel": MODELS[1], "AutoModelForCausalLM": MODELS[0]}
GROUPS = ("model", "generation", "training", "tensor_parallel", "configuration")
NUM_QUERIES, NUM_TEXT, NUM_PATCHES = 4, 7, 6
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vision_hidden_size": 32,
    "num_query_token": NUM_QUERIES,
}


def make_config(config_class: type) -> object:
    return config_class(**SIZES)


def make_inputs(config: object, batch_size: int) -> dict:
    ids = torch.randint(3, config.vocab_size, (batch_size, NUM_TEXT))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "query_embeds": torch.randn(batch_size, config.num_query_token, config.hidden_size),
        "vision_hidden_states": torch.randn(batch_size, NUM_PATCHES, config.vision_hidden_size),
    }


def make_generation_inputs(config: object, batch_size: int) -> dict:
    """`generate` counts the queries too: placeholders stand in front of the text for them."""
    inputs = make_inputs(config, batch_size)
    for name, filler in (("input_ids", 0), ("attention_mask", 1)):
        queries = torch.full((batch_size, NUM_QUERIES), filler)
        inputs[name] = torch.cat([queries, inputs[name]], dim=1)
    return inputs


PADDING_START = NUM_QUERIES


def to_forward(inputs: dict) -> dict:
    return {**inputs, **{name: inputs[name][:, NUM_QUERIES:] for name in ("input_ids", "attention_mask")}}


TESTER = {"encoder_seq_length": NUM_QUERIES + NUM_TEXT, "key_length": NUM_QUERIES + NUM_TEXT}
CONFIGURATION = {"hidden_size": 32, "num_attention_heads": 4}
NOT_RUN = dict.fromkeys(
    (f"test_model_rope_scaling_from_config_{kind}" for kind in ("0_linear", "1_dynamic", "2_yarn")),
    "plain rotary positions, as published; the configuration refuses scaled ones",
)
SKIPS = {
    **MACHINE,
    **NO_SUCH_PART,
    **NOT_COMPOSITE,
    "*no standardized RoPE module*": "rotary angles are a function, so that no buffer can be left uninitialised",
    "*does not have partial rope supported": "plain rotary positions, as published",
}
