"""A `Trainer` whose checkpoints appear whole, and the record by which a run knows that it goes on as it began."""

import json
import shutil
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from .models.whole_folders import INCOMPLETE, checkpoints_in, fault_of, newest_whole, step_of, write_text_whole
from .recipes import Phase


LOG_FILE = "training_log.json"  # written last, so a folder that has it is finished
RECORD_FILE = "trainer/run.json"
RENAMED_FIELDS = {
    "rates": "learning_rates",
    "dropped_patches": "patch_drop_rate",
    "rows_at_a_time": "grad_cache_chunk_size",
}


class WholeCheckpointTrainer(Trainer):
    """`Trainer` whose checkpoints are written beside their names and renamed when all processes are done, and whose
    `save_total_limit` never takes the last whole one. A phase that is finished is loaded and runs no step."""

    _is_saving = False
    _is_finished = False

    def run(self, resume: bool, processes: int | None = None) -> list[dict[str, Any]]:
        """Trains to the end.

        Args:
            resume: Go on from the newest whole checkpoint, if there is one.
            processes: That wrote it; None for as many as there are now.

        Returns:
            The log.

        Raises:
            ValueError: If the data ended before the last step.
        """
        folder = self.args.output_dir
        checkpoint = newest_whole(folder, processes or self.args.world_size) if resume else None
        self._is_finished = checkpoint is not None and (step_of(checkpoint) or 0) >= self.args.max_steps
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.state.global_step < self.args.max_steps:
            raise ValueError(
                f"The data ended after {self.state.global_step} of {self.args.max_steps} steps; nothing is saved."
            )
        # The last entry is about the steps of this call, of which a finished phase has none.
        return self.state.log_history[:-1] if self._is_finished else self.state.log_history

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; of a finished phase a single batch that nobody reads, by which no epoch is left."""
        return DataLoader([None]) if self._is_finished else self.make_train_dataloader()  # type: ignore[arg-type]

    def make_train_dataloader(self) -> DataLoader:
        """The loader of a phase that is trained."""
        return super().get_train_dataloader()

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
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._put_in_place(final)
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, folder: Path) -> None:
        name = f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder / name, ignore_errors=True)  # one that was not whole, or this run would be beyond it
        (folder / INCOMPLETE / name).rename(folder / name)
        (folder / INCOMPLETE).rmdir()
        others = [entry for entry in checkpoints_in(folder) if entry.name != name]
        whole = [entry for entry in others if fault_of(entry, self.args.world_size) is None]
        limit = self.args.save_total_limit
        kept = whole if limit is None else whole[: max(limit - 1, 0)]
        for entry in others:
            if entry not in kept:
                shutil.rmtree(entry, ignore_errors=True)


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
    """The recipe and settings of the run in a folder, None where there is no run."""
    for name in (LOG_FILE, RECORD_FILE):
        if (folder / name).is_file():
            record = json.loads((folder / name).read_text(encoding="utf-8"))
            return _renewed({**record.get("recipe", {}), **record.get("settings", {})})
    return None


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
    write_text_whole(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


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
