"""`python -m internvl.publishing code DIR`: every file that loading runs is listed, and whose it is."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_cached_module_file

from internvl.publishing.__main__ import main
from internvl.publishing.code import list_code

from .fixtures_conversions import edit_json, run
from .fixtures_published import published_14b, published_chat


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    chat = published_chat(folder)
    found = {form: run(chat, folder / form, to=form) for form in ("internvl", "published", "native")}
    return {**found, "contrastive": run(published_14b(folder), folder / "contrastive")}


@pytest.fixture
def folder(results, tmp_path):
    return shutil.copytree(results["internvl"], tmp_path / "folder")


def said(capsys, folder, *options):
    code = main(["code", str(folder), *options])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize("form", ["internvl", "published", "contrastive"])
def test_all_files_that_are_run_are_listed_with_their_hash_and_are_ours(form, results, capsys):
    folder = results[form]
    code, text = said(capsys, folder)
    assert code == 0
    assert "All of it is this package's." in text
    listed = {line.split()[1]: line.split()[0] for line in text.splitlines() if "(this package's)" in line}
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    # A folder holds no code besides.
    assert listed.keys() == {file.name for file in folder.glob("*.py")}


def test_it_lists_what_transformers_copies_to_run(vit, tmp_path):
    """The remote loader copies what it runs, and what that imports, into its cache of modules."""
    folder = run(vit, tmp_path / "copied_to_run")
    (folder / "unused.py").write_text("raise SystemExit\n")
    copied = set()
    for module in ("configuration_internvl", "modeling_internvit", "image_processing_internvl"):
        place = Path(HF_MODULES_CACHE) / get_cached_module_file(str(folder), f"{module}.py")
        copied |= {path.name for path in place.parent.glob("*.py")} - {"__init__.py"}
    assert len(copied) > 3
    assert copied == {file.name for file in list_code(folder).files}


def test_a_form_without_code_needs_no_trust(results, capsys):
    code, text = said(capsys, results["native"])
    assert code == 0
    assert "names code: it loads without trust_remote_code" in text


def test_a_file_that_was_tampered_with_is_marked_and_what_it_imports_is_listed(folder, capsys):
    (folder / "hidden.py").write_text("raise SystemExit\n")
    with (folder / "layers_internvl.py").open("a") as file:
        file.write("\nfrom .hidden import X\n")
    code, text = said(capsys, folder)
    assert code == 1
    for name in ("hidden.py", "layers_internvl.py"):
        assert [line for line in text.splitlines() if line.endswith(f"{name}  (NOT this package's)")]
    assert "Not this package's, so read it first: hidden.py, layers_internvl.py." in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoModel": "user/evil--modeling.Evil"}}),
        (
            "config.json",
            {"text_config": {"model_type": "qwen2", "auto_map": {"AutoModel": "user/evil--modeling.Evil"}}},
        ),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "user/evil--processing.Evil"}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "/user/evil--p.Evil"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "user/evil--tokenization.Evil"]}}),
        ("tokenizer_config.json", {"auto_map": ["user/evil--tokenization.Evil", None]}),
        ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "user/evil--video.Evil"}}),
        ("config.json", {"custom_pipelines": {"task": {"impl": "user/evil--pipeline.Evil"}}}),
        ("config.json", {"auto_map": {"AutoModel": "../user/evil.Evil"}}),
        ("config.json", {"auto_map": {"AutoModel": "user/evil.deep.Evil"}}),
        ("config.json", {"auto_map": {"AutoModel": 5, "x": "user/evil--a.B"}}),
        ("config.json", {"_attn_implementation": "user/evil"}),
        ("config.json", {"text_config": {"attn_implementation": {"": "paged|user/evil@main:f"}}}),
        ("generation_config.json", {"nested": [{"attn_implementation": "user/evil"}]}),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "user/evil"}}),
        ("decoder_tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["user/evil--t.T", None]}}),
    ],
)
def test_code_that_lies_elsewhere_is_named_with_who_names_it(file, content, folder, capsys):
    (folder / file).parent.mkdir(exist_ok=True)
    edit_json(folder / file, **content)
    code, text = said(capsys, folder)
    assert code == 1
    line = next(line for line in text.splitlines() if line.startswith("elsewhere") and "user/evil" in line)
    assert file in line


def test_the_base_of_an_adapter_that_lies_alone_is_named(tmp_path, capsys):
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="user/base", peft_type="LORA")
    code, text = said(capsys, tmp_path)
    assert code == 1
    assert "'user/base--its code' (base_model_name_or_path in adapter_config.json)" in text
    (tmp_path / "config.json").write_text("{}")  # from which transformers then takes the model
    assert said(capsys, tmp_path)[0] == 0


@pytest.mark.parametrize("file", ["modules.json", "decoder_tokenizer/tokenizer_config.json"])
def test_files_that_lists_and_sub_folders_name_lie_in_the_folder(file, folder, capsys):
    content = {"modules.json": [{"type": "mine.Module"}]}.get(file, {"auto_map": {"AutoTokenizer": ["mine.T", None]}})
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    (folder / "mine.py").write_bytes(b"\xff")
    code, text = said(capsys, folder)
    assert code == 1
    assert "mine.py  (NOT this package's)" in text


def test_what_is_named_and_missing_is_marked(folder, capsys):
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_missing.M"})
    code, text = said(capsys, folder)
    assert code == 1
    assert "modeling_missing.py  (named, but not there)" in text
    assert "Not in this folder: modeling_missing.py." in text
    assert "read it first" not in text


@pytest.mark.parametrize("file", ["custom_generate/generate.py", "handler.py", "pipeline.py"])
def test_code_that_no_configuration_names_is_listed(file, folder, capsys):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("from .more import generate\n")
    (folder / "more.py").write_text("def generate(): pass\n")
    code, text = said(capsys, folder)
    assert code == 1
    assert f"{file}  (NOT this package's)" in text


def test_the_snippet_is_pinned_to_a_commit(folder, tmp_path, capsys):
    _, text = said(capsys, folder, "--repo", "user/mine", "--revision", "0123abc")
    assert 'repository, revision = "user/mine", "0123abc"' in text
    assert '"revision": revision, "code_revision": revision' in text
    assert "model = AutoModelForImageTextToText.from_pretrained(repository, **pinned)" in text
    assert "processor = AutoProcessor.from_pretrained(repository, **pinned)" in text
    compile(text[text.index("from transformers") :], "snippet", "exec")
    # A snapshot of the Hub's cache says itself which it is.
    snapshot = tmp_path / "models--user--name" / "snapshots" / "feed"
    shutil.copytree(folder, snapshot)
    assert 'repository, revision = "user/name", "feed"' in said(capsys, snapshot)[1]


def test_the_bundled_repository_is_all_ours(root, capsys):
    assert said(capsys, root)[0] == 0


@pytest.mark.parametrize("content", ["[]", "{", '{"a":' * 50_000])
def test_a_folder_that_cannot_be_read_is_said_in_one_line(content, folder, tmp_path, capsys):
    (folder / "config.json").write_text(content)
    code, text = said(capsys, folder)
    assert code == 2
    assert text.count("\n") == 1
    assert "config.json" in text
    assert said(capsys, tmp_path / "nothing")[0] == 2
