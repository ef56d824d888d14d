"""Comparisons of reports: verdicts, pairing by id, clusters, Holm over tasks, refusals, output."""

import argparse
import json
import random
import re
import subprocess
import sys

import pytest

from internvl.console import exit_status
from internvl.evaluation.compare import add_compare_arguments, run
from internvl.evaluation.reports import metrics_of, samples_file, write_report
from internvl.evaluation.samples import SampleLog
from internvl.evaluation.statistics import compare_scores


def answers(number: int, seed: int = 0, share: float = 0.8, per_image: int = 1, metric: str = "accuracy") -> list:
    rng = random.Random(seed)
    return [
        {"id": f"q{i}", "scores": {metric: int(rng.random() < share)}, "cluster": f"image {i // per_image}"}
        for i in range(number)
    ]


def changed(samples: list, gained: int, lost: int, metric: str = "accuracy") -> list:
    """The same with so many answers right that were wrong, and the other way round."""
    left, result = {0: gained, 1: lost}, []
    for sample in samples:
        score = sample["scores"][metric]
        is_changed = left[score] > 0
        left[score] -= is_changed
        result.append({**sample, "scores": {metric: 1 - score if is_changed else score}})
    assert set(left.values()) == {0}
    return result


def report(folder, name: str, samples: list, task: str = "dialogue", **extra):
    """A report with its samples; returns the path."""
    path = folder / f"{name}.json"
    with SampleLog(samples_file(path), {"task": task}) as log:
        for sample in samples:
            log.add(sample)
    content = {"task": task, "protocol": None, "model": name, "settings": {}, "metrics": metrics_of(samples)}
    content["metrics"] |= extra
    write_report(path, {**content, "samples": samples_file(path).name})
    return path


def compare(*arguments) -> int:
    parser = argparse.ArgumentParser()
    add_compare_arguments(parser)
    return exit_status(lambda: run(parser.parse_args([str(argument) for argument in arguments])))


def cells(capsys) -> list[list[str]]:
    lines = capsys.readouterr().out.splitlines()
    is_row = [line.startswith("| ") and not line.startswith("| task ") for line in lines]
    return [line.strip("| ").split(" | ") for line, is_wanted in zip(lines, is_row, strict=True) if is_wanted]


@pytest.mark.parametrize(
    ("number", "gained", "lost", "verdict"),
    [
        (2000, 5, 4, "equivalent within 2"),
        (2000, 0, 0, "equivalent within 2"),
        (2000, 2, 90, "worse"),
        (2000, 90, 2, "better"),
        (2000, 0, 12, "equivalent within 2 (yet worse)"),
        (60, 0, 0, "not decided"),
        (300, 8, 14, "not decided"),
    ],
)
def test_verdicts(number, gained, lost, verdict, tmp_path, capsys):
    samples = answers(number)
    a, b = report(tmp_path, "a", samples), report(tmp_path, "b", changed(samples, gained, lost))
    assert compare(a, b, "--margin", 2) == 0
    (row,) = cells(capsys)
    assert row[-1] == verdict
    assert row[4] == f"{100 * (gained - lost) / number:+.2f}"


def test_without_a_margin_nothing_is_called_equivalent(tmp_path, capsys):
    samples = answers(2000)
    assert compare(report(tmp_path, "a", samples), report(tmp_path, "b", samples)) == 0
    assert cells(capsys)[0][-1] == "not decided"


def test_samples_are_paired_by_id_in_any_order(tmp_path, capsys):
    samples = answers(400)
    other = changed(samples, 3, 20)
    a, b = report(tmp_path, "a", samples), report(tmp_path, "b", other)
    shuffled = report(tmp_path, "shuffled", random.Random(0).sample(other, len(other)))
    assert compare(a, b) == compare(a, shuffled) == 0
    first, second = cells(capsys)
    assert first == second


def test_clusters_widen_the_interval(tmp_path, capsys):
    """Ten questions about each image, all of which change together."""
    alone = [*answers(500)]
    together = [{**sample, "cluster": f"image {i // 10}"} for i, sample in enumerate(alone)]
    for name, samples in (("alone", alone), ("together", together)):
        other = [{**s, "scores": {"accuracy": 1}} if i < 100 else s for i, s in enumerate(samples)]
        report(tmp_path, name, samples)
        report(tmp_path, f"{name} b", other)
        assert compare(tmp_path / f"{name}.json", tmp_path / f"{name} b.json", "--output", tmp_path / name) == 0
    found = [
        json.loads((tmp_path / name).read_text())["pairs"][0]["metrics"]["accuracy"] for name in ("alone", "together")
    ]
    assert [one["clusters"] for one in found] == [500, 50]
    assert found[0]["difference"] == found[1]["difference"]
    widths = [one["interval"][1] - one["interval"][0] for one in found]
    assert widths[1] > 1.2 * widths[0]


def test_several_tasks_share_one_error_rate(tmp_path, capsys):
    """A p of 0.03 alone says "worse"; among four tasks it does not."""
    samples = answers(1000)
    other = changed(samples, 4, 14)
    expected = compare_scores(*([sample["scores"]["accuracy"] for sample in of] for of in (samples, other))).p_value
    assert 0.02 < expected < 0.04
    pairs = []
    for task in ("one", "two", "three", "four"):
        pairs += [report(tmp_path, f"{task} a", samples, task), report(tmp_path, f"{task} b", other, task)]
    assert compare(*pairs[:2]) == 0
    assert compare(*pairs, "--output", tmp_path / "out.json") == 0
    assert [row[-1] for row in cells(capsys)] == ["worse"] + ["not decided"] * 4
    found = json.loads((tmp_path / "out.json").read_text())["pairs"]
    assert [pair["task"] for pair in found] == ["one", "two", "three", "four"]
    for pair in found:
        assert pair["metrics"]["accuracy"]["p_value"] == pytest.approx(expected)
        assert pair["metrics"]["accuracy"]["p_holm"] == pytest.approx(4 * expected)


def test_parts_of_a_metric_take_nothing_from_the_whole(tmp_path, capsys):
    """A p of 0.03 for all questions stays, with four parts beside it, and the parts are adjusted for four."""
    samples = answers(1000)
    paths = []
    for name, rows in (("a", samples), ("b", changed(samples, 4, 14))):
        for index, row in enumerate(rows):
            row["scores"][f"accuracy/{'abcd'[index % 4]}"] = row["scores"]["accuracy"]
        paths.append(report(tmp_path, name, rows))
    assert compare(*paths, "--output", tmp_path / "out.json") == 0
    assert cells(capsys)[0][-1] == "worse"
    found = json.loads((tmp_path / "out.json").read_text())["pairs"][0]["metrics"]
    assert found["accuracy"]["p_holm"] == found["accuracy"]["p_value"]
    parts = [metric for name, metric in found.items() if "/" in name]
    assert min(part["p_holm"] for part in parts) == min(1, 4 * min(part["p_value"] for part in parts))


def test_chosen_metrics_alone_are_compared_and_what_has_no_samples_is_named(tmp_path, capsys):
    samples = answers(100)
    for sample in samples:
        sample["scores"]["overlap"] = sample["scores"]["accuracy"] / 2
    paths = [report(tmp_path, name, samples, mIoU={"value": 0.5}) for name in "ab"]
    assert compare(*paths) == 0
    said = capsys.readouterr().out
    assert "left out, as single samples do not have them: mIoU" in said
    assert compare(*paths, "--metric", "overlap") == 0
    assert [row[1] for row in cells(capsys)] == ["overlap"]
    assert compare(*paths, "--metric", "bleu") == 2
    assert "have no 'bleu', but accuracy, overlap" in capsys.readouterr().err


def test_files_of_samples_alone_are_compared_too(tmp_path, capsys):
    samples = answers(200)
    paths = [samples_file(report(tmp_path, name, samples)) for name in "ab"]
    assert compare(*paths) == 0
    assert cells(capsys)[0][0] == "dialogue"


def refused(capsys, *arguments) -> str:
    assert compare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_results_of_other_samples_are_refused(tmp_path, capsys):
    samples = answers(50)
    a = report(tmp_path, "a", samples)
    fewer = report(tmp_path, "fewer", samples[:-2])
    assert "2 only in the first (such as 'q48')" in refused(capsys, a, fewer)
    assert "2 only in the second" in refused(capsys, fewer, a)
    asked = [{**sample, "expected": "red"} for sample in samples]
    a2 = report(tmp_path, "a2", asked)
    b2 = report(tmp_path, "b2", [*asked[:-1], {**asked[-1], "expected": "blue"}])
    assert "of 'q49' the expected differs" in refused(capsys, a2, b2)
    assert "of different tasks, dialogue and caption" in refused(capsys, a, report(tmp_path, "c", samples, "caption"))
    other = report(tmp_path, "other", answers(50, metric="cider"))
    assert "no metric in common: accuracy; cider" in refused(capsys, a, other)
    part = [{**sample, "scores": {**sample["scores"], "x": 1}} for sample in samples]
    x, y = report(tmp_path, "x", part), report(tmp_path, "y", [*part[:-1], samples[-1]])
    assert "have 'x' of different samples" in refused(capsys, x, y)


def test_bad_arguments_and_files_are_one_line(tmp_path, capsys):
    a = report(tmp_path, "a", answers(20))
    assert "in pairs, A.json B.json, got 3" in refused(capsys, a, a, a)
    assert "`--margin` must be above 0, got -1" in refused(capsys, a, a, "--margin", -1)
    assert "`--margin` must be above 0, got nan" in refused(capsys, a, a, "--margin", "nan")
    assert "missing.json" in refused(capsys, a, tmp_path / "missing.json")
    content = json.loads(a.read_text())
    (tmp_path / "bare.json").write_text(json.dumps({**content, "samples": None}))
    assert "names no results of its samples" in refused(capsys, a, tmp_path / "bare.json")
    (tmp_path / "empty.samples.jsonl").write_text("")
    (tmp_path / "empty.json").write_text(json.dumps({**content, "samples": "empty.samples.jsonl"}))
    assert "has no samples to compare" in refused(capsys, a, tmp_path / "empty.json")


def test_names_of_others_cannot_break_the_table(tmp_path, capsys):
    samples = answers(30, metric="a | b\x1b[2J")
    paths = [report(tmp_path, name, samples) for name in "ab"]
    assert compare(*paths) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "a \\| b\\x1b" in said


def test_the_command_compares_without_loading_torch(tmp_path):
    samples = answers(50)
    paths = [str(report(tmp_path, name, samples)) for name in "ab"]
    command = [sys.executable, "-X", "importtime", "-m", "internvl.evaluation", "compare", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("| task |")
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert {"argparse", "numpy", "scipy"} <= imported
    assert not imported & {"torch", "transformers"}
