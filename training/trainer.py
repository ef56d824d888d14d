"""`Trainer` for a recipe: its optimizer, schedule and learning curve, and the loop over its phases.

A run writes to its folder the finished model with its code and processor, the log in `training_log.json`, with LoRA
the `adapter`, and in `trainer/PHASE` the checkpoints that a stopped run resumes from.

Not covered: LoRA under ZeRO-3, where no process could merge the adapters at the end.
"""

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import AutoModel, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..extras import extra
from ..processing_internvl import InternVLProcessor
from .callbacks import EvaluateEvery, KeepFrozenPartsWithoutGradient, Profile, SeedRanksDifferently, log_samples
from .checkpoints import LOG_FILE, check_same_recipe, record_recipe
from .data import generated
from .data.sources import LengthGroups
from .data.stream_batches import Stream
from .long_runs import LongRunTrainer
from .models.build import set_dtypes, set_up_phase
from .models.dense_supervision import TokenReader
from .models.parameter_groups import lora_targets, parameter_groups, train_parts
from .models.sharding import unshard
from .models.whole_folders import recovered, written_whole
from .optimizers import MuonWithAdamW
from .output_folder import check_output, cleared_on_failure, is_begun, remove_start
from .recipes import Phase, Recipe, RecipeType
from .settings_checks import check_best_metric, check_late_settings, check_launcher, settings_of


logger = logging.get_logger(__name__)

# What a phase trains on: the dataset, and the collator that makes its batches.
Data = tuple[Dataset, Callable[[Any], dict[str, Any]]]
# What a phase trains on, by its number, the phase and the settings of `Trainer`.
DataOfPhase = Callable[[int, Phase, TrainingArguments], Data]
# Measures a model in evaluation mode.
Curve = Callable[[Any], dict[str, float]]
LORA_LEARNING_RATE = 1e-4
PROFILES = "profile"
# `gradient_checkpointing` is its name in transformers 5.19.
_NAMES = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
# Arguments of `TrainingArguments` besides the recipe's numbers without which a resumed run would give other weights.
DECIDING_ARGUMENTS = frozenset(
    {
        "adam_epsilon",
        "data_seed",
        "fp16",
        "gradient_accumulation_steps",
        "ignore_data_skip",
        "load_best_model_at_end",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "metric_for_best_model",
        "neftune_noise_alpha",
        "optim",
        "optim_args",
        "per_device_train_batch_size",
        "train_sampling_strategy",
    }
)


@dataclass(frozen=True)
class Run:
    """How to run a stage.

    Args:
        output: Folder of the stage.
        resume: Resume what a stopped run left in it.
        num_workers: Processes that prepare the batches.
        lora_rank: Rank of the LoRA adapters; 0 for none.
        lora_parts: Parts that get adapters and keep their own weights.
        is_streamed: Read dialogues front to back, without an index of their rows.
        funnel_stage: Leave out pairs by the filters of the data funnel up to this stage; None takes all.
        images: Folder of the images that rows name by a path; None takes the folder of each file.
        max_bad_rate: Largest share of rows that cannot be used, of at least 1,000.
        inputs: Models and files of data that the stage reads, as `reading` sets them.
        eval_data: Files of held-out data, on which the stage is measured as it trains.
        eval_samples: Most held-out samples that are searched, or whose questions are answered.
        profile_steps: Steps of each phase that are recorded by torch's profiler, in `profile/PHASE`.
        arguments: Arguments of `TrainingArguments` that replace those of the recipe, see `arguments.apply_flags`.
    """

    output: Path
    resume: bool = False
    num_workers: int = 0
    lora_rank: int = 0
    lora_parts: tuple[str, ...] = ()
    is_streamed: bool = False
    funnel_stage: int | None = None
    images: str | None = None
    max_bad_rate: float = 0.01
    inputs: tuple[str | Path, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_samples: int = 200
    profile_steps: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide about the weights."""
        deciding = {name: value for name, value in self.arguments.items() if name in DECIDING_ARGUMENTS}
        return {
            "lora_rank": self.lora_rank,
            "lora_parts": self.lora_parts,
            "funnel_stage": self.funnel_stage,
            "is_streamed": self.is_streamed,
            "arguments": deciding,
            "inputs": [Path(os.path.abspath(path)).name for path in self.inputs],  # a resumed run may have moved
        }

    def reading(self, *inputs: str | Path | None) -> "Run":
        """Return the run with what it reads."""
        return replace(self, inputs=tuple(path for path in inputs if path is not None))


@dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out data while a stage trains.

    Args:
        dataset: Data whose loss is computed, of the kind that is trained on.
        measure: Measures the model in evaluation mode; its values are logged as `eval_NAME` beside the loss.
    """

    dataset: Dataset
    measure: Curve | None = None


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to be trained.

    Args:
        model: The model that the stage starts from; trained in place.
        processor: Its processor.
        recipe: The recipe.
        run: How to run it.
        data: Returns what a phase trains on.
        rows_per_process: Rows of a process in one forward; fewer than its share of the batch are accumulated. None
            means all.
        curve: Measures the model every `recipe.eval_steps` steps; None measures nothing.
        evaluation: What is measured on held-out data, at the times of `Trainer`'s `eval_strategy`.
    """

    model: PreTrainedModel
    processor: InternVLProcessor
    recipe: Recipe
    run: Run
    data: DataOfPhase
    rows_per_process: int | None = None
    curve: Curve | None = None
    evaluation: Evaluation | None = None


class StageTrainer(LongRunTrainer):
    """`Trainer` with the optimizer and the learning curve of a recipe, which reads streams as they are.

    The means of what a model returns as `loss_...` are logged beside the loss.

    Args:
        stage: The stage.
        phase: One of the phases of its recipe.
        **settings: As for `Trainer`.
    """

    def __init__(self, stage: Stage, phase: Phase, **settings: Any) -> None:
        super().__init__(stage.recipe, **settings)
        self.recipe = stage.recipe
        self.phase = phase
        self.curve = stage.curve
        self.measure = None if stage.evaluation is None else stage.evaluation.measure
        self.optimizer: torch.optim.Optimizer | None
        self._loss_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        if self.args.gradient_checkpointing:
            self.add_callback(KeepFrozenPartsWithoutGradient)
        self.add_callback(SeedRanksDifferently)
        if self.curve is not None and self.recipe.eval_steps is not None:
            self.add_callback(EvaluateEvery(self.recipe.eval_steps))
        if stage.run.profile_steps:
            self.add_callback(Profile(stage.run.profile_steps, stage.run.output / PROFILES / phase.name))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of `TrainingArguments.optim`, or Muon with AdamW, with the groups of `parameter_groups`.

        Raises:
            ValueError: If the optimizer takes no groups of parameters.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            recipe, muon_rate = self.recipe, self.phase.muon_learning_rate
            groups = parameter_groups(
                model,
                self.phase.learning_rates,
                recipe.weight_decay,
                recipe.layer_decay,
                muon_rate,
                recipe.qllama_layer_decay,
                recipe.decay_inputs,
            )
            if muon_rate is None:
                kind, settings = self._optimizer_kind(model)
                self.optimizer = kind(groups, **settings)
            else:
                self.optimizer = MuonWithAdamW(groups, lr=muon_rate, betas=recipe.betas)
        return self.optimizer

    def _optimizer_kind(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        try:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        except ImportError as error:
            raise ValueError(f"`optim` {self.args.optim}: {error}") from error
        takes_groups = isinstance(kind, type) and {"params", "model", "optimizer_dict"}.isdisjoint(settings)
        if not takes_groups:
            raise ValueError(
                f"`optim` {self.args.optim} chooses parameters itself, but a recipe has a learning rate for each "
                "part: take one of the AdamW, Adafactor, Lion or SGD optimizers."
            )
        return kind, settings

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`; of a schedule that phases share, the stretch of this phase.

        Raises:
            ValueError: If the kind of schedule has no stretches.
        """
        if self.lr_scheduler is not None or not self.recipe.one_schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        start, length, _ = self.recipe.schedule_of(self.phase)
        scheduler: Any = super().create_scheduler(length, optimizer)
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(
                f"The phases of this recipe share a schedule, which `lr_scheduler_type` {self.args.lr_scheduler_type} "
                "cannot be: take one that depends on the step alone."
            )
        scheduler.last_epoch = start
        rates = [rate * share(start) for rate, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        return scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As in `Trainer`, which would encode every row to group rows by length, where these know about their own."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups(rows, dataset.lengths, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **settings: Any
    ) -> Any:
        """Compute the loss, and collect its parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **settings)
        if model.training and isinstance(outputs, dict):
            for name in (name for name in outputs if name.startswith("loss_")):
                self._loss_parts[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss of held-out data alone: logits of all tokens would fill the memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log with the means of the parts of the loss since the entry before; these are the process's own."""
        if "loss" in logs or "train_loss" in logs:
            logs |= {name: float(sum(values)) / len(values) for name, values in self._loss_parts.items()}
            self._loss_parts.clear()
        super().log(logs, *arguments, **settings)

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """Measure a point of the learning curve, if there is one, and held-out data as in `Trainer`."""
        if self.curve is None:
            return super().evaluate(*arguments, **settings)
        metrics = self._measured(self.curve)
        self.log(metrics)
        if self.eval_dataset is not None:
            return {**metrics, **super().evaluate(*arguments, **settings)}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **settings: Any) -> EvalLoopOutput:
        """Compute the loss of held-out data, and what else the stage measures on it."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **settings)
        if self.measure is not None:
            found = self._measured(self.measure)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
            samples = getattr(self.measure, "samples", None)
            if samples and self.is_world_process_zero():
                log_samples(samples, self.state.global_step, self.args.output_dir, self.callback_handler.callbacks)
        return output

    def _measured(self, measure: Curve) -> dict[str, float]:
        model: Any = self.model
        model.eval()
        metrics = measure(model)
        model.train()
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
        rows_per_process: As in `Stage`.

    Raises:
        ValueError: If the batch cannot be shared out evenly, or a library refuses a setting.
    """
    check_launcher()
    rows, num_forwards = _rows_and_forwards(phase, run, rows_per_process)
    settings: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    if phase.cooldown_fraction is not None and "lr_scheduler_type" not in run.arguments:
        settings["lr_scheduler_type"] = "warmup_stable_decay"
        cooldown_steps = int(recipe.schedule_of(phase)[1] * phase.cooldown_fraction)
        settings["lr_scheduler_kwargs"] = {"num_decay_steps": cooldown_steps, "decay_type": "linear"}
    if recipe.gradient_checkpointing:
        settings |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    if phase.batches:
        settings["train_sampling_strategy"] = "sequential"
        if run.num_workers:
            multiprocessing.set_forkserver_preload([generated.__name__])  # once, and not in the worker of every phase
            settings["dataloader_multiprocessing_context"] = generated.START_METHOD
    if run.eval_data:
        settings["eval_strategy"] = "epoch"
    settings |= {
        "output_dir": str(run.output / "trainer" / phase.name),
        "max_steps": phase.steps,
        "learning_rate": max(phase.learning_rates.values()),
        "warmup_steps": recipe.schedule_of(phase)[2],
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.use_bf16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": run.num_workers,
        "remove_unused_columns": False,
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.save_total_limit,
        "report_to": "none",
        "seed": recipe.seed,
        **run.arguments,
    }
    # What the batch of the recipe comes to.
    settings |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": num_forwards}
    settings.setdefault("per_device_eval_batch_size", rows)
    with settings_of("`TrainingArguments` of these flags"):
        arguments = TrainingArguments(**settings)
    check_late_settings(arguments)
    return arguments


def _rows_and_forwards(phase: Phase, run: Run, rows_per_process: int | None) -> tuple[int, int]:
    """Rows of a process in one forward, and the forwards of a step."""
    share, rest = divmod(phase.batch_size, num_processes())
    steps = run.arguments.get("gradient_accumulation_steps")  # of several forwards
    rows_per_process = share // steps if steps else rows_per_process
    rows = min(run.arguments.get("per_device_train_batch_size") or rows_per_process or share, share)
    if rest or not rows or share % rows or (steps and rows * steps != share):
        forwards = f" in {steps} steps of accumulation" if steps else ""
        raise ValueError(
            f"A batch of {phase.batch_size} cannot be shared out evenly to {num_processes()} processes with {rows} "
            f"rows at a time{forwards}. Change `batch_size` or `grad_cache_chunk_size` of the recipe."
        )
    return rows, share // rows


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
def train(stage: Stage) -> PreTrainedModel:
    """Train all phases of a recipe and write the finished folder.

    Returns:
        The model.
    """
    phases = [phase.name for phase in stage.recipe.phases]
    with cleared_on_failure(stage.run.output, phases, is_first_process()):
        _train_phases(stage)
    return stage.model


def _train_phases(stage: Stage) -> None:
    model, recipe, run = stage.model, stage.recipe, stage.run
    set_dtypes(recipe, model, run.lora_parts)
    attention = model.config._attn_implementation
    if recipe.attn_implementation is not None:
        model.set_attn_implementation(recipe.attn_implementation)
    adapters = _add_adapters(model, run)
    log: dict[str, Any] = {"recipe": asdict(recipe), "settings": run.settings(), "arguments": dict(run.arguments)}
    trainer = None
    for number, phase in enumerate(recipe.phases):
        if not phase.steps:
            continue
        is_first = trainer is None
        if trainer is not None and trainer.is_fsdp_enabled:
            is_efficient = trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
            unshard(trainer.model, is_keeper=not is_efficient or trainer.is_world_process_zero())
        trainer = _phase_trainer(stage, number)
        if is_first and trainer.is_world_process_zero():
            _mark_begun(recipe, run)
        log[phase.name] = trainer.run(run.resume)
        if isinstance(trainer.model, TokenReader):
            embeddings = model.get_input_embeddings().get_parameter("weight")
            trainer.model.name_tokens(embeddings, stage.processor.tokenizer)
    if recipe.attn_implementation is not None:
        model.set_attn_implementation(attention)
    _write(stage, log, adapters, trainer)


def _phase_trainer(stage: Stage, number: int) -> StageTrainer:
    recipe, run = stage.recipe, stage.run
    phase = recipe.phases[number]
    set_up_phase(stage.model, recipe, phase)
    trained = TokenReader(stage.model) if phase.dense_supervision else stage.model
    idle = train_parts(trained, phase.learning_rates, run.lora_parts if run.lora_rank else ())
    if idle:
        logger.warning(f"Phase {phase.name}: no forward uses {', '.join(idle)}, which stay as they are.")
    arguments = training_arguments(recipe, phase, run, stage.rows_per_process)
    if stage.evaluation is not None:
        check_best_metric(arguments, stage.evaluation.measure, stage.model)
    dataset, collator = stage.data(number, phase, arguments)
    if isinstance(dataset, Stream):
        check_has_pairs(dataset)
    with settings_of("`Trainer` with these flags"):
        return StageTrainer(
            stage,
            phase,
            model=trained,
            args=arguments,
            data_collator=collator,
            train_dataset=dataset,
            eval_dataset=None if stage.evaluation is None else stage.evaluation.dataset,
            processing_class=stage.processor,
        )


def _write(stage: Stage, log: dict[str, Any], adapters: Any, trainer: StageTrainer | None) -> None:
    """Writes the finished folder; `trainer` is that of the last phase, None where all phases were skipped."""
    model, run = stage.model, stage.run
    is_writer = is_first_process() if trainer is None else trainer.is_world_process_zero()
    if trainer is not None and trainer.average is not None:
        trainer.average.swap()
    if trainer is not None:
        _check_finite(model)
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
            stage.processor.save_pretrained(folder)
        if is_writer:
            (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    if trainer is not None:
        trainer.accelerator.wait_for_everyone()


def _check_finite(model: nn.Module) -> None:
    """Refuses, in all processes alike, a model whose training diverged."""
    found = []
    for name, parameter in model.named_parameters():
        values = getattr(parameter, "ds_tensor", parameter.data)  # of a parameter that ZeRO-3 has cut up
        values = values.to_local() if isinstance(values, DTensor) else values
        if not torch.isfinite(values).all():
            found.append(name)
    names = sorted(set(gather_object(found)))
    if names:
        raise ValueError(
            f"{len(names)} weights are not finite ({names[0]}), so no model is written: train in another folder, with "
            "lower learning rates."
        )


def check_has_pairs(stream: Stream) -> None:
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
        ValueError: If the folder holds anything but a run, a run of another recipe, or one that was not to be resumed.
    """
    check_output(run.output, (*run.inputs, *run.eval_data, run.images))
    if is_first_process():
        recovered(run.output)
    is_finished = (run.output / LOG_FILE).is_file()
    if run.resume:
        check_same_recipe(run.output, recipe, **run.settings())
    elif is_finished:
        raise ValueError(f"{run.output} holds a finished run: take another folder, or delete it.")
    elif is_begun(run.output):
        raise ValueError(
            f"{run.output} holds a run that was stopped: go on with it by `--resume`, or take another folder."
        )
    if not (run.resume and is_finished):
        return None
    logger.warning(f"The stage in {run.output} is finished; nothing is changed.")
    return AutoModel.from_pretrained(run.output)


def _mark_begun(recipe: Recipe, run: Run) -> None:
    """Records the recipe of this run, in place of one that was stopped before its first checkpoint."""
    if not run.resume:
        remove_start(run.output, [phase.name for phase in recipe.phases])
    record_recipe(run.output, recipe, **run.settings())
