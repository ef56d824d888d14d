"""Quantised loading: with every quantiser, exactly the decoder or QLLaMA is quantised; what is saved loads again."""

import json
import re
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from internvl.configuration_internvl import InternVLConfig
from internvl.modeling_internvl import InternVLModel

from . import tiny


# bitsandbytes computes on the CPU in blocks of 32 and 64.
VISION = {**tiny.VISION, "hidden_size": 64, "intermediate_size": 128}
QLLAMA = {**tiny.QLLAMA, "hidden_size": 64, "intermediate_size": 128, "vision_hidden_size": 64}
WIDTH = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def contrastive(**changes) -> InternVLModel:
    config = InternVLConfig(
        vision_config=VISION, qllama_config=QLLAMA, clip_embed_dim=32, attn_pool_num_heads=4, **changes
    )
    return tiny.randomize(InternVLModel(config))


def chat_settings(decoder: str, connector: str) -> dict:
    settings = {"vision_config": VISION, "text_config": {**tiny.DECODERS[decoder], **WIDTH}, "connector": connector}
    return settings if connector == "patches" else {**settings, "qllama_config": QLLAMA}


def chat(decoder: str = "llama", connector: str = "patches") -> nn.Module:
    return tiny.chat_model(decoder, **chat_settings(decoder, connector))


# What makes the model, its inputs, and what its quantised linear layers are called: all that match, nothing else.
MODELS = {
    "C": (contrastive, tiny.MODELS["InternVLModel-C"][1], r"qllama\.model\.layers\."),
    "G": (contrastive, tiny.MODELS["InternVLModel-G"][1], r"qllama\.model\.layers\."),
    "chat": (chat, tiny.chat_inputs, r"language_model\.model\.layers\."),
    "chat-full": (
        lambda: chat("internlm2", "queries_and_patches"),
        tiny.chat_inputs,
        r"(language_model\.model|qllama)\.layers\.",
    ),
    "chat-base": (
        lambda: tiny.chat_base_model("qwen2", **chat_settings("qwen2", "patches")),
        tiny.chat_inputs,
        r"language_model\.layers\.",
    ),
    **{
        pooling: (
            partial(tiny.classifier, pooling, hidden_size=64, intermediate_size=128),
            lambda model: {"pixel_values": tiny.pixels()},
            r"vision_model\.encoder\.layers\.",
        )
        for pooling in ("cls_patch_concat", "attention_pooling", "clip_projector")
    },
}


def with_torchao(**settings) -> dict:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), **settings)}


def with_bitsandbytes(**settings) -> dict:
    pytest.importorskip("bitsandbytes")
    return settings


# What goes to `from_pretrained`, and how close the outputs must be to those of bf16.
QUANTIZERS = {
    "nf4": (lambda: with_bitsandbytes(load_in_4bit=True), 0.9),
    "int8": (lambda: with_bitsandbytes(load_in_8bit=True), 0.995),
    "torchao": (with_torchao, 0.995),
}
everywhere = [
    *((name, "nf4") for name in MODELS),
    *((name, quantizer) for quantizer in ("int8", "torchao") for name in ("G", "chat-full")),
]


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def quantized_layers(model: nn.Module) -> set[str]:
    """Names of the layers whose weight is not a plain tensor of floating-point numbers."""
    return {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if not parameter.dtype.is_floating_point or hasattr(parameter, "tensor_data_names")
    }


@torch.no_grad()
def test_int8_says_once_that_it_casts_its_inputs_not_for_every_layer_and_token(tmp_path, caplog):
    make, inputs, _ = MODELS["chat-full"]
    make().save_pretrained(tmp_path)
    model = make().__class__.from_pretrained(tmp_path, dtype=torch.float32, **with_bitsandbytes(load_in_8bit=True))
    for _ in range(3):
        model(**inputs(model))
    said = [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]
    assert len(said) <= 1


@pytest.mark.parametrize(("name", "quantizer"), everywhere)
@torch.no_grad()
def test_exactly_the_intended_layers_are_quantized_and_the_outputs_stay_close(name, quantizer, tmp_path):
    (make, inputs, pattern), (settings, least_cosine) = MODELS[name], QUANTIZERS[quantizer]
    model = make()
    model.save_pretrained(tmp_path)
    exact = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    small = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, **settings())
    expected = {layer for layer in linear_layers(model) if re.match(pattern, layer)}
    assert quantized_layers(small) == expected != set()
    others = {key: value for key, value in exact.named_parameters() if key.removesuffix(".weight") not in expected}
    found = dict(small.named_parameters())
    assert all(torch.equal(found[key], value) and found[key].dtype == torch.bfloat16 for key, value in others.items())
    scores = [tiny.main_output(each(**inputs(model))).float().flatten() for each in (small, exact)]
    assert torch.cosine_similarity(*scores, dim=0) > least_cosine


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
@pytest.mark.parametrize("name", ["G", "chat"])
@torch.no_grad()
def test_a_quantized_model_that_was_used_is_saved_and_loads_with_equal_outputs(name, quantizer, tmp_path):
    (make, inputs, _), (settings, _) = MODELS[name], QUANTIZERS[quantizer]
    model = make()
    given = inputs(model)
    model.save_pretrained(tmp_path / "full")
    small = type(model).from_pretrained(tmp_path / "full", dtype=torch.bfloat16, **settings())
    before = tiny.main_output(small(**given))
    small.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert quantized_layers(again) == quantized_layers(small) != set()
    assert torch.equal(tiny.main_output(again(**given)), before)
    assert torch.equal(tiny.main_output(small(**given)), before)
    saved = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    skipped = saved.get("llm_int8_skip_modules") or saved.get("modules_to_not_convert")
    assert set(skipped) >= set(model._modules_kept_unquantized)


def test_a_configuration_without_a_skip_list_gets_that_of_the_model(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = chat()
    model.save_pretrained(tmp_path)
    layers = {name for name in linear_layers(model) if name.startswith("language_model.model.layers.")}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    for given in (config, config.to_dict()):
        small = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=given)
        assert quantized_layers(small) == layers
        assert small.language_model.model.layers[0].mlp.up_proj.weight.quant_type == "fp4"
    assert config.llm_int8_skip_modules is None  # the caller's own object stays as it was


def test_a_model_in_4_bits_generates_and_one_size_is_chosen(tmp_path):
    model = chat()
    model.save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, **with_bitsandbytes(load_in_4bit=True))
    assert small.generate(**tiny.chat_inputs(small), max_new_tokens=2).shape[0] == 3
    with pytest.raises(ValueError, match="only one of `load_in_8bit`, `load_in_4bit`"):
        type(model).from_pretrained(tmp_path, load_in_4bit=True, load_in_8bit=True)


OWN = ["vision_model", "language_model.model.layers.0", "language_model.lm_head"]


@pytest.mark.parametrize(
    "settings",
    [
        lambda: with_bitsandbytes(
            quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=OWN)
        ),
        lambda: with_torchao(modules_to_not_convert=OWN),
    ],
    ids=["bitsandbytes", "torchao"],
)
def test_a_skip_list_of_the_callers_own_is_respected(settings, tmp_path):
    model = chat()
    model.save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, **settings())
    kept = tuple(f"{name}." for name in OWN)
    expected = {name for name in linear_layers(model) if not f"{name}.".startswith(kept)}
    assert quantized_layers(small) == expected
    assert any(name.startswith("mlp1.") for name in expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_skip_list_means_the_same_to_every_matching_rule(name):
    """Earlier releases search an entry anywhere in a name, later ones at its start: full dotted paths satisfy both."""
    model = MODELS[name][0]()
    kept, layers = model._modules_kept_unquantized, linear_layers(model)
    at_start = {layer for layer in layers if any(f"{layer}.".startswith(f"{entry}.") for entry in kept)}
    anywhere = {layer for layer in layers if any(entry in layer for entry in kept)}
    assert at_start == anywhere != set()
