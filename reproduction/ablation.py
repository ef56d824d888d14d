"""What each stage is worth: `python -m internvl.reproduction.ablation --output DIR [--scale 0.1] [--seeds 3] [--resume]`.

At a share of the default run's steps, the full chat model is trained three times per seed: after all stages, without stage 1
(stage 2 starts from an untrained vision tower and LLaMA) and without stage 2 (stage 3 starts from stage 1's and untrained
queries). Each answers the same held-out questions, and the InternVL-C and -G it comes from find the same held-out pairs.
`ablation.json` holds the reports by variant and seed; `python -m internvl.reproduction.report` draws them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import stage1 as stage1_default
from . import stage2 as stage2_default
from . import stage3 as stage3_default
from .phases import command_line
from .report import evaluate_chat, mean_recalls
from .run import DefaultRun, default_run, finish, scaled


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


def train_variant(run: DefaultRun, variant: Variant, output: Path, **how: Any) -> tuple[Path, Path]:
    """The folders of stage 2 and of the full chat model, trained where they are not there yet; a stage left out still writes its
    untrained weights.

    Args:
        run: The recipes.
        variant: Which of them are used.
        output: Folder of the seed; variants share what they have in common.
        **how: `resume` and `use_bf16`.
    """
    recipe1 = run.stage1 if variant.has_stage1 else replace(run.stage1, phases={})
    recipe2 = run.stage2 if variant.has_stage2 else replace(run.stage2, phases={})
    name1 = "stage1" if variant.has_stage1 else "no_stage1"
    name2 = f"{name1}_{'stage2' if variant.has_stage2 else 'no_stage2'}"
    stage1 = finish(output / name1, recipe1, train=partial(stage1_default.train, recipe1), **how)
    stage2 = finish(output / name2, recipe2, train=partial(stage2_default.train, recipe2, stage1), **how)
    chat = finish(
        output / f"{name2}_full",
        run.chats["full"],
        train=partial(stage3_default.train, run.chats["full"], stage2),
        **how,
    )
    return stage2, chat


def ablate(
    make_run: Callable[[int], DefaultRun],
    output: Path,
    seeds: int,
    questions: int,
    pairs: int,
    resume: bool = False,
    use_bf16: bool = True,
) -> dict[str, dict[str, Any]]:
    """Trains and asks every variant with every seed.

    Args:
        make_run: Gives the recipes of a seed.
        output: Folder of all.
        seeds: How many.
        questions: Held-out questions.
        pairs: Held-out pairs of retrieval.
        resume: Go on with what was stopped.
        use_bf16: Compute in bfloat16.

    Returns:
        By variant and seed the report of `evaluate_chat`, and under "recall_at_1" that of `mean_recalls`; `output/ablation.json`
        holds it too, after each of them.

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
            # Variants share folders, so the later ones resume those of the earlier.
            stage2, chat = train_variant(
                make_run(seed), variant, output / f"seed_{seed}", resume=True, use_bf16=use_bf16
            )
            recalls = mean_recalls(stage2, pairs)
            report[name][str(seed)] = {**evaluate_chat(chat, questions), "recall_at_1": recalls}
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Run the ablation from the command line; `--seed` is the first of the seeds."""
    parser = command_line("Train the default checkpoint without one stage or another, at a small scale.")
    parser.add_argument("--scale", type=float, default=0.1, help="share of the default run's steps")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on (default: 3)")
    parser.add_argument("--questions", type=int, default=500, help="of the dialogue evaluation (default: 500)")
    parser.add_argument("--pairs", type=int, default=500, help="of the retrieval evaluation (default: 500)")
    arguments = parser.parse_args()

    def make_run(number: int) -> DefaultRun:
        return scaled(default_run(arguments.seed + number), arguments.scale)

    sizes = (arguments.seeds, arguments.questions, arguments.pairs)
    ablate(make_run, arguments.output, *sizes, arguments.resume, not arguments.fp32)


if __name__ == "__main__":
    main()
