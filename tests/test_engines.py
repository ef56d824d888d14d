"""Engines that others made, with the shipped configurations: DDP, FSDP2 and ZeRO-3 train as one process does, and runs
resume exactly.

Really `accelerate launch`, two processes on the CPU. One step of the data gives the second process a batch without
images.
"""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from internvl.training.models.parameter_groups import part_of
from internvl.training.models.pretraining import InternVLForContrastiveTraining

from . import engine_jobs, tiny, two_processes
from .engine_jobs import CONNECTORS, PAIR_STAGES, PARITY, STAGES, STEPS
from .fixtures_bundled_run import one_thread
from .training_models import notes, tensors, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    engine_jobs.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    return engine_jobs.parity(folder)


@pytest.fixture(scope="module")
def ddp(folder):
    engine_jobs.launch("ddp", "killed", folder, dies=True)
    return engine_jobs.launch("ddp", "parity_and_resumed", folder)


# SGD moves the weights of stages 1 and 2 by their gradients; Adam makes much of gradients that are zero but for
# rounding.
LIMITS = {**dict.fromkeys(CONNECTORS, 2e-4), **dict.fromkeys(PAIR_STAGES, 1e-6)}


def assert_as_one_process(found: dict, expected: dict, model: str, is_first: bool = True) -> None:
    assert len(found["losses"]) == STEPS
    for step, loss in expected["losses"].items():
        assert found["losses"][step] == pytest.approx(loss, rel=1e-4)
    if not is_first:
        return
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=LIMITS[model], rtol=LIMITS[model], msg=name)


@pytest.mark.parametrize("model", PARITY)
def test_ddp_trains_as_one_process(model, ddp, one_process):
    for rank in ddp:
        assert rank["parity"][model]["wrapper"] == "DistributedDataParallel"
        assert_as_one_process(rank["parity"][model], one_process[model], model)


@pytest.mark.parametrize("stage", PAIR_STAGES)
def test_training_moves_what_the_recipe_trains(stage, folder, one_process):
    """So that the comparisons above and below compare something."""
    before, after = load_file(folder / f"{stage} start" / "model.safetensors"), one_process[stage]["weights"]
    rates = PAIR_STAGES[stage][2]().phases[0].learning_rates
    moved = {
        name
        for name, value in before.items()
        if not torch.allclose(after[name].reshape(value.shape), value, atol=1e-4)
    }
    assert {part_of(name) for name in moved} == set(rates)
    assert "logit_scale" in moved


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_ddp_run_resumes_exactly(stage, ddp):
    for rank in ddp:
        assert_same_run(rank[stage])


def assert_same_run(found: dict) -> None:
    assert len(found["whole"]["losses"]) == STEPS
    assert found["resumed"]["losses"] == found["whole"]["losses"]
    for name, value in found["whole"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], value), name


@pytest.fixture(scope="module")
def fsdp2(folder):
    return engine_jobs.launch("fsdp2", "parity", folder)


@pytest.mark.parametrize("model", PARITY)
def test_fsdp2_trains_as_one_process(model, fsdp2, one_process):
    for number, rank in enumerate(fsdp2):
        assert rank[model]["wrapper"].startswith("FSDP")
        assert_as_one_process(rank[model], one_process[model], model, is_first=number == 0)


@pytest.mark.parametrize("grad_cache_chunk_size", [None, 2], ids=["plain", "gradient caching"])
@pytest.mark.parametrize("tag", ["stage2", "retrieval"])
def test_fsdp2_has_the_losses_and_gradients_of_the_published_code(tag, grad_cache_chunk_size, on_two):
    recorded, limits = tensors("internvl_14b_training_ws2"), notes("internvl_14b_training_ws2")["tolerance"]
    losses, gradients = (f"{tag}.rank{{}}.out.", f"{tag}.out.mean_")
    for number, rank in enumerate(on_two):
        found = rank["sharded"]["goldens"][tag, grad_cache_chunk_size]
        for kind, prefix in (("loss", losses.format(number)), ("grad", gradients)):
            wanted = {key.removeprefix(prefix): recorded[key] for key in recorded if key.startswith(prefix + kind)}
            assert len(wanted) > 2
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, **limits[kind], msg=key)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_fsdp2_has_the_gradients_of_the_whole_batch_with_caching(objective, on_two):
    model = tiny_model(InternVLForContrastiveTraining, objective=objective)
    outputs = model(pixel_values=tiny.pixels(6), input_ids=tiny.text_ids(6))
    outputs.loss.backward()
    wanted = two_processes.gradients(model)
    assert {"grad.logit_scale", "grad.vision_model.embeddings.class_embedding"} <= wanted.keys()
    ranks = [rank["sharded"]["contrastive"][objective] for rank in on_two]
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, outputs.loss.detach())
    for key, value in wanted.items():
        torch.testing.assert_close(ranks[0][key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.fixture(scope="module")
def resumed_fsdp2(folder):
    engine_jobs.launch("fsdp2", "killed", folder, dies=True)
    return engine_jobs.launch("fsdp2", "resumed", folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_fsdp2_run_resumes_exactly(stage, resumed_fsdp2):
    found = [rank[stage] for rank in resumed_fsdp2]
    assert_same_run(found[0])  # which alone has the weights
    assert found[1]["resumed"]["losses"] == found[1]["whole"]["losses"]


@pytest.mark.slow
def test_a_kill_inside_a_sharded_save_is_as_if_it_had_not_been(folder):
    engine_jobs.launch("fsdp2", "killed_in_save", folder, dies=True)
    before = engine_jobs.launch("fsdp2", "restarted", folder)[0]["before"]
    phase = "restarted/trainer/half_patches"
    assert f"{phase}/checkpoint-2/pytorch_model_fsdp_0/.metadata" in before
    assert f"{phase}/checkpoint-2/optimizer_0/__1_0.distcp" in before
    assert f"{phase}/checkpoint-2/stream_1.json" in before
    assert f"{phase}/checkpoint-2/average/__1_0.distcp" in before
    assert f"{phase}/checkpoint-2/model.safetensors" not in before
    assert f"{phase}/checkpoint-4" not in before  # the one that was being written
    found, wanted = (load_file(folder / name / "model.safetensors") for name in ("restarted", "unbroken"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert {path.name for path in (folder / phase).iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert AutoModel.from_pretrained(folder / "restarted").logit_scale.ndim == 0


@pytest.mark.slow
def test_two_machines_with_hybrid_sharding_train_as_one_process(folder, one_process):
    sizes = ("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2")
    for number, rank in enumerate(engine_jobs.launch_on_two_machines("hsdp", "hybrid", folder, *sizes)):
        assert rank["mesh"] == (2, 2)
        assert rank["placements"] == "(Replicate(), Shard(dim=0))"
        assert_as_one_process(rank, one_process["stage 1"], "stage 1", is_first=number == 0)


@pytest.mark.slow
def test_adapters_trained_in_pieces_are_saved_and_merged_whole(folder):
    engine_jobs.launch("fsdp2", "adapted_stage", folder)
    start, merged, adapters = (
        load_file(folder / path)
        for path in (
            "stage 2 start/model.safetensors",
            "adapted/model.safetensors",
            "adapted/adapter/adapter_model.safetensors",
        )
    )
    pairs = {name: name.replace(".lora_A.", ".lora_B.") for name in adapters if ".lora_A." in name}
    assert len(adapters) == 2 * len(pairs) > 0
    for first, second in pairs.items():
        name = first.removeprefix("base_model.model.").replace(".lora_A", "")
        change = 2 * adapters[second] @ adapters[first]
        assert change.any()
        torch.testing.assert_close(merged[name], start[name] + change, atol=1e-6, rtol=0, msg=name)
    assert merged.keys() == start.keys()
    assert AutoModel.from_pretrained(folder / "adapted").logit_scale.ndim == 0


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is an optional engine: `make deepspeed`")
    folder = tmp_path_factory.mktemp("zero3")
    engine_jobs.write_data(folder)
    return engine_jobs.launch("zero3", "parity", folder, DS_ACCELERATOR="cpu")


@pytest.mark.slow  # DeepSpeed compiles its CPU operators in the first run
@pytest.mark.parametrize("model", PARITY)
def test_zero3_trains_as_one_process(model, zero3, one_process):
    for number, rank in enumerate(zero3):
        assert rank[model]["wrapper"] == "DeepSpeedEngine"
        assert_as_one_process(rank[model], one_process[model], model, is_first=number == 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    engine_jobs.write_data(folder)
    engine_jobs.launch(None, "killed", folder, dies=True)
    with one_thread():  # as in the killed process: bits depend on the number
        return engine_jobs.resumed(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_exactly(stage, alone):
    assert_same_run(alone[stage])
