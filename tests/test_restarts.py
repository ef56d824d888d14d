"""Restarts: a resumed run goes on from its place in the data, on as many processes or, where that is exact, on another
number.
"""

import json
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from transformers import TrainingArguments

from internvl.training.checkpoints import WholeCheckpointTrainer
from internvl.training.data.pairs import PairStream
from internvl.training.data.stream_batches import places_for, stream_loader
from internvl.training.models.whole_folders import checkpoints_in, fault_of
from internvl.training.stages import Run, run_stage1
from internvl.training.trainer import StageTrainer

from . import two_processes
from .engine_jobs import StoppedError
from .fixtures_pairs import sample, write_tar
from .fixtures_text import make_tokenizer
from .test_stage_faults import RECIPE


SHARDS, PER_SHARD = 4, 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        first = shard * PER_SHARD
        write_tar(folder / f"{shard}.tar", [sample(n) for n in range(first, first + PER_SHARD)], first)
    return str(folder / "*.tar")


class Numbers:
    """A collator that writes down what it was given, in every worker."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, pairs) -> dict[str, torch.Tensor]:
        numbers = [int(pair["text"].split()[1]) for pair in pairs]
        worker = get_worker_info()
        with (self.log.parent / f"{self.log.name}.{worker.id if worker else 0}").open("a") as file:
            file.write(json.dumps(numbers) + "\n")
        return {"numbers": torch.tensor(numbers, dtype=torch.float32)}

    def collated(self) -> list[list[int]]:
        files = self.log.parent.glob(f"{self.log.name}.*")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


class Recorder(torch.nn.Module):
    """A model that remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []

    def forward(self, numbers):
        self.seen.append(numbers.int().tolist())
        return {"loss": self.weight.sum() * numbers.mean() * torch.rand(1).item()}


def trainer_for(folder: Path, shards: str, collator, workers: int, steps: int = 8, **settings):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, dataloader_num_workers=workers, logging_strategy="no",
        **{"per_device_train_batch_size": 2, "save_total_limit": 2, **settings},
    )  # fmt: skip
    stream = PairStream(shards, shuffle_buffer=4)
    return WholeCheckpointTrainer(Recorder(), arguments, data_collator=collator, train_dataset=stream)


def stop_at(trainer, step: int) -> None:
    original = trainer.training_step

    def stopping(*arguments, **settings):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    trainer.training_step = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.run(resume=False)


def test_a_kill_while_old_checkpoints_are_deleted_leaves_none_with_a_part_of_its_files(tmp_path, shards, monkeypatch):
    whole = shutil.rmtree

    def begin(path, **settings):
        """Deletes the first file of what is to be removed, and no more."""
        for file in [file for file in Path(path).rglob("*") if file.is_file()][:1]:
            file.unlink()
            raise StoppedError
        whole(path, **settings)

    settings = {"steps": 6, "save_total_limit": 1}
    trainer = trainer_for(tmp_path / "run", shards, Numbers(tmp_path / "log"), 0, **settings)
    monkeypatch.setattr("internvl.training.checkpoints.shutil.rmtree", begin)
    with pytest.raises(StoppedError):
        trainer.run(resume=False)
    monkeypatch.undo()
    left = checkpoints_in(tmp_path / "run")
    assert [entry.name for entry in left] == ["checkpoint-6"]
    assert fault_of(left[0]) is None
    trainer_for(tmp_path / "run", shards, Numbers(tmp_path / "log"), 0, **settings).run(resume=True)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (0, 2), (2, 1), (3, 2)])
def test_a_resumed_stream_collates_the_batches_that_were_left_and_no_other(workers, accumulation, shards, tmp_path):
    def trainer(name: str, log: str, prefetch: int | None = None):
        settings = {"gradient_accumulation_steps": accumulation}
        if workers and prefetch is not None:
            settings["dataloader_prefetch_factor"] = prefetch
        return trainer_for(tmp_path / name, shards, Numbers(tmp_path / log), workers, **settings)

    whole = trainer("whole", "whole_log")
    whole.run(resume=False)
    stop_at(trainer("stopped", "stopped_log"), 7)
    resumed = trainer("stopped", "resumed_log", prefetch=1)
    resumed.run(resume=True)
    assert resumed.model.seen == whole.model.seen[6 * accumulation :]
    assert len(resumed.model.seen) == 2 * accumulation
    assert torch.equal(resumed.model.weight, whole.model.weight)  # random numbers included
    collated = resumed.data_collator.collated()
    left = whole.model.seen[6 * accumulation :]
    # Workers may have begun what comes after the last step; nothing is there that was trained on before.
    ahead = workers * (1 + 1)
    assert all(batch in collated for batch in left)
    assert len(collated) <= len(left) + ahead
    if not workers:
        assert collated == left


def test_data_begins_anew_where_that_is_asked_for(shards, tmp_path):
    stop_at(trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "a"), 0), 5)
    resumed = trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "b"), 0, ignore_data_skip=True)
    resumed.run(resume=True)
    assert resumed.data_collator.collated() == resumed.model.seen
    first = trainer_for(tmp_path / "whole", shards, Numbers(tmp_path / "c"), 0)
    first.run(resume=False)
    assert resumed.model.seen == first.model.seen[:5]


def test_the_checkpoints_number_of_workers_is_taken(shards, tmp_path):
    whole = trainer_for(tmp_path / "whole", shards, Numbers(tmp_path / "a"), 2)
    whole.run(resume=False)
    stop_at(trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "b"), 2), 5)
    resumed = trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "c"), 0)
    resumed.run(resume=True)
    assert resumed.model.seen == whole.model.seen[3:]


def test_workers_without_shards_are_passed_over_as_before(shards, tmp_path):
    whole = trainer_for(tmp_path / "whole", shards, Numbers(tmp_path / "a"), 6)
    whole.run(resume=False)
    assert len({number for batch in whole.model.seen for number in batch}) > 12
    stop_at(trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "b"), 6), 7)
    resumed = trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "c"), 6)
    resumed.run(resume=True)
    assert resumed.model.seen == whole.model.seen[6:]


def test_several_checkpoints_are_kept_and_the_oldest_go(shards, tmp_path):
    trainer_for(tmp_path / "out", shards, Numbers(tmp_path / "log"), 0, steps=12).run(resume=False)
    kept = checkpoints_in(tmp_path / "out")
    assert [folder.name for folder in kept] == ["checkpoint-12", "checkpoint-9"]
    assert all(fault_of(folder) is None for folder in kept)
    assert json.loads((kept[1] / "stream_0.json").read_text())["num_batches"] == 9


# ----------------------------------------------------------------------------------------- another number of processes
def arguments_of(rank: int, world_size: int, rows: int, workers: int, tmp_path: Path):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=rows, dataloader_num_workers=workers, use_cpu=True, report_to="none"
    )
    return arguments, {"rank": rank, "world_size": world_size}


def steps_of(loaders, steps: int) -> list[list[int]]:
    """The samples of each step over all processes, by rank."""
    iterators = [iter(loader) for loader in loaders]
    return [[number for it in iterators for number in next(it)["numbers"].int().tolist()] for _ in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_fewer_processes_go_on_with_the_same_samples_in_each_step(workers, shards, tmp_path):
    def loaders(world_size: int, rows: int, places=None):
        made = []
        for rank in range(world_size):
            arguments, where = arguments_of(rank, world_size, rows, workers, tmp_path)
            stream = PairStream(shards, shuffle_buffer=4, **where)
            chosen = None if places is None else places_for(places, rank, world_size, rows)
            made.append(stream_loader(stream, Numbers(tmp_path / "log"), arguments, chosen))
        return made

    whole = steps_of(loaders(4, 1), 9)
    first = loaders(4, 1)
    assert steps_of(first, 5) == whole[:5]
    places = json.loads(json.dumps([place for loader in first for place in loader.dataset.places()]))
    for world_size in (4, 2, 1):
        resumed = loaders(world_size, 4 // world_size, places)
        iterators = [iter(loader) for loader in resumed]
        assert [next(it) for it in iterators for _ in range(5)] == [None] * 5 * world_size
        found = [[n for it in iterators for n in next(it)["numbers"].int().tolist()] for _ in range(4)]
        assert found == whole[5:]
        # Such a run can be stopped and gone on with again, on all of its first processes too.
        assert [place["rank"] for loader in resumed for place in loader.dataset.places()] == [0, 1, 2, 3]
        assert {place["num_batches"] for loader in resumed for place in loader.dataset.places()} == {9}


def test_each_sample_is_prepared_before_the_next_is_read(shards, tmp_path):
    happened = []

    class Watched(PairStream):
        def _sample(self, row):
            happened.append("read")
            return super()._sample(row)

    class Preparing:
        def prepare(self, pair):
            happened.append("prepared")
            return {**pair, "is_prepared": True}

        def __call__(self, pairs):
            happened.append("batch")
            return [pair["is_prepared"] for pair in pairs]

    arguments, where = arguments_of(0, 1, 3, 0, tmp_path)
    batches = iter(stream_loader(Watched(shards, shuffle_buffer=4, **where), Preparing(), arguments))
    assert next(batches) == next(batches) == [True] * 3
    assert happened == ["read", "prepared", "read", "prepared", "read", "prepared", "batch"] * 2


@pytest.mark.parametrize(
    ("world_size", "rows", "message"),
    [(3, 1, "begun with 4 processes.*3 processes would read samples twice"), (2, 1, "a batch has 1, and must have 2")],
)
def test_what_cannot_be_exact_is_refused_by_name(world_size, rows, message):
    places = [{"rank": rank, "world_size": 4, "rows": 1, "num_workers": 0} for rank in range(4)]
    with pytest.raises(ValueError, match=message):
        places_for(places, 0, world_size, rows)


class Rows(torch.utils.data.Dataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor([float(index)])}


@pytest.mark.parametrize(
    ("length", "strategy", "message"),
    [
        (16, "random", None),
        (100, "random", None),  # no epoch ends
        (10, "random", "a batch of 4 does not divide 10 rows"),
        (16, "group_by_length", "they are grouped by length"),
    ],
)
def test_rows_of_a_file_go_on_with_any_number_of_processes_where_steps_have_the_same(
    length, strategy, message, tmp_path, caplog
):
    """The checkpoint says that two processes wrote it, of two rows each."""

    def trainer(**settings):
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=6, save_steps=3, report_to="none",
            use_cpu=True, remove_unused_columns=False, disable_tqdm=True, train_sampling_strategy=strategy, **settings
        )  # fmt: skip
        return WholeCheckpointTrainer(Recorder(), arguments, train_dataset=Rows(length))

    trainer().run(resume=False) if strategy == "random" else Path(tmp_path / "out").mkdir()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    if strategy != "random":
        begun = trainer()
        with pytest.raises(ValueError, match=message):
            begun._check_same_batches(2, 3)
        return
    (checkpoint / "processes.json").write_text('{"processes": 2}')
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes((checkpoint / "rng_state.pth").read_bytes())
    for newer in checkpoints_in(tmp_path / "out")[:-1]:
        (newer / "trainer_state.json").unlink()
    if message is None:
        resumed = trainer()
        resumed.run(resume=True)
        assert len(resumed.model.seen) == 3
        assert "was written by 2 processes, now there are 1" in caplog.text
    else:
        with pytest.raises(ValueError, match=message):
            trainer().run(resume=True)


@contextmanager
def stopped_after_3():
    """Runs inside are stopped in their fourth step; the checkpoint of the second is the last."""
    original = StageTrainer.training_step

    def stopping(self, *arguments, **settings):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", stopping)
        yield


def calm_stage(folder: Path, name: str, **settings) -> None:
    phase = replace(RECIPE.phases[0], patch_drop_rate=0.0)
    recipe = replace(RECIPE, phases=(phase,), drop_path_rate=0.0, crop_scale=None)
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    run_stage1(recipe, shards, Run(folder / name, num_workers=1, **settings), folder / "tokenizer")


def losses_in(folder: Path) -> dict[int, float]:
    log = json.loads((folder / "training_log.json").read_text())["half_patches"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.mark.slow
def test_a_stage_begun_on_two_processes_is_finished_by_one(tmp_path, caplog):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [sample(n) for n in range(shard * 6, shard * 6 + 6)], shard * 6)
    two_processes.run("stopped_stage", tmp_path)
    part = tmp_path / "part" / "trainer" / "half_patches"
    assert [folder.name for folder in checkpoints_in(part)] == ["checkpoint-2"]
    calm_stage(tmp_path, "part", resume=True)
    assert "was written by 2 processes, now there are 1" in caplog.text
    found, wanted = losses_in(tmp_path / "part"), losses_in(tmp_path / "whole")
    assert found == pytest.approx(wanted, rel=1e-4)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "whole"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)
    places = json.loads((part / "checkpoint-4" / "stream_1.json").read_text())
    assert (places["rank"], places["world_size"], places["num_batches"]) == (1, 2, 4)
