"""Decoders with configurations older than transformers 5: Phi-3, and rotary positions in every old spelling."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Phi3Config, Phi3ForCausalLM

from internvl.configuration_internvl import InternVLChatConfig
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny
from .fixtures_conversions import assert_same_weights, edit_json, json_of, run


PHI3 = {
    "model_type": "phi3",
    "vocab_size": 99,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FACTORS = {"short_factor": [1.0, 1.05, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0]}
# What such a release says besides, with the code that it came with.
PUBLISHED = {
    "architectures": ["Phi3ForCausalLM"],
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attention_bias": False,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
}


def without_record(model, folder: Path) -> Path:
    """A model in the published layout, as no conversion.json remembers it."""
    model.save_pretrained(folder / "model")
    source = run(folder / "model", folder / "published", to="published")
    (source / "conversion.json").unlink()
    return source


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A chat model with a Phi-3 decoder."""
    return without_record(tiny.chat_model(text_config=PHI3), tmp_path_factory.mktemp("phi3"))


def published_phi3(saved, folder, rope_scaling):
    source = shutil.copytree(saved, folder / "source")
    decoder = {key: value for key, value in json_of(source)["llm_config"].items() if not key.startswith("rope")}
    edit_json(source / "config.json", llm_config={**decoder, **PUBLISHED, "rope_scaling": rope_scaling})
    return source


@pytest.mark.parametrize("kind", [None, "su", "longrope", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_phi3_decoder_computes_what_transformers_own_does_and_goes_back(kind, key, saved, tmp_path):
    rope_scaling = {key: kind, **FACTORS} if kind else None
    source = published_phi3(saved, tmp_path, rope_scaling)
    out = run(source, tmp_path / "out", image_token_id=tiny.IMAGE_TOKEN_ID, verify=True)
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    assert type(model.language_model).__name__ == "Phi3ForCausalLM"

    today = {"rope_type": "longrope", **FACTORS} if kind else {"rope_type": "default"}
    reference = Phi3ForCausalLM(Phi3Config(**PHI3, rope_parameters={"rope_theta": 10000.0, **today})).eval()
    start = "language_model."
    weights = load_file(source / "model.safetensors")
    reference.load_state_dict({k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})
    # Shorter and longer than the positions it was first trained for: each has factors of its own.
    for length in (9, 33):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)

    back = run(out, tmp_path / "back", to="published")
    found, wanted = json_of(back), json_of(source)
    del wanted["llm_config"]["auto_map"]  # its code is not carried along
    assert found == wanted
    assert_same_weights(back, source)


def test_the_kind_of_rotary_positions_is_that_of_today_wherever_it_stands(saved, tmp_path):
    source = published_phi3(saved, tmp_path, {"type": "su", **FACTORS})
    decoder = json_of(run(source, tmp_path / "out", image_token_id=tiny.IMAGE_TOKEN_ID))["text_config"]
    assert decoder["rope_scaling"]["type"] == "longrope"
    assert not {"attn_implementation", "_attn_implementation", "auto_map", "torch_dtype"} & decoder.keys()
    # As transformers 5 saves them, with the old name.
    published = {key: value for key, value in json_of(source)["llm_config"].items() if not key.startswith("rope")}
    published["rope_parameters"] = {"rope_type": "su", "rope_theta": 5000.0, **FACTORS}
    edit_json(source / "config.json", llm_config=published)
    out = run(source, tmp_path / "out5", image_token_id=tiny.IMAGE_TOKEN_ID)
    found = InternVLChatConfig.from_pretrained(out).text_config.rope_parameters
    assert (found["rope_type"], found["rope_theta"]) == ("longrope", 5000.0)


@pytest.fixture(scope="module", params=["llama", "internlm2", "qwen2", "qwen3"])
def released(request, tmp_path_factory):
    """A decoder, and a chat model with it."""
    return request.param, without_record(tiny.chat_model(request.param), tmp_path_factory.mktemp("released"))


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_spellings_of_rotary_positions_are_read_for_every_decoder(key, kind, released, tmp_path):
    decoder, folder = released
    rotary = {"rope_theta": 5000.0, "rope_scaling": {key: kind, "factor": 2.0}}
    source = shutil.copytree(folder, tmp_path / "source")
    settings = {**json_of(source)["llm_config"], **rotary, "attn_implementation": "eager"}
    edit_json(source / "config.json", llm_config=settings)
    out = run(source, tmp_path / "out", image_token_id=tiny.IMAGE_TOKEN_ID)
    found = InternVLChatForConditionalGeneration.from_pretrained(out).eval()
    model = tiny.chat_model(text_config={**tiny.DECODERS[decoder], **rotary})  # with the same numbers
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)
