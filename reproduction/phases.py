"""What the stages of the default checkpoint share: phases of generated batches, Trainer's settings, and what a stage writes."""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..processing_internvl import InternVLProcessor
from ..synthetic.scenes import LAYOUTS, Layout, Scene, sample_scene
from ..training.checkpoints import LOG_FILE, WholeCheckpointTrainer
from ..training.models.whole_folders import written_whole
from ..training.optimizers import MuonWithAdamW


# On CPUs, plain matrix products in bfloat16 are twice as fast as the fused kernel at the lengths of these stages.
ATTENTION = "eager"
# A forked worker keeps a copy of every page that training writes to later, gigabytes in the end.
START_METHOD = "spawn" if sys.platform == "win32" else "forkserver"


@dataclass(frozen=True)
class Batch:
    """What a step may train on: `pictures` scenes, whose layouts are drawn by weight; chosen by `weight` itself."""

    weight: float
    pictures: int
    layouts: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        steps: Its length.
        batches: The kinds of batches that its steps draw from.
        muon_lr, adamw_lr: Peak learning rates, held until the decay.
        decay: Share of the steps over which the rates fall to zero.
        warmup_steps: Steps over which they rise.
        save_steps: Steps between two checkpoints of Trainer.
    """

    steps: int
    batches: tuple[Batch, ...]
    muon_lr: float = 6e-3
    adamw_lr: float = 2e-3
    decay: float = 0.4
    warmup_steps: int = 30
    save_steps: int = 250


class SceneBatches(Dataset):
    """A phase's data: item i is the whole batch of step i, made from the seed, the phase's name and i alone.

    Batches differ in size (few pictures with many tiles, or many of one tile), which a batch size cannot say.

    Args:
        name: Name of the phase; phases share no scene.
        phase: The phase.
        seed: The run's seed.
    """

    table: Mapping[str, Layout] = LAYOUTS  # where the names of a batch's layouts are looked up

    def __init__(self, name: str, phase: Phase, seed: int) -> None:
        self.name = name
        self.phase = phase
        self.seed = seed

    def __len__(self) -> int:
        return self.phase.steps

    def scenes(self, step: int) -> list[tuple[Scene, Random]]:
        """Return the scenes of a step, and the generator of each for what else is drawn about it."""
        rng = Random(f"{self.name}/{self.seed}/{step}")
        batch = rng.choices(self.phase.batches, weights=[batch.weight for batch in self.phase.batches])[0]
        scenes = []
        for layout in rng.choices(list(batch.layouts), weights=list(batch.layouts.values()), k=batch.pictures):
            own_rng = Random(rng.getrandbits(64))
            scenes.append((sample_scene(own_rng, self.table[layout], "train"), own_rng))
        return scenes


def only_item(items: list[Any]) -> Any:
    """Unpack a list of one: an item of `SceneBatches` is a batch already."""
    return items[0]


def training_arguments(phase: Phase, folder: Path, seed: int, use_bf16: bool) -> TrainingArguments:
    """Return the Trainer's settings of a phase; its checkpoints go into `folder`."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=1,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(phase.steps * phase.decay), "decay_type": "linear"},
        warmup_steps=phase.warmup_steps,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=use_bf16,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_multiprocessing_context=START_METHOD,
        remove_unused_columns=False,
        logging_steps=50,
        save_steps=phase.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=seed,
    )


def run_phase(
    model: nn.Module,
    groups: list[dict],
    data: SceneBatches,
    folder: Path,
    resume: bool,
    use_bf16: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train `model` for one phase.

    Args:
        model: What returns a loss for the data's items; trained in place.
        groups: Parameter groups of `MuonWithAdamW`.
        data: The phase's data.
        folder: Where Trainer keeps the phase's checkpoints.
        resume: Go on from the last of them, if there is one.
        use_bf16: Compute in bfloat16; weights stay in float32.
        callbacks: Trainer's.

    Returns:
        Trainer's log.
    """
    multiprocessing.set_forkserver_preload([__name__])  # once, and not in the worker of every phase
    trainer = WholeCheckpointTrainer(
        model=model,
        args=training_arguments(data.phase, folder, data.seed, use_bf16),
        train_dataset=data,
        data_collator=only_item,
        optimizers=(MuonWithAdamW(groups, lr=data.phase.muon_lr), None),
        callbacks=list(callbacks),
    )
    return trainer.run(resume)


def write_run(model: PreTrainedModel, processor: InternVLProcessor, log: dict[str, Any], output: Path) -> None:
    """Write a trained model, its processor and the log of its training to `output`."""
    model.set_attn_implementation("sdpa")
    with written_whole(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def command_line(description: str) -> argparse.ArgumentParser:
    """Return the command line that scripts share which train by a recipe of their own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m internvl.training.{Path(sys.argv[0]).stem}", description=description
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step in the folder")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    parser.add_argument("--fp32", action="store_true", help="for CPUs without fast bfloat16")
    return parser
