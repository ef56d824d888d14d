"""Evaluation of a user's own data: what it is called, when it is measured again, what is read of it, and what happens
where two runs or two classes meet.
"""

import argparse
import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl.evaluation import commands
from internvl.evaluation.__main__ import main
from internvl.evaluation.card import table
from internvl.evaluation.corpus_intervals import at_most_one, interval_of_sums
from internvl.evaluation.data.annotations import read_annotations, read_parallel
from internvl.evaluation.data.folders import match_folders
from internvl.evaluation.data.opening import open_data
from internvl.evaluation.data.prompts import prompts_of
from internvl.evaluation.feature_store import FeatureStore
from internvl.evaluation.metrics import accuracy
from internvl.evaluation.page import report_and_samples
from internvl.evaluation.protocols.protocol import Protocol, own_protocol
from internvl.evaluation.reports import read_report, write_report
from internvl.evaluation.runs import data_state
from internvl.evaluation.sample_images import SampleImages
from internvl.evaluation.samples import SampleLog, read_samples
from internvl.evaluation.zero_shot import _classified, embed_classes

from .fixtures_pairs import png


def write_captions(folder: Path, captions: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(captions)):
        (folder / f"{number}.png").write_bytes(png())
    path = folder / "captions.json"
    path.write_text(json.dumps([{"image": f"{n}.png", "caption": text} for n, text in enumerate(captions)]))
    return path


def write_classes(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "0.png").write_bytes(png())
    return folder


# -------------------------------------------------------------------------------------------------------- own captions
@pytest.fixture
def measured(monkeypatch):
    """Measures without a model, as if every caption found its image; counts how often."""
    calls = []

    def measure(run):
        calls.append(run.protocol.task)
        for item in run.data.items:
            run.log.add({"id": item.name, "scores": {"R@1": 1.0}, "image": item.name})
        return {"R@1": {"value": 1.0, "interval": [0.5, 1.0], "samples": len(run.data.items)}}

    monkeypatch.setattr("internvl.evaluation.runs.measure", measure)
    monkeypatch.setattr(commands, "_load", lambda *_: (None, None))
    for check in ("_check_model", "_check_modes"):
        monkeypatch.setattr(commands, check, lambda *_: None)
    monkeypatch.setattr(commands, "_image_size", lambda *_: 448)
    return calls


def test_reports_of_two_own_data_have_two_names_and_changed_data_are_measured_again(
    measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    first = write_captions(tmp_path / "first", ["a", "b"])
    for place in (first, write_captions(tmp_path / "second", ["a", "b"]).parent):  # a file, and a folder with one
        assert main(["retrieval", "some/model", "--data", str(place)]) == 0
    assert (tmp_path / "model-retrieval-captions.json").is_file()
    assert (tmp_path / "model-retrieval-second.json").is_file()
    assert main(["retrieval", "some/model", "--data", str(first)]) == 0
    assert len(measured) == 2  # the third was read
    write_captions(tmp_path / "first", ["a", "c"])
    capsys.readouterr()
    assert main(["retrieval", "some/model", "--data", str(first)]) == 2
    assert "the report of other settings (data_state" in capsys.readouterr().err


def test_a_page_shows_the_images_of_own_data(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_captions(tmp_path / "captions", ["a", "b"])
    assert main(["retrieval", "some/model", "--data", str(path), "--output", "r.json"]) == 0
    report, samples = report_and_samples(Path("r.json"))
    images = SampleImages({**report["settings"], "task": report["task"]}, tmp_path)
    assert [images.read(sample["image"]) is not None for sample in samples] == [True, True]


@pytest.mark.parametrize("change", ["image", "label", "class", "template"])
def test_the_state_of_data_has_all_that_decides_a_result(change, tmp_path):
    folder = write_classes(tmp_path, ["a", "b"])
    protocol = own_protocol("zero_shot")
    data = open_data(protocol, str(folder))
    before = data_state(protocol, data)
    assert data_state(protocol, open_data(protocol, str(folder))) == before
    if change == "image":
        (folder / "a" / "0.png").write_bytes(png() + b" ")
    changes = {
        "label": {"items": [replace(data.items[0], labels=(1,)), *data.items[1:]]},
        "class": {"classes": ("a", "c")},
        "template": {"templates": ("{c}",)},
    }
    assert data_state(protocol, replace(data, **changes.get(change, {}))) != before


def test_folders_without_what_is_wanted_say_what_to_give(tmp_path, capsys, monkeypatch):
    (tmp_path / "coco").mkdir()
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="give the file of annotations"):
        open_data(own_protocol("retrieval"), str(tmp_path / "notes"))
    assert main(["card", "some/model", "--data", str(tmp_path)]) == 2
    assert "coco is not measured: it has none of " in capsys.readouterr().err
    assert main(["protocols"]) == 0
    assert "flickr30k_test_karpathy.txt" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- annotations
@pytest.mark.parametrize(
    "text",
    [
        'image_name| comment_number| comment\n1.jpg| 0| a dog, running\n1.jpg| 1| a "dog"\n',
        '"image","caption"\n"1.jpg","a dog, running"\n"1.jpg","a ""dog"""\n',
        'image\tcaption\n1.jpg\ta dog, running\n1.jpg\ta "dog"\n',
        'image,caption\r\n1.jpg,a dog, running\r\n1.jpg,a "dog"\r\n',
    ],
    ids=["bars", "quotes", "tabs", "CRLF"],
)
def test_tables_as_others_write_them(text, tmp_path):
    (tmp_path / "a.csv").write_text(text, newline="")
    assert read_annotations(tmp_path / "a.csv") == {"1.jpg": ["a dog, running", 'a "dog"']}


def test_what_only_python_takes_for_an_end_of_line_stays_in_captions(tmp_path):
    caption = "one\u2028two\x85three"
    (tmp_path / "a.csv").write_text(f"image,caption\n1.jpg,{caption}\n")
    assert read_annotations(tmp_path / "a.csv") == {"1.jpg": [caption]}
    (tmp_path / "names.txt").write_text("1.jpg\n2.jpg\n")
    (tmp_path / "captions.txt").write_text(f"{caption}\nb\n")
    assert read_parallel(tmp_path / "names.txt", tmp_path / "captions.txt") == {"1.jpg": [caption], "2.jpg": ["b"]}


def test_two_images_of_one_id_are_refused(tmp_path):
    images = [{"id": 1, "file_name": name} for name in ("a.png", "b.png")]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "a"}]}))
    with pytest.raises(ValueError, match=r"image 2 has the .id. 1 of another one"):
        read_annotations(tmp_path / "a.json")


# -------------------------------------------------------------------------------------------------------------- shards
def write_tar(path: Path, rows: list[dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for ending, content in row.items():
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
    return str(path)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 11, 12, 40])
def test_a_limit_takes_rows_of_shards_from_everywhere_and_knows_all_classes(limit, tmp_path):
    """Shards are often sorted by class: those in front have one, and any model would be right."""
    rows = [{"png": png(), "cls": f"class {number // 4}".encode()} for number in range(12)]
    data = open_data(own_protocol("zero_shot"), write_tar(tmp_path / "a.tar", rows), limit)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert len(data.items) == min(limit, 12)
    assert len({item.labels for item in data.items}) == min(limit, 3)


def test_captions_in_shards_are_texts(tmp_path):
    rows = [{"png": png(), "json": json.dumps({"caption": 3.5}).encode()}]
    with pytest.raises(ValueError, match="no text: it is of type float"):
        open_data(own_protocol("retrieval"), write_tar(tmp_path / "a.tar", rows))


# ------------------------------------------------------------------------------------------------------------- classes
def test_folders_of_numbers_are_those_of_the_training_images(tmp_path):
    """`2` is a class that was not trained, and not the third one."""
    write_classes(tmp_path / "train", ["0", "1", "3"])
    write_classes(tmp_path / "val", ["0", "2"])
    with pytest.raises(ValueError, match="val/2 is none of the 3 classes"):
        open_data(own_protocol("probe"), str(tmp_path))


def test_signs_that_look_like_numbers_are_names(tmp_path):
    assert open_data(own_protocol("zero_shot"), str(write_classes(tmp_path, ["\u00b2", "\u00b3"]))).classes == (
        "\u00b2",
        "\u00b3",
    )
    assert match_folders(["\u00b2"], ["\u00b2", "a"]) == {"\u00b2": 0}


def test_folders_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two folders of the class 'a b', a-b and a_b"):
        open_data(own_protocol("zero_shot"), str(write_classes(tmp_path, ["a_b", "a-b"])))


def test_templates_are_checked_with_the_data(tmp_path):
    folder = str(write_classes(tmp_path, ["a", "b"]))
    with pytest.raises(ValueError, match="A template has to hold"):
        open_data(Protocol("p", "zero_shot", {"layout": "class_folders"}, prompts={"templates": ["a photo"]}), folder)
    with pytest.raises(ValueError, match="the subset 'imagenet-x' is none of"):
        open_data(Protocol("p", "zero_shot", {"layout": "class_folders", "subset": "imagenet-x"}), folder)


def test_of_classes_of_one_name_the_first_is_the_answer():
    """As where the published code sorts: not both wrong, and not by chance."""
    classes, row = ["sun", "glasses", "glasses", "sea"], torch.tensor([0.1, 0.9, 0.9, 0.2])
    right = [_classified({"C": row}, [label], classes)["scores"]["C/top-1"] for label in range(4)]
    assert right == [0, 1, 0, 0]
    assert _classified({"C": row}, [2], classes)["scores"]["C/top-5"] == 1


def test_classes_of_one_name_have_the_same_embedding(monkeypatch):
    """Else batches, which pad texts to other lengths, would decide between them."""
    calls = []

    def embed(model, processor, texts, batch_size):
        calls.extend(texts)
        return torch.nn.functional.normalize(torch.randn(len(texts), 8), dim=-1)

    monkeypatch.setattr("internvl.evaluation.zero_shot.embed_texts", embed)
    found = embed_classes(None, None, prompts_of(["sun", "sea", "sun"], ["a {c}", "the {c}"]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert calls == ["a sun", "the sun", "a sea", "the sea"]


def test_damaged_features_are_no_accuracy():
    with pytest.raises(ValueError, match="not finite"):
        accuracy(torch.full((2, 3), torch.nan), torch.eye(3), [0, 0])


# ---------------------------------------------------------------------------------------------------- two runs at once
def test_a_second_run_may_not_write_into_the_first(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleLog(path, {"task": "x"}) as log:
        log.add({"id": "a", "scores": {"acc": 1}})
        with pytest.raises(ValueError, match="Another run is writing"), SampleLog(path, {"task": "x"}):
            pytest.fail("both write")
    late = SampleLog(path, {"task": "x"})
    with SampleLog(path, {"task": "x"}) as log:
        log.add({"id": "b", "scores": {"acc": 0}})
    with late:  # made before the other wrote
        assert set(late.done) == {"a", "b"}
    assert len(read_samples(path)[1]) == 2


def test_a_run_without_results_leaves_its_file_to_others(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleLog(path, {"image_size": 100_000}):
        pass
    with SampleLog(path, {"image_size": 448}) as log:
        assert log.is_new
        log.add({"id": "a", "scores": {"acc": 1}})
    assert read_samples(path) == ({"image_size": 448}, [{"id": "a", "scores": {"acc": 1}}])
    with pytest.raises(ValueError, match="image_size 448, now 98"):
        SampleLog(path, {"image_size": 98})


def test_features_that_were_cut_off_are_computed_again(tmp_path):
    def features(computed):
        def compute(batch):
            computed.extend(batch)
            return torch.tensor([[float(number)] * 4 for number in batch])

        return FeatureStore(tmp_path, {"of": "x"}).features(range(1, 7), compute, 2)

    whole = features([]).clone()
    (path,) = tmp_path.glob("*.features")
    path.write_bytes(path.read_bytes()[:-20])
    again: list[int] = []
    assert torch.equal(features(again), whole)
    assert again == [1, 2, 3, 4, 5, 6]
    features(again)
    assert len(again) == 6


def test_one_sample_has_no_interval():
    parts = np.arange(6.0).reshape(1, 6)
    assert interval_of_sums(lambda sums: sums[..., 0], parts) is None
    assert interval_of_sums(lambda sums: sums[..., 0], np.concatenate([parts, parts])) == [0, 0]
    metrics = at_most_one({"one": {"value": 0.5, "interval": None}, "two": {"value": 0.9, "interval": [0.8, 1.1]}})
    assert [metric["interval"] for metric in metrics.values()] == [None, [0.8, 1.0]]


# --------------------------------------------------------------------------------------------------------------- names
def test_names_that_are_no_utf_8_are_written_and_shown(tmp_path, capsys):
    report = {"task": "x", "model": "m\udc80", "settings": {}, "metrics": {}}
    write_report(tmp_path / "r.json", report)
    assert read_report(tmp_path / "r.json") == report
    shown = table([("model",), ("m\udc80\x1b[31m\nb",)])
    assert shown.isascii()
    assert "\x1b" not in shown
    options = argparse.Namespace(model="/", subfolder="", data="/a b/\u00e4 \udc80.json")
    assert str(commands._default_output(options, own_protocol("caption"))) == "model-caption-\u00e4.json"


# ------------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "nonsense"], "`--device nonsense` is not here"),
        (["--device", "cuda:99"], "`--device cuda:99` is not here"),
        (["--mode", "InternVL-C", "--rerank", "3"], "`--rerank` orders what the mode InternVL-G finds"),
    ],
)
def test_options_that_cannot_be_are_one_line_before_a_model_is_loaded(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("loaded"))
    path = write_captions(tmp_path / "captions", ["a", "b"])
    model = Path(__file__).resolve().parents[1] / "internvl_g"
    assert main(["retrieval", str(model), "--data", str(path), "--output", str(tmp_path / "r.json"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_mode_is_not_measured_in_it(monkeypatch):
    monkeypatch.setattr(commands, "check_kind", lambda *_, **__: None)
    monkeypatch.setattr(commands, "kind_of", lambda _: "InternVL-C")
    protocol = replace(own_protocol("zero_shot"), modes=("InternVL-G",))
    with pytest.raises(ValueError, match="m is an InternVL-C, which has no mode InternVL-G"):
        commands._check_modes(argparse.Namespace(model="m", subfolder=""), protocol)
