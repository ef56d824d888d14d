"""Faults that a run of evaluation meets: models that are damaged, files of an earlier run that a crash cut off, and
outputs that are taken. None of them costs what was measured, and none becomes a figure.
"""

import json
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch

from internvl.evaluation import grounding, reranking
from internvl.evaluation.__main__ import main
from internvl.evaluation.attention_maps import AttentionMap
from internvl.evaluation.card import card
from internvl.evaluation.compare import read_results
from internvl.evaluation.data.items import Item
from internvl.evaluation.feature_store import FeatureStore
from internvl.evaluation.harness_results import read_harness_results, read_harness_samples, write_harness_reports
from internvl.evaluation.metrics import box_in
from internvl.evaluation.probe import _generator
from internvl.evaluation.reports import check_report_place, read_report, write_report
from internvl.evaluation.samples import SampleLog, read_samples
from internvl.evaluation.segmentation import segment_image
from internvl.evaluation.sliding_window import SlidingWindow
from internvl.evaluation.zero_shot import _classified

from . import tiny
from .fixtures_pairs import png
from .test_compare import answers as answered
from .test_compare import compare, report
from .test_grounding import ROW, answers, command, data  # noqa: F401
from .test_harnesses import LM_EVAL, SAMPLE, written
from .test_probe import measured, root, run_of  # noqa: F401
from .test_segmentation import PROCESSOR


# --------------------------------------------------------------------------------------------------------------- files
def test_a_sample_that_was_torn_within_a_letter_is_left_out(tmp_path):
    with SampleLog(tmp_path / "s.jsonl", {}) as log:
        log.add({"id": "a", "scores": {}, "answer": "星"})
    content = (tmp_path / "s.jsonl").read_bytes()
    (tmp_path / "s.jsonl").write_bytes(content + '{"id": "星'.encode()[:-1])
    assert [sample["id"] for sample in read_samples(tmp_path / "s.jsonl")[1]] == ["a"]
    with SampleLog(tmp_path / "s.jsonl", {}) as log:
        log.add({"id": "b", "scores": {}})
    assert [sample["id"] for sample in read_samples(tmp_path / "s.jsonl")[1]] == ["a", "b"]


def test_samples_that_lack_what_a_task_reads_are_named(tmp_path):
    with SampleLog(tmp_path / "s.jsonl", {}) as log:
        log.add({"id": "a", "scores": {"top-1": 1.0}, "answer": "x"})
        log.check_done(["answer"], ["top-1"])
        for needed in ((["areas"], []), ([], ["top-5"])):
            with pytest.raises(ValueError, match=r"s\.jsonl: the sample 'a' lacks '(areas|top-5)': delete the file"):
                log.check_done(*needed)


@pytest.mark.parametrize(
    "change", [{"dtype": "x"}, {"dtype": None}, {"rows": "2"}, {"rows": -1}, {"shape": 3}, {"shape": ["a"]}]
)
def test_features_whose_description_is_damaged_are_computed_again(change, tmp_path):
    asked = []

    def compute(batch):
        asked.extend(batch)
        return torch.tensor([[float(number)] for number in batch])

    store = FeatureStore(tmp_path, {})
    store.features([1, 2], compute, 2)
    state = json.loads(store.state_path.read_text())
    store.state_path.write_text(json.dumps({**state, **change}))
    assert store.features([1, 2], compute, 2).tolist() == [[1.0], [2.0]]
    assert asked == [1, 2, 1, 2]


def test_a_probe_that_was_cut_off_is_trained_again(root, tmp_path):  # noqa: F811
    first = measured(run_of(root, tmp_path / "a.samples.jsonl"))
    (path,) = (tmp_path / "features").glob("*.probe.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    assert measured(run_of(root, tmp_path / "b.samples.jsonl")) == first
    assert len(list((tmp_path / "features").glob("*.probe.safetensors"))) == 1


def test_training_images_are_looked_at_before_features_are_extracted(root, tmp_path):  # noqa: F811
    run = run_of(root, tmp_path / "a.samples.jsonl")
    items = list(run.data.training)
    items[5] = Item("bad.png", b"no image", items[5].labels)
    object.__setattr__(run.data, "training", items)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        measured(run)
    assert not list((tmp_path / "features").glob("*"))


def test_crops_of_images_whose_names_are_no_utf_8():
    first, again, other = (_generator(0, 1, name).initial_seed() for name in ("\udcff", "\udcff", "\udcfe"))
    assert first == again != other


# ------------------------------------------------------------------------------------------------------ damaged models
def test_a_damaged_tower_has_no_accuracy_and_leaves_no_probe(root, tmp_path):  # noqa: F811
    run = run_of(root, tmp_path / "a.samples.jsonl")
    with torch.no_grad():
        run.model.encoder.layers[0].mlp.fc1.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="of the probe is not finite"):
        measured(run)
    assert not list((tmp_path / "features").glob("*.safetensors"))
    assert not run.log.done


def test_a_damaged_head_sees_no_class_0():
    model = tiny.segmenter()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="A score of a pixel is not finite"):
        segment_image(model, PROCESSOR, torch.zeros(3, 60, 60), SlidingWindow(56, 36, 14))


def test_a_map_that_is_not_finite_points_nowhere():
    with pytest.raises(ValueError, match="A value of a map is not finite"):
        AttentionMap("star", torch.full((2, 2), torch.nan), (0, 0, 10, 10)).highest()


def ranks(monkeypatch, matching, matches, count):
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.6]])
    monkeypatch.setattr(reranking, "_matching", lambda run, pairs: matching[: len(pairs)])
    run = SimpleNamespace(options={"rerank": count})
    sides = {"image_to_text": (0, 1, [matches])}
    found = reranking.reranked(run, similarity[:, :1] * 0 + 1, similarity.T, list("abcde"), sides)
    return found["InternVL-G+ITM/image_to_text"].tolist()


def test_matching_that_is_no_number_ranks_nothing_first(monkeypatch):
    assert ranks(monkeypatch, torch.tensor([0.1, 0.2, 0.9]), [2], 3) == [0]
    assert ranks(monkeypatch, torch.tensor([0.1, 0.2, 0.3]), [2], 2) == [2]
    # Two captions of the image that are alike, behind the candidates: neither is before the other.
    assert ranks(monkeypatch, torch.tensor([0.1, 0.2]), [3, 4], 2) == [3]
    with pytest.raises(ValueError, match="A probability that image and text match is not finite"):
        ranks(monkeypatch, torch.full((3,), torch.nan), [2], 3)


def test_of_several_right_classes_only_the_first_of_a_name_is_an_answer():
    """ReaL gives an image several labels: that one comes early makes no later twin of another right."""
    classes, row = ["sea", "glasses", "sun", "glasses"], torch.tensor([0.1, 0.9, 0.2, 0.9])
    right = [_classified({"C": row}, labels, classes)["scores"]["C/top-1"] for labels in ((0, 3), (0, 1), (1, 3))]
    assert right == [0, 1, 1]


# ----------------------------------------------------------------------------------------------------------- grounding
def test_expressions_that_changed_are_asked_again(data, answers, tmp_path, capsys):  # noqa: F811
    path, out = data({**ROW, "sent": "hit"}), tmp_path / "report.json"
    assert command("MODEL", "--data", path, "--output", str(out)) == 0
    data({**ROW, "sent": "hit", "bbox": [0, 0, 5, 5]})
    capsys.readouterr()
    assert command("MODEL", "--data", path, "--output", str(out)) == 2
    assert "data_state" in capsys.readouterr().err
    assert read_report(out)["metrics"]["accuracy@0.5"]["value"] == 1


@pytest.mark.parametrize(("row", "message"), [({"sent": "\ud800"}, "line 1: .*lone surrogate"), ({}, "a.png cannot")])
def test_what_cannot_be_asked_is_told_before_the_model(row, message, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(grounding, "_load_chat", lambda options: pytest.fail("loaded"))
    path = data({**ROW, **row})
    if not row:
        (tmp_path / "coco" / "a.png").write_bytes(b"no image")
    assert command("MODEL", "--data", path) == 2
    assert re.search(message, capsys.readouterr().err)


def test_outputs_that_are_taken_are_told_before_the_model(data, answers, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(grounding, "_load_chat", lambda options: pytest.fail("loaded"))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    report(tmp_path, "other", answered(4))
    for name, message in {
        "coco": "is a folder",
        "notes.json": "is no report",
        "other.json": "report of another task",
    }.items():
        assert command("MODEL", "--data", data(ROW), "--output", str(tmp_path / name)) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_boxes_are_found_as_by_the_published_pattern_and_in_no_time():
    published = re.compile(r"\[([^\n]*?),([^\n]*?),([^\n]*?),([^\n]*?)\]")
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("[],12 \na", k=rng.randint(4, 24)))
        found = published.search(text)
        try:
            numbers = [float(part.strip("[")) for part in found.groups()] if found else None
        except ValueError:
            numbers = None
        scale = 1000 if numbers and sum(numbers) >= 4 else 1
        expected = tuple(number / scale for number in numbers) if numbers else None
        assert box_in(text, 1, 1) == expected
    start = time.perf_counter()
    assert box_in("[" + "," * 3000, 1, 1) is None
    assert time.perf_counter() - start < 1


# ------------------------------------------------------------------------------------------------------------- outputs
@pytest.fixture
def unloaded(monkeypatch):
    from transformers import AutoModel

    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("task", ["zero_shot", "retrieval", "caption", "probe", "pointing"])
def test_a_generated_run_needs_an_output_before_its_model(task, tmp_path, capsys, unloaded):
    (tmp_path / "file").write_text("mine")
    for output, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "r.json", "cannot be written")):
        assert main([task, "MODEL", "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert main([task, "MODEL", "--output", str(tmp_path / "file")]) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    taken = report(tmp_path, "taken", answered(4))
    assert main([task, "MODEL", "--output", str(taken)]) == 2
    assert "is the report of another task, or none: name another" in capsys.readouterr().err


def test_an_earlier_report_of_the_task_may_be_there(tmp_path):
    path = report(tmp_path, "a", answered(4))
    check_report_place(path, "dialogue")
    (tmp_path / "figures.json").write_text('{"images": 3}')
    check_report_place(tmp_path / "figures.json", None)
    with pytest.raises(ValueError, match="report of another task"):
        check_report_place(path, "pointing")


def test_a_comparison_does_not_write_over_what_it_compares(tmp_path, capsys):
    a, b = report(tmp_path, "a", answered(20)), report(tmp_path, "b", answered(20))
    before = a.read_bytes()
    for name in ("a.json", "b.samples.jsonl"):
        assert compare(a, b, "--output", tmp_path / name) == 2
        assert "one of the reports, or its samples" in capsys.readouterr().err
    assert a.read_bytes() == before
    assert compare(a, b, "--output", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    assert compare(a, b, "--metric", "accuracy", "--metric", "accuracy") == 0
    assert "for 1 comparison(s)" in capsys.readouterr().out


def test_samples_lie_beside_their_report(tmp_path):
    path = report(tmp_path, "a", answered(4))
    content = read_report(path)
    for name in ("../a.samples.jsonl", "/nowhere/a.samples.jsonl"):
        write_report(path, {**content, "samples": name})
        assert len(read_results(path).samples) == 4


def test_captions_of_another_data_set_are_not_compared(tmp_path, capsys):
    samples = [{"id": str(number), "scores": {"R@1": 1.0}, "caption": "a"} for number in range(4)]
    a = report(tmp_path, "a", samples, "retrieval")
    b = report(tmp_path, "b", [{**sample, "caption": "b"} for sample in samples], "retrieval")
    assert compare(a, b) == 2
    assert "the caption differs" in capsys.readouterr().err


def test_a_page_does_not_write_over_its_report(tmp_path, capsys):
    path = report(tmp_path, "a", answered(4))
    before = path.read_bytes()
    for name in ("a.json", "a.samples.jsonl"):
        assert main(["page", str(path), "--output", str(tmp_path / name)]) == 2
        assert "is the report or its samples" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_texts_of_maps_are_texts(tmp_path, capsys, unloaded):
    (tmp_path / "a.png").write_bytes(png())
    for option, text, message in (("--match", " ", "`--match` is empty"), ("--text", "\ud800", "lone surrogate")):
        assert main(["look", "MODEL", str(tmp_path / "a.png"), option, text]) == 2
        assert message in capsys.readouterr().err


def test_maps_are_not_drawn_over_the_file_of_the_image(tmp_path, capsys, unloaded):
    (tmp_path / "a.png").write_bytes(png())
    words = ["look", "MODEL", str(tmp_path / "a.png"), "--output"]
    for output, message in ((tmp_path / "a.png", "is the image"), (tmp_path / "a.png" / "b.png", "cannot be written")):
        assert main([*words, str(output)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == png()


# ------------------------------------------------------------------------------------------------------ before a model
def test_images_are_whole_patches(root, tmp_path, capsys, unloaded):  # noqa: F811
    tiny.vision_model().save_pretrained(tmp_path / "vit")
    words = ["probe", str(tmp_path / "vit"), "--data", str(root), "--protocol", "probe-imagenet-1k"]
    assert main([*words, "--image-size", "57", "--output", str(tmp_path / "r.json")]) == 2
    assert "`--image-size` 57: the model reads whole patches of" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


# ----------------------------------------------------------------------------------------------------------- harnesses
def test_lines_of_a_harness_end_where_lines_of_json_end(tmp_path):
    row = {**SAMPLE, "filtered_resps": ["a\u2028b\x85c"]}
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n", encoding="utf-8")
    assert [sample["answer"] for sample in read_harness_samples(path)] == ["a\u2028b\x85c"]
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl is no UTF-8"):
        read_harness_samples(path)
    path.write_text("")
    assert read_harness_samples(path) == []


def test_results_of_mteb_with_odd_settings(tmp_path):
    content = {
        "scores": {"test": [{"hf_subset": 3, "ndcg_at_10": 0.5}]},
        "task_name": "mme",
        "mteb_version": "2",
    }
    path = written(tmp_path, content)
    assert [file.name for file in write_harness_reports(path, tmp_path / "out")] == ["mme-test-3.json"]
    twice = {**content, "scores": {"test": content["scores"]["test"] * 2}}
    with pytest.raises(ValueError, match=r"two results that would both be called mme-test-3\.json"):
        write_harness_reports(written(tmp_path, twice, "twice.json"), tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    (tmp_path / "model_meta.json").write_text(json.dumps({"experiment_kwargs": {"images": "many"}}))
    with pytest.raises(ValueError, match='settings: "images" has to be a whole number'):
        read_harness_results(path)
    assert "exact_match" in card(read_harness_results(written(tmp_path, LM_EVAL, "lm.json")))


def test_a_card_reads_what_is_there_before_it_measures(root, tmp_path, capsys, monkeypatch):  # noqa: F811
    from internvl.evaluation import commands

    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(commands, "_fits", lambda options, protocol: True)
    monkeypatch.setattr(commands, "_image_size", lambda *_: 56)
    (tmp_path / "bad.json").write_text("{")
    words = ["card", "MODEL", "--data", str(root), "--output", str(tmp_path / "out"), "--tasks", "probe"]
    assert main([*words, "--harness-results", str(tmp_path / "bad.json")]) == 2
    assert "bad.json is no JSON" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probe-imagenet-v2.json").write_text("{}")  # of the last protocol
    assert main(words) == 2
    assert "probe-imagenet-v2.json is no report" in capsys.readouterr().err
