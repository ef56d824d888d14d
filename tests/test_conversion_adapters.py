"""LoRA adapters that are merged during conversion: in every spelling and place, and what is refused.

The contract: a merged weight is `W + alpha / rank * B @ A`, computed in fp32, in the type of W; nothing else changes.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from internvl.conversion.__main__ import main

from .fixtures_conversions import assert_rejected, edit_json, edited_weights, json_of, told, weights_of
from .fixtures_conversions import run as convert
from .fixtures_published import GOLDEN, published


PEFT04, PEFT08 = "internvl_14b_lora_peft04", "internvl_14b_lora_peft08"
QKV = "vision_model.encoder.layers.0.attn.qkv"


def run(source, out, **settings):
    return weights_of(convert(source, out, **settings))


def wrap(tensors: dict, module: str, prefix: str, rank: int, base_layer: str = "", seed: int = 0) -> torch.Tensor:
    """Puts an adapter around a layer as PEFT does; returns `B @ A`."""
    generator = torch.Generator().manual_seed(seed)
    weight = tensors.pop(f"{module}.weight")
    wrapped = prefix + module.removeprefix(prefix.split("base_model")[0])
    down = torch.randn(rank, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], rank, generator=generator)
    tensors[f"{wrapped}{base_layer}.weight"] = weight
    tensors[f"{wrapped}.lora_A.default.weight"], tensors[f"{wrapped}.lora_B.default.weight"] = down, up
    return up @ down


# ------------------------------------------------------------------------------------------------- wrapped checkpoints
@pytest.mark.parametrize("case", [PEFT04, PEFT08])
def test_both_spellings_give_the_recorded_weights(case, tmp_path):
    found = run(GOLDEN / case, tmp_path / "out")
    recorded = load_file(GOLDEN / case / "io.safetensors")
    wanted = {name.removeprefix("merged."): x for name, x in recorded.items() if name.startswith("merged.")}
    assert len(wanted) > 3
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert not any("lora" in name or "base_" in name for name in found)


def test_the_configuration_says_what_the_result_is(tmp_path):
    run(GOLDEN / PEFT08, tmp_path / "out")
    written = json_of(tmp_path / "out")
    assert (written["use_backbone_lora"], written["use_qllama_lora"]) == (0, 0)
    assert written["vision_config"]["image_size"] == written["force_image_size"] == 84
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.vision_model.embeddings.position_embedding.shape[1] == model.vision_model.config.num_patches + 1


def test_the_size_of_the_tower_stays_where_its_positions_have_it(tmp_path):
    source = published("internvl_14b", tmp_path)
    size = json_of(source)["vision_config"]["image_size"]
    edit_json(source / "config.json", force_image_size=size + 28)
    run(source, tmp_path / "out")
    assert json_of(tmp_path / "out")["vision_config"]["image_size"] == size


@pytest.mark.parametrize("base_layer", ["", ".base_layer"])
@pytest.mark.parametrize("case", ["chat_llama_v1", "chat_internlm2_v2"])
def test_chat_models_are_merged_in_tower_and_decoder(case, base_layer, tmp_path):
    source = published(case, tmp_path, use_backbone_lora=4, use_llm_lora=3)
    layer = {
        "chat_llama_v1": "language_model.model.layers.0.self_attn.q_proj",
        "chat_internlm2_v2": "language_model.model.layers.1.attention.wqkv",
    }[case]
    plain, deltas = load_file(source / "model.safetensors"), {}

    with edited_weights(source) as tensors:
        deltas[QKV] = wrap(tensors, QKV, "vision_model.base_model.model.", 4, base_layer)
        deltas[layer] = wrap(tensors, layer, "language_model.base_model.model.", 3, base_layer)
        for part in ("vision_model.", "language_model."):  # PEFT's prefix is on everything, wrapped or not
            for name in [name for name in tensors if name.startswith(part) and ".base_model." not in name]:
                tensors[name.replace(part, f"{part}base_model.model.", 1)] = tensors.pop(name)
    found = run(source, tmp_path / "out")
    assert found.keys() == plain.keys()
    for module, delta in deltas.items():
        torch.testing.assert_close(found[f"{module}.weight"], plain[f"{module}.weight"] + 2 * delta)
    assert all(torch.equal(found[name], plain[name]) for name in plain if name.rpartition(".")[0] not in deltas)
    assert (json_of(tmp_path / "out")["use_backbone_lora"], json_of(tmp_path / "out")["use_llm_lora"]) == (0, 0)


def test_alpha_may_be_given(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    plain = load_file(source / "model.safetensors")
    with edited_weights(source) as tensors:
        delta = wrap(tensors, QKV, "vision_model.base_model.model.", 4)
    out = tmp_path / "out"
    assert main([str(source), str(out), "--lora-alpha", "12"]) == 0
    found = load_file(out / "model.safetensors")
    torch.testing.assert_close(found[f"{QKV}.weight"], plain[f"{QKV}.weight"] + 3 * delta)


def test_the_sum_is_made_in_fp32_and_kept_in_the_type_of_the_weight(tmp_path):
    source = published("chat_llama_v1", tmp_path, use_backbone_lora=4)

    with edited_weights(source) as tensors:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        wrap(tensors, QKV, "vision_model.base_model.model.", 4)
    stored = load_file(source / "model.safetensors")
    wrapped = QKV.replace("vision_model.", "vision_model.base_model.model.")
    delta = stored[f"{wrapped}.lora_B.default.weight"] @ stored[f"{wrapped}.lora_A.default.weight"]
    wanted = (stored[f"{wrapped}.weight"].float() + 2 * delta).bfloat16()
    assert torch.equal(run(source, tmp_path / "out")[f"{QKV}.weight"], wanted)


def test_modules_that_were_trained_whole_take_the_place_of_the_original(tmp_path):
    source = published("chat_llama_v1", tmp_path, use_backbone_lora=4)

    with edited_weights(source) as tensors:
        wrap(tensors, QKV, "vision_model.base_model.model.", 4)
        weight = tensors.pop("mlp1.1.weight")
        tensors["mlp1.1.original_module.weight"] = weight
        tensors["mlp1.1.modules_to_save.default.weight"] = weight + 1
    out, messages = told(source, tmp_path / "out")
    assert torch.equal(weights_of(out)["mlp1.1.weight"], weight + 1)
    assert "mlp1.1.original_module.weight" in messages


def test_everything_that_cannot_be_merged_is_listed_at_once(tmp_path):
    source = published("chat_llama_v1", tmp_path, use_backbone_lora=4)
    prefix = "vision_model.base_model.model."
    modules = [QKV.replace("layers.0", f"layers.{i}") for i in range(3)]

    with edited_weights(source) as tensors:
        for module, rank in zip(modules, (4, 4, 2), strict=True):
            wrap(tensors, module, prefix, rank)
        wrap(tensors, "language_model.model.layers.0.self_attn.q_proj", "language_model.base_model.model.", 4)
        wrapped = [module.replace("vision_model.", prefix) for module in modules]
        del tensors[f"{wrapped[0]}.lora_A.default.weight"]
        tensors[f"{wrapped[1]}.lora_B.default.weight"] = torch.zeros(5, 4)
        tensors[f"{wrapped[1]}.lora_magnitude_vector.default.weight"] = torch.zeros(5)
        tensors["mlp1.1.lora_embedding_A.default"] = torch.zeros(5)
        tensors |= {f"mlp1.7.lora_{side}.default.weight": torch.zeros(4, 4) for side in "AB"}
    with pytest.raises(ValueError, match="cannot be merged") as caught:
        run(source, tmp_path / "out")
    message = str(caught.value)
    assert f"1 half pairs: {modules[0]}.lora_B" in message
    assert f"1 of shapes that do not fit: {modules[1]} (" in message
    assert "2 of a kind that is not merged:" in message
    assert "lora_magnitude_vector" in message
    assert "mlp1.1.lora_embedding_A.default" in message
    assert f"1 of rank 2 where config.json says `use_backbone_lora` 4: {modules[2]}" in message
    assert "1 without `use_llm_lora` in config.json, give `--lora-alpha N`: language_model.model" in message
    assert "1 without the weight that they change: mlp1.7" in message
    assert not (tmp_path / "out").exists()


def test_a_wrapped_checkpoint_without_its_adapters_is_refused(tmp_path):
    source = published("chat_llama_v1", tmp_path)

    with edited_weights(source) as tensors:
        tensors[f"{QKV}.base_layer.weight"] = tensors.pop(f"{QKV}.weight")
    assert_rejected(source, tmp_path, rf"with no adapter beside them: {QKV}\.base_layer\.weight")


def test_two_adapters_are_refused(tmp_path):
    source = published("chat_llama_v1", tmp_path, use_backbone_lora=4)

    with edited_weights(source) as tensors:
        wrap(tensors, QKV, "vision_model.base_model.model.", 4)
        name = QKV.replace("vision_model.", "vision_model.base_model.model.") + ".lora_A.{}.weight"
        tensors[name.format("other")] = tensors[name.format("default")].clone()
    assert_rejected(source, tmp_path, "2 adapters where one is expected: default, other")


# ------------------------------------------------------------------------------------------------- folders of adapters
def trained_adapter(base: Path, folder: Path, **settings) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter as PEFT saves it, with random numbers, and what PEFT itself makes of it and its base."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            assert "lora_" in name or "modules_to_save" in name
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return folder, {name: tensor.clone() for name, tensor in merged.items()}


TARGETS = r"language_model\..*(q_proj|down_proj)|vision_model\..*qkv"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return convert(published("chat_qwen2_v2", folder), folder / "base", image_token_id=520)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter of it, and the weights that PEFT makes of both."""
    return trained_adapter(base, tmp_path_factory.mktemp("trained") / "adapter", target_modules=TARGETS, r=2)


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(trained[0], tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"r": 2, "lora_alpha": 5, "modules_to_save": ["mlp1"]},
    ],
    ids=["plain", "rank-stabilised", "patterns", "whole-module"],
)
def test_an_adapter_folder_is_merged_as_peft_merges_it(settings, base, tmp_path):
    adapter, wanted = trained_adapter(base, tmp_path / "adapter", target_modules=TARGETS, **settings)
    found = run(adapter, tmp_path / "out", base=base)
    torch.testing.assert_close(found, wanted)
    plain = load_file(base / "model.safetensors")
    assert not torch.equal(found[f"{QKV}.weight"], plain[f"{QKV}.weight"])


def test_the_base_is_found_where_the_adapter_says_if_that_is_a_folder(base, trained, tmp_path):
    adapter, wanted = trained
    assert json_of(adapter, "adapter_config.json")["base_model_name_or_path"] == str(base)
    torch.testing.assert_close(run(adapter, tmp_path / "out")[f"{QKV}.weight"], wanted[f"{QKV}.weight"])


def test_an_adapter_of_the_decoder_alone_finds_its_place(base, tmp_path):
    adapter, wanted = trained_adapter(base, tmp_path / "adapter", target_modules=r"language_model\..*q_proj", r=2)
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace(".language_model.", "."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(run(adapter, tmp_path / "out")[name], wanted[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa_niter_4"},
        {"target_parameters": ["experts"]},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_adapters_that_are_not_plain_sums_are_refused_by_name(changes, adapter, tmp_path):
    edit_json(adapter / "adapter_config.json", **changes)
    assert_rejected(adapter, tmp_path, rf"not merged by this command \({next(iter(changes))}")


def test_an_adapter_of_another_model_is_refused_with_every_layer(trained, tmp_path):
    other = published("chat_internlm2_v2", tmp_path)
    with pytest.raises(ValueError, match=r"without the weight that they change: .*layers\.0\.self_attn\.q_proj"):
        run(trained[0], tmp_path / "out", base=other)


def test_a_base_is_no_adapter_and_no_place_for_the_result(base, trained, tmp_path):
    assert_rejected(trained[0], tmp_path, "is an adapter itself", base=trained[0])
    with pytest.raises(ValueError, match="must be a folder of its own"):
        run(trained[0], base, base=base, overwrite=True)
