"""Trains a head on InternViT that names every pixel: `python -m internvl.training segmentation`.

The folder of the finished model holds it with its image processor, and the log in `training_log.json`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoImageProcessor, SchedulerType, TrainerControl, TrainingArguments
from transformers.utils import logging

from ..evaluation.data.ade20k import NUM_CLASSES, SegmentedImage, class_names, random_part, segmented_images
from ..evaluation.metrics import mean_iou, pixel_accuracy
from ..evaluation.segmentation import METHOD_KEY, count_areas, window_of
from ..kinds import check_kind
from .arguments import batch_size_of, parse_flags
from .callbacks import SeedRanksDifferently
from .checkpoints import LOG_FILE, WholeCheckpointTrainer, check_same_recipe, record_recipe
from .data.segmentation_images import SegmentationCrops
from .models.build import check_whole_patches, enable_checkpointing
from .models.segmentation import build_segmenter, segmentation_groups
from .models.whole_folders import written_whole
from .output_folder import TRAINER_FOLDER, check_output, cleared_on_failure
from .recipes.segmentation import SegmentationRecipe, segmentation_recipe
from .settings_checks import settings_of
from .trainer import is_first_process, num_processes


logger = logging.get_logger(__name__)

PHASE = "segmentation"
WARMUP_START = 1e-6  # of the learning rate, published warmup_ratio
# Numbers of a recipe by the flags of `TrainingArguments` that set them.
RECIPE_NUMBERS = {"learning_rate": "learning_rate", "weight_decay": "weight_decay", "warmup_steps": "warmup_steps"}


def polynomial_schedule(steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Returns the share of the learning rate at a step: it falls linearly from the first to the last step, times a
    linear warm-up (mmcv's "poly" of power 1).
    """

    def share(step: int) -> float:
        left = max(0.0, 1 - step / steps)
        if step >= warmup_steps:
            return left
        return left * (1 - (1 - step / warmup_steps) * (1 - WARMUP_START))

    return share


class SegmentationTrainer(WholeCheckpointTrainer):
    """`Trainer` with the optimizer and the schedule of a recipe, which measures mean IoU where it evaluates.

    Args:
        recipe: The recipe.
        image_processor: Of the model.
        **settings: As for `Trainer`; `eval_dataset` is a list of images with annotations.
    """

    def __init__(self, recipe: SegmentationRecipe, image_processor: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe = recipe
        self.image_processor = image_processor
        self.model_accepts_loss_kwargs = False  # the losses are means
        self.optimizer: torch.optim.Optimizer | None
        self.lr_scheduler: Any
        self.control: TrainerControl
        self.add_callback(SeedRanksDifferently)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of `TrainingArguments.optim` with the groups of `segmentation_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(segmentation_groups(model, self.recipe), **settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the published schedule, or another one that `TrainingArguments` asks for."""
        if self.args.lr_scheduler_type != SchedulerType.LINEAR:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, polynomial_schedule(num_training_steps, self.recipe.warmup_steps))
        return self.lr_scheduler

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure mean IoU and pixel accuracy on the held-out images, of which each process takes a share."""
        model: Any = self.model
        items: Sequence[SegmentedImage] = self.eval_dataset[self.args.process_index :: self.args.world_size]
        areas = torch.zeros(3, model.config.num_labels, dtype=torch.long, device=self.args.device)
        model.eval()
        if items:
            found = count_areas(model, self.image_processor, items, window_of(model.config, self.recipe.image_size))
            areas += torch.from_numpy(found.sum(axis=0)).to(areas.device)
        model.train()
        total = self.accelerator.reduce(areas).cpu().numpy()
        metrics = {
            f"{metric_key_prefix}_miou": float(mean_iou(total)),
            f"{metric_key_prefix}_pixel_accuracy": float(pixel_accuracy(total)),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Trains a segmentation model.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.

    Raises:
        OSError: If the model or data are not there.
        ValueError: If the model is no InternViT, or settings do not fit.
    """
    flags = parse_flags(options.flags, "python -m internvl.training segmentation")
    config = check_kind(options.model, "vision", door="`segmentation`")
    check_whole_patches(options.image_size, config)
    recipe = _recipe_of(options, flags, config.patch_size)
    check_output(options.output, [options.model, options.data])
    names = class_names(options.data)
    items = random_part(segmented_images(options.data, "training"), recipe.fraction, recipe.seed)
    held_out = segmented_images(options.data, "validation")[: options.eval_images] if _measures(flags) else []
    if options.resume:
        check_same_recipe(options.output, recipe)
    logger.warning(
        f"{options.method}: {recipe.head} head{' and tower' if recipe.trains_tower else ''}, {len(items)} images, "
        f"{recipe.steps} steps of {recipe.batch_size}."
    )
    with cleared_on_failure(options.output, [PHASE], is_first_process()):
        _train(options, recipe, flags, names, items, held_out)
    if is_first_process():
        print_fn(f"The model is in {options.output}.")
        protocol = " --protocol ade20k" if len(names) == NUM_CLASSES else ""
        command = f"python -m internvl.evaluation segmentation {options.output} --data {options.data}{protocol}"
        print_fn(f"{command}  # measures it")
    return 0


def _method_name(options: argparse.Namespace) -> str:
    """The method, and where it is not all the share of the images: published figures are called so."""
    share = Fraction(options.fraction).limit_denominator(1000)
    return f"{options.method} {share}" if options.method == "few-shot" or share != 1 else options.method


def _measures(flags: dict[str, Any]) -> bool:
    if "eval_steps" in flags:
        flags.setdefault("eval_strategy", "steps")
    return flags.get("eval_strategy", "no") != "no"


def _recipe_of(options: argparse.Namespace, flags: dict[str, Any], patch_size: int) -> SegmentationRecipe:
    """The published recipe with what the command line changes."""
    recipe = segmentation_recipe(options.method, options.fraction)
    changes: dict[str, Any] = {field: flags.pop(name) for name, field in RECIPE_NUMBERS.items() if name in flags}
    changes["betas"] = tuple(flags.pop(f"adam_beta{i + 1}", beta) for i, beta in enumerate(recipe.betas))
    changes["seed"] = flags.pop("seed", options.seed)
    if options.steps is not None:
        changes.setdefault("warmup_steps", min(recipe.warmup_steps, options.steps // 10))
        changes["steps"] = options.steps
    changes["batch_size"] = batch_size_of(flags, options.batch_size) or recipe.batch_size
    side = options.image_size or recipe.image_size
    changes["image_size"] = -(-side // patch_size) * patch_size
    recipe = replace(recipe, **changes)
    warmup = recipe.warmup_steps  # below 1 it is a share, as in `TrainingArguments`
    return replace(recipe, warmup_steps=int(warmup if warmup >= 1 else warmup * recipe.steps))


def _arguments_of(recipe: SegmentationRecipe, options: argparse.Namespace, flags: dict[str, Any]) -> TrainingArguments:
    rows, rest = divmod(recipe.batch_size, num_processes())
    forwards = flags.get("gradient_accumulation_steps", 1)
    if rest or not rows or rows % forwards:
        raise ValueError(
            f"A batch of {recipe.batch_size} cannot be shared out evenly to {num_processes()} processes"
            f"{f' in {forwards} steps of accumulation' if forwards > 1 else ''}: change `--batch-size`."
        )
    settings = {
        "output_dir": str(options.output / TRAINER_FOLDER / PHASE),
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup_steps,
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "max_grad_norm": 0.0,  # the published code clips none
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": options.workers,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",  # of crops, which are in a random order
        "logging_steps": 50,
        "save_steps": 1000,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": recipe.seed,
        **flags,
        "per_device_train_batch_size": rows // forwards,
    }
    with settings_of("`TrainingArguments` of these flags"):
        return TrainingArguments(**settings)


def _train(
    options: argparse.Namespace,
    recipe: SegmentationRecipe,
    flags: dict[str, Any],
    names: Sequence[str],
    items: Sequence[SegmentedImage],
    held_out: Sequence[SegmentedImage],
) -> None:
    torch.manual_seed(recipe.seed)  # of the head's weights
    arguments = _arguments_of(recipe, options, flags)
    model: Any = build_segmenter(recipe, options.model, names)
    setattr(model.config, METHOD_KEY, _method_name(options))
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    image_processor.size = {"height": recipe.image_size, "width": recipe.image_size}
    if recipe.trains_tower:  # transformers' UperNet does not know about it, its backbone does
        enable_checkpointing(getattr(model, "backbone", model))
    if arguments.world_size > 1 and torch.cuda.is_available():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    data = SegmentationCrops(
        items,
        recipe.steps * recipe.batch_size,
        len(names),
        recipe.image_size,
        image_processor.image_mean,
        image_processor.image_std,
        recipe.seed,
    )
    with settings_of("`Trainer` with these flags"):
        trainer = SegmentationTrainer(
            recipe, image_processor, model=model, args=arguments, train_dataset=data, eval_dataset=list(held_out)
        )
    if trainer.is_world_process_zero():
        record_recipe(options.output, recipe)
    log = trainer.run(options.resume)
    _write(options.output, trainer, {"recipe": asdict(recipe), "settings": {}, PHASE: log})


def _write(output: Path, trainer: SegmentationTrainer, log: dict[str, Any]) -> None:
    is_writer = trainer.is_world_process_zero()
    with written_whole(output, is_writer) as folder:
        trainer.save_model(str(folder))
        if is_writer:
            trainer.image_processor.save_pretrained(folder)
            (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
