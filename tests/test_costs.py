"""The costs of the full recipes: what is counted on the meta device is what tiny models do with real tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internvl.planning import costs as planning
from internvl.planning.__main__ import main
from internvl.planning.cluster import Cluster
from internvl.planning.costs import (
    PhaseCost,
    cost_of,
    count_step,
    full_models,
    sharded_units,
    state_bytes,
    step_inputs,
    traffic_bytes,
    unit_sizes,
)
from internvl.planning.counting import OperationCounter
from internvl.planning.memory import build_on_meta, image_positions, read_config
from internvl.training.__main__ import main as train
from internvl.training.models.parameter_groups import part_of
from internvl.training.models.pretraining import (
    InternVLForCaptionTraining,
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)
from internvl.training.recipes import DialogueRecipe, captions, retrieval, stage1, stage2, stage3

from . import tiny
from .training_models import tiny_model


BATCH, LENGTH = 4, 9


def contrastive(objective="softmax"):
    recipe = replace(stage1(), objective=objective, max_text_length=LENGTH)
    return tiny_model(InternVLForContrastiveTraining, 0, objective=objective), recipe


def dialogues(connector, phase=1, also_train=None):
    recipe = stage3(connector, also_train is not None, also_train)
    model = tiny.chat_model(connector=connector)
    return model, replace(recipe, phases=(recipe.phases[phase],))


CASES = {
    "stage 1": contrastive,
    "stage 1, sigmoid": lambda: contrastive("sigmoid"),
    "stage 2": lambda: (tiny_model(InternVLForGenerativeTraining), replace(stage2(), max_text_length=LENGTH)),
    "retrieval": lambda: (tiny_model(InternVLForRetrievalTraining), replace(retrieval(), max_text_length=LENGTH)),
    "retrieval, similar negatives": lambda: (
        tiny_model(InternVLForRetrievalTraining),
        replace(retrieval(), max_text_length=LENGTH, negatives="similar"),
    ),
    "captions": lambda: (tiny_model(InternVLForCaptionTraining), replace(captions(), max_text_length=LENGTH)),
    "stage 3, simple, mlp": lambda: dialogues("patches", 0),
    "stage 3, simple": lambda: dialogues("patches"),
    "stage 3, simple, decoder frozen": lambda: dialogues("patches", also_train="vision"),
    "stage 3, full": lambda: dialogues("queries_and_patches"),
    "stage 3, full, decoder frozen": lambda: dialogues("queries_and_patches", also_train="qllama"),
}
# Dialogues are accumulated, not cached.
WAYS = [(name, rows) for name in CASES for rows in (None, 2) if rows is None or "stage 3" not in name]
WAYS.remove(("retrieval, similar negatives", None))


def prepared(name, rows=None, checkpointed=False):
    """A tiny model, its recipe and its first phase."""
    model, recipe = CASES[name]()
    recipe = replace(recipe, grad_cache_chunk_size=rows, gradient_checkpointing=checkpointed)
    return model, recipe, replace(recipe.phases[0], image_size=56)


def real_inputs(model, recipe, phase, rows):
    """The batch of `step_inputs` with data."""
    inputs = step_inputs(model, recipe, phase, rows, LENGTH)
    torch.manual_seed(0)
    data = {name: torch.zeros_like(x, device="cpu") for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    data["pixel_values"].normal_()
    for ids in data.values():
        if not ids.is_floating_point():
            ids.random_(5, 50)
    if isinstance(recipe, DialogueRecipe):
        data["input_ids"][:, : image_positions(model.config, 1)] = tiny.IMAGE_TOKEN_ID
    if "image_ids" in data:
        data["image_ids"] = torch.arange(rows)
    return {**inputs, **data}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "rows"), WAYS)
def test_a_step_on_meta_does_and_keeps_what_a_real_one_does(name, rows, checkpointed):
    model, recipe, phase = prepared(name, rows, checkpointed)
    found = count_step(model.to("meta"), recipe, phase, BATCH, BATCH, LENGTH)
    model, recipe, phase = prepared(name, rows, checkpointed)
    planning.prepare(model, recipe, phase)
    model.grad_cache_chunk_size = rows
    done = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with OperationCounter() as done[attention]:
            inputs = real_inputs(model, recipe, phase, BATCH)
            model(**inputs).loss.backward()
    assert found.activations == pytest.approx(done["sdpa"].peak_bytes, rel=0.06)
    # torch has no formula for the CPU's fused attention. Such a kernel computes its scores again in the backward pass.
    assert 1 < BATCH * found.executed / done["eager"].flops < 1.04


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "retrieval"])
def test_what_is_computed_again_is_told_from_the_rest(name):
    plain = count_step(*meta_case(name), BATCH, BATCH)
    assert plain.executed == plain.flops
    cached = count_step(*meta_case(name, 2, checkpointed=True), BATCH, BATCH)
    assert cached.flops == plain.flops
    assert cached.executed > 1.2 * cached.flops


def meta_case(name, rows=None, checkpointed=False):
    model, recipe, phase = prepared(name, rows, checkpointed)
    return model.to("meta"), recipe, phase


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "retrieval"])
def test_further_chunks_do_and_keep_what_three_say(name):
    share, rows = 12, 2
    model, recipe, phase = meta_case(name, rows, checkpointed=True)
    found = count_step(model, recipe, phase, share, share)
    model.grad_cache_chunk_size = rows
    counter, *_ = planning._run(model, lambda: step_inputs(model, recipe, phase, share, LENGTH), is_cached=True)
    assert found.executed * share == pytest.approx(counter.flops, rel=1e-3)  # negatives are drawn among fewer
    assert found.activations == pytest.approx(counter.peak_bytes, rel=0.03)


def test_features_of_all_processes_are_kept_and_travel():
    alone, many = (count_step(*meta_case("stage 1"), BATCH, rows) for rows in (BATCH, 100 * BATCH))
    features = 2 * 99 * BATCH * 12 * 4  # of images and texts, 12 wide in float32
    assert alone.features == 0
    assert many.features == 2 * features  # and their gradients back
    assert many.activations > alone.activations + features
    assert many.flops > alone.flops


@pytest.fixture(scope="module")
def models():
    return full_models("13b")


def size_of(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_full_models_have_the_released_sizes(models):
    released = {"stage 1": "internvl-c", "stage 2": "internvl-14b", "retrieval": "internvl-14b"}
    for stage, name in {**released, "stage 3, full, 13b": "internvl-chat-full-13b"}.items():
        assert size_of(models[stage][0]) == size_of(build_on_meta(read_config(name), torch.float32))
    full = dict(models["stage 3, full, 13b"][0].named_children())
    assert size_of(full["qllama"]) == pytest.approx(7.4e9, rel=0.03)
    assert size_of(full["vision_model"]) == pytest.approx(5.9e9, rel=0.01)


@pytest.mark.parametrize(("decoder", "trained"), [("7b", 64e6), ("13b", 90e6)])
def test_the_full_configuration_trains_as_much_as_table_9_says(decoder, trained):
    model, recipe = full_models(decoder)[f"stage 3, full, {decoder}"]
    (phase,) = recipe.phases
    assert planning._num_trained(model, phase)[0] == pytest.approx(trained, abs=0.6e6)


def test_the_released_size_costs_what_its_parameters_say(models):
    """A frozen tower forward only, a trained decoder three times: 2 x parameters x positions each, and attention."""
    model, recipe = models["stage 3, simple, 13b"]
    found = count_step(model, recipe, recipe.phases[1], 1, 1, text_length=512)
    parts = dict(model.named_children())
    words = model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    vision = (2 * size_of(parts["vision_model"]) * 577 + 4 * 577**2 * 3200 * 48) * 45 / 48  # not the last blocks
    language = 3 * (2 * (size_of(parts["language_model"]) - words) * 1088 + 4 * 1088**2 * 5120 * 40)
    assert found.flops == pytest.approx(vision + language, rel=0.01)
    assert 1.15 < found.executed / found.flops < 1.25


def test_states_are_shared_out_or_not(models):
    model, recipe = models["stage 2"]
    phase = recipe.phases[0]
    trained = sum(p.numel() for name, p in model.named_parameters() if part_of(name) in phase.learning_rates)
    frozen = size_of(model) - trained
    whole = state_bytes(model, phase, Cluster(gpus=64, sharding="ddp"))
    assert whole == 18 * trained + 2 * frozen
    few, many = (state_bytes(model, phase, Cluster(gpus=gpus)) for gpus in (64, 640))
    largest, rest = unit_sizes(model)
    assert few - many == pytest.approx((16 * trained + 2 * frozen) * (1 / 64 - 1 / 640))
    assert many > 6 * largest > 6 * max(p.numel() for p in model.parameters())
    assert 0 < rest < 0.01 * size_of(model)


def test_traffic_is_every_gathered_layer_and_every_reduced_gradient():
    model, recipe, phase = meta_case("stage 1", rows=2, checkpointed=True)
    step = count_step(model, replace(recipe, gather_once=False), phase, 6, 6)
    units = sum(size_of(unit) for unit in sharded_units(model))
    head = size_of(model.get_output_embeddings()) if model.get_output_embeddings() is not None else 0
    # Three chunks: each layer runs for the features, again for the gradients, and goes backward; the head never runs.
    assert step.gathered == 3 * 3 * (units - head)
    once = count_step(model, recipe, phase, 6, 6)
    assert (once.gathered, once.keeps_gathered, step.keeps_gathered) == (units - head, True, False)
    assert count_step(model, recipe, phase, 60, 60).gathered == once.gathered
    cluster, (largest, rest) = Cluster(gpus=640), unit_sizes(model)
    kept = state_bytes(model, phase, cluster, keeps_gathered=True) - state_bytes(model, phase, cluster)
    assert kept == 2 * (size_of(model) - rest - 2 * largest)
    trained = sum(p.numel() for name, p in model.named_parameters() if part_of(name) in phase.learning_rates)
    sharded = traffic_bytes(model, phase, Cluster(gpus=4), step)
    assert sharded == 2 * (step.gathered + rest + trained) * 3 / 4 + step.features
    assert traffic_bytes(model, phase, Cluster(gpus=4, sharding="ddp"), step) == 8 * trained * 3 / 4 + step.features


def test_days_fall_with_the_cluster():
    model, recipe, phase = meta_case("stage 1", rows=2, checkpointed=True)
    phase = replace(phase, batch_size=64)
    few, many = (cost_of("", model, recipe, phase, Cluster(gpus=gpus), LENGTH) for gpus in (8, 16))
    assert few.days == pytest.approx(2 * many.days, rel=1e-2)
    # No more GPUs work than a batch has samples.
    all_busy, half_idle = (cost_of("", model, recipe, phase, Cluster(gpus=gpus), LENGTH) for gpus in (64, 128))
    assert all_busy.days == half_idle.days
    assert few.total == few.states + few.activations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "`gpus` must be positive, got 0"),
        ({"utilization": 1.5}, r"`utilization` must be in \(0, 1\], got 1.5"),
        ({"sharding": "tp"}, r"`sharding` must be one of \['fsdp', 'ddp'\], got 'tp'"),
    ],
)
def test_impossible_clusters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


@pytest.fixture
def asked(monkeypatch):
    """Arguments of `costs`, which gives a single phase."""
    calls = []

    def few_costs(cluster, decoder, text_length):
        calls.append((cluster, decoder, text_length))
        yield PhaseCost("stage 1: short", 2 * 10**9, 10**9, 10**6, 2e12, 3e12, 1.5, 60e9, 2e9, 3e9)

    monkeypatch.setattr(planning, "costs", few_costs)
    return calls


def test_the_command_prints_a_row_for_every_phase_in_both_tables_and_its_assumptions(capsys, asked):
    assert main(["costs", "--gpus", "2", "--gpu-memory", "40", "--decoder", "7b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [(Cluster(gpus=2, gpu_memory=40), "7b", 512)]
    assert lines[2] == "| stage 1: short | 1.00 of 2.00 B | 1.0 M | 2.00 | 3.00 | 1.50 | 72 |"
    assert lines[4].startswith("| phase | states | activations | fits in 40 GB |")
    assert lines[6] == "| stage 1: short | 60.0 GB | 2.0 GB | 22 GB short | 3.0 GB |"
    for table in (lines[:3], lines[4:7]):
        assert len({line.count("|") for line in table}) == 1
    assert lines[3] == lines[7] == ""
    assert any("2 GPUs of 312 TFLOP/s" in line for line in lines)


def test_the_readme_holds_the_columns_and_the_assumptions_of_the_command(capsys, asked):
    assert main(["costs"]) == 0
    readme = (Path(__file__).parents[1] / "training" / "README.md").read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if line and "stage 1: short" not in line]
    assert len(printed) == 4 + len(planning.ASSUMPTIONS)
    for line in printed:
        assert " ".join(line.split()) in " ".join(readme.split())


def test_the_old_command_names_the_new_one(capsys):
    assert train(["costs", "--gpus", "2"]) == 2
    assert "python -m internvl.planning costs" in capsys.readouterr().err
