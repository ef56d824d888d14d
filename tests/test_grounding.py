"""Grounding: boxes of answers as the published evaluation reads them, RefCOCO's files, the command."""

import argparse
import json
import random
import re

import pytest
import torch
from PIL import Image

from internvl.console import exit_status
from internvl.evaluation import dialogue, grounding
from internvl.evaluation.grounding import PROMPT, add_grounding_arguments, read_expressions, run
from internvl.evaluation.metrics import box_in, box_overlap
from internvl.evaluation.reports import read_report
from internvl.evaluation.samples import read_samples


# --------------------------------------------------------------------------------------------------------------- boxes
def published_overlap(answer: str, size: tuple[int, int], box: list[float]) -> float:
    """What the published evaluation of RefCOCO counts, in torch, with its way of finding the numbers."""
    found = re.findall(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*", answer)
    try:
        numbers = [float(part) for part in found[0]]
    except (IndexError, ValueError):
        numbers = [0.0] * 4
    one, other = torch.tensor(numbers, dtype=torch.float64), torch.tensor(box, dtype=torch.float64)
    if one.sum() >= 4:
        one = one / 1000
    one = one * torch.tensor([*size, *size])
    sides = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0)
    shared = sides.prod()
    areas = [(corners[2:] - corners[:2]).prod() for corners in (one, other)]
    return float(shared / (sum(areas) - shared))


def random_answer(rng: random.Random) -> str:
    numbers = [rng.choice((rng.randint(0, 1000), round(rng.random(), 2))) for _ in range(4)]
    if rng.random() < 0.7:
        numbers = [rng.randint(*span) for span in ((0, 200), (0, 200), (700, 1000), (700, 1000))]
    text = rng.choice((", ", ",", " , ")).join(str(number) for number in numbers)
    return rng.choice(("<ref>it</ref><box>[[{}]]</box>", "[{}]", "{}", "at [[{}], [1, 2, 3, 4]]", "[no] [{}]")).format(
        text
    )


HOSTILE = (
    "", "[", "[]", "[[]]", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[a, b, c, d]", "[nan, 0, 500, 500]", "[inf, 0, 1, 1]",
    "[[100, 100, 500, 500]", "[100, 100, 500, 500]]]]", "[500, 500, 100, 100]", "[0, 500, 500, 100]", "[0, 0, 0, 0]",
    "[1, 1, 1, 1]", "[.1, .1, .5, .5]", "[-100, -100, 900, 900]", "[1e2, 1_0, 500, 900]", "[ [1, 2, 300, 400]]",
    "[1, 2,\n300, 400]", "[the one, on the left, that is] [10, 10, 900, 900]", "\uff11[\uff11\uff10, 10, 900, 900]",
)  # fmt: skip


def test_boxes_are_read_and_compared_as_in_the_published_evaluation():
    rng = random.Random(0)
    answers = [*HOSTILE, *(random_answer(rng) for _ in range(400))]
    overlaps = []
    for answer in answers:
        size, x, y = (rng.randint(50, 900), rng.randint(50, 900)), rng.randint(0, 30), rng.randint(0, 30)
        box = [x, y, x + rng.randint(size[0] // 3, size[0]), y + rng.randint(size[1] // 2, size[1])]
        overlaps.append(box_overlap(box_in(answer, *size), box))
        expected = published_overlap(answer, size, box)
        assert (overlaps[-1] >= 0.5) == (expected >= 0.5), answer
        assert overlaps[-1] == pytest.approx(expected if expected == expected and expected > 0 else 0), answer
    assert 30 < sum(overlap >= 0.5 for overlap in overlaps) < 200  # so that both were compared


def test_a_box_in_thousandths_becomes_pixels():
    assert box_in("<ref>a cat</ref><box>[[100, 250, 500, 1000]]</box>", 640, 480) == pytest.approx((64, 120, 320, 480))
    assert box_overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_overlap((0, 0, 1, 2), (0, 0, 2, 2)) == 0.5


# --------------------------------------------------------------------------------------------------------------- files
ROW = {"image": "coco/a.png", "sent": "the red circle", "bbox": [10, 20, 60, 80], "width": 100, "height": 200}


@pytest.fixture
def data(tmp_path):
    """Writes rows, and the image that they name."""
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (100, 200)).save(tmp_path / "coco" / "a.png")

    def write(*rows) -> str:
        path = tmp_path / "val.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


def test_rows_are_read_with_the_size_of_the_row_or_of_the_file(data):
    sizeless = {key: value for key, value in ROW.items() if key not in ("width", "height")}
    first, second = read_expressions(data({**ROW, "width": 50, "height": 60}, sizeless))
    assert (first.size, second.size) == ((50, 60), (100, 200))
    assert (first.name, second.name) == ("coco/a.png#1", "coco/a.png#2")
    assert first.text == "the red circle"


BAD = {
    "no JSON": ("{", "line 2: "),
    "no object": ("[1]", "line 2: "),
    "no text": ({**ROW, "sent": " "}, 'line 2: a row needs "sent"'),
    "no image": ({**ROW, "image": None}, 'line 2: a row needs "image"'),
    "missing image": ({**ROW, "image": "coco/b.png"}, "line 2: The image `coco/b.png` is missing"),
    "image outside": ({**ROW, "image": "../../a.png"}, "line 2: .* lies outside"),
    "three numbers": ({**ROW, "bbox": [1, 2, 3]}, 'line 2: "bbox" has to be four numbers'),
    "no number": ({**ROW, "bbox": [1, 2, 3, "4"]}, 'line 2: "bbox" has to be four numbers'),
    "inside out": ({**ROW, "bbox": [60, 20, 10, 80]}, "line 2: .*x1 < x2"),
    "no width": ({**ROW, "width": 0}, 'line 2: "width" and "height" have to be above 0'),
    "half a size": ({**ROW, "width": None}, 'line 2: "width" and "height" have to be numbers'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_line_before_a_model_is_loaded(case, data, capsys, monkeypatch):
    row, message = BAD[case]
    monkeypatch.setattr(grounding, "_load_chat", None)
    assert command("MODEL", "--data", data(ROW, row)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_grounding_arguments(parser)
    return exit_status(lambda: run(parser.parse_args(arguments)))


# ------------------------------------------------------------------------------------------------------------- command
@pytest.fixture
def answers(monkeypatch):
    """A model that has learnt the answers to what `data` may ask; what it was asked."""
    asked = []
    known = {"hit": "<box>[[100, 100, 600, 400]]</box>", "half": "[[100, 100, 600, 250]]", "miss": "I do not know."}

    def answer(model, processor, items, batch_size, max_new_tokens, **settings):
        asked.extend((text, image.size, max_new_tokens, settings) for image, text in items)
        return [known[text.rsplit("<ref>", 1)[1].removesuffix("</ref>")] for _, text in items]

    monkeypatch.setattr(dialogue, "answer_questions", answer)
    monkeypatch.setattr(grounding, "_load_chat", lambda options: (None, None))
    monkeypatch.setattr("internvl.kinds.check_kind", lambda *arguments, **settings: None)
    return asked


def test_the_command_counts_boxes_and_keeps_every_answer(data, answers, tmp_path, capsys):
    rows = [{**ROW, "sent": text, "bbox": [10, 20, 60, 80]} for text in ("hit", "half", "miss", "hit")]
    out = tmp_path / "report.json"
    arguments = ("MODEL", "--data", data(*rows), "--output", str(out), "--max-num", "1", "--batch-size", "3")
    assert command(*arguments) == 0
    report = read_report(out)
    assert json.loads(capsys.readouterr().out) == report
    assert report["metrics"]["accuracy@0.5"]["value"] == 0.75
    assert report["metrics"]["IoU"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    _, samples = read_samples(tmp_path / report["samples"])
    assert [sample["scores"]["accuracy@0.5"] for sample in samples] == [1, 1, 0, 1]
    assert {sample["cluster"] for sample in samples} == {"coco/a.png"}
    assert answers[0] == (PROMPT.format("hit"), (100, 200), 100, {"max_num": 1})
    assert len(answers) == 4
    assert command(*arguments) == 0  # all is there
    assert len(answers) == 4


def test_a_limit_spreads_over_the_file(data, answers, tmp_path):
    rows = [{**ROW, "sent": text} for text in ("hit", "miss", "miss", "hit", "miss", "miss")]
    out = tmp_path / "report.json"
    assert command("MODEL", "--data", data(*rows), "--output", str(out), "--limit", "2") == 0
    assert [text for text, *_ in answers] == [PROMPT.format("hit")] * 2
    assert read_report(out)["metrics"]["IoU"]["samples"] == 2


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--max-num"])
def test_numbers_have_to_be_above_0(option, data, capsys):
    assert command("MODEL", "--data", data(ROW), option, "0") == 2
    assert f"`{option}` must be above 0, got 0" in capsys.readouterr().err


def test_the_bundled_chat_model_is_measured(data, tmp_path):
    """It never saw a box, so it has none right."""
    out = tmp_path / "report.json"
    assert command(str(dialogue.__file__).rsplit("/", 2)[0], "--data", data(ROW, ROW), "--output", str(out)) == 0
    report = read_report(out)
    assert report["metrics"]["accuracy@0.5"]["samples"] == 2
    _, samples = read_samples(tmp_path / report["samples"])
    assert all(isinstance(sample["answer"], str) for sample in samples)


def test_other_models_are_refused_before_the_data_are_asked(data, capsys):
    folder = f"{str(dialogue.__file__).rsplit('/', 2)[0]}/internvl_g"
    assert command(folder, "--data", data(ROW)) == 2
    assert "the task grounding needs an InternVL-Chat model" in capsys.readouterr().err
