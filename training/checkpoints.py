"""A `Trainer` whose checkpoints appear whole and hold its place in the data, and the record by which a run knows that
it goes on as it began.
"""

import json
import shutil
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..writing import write_whole
from .data.stream_batches import Stream, StreamBatches, places_for, stream_loader
from .models.whole_folders import (
    INCOMPLETE,
    PROCESSES_FILE,
    checkpoints_in,
    fault_of,
    newest_whole,
    processes_of,
    step_of,
)
from .recipes import Phase


logger = logging.get_logger(__name__)

LOG_FILE = "training_log.json"  # written last, so a folder that has it is finished
RECORD_FILE = "trainer/run.json"
RENAMED_FIELDS = {
    "rates": "learning_rates",
    "dropped_patches": "patch_drop_rate",
    "rows_at_a_time": "grad_cache_chunk_size",
}


class WholeCheckpointTrainer(Trainer):
    """`Trainer` whose checkpoints are written beside their names and renamed when all processes are done, and whose
    `save_total_limit` never takes the last whole one. A phase that is finished is loaded and runs no step.

    A checkpoint holds where each process is in a `Stream`, so that a resumed run reads on from there.
    """

    _is_saving = False
    _is_finished = False
    _places: list[dict[str, Any]] | None = None
    _stream_batches: StreamBatches | None = None

    def run(self, resume: bool, processes: int | None = None) -> list[dict[str, Any]]:
        """Trains to the end.

        Args:
            resume: Go on from the newest whole checkpoint, if there is one.
            processes: That wrote it, where it does not say itself; None for as many as there are now.

        Returns:
            The log.

        Raises:
            ValueError: If the data ended before the last step, or this number of processes cannot go on with the same
                samples in each step.
        """
        folder = self.args.output_dir
        if self.args.should_save:
            shutil.rmtree(Path(folder, INCOMPLETE), ignore_errors=True)
        checkpoint = newest_whole(folder, processes or self.args.world_size) if resume else None
        self._is_finished = checkpoint is not None and (step_of(checkpoint) or 0) >= self.args.max_steps
        if checkpoint is not None:
            self._find_place(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.state.global_step < self.args.max_steps:
            raise ValueError(
                f"The data ended after {self.state.global_step} of {self.args.max_steps} steps; nothing is saved."
            )
        # The last entry is about the steps of this call, of which a finished phase has none.
        return self.state.log_history[:-1] if self._is_finished else self.state.log_history

    # ------------------------------------------------------------------------------------------- the place in the data
    def _find_place(self, checkpoint: Path) -> None:
        """Reads where this process goes on, and refuses a number of processes that cannot go on exactly."""
        if self._is_finished or self.args.ignore_data_skip:
            return
        world_size, files = self.args.world_size, sorted(checkpoint.glob("stream_*.json"))
        earlier = processes_of(checkpoint) or world_size
        if earlier != world_size:
            logger.warning(
                f"{checkpoint} was written by {earlier} processes, now there are {world_size}: each step has the same "
                "samples, but random numbers begin anew."
            )
        if files:
            places = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            places.sort(key=lambda place: place["rank"])
            rows = self.args.per_device_train_batch_size
            self._places = places_for(places, self.args.process_index, world_size, rows)
        elif earlier != world_size:
            self._check_same_batches(earlier, step_of(checkpoint) or 0)

    def _check_same_batches(self, earlier: int, step: int) -> None:
        """Samples of a step do not depend on the number of processes, but for the end of an epoch and for sorting."""
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        name = type(self.train_dataset).__name__
        if isinstance(self.train_dataset, Stream):
            raise ValueError(f"The checkpoint does not say where its {earlier} processes were in `{name}`.")
        num_rows = len(self.train_dataset)
        is_sorted = self.args.train_sampling_strategy == "group_by_length"
        if is_sorted or (num_rows % batch and self.args.max_steps * batch > num_rows):
            reason = (
                "they are grouped by length" if is_sorted else f"a batch of {batch} does not divide {num_rows} rows"
            )
            raise ValueError(
                f"The run was begun with {earlier} processes and cannot go on with {self.args.world_size} after step "
                f"{step}: which samples a step has depends on the number of processes, because {reason}."
            )

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but a stream is not sharded a second time, and goes on from its place. Of a finished phase
        a single batch that nobody reads, by which no epoch is left.
        """
        if self._is_finished:
            return DataLoader([None])  # type: ignore[arg-type]
        if isinstance(self.train_dataset, Stream):
            loader = stream_loader(self.train_dataset, self.data_collator, self.args, self._places)
            self._stream_batches = loader.dataset  # type: ignore[assignment]
            return loader
        return super().get_train_dataloader()

    def _save_places(self, checkpoint: Path) -> None:
        for place in self._stream_batches.places() if self._stream_batches is not None else ():
            write_whole(checkpoint / f"stream_{place['rank']}.json", json.dumps(place))
        if self.args.should_save:
            write_whole(checkpoint / PROCESSES_FILE, json.dumps({"processes": self.args.world_size}))

    # --------------------------------------------------------------------------------------------- whole checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, but a finished model is whole also where checkpoints are in shards."""
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, INCOMPLETE)) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(final / INCOMPLETE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            name = f"checkpoint-{self.state.global_step}"
            self._save_more(final / INCOMPLETE / name)
            self._name_best(final, name)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._put_in_place(final)
        self.accelerator.wait_for_everyone()

    def _save_more(self, checkpoint: Path) -> None:
        """What `Trainer` does not save, in all processes."""
        self._save_places(checkpoint)

    def _name_best(self, folder: Path, name: str) -> None:
        """Gives the state the final name of this checkpoint where it is the best so far."""
        if self.state.best_model_checkpoint == str(folder / INCOMPLETE / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / INCOMPLETE / name / TRAINER_STATE_NAME))

    def _put_in_place(self, folder: Path) -> None:
        """Gives the new checkpoint its name and removes those that are not kept, each whole until it is out of sight:
        a kill while files are deleted leaves none of them with only a part of its files.
        """
        name = f"checkpoint-{self.state.global_step}"
        removed = folder / INCOMPLETE / "removed"
        removed.mkdir()
        if (folder / name).exists():  # one that was not whole, or this run would be beyond it
            (folder / name).rename(removed / name)
        (folder / INCOMPLETE / name).rename(folder / name)
        others = [entry for entry in checkpoints_in(folder) if entry.name != name]
        whole = [entry for entry in others if fault_of(entry, self.args.world_size) is None]
        limit = self.args.save_total_limit
        kept = whole if limit is None else whole[: max(limit - 1, 0)]
        for entry in others:
            if entry not in kept and str(entry) != self.state.best_model_checkpoint:
                entry.rename(removed / entry.name)
        shutil.rmtree(folder / INCOMPLETE, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- the record
def check_same_recipe(folder: Path, recipe: Any, **settings: Any) -> None:
    """Refuses to go on with other numbers than those of the run that is in a folder.

    Args:
        folder: Of the run; one without a record passes.
        recipe: The recipe, a dataclass.
        **settings: What else decides about the weights.

    Raises:
        ValueError: Naming every field that differs, with what it was and what it is.
    """
    record = recorded(folder)
    if record is None:
        return
    found = _as_json({**asdict(recipe), **settings})
    differing = [
        difference for name in found if name in record for difference in _differences(name, record[name], found[name])
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another recipe: {'; '.join(differing)}. Resume with the recipe it was begun "
            "with, or take another folder."
        )


def recorded(folder: Path) -> dict[str, Any] | None:
    """The recipe and settings of the run in a folder, None where there is no run.

    Raises:
        ValueError: If the file that has them is not a record.
    """
    for name in (LOG_FILE, RECORD_FILE):
        if (folder / name).is_file():
            return _renewed(_record_in(folder / name))
    return None


def _record_in(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is broken JSON: {error}") from error
    parts: list[Any] = [record.get("recipe"), record.get("settings", {})] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{file} is not the record of a run: take another folder.")
    phases = parts[0].get("phases", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ValueError(f"{file} has no list of phases: take another folder.")
    return {**parts[0], **parts[1]}


def _renewed(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the words of today: fields under their new names, and defaults for what phases did not have."""
    record = {RENAMED_FIELDS.get(name, name): value for name, value in record.items()}
    phases = record.get("phases")
    if isinstance(phases, list):
        known = {entry.name: entry.default for entry in fields(Phase) if entry.default is not MISSING}
        record["phases"] = _as_json(
            [{**known, **{RENAMED_FIELDS.get(name, name): value for name, value in phase.items()}} for phase in phases]
        )
    return record


def record_recipe(folder: Path, recipe: Any, **settings: Any) -> None:
    """Writes what `check_same_recipe` compares with."""
    record = {"recipe": asdict(recipe), "settings": settings}
    write_whole(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _differences(name: str, was: Any, is_now: Any) -> list[str]:
    """`path: was X, is Y` for each leaf that differs."""
    if isinstance(was, dict) and isinstance(is_now, dict):
        keys = dict.fromkeys([*was, *is_now])
        return [line for key in keys for line in _differences(f"{name}.{key}", was.get(key), is_now.get(key))]
    if isinstance(was, list) and isinstance(is_now, list) and len(was) == len(is_now):
        pairs = zip(was, is_now, strict=True)
        return [line for number, pair in enumerate(pairs) for line in _differences(f"{name}[{number}]", *pair)]
    return [] if was == is_now else [f"`{name}` was {was!r:.80}, is {is_now!r:.80}"]
