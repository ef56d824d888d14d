"""Conversion of published checkpoints: what is written, what is refused, and that nothing else happens.

That the results compute what the published code computed is tested in test_goldens, the calls of the published cards in
test_published_usage.
"""

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig

from internvl.configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from internvl.conversion import convert
from internvl.conversion.__main__ import main
from internvl.conversion.readers.opening import open_source
from internvl.conversion.repository import target
from internvl.conversion.repository.code import code_files
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny
from .fixtures_published import (
    INTERNLM2_TOKENS,
    LLAMA_TOKENS,
    PREPROCESSOR,
    published,
    published_14b,
    published_chat,
    slow_ids,
    write_sentencepiece_tokenizer,
)
from .fixtures_text import make_image, make_tokenizer


def run(source, out, **settings):
    return convert(source, out, show_progress=False, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def state_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def vit(tmp_path):
    return published("intern_vit_6b", tmp_path)


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


# ------------------------------------------------------------------------------------------------- every door, elsewhere
DOORS = """
import json, sys
sys.modules["internvl"] = None
import transformers
names = {}
for folder, doors in json.loads(sys.argv[1]).items():
    for door in doors:
        auto = getattr(transformers, door)
        if door == "AutoBackbone":  # its `from_pretrained` asks the Hub whether there is such a repository, also for a folder
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
            part = auto.from_config(config, trust_remote_code=True)
        else:
            part = auto.from_pretrained(folder, trust_remote_code=True)
        names[folder.rpartition("/")[2] + "." + door] = type(part).__name__
print("NAMES" + json.dumps(names))
"""
EXPECTED_DOORS = {
    "vision": {
        "AutoConfig": "InternViTConfig",
        "AutoModel": "InternVisionModel",
        "AutoBackbone": "InternViTBackbone",
        "AutoModelForImageClassification": "InternViTForImageClassification",
        "AutoModelForSemanticSegmentation": "InternViTForSemanticSegmentation",
        "AutoImageProcessor": "InternVLImageProcessor",
    },
    "contrastive": {
        "AutoConfig": "InternVL14BConfig",
        "AutoModel": "InternVLModel",
        "AutoModelForZeroShotImageClassification": "InternVLModel",
        "AutoImageProcessor": "InternVLImageProcessor",
        "AutoProcessor": "InternVLProcessor",
    },
    "chat": {
        "AutoConfig": "InternVLChatConfig",
        "AutoModel": "InternVLChatForConditionalGeneration",
        "AutoModelForCausalLM": "InternVLChatForConditionalGeneration",
        "AutoModelForImageTextToText": "InternVLChatForConditionalGeneration",
        "AutoModelForMultimodalLM": "InternVLChatForConditionalGeneration",
        "AutoImageProcessor": "InternVLImageProcessor",
        "AutoProcessor": "InternVLProcessor",
        "AutoTokenizer": "TokenizersBackend",
    },
}


def test_every_auto_class_loads_the_moved_result_offline_without_the_package(converted, tmp_path):
    folders = {kind: shutil.copytree(converted[kind], tmp_path / kind) for kind in EXPECTED_DOORS}
    doors = {str(folder): list(EXPECTED_DOORS[kind]) for kind, folder in folders.items()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", DOORS, json.dumps(doors)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.partition("NAMES")[2])
    assert names == {f"{kind}.{door}": name for kind, doors in EXPECTED_DOORS.items() for door, name in doors.items()}


def test_the_processor_of_a_chat_result_feeds_its_model(converted):
    model = AutoModel.from_pretrained(converted["chat"])
    processor = AutoProcessor.from_pretrained(converted["chat"])
    content = [{"type": "image", "image": make_image(90, 60)}, {"type": "text", "text": "What is shown?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
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
    settings = json.loads((converted["contrastive"] / "sentence_bert_config.json").read_text())
    model = AutoModel.from_pretrained(converted["contrastive"])
    for modality in settings["modality_config"].values():
        assert callable(getattr(model, modality["method"]))


# ------------------------------------------------------------------------------------------------------ what is written
def test_weights_are_the_source_bit_by_bit_under_their_published_names(converted, tmp_path):
    for kind, case in {"vision": "intern_vit_6b", "contrastive": "internvl_14b", "chat": "chat_qwen2_v2"}.items():
        wanted = load_file(Path(__file__).parent / "golden" / case / "model.safetensors")
        found = weights_of(converted[kind])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_result_holds_the_code_of_its_auto_map_and_nothing_else(converted):
    for folder in converted.values():
        config = config_of(folder)
        modules = {reference.partition(".")[0] for reference in config["auto_map"].values()}
        modules |= {"image_processing_internvl"}
        if (folder / "processor_config.json").exists():
            modules |= {"processing_internvl"}
        assert {file.name for file in folder.glob("*.py")} == {file.name for file in code_files(modules)}


def test_nested_configurations_lose_the_dump_of_old_releases_and_keep_their_own_keys(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    config = config_of(source)
    config["llm_config"].update(num_beams=1, temperature=0.6, own_key=7)
    edit_json(source / "config.json", llm_config=config["llm_config"], use_backbone_lora=0)
    out = run(source, tmp_path / "out", image_token_id=520)
    written = config_of(out)
    decoder, vision = written["text_config"], written["vision_config"]
    dump = {
        "return_dict",
        "torch_dtype",
        "dtype",
        "architectures",
        "auto_map",
        "top_k",
        "num_beams",
        "attn_implementation",
    }
    dump |= {"transformers_version", "_name_or_path", "id2label", "is_decoder", "pruned_heads", "temperature"}
    assert not dump & set(decoder)
    assert not (dump | {"eos_token_id", "tie_word_embeddings"}) & set(vision)
    assert decoder["own_key"] == 7
    assert decoder["model_type"] == "qwen2"
    assert decoder["rope_theta"] == 1000000.0
    assert written["use_backbone_lora"] == 0
    assert "llm_config" not in written
    # Not lost, but where `generate` looks for it.
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_the_configuration_speaks_of_the_result(converted):
    expected = {
        "vision": ("intern_vit_6b", "InternVisionModel", InternViTConfig),
        "contrastive": ("internvl_14b", "InternVLModel", InternVLConfig),
        "chat": ("internvl_chat_model", "InternVLChatForConditionalGeneration", InternVLChatConfig),
    }
    for kind, (model_type, architecture, config_class) in expected.items():
        written = config_of(converted[kind])
        assert written["model_type"] == model_type
        assert written["architectures"] == [architecture]
        assert written["dtype"] == "float32"
        config_class.from_pretrained(converted[kind])


def test_the_type_in_the_configuration_follows_the_weights_and_not_the_source(tmp_path):
    source = published("intern_vit_6b", tmp_path, torch_dtype="bfloat16")
    assert config_of(run(source, tmp_path / "out"))["dtype"] == "float32"


@pytest.mark.parametrize(
    ("top_level", "inside", "wanted"),
    [({}, 3, 2), ({"cross_attention_frequency": 2}, 3, 2), ({}, ..., 2)],
)
def test_cross_attention_frequency_is_the_top_level_value_or_two(top_level, inside, wanted, tmp_path):
    source = published("internvl_14b", tmp_path)
    qllama = config_of(source)["qllama_config"]
    qllama["cross_attention_frequency"] = inside
    qllama = {key: value for key, value in qllama.items() if value is not ...}
    edit_json(source / "config.json", qllama_config=qllama, **top_level)
    written = config_of(run(source, tmp_path / "out"))
    assert written["qllama_config"]["cross_attention_frequency"] == wanted


def test_the_top_level_number_of_queries_wins(tmp_path):
    source = published("internvl_14b", tmp_path)
    edit_json(source / "config.json", qllama_config={**config_of(source)["qllama_config"], "num_query_token": 5})
    out = run(source, tmp_path / "out")
    assert config_of(out)["qllama_config"]["num_query_token"] == 8
    assert InternVLModel.from_pretrained(out).query_tokens.shape[1] == 8


def test_an_absent_key_does_not_tie_the_head_of_14b(tmp_path):
    source = published("internvl_14b", tmp_path)
    edit_json(source / "config.json", tie_word_embeddings=...)
    model = InternVLModel.from_pretrained(run(source, tmp_path / "out"))
    stored = load_file(source / "model.safetensors")
    assert torch.equal(model.qllama.lm_head.weight, stored["qllama.lm_head.weight"])
    assert not torch.equal(model.qllama.lm_head.weight, model.qllama.model.embed_tokens.weight)


def tie_in_config(source: Path) -> None:
    edit_json(source / "config.json", llm_config={**config_of(source)["llm_config"], "tie_word_embeddings": True})


def test_a_stored_head_that_differs_is_kept_whatever_the_configuration_says(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    tie_in_config(source)
    out = run(source, tmp_path / "out", image_token_id=520)
    stored = load_file(source / "model.safetensors")
    model = InternVLChatForConditionalGeneration.from_pretrained(out)
    assert config_of(out)["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(model.language_model.lm_head.weight, stored["language_model.lm_head.weight"])


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tied_head_is_written_once_and_tied_again_on_loading(is_stored, tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    tie_in_config(source)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

    def change(tensors):
        tensors[head] = tensors[embedding].clone()
        if not is_stored:
            del tensors[head]

    edit_weights(source, change)
    messages = []
    out = run(source, tmp_path / "out", image_token_id=520, report=messages.append)
    assert head not in weights_of(out)
    assert is_stored == any(head in message for message in messages)
    model = InternVLChatForConditionalGeneration.from_pretrained(out)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["vision", "contrastive", "chat"])
def test_a_result_can_be_converted_again_to_the_same(kind, converted, tmp_path):
    again = run(converted[kind], tmp_path / "again")
    assert config_of(again) == config_of(converted[kind])
    assert weights_of(again).keys() == weights_of(converted[kind]).keys()
    first, second = (
        {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
        for folder in (converted[kind], again)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("connector", ["patches", "queries", "queries_and_patches"])
def test_a_chat_model_of_this_package_is_a_source_whatever_its_decoder_reads(connector, tmp_path):
    tiny.chat_model(connector=connector).save_pretrained(tmp_path / "own")
    out = run(tmp_path / "own", tmp_path / "out")
    assert config_of(out)["connector"] == connector
    before, after = weights_of(tmp_path / "own"), weights_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_chat_defaults_of_the_earliest_releases(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    assert "ps_version" not in config_of(source)
    written = config_of(run(source, tmp_path / "out", image_token_id=500))
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
    messages = []
    out = run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", report=messages.append)
    assert not (out / "processor_config.json").exists()
    assert not (out / "tokenizer.json").exists()
    assert (out / "preprocessor_config.json").exists()
    assert any("No tokenizer" in message for message in messages)
    assert any("--image-token-id" in message for message in messages)


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


def test_the_manifest_has_the_checksum_of_every_file_with_weights(converted):
    for folder in converted.values():
        manifest = json.loads((folder / "conversion.json").read_text())
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
        assert manifest["sha256"] == found


# ------------------------------------------------------------------------------------------------------ image processors
def image_settings(folder: Path) -> dict:
    return json.loads((folder / "preprocessor_config.json").read_text())


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"dynamic_image_size": True}, "tiles"),
        ({"dynamic_image_size": False, "pad2square": True}, "pad"),
        ({"dynamic_image_size": False, "pad2square": False}, "squash"),
    ],
)
def test_the_configuration_of_a_chat_model_decides_how_pictures_become_tiles(config, mode, tmp_path):
    settings = image_settings(run(published("chat_qwen2_v2", tmp_path, **config), tmp_path / "out"))
    assert settings["resize_mode"] == mode
    assert settings["size"] == {"height": 56, "width": 56}
    if mode == "tiles":
        assert (settings["min_num"], settings["max_num"], settings["use_thumbnail"]) == (1, 12, True)


def test_mean_and_deviation_come_from_the_source(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    edit_json(source / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    assert image_settings(run(source, tmp_path / "out"))["image_mean"] == [0.1, 0.2, 0.3]


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
        (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    settings = image_settings(run(source, tmp_path / "out"))
    assert settings["resize_mode"] == mode
    assert settings["do_center_crop"] is (mode == "crop")


# ------------------------------------------------------------------------------------------------------- kinds of sources
def split_in_two(source: Path, suffix: str) -> None:
    """Shards and an index in the place of the one file."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(tensors), {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{index:05d}-of-00002.{suffix}"
        content = {name: tensors[name] for name in part}
        if suffix == "safetensors":
            save_file(content, source / file, metadata={"format": "pt"})
        else:
            torch.save(content, source / file)
        weight_map.update(dict.fromkeys(part, file))
    (source / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_one_file(source: Path, name: str, **settings) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / name, **settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda source: split_in_two(source, "safetensors"),
        lambda source: split_in_two(source, "bin"),
        lambda source: as_one_file(source, "pytorch_model.bin"),
        lambda source: as_one_file(source, "pytorch_model.bin", _use_new_zipfile_serialization=False),
        lambda source: as_one_file(source, "intern_vit_6b.pth"),
    ],
    ids=["sharded-safetensors", "sharded-bin", "bin", "old-bin", "pth"],
)
def test_every_kind_of_file_gives_the_same_weights_and_is_left_alone(change, vit, tmp_path):
    wanted = load_file(vit / "model.safetensors")
    change(vit)
    before = state_of(vit)
    found = weights_of(run(vit, tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert state_of(vit) == before


def test_a_single_file_may_be_named(vit, tmp_path):
    out = run(vit / "model.safetensors", tmp_path / "out")
    assert weights_of(out).keys() == load_file(vit / "model.safetensors").keys()


def as_in_the_hubs_cache(source: Path, cache: Path) -> Path:
    """The snapshot of a repository as `huggingface_hub` keeps it: links to its blobs."""
    repository = cache / "models--OpenGVLab--InternViT"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.replace(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_links_as_in_the_hubs_cache_are_followed(vit, tmp_path):
    wanted = load_file(vit / "model.safetensors")
    snapshot = as_in_the_hubs_cache(vit, tmp_path)
    found = weights_of(run(snapshot, tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Also through a link to the snapshot itself, and one of its files.
    (tmp_path / "link").symlink_to(snapshot)
    run(tmp_path / "link", tmp_path / "out2")
    run(snapshot / "model.safetensors", tmp_path / "out3")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a\\b.safetensors", "..", "x.txt"]
)
def test_an_index_that_points_elsewhere_is_refused(name, vit, tmp_path):
    split_in_two(vit, "safetensors")
    edit_json(vit / "model.safetensors.index.json", weight_map={"embeddings.class_embedding": name})
    with pytest.raises(ValueError, match="points outside its folder"):
        run(vit, tmp_path / "out")


def test_a_missing_shard_is_named(vit, tmp_path):
    split_in_two(vit, "bin")
    (vit / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(OSError, match=r"does not have: pytorch_model-00002-of-00002\.bin"):
        run(vit, tmp_path / "out")


class BoobyTrap:
    """What a hostile file would hold: code that runs when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "plain-pickle"])
def test_a_booby_trapped_file_is_refused_by_name_and_not_run(form, vit, tmp_path, capsys):
    (vit / "model.safetensors").unlink()
    content = {"embeddings.class_embedding": BoobyTrap(tmp_path / "sprung")}
    if form == "zip":
        torch.save(content, vit / "pytorch_model.bin")
    else:
        (vit / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    assert main([str(vit), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "pytorch_model.bin` was refused" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def test_no_code_of_the_source_is_run(tmp_path):
    source = published_chat(tmp_path)
    trap = f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n"
    for name in ("configuration_internvl_chat", "modeling_internvl_chat", "tokenization_internlm2"):
        (source / f"{name}.py").write_text(trap)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_internlm2.T", None]})
    out = run(source, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    assert not (out / "tokenization_internlm2.py").exists()
    assert "os.mkdir" not in (out / "modeling_internvl_chat.py").read_text()


def test_a_truncated_file_is_named(vit, tmp_path):
    data = (vit / "model.safetensors").read_bytes()
    (vit / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"model\.safetensors` is no complete safetensors file"):
        run(vit, tmp_path / "out")
    (vit / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1000)}, vit / "pytorch_model.bin")
    data = (vit / "pytorch_model.bin").read_bytes()
    (vit / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"pytorch_model\.bin` is no complete PyTorch file"):
        run(vit, tmp_path / "out")


def test_headers_are_read_without_their_weights(vit):
    source = open_source(vit)
    assert source.tensors["embeddings.class_embedding"].shape == (1, 1, 64)
    assert source.num_bytes == sum(tensor.nbytes for tensor in load_file(vit / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------------- what is refused
def test_everything_that_does_not_fit_is_listed_at_once(vit, tmp_path):
    def change(tensors):
        del tensors["encoder.layers.0.ls1"], tensors["encoder.layers.2.norm1.weight"]
        tensors["encoder.layers.1.ls2"] = torch.zeros(7)
        tensors["head.weight"] = torch.zeros(2)

    edit_weights(vit, change)
    with pytest.raises(ValueError, match="do not fit InternViT") as caught:
        run(vit, tmp_path / "out")
    message = str(caught.value)
    assert "2 missing: encoder.layers.0.ls1, encoder.layers.2.norm1.weight" in message
    assert "1 unknown: head.weight" in message
    assert "encoder.layers.1.ls2 (64,) got (7,)" in message
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_files_is_listed(vit, tmp_path):
    split_in_two(vit, "safetensors")
    first, second = sorted(vit.glob("model-*.safetensors"))
    tensors = load_file(second)
    tensors["embeddings.class_embedding"] = torch.zeros(1, 1, 64)
    save_file(tensors, second)
    assert "embeddings.class_embedding" in load_file(first)
    with pytest.raises(ValueError, match=r"1 in more than one file: embeddings.class_embedding"):
        run(vit, tmp_path / "out")


def test_rotary_buffers_are_dropped_by_name_and_nothing_else_is(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(source, lambda tensors: tensors.update({name: torch.zeros(8)}))
    messages = []
    out = run(source, tmp_path / "out", image_token_id=500, report=messages.append)
    assert name not in weights_of(out)
    assert any(name in message for message in messages)
    edit_weights(source, lambda tensors: tensors.update({name.replace("inv_freq", "freq"): torch.zeros(8)}))
    with pytest.raises(ValueError, match=r"1 unknown: .*rotary_emb.freq"):
        run(source, tmp_path / "other", image_token_id=500)


def test_an_unknown_layout_is_answered_with_what_is_supported(tmp_path):
    source = tmp_path / "bert"
    source.mkdir()
    save_file({"bert.embeddings.weight": torch.zeros(2)}, source / "model.safetensors")
    edit_json(source / "config.json", model_type="bert")
    with pytest.raises(ValueError, match=r"unknown.*'bert'") as caught:
        run(source, tmp_path / "out")
    for layout in ("InternViT", "InternVL-14B", "InternVL-Chat"):
        assert layout in str(caught.value)


def test_transformers_own_internvl_is_not_taken_for_14b(tmp_path):
    source = tmp_path / "native"
    source.mkdir()
    save_file({"model.vision_tower.embeddings.cls_token": torch.zeros(2)}, source / "model.safetensors")
    edit_json(source / "config.json", model_type="internvl", text_config={}, vision_config={})
    with pytest.raises(ValueError, match=r"layout of .* is unknown"):
        run(source, tmp_path / "out")


def test_a_folder_without_weights_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(OSError, match=r"There is no `.*nowhere`"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds no weights"):
        run(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("settings", [{"tokenizer": "x"}, {"image_token_id": 3}])
def test_settings_without_effect_are_refused(settings, vit, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` has no effect"):
        run(vit, tmp_path / "out", **settings)


# ----------------------------------------------------------------------------------------------------- types and shards
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_take_the_wanted_type(dtype, vit, tmp_path):
    out = run(vit, tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    stored = load_file(vit / "model.safetensors")
    assert config_of(out)["dtype"] == dtype
    assert all(torch.equal(tensor, stored[name].to(wanted)) for name, tensor in weights_of(out).items())
    assert AutoModel.from_pretrained(out).dtype == wanted


def test_numbers_too_large_for_half_precision_are_named(vit, tmp_path):
    edit_weights(vit, lambda tensors: tensors["encoder.layers.1.ls1"].fill_(1e5))
    with pytest.raises(ValueError, match=r"`encoder\.layers\.1\.ls1` holds 100000, which float16 cannot hold"):
        run(vit, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_shards_have_the_wanted_size_and_load_as_one(vit, tmp_path):
    out = run(vit, tmp_path / "out", max_shard_size="200KB")
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 210_000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    wanted = load_file(vit / "model.safetensors")
    assert all(
        torch.equal(tensor, wanted[name]) for name, tensor in AutoModel.from_pretrained(out).state_dict().items()
    )


def test_mixed_types_stay_aligned_and_whole(vit, tmp_path):
    def change(tensors):
        for name in list(tensors)[::3]:
            tensors[name] = tensors[name].to(torch.bfloat16)

    edit_weights(vit, change)
    wanted = load_file(vit / "model.safetensors")
    found = weights_of(run(vit, tmp_path / "out"))
    assert all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_tensor_is_read_at_a_time(vit, tmp_path, monkeypatch):
    """No tensor but the one at hand is alive while another is read."""
    import weakref

    from internvl.conversion.readers import tensors as tensors_module

    alive, most = weakref.WeakSet(), 0
    read = tensors_module.TensorReader.__getitem__

    def counted(self, name):
        nonlocal most
        tensor = read(self, name).clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(tensors_module.TensorReader, "__getitem__", counted)
    run(vit, tmp_path / "out", max_shard_size="1GB")
    assert most <= 2  # the new one, and the last until its name is bound again


def test_files_are_the_same_whether_the_system_copies_or_not(vit, tmp_path, monkeypatch):
    from internvl.conversion.repository import shards

    copied = []
    watched = SimpleNamespace(sendfile=lambda *places: copied.append(places) or os.sendfile(*places))
    monkeypatch.setattr(shards, "os", watched)  # not in the module itself, which `shutil` calls too
    monkeypatch.setattr(shards, "HAS_FILE_COPY", sys.platform == "linux")
    first = state_of(run(vit, tmp_path / "first"))
    assert bool(copied) == (sys.platform == "linux")
    monkeypatch.setattr(shards, "HAS_FILE_COPY", False)
    copied.clear()
    assert state_of(run(vit, tmp_path / "second")) == first
    assert not copied


# ------------------------------------------------------------------------------------------------- complete or not at all
def test_a_folder_that_is_not_empty_is_replaced_only_when_asked(vit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OSError, match="--overwrite"):
        run(vit, out)
    assert state_of(out).keys() == {"precious.txt"}
    run(vit, out, overwrite=True)
    assert "precious.txt" not in state_of(out)
    assert (out / "model.safetensors").exists()


def test_an_empty_folder_is_used(vit, tmp_path):
    (tmp_path / "out").mkdir()
    run(vit, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("place", [".", ".."])
def test_the_source_is_never_the_target(place, vit):
    before = state_of(vit)
    with pytest.raises(ValueError, match="must be a folder of its own"):
        run(vit, vit / place, overwrite=True)
    assert state_of(vit) == before


def test_a_failed_run_leaves_nothing_and_keeps_what_was_there(vit, tmp_path, monkeypatch):
    out = run(vit, tmp_path / "out")
    before = state_of(out)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("internvl.conversion.convert"), "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        run(vit, out, overwrite=True)
    assert state_of(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


def left_by_a_killed_run(folder: Path, **content: str) -> Path:
    """What lies beside `out` when the process was killed: a folder of that run, whose lock nobody holds."""
    left = folder / ".out.0123abcd.incomplete"
    left.mkdir()
    (left / "conversion.lock").touch()
    for name, text in content.items():
        (left / name).mkdir()
        (left / name / "file.txt").write_text(text)
    return left


def test_what_a_killed_run_left_is_swept_away(vit, tmp_path):
    left = left_by_a_killed_run(tmp_path, new="half")
    out = run(vit, tmp_path / "out")
    assert not left.exists()
    assert not (out / "file.txt").exists()
    left_by_a_killed_run(tmp_path)  # before it had written anything
    run(vit, out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


def test_a_run_killed_while_replacing_loses_nothing(vit, tmp_path):
    """Where the system cannot exchange two folders in one step, the old one is away for a moment."""
    left_by_a_killed_run(tmp_path, new="new", old="mine")
    edit_json(vit / "preprocessor_config.json", size="broken")
    with pytest.raises(ValueError, match="size"):
        run(vit, tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"file.txt": "mine"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_gives_the_new_folder_alone(exchanges, vit, tmp_path, monkeypatch):
    out = run(vit, tmp_path / "out")
    (out / "old.txt").write_text("old")
    if not exchanges:
        monkeypatch.setattr(target, "_exchange", lambda left, right: False)
    run(vit, out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


@pytest.mark.parametrize("name", [".out.incomplete", ".out.replaced", ".out.0123abcd.incomplete", ".out.lock"])
def test_a_folder_of_the_users_own_is_left_alone_whatever_its_name(name, vit, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("mine")
    run(vit, tmp_path / "out")
    run(vit, tmp_path / "out", overwrite=True)
    assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_a_second_run_to_one_place_is_refused_and_the_first_is_whole(vit, tmp_path, capsys, monkeypatch):
    codes = []
    write = importlib.import_module("internvl.conversion.convert").write_shards

    def meanwhile(*arguments, **settings):
        codes.append(main([str(vit), str(tmp_path / "out"), "--overwrite"]))
        return write(*arguments, **settings)

    monkeypatch.setattr(importlib.import_module("internvl.conversion.convert"), "write_shards", meanwhile)
    out = run(vit, tmp_path / "out")
    assert codes == [2]
    assert "Another conversion is writing OUT" in capsys.readouterr().err
    monkeypatch.undo()
    assert state_of(out) == state_of(run(vit, tmp_path / "again"))


def test_what_came_to_the_place_meanwhile_is_kept(vit, tmp_path, monkeypatch):
    write = importlib.import_module("internvl.conversion.convert").write_shards

    def meanwhile(*arguments, **settings):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
        return write(*arguments, **settings)

    monkeypatch.setattr(importlib.import_module("internvl.conversion.convert"), "write_shards", meanwhile)
    with pytest.raises(FileExistsError, match="not empty"):
        run(vit, tmp_path / "out")
    assert state_of(tmp_path / "out").keys() == {"precious.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


@pytest.mark.parametrize(
    "out", [".", "..", "/", "{vit}/part", "{vit}/../{name}/part", "file", "circle", "link/part/..", "link"]
)
def test_places_that_cannot_be_replaced_are_refused_in_one_line(out, vit, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    (work / "file").touch()
    (work / "circle").symlink_to("circle")
    (work / "link").symlink_to(vit)
    (vit / "part").mkdir()
    (vit / "part" / "precious.txt").write_text("mine")
    before = state_of(tmp_path)
    assert main([str(vit), out.format(vit=vit, name=vit.name), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: OUT (`")
    assert error.count("\n") == 1
    assert state_of(tmp_path) == before


def test_a_new_folder_within_the_source_is_one_of_its_own(vit, tmp_path):
    before = state_of(vit)
    out = run(vit, vit / "out")
    assert {name: digest for name, digest in state_of(vit).items() if not name.startswith("out/")} == before
    with pytest.raises(ValueError, match="is a part of the input"):
        run(vit, out, overwrite=True)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(is_there, vit, tmp_path):
    if is_there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    run(vit, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real", vit.name}


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(vit, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 605\.8 kB, but the disk of .* has 1\.0 kB left"):
        run(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- command line
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
    assert main([str(vit), str(tmp_path / "out"), "--max-shard-size", size]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ tokenizers
TEXTS = (
    "What is shown in the image? 1234 caf\u00e9 \u4e2d\u6587",
    " two  spaces\n\n",
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nHow many?<|im_end|><|im_start|>assistant\n",
)


@pytest.mark.parametrize(
    ("special", "num_unused", "settings"),
    [
        (LLAMA_TOKENS, 0, {}),
        (INTERNLM2_TOKENS, 4, {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["t.T", None]}}),
    ],
    ids=["llama", "internlm2"],
)
def test_a_sentencepiece_tokenizer_keeps_the_ids_of_the_published_slow_one(special, num_unused, settings, tmp_path):
    case = "chat_internlm2_v2" if num_unused else "chat_llama_v1"
    source = published(case, tmp_path)
    write_sentencepiece_tokenizer(source, special, num_unused, pad_token="</s>", **settings)
    out = run(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False, use_fast=False)
    for text in TEXTS:
        assert tokenizer(text).input_ids == slow_ids(source, text)
    assert config_of(out)["image_token_id"] == 332
    assert tokenizer.convert_tokens_to_ids(list(special.values())) == list(special)
    assert tokenizer.pad_token == "</s>"


def test_the_result_needs_neither_sentencepiece_nor_protobuf(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    write_sentencepiece_tokenizer(source, LLAMA_TOKENS)
    out = run(source, tmp_path / "out")
    (out / "tokenizer.model").unlink()
    assert AutoTokenizer.from_pretrained(out)("a").input_ids[0] == 1


def test_the_begin_token_of_14b_stays_when_the_end_token_is_asked_for(tmp_path):
    source = published_14b(tmp_path)
    out = run(source, tmp_path / "out")
    text = "summarize:a photo of a cat"
    tokenizer = AutoTokenizer.from_pretrained(out, use_fast=False, add_eos_token=True)
    assert tokenizer(text).input_ids == [*slow_ids(source, text), 2]
    tokenizer.add_eos_token = False
    assert tokenizer(text).input_ids == slow_ids(source, text)


def test_a_tokenizer_may_come_from_another_folder(tmp_path):
    make_tokenizer(add_bos=False, eos_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    out = run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    processor = AutoProcessor.from_pretrained(out)
    assert processor.image_token_id == config_of(out)["image_token_id"] == 349
    assert processor.chat_template == (out / "chat_template.jinja").read_text()


def test_the_tokenizers_own_chat_template_gives_way_to_that_of_the_checkpoint(tmp_path):
    source = published_chat(tmp_path)
    edit_json(source / "tokenizer_config.json", chat_template="{{ 'another one' }}")
    out = run(source, tmp_path / "out")
    assert "another one" not in (out / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == (out / "chat_template.jinja").read_text()


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    make_tokenizer(special_tokens=("<img>",)).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="lacks `</img>`, `<IMG_CONTEXT>`"):
        run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", tokenizer=tmp_path / "tokenizer")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    source = published_chat(tmp_path)
    extra = tuple(f"<extra{index}>" for index in range(300))
    make_tokenizer(special_tokens=("<img>", "</img>", "<IMG_CONTEXT>", *extra)).save_pretrained(source)
    with pytest.raises(ValueError, match=r"ids up to \d+, the model has embeddings for 528 tokens"):
        run(source, tmp_path / "out")


def test_an_image_token_that_contradicts_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`image_token_id` is 7, the tokenizer has 349"):
        run(published_chat(tmp_path), tmp_path / "out", image_token_id=7)


def test_an_image_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must lie in the vocabulary of 528 tokens, got 528"):
        run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", image_token_id=528)


def test_a_tokenizer_that_is_only_remote_code_is_refused(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    (source / "vocab.json").write_text("{}")
    edit_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}, tokenizer_class="OwnTokenizer"
    )
    with pytest.raises(ValueError, match=r"is remote code .`OwnTokenizer`., which is not run"):
        run(source, tmp_path / "out")


def test_a_folder_named_as_tokenizer_must_hold_one(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(OSError, match="has no tokenizer"):
        run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", tokenizer=tmp_path / "none")
