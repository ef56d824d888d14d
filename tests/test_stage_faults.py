"""Stages that are stopped, started twice, or given nothing to train on: nothing half-done stays, nothing whole is
lost.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from internvl.rows.bad_rows import TooManyBadRowsError
from internvl.training import trainer
from internvl.training.__main__ import main
from internvl.training.checkpoints import check_same_recipe, record_recipe
from internvl.training.models import base
from internvl.training.models.whole_folders import checkpoints_in, fault_of, newest_whole
from internvl.training.recipes import stage1_small
from internvl.training.stages import Run, run_stage1

from . import two_processes
from .fixtures_pairs import sample, write_tar
from .fixtures_text import make_tokenizer


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "initializer_factor": 1.0,
}  # fmt: skip
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
PHASES = tuple(
    replace(phase, steps=4, image_size=42, batch_size=4, warmup_steps=1, patch_drop_rate=0.5)
    for phase in stage1_small().phases
)
RECIPE = replace(
    stage1_small(), phases=PHASES, save_steps=2, save_total_limit=1, logging_steps=1, max_text_length=24,
    vision_config=VISION, text_config=TEXT, model_config={"clip_embed_dim": 12, "attn_pool_num_heads": 4},
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", [sample(number) for number in range(shard * 8, shard * 8 + 8)], shard * 8)
    return folder


def run(data: Path, output: Path, resume: bool = False, recipe=RECIPE) -> torch.nn.Module:
    shards = sorted(str(path) for path in data.glob("*.tar"))
    return run_stage1(recipe, shards, Run(output, resume=resume), data / "tokenizer")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    run(data, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_weights(found: Path, wanted: Path) -> None:
    found, wanted = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


class StoppedError(Exception):
    pass


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Training in this context must end in the step after so many of all phases."""
    original, count = trainer.StageTrainer.training_step, iter(range(1000))

    def stopping(self, *args, **kwargs):
        if next(count) == steps:
            raise StoppedError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "training_step", stopping)
        with pytest.raises(StoppedError):
            yield


def stopped_run(data: Path, output: Path, steps: int) -> Path:
    with stopped_after(steps):
        run(data, output)
    return output


# ------------------------------------------------------------------------------------------------------- resumed again
def test_a_finished_stage_that_is_resumed_says_so_and_changes_nothing(data, unbroken, caplog):
    before = digests(unbroken)
    model = run(data, unbroken, resume=True)
    assert digests(unbroken) == before
    assert "is finished; nothing is changed" in caplog.text
    assert model.config.model_type == "internvl_14b"


def test_finished_phases_run_no_extra_step(data, unbroken, tmp_path, monkeypatch):
    """Stopped in the first step of the second phase, before it has a checkpoint of its own."""
    output = stopped_run(data, tmp_path / "out", 4)
    steps = []
    original = trainer.StageTrainer.training_step
    monkeypatch.setattr(
        trainer.StageTrainer,
        "training_step",
        lambda self, *args, **kwargs: steps.append(self.phase.name) or original(self, *args, **kwargs),
    )
    run(data, output, resume=True)
    assert steps == ["all_patches"] * 4
    assert_same_weights(output, unbroken)
    log = json.loads((output / "training_log.json").read_text())
    wanted = json.loads((unbroken / "training_log.json").read_text())
    for phase in ("half_patches", "all_patches"):
        assert [e["loss"] for e in log[phase] if "loss" in e] == [e["loss"] for e in wanted[phase] if "loss" in e]


DAMAGES = {
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a trainer state": lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 4'),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no random numbers": lambda folder: (folder / "rng_state.pth").unlink(),
    "half of the weights": lambda folder: cut(folder / "model.safetensors"),
    "half of the optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "half of the schedule": lambda folder: cut(folder / "scheduler.pt"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    **{
        f"weights that begin with {header}": lambda folder, header=header: (folder / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header
        )
        for header in (b"[]", b"5", b'{"a":{}}', b'{"a":"b"}', b'{"a":{"data_offsets":[]}}')
    },
    **{
        f"an index of {content:.20}": lambda folder, content=content: (
            folder / "model.safetensors.index.json"
        ).write_text(content)
        for content in ("[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 5}}')
    },
    "a deep trainer state": lambda folder: (folder / "trainer_state.json").write_text('{"a":' * 100_000),
}


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_exists_is_not_complete(damage, unbroken, tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(unbroken / "trainer" / "half_patches" / "checkpoint-4", checkpoint)
    assert fault_of(checkpoint) is None
    DAMAGES[damage](checkpoint)
    assert fault_of(checkpoint) is not None
    assert newest_whole(tmp_path) is None


def test_every_shard_and_every_process_counts(unbroken, tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(unbroken / "trainer" / "half_patches" / "checkpoint-4", checkpoint)
    assert fault_of(checkpoint, processes=2) is None  # it says itself that one process wrote it
    (checkpoint / "processes.json").unlink()
    assert fault_of(checkpoint, processes=2) == "no rng_state_0.pth"
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    assert fault_of(checkpoint, processes=2) is None
    AutoModel.from_pretrained(unbroken).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (checkpoint / "model.safetensors").unlink()
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, checkpoint)
    assert fault_of(checkpoint) is None
    last = max(checkpoint.glob("model-*"))
    cut(last)
    assert fault_of(checkpoint) == f"{last.name} ends too early"
    last.unlink()
    assert fault_of(checkpoint) == f"model.safetensors.index.json names {last.name}, which is missing"


def test_the_newest_whole_checkpoint_wins(data, unbroken, tmp_path, monkeypatch, caplog):
    """As others leave them that write into the final folder: a later checkpoint lacks something."""
    output = stopped_run(data, tmp_path / "out", 3)
    phase = output / "trainer" / "half_patches"
    shutil.copytree(unbroken / "trainer" / "half_patches" / "checkpoint-4", phase / "checkpoint-4")
    DAMAGES["no trainer state"](phase / "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_phases", lambda *_: None)
        run(data, output, resume=True)  # a start that comes to nothing
    assert [folder.name for folder in checkpoints_in(phase)] == ["checkpoint-4", "checkpoint-2"]
    run(data, output, resume=True)
    assert caplog.text.count("Passed over: checkpoint-4 (no trainer_state.json)") == 1
    assert_same_weights(output, unbroken)


@pytest.mark.parametrize("at", ["_save_optimizer_and_scheduler", "rename"])
def test_a_kill_inside_of_a_save_leaves_what_was_whole(at, data, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_second(patch, at)
        with pytest.raises(StoppedError):
            run(data, output)
    phase = output / "trainer" / "half_patches"
    assert [folder.name for folder in checkpoints_in(phase)] == ["checkpoint-2"]
    run(data, output, resume=True)
    assert_same_weights(output, unbroken)
    assert [folder.name for folder in phase.iterdir()] == ["checkpoint-4"]


def stop_second(patch: pytest.MonkeyPatch, at: str) -> None:
    """The second call ends the run when it has done its work; a rename before that."""
    calls = iter(range(100))
    owner = Path if at == "rename" else trainer.StageTrainer
    original = getattr(owner, at)

    def stopping(self, *args, **kwargs):
        is_meant = at != "rename" or self.name.startswith("checkpoint-")
        is_second = is_meant and next(calls) == 1
        if is_second and at == "rename":
            raise StoppedError
        found = original(self, *args, **kwargs)
        if is_second:
            raise StoppedError
        return found

    patch.setattr(owner, at, stopping)


def test_a_changed_recipe_is_refused_by_the_fields_that_differ(data, unbroken, tmp_path):
    stopped = stopped_run(data, tmp_path / "out", 3)
    changed = replace(RECIPE, weight_decay=0.25, phases=(PHASES[0], replace(PHASES[1], steps=6)))
    for folder in (stopped, unbroken):
        before = digests(folder)
        with pytest.raises(
            ValueError, match=r"another recipe: `phases\[1\].steps` was 4, is 6; `weight_decay` was 0.1, is 0.25"
        ):
            run(data, folder, resume=True, recipe=changed)
        with pytest.raises(ValueError, match=r"`lora_rank` was 0, is 2"):
            run_stage1(RECIPE, [str(data / "0.tar")], Run(folder, resume=True, lora_rank=2), data / "tokenizer")
        assert digests(folder) == before


def test_the_recipe_of_every_kind_of_run_is_compared(tmp_path):
    record_recipe(tmp_path, RECIPE, funnel_stage=1)
    check_same_recipe(tmp_path, RECIPE, funnel_stage=1)
    with pytest.raises(ValueError, match=r"`vision_config\.hidden_size` was 32, is 64"):
        check_same_recipe(tmp_path, replace(RECIPE, vision_config={**VISION, "hidden_size": 64}))
    with pytest.raises(ValueError, match="`funnel_stage` was 1, is None"):
        check_same_recipe(tmp_path, RECIPE, funnel_stage=None)


def test_records_of_earlier_versions_are_compared_by_todays_names(tmp_path):
    old = json.loads(json.dumps(asdict(RECIPE)))
    names = {"learning_rates": "rates", "patch_drop_rate": "dropped_patches"}
    new = {"muon_learning_rate", "cooldown_fraction", "batches", "dense_supervision", "itc_on_vision_tower"}
    old["phases"] = [
        {names.get(key, key): value for key, value in phase.items() if key not in new} for phase in old["phases"]
    ]
    old["rows_at_a_time"] = old.pop("grad_cache_chunk_size")
    (tmp_path / "training_log.json").write_text(json.dumps({"recipe": old}))
    check_same_recipe(tmp_path, RECIPE)
    with pytest.raises(ValueError, match=r"`phases\[0\]\.patch_drop_rate` was 0.5, is 0.25"):
        check_same_recipe(tmp_path, replace(RECIPE, phases=(replace(PHASES[0], patch_drop_rate=0.25), PHASES[1])))


def test_a_stopped_run_is_not_begun_again_by_mistake(data, tmp_path):
    stopped = stopped_run(data, tmp_path / "out", 3)
    before = digests(stopped)
    with pytest.raises(ValueError, match="holds a run that was stopped: go on with it by `--resume`"):
        run(data, stopped)
    assert digests(stopped) == before


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--steps", "0", 1),
        ("--steps", "-1", 1),
        ("--batch-size", "0", 1),
        ("--batch-size", "two", 1),
        ("--workers", "-1", 0),
        ("--lora-rank", "1.5", 0),
        ("--seed", "-1", 0),
    ],
)
def test_numbers_that_cannot_be_are_told_at_once_by_the_name_of_the_option(option, value, least, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["stage1", "--data", "nowhere.tar", "--output", str(tmp_path / "out"), option, value])
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: must be a whole number from {least} on, got '{value}'" in message
    assert not (tmp_path / "out").exists()


def test_a_seed_that_numpy_does_not_take_is_told_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["stage1", "--output", str(tmp_path / "out"), "--seed", str(2**32)])
    assert "argument --seed: must be at most 4294967295, got '4294967296'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- nothing to train on
def test_how_many_bad_rows_a_stage_puts_up_with_is_an_option(data, tmp_path):
    bad = [sample(number, txt=b"") for number in range(8, 20)]
    write_tar(tmp_path / "a.tar", [*(sample(number) for number in range(8)), *bad])
    shards = [str(tmp_path / "a.tar")]
    with pytest.raises(TooManyBadRowsError, match=r"11 of \d+ rows are broken, .* or raise `--max-bad-rate`"):
        run_stage1(RECIPE, shards, Run(tmp_path / "out"), data / "tokenizer")
    assert not (tmp_path / "out").exists()
    run_stage1(RECIPE, shards, Run(tmp_path / "out", max_bad_rate=0.9), data / "tokenizer")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("value", ["-0.1", "1.5", "half", "nan"])
def test_a_share_of_bad_rows_that_is_none_is_told_at_once(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["stage3", "--output", str(tmp_path / "out"), f"--max-bad-rate={value}"])
    assert f"argument --max-bad-rate: must be a share from 0 to 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [True, False], ids=["into a folder", "without a folder"])
def test_a_shard_without_samples_is_one_line_and_no_folder(is_there, data, tmp_path, capsys):
    write_tar(tmp_path / "empty.tar", [])
    output = tmp_path / "out"
    if is_there:
        output.mkdir()
    options = ["stage1", "--data", tmp_path / "empty.tar", "--output", output, "--tokenizer", data / "tokenizer"]
    assert main([str(option) for option in options]) == 2
    errors = capsys.readouterr().err
    assert "Process 0 of 1 finds no sample in" in errors
    assert "empty.tar" in errors
    assert "Traceback" not in errors
    assert list(output.iterdir()) == [] if is_there else not output.exists()


def test_workers_that_find_nothing_save_nothing(data, tmp_path, monkeypatch):
    """The start is passed over, so that the loader is what ends."""
    write_tar(tmp_path / "empty.tar", [])
    monkeypatch.setattr(trainer, "check_has_pairs", lambda stream: None)
    with pytest.raises(ValueError, match="ended after 0 of 4 steps; nothing is saved"):
        run_stage1(RECIPE, [str(tmp_path / "empty.tar")] * 2, Run(tmp_path / "out", num_workers=2), data / "tokenizer")
    assert not (tmp_path / "out").exists()


def test_an_endless_stream_passes_over_an_epoch_without_samples(data, tmp_path, unbroken):
    """Only the first one is refused: later ones bring other shards."""
    write_tar(tmp_path / "empty.tar", [])
    shards = [str(data / "0.tar"), str(data / "1.tar"), str(tmp_path / "empty.tar")]
    run_stage1(RECIPE, shards, Run(tmp_path / "out"), data / "tokenizer")
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_query_token == 0


def test_all_processes_refuse_together_and_each_draws_its_own_random_numbers(data, tmp_path):
    for name in ("good", "bad"):
        shutil.copytree(data, tmp_path / name)
    write_tar(tmp_path / "bad" / "1.tar", [])
    first, second = two_processes.run("stage_of_two", tmp_path)
    assert first["error"] == second["error"]
    assert "1.tar" in first["error"]
    assert "of 2 finds no sample" in first["error"]
    assert not (tmp_path / "bad" / "out").exists()
    assert len(first["drawn"]) == len(second["drawn"]) == 8
    assert not any(torch.equal(*pair) for pair in zip(first["drawn"], second["drawn"], strict=True))
    # The first process draws what a process alone does.
    assert torch.equal(first["drawn"][0], numbers_drawn(data)[0])


def numbers_drawn(data: Path) -> list[torch.Tensor]:
    """Trains into DATA/out; the next random number of each step that keeps patches, without changing what comes."""
    drawn, original = [], base.drop_patches

    def watched(tokens, *arguments):
        state = torch.get_rng_state()
        drawn.append(torch.rand(1))
        torch.set_rng_state(state)
        return original(tokens, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "drop_patches", watched)
        run(data, data / "out")
    return drawn
