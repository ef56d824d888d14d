"""`python -m internvl.benchmarks gpu` with its stand-ins: every row runs, in its time box, and says what it lacks.

No time is checked here: figures of a tiny run mean nothing.
"""

import dataclasses
import json
import math
import subprocess
import time
from functools import partial

import pytest
import torch

from internvl.benchmarks import harness
from internvl.benchmarks.gpu import command, correctness, jobs, language, models, vision
from internvl.benchmarks.gpu.jobs import Measurement, Need, OutOfTimeError, Setting, rows_of_part, time_box
from internvl.benchmarks.gpu.sizes import STAND_IN, ModelSizes
from internvl.benchmarks.harness import Options, Row

from . import tiny


SETTING = Setting(Options("cpu", rounds=2), STAND_IN)


@pytest.fixture
def uncompiled(monkeypatch):
    """Generating code takes long: compiled blocks stay as they are."""
    monkeypatch.setitem(harness.PRODUCT_SIZES, "cpu", 64)
    for module in (correctness, language, vision):
        monkeypatch.setattr(module, "compile_blocks", lambda model: model)


def run(part: jobs.Part, setting: Setting = SETTING, seconds: float = 500.0) -> list[Row]:
    return list(rows_of_part("part", part, setting, time.monotonic() + seconds))


@pytest.mark.parametrize("name", [name for name in command.PARTS if name != "goldens"])
def test_every_row_of_a_part_is_measured_or_names_what_is_missing(name, uncompiled):
    rows = run(command.PARTS[name])
    assert rows
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        json.dumps(dataclasses.asdict(row))
        if row.skipped:
            assert row.skipped.endswith(" missing"), row
            assert any(word in row.skipped for word in ("CUDA", "fp8")), row
        else:
            assert math.isfinite(row.ratio)


@pytest.mark.parametrize("name", ["tower", "qllama", "chat"])
def test_implementations_agree_and_a_wrong_one_is_seen(name, uncompiled, monkeypatch):
    assert all(row.is_met for row in run(command.PARTS[name]) if not row.skipped)
    monkeypatch.setattr(correctness, "compile_blocks", _spoiled)
    found = {row.name: row.is_met for row in run(command.PARTS[name]) if "compiled" in row.name}
    assert found
    assert not any(found.values())


def _spoiled(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("summary", "share"),
    [("42 passed in 3.00s", 1.0), ("1 failed, 3 passed in 3.00s", 0.75), ("2 passed, 6 errors in 3.00s", 0.25)],
)
def test_goldens_are_counted_on_the_device(summary, share, monkeypatch):
    def run_tests(command, env, **settings):
        assert env["GOLDENS_DEVICE"] == "cpu"
        return subprocess.CompletedProcess(command, 1, stdout=f"...\n{summary}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run_tests)
    assert correctness.golden_row("goldens", SETTING).ratio == share


@pytest.mark.slow  # converts all of them
@pytest.mark.parametrize(("device", "share"), [("cpu", 1.0), ("nonsense", 0.0)])
def test_goldens_are_computed_on_the_device_that_is_named(device, share):
    setting = dataclasses.replace(SETTING, options=Options(device))
    assert correctness.golden_row("goldens", setting).ratio == share


def test_released_sizes_are_those_of_the_published_models():
    sizes = ModelSizes()
    assert sizes.vision["hidden_size"] == 3200
    assert sizes.vision["image_size"] == 448
    assert sizes.qllama["num_query_token"] == 96
    assert sizes.decoder["num_hidden_layers"] == 40


def test_a_tower_of_transformers_beside_ours_has_its_shape():
    config = vision.InternViTConfig(**ModelSizes().vision)
    with torch.device("meta"):
        ours = vision.InternVisionModel(config)
        native = vision.native_tower(config, Setting(Options("meta"), ModelSizes()))
    assert abs(sum(p.numel() for p in native.parameters()) / sum(p.numel() for p in ours.parameters()) - 1) < 1e-3


def test_decoding_for_the_bandwidth_gives_the_tokens_of_generation():
    model = tiny.chat_model("llama")
    tokens = torch.arange(5)[None] % 99
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    with torch.no_grad():
        decode = language.decoding_steps(model, model, dataclasses.replace(STAND_IN, prompt=5), length=16)
        assert torch.equal(language.times(3, decode)(), expected[:, -1:])


def test_native_reads_with_the_weights_of_ours():
    model = language.build_large_chat(SETTING)
    ids = language.text_of(model, 8)
    with torch.no_grad():
        found = language.native_of(model, SETTING)(input_ids=ids).logits
        assert torch.allclose(found, model(input_ids=ids).logits, atol=1e-5)


def test_flops_of_the_tower_are_those_of_its_shapes():
    model = models.shapes_of(vision.InternVisionModel, tiny.vision_config())
    found = harness.flops_of(lambda: model(torch.zeros(2, 3, 56, 56, device="meta")))
    width, inner, tokens, depth = 32, 48, 17, 3
    block = 2 * tokens * width * (4 * width + 2 * inner) + 2 * 2 * tokens * tokens * width
    patches = 2 * 16 * width * 3 * 14 * 14
    assert found == 2 * (depth * block + patches)


# ------------------------------------------------------------------------------------------------------ time boxes
def test_a_time_box_ends_what_takes_longer_and_nothing_else():
    with pytest.raises(OutOfTimeError, match="more than 0 s"), time_box(0.1):
        time.sleep(5)
    with time_box(0.1):
        pass
    time.sleep(0.2)  # nothing is left to fire


def test_a_row_that_fails_hangs_or_lacks_something_costs_its_own_line_alone():
    def part(setting):
        yield Measurement("fails", partial(int, "x"))
        yield Measurement("hangs", partial(time.sleep, 5), seconds=0.1)
        yield Measurement("lacks", partial(Row, "lacks"), needs=(Need("torch 9", lambda setting: False),))
        yield Measurement("differs", partial(harness.require_equal, torch.zeros(2), torch.full((2,), torch.nan)))
        yield Measurement("works", lambda: Row("works", ratio=1.0))
        raise RuntimeError("no memory\nfor this model")

    found = {row.name: row.skipped for row in run(part)}
    assert found == {
        "fails": "failed: ValueError: invalid literal for int() with base 10: 'x'",
        "hangs": "failed: OutOfTimeError: more than 0 s",
        "lacks": "torch 9 missing",
        "differs": "failed: SystemExit: The two results differ by nan: nothing to compare.",
        "works": None,
        "part": "failed: RuntimeError: no memory",
    }


def test_rows_for_which_no_time_is_left_say_so():
    rows = run(lambda setting: iter([Measurement("late", lambda: Row("late", ratio=1.0))]), seconds=0)
    assert [(row.name, row.skipped) for row in rows] == [("part", "no time left")]


def test_gradients_are_computed_only_where_a_row_trains():
    def part(setting):
        for trains in (True, False):
            yield Measurement(str(trains), lambda: Row("grad", ratio=float(torch.is_grad_enabled())), trains=trains)

    assert [row.ratio for row in run(part)] == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------ the command
def test_results_are_written_after_each_row(tmp_path, monkeypatch, capsys, uncompiled):
    output = tmp_path / "new" / "gpu.json"
    seen = []

    def part(setting):
        yield Measurement("first", lambda: Row("first", ratio=2.0, target=1.0))
        seen.append([row["name"] for row in json.loads(output.read_text())["rows"]])
        yield Measurement("second", partial(int, "x"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "PARTS", {"tower": part})
    assert command.main(["--stand-in", "--rounds", "1", "--output", str(output)]) == 1  # a row failed
    assert seen == [["first"]]
    content = json.loads(output.read_text())
    assert content["stand_in"]
    assert content["calibration"]["flops_per_second"] > 0
    assert content["bytes_per_second"] > 0
    assert [row["met"] for row in content["rows"]] == [True, None]
    assert "| first | 2 | - | >= 1 | yes |" in capsys.readouterr().out


def test_without_a_gpu_it_is_told_at_once_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command.main([])
    assert stop.value.code == 2
    assert "no CUDA device is here; `--stand-in` runs" in capsys.readouterr().err
