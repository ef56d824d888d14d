"""Conversion of published checkpoints: what is written, what is refused, and that nothing else happens.

That the results compute what the published code computed is tested in test_goldens, the calls of the published cards
in test_published_usage.
"""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig

from internvl.configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from internvl.conversion.__main__ import main
from internvl.conversion.repository.card import write_card
from internvl.conversion.repository.code import code_files
from internvl.conversion.repository.result import CONTRASTIVE
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny
from .conftest import ROOT
from .fixtures_conversions import (
    ask,
    assert_same_weights,
    edit_json,
    edited_weights,
    json_of,
    refused,
    run,
    state_of,
    told,
    weights_of,
)
from .fixtures_published import GOLDEN, PREPROCESSOR, published, published_14b, published_chat
from .fixtures_text import make_image


PREPROCESSOR_FILE = "preprocessor_config.json"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """One result of each layout, for tests that only read."""
    folder = tmp_path_factory.mktemp("converted")
    sources = {
        "vision": published("intern_vit_6b", folder),
        "contrastive": published_14b(folder),
        "chat": published_chat(folder),
    }
    return {kind: run(source, folder / kind) for kind, source in sources.items()}


def test_the_processor_of_a_chat_result_feeds_its_model(converted):
    model = AutoModel.from_pretrained(converted["chat"])
    processor = AutoProcessor.from_pretrained(converted["chat"])
    inputs = ask(processor)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 * len(inputs["pixel_values"])
    tokens = model.generate(**inputs, max_new_tokens=2)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_the_processor_of_a_contrastive_result_feeds_its_model(converted):
    model = AutoModel.from_pretrained(converted["contrastive"])
    processor = AutoProcessor.from_pretrained(converted["contrastive"])
    inputs = processor(images=[make_image()], text=["a cat", "a red bus"], return_tensors="pt")
    assert inputs["input_ids"][0, 0] == 1
    assert model(**inputs).logits_per_image.shape == (1, 2)


def test_sentence_transformers_finds_its_files_beside_contrastive_models_alone(converted):
    """As its own `save_pretrained` writes them; `make engines` loads such a folder in it."""
    for kind, folder in converted.items():
        names = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
        assert {name for name in names if (folder / name).exists()} == (names if kind == "contrastive" else set())
    settings = json_of(converted["contrastive"], "sentence_bert_config.json")
    model = AutoModel.from_pretrained(converted["contrastive"])
    for modality in settings["modality_config"].values():
        assert callable(getattr(model, modality["method"]))


# ----------------------------------------------------------------------------------------------------- what is written
def test_weights_are_the_source_bit_by_bit_under_their_published_names(converted):
    for kind, case in {"vision": "intern_vit_6b", "contrastive": "internvl_14b", "chat": "chat_qwen2_v2"}.items():
        assert_same_weights(converted[kind], GOLDEN / case)


def test_the_result_holds_the_code_of_its_auto_map_and_nothing_else(converted):
    for folder in converted.values():
        config = json_of(folder)
        modules = {reference.partition(".")[0] for reference in config["auto_map"].values()}
        modules |= {"image_processing_internvl"}
        if (folder / "processor_config.json").exists():
            modules |= {"processing_internvl"}
        endpoint = {"handler.py"} if config["model_type"] != "intern_vit_6b" else set()
        assert {file.name for file in folder.glob("*.py")} == {file.name for file in code_files(modules)} | endpoint
        for name in ("handler.py", "requirements.txt") if endpoint else ():
            assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_nested_configurations_lose_the_dump_of_old_releases_and_keep_their_own_keys(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    config = json_of(source)
    config["llm_config"].update(num_beams=1, temperature=0.6, own_key=7)
    edit_json(source / "config.json", llm_config=config["llm_config"], use_backbone_lora=0)
    out = run(source, tmp_path / "out", image_token_id=520)
    written = json_of(out)
    decoder, vision = written["text_config"], written["vision_config"]
    dump = set(
        "return_dict torch_dtype dtype architectures auto_map top_k num_beams attn_implementation temperature "
        "transformers_version _name_or_path id2label is_decoder pruned_heads".split()
    )
    assert not dump & set(decoder)
    assert not (dump | {"eos_token_id", "tie_word_embeddings"}) & set(vision)
    assert decoder["own_key"] == 7
    assert decoder["model_type"] == "qwen2"
    assert decoder["rope_theta"] == 1000000.0
    assert written["use_backbone_lora"] == 0
    assert "llm_config" not in written
    # Not lost, but where `generate` looks for it.
    assert json_of(out, "generation_config.json")["temperature"] == 0.6


def test_the_configuration_speaks_of_the_result(converted):
    expected = {
        "vision": ("intern_vit_6b", "InternVisionModel", InternViTConfig),
        "contrastive": ("internvl_14b", "InternVLModel", InternVLConfig),
        "chat": ("internvl_chat_model", "InternVLChatForConditionalGeneration", InternVLChatConfig),
    }
    for kind, (model_type, architecture, config_class) in expected.items():
        written = json_of(converted[kind])
        assert written["model_type"] == model_type
        assert written["architectures"] == [architecture]
        assert written["dtype"] == "float32"
        config_class.from_pretrained(converted[kind])


def test_the_type_in_the_configuration_follows_the_weights_and_not_the_source(tmp_path):
    source = published("intern_vit_6b", tmp_path, torch_dtype="bfloat16")
    assert json_of(run(source, tmp_path / "out"))["dtype"] == "float32"


@pytest.mark.parametrize(
    ("top_level", "inside", "wanted"),
    [({}, 3, 2), ({"cross_attention_frequency": 2}, 3, 2), ({}, ..., 2)],
)
def test_cross_attention_frequency_is_the_top_level_value_or_two(top_level, inside, wanted, tmp_path):
    source = published("internvl_14b", tmp_path)
    qllama = json_of(source)["qllama_config"]
    qllama["cross_attention_frequency"] = inside
    qllama = {key: value for key, value in qllama.items() if value is not ...}
    edit_json(source / "config.json", qllama_config=qllama, **top_level)
    written = json_of(run(source, tmp_path / "out"))
    assert written["qllama_config"]["cross_attention_frequency"] == wanted


def test_the_top_level_number_of_queries_wins(tmp_path):
    source = published("internvl_14b", tmp_path)
    edit_json(source / "config.json", qllama_config={**json_of(source)["qllama_config"], "num_query_token": 5})
    out = run(source, tmp_path / "out")
    assert json_of(out)["qllama_config"]["num_query_token"] == 8
    assert InternVLModel.from_pretrained(out).query_tokens.shape[1] == 8


def test_an_absent_key_does_not_tie_the_head_of_14b(tmp_path):
    source = published("internvl_14b", tmp_path)
    edit_json(source / "config.json", tie_word_embeddings=...)
    model = InternVLModel.from_pretrained(run(source, tmp_path / "out"))
    stored = load_file(source / "model.safetensors")
    assert torch.equal(model.qllama.lm_head.weight, stored["qllama.lm_head.weight"])
    assert not torch.equal(model.qllama.lm_head.weight, model.qllama.model.embed_tokens.weight)


def tie_in_config(source: Path) -> None:
    edit_json(source / "config.json", llm_config={**json_of(source)["llm_config"], "tie_word_embeddings": True})


def test_a_stored_head_that_differs_is_kept_whatever_the_configuration_says(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    tie_in_config(source)
    out = run(source, tmp_path / "out", image_token_id=520)
    stored = load_file(source / "model.safetensors")
    model = InternVLChatForConditionalGeneration.from_pretrained(out)
    assert json_of(out)["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(model.language_model.lm_head.weight, stored["language_model.lm_head.weight"])


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tied_head_is_written_once_and_tied_again_on_loading(is_stored, tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    tie_in_config(source)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

    with edited_weights(source) as tensors:
        tensors[head] = tensors[embedding].clone()
        if not is_stored:
            del tensors[head]
    out, messages = told(source, tmp_path / "out", image_token_id=520)
    assert head not in weights_of(out)
    assert is_stored == (head in messages)
    model = InternVLChatForConditionalGeneration.from_pretrained(out)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["vision", "contrastive", "chat"])
def test_a_result_can_be_converted_again_to_the_same(kind, converted, tmp_path):
    again = state_of(run(converted[kind], tmp_path / "again"))
    assert again.pop("README.md")  # names another source
    assert again == {name: digest for name, digest in state_of(converted[kind]).items() if name != "README.md"}


@pytest.mark.parametrize("connector", ["patches", "queries", "queries_and_patches"])
def test_a_chat_model_of_this_package_is_a_source_whatever_its_decoder_reads(connector, tmp_path):
    tiny.chat_model(connector=connector).save_pretrained(tmp_path / "own")
    out = run(tmp_path / "own", tmp_path / "out")
    assert json_of(out)["connector"] == connector
    assert_same_weights(out, tmp_path / "own")


def test_chat_defaults_of_the_earliest_releases(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    assert "ps_version" not in json_of(source)
    written = json_of(run(source, tmp_path / "out", image_token_id=500))
    assert written["ps_version"] == "v1"
    assert written["connector"] == "patches"
    assert written["image_token_id"] == 500


def test_generation_ends_where_the_template_ends(converted):
    settings = GenerationConfig.from_pretrained(converted["chat"])
    tokenizer = AutoTokenizer.from_pretrained(converted["chat"])
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert settings.eos_token_id[:2] == ends
    assert 3 in settings.eos_token_id  # the decoder's own
    assert settings.pad_token_id == tokenizer.pad_token_id


def test_without_a_tokenizer_there_is_no_processor_and_the_run_says_so(tmp_path):
    out, messages = told(published("chat_qwen2_v2", tmp_path), tmp_path / "out")
    assert not (out / "processor_config.json").exists()
    assert not (out / "tokenizer.json").exists()
    assert (out / "preprocessor_config.json").exists()
    assert "No tokenizer" in messages
    assert "--image-token-id" in messages


def test_the_card_has_valid_front_matter(converted, tmp_path):
    source = published("intern_vit_6b", tmp_path / "models--OpenGVLab--InternViT-6B-224px" / "snapshots")
    (source / "README.md").write_text("---\nlicense: mit\npipeline_tag: other\ntags:\n- x\n---\n# InternViT\n")
    card = ModelCard.load(run(source, tmp_path / "out") / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "OpenGVLab/InternViT-6B-224px"
    tags = {"vision": "image-feature-extraction", "contrastive": "zero-shot-image-classification"}
    tags["chat"] = "image-text-to-text"
    for kind, folder in converted.items():
        data = ModelCard.load(folder / "README.md").data
        assert data.pipeline_tag == tags[kind]
        assert data.library_name == "transformers"
        assert data.license
        assert "internvl" in data.tags


def card_data(folder, tmp_path, front_matter, **files):
    """Front matter of a card that is made of another, and the names of the files that lie beside it then."""
    source, target = tmp_path / folder, tmp_path / "target"
    for place in (source, target):
        place.mkdir(parents=True)
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n")
    for name, text in files.items():
        (source / name).write_text(text)
    write_card(target, "InternVL-14B", CONTRASTIVE, source, {}, "internvl")
    return ModelCard.load(target / "README.md").data, {file.name for file in target.iterdir()}


IN_CACHE = "models--user--name/snapshots/feed"


@pytest.mark.parametrize(
    ("folder", "front_matter", "files", "expected"),
    [
        ("plain", "license: MIT", {}, ("mit", None, None)),
        ("plain", "tags: []", {}, ("unknown", None, None)),
        ("plain", "tags: []", {"LICENSE": "text"}, ("other", "license-of-the-source", "LICENSE")),
        (IN_CACHE, "tags: []", {}, ("other", "license-of-the-source", "https://huggingface.co/user/name")),
        (IN_CACHE, "license: other", {"LICENSE": "x"}, ("other", "license-of-the-source", "LICENSE")),
        (
            IN_CACHE,
            "license: other\nlicense_name: LLAMA 2 Terms\nlicense_link: USE_POLICY.md",
            {},
            ("other", "llama-2-terms", "https://huggingface.co/user/name/blob/main/USE_POLICY.md"),
        ),
        (
            "plain",
            "license: other\nlicense_link: https://a.b/c: d",
            {},
            ("other", "license-of-the-source", "https://a.b/c: d"),
        ),
        ("plain", "license: '[{'", {}, ("unknown", None, None)),
    ],
)
def test_the_card_has_the_licence_of_the_source_and_its_text(folder, front_matter, files, expected, tmp_path):
    data, written = card_data(folder, tmp_path, front_matter, **files)
    assert (data.license, data.license_name, data.license_link) == expected
    assert written == {"README.md", *files}


def test_the_manifest_has_the_checksum_of_every_file_with_weights(converted):
    for folder in converted.values():
        found = {name: digest for name, digest in state_of(folder).items() if name.endswith(".safetensors")}
        assert found
        assert json_of(folder, "conversion.json")["sha256"] == found


# ---------------------------------------------------------------------------------------------------- image processors
@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"dynamic_image_size": True}, "tiles"),
        ({"dynamic_image_size": False, "pad2square": True}, "pad"),
        ({"dynamic_image_size": False, "pad2square": False}, "squash"),
    ],
)
def test_the_configuration_of_a_chat_model_decides_how_images_become_tiles(config, mode, tmp_path):
    settings = json_of(run(published("chat_qwen2_v2", tmp_path, **config), tmp_path / "out"), PREPROCESSOR_FILE)
    assert settings["resize_mode"] == mode
    assert settings["size"] == {"height": 56, "width": 56}
    if mode == "tiles":
        assert (settings["min_num"], settings["max_num"], settings["use_thumbnail"]) == (1, 12, True)


@pytest.mark.parametrize(
    ("case", "preprocessor", "mode"),
    [
        ("intern_vit_6b", PREPROCESSOR, "crop"),
        ("intern_vit_6b", None, "crop"),
        ("internvl_14b", PREPROCESSOR, "crop"),
        ("internvl_14b", {**PREPROCESSOR, "do_center_crop": False}, "squash"),
        ("internvl_14b", None, "squash"),
    ],
)
def test_the_other_models_resize_as_their_source_says(case, preprocessor, mode, tmp_path):
    source = published(case, tmp_path, with_preprocessor=False)
    if preprocessor:
        edit_json(source / PREPROCESSOR_FILE, **preprocessor)
    settings = json_of(run(source, tmp_path / "out"), PREPROCESSOR_FILE)
    assert settings["resize_mode"] == mode
    assert settings["do_center_crop"] is (mode == "crop")


# -------------------------------------------------------------------------------------------------------- command line
def test_a_dry_run_says_what_was_found_and_writes_nothing(vit, tmp_path, capsys):
    before = state_of(tmp_path)
    assert main([str(vit), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Found InternViT" in said
    assert "151,456 parameters" in said
    assert "float32" in said
    assert "605.8 kB" in said
    assert state_of(tmp_path) == before


def test_the_command_converts_and_says_so(vit, tmp_path, capsys):
    assert main([str(vit), str(tmp_path / "out"), "--dtype", "bfloat16", "--max-shard-size", "1GB"]) == 0
    captured = capsys.readouterr()
    assert "Found InternViT" in captured.out
    assert f"Wrote {tmp_path / 'out'}" in captured.out
    assert "Writing weights" in captured.err


@pytest.mark.parametrize("size", ["5", "many", "5XB"])
def test_errors_are_one_line_and_exit_code_two(size, vit, tmp_path, capsys):
    assert refused(capsys, vit, tmp_path / "out", "--max-shard-size", size)
