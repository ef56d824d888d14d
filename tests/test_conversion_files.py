"""Conversion of every kind of file with weights: what is read and refused, and types and shards of what is written."""

import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from internvl.conversion.readers.opening import open_source

from .fixtures_conversions import (
    BoobyTrap,
    assert_rejected,
    assert_same,
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
from .fixtures_published import GOLDEN, published, published_chat


# ---------------------------------------------------------------------------------------------------- kinds of sources
def split_in_two(source: Path, suffix: str) -> None:
    """Shards and an index in the place of the one file."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_torch_state_dict(tensors, source, max_shard_size=400_000, safe_serialization=suffix == "safetensors")
    assert len(list(source.glob(f"*-of-00002.{suffix}"))) == 2


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
    assert_same(weights_of(run(vit, tmp_path / "out")), wanted)
    assert state_of(vit) == before


def test_a_single_file_may_be_named(vit, tmp_path):
    assert_same_weights(run(vit / "model.safetensors", tmp_path / "out"), vit)


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
    assert_same(weights_of(run(snapshot, tmp_path / "out")), wanted)
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
    assert_rejected(vit, tmp_path, "points outside its folder")


def test_a_missing_shard_is_named(vit, tmp_path):
    split_in_two(vit, "bin")
    (vit / "pytorch_model-00002-of-00002.bin").unlink()
    assert_rejected(vit, tmp_path, r"does not have: pytorch_model-00002-of-00002\.bin", kind=OSError)


@pytest.mark.parametrize("form", ["zip", "plain-pickle"])
def test_a_booby_trapped_file_is_refused_by_name_and_not_run(form, vit, tmp_path, capsys):
    (vit / "model.safetensors").unlink()
    content = {"embeddings.class_embedding": BoobyTrap(tmp_path / "sprung")}
    if form == "zip":
        torch.save(content, vit / "pytorch_model.bin")
    else:
        (vit / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    assert "pytorch_model.bin` was refused" in refused(capsys, vit, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


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
    assert_rejected(vit, tmp_path, r"model\.safetensors` is no complete safetensors file", kind=OSError)


def test_headers_are_read_without_their_weights(vit):
    source = open_source(vit)
    assert source.tensors["embeddings.class_embedding"].shape == (1, 1, 64)
    assert source.num_bytes == sum(tensor.nbytes for tensor in load_file(vit / "model.safetensors").values())


# ----------------------------------------------------------------------------------------------------- what is refused
def test_everything_that_does_not_fit_is_listed_at_once(vit, tmp_path):
    with edited_weights(vit) as tensors:
        del tensors["encoder.layers.0.ls1"], tensors["encoder.layers.2.norm1.weight"]
        tensors["encoder.layers.1.ls2"] = torch.zeros(7)
        tensors["head.weight"] = torch.zeros(2)
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
    assert_rejected(vit, tmp_path, r"1 in more than one file: embeddings.class_embedding")


def test_rotary_buffers_are_dropped_by_name_and_nothing_else_is(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    with edited_weights(source) as tensors:
        tensors.update({name: torch.zeros(8)})
    out, messages = told(source, tmp_path / "out", image_token_id=500)
    assert name not in weights_of(out)
    assert name in messages
    with edited_weights(source) as tensors:
        tensors.update({name.replace("inv_freq", "freq"): torch.zeros(8)})
    with pytest.raises(ValueError, match=r"1 unknown: .*rotary_emb.freq"):
        run(source, tmp_path / "other", image_token_id=500)


@pytest.mark.parametrize(
    ("tensor", "config"),
    [
        ("bert.embeddings.weight", {"model_type": "bert"}),
        # transformers' own InternVL has the `model_type` of the published 14B.
        (
            "model.vision_tower.embeddings.cls_token",
            {"model_type": "internvl", "text_config": {}, "vision_config": {}},
        ),
    ],
)
def test_an_unknown_layout_is_answered_with_what_is_supported(tensor, config, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({tensor: torch.zeros(2)}, source / "model.safetensors")
    edit_json(source / "config.json", **config)
    with pytest.raises(ValueError, match=rf"layout of .* is unknown.*'{config['model_type']}'") as caught:
        run(source, tmp_path / "out")
    for layout in ("InternViT", "InternVL-14B", "InternVL-Chat"):
        assert layout in str(caught.value)


def test_a_folder_without_weights_and_a_missing_one_are_named(tmp_path):
    assert_rejected(tmp_path / "nowhere", tmp_path, r"There is no `.*nowhere`", kind=OSError)
    (tmp_path / "empty").mkdir()
    assert_rejected(tmp_path / "empty", tmp_path, "holds no weights", kind=OSError)


@pytest.mark.parametrize(
    ("case", "setting", "reason"),
    [
        ("intern_vit_6b", {"tokenizer": "x"}, "reads no text"),
        ("intern_vit_6b", {"image_token_id": 3}, "no image stands in a text"),
        ("intern_vit_6b", {"num_heads": 4}, "says how many there are"),
        ("intern_vit_6b", {"drop_unused_blocks": True}, "only a chat model"),
        ("internvl_14b", {"drop_unused_blocks": True}, "only a chat model"),
        ("chat_llama_v1", {"lora_alpha": 8}, "no adapters in"),
        ("chat_llama_v1", {"base": "x"}, "no folder of an adapter"),
        ("chat_llama_v1", {"vision_tower": "x"}, "no checkpoint of the LLaVA code base"),
        ("chat_llama_v1", {"vision_config": "x"}, "no checkpoint of the LLaVA code base"),
        ("chat_qwen2_v2", {"llama_decoder": True}, "no InternLM2 decoder"),
    ],
)
def test_settings_without_effect_are_refused(case, setting, reason, tmp_path):
    assert_rejected(GOLDEN / case, tmp_path, f"`{next(iter(setting))}` has no effect: .*{reason}", **setting)


# ---------------------------------------------------------------------------------------------------- types and shards
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_take_the_wanted_type(dtype, vit, tmp_path):
    out = run(vit, tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    assert json_of(out)["dtype"] == dtype
    assert_same(weights_of(out), {name: tensor.to(wanted) for name, tensor in weights_of(vit).items()})
    assert AutoModel.from_pretrained(out).dtype == wanted


def test_numbers_too_large_for_half_precision_are_named(vit, tmp_path):
    with edited_weights(vit) as tensors:
        tensors["encoder.layers.1.ls1"].fill_(1e5)
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
    assert_same(AutoModel.from_pretrained(out).state_dict(), load_file(vit / "model.safetensors"))


def test_mixed_types_stay_aligned_and_whole(vit, tmp_path):
    with edited_weights(vit) as tensors:
        for name in list(tensors)[::3]:
            tensors[name] = tensors[name].to(torch.bfloat16)
    assert_same_weights(run(vit, tmp_path / "out"), vit)


def test_one_tensor_is_read_at_a_time(vit, tmp_path, monkeypatch):
    """No tensor but the one at hand is alive while another is read."""
    import weakref

    from internvl.conversion.readers import tensors as tensors_module

    alive, most = weakref.WeakSet(), 0
    read = tensors_module.TensorReader.read

    def counted(self, *place):
        nonlocal most
        tensor = read(self, *place).clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(tensors_module.TensorReader, "read", counted)
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
