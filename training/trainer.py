"""`Trainer` for a recipe: its optimizer, schedule and learning curve, and the loop over its phases.

A run writes to its folder the finished model with its code and processor, the log in `training_log.json`, with LoRA
the `adapter`, and in `trainer/PHASE` the checkpoints that a stopped run resumes from.

Not covered: LoRA under ZeRO-3, where no process could merge the adapters at the end. To resume, a stream is read again
up to where it was.
"""

import json
import multiprocessing
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..extras import extra
from ..processing_internvl import InternVLProcessor
from .callbacks import EvaluateEvery, KeepFrozenPartsWithoutGradient, SeedRanksDifferently
from .checkpoints import LOG_FILE, WholeCheckpointTrainer, check_same_recipe, record_recipe
from .data import generated
from .data.pairs import PairStream
from .data.streams import stream_loader
from .models.build import set_up_phase
from .models.dense_supervision import TokenReader
from .models.parameter_groups import lora_targets, parameter_groups, train_parts
from .models.whole_folders import checkpoints_in, recovered, written_whole
from .optimizers import MuonWithAdamW
from .recipes import Phase, Recipe, RecipeType


logger = logging.get_logger(__name__)

# What a phase trains on: the dataset, and the collator that makes its batches.
Data = tuple[Dataset, Callable[[Any], dict[str, Any]]]
# Measures a model in evaluation mode.
Curve = Callable[[Any], dict[str, float]]
LORA_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Run:
    """How to run a stage.

    Args:
        output: Folder of the stage.
        resume: Resume what a stopped run left in it.
        num_workers: Processes that prepare the batches.
        lora_rank: Rank of the LoRA adapters; 0 for none.
        lora_parts: Parts that get adapters and keep their own weights.
        funnel_stage: Leave out pairs by the filters of the data funnel up to this stage; None takes all.
    """

    output: Path
    resume: bool = False
    num_workers: int = 0
    lora_rank: int = 0
    lora_parts: tuple[str, ...] = ()
    funnel_stage: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide about the weights."""
        return {"lora_rank": self.lora_rank, "lora_parts": self.lora_parts, "funnel_stage": self.funnel_stage}


class StageTrainer(WholeCheckpointTrainer):
    """`Trainer` with the optimizer and the learning curve of a recipe, which reads streams as they are.

    The means of what a model returns as `loss_...` are logged beside the loss.

    Args:
        recipe: The recipe.
        phase: One of its phases.
        curve: Measures the model every `recipe.eval_steps` steps; None measures nothing.
        **settings: As for `Trainer`.
    """

    def __init__(self, recipe: Recipe, phase: Phase, curve: Curve | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe = recipe
        self.phase = phase
        self.curve = curve
        self.optimizer: torch.optim.Optimizer | None
        self._loss_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        if recipe.gradient_checkpointing:
            self.add_callback(KeepFrozenPartsWithoutGradient)
        self.add_callback(SeedRanksDifferently)
        if curve is not None and recipe.eval_steps is not None:
            self.add_callback(EvaluateEvery(recipe.eval_steps))

    def make_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but a stream is not sharded a second time."""
        if isinstance(self.train_dataset, PairStream):
            return stream_loader(self.train_dataset, self.data_collator, self.args)
        return super().make_train_dataloader()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW, or Muon with AdamW, with the groups of `parameter_groups`."""
        if self.optimizer is None:
            recipe, muon_rate = self.recipe, self.phase.muon_learning_rate
            groups = parameter_groups(
                self.model if model is None else model,
                self.phase.learning_rates,
                recipe.weight_decay,
                recipe.layer_decay,
                muon_rate,
            )
            if muon_rate is None:
                self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
            else:
                self.optimizer = MuonWithAdamW(groups, lr=muon_rate, betas=recipe.betas)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **settings: Any
    ) -> Any:
        """Compute the loss, and collect its parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **settings)
        for name, value in outputs.items() if isinstance(outputs, dict) else ():
            if name.startswith("loss_"):
                self._loss_parts[name].append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log with the means of the parts of the loss since the entry before; these are the process's own."""
        if "loss" in logs or "train_loss" in logs:
            logs |= {name: float(sum(values)) / len(values) for name, values in self._loss_parts.items()}
            self._loss_parts.clear()
        super().log(logs, *arguments, **settings)

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """Measure a point of the learning curve; as in `Trainer` where there is none."""
        if self.curve is None:
            return super().evaluate(*arguments, **settings)
        model: Any = self.model
        model.eval()
        metrics = self.curve(model)
        model.train()
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def num_processes() -> int:
    """Return the number of processes of this run, as launchers give it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this is the process that writes, as launchers give it."""
    return os.environ.get("RANK", "0") == "0"


def training_arguments(
    recipe: Recipe, phase: Phase, run: Run, rows_per_process: int | None = None
) -> TrainingArguments:
    """Build `Trainer`'s settings of a phase.

    Args:
        recipe: The recipe.
        phase: One of its phases.
        run: How to run it.
        rows_per_process: Rows of a process in one forward; fewer than its share of the batch are accumulated.

    Raises:
        ValueError: If the batch cannot be shared out evenly.
    """
    share, rest = divmod(phase.batch_size, num_processes())
    rows = min(rows_per_process or share, share)
    if rest or not rows or share % rows:
        raise ValueError(
            f"A batch of {phase.batch_size} cannot be shared out evenly to {num_processes()} processes with {rows} "
            "rows at a time. Change `batch_size` or `grad_cache_chunk_size` of the recipe."
        )
    settings: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    if phase.cooldown_fraction is not None:
        settings["lr_scheduler_type"] = "warmup_stable_decay"
        cooldown_steps = int(phase.steps * phase.cooldown_fraction)
        settings["lr_scheduler_kwargs"] = {"num_decay_steps": cooldown_steps, "decay_type": "linear"}
    if recipe.gradient_checkpointing:
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if phase.batches:
        settings["train_sampling_strategy"] = "sequential"
        if run.num_workers:
            multiprocessing.set_forkserver_preload([generated.__name__])  # once, and not in the worker of every phase
            settings["dataloader_multiprocessing_context"] = generated.START_METHOD
    return TrainingArguments(
        output_dir=str(run.output / "trainer" / phase.name),
        max_steps=phase.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        learning_rate=max(phase.learning_rates.values()),
        warmup_steps=phase.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.use_bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=run.num_workers,
        remove_unused_columns=False,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=recipe.seed,
        **settings,
    )


def with_lora(recipe: RecipeType, parts: Iterable[str], learning_rate: float = LORA_LEARNING_RATE) -> RecipeType:
    """Return the recipe with a learning rate for all these parts: those that no phase trains are trained in the last.

    Args:
        recipe: The recipe.
        parts: Parts that get adapters.
        learning_rate: Learning rate of the parts that had none.
    """
    *first, last = recipe.phases
    known = {part for phase in recipe.phases for part in phase.learning_rates}
    added = {part: learning_rate for part in parts if part not in known}
    return replace(recipe, phases=(*first, replace(last, learning_rates={**last.learning_rates, **added})))


# ------------------------------------------------------------------------------------------------------- the phases
def train(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    recipe: Recipe,
    run: Run,
    data: Callable[[int, Phase, TrainingArguments], Data],
    rows_per_process: int | None = None,
    curve: Curve | None = None,
) -> PreTrainedModel:
    """Train all phases of a recipe and write the finished folder.

    Args:
        model: The model that the stage starts from; trained in place.
        processor: Its processor.
        recipe: The recipe.
        run: How to run it.
        data: Takes a phase's number, the phase and the settings, and returns what it trains on.
        rows_per_process: As in `training_arguments`.
        curve: As in `StageTrainer`.

    Returns:
        The model.
    """
    with _cleared_on_failure(run):
        _train_phases(model, processor, recipe, run, data, rows_per_process, curve)
    return model


def _train_phases(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    recipe: Recipe,
    run: Run,
    data: Callable[[int, Phase, TrainingArguments], Data],
    rows_per_process: int | None,
    curve: Curve | None,
) -> None:
    attention = model.config._attn_implementation
    if recipe.attn_implementation is not None:
        model.set_attn_implementation(recipe.attn_implementation)
    adapters = _add_adapters(model, run)
    log: dict[str, Any] = {"recipe": asdict(recipe), "settings": run.settings()}
    trainer = None
    for number, phase in enumerate(recipe.phases):
        if not phase.steps:
            continue
        is_first = trainer is None
        trainer = _phase_trainer(model, processor, recipe, run, number, data, rows_per_process, curve)
        if is_first and trainer.is_world_process_zero():
            _mark_begun(recipe, run)
        log[phase.name] = trainer.run(run.resume)
        if isinstance(trainer.model, TokenReader):
            trainer.model.name_tokens(model.get_input_embeddings().get_parameter("weight"), processor.tokenizer)
    if recipe.attn_implementation is not None:
        model.set_attn_implementation(attention)
    _write(model, processor, run, log, adapters, trainer)


def _phase_trainer(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    recipe: Recipe,
    run: Run,
    number: int,
    data: Callable[[int, Phase, TrainingArguments], Data],
    rows_per_process: int | None,
    curve: Curve | None,
) -> StageTrainer:
    phase = recipe.phases[number]
    set_up_phase(model, recipe, phase)
    trained = TokenReader(model) if phase.dense_supervision else model
    idle = train_parts(trained, phase.learning_rates, run.lora_parts if run.lora_rank else ())
    if idle:
        logger.warning(f"Phase {phase.name}: no forward uses {', '.join(idle)}, which stay as they are.")
    arguments = training_arguments(recipe, phase, run, rows_per_process)
    dataset, collator = data(number, phase, arguments)
    if isinstance(dataset, PairStream):
        check_has_pairs(dataset)
    return StageTrainer(
        recipe,
        phase,
        curve,
        model=trained,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
    )


def _write(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    run: Run,
    log: dict[str, Any],
    adapters: Any,
    trainer: StageTrainer | None,
) -> None:
    """Writes the finished folder; `trainer` is that of the last phase, None where all phases were skipped."""
    is_writer = is_first_process() if trainer is None else trainer.is_world_process_zero()
    with written_whole(run.output, is_writer) as folder:
        if adapters is not None and trainer is not None:
            # Where weights are in pieces, all processes put them together, and each merges its pieces.
            whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if is_writer:
                named = {f"base_model.model.{name}": value for name, value in whole.items()}
                adapters.save_pretrained(folder / "adapter", state_dict=named)
            adapters.merge_and_unload()
        if trainer is not None and trainer.model is model:
            trainer.save_model(str(folder))
        elif is_writer:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        if is_writer:
            (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    if trainer is not None:
        trainer.accelerator.wait_for_everyone()


def check_has_pairs(stream: PairStream) -> None:
    """Look for a first pair that every process can train on, so that none waits for another that has nothing.

    Args:
        stream: Stream of this process; its position is left as it is.

    Raises:
        ValueError: In all processes alike, if one finds none; it names them and their shards.
    """
    reason = ""
    try:
        next(iter(stream.from_the_beginning()))
    except (ValueError, OSError) as error:
        reason = str(error)
    reasons = gather_object([reason])
    if any(reasons):
        found = "; ".join(f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        raise ValueError(f"There is nothing to train on for {found}")


def _add_adapters(model: PreTrainedModel, run: Run) -> Any:
    """Puts LoRA adapters into the model; what is trained is still the model itself, so that checkpoints hold all of
    it.
    """
    if not run.lora_rank:
        return None
    with extra("train"):
        from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, run.lora_parts)
    return get_peft_model(model, LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules=targets))


# ------------------------------------------------------------------------------------------------- the output folder
def finished_model(recipe: Recipe, run: Run) -> PreTrainedModel | None:
    """Inspect the output folder before anything else is done.

    Args:
        recipe: The recipe.
        run: How to run it.

    Returns:
        The model of a finished stage that was to be resumed, which nothing changes any more; None where there is work.

    Raises:
        ValueError: If the folder holds a run of another recipe, or a stopped one that was not to be resumed.
    """
    if is_first_process():
        recovered(run.output)
    is_finished = (run.output / LOG_FILE).is_file()
    if run.resume:
        check_same_recipe(run.output, recipe, **run.settings())
    elif not is_finished and any(checkpoints_in(folder) for folder in (run.output / "trainer").glob("*")):
        raise ValueError(
            f"{run.output} holds a run that was stopped: go on with it by `--resume`, or take another folder."
        )
    if not (run.resume and is_finished):
        return None
    logger.warning(f"The stage in {run.output} is finished; nothing is changed.")
    return AutoModel.from_pretrained(run.output)


@contextmanager
def _cleared_on_failure(run: Run) -> Iterator[None]:
    """A start that fails before its first checkpoint leaves no folder behind."""
    trainer, was_there = run.output / "trainer", run.output.exists()
    try:
        yield
    finally:
        is_of_use = (run.output / LOG_FILE).exists() or any(map(checkpoints_in, trainer.glob("*")))
        if is_first_process() and not is_of_use:
            shutil.rmtree(trainer, ignore_errors=True)
            if not was_there and run.output.exists() and not any(run.output.iterdir()):
                run.output.rmdir()


def _mark_begun(recipe: Recipe, run: Run) -> None:
    """Removes what a finished run has left, and records the recipe of this one."""
    if not run.resume:
        shutil.rmtree(run.output / "trainer", ignore_errors=True)
        (run.output / LOG_FILE).unlink(missing_ok=True)
    record_recipe(run.output, recipe, **run.settings())
