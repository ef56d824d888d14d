"""Runs the recipes with `Trainer`: `python -m internvl.training stage1|stage2|stage3|retrieval --output DIR ...`.

A stage writes to its folder the finished model with its code and processor, which the next stage starts from, the log in
`training_log.json`, with LoRA the `adapter`, and in `trainer/PHASE` what a stopped run goes on from: the same command with
`--resume` gives the weights of an unbroken run. On several processes start the same command with `accelerate launch`.

Not covered: LoRA under ZeRO-3, where no process could merge the adapters at the end. To go on, a stream is read again up to
where it was.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..conversation_internvl import list_conversation_templates
from ..processing_internvl import InternVLProcessor
from .collators import GenerativeCollator, RetrievalCollator
from .dialogues import DialogueCollator, DialogueDataset, DialogueEncoder
from .funnel import STAGES as FUNNEL_STAGES
from .funnel import Funnel
from .pairs import PairCollator, PairStream, stream_loader
from .parameter_groups import PARTS, lora_targets, parameter_groups, train_parts
from .recipes import (
    RECIPES,
    ContrastiveRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RecipeType,
    RetrievalRecipe,
    with_steps,
)
from .stage_models import (
    Folder,
    chat_model,
    contrastive_model,
    generative_model,
    pair_processor,
    processor_of,
    retrieval_model,
)


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


class FrozenPartsWithoutGradient(TrainerCallback):
    """Where transformers checkpoints activations, it makes the embeddings of every part require gradients, of the vision tower too:
    a frozen tower would be computed again, and backward. Only reentrant checkpoints need that, and the recipes use none."""

    def on_train_begin(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Takes those hooks away, which are put in just before."""
        model.disable_input_require_grads()


class StageTrainer(Trainer):
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

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but a stream is not shared out a second time."""
        if isinstance(self.train_dataset, PairStream):
            return stream_loader(self.train_dataset, self.data_collator, self.args)
        return super().get_train_dataloader()

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
    adapters = _add_adapters(model, run)
    log: dict[str, Any] = {"recipe": asdict(recipe)}
    for number, phase in enumerate(recipe.phases):
        if isinstance(recipe, ContrastiveRecipe):
            model.dropped_patches = phase.dropped_patches
        train_parts(model, phase.rates, run.lora_parts if adapters is not None else ())
        arguments = training_arguments(recipe, phase, run, rows_per_process)
        dataset, collator = data(number, phase, arguments)
        trainer = StageTrainer(
            recipe,
            phase,
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=dataset,
            processing_class=processor,
        )
        is_resumed = run.resume and any(Path(arguments.output_dir).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=is_resumed or None)
        log[phase.name] = trainer.state.log_history
    if adapters is not None:
        # Where weights are in pieces, all processes put them together, and each merges its pieces.
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            named = {f"base_model.model.{name}": value for name, value in whole.items()}
            adapters.save_pretrained(run.output / "adapter", state_dict=named)
        adapters.merge_and_unload()
    trainer.save_model(str(run.output))
    if trainer.is_world_process_zero():
        (run.output / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return model


def _add_adapters(model: PreTrainedModel, run: Run) -> Any:
    """Puts LoRA adapters into the model; what is trained is still the model itself, so that checkpoints hold all of it."""
    if not run.lora_rank:
        return None
    from peft import LoraConfig, get_peft_model  # the extra `train`

    targets = lora_targets(model, run.lora_parts)
    return get_peft_model(model, LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules=targets))


def _stream(shards: list[str], number: int, arguments: TrainingArguments, recipe: Recipe, run: Run) -> PairStream:
    return PairStream(
        shards,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        seed=recipe.seed + number,  # the next phase goes through the data in another order
        funnel=None if run.funnel_stage is None else Funnel(run.funnel_stage),
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
    set_seed(recipe.seed)
    folder = tokenizer or source or llama
    if folder is None:
        raise ValueError("Stage 1 needs a tokenizer: give a folder with one, or a LLaMA to start from.")
    processor = pair_processor(recipe, AutoTokenizer.from_pretrained(folder))
    model = contrastive_model(recipe, processor.tokenizer, source, llama)

    def data(number: int, phase: Phase, arguments: TrainingArguments) -> Data:
        settings = {"max_length": recipe.max_text_length, **_pictures(phase.image_size)}
        return _stream(shards, number, arguments, recipe, run), PairCollator(processor, "contrastive", **settings)

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
        return _stream(shards, number, arguments, recipe, run), batches

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
    set_seed(recipe.seed)
    model, processor = chat_model(recipe, source, decoder)
    encoder = DialogueEncoder(processor, recipe.max_length)
    dataset, collator = DialogueDataset(files, encoder, images), DialogueCollator(encoder, recipe.pack)
    return train(model, processor, recipe, run, lambda *_: (dataset, collator), recipe.rows_at_a_time)


# ---------------------------------------------------------------------------------------------------- the command line
def add_command(commands: Any) -> None:
    """Adds `stage1`, `stage2`, `stage3` and `retrieval` to the sub-commands of a command line."""
    parser = _add_stage(commands, "stage1", "contrastive training of InternViT and LLaMA", "pairs")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: that of MODEL or LLAMA)")
    parser.add_argument("--model", metavar="DIR", help="InternVL-C to go on from (default: start from nothing)")
    parser.add_argument("--llama", metavar="DIR", help="LLaMA that the text encoder starts from")
    parser = _add_stage(commands, "stage2", "queries and cross-attention of QLLaMA", "pairs")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 1")
    parser.add_argument("--llama", metavar="DIR", help="LLaMA whose language head is taken (default: a fresh one)")
    parser = _add_stage(commands, "retrieval", "fine-tuning for retrieval", "pairs")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 2")
    parser.add_argument("--image-size", metavar="N", type=int, help="side of the pictures (full: 364, or 224)")
    parser = _add_stage(commands, "stage3", "instruction tuning of a chat model", "dialogues")
    parser.add_argument("--model", metavar="DIR", required=True, help="folder of stage 2")
    parser.add_argument("--decoder", metavar="DIR", required=True, help="causal language model with its tokenizer")
    parser.add_argument(
        "--connector",
        choices=("patches", "queries_and_patches"),
        default="patches",
        help="InternVL-Chat, simple (patches, the default) or full",
    )
    parser.add_argument("--freeze-language", action="store_true", help="leave the decoder as it is")
    parser.add_argument("--template", choices=list_conversation_templates(), help="conversation template")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures (default: the folder of each file)")


def _add_stage(commands: Any, name: str, what: str, data: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what)
    files = "tar or parquet shards" if data == "pairs" else "JSON arrays or JSON lines"
    parser.add_argument("--data", metavar="FILE", nargs="+", required=True, help=f"{data}: {files}")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--recipe", choices=("small", "full"), default="small", help="scale (default: small)")
    parser.add_argument("--resume", action="store_true", help="go on from what a stopped run left in the folder")
    parser.add_argument("--steps", metavar="N", type=int, help="steps of each phase, instead of the recipe's")
    parser.add_argument("--batch-size", metavar="N", type=int, help="samples of a step, instead of the recipe's")
    parser.add_argument("--workers", metavar="N", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora-rank", metavar="N", type=int, default=0, help="train LoRA adapters of this rank")
    parser.add_argument(
        "--lora-parts", metavar="PART", nargs="+", choices=PARTS, default=[], help="parts that get them"
    )
    if data == "pairs":
        parser.add_argument("--funnel", type=int, choices=FUNNEL_STAGES, help="leave out pairs by this stage's rules")
    parser.set_defaults(run=run, stage=name, funnel=None)
    return parser


def _recipe_of(options: argparse.Namespace) -> Any:
    choices = {}
    if options.stage == "stage3":
        choices = {"connector": options.connector, "freeze_language": options.freeze_language}
    if options.stage == "retrieval" and options.image_size is not None:
        choices = {"image_size": options.image_size}
    recipe = replace(RECIPES[options.stage][options.recipe](**choices), seed=options.seed)
    if getattr(options, "template", None):
        recipe = replace(recipe, template=options.template)
    if options.steps is not None:
        recipe = with_steps(recipe, options.steps)
    if options.batch_size is not None:
        phases = tuple(replace(phase, batch_size=options.batch_size) for phase in recipe.phases)
        recipe = replace(recipe, phases=phases)
    return with_lora(recipe, options.lora_parts)


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """Runs a stage.

    Args:
        options: Arguments of the command line.
        tell: Takes the lines to show.

    Returns:
        Exit code 0.

    Raises:
        ValueError: If LoRA is asked for in part.
    """
    if bool(options.lora_rank) != bool(options.lora_parts):
        raise ValueError("`--lora-rank` and `--lora-parts` belong together: give both or none.")
    recipe = _recipe_of(options)
    how = Run(
        output=options.output,
        resume=options.resume,
        num_workers=options.workers,
        lora_rank=options.lora_rank,
        lora_parts=tuple(options.lora_parts),
        funnel_stage=options.funnel,
    )
    if options.stage == "stage1":
        run_stage1(recipe, options.data, how, options.tokenizer, options.model, options.llama)
    elif options.stage == "stage2":
        run_stage2(recipe, options.data, how, options.model, options.llama)
    elif options.stage == "retrieval":
        run_retrieval(recipe, options.data, how, options.model)
    else:
        run_stage3(recipe, options.data, how, options.model, options.decoder, options.images)
    if os.environ.get("RANK", "0") == "0":
        tell(f"The model is in {options.output}.")
    return 0


__all__ = ["Run", "StageTrainer", "run_retrieval", "run_stage1", "run_stage2", "run_stage3", "train", "with_lora"]
