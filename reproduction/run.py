"""The default checkpoint from nothing: `python -m internvl.reproduction.run --output DIR [--resume]`.

Runs stage 1, stage 2, stage 3 in both configurations, and the evaluation, each into a folder of its own, and puts together
what is published: in "checkpoint" the full chat model, in its sub-folders "internvl_g" (InternVL-C and -G) and "internvit".
With `--resume` what is finished is left as it is, and what was stopped goes on from its last saved step.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoProcessor
from transformers.utils import logging

from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..training.checkpoints import LOG_FILE, check_same_recipe, record_recipe
from ..training.models.whole_folders import recovered
from . import stage1 as stage1_default
from . import stage2 as stage2_default
from . import stage3 as stage3_default
from .phases import Phase, command_line
from .report import Sizes, evaluate_run
from .stage1 import Stage1Recipe
from .stage2 import Stage2Recipe
from .stage3 import CONNECTORS, Stage3Recipe


logger = logging.get_logger(__name__)
PhaseType = TypeVar("PhaseType", bound=Phase)


@dataclass(frozen=True)
class DefaultRun:
    """The recipes of all stages.

    Args:
        stage1: Of stage 1.
        stage2: Of stage 2.
        chats: Of stage 3, by the name of its folder.
    """

    stage1: Stage1Recipe
    stage2: Stage2Recipe
    chats: Mapping[str, Stage3Recipe]


def default_run(seed: int = 0) -> DefaultRun:
    """The default checkpoint's run."""
    return DefaultRun(
        replace(stage1_default.stage1(), seed=seed),
        replace(stage2_default.stage2(), seed=seed),
        {name: replace(stage3_default.stage3(connector), seed=seed) for name, connector in CONNECTORS.items()},
    )


def scaled(run: DefaultRun, share: float) -> DefaultRun:
    """The same run with `share` of the steps of every phase."""
    chats = {
        name: replace(
            recipe,
            seeing=_scaled_phase(recipe.seeing, share),
            connecting=_scaled_phase(recipe.connecting, share),
            answering=_scaled_phase(recipe.answering, share),
        )
        for name, recipe in run.chats.items()
    }
    return DefaultRun(
        replace(run.stage1, phases=_scaled_phases(run.stage1.phases, share)),
        replace(run.stage2, phases=_scaled_phases(run.stage2.phases, share)),
        chats,
    )


def _scaled_phases(phases: Mapping[str, PhaseType], share: float) -> dict[str, PhaseType]:
    return {name: _scaled_phase(phase, share) for name, phase in phases.items()}


def _scaled_phase(phase: PhaseType, share: float) -> PhaseType:
    steps = max(1, round(phase.steps * share)) if phase.steps else 0
    return replace(phase, steps=steps, warmup_steps=min(phase.warmup_steps, steps // 4))


def finish(folder: Path, recipe: Any, resume: bool, train: Callable[..., None], **how: Any) -> Path:
    """Trains into `folder`, unless `resume` is wanted and all is there already; returns the folder.

    Raises:
        ValueError: If the folder holds a run of another recipe that was to be resumed.
    """
    if resume:
        check_same_recipe(recovered(folder), recipe)
    if resume and (folder / LOG_FILE).exists():
        logger.warning("%s is finished", folder)
    else:
        record_recipe(folder, recipe)
        train(output=folder, resume=resume, **how)
    return folder


def train(run: DefaultRun, output: Path, resume: bool = False, use_bf16: bool = True) -> None:
    """Train all stages.

    Args:
        run: The recipes.
        output: Its folders "stage1", "stage2", and one for each chat model are written.
        resume: Go on with what was stopped.
        use_bf16: Compute in bfloat16; weights stay in float32.
    """
    how = {"resume": resume, "use_bf16": use_bf16}
    stage1 = finish(output / "stage1", run.stage1, train=partial(stage1_default.train, run.stage1), **how)
    stage2 = finish(output / "stage2", run.stage2, train=partial(stage2_default.train, run.stage2, stage1), **how)
    for name, recipe in run.chats.items():
        finish(output / name, recipe, train=partial(stage3_default.train, recipe, stage2), **how)


def assemble(run: Path, output: Path) -> None:
    """Writes what this repository holds of a run: the full chat model; in sub-folders the other models, which load by
    `subfolder=`; the logs of the stages; the results, if there are any.

    Args:
        run: Folder of all stages.
        output: Of the checkpoint. To keep it small, the weights in the sub-folders are bfloat16.
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


def main() -> None:
    """Train, evaluate and assemble from the command line."""
    arguments = command_line("Train all stages of the default checkpoint from nothing and evaluate them.").parse_args()
    train(default_run(arguments.seed), arguments.output, arguments.resume, not arguments.fp32)
    evaluate_run(arguments.output, arguments.output / "results", Sizes(), arguments.resume)
    assemble(arguments.output, arguments.output / "checkpoint")


if __name__ == "__main__":
    main()
