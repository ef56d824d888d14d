"""Training of segmentation heads: recipes, learning rates, distortions, a run, and the published UperNet."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, UperNetForSemanticSegmentation

from internvl.conversion.__main__ import main as convert
from internvl.evaluation.data.ade20k import class_names, segmented_images
from internvl.evaluation.metrics import mean_iou
from internvl.evaluation.segmentation import check_segmenter, count_areas, load_segmenter, window_of
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.training.__main__ import main as train
from internvl.training.commands import training_parser
from internvl.training.data.segmentation_images import (
    SegmentationCrops,
    crop_randomly,
    distort,
    resize_randomly,
)
from internvl.training.models.segmentation import build_segmenter, segmentation_groups, upernet_config
from internvl.training.recipes.segmentation import segmentation_recipe
from internvl.training.segmentation_command import polynomial_schedule

from . import tiny
from .fixtures_segmentation import write_ade20k


NAMES = ["wall", "building", "sky", "floor"]


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch):
    monkeypatch.setattr("internvl.training.models.segmentation.UPERNET_CHANNELS", 64)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder with a vision tower of 4 blocks."""
    folder = tmp_path_factory.mktemp("tower")
    tiny.vision_model(num_hidden_layers=4).save_pretrained(folder)
    InternVLImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k")
    write_ade20k(root, [(56, 84), (84, 56)] * 8, "training", ".jpg", seed=1)
    return write_ade20k(root, [(56, 70), (70, 56), (56, 56)], "validation", ".jpg", seed=2)


# ------------------------------------------------------------------------------------------------------------- recipes
def test_the_recipes_are_those_of_table_23_and_of_the_published_few_shot_runs():
    linear, head, full = map(segmentation_recipe, ("linear", "head", "full"))
    assert [recipe.learning_rate for recipe in (linear, head, full)] == [4e-5] * 3
    assert [recipe.weight_decay for recipe in (linear, head, full)] == [0, 0.05, 0.05]
    assert [recipe.layer_decay for recipe in (linear, head, full)] == [1, 1, 0.95]
    assert [recipe.drop_path_rate for recipe in (linear, head, full)] == [0, 0, 0.4]
    assert [recipe.trains_tower for recipe in (linear, head, full)] == [False, False, True]
    assert {(recipe.batch_size, recipe.steps, recipe.warmup_steps) for recipe in (linear, head, full)} == {
        (16, 80_000, 1500)
    }
    few = [segmentation_recipe("few-shot", share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    assert [recipe.steps for recipe in few] == [5000, 10_000, 20_000, 40_000, 80_000]
    assert [recipe.warmup_steps for recipe in few] == [100, 200, 400, 800, 1500]
    assert {(recipe.head, recipe.trains_tower, recipe.layer_decay) for recipe in few} == {("linear", True, 0.95)}
    with pytest.raises(ValueError, match="`method` must be one of linear, head, full, few-shot"):
        segmentation_recipe("upernet")


def test_the_schedule_is_polynomial_times_a_warm_up():
    """mmcv's: both apply during the warm-up."""
    share = polynomial_schedule(100, 10)
    assert share(0) == pytest.approx(1e-6)
    assert share(5) == pytest.approx(0.95 * (1 - 0.5 * (1 - 1e-6)))
    assert [share(step) for step in (10, 50, 100)] == pytest.approx([0.9, 0.5, 0])
    assert polynomial_schedule(100, 0)(0) == 1


@pytest.mark.parametrize(("text", "share"), [("1/16", 1 / 16), ("0.25", 0.25), ("1", 1.0)])
def test_shares_are_read(text, share):
    words = ["segmentation", "--model", "m", "--data", "d", "--output", "o", "--fraction", text]
    assert training_parser().parse_args(words).fraction == share


@pytest.mark.parametrize("text", ["0", "2", "1/0", "x", "-1"])
def test_other_shares_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        training_parser().parse_args(["segmentation", "--fraction", text])
    assert "such as 1/16" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(("method", "head"), [("linear", "linear"), ("head", "upernet"), ("full", "upernet")])
def test_what_learns_is_what_the_method_says(method, head, tower):
    model = build_segmenter(segmentation_recipe(method), tower, NAMES)
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert isinstance(model, UperNetForSemanticSegmentation) == (head == "upernet")
    assert learning == {"linear": {"decode_head"}}.get(method, {"backbone", "decode_head", "auxiliary_head"})
    blocks = [parameter.requires_grad for name, parameter in model.named_parameters() if ".encoder.layers." in name]
    assert set(blocks) == {method == "full"}
    if head == "upernet":
        assert all(parameter.requires_grad for parameter in model.backbone.up1.parameters())
        assert model.auxiliary_head.in_index == {"head": 1, "full": 2}[method]
        assert model.decode_head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert model.decode_head.fpn_bottleneck.batch_norm.running_var.eq(1).all()
    expected = tiny.vision_model(num_hidden_layers=4).state_dict()
    found = getattr(model, "vision_model", getattr(model, "backbone", None)).state_dict()
    name = "encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(found[name], expected[name])
    assert found["embeddings.position_embedding"].shape[1] == 1 + 36**2  # for 504 pixels
    assert model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("method", ["linear", "full"])
def test_a_model_for_images_of_another_size_is_saved_and_loaded(method, tower, tmp_path):
    model = build_segmenter(replace(segmentation_recipe(method), image_size=84), tower, NAMES).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    image = tiny.pixels(1, 84, 84)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, model(image).logits)
    assert getattr(loaded.config, "backbone_config", loaded.config).image_size == 84


def test_layers_learn_at_the_published_rates(tower):
    """Those of mmcv's constructor: 0.95 to the power of the layers above, heads and pyramid at the full rate."""
    recipe = segmentation_recipe("full")
    model = build_segmenter(recipe, tower, NAMES)
    groups = segmentation_groups(model, recipe)
    rates = {id(p): (group["lr"] / 4e-5, group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(rates) == len(parameters)

    def of(name):
        return rates[id(parameters[name])]

    assert of("backbone.embeddings.position_embedding") == pytest.approx((0.95**5, 0.05))
    assert of("backbone.embeddings.patch_embedding.bias") == pytest.approx((0.95**5, 0))
    assert of("backbone.encoder.layers.0.mlp.fc1.weight") == pytest.approx((0.95**4, 0.05))
    assert of("backbone.encoder.layers.3.ls1") == pytest.approx((0.95, 0))
    assert of("backbone.up1.0.weight") == pytest.approx((1, 0.05))
    assert of("decode_head.classifier.bias") == pytest.approx((1, 0))
    linear = build_segmenter(segmentation_recipe("linear"), tower, NAMES)
    assert {g["weight_decay"] for g in segmentation_groups(linear, segmentation_recipe("linear"))} == {0}


def test_the_upernet_drops_channels_in_training_alone(tower):
    model = build_segmenter(segmentation_recipe("head"), tower, NAMES)
    seen = []
    model.decode_head.classifier.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    image = tiny.pixels(2, 56, 56)
    with torch.no_grad():
        model.train()(image)
        model.eval()(image)
    empty = [(x.abs().amax(dim=(2, 3)) == 0).float().mean() for x in seen]
    assert empty[0] > empty[1] + 0.03


# ----------------------------------------------------------------------------------------------------------- the crops
def test_crops_show_image_and_labels_at_the_same_place(data):
    items = segmented_images(data, "training")
    crops = SegmentationCrops(items, 40, 4, 56, (0.0,) * 3, (1.0,) * 3)
    found = [crops[index] for index in range(len(crops))]
    assert {x["pixel_values"].shape for x in found} == {(3, 56, 56)}
    assert {x["labels"].shape for x in found} == {(56, 56)}
    # Of two neighbours with different labels the colours differ too.
    for x in found:
        pixels, labels = x["pixel_values"], x["labels"]
        is_inside = labels != 255
        means = [pixels[:, (labels == index) & is_inside].mean(1) for index in range(4) if (labels == index).any()]
        for index, mean in enumerate(means):
            assert all((mean - other).abs().max() > 0.05 for other in means[index + 1 :])
    assert any((x["labels"] == 255).all(dim=0).any() for x in found)  # padded
    assert torch.equal(found[7]["pixel_values"], crops[7]["pixel_values"])
    passes = [[crops.item_of(index).name for index in range(start, start + 16)] for start in (0, 16)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == [item.name for item in items]


def test_a_crop_of_one_class_alone_is_avoided():
    labels = torch.zeros(100, 100, dtype=torch.long)
    labels[:, 70:] = 1
    rng = torch.Generator().manual_seed(0)
    crops = [crop_randomly(labels[None].float(), labels, 40, rng)[1] for _ in range(60)]
    mixed = [crop for crop in crops if len(crop.unique()) > 1]
    assert len(mixed) > 55  # without trials about half of them


def test_images_are_resized_from_half_to_twice_the_side():
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(60, 90, dtype=torch.long)
    sides = [min(resize_randomly(torch.zeros(3, 60, 90), labels, 56, rng)[1].shape) for _ in range(200)]
    assert min(sides) >= 28
    assert max(sides) <= 112
    assert min(sides) < 35
    assert max(sides) > 105
    long = [resize_randomly(torch.zeros(3, 10, 100), torch.zeros(10, 100), 56, rng)[1].shape[1] for _ in range(50)]
    assert max(long) <= 448


def test_distortions_are_sometimes_none_and_stay_colours():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 8, 8), generator=rng).float()
    found = [distort(pixels, rng) for _ in range(300)]
    unchanged = sum(torch.equal(x, pixels) for x in found)
    assert 5 < unchanged < 40  # 1 / 16
    assert all(x.min() >= 0 and x.max() <= 255 for x in found)
    assert np.std([float(x.mean()) for x in found]) > 5


# --------------------------------------------------------------------------------------------------------------- a run
def run(tower: Path, data: Path, output: Path, *words: str) -> int:
    flags = ["--workers", "0", "--image-size", "56", "--learning-rate", "3e-3", "--logging-steps", "5"]
    given = ["--model", tower, "--data", data, "--output", output]
    return train(["segmentation", *map(str, given), *flags, *words])


def miou(folder: Path, data: Path) -> float:
    check_segmenter(str(folder))
    model, image_processor = load_segmenter(str(folder))
    items = segmented_images(data, "validation")
    return float(mean_iou(count_areas(model, image_processor, items, window_of(model.config, 56)).sum(0)))


@pytest.mark.parametrize("method", ["linear", "few-shot"])
def test_a_linear_head_learns_to_name_pixels(method, tower, data, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["--method", method, "--steps", "40", "--batch-size", "6", "--eval-steps", "20", "--eval-images", "2"]
    assert run(tower, data, output, *words) == 0
    assert "internvl.evaluation segmentation" in capsys.readouterr().out
    log = json.loads((output / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log["segmentation"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert [entry["step"] for entry in log["segmentation"] if "eval_miou" in entry] == [20, 40]
    found = miou(output, data)
    assert found > 0.4  # by chance about a sixth
    trained = load_segmenter(str(output))[0].state_dict()
    before = tiny.vision_model(num_hidden_layers=4).state_dict()["encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(trained["vision_model.encoder.layers.0.mlp.fc1.weight"], before) == (method == "linear")
    assert class_names(data) == list(load_segmenter(str(output))[0].config.id2label.values())


def test_a_upernet_is_trained_saved_and_resumed(tower, data, tmp_path):
    words = ["--method", "full", "--batch-size", "4", "--save-steps", "2", "--steps", "4"]
    assert run(tower, data, tmp_path / "whole", *words) == 0
    assert run(tower, data, tmp_path / "resumed", *words) == 0
    (tmp_path / "resumed" / "training_log.json").unlink()
    for path in (tmp_path / "resumed" / "trainer" / "segmentation").glob("checkpoint-4*"):
        for file in path.iterdir():
            file.unlink()
    (tmp_path / "resumed" / "model.safetensors").unlink()
    assert run(tower, data, tmp_path / "resumed", *words, "--resume") == 0
    models = [AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name) for name in ("whole", "resumed")]
    assert all(isinstance(model, UperNetForSemanticSegmentation) for model in models)
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert miou(tmp_path / "whole", data) >= 0
    assert run(tower, data, tmp_path / "resumed", *words, "--resume", "--weight-decay", "0.2") == 2


def test_what_cannot_be_trained_is_one_line_before_a_model_is_loaded(tower, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("internvl.training.segmentation_command.build_segmenter", None)
    cases = {
        "layout of ADE20K": (tower, tmp_path),
        "is not there": (tmp_path / "nowhere", data),
    }
    for message, (model, folder) in cases.items():
        assert run(model, folder, tmp_path / "out") == 2
        printed = capsys.readouterr().err.strip()
        assert message in printed
        assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- the published UperNet
def published_upernet(path: Path) -> UperNetForSemanticSegmentation:
    """Writes a UperNet under the names of mmsegmentation and of the published backbone."""
    backbone = tiny.vision_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], feature_pyramid="plain")
    model = UperNetForSemanticSegmentation(upernet_config(backbone, 8, dict(enumerate(NAMES))))
    model = tiny.randomize(model)
    tensors = {}
    for name, tensor in model.state_dict().items():
        head, _, inner = name.partition(".")
        if head == "backbone":
            for ours, theirs in {
                "embeddings.class_embedding": "cls_token",
                "embeddings.position_embedding": "pos_embed",
                "embeddings.patch_embedding": "patch_embed.proj",
                "encoder.layers": "blocks",
            }.items():
                inner = inner.replace(ours, theirs)
            inner += ".gamma" if inner.endswith((".ls1", ".ls2")) else ""
        else:
            inner = inner.replace("classifier", "conv_seg").replace("batch_norm", "bn")
        tensors[f"{head}.{inner}"] = tensor
    torch.save({"meta": {"mmseg_version": "0.30.0"}, "state_dict": tensors}, path)
    (path.parent / "config.json").write_text(json.dumps({"num_heads": 4, "out_indices": [0, 1, 2, 3]}))
    return model


def test_a_published_upernet_is_read_with_its_heads(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "upernet.pth"
    expected = published_upernet(path)
    assert convert([str(path), str(tmp_path / "out"), "--with-heads"]) == 0
    assert "4 classes" in capsys.readouterr().out
    check_segmenter(str(tmp_path / "out"))
    model, _ = load_segmenter(str(tmp_path / "out"))
    image = tiny.pixels(2, 56, 56)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        logits, reference = model(image).logits, expected(image).logits
    # A file's tensors lie elsewhere in a cache line than fresh ones, for which kernels may sum in another order;
    # logits near zero are differences of sums as large as the largest logit.
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decode_head.lateral_convs.1.bn.bias"), "1 tensors of the UperNet are missing"),
        (lambda tensors: tensors.update({"decode_head.odd.weight": torch.ones(1)}), "have no place: decode_head.odd"),
        (lambda tensors: tensors.pop("decode_head.conv_seg.weight"), "no UperNet of mmsegmentation"),
        (lambda tensors: tensors.update({"decode_head.fpn_convs.0.bn.bias": torch.ones(3)}), "another shape"),
    ],
)
def test_a_upernet_that_does_not_fit_is_refused(change, message, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "upernet.pth"
    published_upernet(path)
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    assert convert([str(path), str(tmp_path / "out"), "--with-heads"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
