"""Dialogue evaluation: the questions are held out and balanced, and right answers are counted right."""

from collections import Counter

import pytest

from internvl.evaluation.checkpoints import checkpoint_state
from internvl.evaluation.dialogue import evaluate_dialogue, report_dialogue
from internvl.evaluation.generated import EVERYWHERE, LAYOUTS_OF_KIND, SMALL_TEXT, held_out_questions
from internvl.evaluation.metrics import accuracy_by_kind, is_correct
from internvl.evaluation.reports import read_report, samples_file
from internvl.evaluation.samples import read_samples
from internvl.synthetic.scenes import LAYOUTS, QUESTION_KINDS, Question


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("Red", "red", True), (" top left \n", "top left", True), ("top", "top left", False), ("", "0", False)],
)
def test_answers_must_match_exactly_apart_from_case_and_blanks(answer, expected, right):
    assert is_correct(answer, expected) is right


@pytest.fixture(scope="module")
def questions():
    """Four of each kind."""
    return held_out_questions(4 * len(QUESTION_KINDS))


def test_held_out_questions_are_balanced_over_kinds_and_reproducible(questions):
    first, second = questions[:21], held_out_questions(21)
    assert Counter(item.question.kind for item in first) == dict.fromkeys(QUESTION_KINDS, 3)
    assert [item.question for item in first] == [item.question for item in second]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, second, strict=True))
    assert [item.question for item in held_out_questions(7, seed=1)] != [item.question for item in first[:7]]


def test_every_kind_is_asked_in_each_of_its_layouts(questions):
    seen = {(item.question.kind, item.layout) for item in questions}
    for kind in QUESTION_KINDS:
        assert {layout for asked, layout in seen if asked == kind} == set(LAYOUTS_OF_KIND.get(kind, EVERYWHERE))


def test_small_text_is_asked_about_large_images_only(questions):
    for item in questions:
        if item.question.kind == SMALL_TEXT:
            assert item.image.size in LAYOUTS["many_tiles"].sizes


def test_accuracy_is_counted_per_kind_with_the_share_of_the_most_common_answer():
    questions = [Question("count", "?", answer) for answer in ("0", "0", "0", "2")] + [Question("digit", "?", "7")]
    report = accuracy_by_kind(questions, ["0", "1", "0", "2", "1"])
    assert report == {
        "count": {"asked": 4, "right": 3, "accuracy": 0.75, "most_common_answer": 0.75},
        "digit": {"asked": 1, "right": 0, "accuracy": 0.0, "most_common_answer": 1.0},
    }


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        accuracy_by_kind([Question("count", "?", "0")], [])


def test_the_report_asks_small_text_again_with_one_tile(questions, monkeypatch):
    right_answers = {(item.image.tobytes(), item.question.text): item.question.answer for item in questions[:14]}

    def answer(model, processor, items, batch_size, **settings):
        if settings == {"max_num": 1}:
            return ["unreadable"] * len(items)
        assert not settings
        return [right_answers[image.tobytes(), text] for image, text in items]

    monkeypatch.setattr("internvl.evaluation.dialogue.answer_questions", answer)
    report = evaluate_dialogue(None, None, questions=14)
    assert report["questions"] == 14
    assert report["accuracy"] == 1.0
    assert set(report["by_kind"]) == set(QUESTION_KINDS)
    assert report["by_kind"][SMALL_TEXT]["right"] == 2
    assert report["small_text_one_tile"]["asked"] == 2
    assert report["small_text_one_tile"]["right"] == 0


@pytest.fixture
def answering(monkeypatch):
    """A model that answers "0"; the numbers of questions of its batches."""
    batches = []

    def answer(model, processor, items, batch_size, **settings):
        if model == "stopped" and len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(items))
        return ["0"] * len(items)

    monkeypatch.setattr("internvl.evaluation.dialogue.answer_questions", answer)
    return batches


def test_a_report_keeps_every_answer_and_a_stopped_run_goes_on(answering, tmp_path):
    report = report_dialogue("model", None, tmp_path / "whole.json", "name", questions=14, batch_size=3)
    assert read_report(tmp_path / "whole.json") == report
    _, samples = read_samples(samples_file(tmp_path / "whole.json"))
    assert len(samples) == 14 + 2  # those about small text twice
    right = sum(sample["scores"].get("accuracy", 0) for sample in samples)
    assert 0 < right < 14
    assert report["metrics"]["accuracy"]["value"] == report["accuracy"] == right / 14
    assert report["metrics"]["accuracy/count"]["samples"] == 2
    assert report["metrics"]["one_tile"]["samples"] == 2
    first = next(sample for sample in samples if sample["id"].endswith("/one_tile"))
    assert first["cluster"] in {sample["id"] for sample in samples}

    answering.clear()
    part = tmp_path / "part.json"
    with pytest.raises(KeyboardInterrupt):
        report_dialogue("stopped", None, part, "name", questions=14, batch_size=3)
    asked = sum(answering)
    assert not part.exists()
    assert report_dialogue("model", None, part, "name", questions=14, batch_size=3)["metrics"] == report["metrics"]
    assert sum(answering) == 16
    assert asked == 6


def test_more_questions_can_be_asked_later_but_not_fewer_and_not_with_other_weights(answering, tmp_path):
    path = tmp_path / "report.json"
    report_dialogue("model", None, path, "name", "weights", questions=7)
    assert (
        report_dialogue("model", None, path, "name", "weights", questions=14)["metrics"]["accuracy"]["samples"] == 14
    )
    assert sum(answering) == 16
    with pytest.raises(ValueError, match="answers to more than 7 questions"):
        report_dialogue("model", None, path, "name", "weights", questions=7)
    with pytest.raises(ValueError, match=r"other settings .*state"):
        report_dialogue("model", None, path, "name", "other weights", questions=14)


def test_the_state_of_a_checkpoint_changes_with_its_files(tmp_path):
    assert checkpoint_state("user/name") is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"1")
    before = checkpoint_state(tmp_path, "model")
    (tmp_path / "model" / "answers.json").write_text("[]")
    assert checkpoint_state(tmp_path, "model") == before
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12")
    assert checkpoint_state(tmp_path, "model") != before
