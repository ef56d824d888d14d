"""The way back: published checkpoint, this package's format, published checkpoint again, with nothing lost on the way.

1. Tensors are the same bit by bit, also those that were stored twice.
2. config.json is the same in every key and value, and changes made since are in it.
3. Without a record of the source (a folder that `save_pretrained` wrote), config.json still says what the published
   code reads.
4. Tokenizer, generation and preprocessor files are the old ones, unless they were changed since.
5. What the published layouts cannot express is refused with all reasons.
"""

import shutil

import pytest
from transformers import AutoModel

from internvl.conversion.__main__ import main
from internvl.conversion.repository.records import overlaid

from . import tiny
from .fixtures_conversions import assert_same_weights, edit_json, edited_weights, json_of, refused, run, weights_of
from .fixtures_published import (
    GOLDEN,
    IMAGE_TOKENS,
    published,
    published_14b,
    published_chat,
    write_sentencepiece_tokenizer,
)
from .fixtures_text import make_tokenizer


# Case and its configuration.
CASES = {
    "intern_vit_6b": "config.json",
    "intern_vit_6b-without-norm-type": "config_without_norm_type.json",
    "intern_vit_300m": "config.json",
    "internvl_14b": "config.json",
    "chat_llama_v1": "config.json",
    "chat_llama_v1-full-config": "config_full.json",
    "chat_internlm2_v2": "config.json",
    "chat_qwen2_v2": "config.json",
}
KINDS = ("intern_vit_6b", "internvl_14b", "chat_llama_v1", "chat_internlm2_v2", "chat_qwen2_v2")


@pytest.fixture(scope="module")
def trips(tmp_path_factory):
    """Of every case the source, this package's format, and the published format made of that."""
    folder = tmp_path_factory.mktemp("trips")
    found = {}
    for name, config in CASES.items():
        source = published(name.partition("-")[0], folder / name)
        (source / config).replace(source / "config.json")
        own = run(source, folder / name / "own")
        found[name] = source, own, run(own, folder / name / "back", to="published")
    return found


# ----------------------------------------------------------------------------------------------------- nothing is lost
@pytest.mark.parametrize("name", CASES)
def test_the_way_back_gives_the_same_tensors_configuration_and_small_files(name, trips):
    source, _, back = trips[name]
    assert_same_weights(back, source)
    for file in ("config.json", "generation_config.json", "preprocessor_config.json"):
        if (source / file).is_file():
            assert json_of(back, file) == json_of(source, file)


def test_the_result_can_be_converted_again(trips, tmp_path):
    _, own, back = trips["chat_internlm2_v2"]
    again = run(back, tmp_path / "own")
    assert_same_weights(again, own)
    assert json_of(again) == json_of(own)


def test_a_head_that_was_stored_twice_is_so_again(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    config = json_of(source)
    edit_json(source / "config.json", llm_config={**config["llm_config"], "tie_word_embeddings": True})
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    with edited_weights(source) as tensors:
        tensors.update({head: tensors[embedding].clone()})
    own = run(source, tmp_path / "own")
    assert head not in weights_of(own)
    assert_same_weights(run(own, tmp_path / "back", to="published"), source)


def test_another_type_of_the_weights_is_in_the_configuration(trips, tmp_path):
    source, own, _ = trips["chat_qwen2_v2"]
    back = run(own, tmp_path / "back", to="published", dtype="bfloat16")
    assert json_of(back) == {**json_of(source), "torch_dtype": "bfloat16"}
    # On the way in, too.
    back = run(run(source, tmp_path / "half", dtype="float16"), tmp_path / "half_back", to="published")
    assert json_of(back) == {**json_of(source), "torch_dtype": "float16"}


def test_merged_adapters_are_none_in_the_configuration(tmp_path):
    source = published("internvl_14b_lora_peft08", tmp_path)
    assert json_of(source)["use_backbone_lora"] > 0
    back = run(run(source, tmp_path / "own"), tmp_path / "back", to="published")
    wanted = {**json_of(source), "use_backbone_lora": 0, "use_qllama_lora": 0}
    # The positions were stretched, and the source's configuration has the size before that, for which nothing loads.
    assert wanted["vision_config"]["image_size"] == 56
    wanted["vision_config"] = {**wanted["vision_config"], "image_size": wanted["force_image_size"]}
    assert json_of(back) == wanted


@pytest.mark.parametrize("case", ["internvl_14b_lora_peft04", "internvl_14b_lora_peft08"])
def test_the_published_format_of_a_tower_whose_positions_were_stretched_loads(case, tmp_path):
    out = run(published(case, tmp_path), tmp_path / "out", to="published", verify=True)  # it loads and compares
    config = json_of(out)
    assert config["vision_config"]["image_size"] == config["force_image_size"] == 84


# ------------------------------------------------------------------------------------------------------- changes since
def test_a_setting_that_was_changed_since_is_in_the_result_and_nothing_else(trips, tmp_path):
    source, own, _ = trips["chat_qwen2_v2"]
    own = shutil.copytree(own, tmp_path / "own")
    config = json_of(own)
    edit_json(
        own / "config.json",
        template="internvl2_5",
        max_dynamic_patch=6,
        text_config={**config["text_config"], "rope_theta": 5000.0},
        vision_config={**config["vision_config"], "drop_path_rate": 0.25},
    )
    back = json_of(run(own, tmp_path / "back", to="published"))
    wanted = json_of(source)
    wanted.update(template="internvl2_5", max_dynamic_patch=6)
    wanted["llm_config"]["rope_theta"] = 5000.0
    wanted["vision_config"]["drop_path_rate"] = 0.25
    assert back == wanted


def test_changes_go_into_a_kept_configuration_at_their_place():
    kept = {"a": 1, "own": 2, "part": {"b": 3, "own": 4}, "old": 5}
    then = {"a": 1, "default": 0, "part": {"b": 3, "c": 6}, "old": 5}
    now = {"a": 7, "default": 0, "part": {"b": 3, "c": 8}, "new": 9}
    assert overlaid(kept, then, now) == {"a": 7, "own": 2, "part": {"b": 3, "own": 4, "c": 8}, "new": 9}


def test_a_resized_tower_is_in_the_result(trips, tmp_path):
    source, own, _ = trips["intern_vit_6b"]
    back = run(own, tmp_path / "back", to="published", image_size=84)
    assert json_of(back) == {**json_of(source), "image_size": 84}
    assert weights_of(back)["embeddings.position_embedding"].shape[1] == 37
    assert json_of(back, "preprocessor_config.json")["size"] == 84


# -------------------------------------------------------------------------------------- without a record of the source
# What the published classes and engines read of config.json, besides what they have defaults for.
READ_BY_ENGINES = {
    "chat": "architectures auto_map downsample_ratio dynamic_image_size force_image_size llm_config max_dynamic_patch "
    "min_dynamic_patch model_type pad2square ps_version select_layer template use_thumbnail vision_config",
    "contrastive": "architectures attn_pool_num_heads auto_map clip_embed_dim force_image_size label_smoothing "
    "max_txt_len model_type num_query_token qllama_config vision_config",
    "vision": "architectures auto_map attention_dropout drop_path_rate dropout hidden_act hidden_size image_size "
    "initializer_factor initializer_range intermediate_size layer_norm_eps model_type norm_type num_attention_heads "
    "num_channels num_hidden_layers patch_size qk_normalization qkv_bias",
    "llama": "architectures hidden_act hidden_size intermediate_size max_position_embeddings model_type "
    "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta vocab_size "
    "bos_token_id eos_token_id pad_token_id",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_fine_tuned_model_has_the_tensors_and_the_configuration_of_its_release(name, trips, tmp_path):
    source, own, _ = trips[name]
    AutoModel.from_pretrained(own).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "conversion.json").exists()
    back = run(tmp_path / "saved", tmp_path / "back", to="published")
    assert_same_weights(back, source)
    found, wanted = json_of(back), json_of(source)
    compare_nested(found, wanted, name)
    kinds = {"vision_config": "vision", "llm_config": "llama", "qllama_config": "llama"}
    top = {"intern_vit_6b": "vision", "internvl_14b": "contrastive"}.get(name, "chat")
    parts = {top: found, **{kind: found[part] for part, kind in kinds.items() if part in found}}
    for kind, part in parts.items():
        assert set(READ_BY_ENGINES[kind].split()) <= part.keys()


def compare_nested(found: dict, wanted: dict, where: str) -> None:
    """Keys in both are equal, but for those that name the file's origin, or hold a default of later releases."""
    # `sliding_window` of a decoder that uses none; the oldest auto_map lacks one class.
    different = {"torch_dtype", "sliding_window", "auto_map", "use_flash_attn"}
    for key in found.keys() & wanted.keys() - different:
        if isinstance(wanted[key], dict) and isinstance(found[key], dict):
            compare_nested(found[key], wanted[key], f"{where}.{key}")
        elif not (where.endswith("vision_config") and wanted[key] is None):
            assert found[key] == wanted[key], f"{where}.{key}"


def test_scaled_rotary_positions_are_said_as_of_old(tmp_path):
    source = published("chat_internlm2_v2", tmp_path)
    scaling = {"type": "dynamic", "factor": 2.0}
    edit_json(source / "config.json", llm_config={**json_of(source)["llm_config"], "rope_scaling": scaling})
    own = run(source, tmp_path / "own", image_token_id=530)
    (own / "conversion.json").unlink()  # as after `save_pretrained`, which writes none
    decoder = json_of(run(own, tmp_path / "back", to="published"))["llm_config"]
    assert decoder["rope_scaling"] == scaling
    assert decoder["rope_theta"] == 1000000
    assert "rope_parameters" not in decoder


def test_a_raw_backbone_becomes_the_published_tower(tmp_path):
    backbone = GOLDEN / "classification_raw" / "intern_vit_6b_224px.pth"
    own = run(backbone, tmp_path / "own")
    back = run(backbone, tmp_path / "back", to="published")
    assert_same_weights(back, own)
    config = json_of(back)
    assert config["architectures"] == ["InternVisionModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_intern_vit.InternVisionModel"
    assert_same_weights(run(back, tmp_path / "again"), own)


# --------------------------------------------------------------------------------------------------------- small files
@pytest.fixture(scope="module")
def chat_trip(tmp_path_factory):
    """The same of a chat model with its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    source = published_chat(folder)
    own = run(source, folder / "own")
    return source, own, run(own, folder / "back", to="published")


def test_a_fast_tokenizer_is_the_same_again(chat_trip):
    source, _, back = chat_trip
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert json_of(back, name) == json_of(source, name), name


def test_a_slow_tokenizer_is_the_same_again(tmp_path):
    source = published_14b(tmp_path)
    back = run(run(source, tmp_path / "own"), tmp_path / "back", to="published")
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert json_of(back, "tokenizer_config.json") == json_of(source, "tokenizer_config.json")


def test_a_tokenizer_and_settings_of_generation_that_were_changed_since_stay_changed(chat_trip, tmp_path):
    source, own, _ = chat_trip
    own = shutil.copytree(own, tmp_path / "own")
    tokenizer = make_tokenizer(add_bos=False, eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(own)
    back = run(own, tmp_path / "back", to="published")
    assert "<new>" in (back / "tokenizer.json").read_text()
    assert json_of(back, "tokenizer_config.json") == json_of(own, "tokenizer_config.json")
    assert json_of(back, "generation_config.json") == json_of(source, "generation_config.json")
    edit_json(own / "generation_config.json", temperature=0.5)
    back = run(own, tmp_path / "again", to="published")
    assert json_of(back, "generation_config.json")["temperature"] == 0.5


def test_a_tokenizer_of_remote_code_is_written_as_one_that_needs_none(tmp_path):
    source = published("chat_internlm2_v2", tmp_path)
    remote = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    special = dict(enumerate(IMAGE_TOKENS, start=330))
    write_sentencepiece_tokenizer(source, special, tokenizer_class="InternLM2Tokenizer", auto_map=remote)
    back = run(run(source, tmp_path / "own"), tmp_path / "back", to="published")
    assert "auto_map" not in json_of(back, "tokenizer_config.json")
    assert (back / "tokenizer.json").is_file()


def test_a_chat_template_marks_images_as_engines_do(chat_trip):
    template = (chat_trip[2] / "chat_template.jinja").read_text()
    assert "<image>" in template
    assert "<IMG_CONTEXT>" not in template


def test_a_published_chat_template_is_the_only_one_again(tmp_path):
    source = published_chat(tmp_path)
    edit_json(source / "tokenizer_config.json", chat_template="{{ messages }}")
    back = run(run(source, tmp_path / "own"), tmp_path / "back", to="published")
    assert json_of(back, "tokenizer_config.json")["chat_template"] == "{{ messages }}"
    assert not (back / "chat_template.jinja").exists()


# -------------------------------------------------------------------------------------------------- unreadable records
READABLE = {"config": {"llm_config": {}}, "dtype": "float32", "stored_twice": {}, "files": {}}


@pytest.mark.parametrize(
    "records",
    [
        None,
        [],
        {"published": None},
        {"published": {**READABLE, "config": {}}},
        {"published": {**READABLE, "config": {"llm_config": [], "vision_config": 3}}},
        {"published": {**READABLE, "stored_twice": {"x": ["y"]}}},
        {"published": {**READABLE, "files": {"a": "b"}}},
    ],
)
def test_an_unreadable_record_is_ignored(records, trips, tmp_path):
    source, own, _ = trips["chat_qwen2_v2"]
    own = shutil.copytree(own, tmp_path / "own")
    edit_json(own / "conversion.json", forms=records)
    back = run(own, tmp_path / "back", to="published")
    assert_same_weights(back, source)
    assert json_of(back)["architectures"] == ["InternVLChatModel"]


def test_a_record_writes_no_files_of_other_names(trips, tmp_path):
    _, own, _ = trips["chat_qwen2_v2"]
    own = shutil.copytree(own, tmp_path / "own")
    records = json_of(own, "conversion.json")["forms"]
    records["published"]["files"] = {"../evil.json": {"a": 1}, "modeling_evil.py": {"a": 1}}
    edit_json(own / "conversion.json", forms=records)
    back = run(own, tmp_path / "back", to="published")
    assert not (tmp_path / "evil.json").exists()
    assert not (back / "modeling_evil.py").exists()


def test_a_record_names_no_code_that_its_format_does_not_write(trips, tmp_path):
    _, own, _ = trips["chat_qwen2_v2"]
    native = run(own, tmp_path / "native", to="native", image_token_id=500)
    again = run(native, tmp_path / "again")
    records = json_of(again, "conversion.json")["forms"]
    code = {"remembered_auto_map": {"AutoImageProcessor": "image_processing_internvl.InternVLImageProcessor"}}
    records["native"]["files"]["preprocessor_config.json"].update(code)
    edit_json(again / "conversion.json", forms=records)
    back = run(again, tmp_path / "back", to="native")
    assert json_of(back, "preprocessor_config.json") == json_of(native, "preprocessor_config.json")


def test_a_record_brings_no_code_into_this_format(trips, tmp_path):
    _, own, back = trips["chat_qwen2_v2"]
    back = shutil.copytree(back, tmp_path / "back")
    records = json_of(back, "conversion.json")["forms"]
    records["internvl"]["config"]["auto_map"] = {"AutoModel": "evil/repository--modeling.Evil"}
    edit_json(back / "conversion.json", forms=records)
    again = run(back, tmp_path / "again")
    assert json_of(again) == json_of(own)


# ------------------------------------------------------------------------------------------------------------ refusals
def test_all_reasons_are_given_at_once(tmp_path, capsys):
    model = tiny.chat_model(connector="queries_and_patches", projector_type="mlp2x_gelu", use_image_start_end=False)
    model.save_pretrained(tmp_path / "own")
    message = refused(capsys, tmp_path / "own", tmp_path / "out", "--to", "published")
    for reason in ("`connector`", "`projector_type` is 'mlp2x_gelu'", "`<img>` and `</img>`"):
        assert reason in message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("internvl_c_raw/internvl_c_13b_224px.pth", "no queries"),
        ("classification_raw/head_cls_patch_concat.pth", "no place for a InternViTForImageClassification"),
    ],
)
def test_what_the_releases_never_were_has_no_published_layout(source, reason, tmp_path, capsys):
    assert reason in refused(capsys, GOLDEN / source, tmp_path / "out", "--to", "published")


def test_an_unknown_format_is_refused(trips, tmp_path):
    with pytest.raises(ValueError, match="must be one of internvl, published, native, got 'gguf'"):
        run(trips["chat_qwen2_v2"][1], tmp_path / "out", to="gguf")


def test_a_dry_run_names_the_format_and_writes_nothing(trips, tmp_path, capsys):
    assert main([str(trips["chat_qwen2_v2"][1]), str(tmp_path / "out"), "--to", "published", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Found InternVL-Chat, this package's format" in printed
    assert "in the published Hub layout" in printed
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_the_format_is_for(trips):
    card = (trips["chat_qwen2_v2"][2] / "README.md").read_text()
    assert "published layout" in card
    assert "AutoProcessor" not in card
