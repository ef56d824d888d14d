"""`python -m internvl.publishing check|push`: every fault is found, nothing else is; a push reaches the Hub whole."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from internvl.publishing import check as check_module
from internvl.publishing.__main__ import main
from internvl.publishing.check import inspect_folder
from internvl.publishing.fresh_process import SECRETS, last_error, loading_faults
from internvl.publishing.push import card_with_addresses

from .conftest import ROOT
from .fixtures_conversions import edit_json, run
from .fixtures_published import published_chat
from .hub_stand_in import hub
from .test_conversion_hub import hub_at


@pytest.fixture(scope="module")
def fit(tmp_path_factory) -> Path:
    """A converted chat model whose card names a licence; not to be written to."""
    folder = tmp_path_factory.mktemp("fit")
    source = published_chat(folder)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    return run(source, folder / "out")


@pytest.fixture
def folder(fit, tmp_path) -> Path:
    return Path(shutil.copytree(fit, tmp_path / "folder"))


def faults_of(folder: Path, **settings) -> list[str]:
    return inspect_folder(folder, load=False, **settings).faults


def edit_card(folder: Path, old: str, new: str) -> None:
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new, 1))


# ----------------------------------------------------------------------------------------------------------- the check
def test_a_converted_folder_is_fit(folder):
    (folder / "__pycache__").mkdir()
    (folder / ".git").mkdir()
    (folder / ".git" / "optimizer.pt").write_bytes(b"")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "one.yaml").write_text("[]")
    found = inspect_folder(folder, load=False)
    assert found.faults == []
    assert found.left_out == [".git"]
    assert {"model.safetensors", "handler.py", "README.md", ".eval_results/one.yaml"} <= set(found.files)
    assert found.num_bytes == sum((folder / name).stat().st_size for name in found.files)


def test_this_repository_is_fit_but_for_what_runs_left_behind():
    assert faults_of(ROOT) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "the state of a training"),
        ("checkpoint-5/model.safetensors", "the state of a training"),
        ("pytorch_model.bin", "a pickle"),
        ("server.pem", "a key"),
        ("run.log", "left by a program"),
    ],
)
def test_strays_are_found(name, message, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    (fault,) = faults_of(folder)
    assert name.partition("/")[0] in fault
    assert message in fault


def test_a_link_out_of_the_folder_is_found(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "same.json").symlink_to(folder / "config.json")
    (folder / "elsewhere").symlink_to(tmp_path)
    found = inspect_folder(folder, load=False)
    assert len(found.faults) == 1
    assert "`notes.txt` is a link to" in found.faults[0]
    assert found.left_out == ["elsewhere"]


def test_a_link_to_nothing_is_found_in_one_line(folder, capsys):
    (folder / "gone\n.txt").symlink_to(folder / "nothing")
    assert main(["push", str(folder), "me/x", "--dry-run", "--no-load"]) == 1
    assert "fault: `gone .txt` is no file." in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json"])
@pytest.mark.parametrize("target", ["/dev/zero", None])
def test_what_has_no_end_is_named_and_not_read(name, target, folder):
    (folder / name).unlink()
    (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)
    assert faults_of(folder) == [
        f"`{name}` is " + ("a link to /dev/zero, outside of the folder." if target else "no file.")
    ]


def test_models_behind_a_link_are_not_looked_at(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (folder / "part").symlink_to(tmp_path / "other")
    found = inspect_folder(folder, load=False)
    assert (found.faults, found.left_out) == ([], ["part"])


@pytest.mark.parametrize("name", [b".\xff", b".a\nFit for the Hub."])
def test_names_that_are_no_text_are_printed_on_their_line(name, folder, capsys):
    with open(os.path.join(os.fsencode(folder), name), "w"):
        pass
    assert main(["check", str(folder), "--no-load"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not sent")]
    line.encode()


@pytest.mark.parametrize(
    "front",
    [
        "widget: &a [*a]",
        "a0: &a0 [x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
        + "widget: *a11",
    ],
)
def test_a_card_that_repeats_parts_by_name_is_refused_before_it_grows(front, folder):
    edit_card(folder, "license: mit", "license: mit\n" + front)
    (fault,) = faults_of(folder)
    assert "is not valid: line " in fault
    assert "write it out" in fault


@pytest.mark.parametrize(
    "front", ["model-index: 5", "model-index: [5]", "model-index: [{name: x, results: [5]}]", "5: 6"]
)
def test_a_card_of_another_form_has_one_line_or_none(front, folder):
    edit_card(folder, "license: mit", "license: mit\n" + front)
    assert all("\n" not in fault for fault in faults_of(folder))


def test_faults_of_a_model_in_a_sub_folder_are_named_with_it(folder):
    shutil.copytree(folder, folder / "part")
    (folder / "part" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    faults = faults_of(folder)
    assert len(faults) == 2
    assert "`part/model.safetensors` is a pointer" in faults[0]
    assert "`part/model.safetensors` has another SHA-256" in faults[1]


def test_an_access_token_is_found(folder):
    (folder / "notes.txt").write_text(f"token = 'hf_{'a1B2' * 9}'")
    (fault,) = faults_of(folder)
    assert "`notes.txt` holds an access token" in fault


def test_limits_of_the_hub_hold(folder, monkeypatch):
    monkeypatch.setattr(check_module, "MOST_FILE_BYTES", 2**17)
    monkeypatch.setattr(check_module, "MOST_FILES_OF_FOLDER", 3)
    faults = faults_of(folder)
    assert any("`model.safetensors` has" in fault for fault in faults)
    assert any("`.` has" in fault for fault in faults)


def test_changed_weights_are_found(folder):
    weights = load_file(folder / "model.safetensors")
    weights["query" if "query" in weights else next(iter(weights))] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (fault,) = faults_of(folder)
    assert "`model.safetensors` has another SHA-256" in fault


def test_a_pointer_a_wreck_and_missing_weights_are_found(folder):
    (folder / "conversion.json").unlink()
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "run `git lfs pull`" in faults_of(folder)[0]
    (folder / "model.safetensors").write_bytes(b"\xff" * 50)
    assert "cannot be read" in faults_of(folder)[0]
    (folder / "model.safetensors").unlink()
    assert "has no weights beside it" in faults_of(folder)[0]


def test_an_index_that_differs_is_found(folder):
    (folder / "conversion.json").unlink()
    save_file({"more": torch.zeros(1)}, folder / "more.safetensors")
    assert "`model.safetensors.index.json` is missing" in faults_of(folder)[0]
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    edit_json(folder / "model.safetensors.index.json", weight_map={**names, "other": "more.safetensors"})
    assert "differ in 2 tensors, the first is `more`" in faults_of(folder)[0]


def test_code_of_others_is_a_fault_unless_it_is_trusted(folder):
    with (folder / "handler.py").open("a") as file:
        file.write("LIMIT = 1\n")
    (fault,) = faults_of(folder)
    assert "handler.py is not this package's code" in fault
    assert faults_of(folder, trust=True) == []
    (folder / "layers_internvl.py").unlink()
    assert "`layers_internvl.py` is named as code, but is not there." in faults_of(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: mit", "license: [mit", "front matter"),
        ("license: mit", "license: MIT License", "`license` must be an identifier"),
        ("license: mit", "license: unknown", "nobody may use"),
        ("license: mit", "license: other\nlicense_link: https://a.b", "needs a `license_name`"),
        ("license: mit", "license: other\nlicense_name: x\nlicense_link: NONE.md", "needs a `license_link`"),
        ("library_name: transformers", "library_name: timm", "must be `transformers`"),
        ("pipeline_tag: image-text-to-text", "pipeline_tag: chat", "`pipeline_tag` must be one of"),
        ("- custom_code\n", "", "lack `custom_code`"),
        ("- conversational\n", "", "lack `conversational`"),
        ("license: mit", "license: mit\nbase_model: '../x'", "`base_model` must be"),
        ("license: mit", "license: mit\nwidget:\n- src: gone.png", "shows `gone.png`"),
        ("license: mit", "license: mit\nwidget: none", "`widget` must be a list"),
        ("license: mit", "license: mit\nmodel-index: 5", "front matter"),
        ("```python", "[see](docs/gone.md) ```python", "leads to `docs/gone.md`"),
    ],
)
def test_a_card_that_the_hub_refuses_or_shows_in_part_is_found(old, new, message, folder):
    edit_card(folder, old, new)
    faults = faults_of(folder)
    assert [fault for fault in faults if message in fault], faults


def test_a_folder_without_model_or_card_is_found(tmp_path, capsys):
    assert faults_of(tmp_path) == [
        "There is no model: `config.json` is missing.",
        "There is no card: `README.md` is missing. `python -m internvl.conversion DIR OUT` writes one.",
    ]
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_model_that_does_not_load_alone_is_found(folder, capsys):
    """In a fresh process, by the code of the folder: one with a tensor too few and one too many."""
    (folder / "conversion.json").unlink()
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("mlp1.1.weight")
    save_file({**weights, "surplus.weight": gone}, folder / "model.safetensors", {"format": "pt"})
    assert main(["check", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "The model: `mlp1.1.weight` is missing in the files." in text
    assert "The model: `surplus.weight` is in the files, and the model has no such tensor." in text
    assert "Faults: 2." in text


def test_the_error_of_a_process_is_one_line():
    written = "Traceback:\n  raise ImportError(\nImportError: \nX needs torchvision.\n\nInstall it.\n"
    assert last_error(written) == "ImportError: X needs torchvision. Install it."
    assert last_error("killed\x1b[0m") == "killed\\x1b[0m"
    assert last_error("") == "no reason was given"


# ------------------------------------------------------------------------------------------------------------ the push
def test_a_dry_run_asks_nothing_of_the_hub(fit, tmp_path, capsys):
    with hub({}) as server, hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path):
        assert main(["push", str(fit), "me/chat", "--dry-run", "--no-load"]) == 0
    assert not server.asked
    text = capsys.readouterr().out
    assert "  model.safetensors\n" in text
    assert "Fit for the Hub." in text


def test_a_push_sends_every_file_byte_by_byte(folder, tmp_path, capsys):
    (folder / ".gitattributes").write_text("*.safetensors binary\n")
    shutil.copyfile(ROOT / "examples" / "star.png", folder / "star.png")
    edit_card(folder, "license: mit", "license: mit\nwidget:\n- src: star.png\n  text: What is it?")
    with hub({}) as server, hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path):
        assert main(["push", str(folder), "me/chat", "--private", "--no-load"]) == 0
    assert f"Sent: http://127.0.0.1:{server.server_port}/me/chat/commit/feed" in capsys.readouterr().out
    assert [(made["organization"], made["name"]) for made in server.made] == [("me", "chat")]
    # The attributes that the Hub made stay, else a clone would hold pointers.
    assert server.pushed.keys() == {file.name for file in folder.iterdir()} - {".gitattributes"}
    for name, content in server.pushed.items():
        if name != "README.md":
            assert content == (folder / name).read_bytes(), name
    assert server.large  # the weights went the way of large files
    address = f"http://127.0.0.1:{server.server_port}/me/chat/resolve/main/star.png"
    assert ModelCard(server.pushed["README.md"].decode()).data.widget == [{"src": address, "text": "What is it?"}]
    assert {token for *_, token in server.asked if token} == {"Bearer hf_secret"}


def test_a_folder_with_faults_is_not_sent_and_a_refusal_is_one_line(folder, tmp_path, capsys):
    with hub({}) as server, hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path):
        server.refuses = True
        assert main(["push", str(folder), "me/chat", "--no-load"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: `me/chat` cannot be written on the Hub")
        assert error.count("\n") == 1
        (folder / "run.log").write_text("x")
        asked = len(server.asked)
        assert main(["push", str(folder), "me/chat", "--no-load"]) == 1
        assert len(server.asked) == asked
    assert main(["push", str(folder), "not//a name", "--dry-run", "--no-load"]) == 1


def test_only_files_that_a_widget_shows_become_addresses(tmp_path):
    card = tmp_path / "README.md"
    message = "{role: user, content: [{type: image_url, image_url: {url: b/a.png}}]}"
    card.write_text(f"---\nwidget:\n- src: 'a.png'\n  text: a.png\n- messages: [{message}]\n---\nsrc: a.png stays\n")
    text = card_with_addresses(card, "me/x")
    first, second = ModelCard(text).data.widget
    assert first == {"src": "https://huggingface.co/me/x/resolve/main/a.png", "text": "a.png"}
    assert second["messages"][0]["content"][0]["image_url"]["url"].endswith("me/x/resolve/main/b/a.png")
    assert text.endswith("---\nsrc: a.png stays\n")
    card.write_text("---\nwidget:\n- src: https://a.b/c.png\n---\n")
    assert card_with_addresses(card, "me/x") is None


def test_code_of_a_repository_does_not_get_the_token(fit, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_secret")
    given = []

    def run_nothing(command, env, **settings):
        given.append(env)
        return subprocess.CompletedProcess(command, 0, stdout="{}", stderr="")

    monkeypatch.setattr(subprocess, "run", run_nothing)
    assert list(loading_faults(fit, fit)) == []
    assert "hf_secret" not in given[0].values()
    assert given[0]["HF_HUB_OFFLINE"] == "1"
