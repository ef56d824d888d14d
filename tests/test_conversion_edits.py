"""Changes on request: resized positions and patches, unused blocks left out; and that nothing else changes."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

from internvl.conversion.formats.edits import Draft, drop_blocks_above
from internvl.conversion.plan import ConversionOptions, plan_conversion
from internvl.image_processing_internvl import InternVLImageProcessor

from .fixtures_conversions import assert_rejected, assert_same, json_of, run, weights_of
from .fixtures_published import GOLDEN, published


POSITIONS, KERNEL = "embeddings.position_embedding", "embeddings.patch_embedding.weight"
# Case to the prefix of its tower.
CASES = {
    "intern_vit_6b": "", "intern_vit_300m": "", "internvl_14b": "vision_model.", "chat_llama_v1": "vision_model.",
    "internvl_c_raw": "vision_model.",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------ resizing
@pytest.mark.parametrize("case", CASES)
def test_image_size_resizes_the_positions_of_every_tower_and_nothing_else(case, tmp_path):
    plain, resized = (weights_of(run(GOLDEN / case, tmp_path / str(size), image_size=size)) for size in (None, 112))
    name = CASES[case] + POSITIONS
    side = int((plain[name].shape[1] - 1) ** 0.5)
    grid = plain[name][:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    wanted = torch.cat([plain[name][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(resized[name], wanted, rtol=0, atol=1e-6)
    assert_same(resized, {**plain, name: resized[name]})


@pytest.mark.parametrize("case", ["intern_vit_6b", "intern_vit_300m"])
def test_the_resized_tower_computes_what_the_published_resize_pos_embeddings_gave(case, tmp_path):
    recorded = load_file(GOLDEN / case / "io.safetensors")
    size = recorded["in.pixel_values_resized"].shape[-1]
    model = AutoModel.from_pretrained(run(GOLDEN / case, tmp_path / "out", image_size=size)).eval()
    limits = json.loads((GOLDEN / case / "case.json").read_text())["tolerance"]["fp32"]
    positions, features = (recorded[f"out.resized.{name}"] for name in ("position_embedding", "last_hidden_state"))
    torch.testing.assert_close(model.embeddings.position_embedding.detach(), positions, **limits)
    found = model(recorded["in.pixel_values_resized"]).last_hidden_state
    torch.testing.assert_close(found, features, **limits)


def test_positions_in_bf16_are_resized_in_fp32_and_rounded_once(tmp_path):
    exact = weights_of(run(GOLDEN / "intern_vit_6b", tmp_path / "bf16", dtype="bfloat16"))[POSITIONS]
    half = run(tmp_path / "bf16", tmp_path / "resized", image_size=84)
    wide = run(tmp_path / "bf16", tmp_path / "wide", image_size=84, dtype="float32")
    assert exact.dtype == weights_of(half)[POSITIONS].dtype == torch.bfloat16
    torch.testing.assert_close(weights_of(half)[POSITIONS], weights_of(wide)[POSITIONS].bfloat16(), rtol=0, atol=0)


def test_patch_size_resizes_the_kernel_and_keeps_the_image_where_it_can(tmp_path):
    plain = weights_of(run(GOLDEN / "intern_vit_6b", tmp_path / "plain"))
    for patch, image_size, positions in ((28, 56, 5), (12, 48, 17), (64, 256, 17)):
        out = run(GOLDEN / "intern_vit_6b", tmp_path / str(patch), patch_size=patch)
        wanted = F.interpolate(plain[KERNEL], size=(patch, patch), mode="bicubic", align_corners=False)
        found = weights_of(out)
        torch.testing.assert_close(found[KERNEL], wanted, rtol=0, atol=1e-6)
        assert found[POSITIONS].shape[1] == positions
        assert (json_of(out)["image_size"], json_of(out)["patch_size"]) == (image_size, patch)
        image = torch.zeros(1, 3, image_size, image_size)
        assert AutoModel.from_pretrained(out)(image).last_hidden_state.shape[1] == positions


@pytest.mark.parametrize("case", ["intern_vit_6b", "internvl_14b"])
def test_the_image_processor_follows_the_new_size(case, tmp_path):
    source = published(case, tmp_path)
    for size in (None, 112):
        processor = InternVLImageProcessor.from_pretrained(run(source, tmp_path / f"out{size}", image_size=size))
        image = processor(torch.zeros(3, 70, 90, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
        assert image.shape[-2:] == (size or 56, size or 56)


def test_a_resized_chat_model_takes_larger_tiles(tmp_path):
    out = run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", image_size=112, image_token_id=520)
    model = AutoModel.from_pretrained(out)
    assert (model.config.image_size, model.num_image_token) == (112, 16)
    assert model.extract_feature(torch.zeros(2, 3, 112, 112)).shape[:2] == (2, 16)
    assert InternVLImageProcessor.from_pretrained(out).size["height"] == 112


def test_the_size_that_is_there_already_changes_nothing(tmp_path):
    same = plan_conversion(GOLDEN / "intern_vit_6b", ConversionOptions(image_size=56, patch_size=14))
    plain = plan_conversion(GOLDEN / "intern_vit_6b")
    assert same.settings == plain.settings
    assert same.notes == plain.notes
    assert same.image_size is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 60}, r"`image_size` \(60\) must be a multiple of the patch size \(14\)"),
        ({"image_size": 0}, "`image_size` must be a number of pixels, got 0"),
        ({"patch_size": -2}, "`patch_size` must be a number of pixels, got -2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message, tmp_path):
    assert_rejected(GOLDEN / "intern_vit_6b", tmp_path, message, **sizes)


# ------------------------------------------------------------------------------------------------------- unused blocks
def test_select_layer_minus_4_and_minus_1_of_the_tower_cut_behind_it_agree_bit_by_bit(tmp_path):
    case = GOLDEN / "chat_llama_v1"
    whole, cut = (
        run(case, tmp_path / str(drop), drop_unused_blocks=drop, image_token_id=500) for drop in (False, True)
    )
    before, after = json_of(whole), json_of(cut)
    depth = before["vision_config"]["num_hidden_layers"]
    assert before["select_layer"] == -4
    assert after["select_layer"] == -1
    assert after["vision_config"]["num_hidden_layers"] == depth - 3
    models = [AutoModel.from_pretrained(folder).eval() for folder in (whole, cut)]
    tiles = load_file(case / "io.safetensors")["in.pixel_values"]
    first, second = (model.extract_feature(tiles) for model in models)
    assert torch.equal(first, second)
    left, right = weights_of(whole), weights_of(cut)
    above = tuple(f"vision_model.encoder.layers.{index}." for index in range(depth - 3, depth))
    gone = {name for name in left if name.startswith(above)}
    assert_same(right, {name: tensor for name, tensor in left.items() if name not in gone})
    assert gone <= json_of(cut, "conversion.json")["left_out"].keys()


def test_of_a_tower_that_is_used_whole_nothing_is_dropped(tmp_path):
    plain, asked = (
        plan_conversion(GOLDEN / "chat_qwen2_v2", ConversionOptions(drop_unused_blocks=drop, image_token_id=500))
        for drop in (False, True)
    )
    assert asked.tensors.keys() == plain.tensors.keys()
    assert any("none was left out" in note for note in asked.notes)
    assert asked.settings["vision_config"]["num_hidden_layers"] == plain.settings["vision_config"]["num_hidden_layers"]


def test_the_blocks_that_stay_keep_their_drop_path_rates():
    vision = {"num_hidden_layers": 5, "drop_path_rate": 0.4}
    draft = Draft({"model_type": "internvl_chat_model", "select_layer": -3, "vision_config": vision}, {})
    drop_blocks_above(draft)
    assert vision == {"num_hidden_layers": 3, "drop_path_rate": pytest.approx(0.2)}
    uniform = {"num_hidden_layers": 5, "drop_path_rate": 0.4, "drop_path_schedule": "uniform"}
    draft = Draft({"model_type": "internvl_chat_model", "select_layer": -3, "vision_config": uniform}, {})
    drop_blocks_above(draft)
    assert uniform["drop_path_rate"] == 0.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connector": "queries_and_patches"}, "the queries read the last one"),
        ({"select_layer": 0}, r"`select_layer` \(0\) must name one of the 5 blocks"),
        ({"select_layer": 9}, r"`select_layer` \(9\) must name one of the 5 blocks"),
    ],
)
def test_blocks_that_something_else_reads_are_not_dropped(settings, message):
    base = {"model_type": "internvl_chat_model", "select_layer": -2, "vision_config": {"num_hidden_layers": 5}}
    with pytest.raises(ValueError, match=message):
        drop_blocks_above(Draft({**base, **settings}, {}))
