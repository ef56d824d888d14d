"""Training runs for the tests of engines: `python -m tests.engine_jobs JOB FOLDER`, alone or under `accelerate
launch`.

Every process writes what it found to FOLDER/JOB-rank0.pt, FOLDER/JOB-rank1.pt. A run is stock `Trainer`, on dialogues
with the chat model or on pairs with those of stages 1 and 2.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from internvl.configuration_internvl import InternVLChatConfig
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.processing_internvl import InternVLProcessor
from internvl.training import stages, trainer
from internvl.training.checkpoints import WholeCheckpointTrainer
from internvl.training.data.collators import GenerativeCollator
from internvl.training.data.dialogues import DialogueCollator, DialogueDataset, DialogueEncoder
from internvl.training.data.pairs import PairCollator, PairStream
from internvl.training.data.stream_batches import stream_loader
from internvl.training.models.parameter_groups import train_parts
from internvl.training.models.pretraining import InternVLForContrastiveTraining, InternVLForGenerativeTraining
from internvl.training.recipes import stage1, stage2, stage2_small

from . import fixtures_processing, tiny
from .fixtures_dialogues import llava
from .fixtures_pairs import sample, write_tar
from .fixtures_processing import SEQ
from .fixtures_text import make_image, make_tokenizer
from .training_models import tiny_model


ROOT = Path(__file__).parents[1]
CONNECTORS = ("patches", "queries_and_patches")
PAIR_STAGES = {
    "stage 1": (InternVLForContrastiveTraining, 0, stage1),
    "stage 2": (InternVLForGenerativeTraining, 5, stage2),
}
STEPS = 5
STOPPED_AFTER = 3
SAVED_AFTER = 2


# ----------------------------------------------------------------------------------------------------------- launching
def command_of(engine: str, job: str, folder: Path, *options: str) -> list[str]:
    """A launch with the shipped configuration of an engine; the machine may have no card, so without bf16."""
    config = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    settings = ["--config_file", str(config), "--mixed_precision", "no", *options]
    program = ["-m", "tests.engine_jobs", job, str(folder)]
    return [sys.executable, "-m", "accelerate.commands.launch", *settings, *program]


def launch_on_two_machines(engine: str, job: str, folder: Path, *options: str) -> list[dict]:
    """Runs a job on two processes each of two machines, which two launches on this one stand in for."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ("--num_processes", "4", "--main_process_ip", "127.0.0.1", "--main_process_port", port, *options)
    machines = [
        subprocess.Popen(
            command_of(engine, job, folder, "--num_machines", "2", "--machine_rank", str(rank), *options),
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=1200)[0] for machine in machines]
    for machine, output in zip(machines, outputs, strict=True):
        assert machine.returncode == 0, output[-6000:]
    return [torch.load(folder / f"{job}-rank{rank}.pt") for rank in range(4)]


def launch(engine: str | None, job: str, folder: Path, dies: bool = False, **environment: str) -> list[dict]:
    """Runs a job in processes of its own: two with the shipped configuration of an engine, or one without any."""
    command = [sys.executable, "-m", "tests.engine_jobs", job, str(folder)]
    if engine is not None:
        command = command_of(engine, job, folder, "--num_processes", "2", "--main_process_port", "0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    output = done.stdout + done.stderr
    if dies:
        assert done.returncode != 0
        assert engine is None or "SIGKILL" in output, output[-6000:]
        return []
    assert done.returncode == 0, output[-6000:]
    return [torch.load(folder / f"{job}-rank{rank}.pt") for rank in range(1 if engine is None else 2)]


class StoppedError(Exception):
    """A run was stopped."""


class Stop(TrainerCallback):
    """The end of a run in its midst, or of its process, as when a scheduler takes it away."""

    def __init__(self, kills: bool) -> None:
        self.kills = kills

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STOPPED_AFTER and self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == STOPPED_AFTER:
            raise StoppedError


# ---------------------------------------------------------------------------------------------------------------- data
def make_processor(connector: str = "patches") -> InternVLProcessor:
    length = SEQ if connector == "patches" else SEQ + tiny.QLLAMA["num_query_token"]
    return fixtures_processing.make_processor(side=56, image_seq_length=length)


def pair_processor() -> InternVLProcessor:
    images = InternVLImageProcessor(size={"height": 56, "width": 56}, resize_mode="squash")
    return InternVLProcessor(images, make_tokenizer(), mode="contrastive", max_text_length=16)


def write_dialogues(folder: Path) -> Path:
    """Rows for batches of four: in the second batch only the first half, the first process's, has images; unequal
    tiles.
    """
    make_image(56, 56, seed=1).save(folder / "a.png")
    make_image(168, 56, seed=2).save(folder / "b.png")
    images = [["a"], ["b", "a"], [], ["b"], ["b"], ["a"], [], [], [], ["a", "a"], ["b"], []]
    rows = []
    for number, names in enumerate(images):
        question = "<image>\n" * len(names) + "What? Answer briefly."[: 5 + number]
        rows.append(llava(question, "A red bus on a street."[: 4 + number], image=[f"{name}.png" for name in names]))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder: Path) -> str:
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", [sample(number) for number in range(shard * 8, shard * 8 + 8)], shard * 8)
    return str(folder / "*.tar")


def write_data(folder: Path) -> None:
    """The rows, the pairs, and tiny models to start from."""
    write_dialogues(folder)
    write_pairs(folder)
    for connector in CONNECTORS:
        make_chat_model(connector).save_pretrained(folder / connector)
    for stage, (model_class, num_query_token, _) in PAIR_STAGES.items():
        model = tiny_model(model_class, num_query_token)
        model.resize_token_embeddings(len(make_tokenizer()), mean_resizing=False)
        tiny.randomize(model).save_pretrained(folder / f"{stage} start")
        pair_processor().save_pretrained(folder / f"{stage} start")


def make_chat_model(connector: str = "patches") -> InternVLChatForConditionalGeneration:
    """A tiny chat model for `make_processor`."""
    processor = make_processor(connector)
    text_config = {**tiny.DECODERS["llama"], "vocab_size": len(processor.tokenizer)}
    config = tiny.chat_config(connector=connector, text_config=text_config, image_token_id=processor.image_token_id)
    return tiny.randomize(InternVLChatForConditionalGeneration(config)).train()


# ---------------------------------------------------------------------------------------------------------------- runs
def arguments_for(folder: Path, batch: int, **settings) -> TrainingArguments:
    """Settings of all runs; `batch` is that of all processes together."""
    number_of_processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "max_steps": STEPS, "per_device_train_batch_size": batch // number_of_processes, "learning_rate": 3e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": SAVED_AFTER,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "remove_unused_columns": False, "save_strategy": "no",
    }  # fmt: skip
    return with_fsdp_on_cpu(TrainingArguments(str(folder), **{**defaults, **settings}))


def with_fsdp_on_cpu(arguments: TrainingArguments) -> TrainingArguments:
    """Accelerate has FSDP for cards only, PyTorch has it for the CPU as well."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return arguments


def chat_trainer(folder: Path, name: str, connector: str = "patches", drop_path_rate: float = 0.0, **settings):
    """Stage 3 on the rows of `write_dialogues`."""
    arguments = arguments_for(folder / name, 4, **settings)  # first: engines have a say in how weights are loaded
    config = InternVLChatConfig.from_pretrained(folder / connector)
    config.vision_config.drop_path_rate = drop_path_rate
    encoder = DialogueEncoder(make_processor(connector))
    return Trainer(
        InternVLChatForConditionalGeneration.from_pretrained(folder / connector, config=config),
        arguments,
        data_collator=DialogueCollator(encoder),
        train_dataset=DialogueDataset(folder / "rows.jsonl", encoder),
    )


class StreamTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return stream_loader(self.train_dataset, self.data_collator, self.args)


def pair_model(folder: Path, stage: str, **settings):
    """What stage 1 or 2 starts from, with the parts frozen that its recipe does not train."""
    model_class, _, recipe = PAIR_STAGES[stage]
    model = model_class.from_pretrained(folder / f"{stage} start", **settings)
    train_parts(model, recipe().phases[0].learning_rates)
    return model


def stream_trainer(folder: Path, name: str, stage: str, **settings):
    """Stage 1, half of the patches dropped, or stage 2, negatives drawn at random, on the pairs of `write_pairs`."""
    arguments = arguments_for(folder / name, 4, **settings)
    processor = pair_processor()
    if stage == "stage 1":
        collator, settings = PairCollator(processor, padding="max_length"), {"patch_drop_rate": 0.5}
    else:
        collator = GenerativeCollator(processor, 40)
        settings = collator.prefix_lengths()
    stream = PairStream(
        str(folder / "*.tar"), rank=arguments.process_index, world_size=arguments.world_size, shuffle_buffer=5
    )
    model = pair_model(folder, stage, grad_cache_chunk_size=1, **settings)
    return StreamTrainer(model, arguments, data_collator=collator, train_dataset=stream)


def pair_rows(stage: str) -> list[dict[str, torch.Tensor]]:
    """Rows of model inputs for batches of four in which two processes do what one does with all four.

    In each process the first half of the rows has the negatives of matching; all texts are as long, so that the mean
    over the labels is the mean of the processes' means.
    """
    count = 4 * STEPS
    lengths = {"": 7} if stage == "stage 1" else {"": 7, "positive_": 6, "negative_": 9, "summarize_": 8}
    inputs = {"pixel_values": tiny.pixels(count)}
    inputs |= {f"{name}input_ids": tiny.text_ids(count, length, seed=length) for name, length in lengths.items()}
    if stage == "stage 2":
        inputs["labels"] = inputs["input_ids"]
    order = range(4) if int(os.environ.get("WORLD_SIZE", "1")) == 2 else (0, 2, 1, 3)
    return [
        {name: rows[4 * step + place] for name, rows in inputs.items()} for step in range(STEPS) for place in order
    ]


def pair_trainer(folder: Path, name: str, stage: str, **settings):
    """Stage 1 or 2 on `pair_rows`, nothing random."""
    arguments = arguments_for(folder / name, 4, **settings)
    return Trainer(pair_model(folder, stage), arguments, train_dataset=pair_rows(stage))


def adapted_stage(folder: Path) -> None:
    """The command of stage 2 with adapters in LLaMA, to the folder `adapted`."""
    make = trainer.training_arguments
    trainer.training_arguments = lambda *settings: with_fsdp_on_cpu(make(*settings))
    phase = replace(stage2_small().phases[0], steps=3, image_size=56, warmup_steps=1, batch_size=4)
    recipe = replace(stage2_small(), phases=(phase,), logging_steps=1, max_text_length=40)
    run = stages.Run(folder / "adapted", lora_rank=2, lora_parts=("qllama",))
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    stages.run_stage2(stages.with_lora(recipe, run.lora_parts, 1e-2), shards, run, folder / "stage 2 start")


def run_stage_1(folder: Path, output: str, resume: bool = False) -> None:
    """The first stage of `test_stage_faults`, sharded, to the folder OUTPUT."""
    from .test_stage_faults import RECIPE

    make = trainer.training_arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_arguments", lambda *settings: with_fsdp_on_cpu(make(*settings)))
        shards = sorted(str(path) for path in folder.glob("*.tar"))
        run = stages.Run(folder / output, resume=resume, num_workers=1)
        stages.run_stage1(replace(RECIPE, save_total_limit=2, ema_decay=0.5), shards, run, folder / "stage 1 start")


def result_of(trainer: Trainer) -> dict:
    """Losses of the steps, and the weights of the whole model, which some engines give to the first process alone."""
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {"losses": losses, "weights": {name: value.clone() for name, value in (weights or {}).items()}}


# ---------------------------------------------------------------------------------------------------------------- jobs
STAGES = {
    "stage 3": (chat_trainer, {"drop_path_rate": 0.3}),
    "stage 2": (stream_trainer, {"stage": "stage 2"}),
    "stage 1": (stream_trainer, {"stage": "stage 1"}),
}
PARITY = {
    **{connector: (chat_trainer, {"connector": connector}) for connector in CONNECTORS},
    # Adam would make much of gradients that are zero but for rounding, those of key biases.
    **{stage: (pair_trainer, {"stage": stage, "optim": "sgd", "learning_rate": 0.1}) for stage in PAIR_STAGES},
}


def parity(folder: Path) -> dict:
    """Every model without anything random, in the order of the file."""
    found = {}
    for name, (make, settings) in PARITY.items():
        trainer = make(folder, f"parity {name}", train_sampling_strategy="sequential", **settings)
        trainer.train()
        found[name] = {"wrapper": type(trainer.model_wrapped).__name__, **result_of(trainer)}
    return found


def killed(folder: Path) -> None:
    """A run of each stage that ends in its midst, the last one with the process."""
    for stage, (make, settings) in STAGES.items():
        trainer = make(folder, stage, save_strategy="steps", **settings)
        trainer.add_callback(Stop(kills=stage == list(STAGES)[-1]))
        with contextlib.suppress(StoppedError):
            trainer.train()


def resumed(folder: Path) -> dict:
    """The rest of the killed runs, and unbroken ones."""
    found = {stage: {} for stage in STAGES}
    for stage, (make, settings) in STAGES.items():
        for kind, checkpoint in (("resumed", str(folder / stage / f"checkpoint-{SAVED_AFTER}")), ("whole", None)):
            trainer = make(folder, f"{kind} {stage}", **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
            found[stage][kind] = result_of(trainer)
    return found


def killed_in_save(folder: Path) -> None:
    """The second process dies in its second save, when its shards are written."""
    original, saves = WholeCheckpointTrainer._save_more, iter(range(9))

    def dying(self, checkpoint: Path) -> None:
        original(self, checkpoint)
        if next(saves) == 1 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    WholeCheckpointTrainer._save_more = dying
    run_stage_1(folder, "restarted")


def restarted(folder: Path) -> dict:
    """The rest of that run, and an unbroken one."""
    before = [str(path.relative_to(folder)) for path in (folder / "restarted").rglob("*")]
    run_stage_1(folder, "restarted", resume=True)
    run_stage_1(folder, "unbroken")
    return {"before": before}


def hybrid(folder: Path) -> dict:
    """Stage 1 without anything random, and over how many processes weights are spread and copied."""
    trainer = pair_trainer(
        folder, "hybrid", "stage 1", optim="sgd", learning_rate=0.1, train_sampling_strategy="sequential"
    )
    trainer.train()
    weight = next(trainer.model.parameters())
    return {"mesh": tuple(weight.device_mesh.shape), "placements": str(weight.placements), **result_of(trainer)}


def parity_and_resumed(folder: Path) -> dict:
    return {"parity": parity(folder), **resumed(folder)}


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    torch.save(globals()[job](place), place / f"{job}-rank{os.environ.get('RANK', '0')}.pt")
