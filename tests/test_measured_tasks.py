"""Captions, probes and segmentation from the command line, on data in their real layouts, by bundled checkpoints."""

import json
import sys

import pytest

from internvl.evaluation import commands
from internvl.evaluation.__main__ import main
from internvl.evaluation.card import card_rows
from internvl.evaluation.generated import held_out_scenes
from internvl.evaluation.reports import read_report
from internvl.evaluation.samples import read_samples
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.synthetic.captions import caption
from internvl.synthetic.scenes import draw_scene
from internvl.training.__main__ import main as train

from . import tiny
from .conftest import ROOT
from .fixtures_segmentation import write_ade20k
from .test_caption_scores import needs_java
from .test_probe import COLOURS, write_class


G = [str(ROOT), "--subfolder", "internvl_g"]
VIT = str(ROOT / "internvit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A root with COCO, ImageNet and ADE20K in their layouts."""
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "coco" / "val2014").mkdir(parents=True)
    rows = []
    for number, scene in enumerate(held_out_scenes(6)):
        name = f"val2014/COCO_val2014_{number:012d}.jpg"
        draw_scene(scene).save(root / "coco" / name, quality=95)
        rows.append({"image": name, "caption": [caption(scene), f"image number {number}"]})
    (root / "coco" / "coco_karpathy_test.json").write_text(json.dumps(rows))
    for place, (wnid, colour) in enumerate(COLOURS.items()):
        write_class(root / "imagenet-1k" / "train" / wnid, colour, 10, 100 * place, "train_{}.JPEG")
        write_class(root / "imagenet-1k" / "val" / wnid, colour, 2, 1 + 2 * place)
    ade = write_ade20k(root / "ADEChallengeData2016", [(60, 80), (80, 60)] * 4, "training", ".jpg", seed=1)
    write_ade20k(ade, [(60, 80), (80, 60), (56, 56)], "validation", ".jpg", seed=2)
    return root


@pytest.fixture(scope="module")
def segmenter(data, tmp_path_factory):
    """A linear head on the bundled InternViT."""
    folder = tmp_path_factory.mktemp("segmenter") / "linear"
    words = ["--steps", "20", "--batch-size", "4", "--image-size", "56", "--learning-rate", "1e-2", "--workers", "0"]
    given = ["--model", VIT, "--data", str(data / "ADEChallengeData2016"), "--output", str(folder)]
    assert train(["segmentation", *given, *words]) == 0
    return folder


def refused(capsys, monkeypatch, *arguments) -> str:
    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


@needs_java
def test_captions_stand_beside_the_papers_cider(data, tmp_path, capsys):
    output = tmp_path / "captions.json"
    words = ["--data", str(data), "--protocol", "coco-captions", "--output", str(output), "--image-size", "224"]
    assert main(["caption", *G, *words, "--batch-size", "3"]) == 0
    report = read_report(output)
    shown = {row[1]: row for row in card_rows(report)}
    assert shown["InternVL-G/CIDEr"][4] == "128.2"
    low, high = report["metrics"]["InternVL-G/CIDEr"]["interval"]
    assert low <= report["metrics"]["InternVL-G/CIDEr"]["value"] <= high
    _, samples = read_samples(output.with_suffix(".samples.jsonl"))
    assert all(len(sample["answer"].split()) >= 3 for sample in samples)
    assert main(["caption", *G, *words, "--batch-size", "3"]) == 0  # read, not measured again


def test_a_probe_of_the_bundled_tower_tells_colours_apart(data, tmp_path):
    output = tmp_path / "probe.json"
    words = ["--data", str(data), "--protocol", "probe-imagenet-1k", "--output", str(output), "--image-size", "112"]
    assert main(["probe", VIT, *words, "--epochs", "8"]) == 0
    report = read_report(output)
    assert report["metrics"]["linear/top-1"]["value"] >= 0.75
    assert report["settings"]["epochs"] == 8
    assert "features" not in report["settings"]
    assert {row[1]: row[4] for row in card_rows(report)} == {"linear/top-1": "88.2"}
    assert list((tmp_path / "features").glob("*.probe.safetensors"))


def test_a_segmentation_model_is_measured(data, segmenter, tmp_path):
    output = tmp_path / "ade.json"
    assert main(["segmentation", str(segmenter), "--data", str(data), "--output", str(output)]) == 0
    report = read_report(output)
    metric = report["metrics"]["linear/mIoU"]
    assert metric["value"] > 0.4
    assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    assert set(metric["classes"]) <= {"wall", "building", "sky", "floor"}
    assert report["settings"]["image_size"] == 56
    assert all(0 <= end <= 1 for metric in report["metrics"].values() for end in metric["interval"])
    assert {row[1]: row[4] for row in card_rows(report)}["linear/mIoU"] == "47.2"


def test_the_card_measures_a_tower_and_a_segmentation_model_on_what_they_do(data, segmenter, tmp_path, capsys):
    for model, expected in ((VIT, "probe-imagenet-1k.json"), (str(segmenter), "ade20k.json")):
        folder = tmp_path / expected
        words = ["--data", str(data), "--output", str(folder), "--limit", "2", "--image-size", "56"]
        assert main(["card", model, *words]) == 0
        assert {path.name for path in folder.glob("*.json")} == {expected}


def spoil(data, folder, kind):
    """A copy of a part of the data without something."""
    root = folder / kind
    if kind == "image":
        (root / "coco").mkdir(parents=True)
        (root / "coco" / "coco_karpathy_test.json").write_text('[{"image": "val2014/a.jpg", "caption": ["a"]}]')
        return root, "a.jpg is missing", ["caption", *G, "--protocol", "coco-captions"]
    if kind == "caption":
        (root / "coco").mkdir(parents=True)
        (root / "coco" / "coco_karpathy_test.json").write_text('[{"image": "val2014/a.jpg", "caption": [""]}]')
        return root, "row 1 has no caption", ["caption", *G, "--protocol", "coco-captions"]
    if kind == "train":
        write_class(root / "val" / "n01440764", (0, 0, 0), 1)
        return root, "with train and val", ["probe", VIT]
    if kind == "annotation":
        write_ade20k(root, [(20, 30)])
        next((root / "annotations" / "validation").iterdir()).unlink()
        return root, "other annotations are missing", ["segmentation", VIT]
    write_ade20k(root, [(20, 30)])
    next((root / "images" / "validation").iterdir()).write_bytes(b"no image")
    return root, "ADE_val_00000000", ["segmentation", VIT]


@pytest.mark.parametrize("kind", ["image", "caption", "train", "annotation", "broken"])
def test_bad_data_are_one_line_before_a_model_is_loaded(kind, data, tmp_path, capsys, monkeypatch):
    root, message, arguments = spoil(data, tmp_path, kind)
    assert message in refused(capsys, monkeypatch, *arguments, "--data", root)


def test_models_of_other_kinds_are_refused(data, tmp_path, capsys, monkeypatch):
    error = refused(capsys, monkeypatch, "segmentation", VIT, "--data", data)
    assert "internvl.training segmentation" in error
    error = refused(capsys, monkeypatch, "caption", VIT, "--data", data, "--protocol", "coco-captions")
    assert "vision tower" in error
    assert "name yours by --data" in refused(capsys, monkeypatch, "segmentation", VIT)


def test_a_window_without_whole_patches_is_refused(data, segmenter, capsys, monkeypatch):
    error = refused(capsys, monkeypatch, "segmentation", segmenter, "--data", data, "--image-size", "60")
    assert "whole patches of 28" in error


def test_captions_need_their_scorers_before_the_model(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer", None)
    error = refused(capsys, monkeypatch, "caption", *G, "--data", data, "--protocol", "coco-captions")
    assert "internvl[evaluate]" in error


def test_a_model_with_other_classes_is_refused(data, tmp_path, capsys, monkeypatch):
    tiny.segmenter(num_labels=3).save_pretrained(tmp_path / "head")
    InternVLImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path / "head")
    output = tmp_path / "ade.json"
    words = ["segmentation", tmp_path / "head", "--data", data, "--output", output]
    assert "knows 3 classes" in refused(capsys, monkeypatch, *words)
