"""Raw checkpoints of the published classification, segmentation and stage-1 code, and what is refused of them.

Results are loaded through the Auto classes and compared with what the published code computed (golden), for every
recorded output.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation

from internvl.conversion.formats.raw_formats import RAW_FORMATS, TOWER_RAW
from internvl.conversion.formats.raw_towers import tower_settings
from internvl.conversion.formats.rules import inverse, translate
from internvl.conversion.plan import ConversionOptions, plan_conversion
from internvl.conversion.readers.opening import open_source
from internvl.conversion.readers.source import Source
from internvl.conversion.readers.tensors import LazyTensor
from internvl.modeling_internvit import InternViTBackbone

from .fixtures_conversions import assert_rejected, assert_same, assert_same_weights, json_of, run, told, weights_of
from .fixtures_published import GOLDEN
from .tiny import classifier, internvl_model, pyramid_backbone, segmenter, vision_model


BACKBONE = "intern_vit_6b_224px.pth"
LINEAR = "linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen.pth"
HEADS = {
    "cls_patch_concat": "head_cls_patch_concat.pth",
    "attention_pooling": "head_attention_pooling.pth",
    "clip_projector": "head_clip_projector.pth",
}


def copy_of(case: str, folder: Path, *files: str) -> Path:
    """A golden folder, or these files of it; config.json is among them only when named."""
    target = folder / f"source_{case}"
    target.mkdir(parents=True)
    for file in (GOLDEN / case).iterdir():
        if (not files and file.name not in ("case.json", "io.safetensors")) or file.name in files:
            shutil.copyfile(file, target / file.name)
    return target


def edit_config(folder: Path, change) -> None:
    config = json_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_file(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(next(iter(content.values())))
    torch.save(content, path)


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "io.safetensors")


def assert_recorded(case: str, found: dict[str, torch.Tensor], tolerance: str = "fp32") -> None:
    notes, recorded = json.loads((GOLDEN / case / "case.json").read_text()), tensors_of(case)
    for name, value in found.items():
        limits = notes["tolerance"][tolerance]
        torch.testing.assert_close(
            value, recorded[f"out.{name}"], **limits, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------- goldens
def classified(model, given, pooling: str) -> dict[str, torch.Tensor]:
    pooled = model._pool(model.vision_model(given["in.image"]).last_hidden_state)
    return {
        f"{pooling}.pooled": pooled,
        f"{pooling}.normed": model.norm(pooled),
        f"{pooling}.logits": model(given["in.image"]).logits,
        f"resized.{pooling}.logits": model(given["in.image_resized"]).logits,
    }


@pytest.mark.parametrize("pooling", HEADS)
def test_a_head_file_with_its_backbone_beside_it_computes_what_the_published_code_did(pooling, tmp_path):
    out = run(GOLDEN / "classification_raw" / HEADS[pooling], tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    assert_recorded("classification_raw", classified(model, tensors_of("classification_raw"), pooling))


def test_a_raw_backbone_gives_the_recorded_features_at_its_own_and_at_another_size(tmp_path):
    given = tensors_of("classification_raw")
    model = AutoModel.from_pretrained(run(GOLDEN / "classification_raw" / BACKBONE, tmp_path / "out")).eval()
    found = {
        "features": model(given["in.image"]).last_hidden_state,
        "resized.features": model(given["in.image_resized"]).last_hidden_state,
    }
    assert_recorded("classification_raw", found)


def test_a_whole_raw_classifier_of_the_layer_norm_flavour_needs_no_matching_flags_in_config_json(tmp_path):
    given = tensors_of("classification_raw")
    out = run(GOLDEN / "classification_raw" / "ln_full.pth", tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    features = model.vision_model(given["in.image"]).last_hidden_state
    assert_recorded("classification_raw", {"ln.features": features, "ln.logits": model(given["in.image"]).logits})


def test_positions_and_patch_kernel_are_resized_on_request_as_the_published_code_does_at_load(tmp_path):
    given = tensors_of("classification_raw")
    larger = run(GOLDEN / "classification_raw", tmp_path / "larger", image_size=given["in.image_resized"].shape[-1])
    model = AutoModelForImageClassification.from_pretrained(larger).eval()
    found = {
        "resized.pos_embed": model.vision_model.embeddings.position_embedding,
        "resized.cls_patch_concat.logits": model(given["in.image_resized"]).logits,
    }
    patched = run(GOLDEN / "classification_raw", tmp_path / "patched", patch_size=12)
    model = AutoModelForImageClassification.from_pretrained(patched).eval()
    kernel = model.vision_model.embeddings.patch_embedding.weight
    found |= {"patch12.logits": model(given["in.image_patch12"]).logits}
    found |= {"patch12.patch_weight_slice": kernel[: len(given["out.patch12.patch_weight_slice"])]}
    assert_recorded("classification_raw", found)
    assert model.config.image_size == given["in.image_patch12"].shape[-1]  # the number of patches is kept


def test_the_raw_segmentation_files_compute_what_the_published_code_did(tmp_path):
    given = tensors_of("segmentation_raw")
    model = InternViTBackbone.from_pretrained(
        run(GOLDEN / "segmentation_raw" / BACKBONE, tmp_path / "backbone")
    ).eval()
    maps = dict(enumerate(model(given["in.image"]).feature_maps))
    found = {f"pretrained.{index}": feature_map for index, feature_map in maps.items()}
    in_bf16 = dict(enumerate(model.bfloat16()(given["in.image"].bfloat16()).feature_maps))
    in_bf16 = {f"pretrained.bf16.{index}": feature_map.float() for index, feature_map in in_bf16.items()}
    linear = run(GOLDEN / "segmentation_raw" / LINEAR, tmp_path / "linear")
    found["linear.logits"] = AutoModelForSemanticSegmentation.from_pretrained(linear).eval()(given["in.image"]).logits
    pyramid = run(GOLDEN / "segmentation_raw" / "upernet_backbone.pth", tmp_path / "pyramid")
    maps = InternViTBackbone.from_pretrained(pyramid).eval()(given["in.fpn.image"]).feature_maps
    found |= {f"fpn.{index}": feature_map for index, feature_map in enumerate(maps)}
    assert_recorded("segmentation_raw", found)
    assert_recorded("segmentation_raw", in_bf16, "bf16")
    assert {f"out.{name}" for name in found | in_bf16} == {name for name in given if name.startswith("out.")}


def test_the_raw_stage_1_checkpoint_computes_what_the_published_code_did(tmp_path):
    given = tensors_of("internvl_c_raw")
    model = AutoModel.from_pretrained(run(GOLDEN / "internvl_c_raw", tmp_path / "out")).eval()
    per_image, per_text = model(image=given["in.image"], text=given["in.text"])
    found = {
        "encode_image": model.encode_image(given["in.image"]),
        "forward_features": model.vision_model(given["in.image"]).last_hidden_state,
        "encode_text": model.encode_text(given["in.text"]),
        "logits_per_image": per_image,
        "logits_per_text": per_text,
    }
    assert_recorded("internvl_c_raw", found)
    assert {f"out.{name}" for name in found} == {name for name in given if name.startswith("out.")}
    assert model.config.num_query_token == 0


# ----------------------------------------------------------------------------------------------- what belongs together
@pytest.mark.parametrize("pooling", HEADS)
def test_of_a_folder_the_head_that_config_json_asks_for_is_taken_and_the_rest_named(pooling, tmp_path):
    source = copy_of("classification_raw", tmp_path)
    edit_config(source, lambda config: config["MODEL"]["INTERN_VIT_6B"].update(CLS_TARGET=pooling))
    found, lines = told(source, tmp_path / "folder")
    assert_same_weights(found, run(source / HEADS[pooling], tmp_path / "file"))
    for name in ("ln_full.pth", *(file for key, file in HEADS.items() if key != pooling)):
        assert any(line.startswith("Left out: ") and name in line for line in lines.splitlines()), name
    assert ("clip_projector.norm1_q.weight" in lines) == (pooling != "clip_projector")


def test_a_head_can_be_named_for_a_backbone_or_a_folder(tmp_path):
    source = copy_of("classification_raw", tmp_path)
    head = (source / HEADS["attention_pooling"]).replace(tmp_path / "elsewhere.pth")
    found = [
        json_of(run(path, tmp_path / f"out{number}", head=head))
        for number, path in enumerate((source, source / BACKBONE))
    ]
    assert found[0] == found[1]
    assert found[0]["classifier_pooling"] == "attention_pooling"


def test_the_backbone_of_a_head_is_the_only_one_beside_it_or_the_one_that_config_json_names(tmp_path):
    source = copy_of("classification_raw", tmp_path, "config.json", BACKBONE, HEADS["cls_patch_concat"])
    other = shutil.copyfile(source / BACKBONE, source / "another.pth")
    edit_file(other, lambda tensors: tensors["cls_token"].zero_())
    named = weights_of(run(source / HEADS["cls_patch_concat"], tmp_path / "named"))
    assert named["vision_model.embeddings.class_embedding"].abs().max() > 0
    edit_config(source, lambda config: config["MODEL"]["INTERN_VIT_6B"].pop("PRETRAINED"))
    with pytest.raises(ValueError, match=rf"it holds another.pth, {BACKBONE}.*as SOURCE.*`--head FILE`"):
        run(source / HEADS["cls_patch_concat"], tmp_path / "out")
    other.unlink()
    assert_same(weights_of(run(source / HEADS["cls_patch_concat"], tmp_path / "alone")), named)


def test_the_path_of_the_backbone_in_config_json_is_not_followed(tmp_path):
    source = copy_of("classification_raw", tmp_path / "inner", "config.json", HEADS["cls_patch_concat"])
    shutil.copyfile(GOLDEN / "classification_raw" / BACKBONE, tmp_path / BACKBONE)
    for path in (f"../../{BACKBONE}", f"..\\..\\{BACKBONE}", str(tmp_path / BACKBONE)):
        edit_config(source, lambda config, path=path: config["MODEL"]["INTERN_VIT_6B"].update(PRETRAINED=path))
        assert_rejected(source / HEADS["cls_patch_concat"], tmp_path, "it holds none")


def test_several_models_or_heads_without_a_word_which_are_refused_by_name(tmp_path):
    source = copy_of("classification_raw", tmp_path)
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=f"several heads.*{HEADS['attention_pooling']}.*{HEADS['cls_patch_concat']}"):
        run(source, tmp_path / "out", num_heads=4)
    for head in HEADS.values():
        (source / head).unlink()
    assert_rejected(source, tmp_path, f"must hold one raw model.*it holds {BACKBONE}, ln_full.pth", num_heads=4)


def test_what_is_no_head_or_needs_none_is_refused(tmp_path):
    case = GOLDEN / "classification_raw"
    assert_rejected(case, tmp_path, "`head` must be a file with", head=case / "ln_full.pth")
    for source in (case / HEADS["clip_projector"], case / "ln_full.pth", GOLDEN / "intern_vit_6b"):
        assert_rejected(source, tmp_path, "`head` has no effect", head=case / HEADS["cls_patch_concat"])


def test_a_head_of_another_backbone_is_refused(tmp_path):
    source = copy_of("classification_raw", tmp_path, "config.json", BACKBONE, HEADS["cls_patch_concat"])
    edit_file(source / HEADS["cls_patch_concat"], lambda tensors: tensors.update({"norm.weight": torch.ones(33)}))
    with pytest.raises(ValueError, match=r"reads 33 numbers, but the tower gives 112.*or 24.*another backbone"):
        run(source / HEADS["cls_patch_concat"], tmp_path / "out")


def test_what_a_training_run_left_in_a_raw_folder_is_named(tmp_path):
    source = copy_of("classification_raw", tmp_path, "config.json", BACKBONE, HEADS["cls_patch_concat"])
    torch.save({"lr": 0.1}, source / "optimizer.pt")
    assert plan_conversion(source).dropped["optimizer.pt"] == "state of the training"


def test_of_a_segmentation_folder_the_model_of_config_json_is_taken(tmp_path):
    source = copy_of("segmentation_raw", tmp_path)
    plan = plan_conversion(source)
    assert [file.name for file in plan.source.files] == [LINEAR]
    assert {BACKBONE, "upernet_backbone.pth"} <= plan.dropped.keys()
    edit_config(source, lambda config: config["backbone"].update(with_fpn=True))
    assert [file.name for file in plan_conversion(source).source.files] == ["upernet_backbone.pth"]


def test_decode_heads_of_mmsegmentation_and_what_it_saves_besides_are_left_out_by_name(tmp_path):
    source = copy_of("segmentation_raw", tmp_path, "config.json", "upernet_backbone.pth")
    content = torch.load(source / "upernet_backbone.pth", weights_only=True)
    heads = {"decode_head.conv_seg.weight", "auxiliary_head.convs.0.bn.bias"}
    content["state_dict"] |= dict.fromkeys(heads, torch.ones(2))
    torch.save({"meta": {"mmseg_version": "0.30.0"}, **content}, source / "upernet_backbone.pth")
    plan = plan_conversion(source)
    assert plan.dropped.keys() == heads | {"meta in upernet_backbone.pth"}
    assert plan.config.feature_pyramid == "plain"


# ------------------------------------------------------------------------------------ without, or with a wrong, config
def test_without_config_json_everything_but_the_heads_follows_from_shapes(tmp_path):
    for name in (BACKBONE, "ln_full.pth"):
        source = copy_of("classification_raw", tmp_path / name, name)
        with pytest.raises(
            ValueError, match=rf"How many heads a tower of width 56 has cannot be read from `{name}`.*--num-heads N"
        ):
            run(source, tmp_path / "out")
        plan = plan_conversion(source, ConversionOptions(num_heads=4))
        wanted = plan_conversion(GOLDEN / "classification_raw" / name)
        differing = {key for key, value in wanted.settings.items() if plan.settings.get(key) != value}
        assert differing <= {"drop_path_rate", "initializer_factor"}  # of training; the file does not say
        assert not any("heads of the tower" in note for note in plan.notes)


def fake_tower(prefix: str = "", **shapes: tuple[int, ...]) -> Source:
    """A source of shapes alone, whose tensors cannot be read."""
    tensors = {name: LazyTensor(shape, torch.float32, Path("raw.pth"), None) for name, shape in shapes.items()}
    return Source(Path("nowhere"), {}, [Path("raw.pth")], {prefix + name: tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(("width", "heads"), [(3200, 25), (1024, 16), (1280, 10)])
def test_heads_are_those_of_the_published_sizes_or_128_wide(width, heads):
    assert tower_settings(fake_tower(cls_token=(1, 1, width), pos_embed=(1, 5, width)))["num_attention_heads"] == heads


def test_feature_maps_are_those_of_the_published_heads_where_nothing_says_which():
    blocks = {f"blocks.{index}.norm1.weight": (3200,) for index in range(48)}
    tower = {"cls_token": (1, 1, 3200), "pos_embed": (1, 5, 3200), **blocks}
    added = {"backbone.up1.0.weight": (1,), "decode_head.conv_seg.weight": (150, 3200, 1, 1)}
    source = fake_tower("backbone.", **tower)
    source = replace(source, tensors={**source.tensors, **fake_tower(**added).tensors})
    for end, indices in {"pyramid": [12, 24, 36, 48], "linear": [45]}.items():
        layout = next(layout for layout in RAW_FORMATS if end in layout.name)
        assert layout.map_config(source)["out_indices"] == indices


def test_what_was_assumed_is_said(tmp_path):
    source = copy_of("segmentation_raw", tmp_path, LINEAR)
    notes = plan_conversion(source, ConversionOptions(num_heads=4)).notes
    assert len(notes) == 1
    assert "published value was taken: the blocks that give the feature maps" in notes[0]


def test_the_text_encoder_without_its_configuration_is_read_from_shapes_or_asked_for(tmp_path):
    source = copy_of("internvl_c_raw", tmp_path)
    (source / "llm_config.json").unlink()
    assert_rejected(source, tmp_path, r"text encoder of width 48.*llm_config.json")
    (source / "llm_config.json").write_text('{"num_attention_heads": 4}')
    found, wanted = (plan_conversion(path).settings["qllama_config"] for path in (source, GOLDEN / "internvl_c_raw"))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id", "num_query_token")
    assert {key: found[key] for key in sizes} == {key: wanted[key] for key in sizes}


def test_a_pooling_that_16_heads_do_not_divide_asks_for_their_number(tmp_path):
    source = copy_of("internvl_c_raw", tmp_path)
    edit_config(source, lambda config: config.update(attn_pool_num_heads=7))
    assert_rejected(source, tmp_path, r"width 64 cannot have 7 heads.*attn_pool_num_heads")
    edit_config(source, lambda config: config.pop("attn_pool_num_heads"))
    assert any("CLIP pooling: 16" in note for note in plan_conversion(source).notes)


def test_a_config_json_of_another_model_is_refused(tmp_path):
    source = copy_of("classification_raw", tmp_path)
    edit_config(source, lambda config: config["MODEL"]["INTERN_VIT_6B"].update(EMBED_DIM=3200))
    assert_rejected(source, tmp_path, r"does not describe.*`embed_dim` is 3200 there, 56 in the weights")
    edit_config(source, lambda config: config["MODEL"]["INTERN_VIT_6B"].update(EMBED_DIM=56))
    edit_config(source, lambda config: config["MODEL"].update(NUM_CLASSES=1000))
    assert_rejected(source, tmp_path, r"1000 classes, `head.weight` has 37")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": "4"}, "`num_heads` is '4' there, a number in the weights"),
        ({"num_heads": 5}, r"must be a multiple of `num_attention_heads` \(5\)"),
        ({"drop_path_rate": "x"}, "`drop_path_rate` is 'x' there"),
        ({"img_size": "x"}, "`image_size` must be a number of pixels, got 'x'"),
        ({"img_size": 60}, r"`image_size` \(60\) must be a multiple of the patch size \(14\)"),
        ({"out_indices": [-1]}, r"`out_indices` \[-1\], but the tower has blocks 0 to 2"),
        ({"out_indices": []}, r"`out_indices` \[\], but the tower has blocks 0 to 2"),
    ],
)
def test_nonsense_in_config_json_is_refused(arguments, message, tmp_path):
    source = copy_of("classification_raw", tmp_path, BACKBONE)
    (source / "config.json").write_text(json.dumps({"num_heads": 4, **arguments}))
    assert_rejected(source, tmp_path, message)


def test_missing_unknown_and_misshapen_tensors_are_listed_at_once_by_the_names_of_the_file(tmp_path):
    source = copy_of("classification_raw", tmp_path)

    def change(tensors):
        for name in [name for name in tensors if name.startswith("blocks.2.")]:
            del tensors[name]
        tensors["blocks.0.attn.extra"] = torch.ones(2)
        tensors["blocks.0.ls1.gamma"] = torch.ones(3)

    edit_file(source / BACKBONE, change)
    with pytest.raises(ValueError, match="do not fit") as error:
        run(source / BACKBONE, tmp_path / "out")
    parts = str(error.value).split("; ")
    assert "13 missing: blocks.2.norm1.weight" in parts[0].replace("blocks.2.ls1.gamma, blocks.2.ls2.gamma, ", "")
    assert "blocks.2.ls1.gamma" in parts[0]
    assert parts[1] == "1 unknown: blocks.0.attn.extra"
    assert "blocks.0.ls1.gamma (56,) got (3,)" in parts[2]


# --------------------------------------------------------------------------------------- other sizes, and the way back
MODELS = {
    "tower": (vision_model, "InternViT, raw layout"),
    "tower-ln": (
        lambda: vision_model(norm_type="layer_norm", qkv_bias=True, qk_normalization=False),
        "InternViT, raw layout",
    ),
    "classifier": (classifier, "InternViT with a classification head, raw layout"),
    "attention": (lambda: classifier("attention_pooling"), "InternViT with a classification head, raw layout"),
    "clip": (lambda: classifier("clip_projector"), "InternViT with a classification head, raw layout"),
    "segmenter": (segmenter, "InternViT with a linear segmentation head, raw layout"),
    "pyramid": (
        lambda: pyramid_backbone(num_hidden_layers=4, out_indices=[1, 2, 3, 4]),
        "InternViT with a feature pyramid, raw segmentation layout",
    ),
    "pyramid-plain": (
        lambda: pyramid_backbone("plain", num_hidden_layers=5, out_indices=[1, 2, 3, 5]),
        "InternViT with a feature pyramid, raw segmentation layout",
    ),
    "stage 1": (lambda: internvl_model(num_query_token=0), "InternVL-C, raw stage-1 layout"),
}


def raw_file(model, layout_name: str, folder: Path) -> Path:
    """A model in a raw layout, by the inverse of its key table."""
    layout = next(layout for layout in RAW_FORMATS if layout.name == layout_name)
    state = model.state_dict()
    named = {
        name: replace(next(iter(fake_tower(x=tuple(value.shape)).tensors.values())), dtype=value.dtype)
        for name, value in state.items()
    }
    back = translate(named, inverse(layout.rules))
    assert not back.unknown
    assert not back.doubled
    folder.mkdir()
    torch.save({"module": {name: state[back.origins[name][0]] for name in back.tensors}}, folder / "raw.pth")
    arguments = {"num_heads": 4, "attn_pool_num_heads": getattr(model.config, "attn_pool_num_heads", 2)}
    arguments["out_indices"] = [index - 1 for index in getattr(model.config, "out_indices", [])]
    (folder / "config.json").write_text(json.dumps(arguments))
    if "stage" in layout_name:
        (folder / "llm_config.json").write_text(json.dumps({"num_attention_heads": 4}))
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_the_key_tables_are_read_both_ways(kind, tmp_path):
    make, layout_name = MODELS[kind]
    model = make()
    plan = plan_conversion(raw_file(model, layout_name, tmp_path / "raw"))
    assert plan.source_format.name == layout_name
    assert_same(weights_of(run(tmp_path / "raw", tmp_path / "out")), model.state_dict())
    left, right = plan.config.to_diff_dict(), model.config.to_diff_dict()
    keys = "hidden_size norm_type qkv_bias qk_normalization classifier_pooling out_indices feature_pyramid"
    for key in keys.split():
        assert left.get(key) == right.get(key), key


@pytest.mark.parametrize("kind", ["classifier", "clip", "segmenter", "pyramid", "stage 1"])
def test_a_result_can_be_converted_again_to_the_same(kind, tmp_path):
    make, layout_name = MODELS[kind]
    first = run(raw_file(make(), layout_name, tmp_path / "raw"), tmp_path / "first")
    second = run(first, tmp_path / "second")
    assert json_of(second) == json_of(first)
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_raw_tower_in_parts_is_one_model(tmp_path):
    tensors = torch.load(GOLDEN / "classification_raw" / BACKBONE, weights_only=True)["module"]
    size = sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3
    save_torch_state_dict(tensors, tmp_path, max_shard_size=size, safe_serialization=False)
    plan = plan_conversion(tmp_path, ConversionOptions(num_heads=4))
    assert plan.source_format is TOWER_RAW
    assert len(plan.source.files) == 2


def test_the_size_that_config_json_resizes_to_can_be_overruled_and_is_resized_to_in_one_step(tmp_path):
    source = GOLDEN / "segmentation_raw" / BACKBONE
    stated, kept, other = (
        weights_of(run(source, tmp_path / name, **options))["embeddings.position_embedding"]
        for name, options in {"stated": {}, "kept": {"image_size": 56}, "other": {"image_size": 140}}.items()
    )
    raw = open_source(source).tensors["pos_embed"]
    assert kept.shape == raw.shape
    assert stated.shape[1] == 1 + 6 * 6
    model = AutoModel.from_pretrained(tmp_path / "kept")
    model.resize_pos_embeddings(56, 140, 14)
    torch.testing.assert_close(other, model.embeddings.position_embedding, rtol=0, atol=0)
