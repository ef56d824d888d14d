"""Outputs of the published code on tiny checkpoints in the published layouts: one conversion command, one
`from_pretrained`.

The models are loaded as remote code in one fresh process that cannot import the package; what they compute is compared
with what the published code computed, within the tolerance in each case.json, and tokens exactly.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl.conversion.__main__ import main

from .fixtures_processes import run_elsewhere


GOLDEN = Path(__file__).parent / "golden"
# Case to the configuration it is converted with: config.json, or another one of the same model.
CASES = {
    "intern_vit_6b": ("intern_vit_6b", "config.json"),
    "intern_vit_6b-without-norm-type": ("intern_vit_6b", "config_without_norm_type.json"),
    "intern_vit_300m": ("intern_vit_300m", "config.json"),
    "internvl_14b": ("internvl_14b", "config.json"),
    "chat_llama_v1": ("chat_llama_v1", "config.json"),
    "chat_llama_v1-full-config": ("chat_llama_v1", "config_full.json"),
    "chat_internlm2_v2": ("chat_internlm2_v2", "config.json"),
    "chat_qwen2_v2": ("chat_qwen2_v2", "config.json"),
    "internvl_14b_lora_peft04": ("internvl_14b_lora_peft04", "config.json"),
    "internvl_14b_lora_peft08": ("internvl_14b_lora_peft08", "config.json"),
    "llava_vit6b": ("llava_vit6b", "config.json"),
    "llava_vit6b-llava-llama": ("llava_vit6b", "config_llava_llama.json"),
    "llava_internvl14b": ("llava_internvl14b", "config.json"),
    "llava_internvl14b-llava-llama": ("llava_internvl14b", "config_llava_llama.json"),
}
# Beam search of the transformers of the time; recorded for information.
NOT_COMPARED = {"out.caption_beam4.tokens", "out.caption_beam4.sequences_scores"}

# Outputs with a row per token, and where the tokens are.
AT_TOKENS = {
    "out.logits": lambda tensors: tensors.get("in.attention_mask", tensors.get("out.attention_mask")).bool(),
    "out.ragged.inputs_embeds": lambda tensors: tensors["out.ragged.attention_mask"].bool(),
    "out.text_hidden_states": lambda tensors: tensors["in.text"] > 0,
}


def convert_case(name: str, folder: Path) -> Path:
    case, config_file = CASES[name]
    source = GOLDEN / case
    if config_file != "config.json":
        source = shutil.copytree(source, folder / "source" / name)
        (source / config_file).replace(source / "config.json")
    notes = json.loads((source / "case.json").read_text())
    command = [str(source), str(folder / name)]
    if "img_context_token_id" in notes:
        command += ["--image-token-id", str(notes["img_context_token_id"])]
    assert main(command) == 0
    return folder / name


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goldens")
    jobs = [
        {
            "case": str(GOLDEN / CASES[name][0]),
            "model": str(convert_case(name, folder)),
            "results": f"{folder / name}.st",
        }
        for name in CASES
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    runner = Path(__file__).with_name("golden_runner.py")
    run_elsewhere(folder, runner, folder / "jobs.json")
    return {name: load_file(f"{folder / name}.st") for name in CASES}


def expected_of(name: str) -> tuple[dict, dict]:
    folder = GOLDEN / CASES[name][0]
    tensors = load_file(folder / "io.safetensors")
    return json.loads((folder / "case.json").read_text()), tensors


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_output_is_computed(name, results):
    _, tensors = expected_of(name)
    assert {key for key in tensors if key.startswith("out.")} - NOT_COMPARED == set(results[name])


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_exactly_those_of_the_published_code(name, results):
    _, tensors = expected_of(name)
    tokens = [key for key in results[name] if key.endswith("tokens")]
    for key in tokens:
        found = results[name][key]
        # The published run pads rows that ended to the full length; `generate` of today stops when all have ended.
        assert torch.equal(found, tensors[key][:, : found.shape[1]]), key
        assert (tensors[key][:, found.shape[1] :] == 0).all(), key


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_published_code_within_its_tolerance(name, results):
    notes, tensors = expected_of(name)
    tolerance = notes["tolerance"]["fp32"]
    for key, found in results[name].items():
        wanted = tensors[key]
        if not found.is_floating_point():
            assert key.endswith("tokens") or torch.equal(found, wanted), key
            continue
        if key in AT_TOKENS:  # what stands at padding is no result
            kept = AT_TOKENS[key](tensors)
            found, wanted = found[kept], wanted[kept]
        limits = dict(tolerance)
        if "logits_per" in key and "logits_per_image" in notes["tolerance"]:
            limits["atol"] = notes["tolerance"]["logits_per_image"]["atol"]
        torch.testing.assert_close(found, wanted, **limits, msg=lambda text, key=key: f"{key}: {text}")
