"""Stage 1 of the default checkpoint: `python -m internvl.reproduction.stage1 --output DIR [--resume]`.

A tiny InternVL-C (InternViT and a plain LLaMA as text encoder) learns by contrast from generated scenes, each with a caption
in every one of five languages: seeing a picture costs more than reading about it. As in the paper, patches of each picture are
left out at first and the last phase sees it whole. Two things are made for these scenes. The plainest patches go, since most are
blank, so that a picture costs a fifth at first; and pictures are never smaller than 448 px, where a digit covers as many patches
as it does later. The folder holds the `InternVLModel` without queries that stage 2 starts from, its processor, and the log with
the accuracy of zero-shot classification on held-out pictures as training went on.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    set_seed,
)

from ..configuration_internvl import InternVLConfig
from ..evaluation.generated import CLASSES, labelled_images
from ..evaluation.metrics import accuracy
from ..evaluation.zero_shot import class_embeddings
from ..image_processing_internvl import InternVLImageProcessor
from ..processing_internvl import InternVLProcessor
from ..synthetic.captions import LANGUAGES, PAIR_LAYOUTS, caption
from ..synthetic.scenes import TILE_SIZE, Layout, draw_scene
from ..synthetic.tokenizer import MULTILINGUAL_VOCABULARY_SIZE, build_tokenizer, caption_corpus
from ..training.callbacks import LearningCurve
from ..training.models.losses import unit
from ..training.models.pretraining import InternVLForContrastiveTraining
from ..training.optimizers import muon_groups
from .phases import ATTENTION, Batch, Phase, SceneBatches, command_line, run_phase, write_run
from .tower import VISION_CONFIG, prepare_embeddings


# Texts are a few words or many sentences: encoded together, four in five tokens would be padding.
TEXT_GROUPS = 8


@dataclass(frozen=True)
class PairPhase(Phase):
    """A stretch of contrastive training.

    Args:
        dropped_patches: Share of each picture's patches, the plainest, that is left out.
    """

    dropped_patches: float = 0.0


@dataclass(frozen=True)
class Stage1Recipe:
    """Everything that decides a run, with the default checkpoint's values.

    Args:
        phases: One after the other, by name.
        rows_per_chunk: Pairs whose activations are in memory at a time.
        curve_steps: Steps between two points of the learning curve.
        curve_pictures: Held-out pictures of each kind per point.
    """

    phases: Mapping[str, PairPhase]
    weight_decay: float = 0.05
    rows_per_chunk: int | None = None
    curve_steps: int = 100
    curve_pictures: int = 200
    seed: int = 0


def stage1() -> Stage1Recipe:
    """The default checkpoint's run."""
    singles = Batch(1.0, 64, {"one_shape": 2, "one_digit": 4, "few": 3})
    scenes = Batch(1.0, 64, {"one_shape": 1, "one_digit": 6, "few": 3, "mixed": 2})  # digits are the hardest
    return Stage1Recipe(
        {
            "objects": PairPhase(steps=1100, batches=(singles,), dropped_patches=13 / 16),
            "half": PairPhase(steps=700, batches=(scenes,), muon_lr=4e-3, adamw_lr=1.3e-3, dropped_patches=0.5),
            "whole": PairPhase(steps=60, batches=(scenes,), muon_lr=2e-3, adamw_lr=7e-4),
        }
    )


def build_pair_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """Return the processor of InternVL-C and -G: pictures squashed to 448 px, texts with prefix and end token."""
    image_processor = InternVLImageProcessor(size={"height": TILE_SIZE, "width": TILE_SIZE}, resize_mode="squash")
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive", max_text_length=256)


def build_pair_model(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> InternVLForContrastiveTraining:
    """Return the untrained model, with the default checkpoint's vision tower; `settings` are the training class's."""
    qllama_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "num_query_token": 0,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = InternVLConfig(
        vision_config=dict(VISION_CONFIG),
        qllama_config=qllama_config,
        clip_embed_dim=192,
        attn_pool_num_heads=3,
        initializer_range=0.05,
    )
    model = InternVLForContrastiveTraining(config, **settings)
    prepare_embeddings(model)
    return model


class PairBatches(SceneBatches):
    """Pictures, and for each a caption in every language: all in one language, then all in the next."""

    table: Mapping[str, Layout] = PAIR_LAYOUTS

    def __init__(self, name: str, phase: PairPhase, seed: int, processor: InternVLProcessor) -> None:
        super().__init__(name, phase, seed)
        self.processor = processor

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        scenes = self.scenes(step)
        texts = [caption(scene, language, rng) for language in LANGUAGES for scene, rng in scenes]
        pictures = [draw_scene(scene) for scene, _ in scenes]
        return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")


class ZeroShotCurve(LearningCurve):
    """Adds the accuracy of zero-shot classification, with English prompts, to Trainer's log as training goes on.

    Args:
        processor: The model's processor.
        steps: Steps between two points; the last step is one too.
        pictures: Held-out pictures of each kind, of another seed than the evaluation's.
    """

    def __init__(self, processor: InternVLProcessor, steps: int, pictures: int) -> None:
        super().__init__(steps)
        self.processor = processor
        self.pixels, self.labels = {}, {}
        for kind in CLASSES:
            items = labelled_images(kind, pictures, seed=1)
            self.pixels[kind] = processor(images=[item.image for item in items], return_tensors="pt")["pixel_values"]
            self.labels[kind] = [item.label for item in items]

    def measure(self, model: Any) -> dict[str, float]:
        """The accuracy by kind."""
        point = {}
        for kind, pixels in self.pixels.items():
            with torch.inference_mode():
                embeds = unit(model.get_image_features(pixels.to(model.device)).float())
            classes = class_embeddings(model, self.processor, kind, "en").to(embeds.device)
            point[f"zero_shot_{kind}"] = accuracy(embeds, classes, self.labels[kind])
        return point


def learn_pairs(
    model: InternVLForContrastiveTraining,
    processor: InternVLProcessor,
    recipe: Stage1Recipe,
    name: str,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """One phase, by its name in the recipe; see `run_phase`."""
    phase = recipe.phases[name]
    model.dropped_patches, model.rows_per_chunk = phase.dropped_patches, recipe.rows_per_chunk
    groups = muon_groups(model, phase.muon_lr, phase.adamw_lr, recipe.weight_decay)
    curve = ZeroShotCurve(processor, recipe.curve_steps, recipe.curve_pictures)
    data = PairBatches(f"stage1/{name}", phase, recipe.seed, processor)
    return run_phase(model, groups, data, folder, callbacks=[curve], **how)


def train(recipe: Stage1Recipe, output: Path, resume: bool = False, use_bf16: bool = True) -> None:
    """Train and write the checkpoint of stage 1.

    Args:
        recipe: The run.
        output: Folder of the checkpoint; Trainer's own checkpoints lie in `output/trainer`.
        resume: Go on from the last of those, if there is one.
        use_bf16: Compute in bfloat16; weights stay in float32.
    """
    set_seed(recipe.seed)
    tokenizer = build_tokenizer(caption_corpus(), MULTILINGUAL_VOCABULARY_SIZE)
    processor = build_pair_processor(tokenizer)
    model = build_pair_model(tokenizer, drops_plain_patches=True, text_groups=TEXT_GROUPS)
    model.set_attn_implementation(ATTENTION)
    log: dict[str, Any] = {"recipe": asdict(recipe)}
    for name in recipe.phases:
        log[name] = learn_pairs(
            model, processor, recipe, name, output / "trainer" / name, resume=resume, use_bf16=use_bf16
        )
    write_run(model, processor, log, output)


def main() -> None:
    """Train stage 1 from the command line."""
    arguments = command_line("Train stage 1 of the default checkpoint from nothing.").parse_args()
    train(replace(stage1(), seed=arguments.seed), arguments.output, arguments.resume, not arguments.fp32)


if __name__ == "__main__":
    main()
