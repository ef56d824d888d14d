"""Runs the recipes with `Trainer`: `python -m internvl.training stage1|stage2|stage3|retrieval --output DIR ...`.

A stage writes to its folder the finished model with its code and processor, which the next stage starts from, the log in
`training_log.json`, with LoRA the `adapter`, and in `trainer/PHASE` what a stopped run goes on from: the same command with
`--resume` gives the weights of an unbroken run. On several processes start the same command with `accelerate launch`.

Not covered: LoRA under ZeRO-3, where no process could merge the adapters at the end. To go on, a stream is read again up to
where it was.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from ..processing_internvl import InternVLProcessor
from .checkpoints import LOG_FILE, WholeCheckpointTrainer, check_same_recipe, record_recipe
from .data.collators import GenerativeCollator, RetrievalCollator
from .data.dialogues import DialogueCollator, DialogueDataset, DialogueEncoder
from .data.filters import Funnel
from .data.pairs import PairCollator, PairStream, stream_loader
from .models.build import (
    Folder,
    chat_model,
    contrastive_model,
    fitting,
    generative_model,
    pair_processor,
    processor_of,
    retrieval_model,
)
from .models.parameter_groups import lora_targets, parameter_groups, train_parts
from .models.whole_folders import checkpoints_in, recovered, written_whole
from .recipes import (
    ContrastiveRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RecipeType,
    RetrievalRecipe,
)


logger = logging.get_logger(__name__)

# What a phase trains on: the dataset, and the collator that makes its batches.
Data = tuple[Dataset, Callable[[Any], dict[str, Any]]]
LORA_RATE = 1e-4


@dataclass(frozen=True)
class Run:
    """How to run, whatever the stage.

    Args:
        output: Folder of the stage.
        resume: Go on from what a stopped run left in it.
        num_workers: Processes that prepare the batches.
        lora_rank: Rank of the LoRA adapters; 0 for none.
        lora_parts: Parts that get adapters and keep their own weights.
        funnel_stage: Leave out pairs by the rules of the data funnel up to this stage; None takes all.
    """

    output: Path
    resume: bool = False
    num_workers: int = 0
    lora_rank: int = 0
    lora_parts: tuple[str, ...] = ()
    funnel_stage: int | None = None

    def settings(self) -> dict[str, Any]:
        """What of this decides about the weights."""
        return {"lora_rank": self.lora_rank, "lora_parts": self.lora_parts, "funnel_stage": self.funnel_stage}


class FrozenPartsWithoutGradient(TrainerCallback):
    """Where transformers checkpoints activations, it makes the embeddings of every part require gradients, of the vision tower too:
    a frozen tower would be computed again, and backward. Only reentrant checkpoints need that, and the recipes use none."""

    def on_train_begin(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Takes those hooks away, which are put in just before."""
        model.disable_input_require_grads()


class RanksDrawTheirOwn(TrainerCallback):
    """Random numbers that differ between processes: kept patches, stochastic depth, hard negatives. `Trainer` seeds all processes
    alike, which the weights and the order of the data need; the first process goes on with that."""

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Seeds this process, where it is not the first; a checkpoint brings each process's own state."""
        if args.process_index:
            set_seed(args.seed + args.process_index)


class StageTrainer(WholeCheckpointTrainer):
    """`Trainer` with the learning rates of a recipe, which reads streams as they are.

    Args:
        recipe: The recipe.
        phase: Its phase.
        **settings: As for `Trainer`.
    """

    def __init__(self, recipe: Recipe, phase: Phase, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe = recipe
        self.phase = phase
        self.optimizer: torch.optim.Optimizer | None
        self.add_callback(FrozenPartsWithoutGradient)
        self.add_callback(RanksDrawTheirOwn)

    def make_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but a stream is not shared out a second time."""
        if isinstance(self.train_dataset, PairStream):
            return stream_loader(self.train_dataset, self.data_collator, self.args)
        return super().make_train_dataloader()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the groups of `parameter_groups`."""
        if self.optimizer is None:
            recipe = self.recipe
            groups = parameter_groups(
                self.model if model is None else model, self.phase.rates, recipe.weight_decay, recipe.layer_decay
            )
            self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
        return self.optimizer


def num_processes() -> int:
    """Processes of this run, as launchers tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(
    recipe: Recipe, phase: Phase, run: Run, rows_per_process: int | None = None
) -> TrainingArguments:
    """`Trainer`'s settings of a phase.

    Args:
        recipe: The recipe.
        phase: Its phase.
        run: How to run it.
        rows_per_process: Rows of a process in one forward; fewer than its share of the batch are accumulated.

    Raises:
        ValueError: If the batch cannot be shared out evenly.
    """
    share, rest = divmod(phase.batch_size, num_processes())
    rows = min(rows_per_process or share, share)
    if rest or not rows or share % rows:
        raise ValueError(
            f"A batch of {phase.batch_size} cannot be shared out evenly to {num_processes()} processes with {rows} rows at "
            "a time. Change `batch_size` or `rows_at_a_time` of the recipe."
        )
    checkpointing: dict[str, Any] = {}
    if recipe.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(run.output / "trainer" / phase.name),
        max_steps=phase.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        learning_rate=max(phase.rates.values()),
        lr_scheduler_type="cosine",
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
        **checkpointing,
    )


def with_lora(recipe: RecipeType, parts: Iterable[str], rate: float = LORA_RATE) -> RecipeType:
    """The recipe with a learning rate for all these parts: those that no phase trains are trained in the last.

    Args:
        recipe: The recipe.
        parts: Parts that get adapters.
        rate: Learning rate of the parts that had none.
    """
    *first, last = recipe.phases
    known = {part for phase in recipe.phases for part in phase.rates}
    added = {part: rate for part in parts if part not in known}
    return replace(recipe, phases=(*first, replace(last, rates={**last.rates, **added})))


def train(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    recipe: Recipe,
    run: Run,
    data: Callable[[int, Phase, TrainingArguments], Data],
    rows_per_process: int | None = None,
) -> PreTrainedModel:
    """Trains all phases of a recipe and writes the finished folder.

    Args:
        model: What the stage starts from; trained in place.
        processor: Its processor.
        recipe: The recipe.
        run: How to run it.
        data: Given a phase's number, the phase and the settings, what it trains on.
        rows_per_process: As in `training_arguments`.

    Returns:
        The model.
    """
    with _cleared_on_failure(run):
        return _train(model, processor, recipe, run, data, rows_per_process)


def _train(
    model: PreTrainedModel,
    processor: InternVLProcessor,
    recipe: Recipe,
    run: Run,
    data: Callable[[int, Phase, TrainingArguments], Data],
    rows_per_process: int | None,
) -> PreTrainedModel:
    adapters = _add_adapters(model, run)
    log: dict[str, Any] = {"recipe": asdict(recipe), "settings": run.settings()}
    for number, phase in enumerate(recipe.phases):
        if isinstance(recipe, ContrastiveRecipe):
            model.dropped_patches = phase.dropped_patches
        idle = train_parts(model, phase.rates, run.lora_parts if adapters is not None else ())
        if idle:
            logger.warning(f"Phase {phase.name}: no forward uses {', '.join(idle)}, which stay as they are.")
        arguments = training_arguments(recipe, phase, run, rows_per_process)
        dataset, collator = data(number, phase, arguments)
        if isinstance(dataset, PairStream):
            check_has_pairs(dataset)
        trainer = StageTrainer(
            recipe,
            phase,
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=dataset,
            processing_class=processor,
        )
        if number == 0 and trainer.is_world_process_zero():
            _mark_begun(recipe, run)
        log[phase.name] = trainer.run(run.resume)
    is_writer = trainer.is_world_process_zero()
    with written_whole(run.output, is_writer) as folder:
        if adapters is not None:
            # Where weights are in pieces, all processes put them together, and each merges its pieces.
            whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if is_writer:
                named = {f"base_model.model.{name}": value for name, value in whole.items()}
                adapters.save_pretrained(folder / "adapter", state_dict=named)
            adapters.merge_and_unload()
        trainer.save_model(str(folder))
        if is_writer:
            (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return model


def check_has_pairs(stream: PairStream) -> None:
    """Looks for a first pair that every process can train on, so that none waits for another that has nothing.

    Args:
        stream: Of this process; what it gives is left as it is.

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


# ----------------------------------------------------------------------------------------------------- the output folder
def finished_model(recipe: Recipe, run: Run) -> PreTrainedModel | None:
    """Looks at the output folder before anything else is done.

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
    """Takes away what a finished run has left, and records what this one does."""
    if not run.resume:
        shutil.rmtree(run.output / "trainer", ignore_errors=True)
        (run.output / LOG_FILE).unlink(missing_ok=True)
    record_recipe(run.output, recipe, **run.settings())


def is_first_process() -> bool:
    """Whether this is the process that writes, as launchers tell."""
    return os.environ.get("RANK", "0") == "0"


def _add_adapters(model: PreTrainedModel, run: Run) -> Any:
    """Puts LoRA adapters into the model; what is trained is still the model itself, so that checkpoints hold all of it."""
    if not run.lora_rank:
        return None
    from peft import LoraConfig, get_peft_model  # the extra `train`

    targets = lora_targets(model, run.lora_parts)
    return get_peft_model(model, LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules=targets))


def _stream(
    shards: list[str],
    number: int,
    arguments: TrainingArguments,
    recipe: Recipe,
    run: Run,
    processor: InternVLProcessor,
) -> PairStream:
    return PairStream(
        shards,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        seed=recipe.seed + number,  # the next phase goes through the data in another order
        funnel=None if run.funnel_stage is None else Funnel(run.funnel_stage),
        max_image_pixels=processor.image_processor.max_image_pixels,
        background_color=processor.image_processor.background_color,
    )


def _pictures(side: int) -> dict[str, Any]:
    """Settings of the image processor for pictures of one tile."""
    return {"size": {"height": side, "width": side}, "resize_mode": "squash"}


def run_stage1(
    recipe: ContrastiveRecipe,
    shards: list[str],
    run: Run,
    tokenizer: Folder | None = None,
    source: Folder | None = None,
    llama: Folder | None = None,
) -> PreTrainedModel:
    """Contrastive training; the folder it writes is an InternVL-C.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, see `PairStream`.
        run: How to run it.
        tokenizer: Folder of the tokenizer; by default that of `source` or `llama`.
        source: Folder of an InternVL-C to go on from.
        llama: Folder of a LLaMA that the text encoder starts from.

    Returns:
        The trained model.

    Raises:
        ValueError: If there is no tokenizer.
    """
    recipe = fitting(recipe, source)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    folder = tokenizer or source or llama
    if folder is None:
        raise ValueError("Stage 1 needs a tokenizer: give a folder with one, or a LLaMA to start from.")
    processor = pair_processor(recipe, AutoTokenizer.from_pretrained(folder))
    model = contrastive_model(recipe, processor.tokenizer, source, llama)

    def data(number: int, phase: Phase, arguments: TrainingArguments) -> Data:
        settings = {"max_length": recipe.max_text_length, **_pictures(phase.image_size)}
        return _stream(shards, number, arguments, recipe, run, processor), PairCollator(
            processor, "contrastive", **settings
        )

    return train(model, processor, recipe, run, data)


def run_stage2(
    recipe: GenerativeRecipe, shards: list[str], run: Run, source: Folder, llama: Folder | None = None
) -> PreTrainedModel:
    """Generative training; the folder it writes is an InternVL-G.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, see `PairStream`.
        run: How to run it.
        source: Folder of stage 1.
        llama: Folder of the LLaMA whose language head is taken; None starts it from nothing.

    Returns:
        The trained model.
    """
    recipe = fitting(recipe, source)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    processor = processor_of(source, recipe)
    prefix_lengths = GenerativeCollator(processor, recipe.max_text_length).prefix_lengths()
    model = generative_model(recipe, source, prefix_lengths, llama)
    return train(model, processor, recipe, run, _pair_data(GenerativeCollator, recipe, shards, processor, run))


def run_retrieval(recipe: RetrievalRecipe, shards: list[str], run: Run, source: Folder) -> PreTrainedModel:
    """Retrieval fine-tuning; the folder it writes is an InternVL-G.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, one for each caption of a picture.
        run: How to run it.
        source: Folder of stage 2.

    Returns:
        The trained model.
    """
    recipe = fitting(recipe, source)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    processor = processor_of(source, recipe)
    model = retrieval_model(recipe, source)
    return train(model, processor, recipe, run, _pair_data(RetrievalCollator, recipe, shards, processor, run))


def _pair_data(
    collator: type[GenerativeCollator],
    recipe: GenerativeRecipe | RetrievalRecipe,
    shards: list[str],
    processor: InternVLProcessor,
    run: Run,
) -> Callable[[int, Phase, TrainingArguments], Data]:
    def data(number: int, phase: Phase, arguments: TrainingArguments) -> Data:
        batches = collator(processor, recipe.max_text_length, **_pictures(phase.image_size))
        return _stream(shards, number, arguments, recipe, run, processor), batches

    return data


def run_stage3(
    recipe: DialogueRecipe,
    files: list[str],
    run: Run,
    source: Folder,
    decoder: Folder,
    images: Folder | None = None,
) -> PreTrainedModel:
    """Instruction tuning; the folder it writes is an InternVL-Chat.

    Args:
        recipe: The recipe.
        files: Dialogues, see `DialogueDataset`.
        run: How to run it.
        source: Folder of stage 2.
        decoder: Folder of a causal language model with its tokenizer.
        images: Folder of the pictures; None takes the folder of each file.

    Returns:
        The trained model.
    """
    recipe = fitting(recipe, source)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    model, processor = chat_model(recipe, source, decoder)
    encoder = DialogueEncoder(processor, recipe.max_length)
    dataset, collator = DialogueDataset(files, encoder, images), DialogueCollator(encoder, recipe.pack)
    return train(model, processor, recipe, run, lambda *_: (dataset, collator), recipe.rows_at_a_time)


__all__ = [
    "Run",
    "StageTrainer",
    "check_has_pairs",
    "finished_model",
    "is_first_process",
    "run_retrieval",
    "run_stage1",
    "run_stage2",
    "run_stage3",
    "train",
    "with_lora",
]
