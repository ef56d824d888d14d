"""Per-sample results on disk: they go on after a kill, and belong to their settings."""

import json

import pytest

from internvl.evaluation.harness_results import read_harness_results
from internvl.evaluation.reports import metrics_of, read_report, write_report
from internvl.evaluation.samples import SampleLog, read_samples, values_by_metric


SETTINGS = {"model": "here", "batch_size": 4}


def sample(number: int, **more) -> dict:
    return {"id": f"image {number}", "scores": {"top-1": number % 2}, **more}


@pytest.fixture
def log_file(tmp_path):
    path = tmp_path / "deep" / "run.samples.jsonl"
    with SampleLog(path, SETTINGS) as log:
        for number in range(5):
            log.add(sample(number))
    return path


def test_what_was_written_is_read(log_file):
    settings, samples = read_samples(log_file)
    assert settings == SETTINGS
    assert samples == [sample(number) for number in range(5)]


@pytest.mark.parametrize("torn", [1, 7, 30])
def test_a_log_torn_by_a_kill_goes_on_and_ends_the_same(log_file, torn):
    whole = log_file.read_bytes()
    log_file.write_bytes(whole[:-torn])
    with SampleLog(log_file, SETTINGS) as log:
        assert list(log.done) == [f"image {number}" for number in range(4)]
        left = [place for place, _ in log.left(f"image {number}" for number in range(5))]
        assert left == [4]
        log.add(sample(4))
    assert log_file.read_bytes() == whole


def test_a_kill_within_the_first_line_begins_anew(log_file):
    log_file.write_bytes(b'{"sett')
    with SampleLog(log_file, SETTINGS) as log:
        assert not log.done
        log.add(sample(0))
    assert read_samples(log_file) == (SETTINGS, [sample(0)])


def test_half_a_character_that_a_model_wrote_is_kept(tmp_path):
    odd = sample(0, answer="half \ud83d")
    with SampleLog(tmp_path / "log.jsonl", SETTINGS) as log:
        log.add(odd)
        log.add(sample(1, answer="whole 😀"))
    assert read_samples(tmp_path / "log.jsonl")[1] == [odd, sample(1, answer="whole 😀")]


def test_results_of_other_settings_are_refused_by_name(log_file):
    before = log_file.read_bytes()
    with pytest.raises(ValueError, match=r"batch_size 4, now 8"):
        SampleLog(log_file, {**SETTINGS, "batch_size": 8})
    assert log_file.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "JSON object"),
        ("{", "no JSON"),
        ('{"id": "a", "scores": {"top-1": "high"}}', "a number per metric"),
        ('{"id": "a", "scores": {"top-1": NaN}}', "a number per metric"),
        ('{"scores": {}}', '"id"'),
        ('{"id": "image 1", "scores": {}}', "twice"),
    ],
)
def test_lines_of_another_kind_are_refused_with_their_number(log_file, line, message):
    log_file.write_text(log_file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"line 7.*{message}"):
        read_samples(log_file)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="first line"):
        SampleLog(path, SETTINGS)


def test_a_sample_is_measured_once_and_with_finite_scores(tmp_path):
    with SampleLog(tmp_path / "log.jsonl", SETTINGS) as log:
        log.add(sample(0))
        with pytest.raises(ValueError, match="twice"):
            log.add(sample(0))
        with pytest.raises(ValueError, match="a number per metric"):
            log.add({"id": "b", "scores": {"cider": float("nan")}})


def test_scores_are_gathered_by_metric_with_their_clusters():
    samples = [sample(0, cluster="x"), {"id": "b", "scores": {"top-5": 1, "top-1": True}}]
    assert values_by_metric(samples) == {"top-1": ([0.0, 1.0], ["x", "b"]), "top-5": ([1.0], ["b"])}
    assert json.loads(json.dumps(samples)) == samples


def test_a_single_score_has_no_interval():
    (metric,) = metrics_of([{"id": "a", "scores": {"cider": 0.7}}]).values()
    assert metric == {"value": 0.7, "interval": None, "samples": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"top-1": 0.5}}, "no number called"),
        ({"metrics": {"top-1": {"value": "high"}}}, "no number called"),
        ({"metrics": {"top-1": {"value": 0.5, "interval": 3}}}, "no list of two numbers"),
        ({"metrics": {"top-1": {"value": 0.5, "interval": [0.1]}}}, "no list of two numbers"),
        ({"metrics": []}, "no report"),
        ({"settings": 3}, '"settings"'),
        ({"published": [1]}, '"published"'),
    ],
)
def test_reports_of_another_form_are_refused(tmp_path, change, message):
    report = {"task": "zero_shot", "model": "here", "settings": SETTINGS, "metrics": {}}
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    write_report(tmp_path / "report.json", {**report, **change})
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content",
    [
        {"results": {"task": 3}, "config": {}},
        {"results": {"task": {"acc,none": 1}}, "config": {}, "n-samples": 7},
        {"scores": {"test": 3}, "task_name": "a", "mteb_version": "2"},
        {"scores": {"test": [3]}, "task_name": "a", "mteb_version": "2"},
        {"metrics": {"acc1": 1}, "dataset": [], "pretrained": 3, "task": []},
    ],
)
def test_results_of_a_harness_with_parts_of_another_form_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another form"):
        read_harness_results(path)
