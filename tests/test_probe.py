"""Probes: training as published, features on disk, ImageNet's folders with ReaL labels and parts of its classes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.evaluation import probe as probes
from internvl.evaluation.data.items import Item
from internvl.evaluation.data.opening import open_data, protocols_below
from internvl.evaluation.feature_store import FeatureStore, fingerprint_of_items, fingerprint_of_model
from internvl.evaluation.probe import (
    FeatureSource,
    Probe,
    ProbeRecipe,
    best_rate,
    cosine_with_warmup,
    fit_probe,
    probe_logits,
    random_crop,
    recipe_of,
)
from internvl.evaluation.protocols.protocol import Protocol, find_protocol
from internvl.evaluation.runs import TaskRun, measure
from internvl.evaluation.samples import SampleLog, read_samples
from internvl.image_processing_internvl import InternVLImageProcessor

from . import tiny


COLOURS = {"n01440764": (200, 30, 30), "n01443537": (30, 180, 40), "n01484850": (30, 60, 220), "n01491361": (240,) * 3}
WNIDS = list(COLOURS)


def write_class(folder, colour, number, start=0, name="ILSVRC2012_val_{:08d}.JPEG"):
    """Noisy images of one colour."""
    folder.mkdir(parents=True)
    for index in range(start, start + number):
        noise = np.random.default_rng(index).normal(0, 25, (70, 80, 3))
        Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(folder / name.format(index))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with ImageNet-1K of four classes, ReaL labels, -A with two of the classes and -V2 with numbers."""
    root = tmp_path_factory.mktemp("data")
    for place, (wnid, colour) in enumerate(COLOURS.items()):
        write_class(root / "imagenet-1k" / "train" / wnid, colour, 12, 100 * place, "train_{}.JPEG")
        write_class(root / "imagenet-1k" / "val" / wnid, colour, 3, 1 + 3 * place)
        write_class(root / "imagenetv2" / str(place), colour, 2, 500 + 9 * place, "{}.jpeg")
    for place in (1, 3):
        write_class(root / "imagenet-a" / WNIDS[place], COLOURS[WNIDS[place]], 2, 900 + 9 * place, "{}.jpg")
    real = [[place] for place in range(4) for _ in range(3)]
    real[0], real[1] = [], [0, 2]
    (root / "imagenet-1k" / "real.json").write_text(json.dumps(real))
    return root


def processor():
    return InternVLImageProcessor(size={"height": 56, "width": 56}, resize_mode="squash")


def run_of(root, path, name="probe-imagenet-1k", **options):
    protocol = find_protocol(name)
    log = SampleLog(path, {"model": "tiny"})
    chosen = {"epochs": 6, "features": str(path.parent / "features"), **options}
    return TaskRun(protocol, open_data(protocol, str(root)), tiny.vision_model(), processor(), log, 8, chosen)


def measured(run):
    with run.log:
        return measure(run)


# ------------------------------------------------------------------------------------------------------------ training
def test_the_recipe_is_that_of_table_22():
    recipe = ProbeRecipe()
    assert (recipe.learning_rate, recipe.batch_size, recipe.momentum) == (0.2, 1024, 0.9)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.pooling) == (10, 1, "linear")
    head = Probe(tiny.vision_config(), 7, "linear")
    assert head.norm.num_features == 64
    assert head.norm.eps == 1e-6
    assert {name.split(".")[0] for name in head.state_dict()} == {"norm", "head"}
    with pytest.raises(ValueError, match="`pooling` must be one of linear, attention"):
        recipe_of({"pooling": "mean"})


def test_the_schedule_is_timms_cosine():
    found = [cosine_with_warmup(step, 100, 10) for step in (0, 5, 10, 50, 100)]
    expected = [0, 0.5, 0.5 * (1 + math.cos(0.1 * math.pi)), 0.5, 0]
    assert found == pytest.approx(expected)


def test_training_steps_are_those_of_a_plain_loop():
    """Nesterov's momentum, clipped gradients, batch norm in training, no decay."""
    config, recipe = tiny.vision_config(), ProbeRecipe(epochs=2, batch_size=8, learning_rate=40.0, max_grad_norm=0.5)
    features = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 3
    found = fit_probe(config, lambda epoch: features, labels, 3, recipe)

    torch.manual_seed(0)
    expected = Probe(config, 3, "linear").train()
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    step = 0
    for epoch in range(2):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))
        for part in (order[:8], order[8:]):
            rate = 40 * 8 / 1024 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * step / 4)))
            expected.zero_grad()
            torch.nn.functional.cross_entropy(expected(features[part]), labels[part]).backward()
            gradients = [p.grad for p in expected.parameters()]
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            factor = min(1.0, float(0.5 / (norm + 1e-6)))
            for parameter, speed, gradient in zip(expected.parameters(), velocity, gradients, strict=True):
                speed.mul_(0.9).add_(gradient * factor)
                parameter.data -= rate * (gradient * factor + 0.9 * speed)
            step += 1
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name, atol=1e-5, rtol=1e-4)


def test_attention_pooling_learns_what_the_mean_does_not_show():
    """One token of many says the class, in a direction that others have too."""
    config = tiny.vision_config()
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    tokens = torch.randn(256, 6, 32, generator=rng)
    tokens[:, 3, 0] = 12.0
    tokens[:, 3, 1] = torch.where(labels == 1, 4.0, -4.0)
    recipe = ProbeRecipe(pooling="attention", epochs=25, batch_size=64, learning_rate=3.0)
    probe = fit_probe(config, lambda epoch: tokens[:192], labels[:192], 2, recipe)
    assert (probe_logits(probe, tokens[192:]).argmax(1) == labels[192:]).float().mean() > 0.9
    assert "attn_pooling.cross_attn.q.weight" in probe.state_dict()


def test_heads_have_the_names_of_the_classification_model():
    for pooling, name in {"linear": "cls_patch_concat", "attention": "attention_pooling"}.items():
        model = tiny.classifier(name)
        model.load_state_dict(Probe(model.config, 4, pooling).state_dict(), strict=False)
        names = {key for key in model.state_dict() if not key.startswith("vision_model.")}
        assert names == set(Probe(model.config, 4, pooling).state_dict())


def test_a_sweep_takes_the_rate_that_answers_best_on_images_it_did_not_see():
    labels, features = torch.arange(40) % 2, torch.eye(40)
    seen = []

    def fit(recipe, chosen):
        seen.append((recipe.learning_rate, chosen.tolist()))
        is_best = recipe.learning_rate == 0.4

        def answer(rows):
            right = labels[rows.argmax(1)]
            return torch.nn.functional.one_hot(right if is_best else 1 - right, 2).float()

        probe = torch.nn.Module()
        probe.forward = answer
        probe.head = torch.nn.Linear(1, 1)
        return probe

    assert best_rate(fit, features, labels, ProbeRecipe()) == 0.4
    assert [rate for rate, _ in seen] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert all(set(range(40)) - set(chosen) == {9, 19, 29, 39} for _, chosen in seen)
    with pytest.raises(ValueError, match="every 10th training image"):
        best_rate(fit, features[:5], labels[:5], ProbeRecipe())


# ------------------------------------------------------------------------------------------------------------ features
def test_features_are_class_token_and_mean_of_the_patches_of_a_centre_crop(root, tmp_path):
    model = tiny.vision_model()
    items = open_data(find_protocol("probe-imagenet-1k"), str(root)).items[:2]
    image = items[1].read()[0].resize((64, 56), Image.Resampling.BICUBIC).crop((4, 0, 60, 56))
    with torch.no_grad():
        tokens = model(processor()(image, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
    found = FeatureSource(model, processor(), tmp_path, "linear").features(items)
    torch.testing.assert_close(found[1], torch.cat([tokens[0], tokens[1:].mean(0)]))
    found = FeatureSource(model, processor(), tmp_path, "attention").features(items)
    torch.testing.assert_close(found[1], tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_computed_once_and_gone_on_with(dtype, tmp_path):
    items = [Item(f"{number}", b"%d" % number) for number in range(7)]
    asked = []

    def compute(batch, fail_at=None):
        asked.append([item.name for item in batch])
        if fail_at is not None and len(asked) > fail_at:
            raise KeyboardInterrupt
        return torch.tensor([[float(item.name), 0.5] for item in batch], dtype=dtype)

    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path, {"a": 1}).features(items, lambda batch: compute(batch, 2), 2)
    asked.clear()
    found = FeatureStore(tmp_path, {"a": 1}).features(items, compute, 2)
    assert asked == [["4", "5"], ["6"]]
    assert found.dtype == dtype
    assert found.float().tolist() == [[float(number), 0.5] for number in range(7)]
    FeatureStore(tmp_path, {"a": 1}).features(items, compute, 2)
    assert len(asked) == 2
    FeatureStore(tmp_path, {"a": 2}).features(items, compute, 7)
    assert len(asked) == 3


def test_models_and_images_are_told_apart(root, tmp_path):
    model, other = tiny.vision_model(), tiny.vision_model()
    assert fingerprint_of_model(model) == fingerprint_of_model(other)
    with torch.no_grad():
        other.encoder.layers[1].mlp.fc1.weight[0, 0] += 1
    assert fingerprint_of_model(model) != fingerprint_of_model(other)
    items = open_data(find_protocol("probe-imagenet-1k"), str(root)).items
    assert fingerprint_of_items(items) == fingerprint_of_items(list(items))
    assert fingerprint_of_items(items[1:]) != fingerprint_of_items(items)
    assert fingerprint_of_items([Item("a", b"1")]) != fingerprint_of_items([Item("a", b"2")])


def test_random_crops_are_reproducible_squares_of_parts_of_the_image():
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(90), np.arange(60)[:, None]
    image = Image.fromarray(pixels)
    crops = [np.array(random_crop(image, 32, torch.Generator().manual_seed(seed))).astype(int) for seed in range(80)]
    assert {crop.shape for crop in crops} == {(32, 32, 3)}
    again = np.array(random_crop(image, 32, torch.Generator().manual_seed(3)))
    assert np.array_equal(again, crops[3])
    mirrored = [crop[0, 0, 0] > crop[0, -1, 0] for crop in crops]
    assert 0.3 < np.mean(mirrored) < 0.7
    widths = [abs(crop[0, -1, 0] - crop[0, 0, 0]) for crop in crops]
    heights = [crop[-1, 0, 1] - crop[0, 0, 1] for crop in crops]
    areas = [width * height / (90 * 60) for width, height in zip(widths, heights, strict=True)]
    assert min(areas) < 0.2
    assert max(areas) > 0.6
    thin = Image.new("RGB", (400, 4))
    assert random_crop(thin, 32, torch.Generator().manual_seed(0)).size == (32, 32)


def test_every_epoch_has_the_next_of_the_stored_crops(root, tmp_path, monkeypatch):
    seen = []
    extract = FeatureSource.features

    def features(self, items, view=0):
        seen.append(view)
        return extract(self, items, view)

    monkeypatch.setattr(FeatureSource, "features", features)
    measured(run_of(root, tmp_path / "a.samples.jsonl", views=2, epochs=5))
    assert seen == [1, 2, 1, 2, 1, 0]  # the last is of what is measured
    assert len(list((tmp_path / "features").glob("*.features"))) == 3


# ------------------------------------------------------------------------------------------------------------ the task
@pytest.mark.parametrize("pooling", ["linear", "attention"])
def test_a_probe_tells_colours_apart(pooling, root, tmp_path):
    run = run_of(root, tmp_path / "a.samples.jsonl", pooling=pooling, epochs=20)
    metrics = measured(run)
    assert set(metrics) == {f"{pooling}/top-1", f"{pooling}/top-5"}
    assert metrics[f"{pooling}/top-1"]["value"] > 0.6  # by chance a quarter
    assert metrics[f"{pooling}/top-1"]["samples"] == 12
    _, samples = read_samples(run.log.path)
    assert samples[0]["expected"] == [WNIDS[0]]


def test_one_probe_is_measured_on_all_sets(root, tmp_path, monkeypatch):
    found = {}
    for name in ("imagenet-1k", "imagenet-real", "imagenet-a", "imagenet-v2"):
        run = run_of(root, tmp_path / f"{name}.samples.jsonl", f"probe-{name}")
        found[name] = measured(run)["linear/top-1"]["samples"], read_samples(run.log.path)[1]
        monkeypatch.setattr(probes, "fit_probe", None)  # trained once
    assert {name: count for name, (count, _) in found.items()} == {
        "imagenet-1k": 12,
        "imagenet-real": 11,  # one has no label
        "imagenet-a": 4,
        "imagenet-v2": 8,
    }
    assert found["imagenet-real"][1][0]["expected"] == [WNIDS[0], WNIDS[2]]
    assert {sample["answer"] for sample in found["imagenet-a"][1]} <= {WNIDS[1], WNIDS[3]}
    assert found["imagenet-v2"][1][2]["expected"] == [WNIDS[1]]


def test_the_protocols_have_the_figures_of_table_4(root):
    figures = {"1k": 88.2, "real": 90.4, "v2": 79.9, "a": 77.5, "r": 89.8, "sketch": 69.1}
    for name, figure in figures.items():
        assert find_protocol(f"probe-imagenet-{name}", "probe").published["linear"]["top-1"] == figure
    there = {protocol.name for protocol in protocols_below(str(root), "probe")}
    assert there == {f"probe-imagenet-{name}" for name in ("1k", "real", "v2", "a")}


def test_folders_that_do_not_fit_are_refused(tmp_path):
    own = Protocol("own-data", "probe", {"layout": "probe_folders"})
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="with train and val or validation or test"):
        open_data(own, str(tmp_path))
    (tmp_path / "val" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match="dog is none of the 1 classes"):
        open_data(own, str(tmp_path))
