"""What long runs need: figures of the throughput, averaged weights, weights gathered once."""

import json
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers.trainer_utils import EvalLoopOutput

from internvl.training import throughput, trainer
from internvl.training.commands import default_workers
from internvl.training.recipes import stage1_small
from internvl.training.stages import Run, run_stage1
from internvl.training.throughput import Throughput, samples_in, tokens_in

from . import two_processes
from .test_stage_faults import RECIPE, assert_same_weights, data, run, stopped_run  # noqa: F401


ALONE = SimpleNamespace(device="cpu", num_processes=1, reduce=lambda tensor, _: tensor)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def step(meter: Throughput, clock, rows: int, seconds: float = 1.0, is_checkpointed: bool = False) -> None:
    """A step of a layer of 8 x 4: 64 FLOPs a row forward, as many for the gradient of its weights."""
    layer = torch.nn.Linear(8, 4, bias=False)
    inputs = OrderedDict(input_ids=torch.zeros(rows, 5, dtype=torch.long), attention_mask=torch.ones(rows, 5))
    inputs["labels"] = inputs["input_ids"]
    with meter.waiting():
        clock.seconds += seconds / 4
    with meter.step(inputs):
        given = torch.ones(rows, 8)
        output = checkpoint(layer, given, use_reentrant=False) if is_checkpointed else layer(given)
        output.sum().backward()
        clock.seconds += 3 * seconds / 4


def test_an_entry_tells_samples_tokens_flops_and_waiting(clock):
    meter = Throughput(peak=1000.0)
    for _ in range(2):
        step(meter, clock, rows=6)
    with meter.paused():
        clock.seconds += 100
    found = meter.entry(ALONE)
    flops = 2 * 6 * 64
    assert found == {
        "samples_per_second": 6.0,
        "tokens_per_second": 30.0,
        "tflops_per_device": pytest.approx(flops * 1e-12, rel=1e-3),
        "mfu": pytest.approx(flops / 1000, rel=1e-3),
        "share_of_time_waiting_for_data": 0.25,
    }
    assert meter.entry(ALONE) == {}  # begun anew
    step(meter, clock, rows=6, seconds=2.0)
    assert meter.entry(ALONE)["samples_per_second"] == 3.0


def test_what_checkpoints_compute_again_is_no_use(clock):
    meter = Throughput(peak=1000.0)
    step(meter, clock, rows=6, is_checkpointed=True)
    assert meter.entry(ALONE)["mfu"] == pytest.approx(2 * 6 * 64 / 1000, rel=1e-3)


def test_a_kind_of_batch_is_counted_once_and_others_in_proportion(clock, monkeypatch):
    counted = []
    original = throughput.FlopCounter
    monkeypatch.setattr(throughput, "FlopCounter", lambda: counted.append(1) or original())
    meter = Throughput(peak=1000.0)
    for rows in (6, 6, 3):  # the last one is not counted before the next entry
        step(meter, clock, rows)
    assert len(counted) == 1
    assert meter.entry(ALONE)["mfu"] == pytest.approx(2 * 15 * 64 / 3 / 1000, rel=1e-3)
    step(meter, clock, 3)
    step(meter, clock, 3)
    assert len(counted) == 2


@pytest.mark.slow
def test_compiled_models_are_counted_as_others_are(data, tmp_path):  # noqa: F811
    found = []
    for name, arguments in (("eager", {}), ("compiled", {"torch_compile_backend": "eager"})):
        recipe = replace(RECIPE, phases=RECIPE.phases[1:])
        meters, original = [], throughput.Throughput.entry

        def watched(self, accelerator, meters=meters, original=original):
            meters.append((self.is_compiled, self._flops))
            return original(self, accelerator)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(throughput.Throughput, "entry", watched)
            run_stage1(recipe, [str(data / "0.tar")], Run(tmp_path / name, arguments=arguments), data / "tokenizer")
        found.append(meters)
    assert [is_compiled for is_compiled, _ in found[1]] == [True] * 4
    assert found[0][0][1] == found[1][0][1] > 0


def test_samples_and_tokens_of_every_kind_of_batch():
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tiles = torch.zeros(7, 3, 14, 14)
    dialogues = {"input_ids": ids, "attention_mask": mask, "labels": ids, "pixel_values": tiles}
    assert (samples_in(dialogues), int(tokens_in(dialogues))) == (2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed = {"input_ids": positions, "position_ids": positions, "labels": positions, "pixel_values": tiles}
    assert (samples_in(packed), int(tokens_in(packed))) == (3, 6)
    pairs = {"pixel_values": tiles, "input_ids": ids, "attention_mask": mask}
    assert (samples_in(pairs), int(tokens_in(pairs))) == (7, 8)
    three = {"pixel_values": tiles, "summarize_input_ids": ids, "positive_input_ids": ids, "input_ids": ids}
    three |= {"summarize_attention_mask": mask, "labels": ids}
    assert (samples_in(three), int(tokens_in(three))) == (7, 8 + 10 + 10)
    assert samples_in({"pixel_values": tiles, "labels": ids}) == 7


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA L40S", 362)])
def test_the_peak_of_a_device_goes_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert throughput.peak_flops() == peak * 1e12


@pytest.mark.parametrize(("cpus", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (16, 1, 8), (16, 4, 3), (8, 8, 1)])
def test_workers_take_the_cpus_that_training_leaves(cpus, processes, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers


# --------------------------------------------------------------------------------------------------------- the average
AVERAGED = replace(RECIPE, phases=RECIPE.phases[:1], ema_decay=0.3)


def test_the_average_is_logged_resumed_and_exported(data, tmp_path, monkeypatch):  # noqa: F811
    seen, original = [], trainer.StageTrainer.training_step

    def watched(self, *arguments, **settings):
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        seen.append((self.state.global_step, weights))
        return original(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "training_step", watched)
        run(data, tmp_path / "whole", recipe=AVERAGED)
    last = load_file(tmp_path / "whole/trainer/half_patches/checkpoint-4/model.safetensors")
    exported = load_file(tmp_path / "whole/model.safetensors")
    weights = [weights for _, weights in seen[1:]]
    for name, value in exported.items():
        average = seen[0][1][name].reshape(value.shape)
        for number, step in enumerate([*(w[name] for w in weights), last[name]], start=1):
            decay = min(0.3, (1 + number) / (10 + number))
            average = decay * average + (1 - decay) * step.reshape(value.shape)
        torch.testing.assert_close(value, average, atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(exported["text_projection"], last["text_projection"])
    log = json.loads((tmp_path / "whole/training_log.json").read_text())["half_patches"]
    assert all(entry["samples_per_second"] > 0 < entry["tflops_per_device"] for entry in log if "loss" in entry)
    with monkeypatch.context() as patch:
        patch.setattr("tests.test_stage_faults.RECIPE", AVERAGED)
        patch.setattr("tests.test_stage_faults.run", lambda *given: run(*given, recipe=AVERAGED))
        stopped_run(data, tmp_path / "out", 3)
    run(data, tmp_path / "out", resume=True, recipe=AVERAGED)
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_the_best_model_is_the_average_that_was_measured(data, tmp_path, monkeypatch):  # noqa: F811
    """Held-out figures that worsen from the second step on: its average is exported, from its final place."""
    points, measured = iter([1.0, 2.0]), []

    def evaluated(self, *_, **__):
        measured.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return EvalLoopOutput(None, None, {"eval_recall_at_1_InternVL-C": next(points)}, 1)

    monkeypatch.setattr(trainer.StageTrainer, "evaluation_loop", evaluated)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    best |= {"metric_for_best_model": "recall_at_1_InternVL-C", "greater_is_better": False}
    shards = tuple(sorted(str(path) for path in data.glob("*.tar")))
    how = Run(tmp_path / "out", eval_data=shards, arguments=best)
    run_stage1(AVERAGED, list(shards), how, data / "tokenizer")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert len(measured) == 2
    assert not torch.equal(measured[0]["text_projection"], measured[1]["text_projection"])
    for name, value in exported.items():
        torch.testing.assert_close(value, measured[0][name].reshape(value.shape), atol=0, rtol=0, msg=name)
    states = tmp_path.glob("out/trainer/half_patches/*/trainer_state.json")
    found = {json.loads(path.read_text())["best_model_checkpoint"] for path in states}
    assert found == {str(tmp_path / "out/trainer/half_patches/checkpoint-2")}


def test_an_impossible_decay_is_refused():
    with pytest.raises(ValueError, match=r"`ema_decay` must be between 0 and 1, got 1\.5"):
        replace(stage1_small(), ema_decay=1.5)


# ------------------------------------------------------------------------------------------------------- gathered once
@pytest.mark.slow
def test_chunks_share_gathered_weights(tmp_path):
    for rank in two_processes.run("gathered", tmp_path):
        often, once = rank[False], rank[True]
        assert once["gathers"] <= once["units"] < often["gathers"] / 3
        assert often.keys() == once.keys()
        for name, value in often.items():
            if name not in ("gathers", "units"):
                torch.testing.assert_close(once[name], value, msg=name)
