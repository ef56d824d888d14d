"""The bundled checkpoint from nothing: `python -m internvl.reproduction run --output DIR [--resume]`.

Strings together stage 1, stage 2, stage 3 in both configurations, and the evaluation, each in a folder of its own, by
the bundled recipes (`training/recipes/bundled.py`), and assembles what is published: in "checkpoint" the full chat
model, in its sub-folders "internvl_g" (InternVL-C and -G) and "internvit". With `--resume` finished stages are left as
they are, and a stopped one resumes from its last checkpoint.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..training.checkpoints import LOG_FILE
from ..training.recipes import (
    ContrastiveRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    RecipeType,
    stage1_bundled,
    stage2_bundled,
    stage3_bundled,
)
from ..training.stages import run_stage1, run_stage2, run_stage3
from ..training.trainer import Run
from .report import evaluate_run


CONNECTORS = {"simple": "patches", "full": "queries_and_patches"}


@dataclass(frozen=True)
class BundledRun:
    """The recipes of all stages; those of stage 3 by the names of their folders."""

    stage1: ContrastiveRecipe
    stage2: GenerativeRecipe
    chats: Mapping[str, DialogueRecipe]

    def replaced(self, **changes: Any) -> "BundledRun":
        """Return the run with these fields changed in every recipe."""
        chats = {name: replace(recipe, **changes) for name, recipe in self.chats.items()}
        return BundledRun(replace(self.stage1, **changes), replace(self.stage2, **changes), chats)


def bundled_run(seed: int = 0) -> BundledRun:
    """Return the run of the bundled checkpoint."""
    chats = {name: stage3_bundled(connector) for name, connector in CONNECTORS.items()}
    return BundledRun(stage1_bundled(), stage2_bundled(), chats).replaced(seed=seed)


def scaled(run: BundledRun, share: float) -> BundledRun:
    """Return the run with `share` of the steps of every phase."""
    chats = {name: scaled_recipe(recipe, share) for name, recipe in run.chats.items()}
    return BundledRun(scaled_recipe(run.stage1, share), scaled_recipe(run.stage2, share), chats)


def scaled_recipe(recipe: RecipeType, share: float) -> RecipeType:
    """Return the recipe with `share` of the steps of every phase, at least one; with 0 the stage trains nothing."""
    phases = []
    for phase in recipe.phases:
        steps = max(1, round(phase.steps * share)) if phase.steps and share else 0
        phases.append(replace(phase, steps=steps, warmup_steps=min(phase.warmup_steps, steps // 4)))
    return replace(recipe, phases=tuple(phases))


def train_all_stages(run: BundledRun, output: Path, resume: bool = False) -> None:
    """Train all stages, in the folders "stage1", "stage2", and one for each chat model of `output`."""
    run_stage1(run.stage1, None, stage_in(output / "stage1", resume))
    run_stage2(run.stage2, None, stage_in(output / "stage2", resume), output / "stage1")
    for name, recipe in run.chats.items():
        run_stage3(recipe, None, stage_in(output / name, resume), output / "stage2")


def stage_in(folder: Path, resume: bool) -> Run:
    """Return how a stage is run: with one process that draws scenes while the model trains."""
    return Run(folder, resume, num_workers=1)


def assemble(run: Path, output: Path) -> None:
    """Write what this repository holds of a run: the full chat model; in sub-folders the other models, which load by
    `subfolder=`, in bfloat16 to keep it small; the logs of the stages; the results, if there are any.
    """
    AutoProcessor.from_pretrained(run / "full").save_pretrained(output)
    InternVLChatForConditionalGeneration.from_pretrained(run / "full").save_pretrained(output)
    model = InternVLModel.from_pretrained(run / "stage2", dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(run / "stage2")
    for name, part in (("internvl_g", model), ("internvit", model.vision_model)):
        part.save_pretrained(output / name)
    processor.save_pretrained(output / "internvl_g")
    processor.image_processor.save_pretrained(output / "internvit")
    for file in output.glob("*/*.py"):  # transformers takes the code of sub-folders from the top
        file.replace(output / file.name)
    logs = output / "reproduction" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for log in run.glob(f"*/{LOG_FILE}"):
        shutil.copy(log, logs / f"{log.parent.name}.json")
    if (run / "results").exists():
        results = output / "reproduction" / "results"
        shutil.copytree(run / "results", results, ignore=shutil.ignore_patterns("parts"), dirs_exist_ok=True)


def run(options: argparse.Namespace) -> None:
    """Trains, evaluates and assembles, as the command line says."""
    recipes = bundled_run(options.seed).replaced(use_bf16=not options.fp32)
    train_all_stages(recipes, options.output, options.resume)
    evaluate_run(options.output, options.output / "results", resume=options.resume)
    assemble(options.output, options.output / "checkpoint")
