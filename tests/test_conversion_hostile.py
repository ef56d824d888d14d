"""Broken or hostile sources: nothing of theirs is run or passed on, and each is refused in one line."""

import json
import math
import os
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.conversion.__main__ import main
from internvl.conversion.readers.foreign_settings import OWN_MODULES

from .fixtures_conversions import edit_json, json_of, refused, run, told
from .fixtures_published import published, published_14b, published_chat


# ------------------------------------------------------------------------------------------------- what a source names
@pytest.fixture
def evil(tmp_path):
    """A folder with a module that leaves a mark when it runs, and the mark."""
    folder, mark = tmp_path / "evil", tmp_path / "sprung"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\nclass Evil: pass\n")
    return folder, mark


def references(folder: Path) -> dict[str, str]:
    """An `auto_map` whose every entry leads to the folder."""
    names = (
        "AutoConfig AutoModel AutoModelForCausalLM AutoModelForImageTextToText AutoProcessor AutoImageProcessor"
    ).split()
    return dict.fromkeys(
        [*names, "AutoTokenizer", "AutoVideoProcessor", "AutoFeatureExtractor"], f"{folder}--evil.Evil"
    )


def poisoned(source: Path, auto_map: dict[str, str]) -> None:
    """Names code in every file and at every depth where transformers or its pipelines may look for it."""
    bad = {
        "auto_map": auto_map,
        "_attn_implementation": "user/kernel",
        "attn_implementation": {"": "user/kernel"},
        "custom_pipelines": {"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}},
        "custom_generate": "user/repository",
        "quantization_config": {"quant_method": "none", "auto_map": auto_map},
        "trust_remote_code": True,
        "use_kernels": True,
        "a_key_of_tomorrow": {"auto_map": auto_map, "module": "evil.Evil"},
        "another": ["evil.Evil"],
    }
    config = json_of(source)
    parts = {key: {**value, **bad} for key, value in config.items() if key.endswith("_config")}
    for part in parts.values():
        if part.get("model_type") == "qwen2":
            part["rope_scaling"] = {"type": "linear", "factor": 2.0, "auto_map": auto_map}
        # Labels and tokens may have any name, and properties of their own.
        part["id2label"] = {"0": {"auto_map": auto_map}, "1": "bus"}
        part["label2id"] = {"auto_map": auto_map, "bus": 1, "trust_remote_code": True}
    del bad["quantization_config"]
    edit_json(source / "config.json", **bad, **parts)
    for part in parts.values():
        del part["quantization_config"]
    edit_json(source / "config.json", **parts)
    edit_json(source / "preprocessor_config.json", **bad, size={"height": 56, "width": 56, "auto_map": auto_map})
    edit_json(source / "generation_config.json", **bad)
    for name in ("processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json"):
        edit_json(source / name, **bad, image_processor=bad)
    if (source / "tokenizer_config.json").exists():
        settings = json_of(source, "tokenizer_config.json")
        for token in settings.get("added_tokens_decoder", {}).values():
            token.update(auto_map=auto_map, use_kernels=True, module="evil.Evil")
        edit_json(source / "tokenizer_config.json", **{**settings, **bad}, another_token={"content": "<s>", **bad})
        edit_json(source / "special_tokens_map.json", eos_token={"content": "</s>", **bad})


def strings_of(content) -> list[str]:
    if isinstance(content, dict):
        return [*content, *(text for value in content.values() for text in strings_of(value))]
    if isinstance(content, list):
        return [text for value in content for text in strings_of(value)]
    return [content] if isinstance(content, str) else []


def assert_clean(out: Path) -> None:
    """Every `auto_map` names files of the folder, and no file speaks of what the source named."""
    for file in out.glob("*.json"):
        content = json.loads(file.read_text())
        assert not [text for text in strings_of(content) if "evil" in text.lower() or "user/" in text], file.name
        assert not {"custom_pipelines", "custom_generate", "trust_remote_code", "use_kernels"} & set(
            strings_of(content)
        )
        for auto_map in maps_of(content):
            for place in auto_map.values():
                assert (out / f"{place.partition('.')[0]}.py").is_file(), (file.name, place)


def maps_of(content) -> list[dict]:
    if isinstance(content, list):
        return [found for part in content for found in maps_of(part)]
    if not isinstance(content, dict):
        return []
    own = [content["auto_map"]] if "auto_map" in content else []
    return own + [found for part in content.values() for found in maps_of(part)]


MAKERS = {
    "vision": lambda folder: published("intern_vit_6b", folder),
    "contrastive": published_14b,
    "chat": published_chat,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_that_a_source_names_is_run_or_passed_on_in_any_format(kind, evil, tmp_path, capsys):
    folder, mark = evil
    source = MAKERS[kind](tmp_path)
    poisoned(source, references(folder))
    shutil.copyfile(folder / "evil.py", source / "evil.py")
    own, said = told(source, tmp_path / "own", verify=True)
    assert "custom_pipelines" in said.partition("Not taken over from config.json")[2].partition("\n")[0]
    results = [own, run(source, tmp_path / "published", to="published", verify=True)]
    results.append(run(own, tmp_path / "back", to="published", verify=True))
    # The records of a result are foreign as well.
    remembering = shutil.copytree(own, tmp_path / "remembering")
    manifest = json_of(own, "conversion.json")
    for record in manifest["forms"].values():
        record["config"] = {**record["config"], "auto_map": references(folder), "custom_pipelines": {"evil": {}}}
        record["files"]["preprocessor_config.json"] = {"auto_map": references(folder), "size": 56}
    edit_json(remembering / "conversion.json", **manifest)
    results.append(run(remembering, tmp_path / "remembered", to="published", verify=True))
    for out in results:
        assert_clean(out)
        assert not (out / "evil.py").exists()
    assert not mark.exists()


def test_the_native_format_names_no_code(evil, tmp_path):
    folder, mark = evil
    source = published_chat(tmp_path)
    poisoned(source, references(folder))
    out = run(source, tmp_path / "out", to="native")
    assert_clean(out)
    assert not [found for file in out.glob("*.json") for found in maps_of(json.loads(file.read_text()))]
    assert not mark.exists()


@pytest.mark.parametrize(
    "place", ["evil.Evil", "configuration_internvl--evil.Evil", "a.b.C", "../configuration_internvl.X", 5, None]
)
def test_only_modules_of_this_package_may_be_named(place, vit, tmp_path):
    edit_json(vit / "config.json", auto_map={"AutoConfig": place})
    for to in ("internvl", "published"):
        config = json_of(run(vit, tmp_path / to, to=to))
        assert {reference.partition(".")[0] for reference in config["auto_map"].values()} <= OWN_MODULES


def test_an_adapter_names_no_code_of_its_base(evil, tmp_path):
    folder, mark = evil
    base = published_chat(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    width = load_file(base / "model.safetensors")["language_model.model.layers.0.self_attn.q_proj.weight"].shape
    save_file(
        {name.format("A"): torch.ones(2, width[1]), name.format("B"): torch.ones(width[0], 2)},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    edit_json(adapter / "adapter_config.json", **settings, auto_mapping={"parent_library": "evil"})
    poisoned(base, references(folder))
    assert_clean(run(adapter, tmp_path / "out", base=base))
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------- links
def secret(tmp_path: Path, text: str = "key") -> Path:
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "secret").write_text(text)
    return tmp_path / "home" / "secret"


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("merges.txt", "absolute"),
        ("tokenizer.model", "relative"),
        ("config.json", "link-to-link"),
        ("README.md", "to-nothing"),
        ("vocab.json", "absolute"),
        ("chat_template.jinja", "relative"),
        ("x.safetensors", "link-to-link"),
    ],
)
def test_links_that_leave_the_source_are_refused(name, way, vit, tmp_path, capsys):
    source, target = vit, secret(tmp_path)
    (source / name).unlink(missing_ok=True)
    if way == "link-to-link":
        (source / "inner").symlink_to(target)
        target = Path("inner")
    elif way == "relative":
        target = Path("..", "home", "secret")
    elif way == "to-nothing":
        target = tmp_path / "home" / "nothing"
    (source / name).symlink_to(target)
    error = refused(capsys, source, tmp_path / "out")
    assert "holds links that leave it" in error
    assert name in error


@pytest.mark.parametrize("depth", ["checkpoint-3", "checkpoint-3/global_step3"])
def test_folders_that_are_links_are_refused_too(depth, vit, tmp_path, capsys):
    outside = tmp_path / "outside"
    shutil.move(vit, outside)
    place = tmp_path / "run" / depth
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)
    assert "holds links that leave it" in refused(capsys, tmp_path / "run", tmp_path / "out")


def test_links_that_nobody_reads_may_lead_anywhere(vit, tmp_path):
    outside = secret(tmp_path, "words that no file has of its own")
    (vit / "notes.pdf").symlink_to(outside)
    (vit / "mine").symlink_to(tmp_path / "home")
    run(vit / "model.safetensors", tmp_path / "out")  # of a file, folders beside it are not looked into
    (vit / "mine").unlink()
    run(vit, tmp_path / "out2")
    written = [file for out in ("out", "out2") for file in (tmp_path / out).rglob("*") if file.is_file()]
    assert {"config.json", "model.safetensors"} <= {file.name for file in written}
    assert not [file for file in written if outside.read_bytes() in file.read_bytes()]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "README.md", "head.pth"])
def test_links_beside_a_file_are_refused_where_they_are_read(name, vit, tmp_path, capsys):
    (vit / name).unlink(missing_ok=True)
    (vit / name).symlink_to(secret(tmp_path))
    assert name in refused(capsys, vit / "model.safetensors", tmp_path / "out")


def test_links_within_the_source_and_the_source_itself_as_a_link_are_followed(vit, tmp_path):
    (vit / "weights").mkdir()
    (vit / "model.safetensors").replace(vit / "weights" / "w.safetensors")
    (vit / "model.safetensors").symlink_to(Path("weights", "w.safetensors"))
    (tmp_path / "link").symlink_to(vit)
    assert (run(tmp_path / "link", tmp_path / "out") / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["../../../other/blobs/1", "../../../../home/secret", "../../blobs/to-secret"])
def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs_alone(target, vit, tmp_path, capsys):
    secret(tmp_path)
    repository = tmp_path / "models--user--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    (tmp_path / "other" / "blobs").mkdir(parents=True)
    (tmp_path / "other" / "blobs" / "1").write_text("key")
    (repository / "blobs" / "to-secret").symlink_to(tmp_path / "home" / "secret")
    shutil.copytree(vit, snapshot)
    (snapshot / "merges.txt").symlink_to(target)
    assert "merges.txt" in refused(capsys, snapshot, tmp_path / "out")


def test_folders_given_as_options_are_looked_at_in_the_same_way(tmp_path, capsys):
    source, target = published_chat(tmp_path), secret(tmp_path)
    other = shutil.copytree(source, tmp_path / "other")
    (other / "merges.txt").unlink(missing_ok=True)
    (other / "merges.txt").symlink_to(target)
    for option in ("--tokenizer", "--vision-config", "--head", "--base", "--vision-tower"):
        error = refused(capsys, source, tmp_path / "out", option, str(other))
        assert "holds links that leave it" in error or "has no effect" in error


def test_a_pipe_is_no_file_of_a_checkpoint(vit, tmp_path, capsys):
    os.mkfifo(vit / "generation_config.json")
    os.mkfifo(vit / "extra.bin")
    run(vit, tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a file" in refused(capsys, tmp_path / "pipe", tmp_path / "out2")
    (vit / "model.safetensors").unlink()
    assert "holds no weights" in refused(capsys, vit, tmp_path / "out2")


# ------------------------------------------------------------------------------------------------------ broken weights
def as_bin(source: Path, content, **settings) -> Path:
    (source / "model.safetensors").unlink(missing_ok=True)
    file = source / "pytorch_model.bin"
    torch.save(content, file, **settings)
    return file


FILES = {
    "empty": (b"", "it is empty"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG image"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "a page of the web"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "note": (b"remember the milk\n", "a text"),
    "safetensors": (struct.pack("<Q", 16) + b'{"a":1}         ', "safetensors under another ending"),
    "zeros": (bytes(1000), "something else"),
    "pickle": (b"\x80\x02.", "complete PyTorch file"),
    "zip": (b"PK\x03\x04" + bytes(100), "complete PyTorch file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF model"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_weights_is_called_what_it_is(kind, tmp_path, capsys):
    content, said = FILES[kind]
    for ending in (".bin", ".pth", ".pt"):
        file = tmp_path / f"weights{ending}"
        file.write_bytes(content)
        error = refused(capsys, file, tmp_path / "out")
        assert file.name in error
        assert said in error


@pytest.mark.parametrize("name", ["note.txt", "weights", "config.json", "photo.png"])
def test_any_file_may_be_named_and_is_answered_by_its_name(name, tmp_path, capsys):
    (tmp_path / name).write_text("remember the milk")
    assert name in refused(capsys, tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        {1: torch.zeros(2)},
        {math.nan: torch.zeros(2)},
        {"\ud800": torch.zeros(2)},
        {("a", "b"): torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(2, dtype=torch.uint16)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.zeros(1).expand(2**40)},
        {"a": torch.empty(3, device="meta")},
        {"a": "text"},
        [torch.zeros(2)],
        torch.zeros(2),
        {},
    ],
    ids=range(14),
)
def test_tensors_that_are_no_weights_are_refused_with_the_file(content, vit, tmp_path, capsys):
    as_bin(vit, content)
    error = refused(capsys, vit, tmp_path / "out")
    assert "pytorch_model.bin" in error or "layout" in error


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint16, torch.complex64])
def test_types_of_safetensors_that_are_no_weights_are_refused_with_the_file(dtype, vit, tmp_path, capsys):
    tensors = load_file(vit / "model.safetensors")
    save_file({**tensors, "a": torch.zeros(2).to(dtype)}, vit / "model.safetensors")
    assert "model.safetensors" in refused(capsys, vit, tmp_path / "out")


def bomb(file: Path, size: int) -> None:
    """A PyTorch archive whose data, compressed, is a thousandth of what it says."""
    torch.save({"embeddings.class_embedding": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, bytes(size) if name.endswith("data/0") else data)


def test_an_archive_that_grows_is_refused_before_it_does(vit, tmp_path, capsys):
    (vit / "model.safetensors").unlink()
    bomb(vit / "pytorch_model.bin", 100 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "compressed" in refused(capsys, vit, tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


@pytest.mark.parametrize("cut", [5, 40, 300, 2000])
@pytest.mark.parametrize("is_archive", [True, False])
def test_every_truncation_of_a_pytorch_file_has_its_name(is_archive, cut, vit, tmp_path, capsys):
    file = as_bin(vit, load_file(vit / "model.safetensors"), _use_new_zipfile_serialization=is_archive)
    whole = file.read_bytes()
    without_table = [whole[:-22] + bytes(22)] if is_archive else []
    for data in (whole[:cut], whole[:-cut], whole[: len(whole) // 2] + whole[-cut:], *without_table):
        file.write_bytes(data)
        assert "pytorch_model.bin" in refused(capsys, vit, tmp_path / "out")


class Allocation:
    """Pickled as a call that makes memory."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("function", [bytearray, torch.FloatTensor, torch.ByteTensor])
def test_a_file_that_asks_for_memory_is_refused_before_it_gets_any(function, is_archive, vit, tmp_path, capsys):
    as_bin(vit, {"a": Allocation(function, 5 * 10**8)}, _use_new_zipfile_serialization=is_archive)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "it asks for an empty" in refused(capsys, vit, tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


def mutated(data: bytes, rng: random.Random) -> bytes:
    way = rng.randrange(4)
    if way == 0:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    if way == 1:
        start = rng.randrange(len(data))
        del changed[start : start + rng.randrange(1, 200)]
    for _ in range(rng.choice((1, 4, 32))):
        # The first and the last kilobyte say what the rest is.
        end = rng.randrange(min(1000, len(changed)))
        changed[rng.choice((rng.randrange(len(changed)), end, -1 - end))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize(
    "kind", ["archive", "legacy", "safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_mutated_files_are_answered_or_converted_and_never_a_traceback(kind, tmp_path, capsys):
    rng = random.Random(kind)
    source = published_chat(tmp_path) if kind.startswith("tokenizer") else published("intern_vit_6b", tmp_path)
    file = source / (kind if kind.endswith("json") else "model.safetensors")
    if kind in ("archive", "legacy"):
        file = as_bin(source, load_file(file), _use_new_zipfile_serialization=kind == "archive")
    whole = file.read_bytes()
    for number in range(12 if kind.startswith("tokenizer") else 40):
        file.write_bytes(mutated(whole, rng))
        option = "--overwrite" if kind.startswith("tokenizer") else "--dry-run"
        assert main([str(source), str(tmp_path / "out"), option]) in (0, 2), number
        error = capsys.readouterr().err
        assert "Traceback" not in error
        said = [line for line in error.splitlines() if line.startswith("error: ")]
        assert all(str(source) in line or "config.json" in line for line in said), said


# ----------------------------------------------------------------------------------------------- broken configurations
TEXTS = {
    "list": "[]",
    "text": '"config"',
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep-list": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "twice": '{"hidden_size": 48, "hidden_size": 64}',
    "surrogate": '{"model_type": "\\ud800"}',
    "nan": '{"layer_norm_eps": NaN}',
    "huge": '{"hidden_size": ' + "9" * 5000 + "}",
    "cut": '{"hidden_size": 48',
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json_that_no_configuration_is_gets_the_name_of_its_file(kind, vit, tmp_path, capsys):
    (vit / "config.json").write_text(TEXTS[kind])
    assert "config.json" in refused(capsys, vit, tmp_path / "out")


VALUES = (0, -1, 10**30, 1.5, "48", None, [], {}, True, [48], {"a": 1}, "\U0001f600", 2**31)


@pytest.mark.parametrize(
    "key",
    "hidden_size num_hidden_layers num_attention_heads patch_size image_size intermediate_size norm_type "
    "num_channels".split(),
)
def test_settings_of_wrong_type_or_size_are_refused_by_name(key, vit, tmp_path, capsys):
    right = json_of(vit)[key]
    for value in VALUES:
        edit_json(vit / "config.json", **{key: value})
        code = main([str(vit), "--dry-run"])
        error = capsys.readouterr().err.strip()
        assert code in (0, 2)
        if code == 2:
            assert len(error.splitlines()[-1]) > 30
        else:
            assert (
                value == right or value in (None, {}, [], {"a": 1}, [48]) or key in ("intermediate_size", "norm_type")
            ), value


@pytest.mark.parametrize("part", ["vision_config", "llm_config"])
def test_parts_of_a_configuration_that_are_none_are_refused(part, tmp_path, capsys):
    source = published_chat(tmp_path)
    wrong = (None, [], "x", 5, {}, {"model_type": 5}, {"model_type": "evil"}, {"hidden_size": "x"}, {"vocab_size": -1})
    for value in wrong:
        edit_json(source / "config.json", **{part: value})
        assert refused(capsys, source, tmp_path / "out", "--dry-run"), value


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_the_other_files_are_named_too(name, tmp_path, capsys):
    source = published_chat(tmp_path)
    for kind in ("list", "deep", "surrogate", "cut"):
        (source / name).write_text(TEXTS[kind])
        assert name in refused(capsys, source, tmp_path / "out"), kind


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_a_name_that_is_none_is_not_the_current_folder(name, vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(vit)
    for arguments in ([name, str(tmp_path / "out")], [str(vit), name]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert "must be a name, got" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vision", "chat"])
@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_means_and_deviations_that_no_image_has_are_refused(key, kind, tmp_path, capsys):
    source = MAKERS[kind](tmp_path)
    for value in ("x", 5, [], [1], [0.1] * 4, ["a", "b", "c"], [0.4, 0.4, "x"], {"a": 1}, [True] * 3, [math.inf] * 3):
        edit_json(source / "preprocessor_config.json", **{key: value})
        error = refused(capsys, source, tmp_path / "out")
        assert f"`{key}` of `{source / 'preprocessor_config.json'}` must be three numbers" in error
    edit_json(source / "preprocessor_config.json", **{key: [0, 0, 0]})
    assert main([str(source), str(tmp_path / "out")]) == (2 if key == "image_std" else 0)


@pytest.mark.parametrize("value", [False, 5, "evil.Evil", "int8", ["float32"], {"": "float32"}])
def test_a_type_of_weights_that_is_none_is_not_passed_on(value, vit, tmp_path):
    edit_json(vit / "config.json", torch_dtype=value, dtype=value)
    config = json_of(run(vit, tmp_path / "out", to="published", verify=True))
    assert "dtype" not in config
    assert config.get("torch_dtype") in (None, "float32")


@pytest.mark.parametrize("way", ["relative", "upwards", "number", "on-the-hub", "downloaded"])
def test_a_base_is_read_only_where_training_on_this_machine_wrote_it(way, tmp_path, monkeypatch, capsys):
    base = published_chat(tmp_path / "private")
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "adapter"
    if way == "downloaded":
        adapter = tmp_path / "models--user--lora" / "snapshots" / "abc"
    adapter.mkdir(parents=True)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    names = {
        "relative": base.relative_to(tmp_path),
        "upwards": tmp_path / "adapter" / ".." / base.relative_to(tmp_path),
        "number": 5,
        "on-the-hub": "OpenGVLab/InternVL2-1B",
    }
    name = names.get(way, base)
    named = name if way == "number" else str(name)
    edit_json(adapter / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=2, base_model_name_or_path=named)
    assert "--base DIR" in refused(capsys, adapter, tmp_path / "out")
