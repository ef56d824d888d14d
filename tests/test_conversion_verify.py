"""`--verify` finds what is not as it was, and `--push-to-hub` uploads what is complete."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.conversion.__main__ import main
from internvl.conversion.repository import publish
from internvl.modeling_internvit import InternVisionModel

from .fixtures_conversions import assert_rejected, refused, run, told
from .fixtures_published import GOLDEN, published_14b


def test_every_tensor_and_recorded_output_is_compared(vit, tmp_path, capsys):
    recorded = GOLDEN / "intern_vit_6b" / "io.safetensors"
    assert main([str(vit), str(tmp_path / "out"), "--verify", str(recorded)]) == 0
    printed = capsys.readouterr().out
    assert f"Verified: {len(load_file(vit / 'model.safetensors'))} tensors" in printed
    for name in ("out.last_hidden_state", "out.pooler_output", "out.hidden_states.2"):
        assert f"Output {name}: largest difference" in printed
    assert "Largest difference of all" in printed
    assert "out.dynamic.last_hidden_state" in printed.partition("Not compared")[2]


def test_both_modes_of_a_contrastive_model_are_compared(tmp_path, capsys):
    recorded = GOLDEN / "internvl_14b" / "io.safetensors"
    assert main([str(published_14b(tmp_path)), str(tmp_path / "out"), "--verify", str(recorded)]) == 0
    printed = capsys.readouterr().out
    for name in ("c.logits_per_image", "g.logits_per_text", "g.encode_image", "encode_text"):
        assert f"Output out.{name}: largest difference" in printed


def test_without_a_record_only_tensors_are_compared(vit, tmp_path, capsys):
    assert main([str(vit), str(tmp_path / "out"), "--dtype", "bfloat16", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "Verified" in printed
    assert "Output" not in printed


def test_a_tensor_that_changes_on_loading_stops_the_run_and_nothing_appears(vit, tmp_path, monkeypatch):
    load = InternVisionModel.from_pretrained.__func__

    def spoiled(cls, *arguments, **settings):
        model = load(cls, *arguments, **settings)
        model.encoder.layers[1].ls2.data[3] += 1e-6
        return model

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *a, **k: spoiled(InternVisionModel, a[0]))
    assert_rejected(vit, tmp_path, r"is not the source's. Tensors 1 different: encoder.layers.1.ls2", verify=True)


def test_outputs_that_differ_are_named_with_the_difference(vit, tmp_path):
    content = load_file(GOLDEN / "intern_vit_6b" / "io.safetensors")
    content["out.pooler_output"] = content["out.pooler_output"] + 1.5
    save_file(content, tmp_path / "io.safetensors")
    with pytest.raises(ValueError, match=r"Outputs differ from .*: out\.pooler_output by 1\.5"):
        run(vit, tmp_path / "out", verify=True, recorded=tmp_path / "io.safetensors")


def test_a_record_of_something_else_is_refused(vit, tmp_path):
    save_file(
        {"in.pixel_values": torch.zeros(1, 3, 28, 28), "out.logits": torch.zeros(1)}, tmp_path / "io.safetensors"
    )
    with pytest.raises(ValueError, match=r"Nothing in .* could be compared: expected .*last_hidden_state"):
        run(vit, tmp_path / "out", verify=True, recorded=tmp_path / "io.safetensors")
    (tmp_path / "io.safetensors").write_text("{}")
    with pytest.raises(OSError, match="cannot be read as recorded inputs and outputs"):
        run(vit, tmp_path / "out", verify=True, recorded=tmp_path / "io.safetensors")


def test_inputs_that_the_model_cannot_take_are_named(vit, tmp_path):
    save_file({"in.pixels": torch.zeros(1), "out.logits": torch.zeros(1)}, tmp_path / "io.safetensors")
    with pytest.raises(
        ValueError, match=r"cannot be run on the inputs in .*none that it knows.*InternVisionModel.forward"
    ):
        run(vit, tmp_path / "out", verify=True, recorded=tmp_path / "io.safetensors")


def test_published_names_of_arguments_are_understood(vit, tmp_path):
    content = load_file(GOLDEN / "intern_vit_6b" / "io.safetensors")
    record = {"in.image": content["in.pixel_values"], "out.pooler_output": content["out.pooler_output"]}
    save_file(record, tmp_path / "io.safetensors")
    _, messages = told(vit, tmp_path / "out", verify=True, recorded=tmp_path / "io.safetensors")
    assert "Output out.pooler_output" in messages


# ------------------------------------------------------------------------------------------------------------- the Hub
class Hub:
    """Stands in for the Hub: remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create", repo_id, settings))

    def upload_folder(self, *, repo_id, folder_path, **settings):
        self.calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))
        return "https://hub/commit"


def test_the_repository_is_made_before_and_filled_after_the_conversion(vit, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    assert main([str(vit), str(tmp_path / "out"), "--push-to-hub", "me/vit", "--private"]) == 0
    created, uploaded = hub.calls
    assert created == ("create", "me/vit", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors", "README.md", "modeling_internvit.py"} <= set(uploaded[2])
    assert "Uploaded: https://hub/commit" in capsys.readouterr().out


def test_a_hub_that_refuses_stops_the_run_before_anything_is_written(vit, tmp_path, monkeypatch, capsys):
    def refuse(repo_id, **settings):
        raise publish.LocalTokenNotFoundError("no token")

    hub = Hub()
    hub.create_repo = refuse
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    assert "hf auth login" in refused(capsys, vit, tmp_path / "out", "--push-to-hub", "me/vit")


def test_a_name_that_is_no_repository_is_refused_offline(vit, tmp_path, capsys):
    message = refused(capsys, vit, tmp_path / "out", "--push-to-hub", "not//a name")
    assert "is no name of a repository" in message
