"""Train the default checkpoint from nothing: `python -m internvl.training.default_checkpoint --output DIR [--resume]`.

A tiny InternVL-Chat (InternViT, pixel shuffle and MLP, Qwen3) learns from generated scenes to answer questions about
colours, shapes, counts, positions, handwritten digits, and text. Every step trains on one batch of pictures with many
turns of question and answer about each, because seeing a picture costs more than asking about it. In a first phase the
vision tower learns to name what each image token shows; then the decoder learns to answer. The script
resumes from the last saved step after a stop, and the same seed sees the same data.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..configuration_internvl import InternVLChatConfig
from ..conversation_internvl import get_conversation_template
from ..image_processing_internvl import InternVLImageProcessor
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..processing_internvl import InternVLProcessor
from .muon import MuonWithAdamW, muon_groups
from .scenes import LAYOUTS, TILE_SIZE, Layout, Scene, choose_questions, draw_scene, questions_about, sample_scene
from .token_labels import TokenReader, token_labels
from .tokenizer import build_tokenizer, tokenizer_corpus


LOG_FILE = "training_log.json"  # written last, so a folder that has it is finished
TEMPLATE = "internvl"
PATCH_SIZE = 28
DOWNSAMPLE_RATIO = 0.5
MAX_TILES = 6
TOKENS_PER_TILE = int(TILE_SIZE // PATCH_SIZE * DOWNSAMPLE_RATIO) ** 2


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


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, with the default checkpoint's values.

    Args:
        seeing: The vision tower and the connector learn to name what each image token shows.
        answering: The connector and the decoder learn to answer; the vision tower is frozen, which halves the cost.
        turns: Questions about each picture.
    """

    seeing: Phase = Phase(
        steps=2800, batches=(Batch(1.0, 8, {"crowd": 4, "page": 2, "mixed": 1, "reading": 1, "many_tiles": 1}),)
    )
    answering: Phase = Phase(
        steps=4000,
        batches=(
            Batch(0.76, 8, {"mixed": 3, "reading": 2, "crowd": 1, "digits": 1}),
            Batch(0.12, 3, {"few_tiles": 1}),
            Batch(0.12, 2, {"many_tiles": 1}),
        ),
        muon_lr=4e-3,
    )
    turns: int = 12
    weight_decay: float = 0.05
    seed: int = 0


def build_processor(tokenizer: PreTrainedTokenizerFast, num_queries: int = 0) -> InternVLProcessor:
    """Return the checkpoint's processor: tiles of 448 px, at most six and a thumbnail; `num_queries` are QLLaMA's per tile."""
    image_processor = InternVLImageProcessor(
        size={"height": TILE_SIZE, "width": TILE_SIZE}, min_num=1, max_num=MAX_TILES, use_thumbnail=True
    )
    template = get_conversation_template(TEMPLATE).to_jinja()
    return InternVLProcessor(
        image_processor, tokenizer, chat_template=template, image_seq_length=num_queries + TOKENS_PER_TILE
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, qllama_config: dict[str, Any] | None = None
) -> InternVLChatForConditionalGeneration:
    """Return the untrained model; weights start larger than in large models, since its layers are narrow.

    Args:
        tokenizer: Of the decoder.
        qllama_config: Of the QLLaMA of the full configuration; None makes the simple one.
    """
    vision_config = {
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "patch_size": PATCH_SIZE,
        "image_size": TILE_SIZE,
        "initializer_range": 0.05,
        "initializer_factor": 1.0,
    }
    text_config = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = InternVLChatConfig(
        vision_config=vision_config,
        text_config=text_config,
        qllama_config=qllama_config,
        connector="patches" if qllama_config is None else "queries_and_patches",
        downsample_ratio=DOWNSAMPLE_RATIO,
        ps_version="v2",
        template=TEMPLATE,
        force_image_size=TILE_SIZE,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=MAX_TILES,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = InternVLChatForConditionalGeneration(config)
    prepare_embeddings(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    return model


@torch.no_grad()
def prepare_embeddings(model: PreTrainedModel) -> None:
    """Start the patch embedding so that places can be told apart at once and blank paper does not drown all else.

    Positions start as waves over rows and columns instead of noise. Paper is a large constant in every patch: the bias
    takes it away.
    """
    embeddings = model.vision_model.embeddings
    projection = embeddings.patch_embedding
    projection.weight.normal_(std=projection.weight[0].numel() ** -0.5)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    paper = (244 / 255 - mean) / std
    projection.bias.copy_(-projection.weight.sum(dim=(2, 3)) @ paper)
    side, width = TILE_SIZE // PATCH_SIZE, projection.out_channels
    frequencies = 1.5 * 64 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    embeddings.position_embedding[0, 1:] = 0.7 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


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


class SeeingBatches(SceneBatches):
    """Pictures as one tile each, with the labels of their tokens."""

    def __init__(self, phase: Phase, seed: int, processor: InternVLProcessor) -> None:
        super().__init__("seeing", phase, seed)
        self.image_processor = processor.image_processor

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        scenes = [scene for scene, _ in self.scenes(step)]
        pixels = self.image_processor([draw_scene(scene) for scene in scenes], max_num=1, return_tensors="pt")
        return {
            "pixel_values": pixels["pixel_values"],
            "labels": torch.stack([token_labels(scene) for scene in scenes]),
        }


class AnsweringBatches(SceneBatches):
    """Conversations about pictures; only the answers carry labels."""

    def __init__(
        self, phase: Phase, seed: int, processor: InternVLProcessor, turns: int, name: str = "answering"
    ) -> None:
        super().__init__(name, phase, seed)
        self.processor = processor
        self.turns = turns

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        conversations = [self._conversation(scene, rng) for scene, rng in self.scenes(step)]
        return self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", return_labels=True, padding=True
        )

    def _conversation(self, scene: Scene, rng: Random) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for question in choose_questions(questions_about(scene, rng), rng, self.turns):
            messages.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        messages[0]["content"].insert(0, {"type": "image", "image": draw_scene(scene)})
        return messages


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
    trainer = Trainer(
        model=model,
        args=training_arguments(data.phase, folder, data.seed, use_bf16),
        train_dataset=data,
        data_collator=only_item,
        optimizers=(MuonWithAdamW(groups, lr=data.phase.muon_lr), None),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume and any(folder.glob("checkpoint-*")))
    return trainer.state.log_history


def learn_to_see(
    model: InternVLChatForConditionalGeneration,
    processor: InternVLProcessor,
    recipe: Recipe,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """First phase: the vision tower and the connector of `model`, in place; see `run_phase`."""
    phase = recipe.seeing
    reader = TokenReader(model)
    heads = [*reader.heads.values()]
    groups = muon_groups(reader, phase.muon_lr, phase.adamw_lr, recipe.weight_decay, output_layers=heads)
    log = run_phase(reader, groups, SeeingBatches(phase, recipe.seed, processor), folder, **how)
    reader.name_tokens(model.get_input_embeddings().get_parameter("weight"), processor.tokenizer)
    return log


def learn_to_answer(
    model: InternVLChatForConditionalGeneration,
    processor: InternVLProcessor,
    recipe: Recipe,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """Second phase: connector and decoder of `model`, in place; see `run_phase`."""
    phase = recipe.answering
    model.vision_model.requires_grad_(False)
    head = model.get_output_embeddings()
    groups = muon_groups(model, phase.muon_lr, phase.adamw_lr, recipe.weight_decay, output_layers=[head])
    return run_phase(model, groups, AnsweringBatches(phase, recipe.seed, processor, recipe.turns), folder, **how)


def train(recipe: Recipe, output: Path, resume: bool = False, use_bf16: bool = True) -> None:
    """Train and write the complete checkpoint.

    Args:
        recipe: The run.
        output: Folder of the checkpoint; Trainer's own checkpoints lie in `output/trainer`.
        resume: Go on from the last of those, if there is one.
        use_bf16: Compute in bfloat16; weights stay in float32.
    """
    set_seed(recipe.seed)
    tokenizer = build_tokenizer(tokenizer_corpus())
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    # On CPUs, plain matrix products in bfloat16 are twice as fast as the fused kernel at these lengths.
    model.set_attn_implementation("eager")
    log: dict[str, Any] = {"recipe": asdict(recipe)}
    for name, learn in (("seeing", learn_to_see), ("answering", learn_to_answer)):
        log[name] = learn(model, processor, recipe, output / "trainer" / name, resume=resume, use_bf16=use_bf16)
    write_run(model, processor, log, output)


def write_run(model: PreTrainedModel, processor: InternVLProcessor, log: dict[str, Any], output: Path) -> None:
    """Write a trained model, its processor and the log of its training to `output`."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(output)
    processor.save_pretrained(output)
    (output / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def command_line(description: str) -> argparse.ArgumentParser:
    """Return the command line that scripts share which train by a recipe of their own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="for CPUs without fast bfloat16")
    return parser


def parse_arguments(description: str) -> argparse.Namespace:
    """Return the arguments of a script that needs no others."""
    return command_line(description).parse_args()


def main() -> None:
    """Train the default checkpoint from the command line."""
    arguments = parse_arguments("Train the default checkpoint from nothing.")
    train(replace(Recipe(), seed=arguments.seed), arguments.output, arguments.resume, not arguments.fp32)


if __name__ == "__main__":
    main()
