"""The results page: every stage is evaluated, tables and figures hold what was measured."""

import json
import shutil
from functools import partial

import pytest
from matplotlib.container import BarContainer
from PIL import Image

from internvl.evaluation import captioning, generated
from internvl.modeling_internvl import MODES
from internvl.reproduction import ablation, run
from internvl.reproduction import report as results
from internvl.reproduction.__main__ import main as reproduce
from internvl.reproduction.plots import (
    mean_and_deviation,
    plot_ablation,
    plot_all,
    plot_stage1,
    plot_stage2,
    plot_stage3,
    series,
)
from internvl.reproduction.report import Sizes, evaluate_run, mean_recalls, tables
from internvl.synthetic import captions


TINY = Sizes(probe_images=8, images=3, pairs=4, captions=2, questions=7)


def dialogue(share: float) -> dict:
    kinds = {kind: {"accuracy": share, "most_common_answer": 0.2} for kind in ("colour", "count")}
    return {"questions": 20, "accuracy": share, "by_kind": kinds, "recall_at_1": dict.fromkeys(MODES, share)}


ABLATION = {
    "all stages": {"0": dialogue(0.9), "1": dialogue(0.7)},
    "without stage 1": {"0": dialogue(0.5), "1": dialogue(0.5)},
}


@pytest.fixture(scope="module")
def page(finished_default_run, tmp_path_factory):
    """The folder of results of a tiny run."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "ablation.json").write_text(json.dumps(ABLATION))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            captioning, "generate_captions", partial(captioning.generate_captions, max_new_tokens=3)
        )  # it has learned no end
        patch.setattr(generated, "prompts", lambda *which: captions.prompts(*which)[:1])
        evaluate_run(finished_default_run, folder, TINY, ablation=folder / "ablation.json")
    return folder


def test_every_stage_is_evaluated(page):
    report = json.loads((page / "results.json").read_text(encoding="utf-8"))
    assert {name: set(stages) for name, stages in report.items() if name != "ablation"} == {
        "linear_probe": {"stage1", "full", "simple"},
        "zero_shot": {"stage1", "stage2"},
        "retrieval": {"stage1", "stage2"},
        "captioning": {"stage2"},
        "dialogue": {"full", "simple"},
    }
    assert set(report["retrieval"]["stage2"]["recall"]) == {"InternVL-C", "InternVL-G"}
    assert report["dialogue"]["full"]["one_tile"]["questions"] == 7
    assert report["ablation"] == ABLATION


def test_recalls_of_the_ablation_are_means_of_all_languages_and_both_ways(page, finished_default_run):
    recall = json.loads((page / "results.json").read_text(encoding="utf-8"))["retrieval"]["stage2"]["recall"]
    found = mean_recalls(finished_default_run / "stage2", TINY.pairs)
    assert set(found) == set(MODES) == set(recall)
    for mode, languages in recall.items():
        values = [ways[way]["R@1"] for ways in languages.values() for way in ("image_to_text", "text_to_image")]
        assert found[mode] == pytest.approx(sum(values) / len(values))


def test_every_figure_has_something_on_it(page):
    for name in ("stage1", "stage2", "stage3", "dialogue", "ablation"):
        with Image.open(page / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_tables_hold_what_was_measured(page):
    report = json.loads((page / "results.json").read_text(encoding="utf-8"))
    report["zero_shot"]["stage2"]["accuracy"]["InternVL-G"]["ja"]["digit"] = 0.4321
    text = "\n".join(tables(report))
    assert "| InternVL-G, stage2 | ja | 43.2 % |" in text
    assert text.count("**") == 2 * 6
    assert "| all stages | 80.0 \u00b1 14.1 % |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6 * 2 + 4 + (1 + 3 * 6) + 3 * 6 + 5 + 5 + 2


def test_the_tables_of_the_bundled_results_are_those_of_the_page(root):
    folder = root / "reproduction" / "results"
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "\n".join(tables(report)) + "\n" == (folder / "results.md").read_text(encoding="utf-8")


def test_the_bundled_logs_hold_every_curve(root):
    logs = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (root / "reproduction/logs").glob("*.json")
    }
    losses, zero_shot = plot_stage1(logs["stage1"]).axes
    assert [len(axes.lines) for axes in (losses, zero_shot)] == [1 + 2, 3 + 2 + 1]  # and a line for each later phase
    losses, recall = plot_stage2(logs["stage2"]).axes
    assert [len(axes.lines) for axes in (losses, recall)] == [4 + 1, 2 + 1]
    drawn = [*zero_shot.lines[:3], *losses.lines[:4], *recall.lines[:2]]
    drawn += [
        line for axes in plot_stage3({name: logs[name] for name in ("full", "simple")}).axes for line in axes.lines
    ]
    assert len(drawn) == 3 + 4 + 2 + 4
    assert all(len(line.get_xdata()) > 10 for line in drawn)


def test_what_is_done_is_kept_on_resume_and_measured_again_otherwise(
    page, finished_default_run, tmp_path, monkeypatch
):
    shutil.copytree(page, tmp_path / "page")
    measured = []
    monkeypatch.setattr(
        results, "_evaluate", lambda name, folder, sizes: measured.append((name, folder.name)) or {"new": True}
    )
    monkeypatch.setattr(results, "plot_all", lambda *args: [])
    parts = tmp_path / "page" / "parts"
    (parts / "captioning_stage2.json").unlink()
    old = parts / "zero_shot_stage1.json"  # as version 1.0 wrote it
    old.write_text(old.read_text().replace('"images"', '"pictures"'))
    monkeypatch.setattr(results, "tables", lambda report: [])
    report = evaluate_run(finished_default_run, tmp_path / "page", TINY, resume=True)
    assert measured == [("captioning", "stage2")]
    assert report["captioning"]["stage2"] == {"new": True}
    assert report["zero_shot"]["stage1"]["images"] == TINY.images
    evaluate_run(finished_default_run, tmp_path / "page", TINY)
    assert len(measured) == 1 + sum(len(evaluation.stages) for evaluation in results.EVALUATIONS.values())


def test_a_run_of_stage_1_alone_has_a_page_of_its_own(tmp_path):
    (tmp_path / "stage1").mkdir()
    log = {"recipe": {}, "small": [{"step": 50, "loss": 2.0}, {"step": 60, "zero_shot_digit": 0.5}]}
    (tmp_path / "stage1" / "training_log.json").write_text(json.dumps(log))
    assert evaluate_run(tmp_path, tmp_path / "page", TINY) == {}
    assert [path.name for path in plot_all({}, tmp_path, tmp_path / "page")] == ["stage1.png"]


def test_the_command_line_reaches_every_command(tmp_path, monkeypatch, capsys):
    assert reproduce(["report", str(tmp_path), "--output", str(tmp_path / "page")]) == 0
    assert json.loads((tmp_path / "page" / "results.json").read_text()) == {}
    calls = []
    for module, name in ((run, "train_all_stages"), (run, "evaluate_run"), (run, "assemble"), (ablation, "ablate")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **how: calls.append((name, args, how)))
    assert reproduce(["run", "--output", str(tmp_path), "--seed", "3", "--fp32", "--resume"]) == 0
    assert [name for name, _, _ in calls] == ["train_all_stages", "evaluate_run", "assemble"]
    recipes, folder, resume = calls[0][1]
    assert (recipes.stage1.seed, recipes.stage1.use_bf16, folder, resume) == (3, False, tmp_path, True)
    assert reproduce(["ablation", "--output", str(tmp_path), "--seed", "2", "--scale", "0.5", "--seeds", "4"]) == 0
    make_run, folder, *sizes = calls[-1][1]
    assert (folder, sizes) == (tmp_path, [4, 500, 500, False])
    assert make_run(1).stage2.seed == 3
    assert make_run(0).stage1.phases[0].steps == round(0.5 * run.bundled_run().stage1.phases[0].steps)
    monkeypatch.undo()
    assert reproduce(["ablation", "--output", str(tmp_path)]) == 2
    assert "error: `output` must be an empty folder" in capsys.readouterr().err


def test_a_curve_goes_on_over_the_phases():
    log = {
        "recipe": {"steps": 3},
        "first": [{"step": 50, "loss": 2.0}, {"step": 60, "train_runtime": 1.0}],
        "second": [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5}],
    }
    assert series(log, "loss") == ([50, 70, 80], [2.0, 1.0, 0.5])
    assert series(log, "loss", ("second",)) == ([10, 20], [1.0, 0.5])
    (axes, _) = plot_stage1(log).axes
    assert axes.lines[0].get_xydata().tolist() == [[50, 2.0], [70, 1.0], [80, 0.5]]


def test_error_bars_are_standard_deviations_over_seeds():
    assert mean_and_deviation([0.9, 0.7]) == pytest.approx((0.8, 0.1414), abs=1e-4)
    assert mean_and_deviation([0.5]) == (0.5, 0.0)
    (axes,) = plot_ablation(ABLATION).axes
    varied, constant = [container for container in axes.containers if isinstance(container, BarContainer)]
    assert [bar.get_height() for bar in varied] == pytest.approx([0.8] * 5)
    assert constant.errorbar is None
    (lines,) = varied.errorbar.lines[2]
    assert [ends[:, 1].tolist() for ends in lines.get_segments()] == [pytest.approx([0.6586, 0.9414], abs=1e-4)] * 5
