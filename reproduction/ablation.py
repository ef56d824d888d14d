"""What each stage is worth: `python -m internvl.reproduction ablation --output DIR [--resume]`.

At a share of the bundled run's steps, the full chat model is trained three times per seed: after all stages, without
stage 1 (stage 2 starts from an untrained vision tower and LLaMA) and without stage 2 (stage 3 starts from stage 1's
and untrained queries). Each answers the same held-out questions, and the InternVL-C and -G it comes from find the same
held-out pairs. `ablation.json` holds the reports by variant and seed; `python -m internvl.reproduction report` draws
them.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.stages import run_stage1, run_stage2, run_stage3
from .report import evaluate_chat, mean_recalls
from .run import BundledRun, bundled_run, scaled, scaled_recipe, stage_in


REPORT_FILE = "ablation.json"


@dataclass(frozen=True)
class Variant:
    """Which stages a run has."""

    has_stage1: bool = True
    has_stage2: bool = True


VARIANTS = {
    "all stages": Variant(),
    "without stage 1": Variant(has_stage1=False),
    "without stage 2": Variant(has_stage2=False),
}


def train_variant(run: BundledRun, variant: Variant, output: Path) -> tuple[Path, Path]:
    """Train the stages of a variant where they are not trained yet; a stage left out still writes its untrained
    weights. Variants share what they have in common in `output`, the folder of the seed.

    Returns:
        The folders of stage 2 and of the full chat model.
    """
    recipe1 = run.stage1 if variant.has_stage1 else scaled_recipe(run.stage1, 0)
    recipe2 = run.stage2 if variant.has_stage2 else scaled_recipe(run.stage2, 0)
    stage1 = output / ("stage1" if variant.has_stage1 else "no_stage1")
    stage2 = output / f"{stage1.name}_{'stage2' if variant.has_stage2 else 'no_stage2'}"
    chat = output / f"{stage2.name}_full"
    # Variants share folders, so the later ones resume those of the earlier.
    run_stage1(recipe1, None, stage_in(stage1, resume=True))
    run_stage2(recipe2, None, stage_in(stage2, resume=True), stage1)
    run_stage3(run.chats["full"], None, stage_in(chat, resume=True), stage2)
    return stage2, chat


def ablate(
    make_run: Callable[[int], BundledRun],
    output: Path,
    seeds: int,
    questions: int,
    pairs: int,
    resume: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate every variant with every seed, by `questions` questions and `pairs` pairs of retrieval.

    Returns:
        By variant and seed the report of `evaluate_chat`, and under "recall_at_1" that of `mean_recalls`;
        `output/ablation.json` holds it too, after each of them.

    Raises:
        ValueError: The folder holds something, and `resume` is not wanted.
    """
    if not resume and output.exists() and any(output.iterdir()):
        raise ValueError(f"`output` must be an empty folder, but {output} is not; go on with it by `--resume`.")
    output.mkdir(parents=True, exist_ok=True)
    file = output / REPORT_FILE
    report: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS}
    if file.exists():
        report.update(json.loads(file.read_text(encoding="utf-8")))
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            if str(seed) in report[name]:
                continue
            stage2, chat = train_variant(make_run(seed), variant, output / f"seed_{seed}")
            recalls = mean_recalls(stage2, pairs)
            report[name][str(seed)] = {**evaluate_chat(chat, questions), "recall_at_1": recalls}
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def run(options: argparse.Namespace) -> None:
    """Runs the ablation, as the command line says; `--seed` is the first of the seeds."""

    def make_run(number: int) -> BundledRun:
        return scaled(bundled_run(options.seed + number), options.scale).replaced(use_bf16=not options.fp32)

    ablate(make_run, options.output, options.seeds, options.questions, options.pairs, options.resume)
