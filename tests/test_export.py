"""Programs of the tower and the embeddings: whatever size they were traced with, they give what the model gives."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.export.__main__ import main
from internvl.export.parts import GRIDS, LENGTHS, ExportedPart, parts_of
from internvl.export.programs import TOLERANCE, largest_difference, write_onnx_program, write_torch_program
from internvl.layers_internvit import resize_position_grid

from .conftest import ROOT
from .fixtures_processes import run_elsewhere
from .tiny import chat_model, internvl_model, vision_model


# Runs a program on the inputs of a file, with torch alone.
RUNS_A_PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file

inputs, program = load_file("inputs.safetensors"), torch.export.load("vision.pt2").module()
outputs = {name: output.contiguous() for name, pixels in inputs.items() for output in program(pixels)[:1]}
save_file(outputs, "outputs.safetensors")
assert not [name for name in sys.modules if name.startswith(("internvl", "transformers"))]
"""


def test_examples_are_of_many_sizes():
    """Else a program of one size would pass for one of every size."""
    (part,) = parts_of(vision_model(), "vision", "C")
    sizes = [tuple(pixels.shape) for (pixels,) in part.examples()]
    assert len({size[0] for size in sizes}) > 2
    assert len({size[2:] for size in sizes}) == len(GRIDS) + 1
    assert (56, 56) in {size[2:] for size in sizes}  # of which the positions are not resized
    texts = list(parts_of(internvl_model(), "embeddings", "G")[1].examples())
    assert [ids.shape[1] for ids, _ in texts] == list(LENGTHS)
    assert {int(mask[row, side]) for _, mask in texts for row in (0, -1) for side in (0, -1)} == {0, 1}


def test_resizing_positions_to_their_own_size_changes_no_bit(monkeypatch):
    """A program has no branch for it, the model has."""
    positions = torch.randn(1, 1 + 16, 8)
    assert resize_position_grid(positions, 4, 4) is positions
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    resized = resize_position_grid(positions, 4, 4)
    assert resized is not positions
    assert torch.equal(resized, positions)


@torch.no_grad()
def test_a_program_is_run_by_torch_alone_and_equals_the_model(tmp_path):
    (part,) = parts_of(vision_model(num_hidden_layers=1), "vision", "C")
    write_torch_program(part, tmp_path)
    inputs = {str(number): pixels for number, (pixels,) in enumerate(part.examples())}
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "run.py").write_text(RUNS_A_PROGRAM)
    run_elsewhere(tmp_path, "run.py")
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert len(outputs) == len(GRIDS) + 1
    for name, output in outputs.items():
        torch.testing.assert_close(output, part.module(inputs[name])[0], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["C", "G"])
@torch.no_grad()
def test_embeddings_are_exported_for_every_size(tmp_path, mode):
    for part in parts_of(internvl_model(), "embeddings", mode):
        assert largest_difference(part, write_torch_program(part, tmp_path)) <= 2e-6


@torch.no_grad()
def test_parts_give_what_the_public_calls_give():
    model, decoder = internvl_model(), chat_model()
    for mode in ("C", "G"):
        images, texts = parts_of(model, "embeddings", mode)
        (pixels,), (ids, mask) = next(images.examples()), next(texts.examples())
        (found,) = images.module(pixels)
        assert torch.equal(found, model.get_image_features(pixels, mode=f"InternVL-{mode}"))
        assert torch.equal(texts.module(ids, mask)[0], model.get_text_features(ids, mask))
    (tower,) = parts_of(decoder, "vision", "C")
    expected = decoder.vision_model(pixels)
    assert torch.equal(tower.module(pixels)[0], expected.last_hidden_state)
    assert torch.equal(tower.module(pixels)[1], expected.pooler_output)


@torch.no_grad()
def test_onnx_runtime_agrees(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    (part,) = parts_of(vision_model(num_hidden_layers=1), "vision", "C")
    assert largest_difference(part, write_onnx_program(part, tmp_path)) <= TOLERANCE


def test_a_difference_is_seen():
    (part,) = parts_of(vision_model(), "vision", "C")
    with torch.no_grad():
        assert largest_difference(part, lambda inputs: list(part.module(*inputs))) == 0
        for wrong in (1e-2, float("nan")):
            difference = largest_difference(part, lambda inputs: [x + wrong for x in part.module(*inputs)])  # noqa: B023
            assert not difference <= TOLERANCE


def fake(part: ExportedPart, folder):
    (folder / f"{part.name}.pt2").write_bytes(b"a program")
    return lambda inputs: [x + 1 for x in part.module(*inputs)] if "text" in part.name else list(part.module(*inputs))


def test_the_command_writes_all_or_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("internvl.export.programs.WRITERS", {"torch": fake})
    source = shutil.copytree(ROOT / "internvl_g", tmp_path / "model")
    out = tmp_path / "out"
    assert main([str(source), str(out)]) == 2
    assert "`text_embeddings` differs from the model by" in capsys.readouterr().err
    assert not out.exists()
    assert main([str(source), str(out), "--part", "vision"]) == 0
    settings = json.loads((out / "export.json").read_text())
    assert settings["programs"]["vision.pt2"]["inputs"] == ["pixel_values"]
    assert (out / "preprocessor_config.json").is_file()
    assert main([str(source), str(out), "--part", "vision"]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "embeddings"), "needs an InternVL-C or InternVL-G"),
        (("--mode", "G"), "`--part vision` has none"),
        (("--to", "onnx"), "`pip install 'internvl[export]'`"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    assert main([str(ROOT / "internvit"), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
