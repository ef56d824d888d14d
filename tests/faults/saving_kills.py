"""Kills saves: after each, the folder holds the weights that it had or the new ones, never some of both.

Half of the saves are `save_pretrained` of a training model over an old folder with other weights in more files, half
are checkpoints of a `Trainer`, beside an older one. Each runs in a fork of this process, which has imported
everything.
"""

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from forks import finished, killed
from transformers import AutoModel, TrainingArguments

from internvl.training.checkpoints import WholeCheckpointTrainer
from internvl.training.models.pretraining import InternVLForContrastiveTraining
from internvl.training.models.whole_folders import checkpoints_in, fault_of, newest_whole, recovered
from tests import tiny
from tests.training_models import tiny_model


def main(kills: int, seed: int) -> None:
    """Raises AssertionError where a kill lost something.

    Args:
        kills: How many.
        seed: Of the moments.
    """
    rng = random.Random(seed)
    models = [tiny_model(InternVLForContrastiveTraining, 0) for _ in range(2)]
    tiny.randomize(models[1], seed=1)
    weights = [weights_of(model) for model in models]
    seen: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        doors = {
            "save_pretrained": SavedFolder(folder / "model", models),
            "Trainer": Checkpoints(folder / "run", models),
        }
        took = {name: max(door.time_of_a_save() for _ in range(2)) for name, door in doors.items()}
        for number in range(kills):
            name = list(doors)[number % 2]
            door = doors[name]
            door.prepare()
            killed(door.save, rng.uniform(0, 1.2 * took[name]))
            found = weights_of(door.load())
            index = next((i for i, wanted in enumerate(weights) if same(found, wanted)), None)
            assert index is not None, f"kill {number} left weights that are neither the old ones nor the new ones"
            seen[name, ("the old weights, whole", "the new weights, whole")[index]] += 1
            finished(door.save)
            assert same(weights_of(door.load()), weights[1]), f"the save after kill {number} gave other weights"
            door.check()
    print("| saved by | after the kill | times |\n|---|---|---|")
    for (name, what), count in sorted(seen.items()):
        print(f"| {name} | {what} | {count} |")
    print(f"\nUnbroken saves take {', '.join(f'{seconds:.2f} s ({name})' for name, seconds in took.items())}.")


class SavedFolder:
    """`save_pretrained` over a folder with the first model's weights in many files."""

    def __init__(self, folder: Path, models: list) -> None:
        self.folder, self.models = folder, models

    def prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.models[0].save_pretrained(self.folder, max_shard_size="8KB")

    def save(self) -> None:
        self.models[1].save_pretrained(self.folder, max_shard_size="20KB")

    def load(self) -> torch.nn.Module:
        return AutoModel.from_pretrained(recovered(self.folder))

    def check(self) -> None:
        hidden = [path.name for path in self.folder.iterdir() if path.name.startswith(".")]
        assert not hidden, f"{hidden} were left"

    def time_of_a_save(self) -> float:
        self.prepare()
        return finished(self.save)


class Checkpoints(SavedFolder):
    """The second checkpoint of a run; the first has the first model's weights."""

    def prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.checkpoint(0, 1)

    def save(self) -> None:
        self.checkpoint(1, 2)

    def checkpoint(self, number: int, step: int) -> None:
        arguments = TrainingArguments(
            str(self.folder), use_cpu=True, report_to="none", save_total_limit=1, max_steps=5
        )
        trainer = WholeCheckpointTrainer(self.models[number], arguments)
        trainer.create_optimizer_and_scheduler(5)
        trainer.state.global_step = step
        trainer._save_checkpoint(self.models[number], None)

    def load(self) -> torch.nn.Module:
        for checkpoint in checkpoints_in(self.folder):
            assert fault_of(checkpoint) is None, f"{checkpoint.name} is half-written: {fault_of(checkpoint)}"
        return AutoModel.from_pretrained(newest_whole(self.folder))

    def check(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == ["checkpoint-2"]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().reshape(-1).clone() for name, value in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
