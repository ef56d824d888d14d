"""Stage 2 of the default checkpoint: `python -m internvl.reproduction.stage2 --stage1 DIR --output DIR [--resume]`.

The LLaMA of stage 1 becomes QLLaMA: it gets queries that look at the picture, and with them learns to contrast (ITC), match
(ITM) and describe (ITG) generated scenes in five languages. The vision tower is frozen. The first phase trains what is new,
as in the paper. There the LLaMA could write before stage 1; this one starts from nothing and has learned to read only, so
the second phase trains it too, and to contrast its texts with InternVL-C's pictures again, so that InternVL-C stays right.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import set_seed

from ..configuration_internvl import InternVLConfig
from ..evaluation.embeddings import embed_images, embed_texts, modes_of
from ..evaluation.generated import held_out_scenes
from ..evaluation.metrics import recalls_both_ways
from ..processing_internvl import InternVLProcessor
from ..synthetic.captions import CAPTION_PROMPTS, LANGUAGES, PAIR_LAYOUTS, caption
from ..synthetic.scenes import Layout, Scene, draw_scene
from ..training.callbacks import LearningCurve, LossParts
from ..training.data.collators import GenerativeCollator
from ..training.models.parameter_groups import train_parts
from ..training.models.pretraining import InternVLForGenerativeTraining
from ..training.optimizers import muon_groups
from .phases import ATTENTION, Batch, Phase, SceneBatches, command_line, run_phase, write_run


NEW_PARTS = ("queries", "query_heads", "language_head", "temperature")
ALL_BUT_TOWER = (*NEW_PARTS, "qllama", "text_projection", "pooling")
# Share of captions in the plain wording, which names all there is; the others are worded at random.
PLAIN = 0.5


@dataclass(frozen=True)
class QueryPhase(Phase):
    """A stretch of stage 2.

    Args:
        parts: What is trained, names in `parameter_groups.PARTS`.
    """

    parts: tuple[str, ...] = NEW_PARTS


@dataclass(frozen=True)
class Stage2Recipe:
    """Everything that decides a run, with the default checkpoint's values.

    Args:
        phases: One after the other, by name.
        num_query_token: Queries that QLLaMA gets.
        cross_attention_frequency: Every so many layers one with cross-attention.
        max_text_length: Tokens of a text at most.
        rows_per_chunk: Pairs whose activations are in memory at a time.
        curve_steps: Steps between two points of the learning curve.
        curve_pairs: Held-out pairs per point.
    """

    phases: Mapping[str, QueryPhase]
    num_query_token: int = 16
    cross_attention_frequency: int = 1
    max_text_length: int = 128
    weight_decay: float = 0.05
    rows_per_chunk: int | None = None
    curve_steps: int = 100
    curve_pairs: int = 150
    seed: int = 0


def stage2() -> Stage2Recipe:
    """The default checkpoint's run."""
    scenes = Batch(1.0, 64, {"one_shape": 1, "one_digit": 1, "few": 2, "mixed": 2, "crowd": 2})
    # Captions of one length: less padding, and negatives that are harder to tell apart.
    simple = Batch(0.4, 64, {"one_shape": 1, "one_digit": 1, "few": 2})
    crowded = Batch(0.6, 64, {"few": 1, "mixed": 2, "crowd": 2})
    return Stage2Recipe(
        {
            "queries": QueryPhase(steps=200, batches=(scenes,), decay=0.0),
            "queries_and_llama": QueryPhase(steps=1000, batches=(simple, crowded), muon_lr=3e-3, parts=ALL_BUT_TOWER),
        }
    )


def pair_of(scene: Scene, rng: Random) -> dict[str, Any]:
    """A row for `GenerativeCollator`: the picture, and a caption in any language with the prompt that asks for it."""
    language = rng.choice(list(LANGUAGES))
    text = caption(scene, language, None if rng.random() < PLAIN else rng)
    return {"image": draw_scene(scene), "text": text, "prompt": CAPTION_PROMPTS[language]}


class CaptionBatches(SceneBatches):
    """Pictures, each with a caption in a language of its own, as `InternVLForGenerativeTraining` takes them."""

    table: Mapping[str, Layout] = PAIR_LAYOUTS

    def __init__(self, name: str, phase: Phase, seed: int, collator: GenerativeCollator) -> None:
        super().__init__(name, phase, seed)
        self.collator = collator

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.collator([pair_of(scene, rng) for scene, rng in self.scenes(step)])


class RetrievalCurve(LearningCurve):
    """How well InternVL-C and -G find English captions of held-out pictures, and the pictures of captions: R@1.

    Args:
        processor: The model's processor.
        steps: Steps between two points.
        pairs: Held-out pairs, of another seed than the evaluation's.
    """

    def __init__(self, processor: InternVLProcessor, steps: int, pairs: int) -> None:
        super().__init__(steps)
        self.processor = processor
        scenes = held_out_scenes(pairs, seed=1)
        self.pictures = [draw_scene(scene) for scene in scenes]
        self.texts = [caption(scene) for scene in scenes]

    def measure(self, model: Any) -> dict[str, float]:
        """The means of both directions, by mode."""
        texts = embed_texts(model, self.processor, self.texts)
        point = {}
        for mode in modes_of(model):
            pictures = embed_images(model, self.processor, self.pictures, mode)
            found = recalls_both_ways(pictures, texts, self.texts)
            point[f"recall_at_1_{mode}"] = sum(part["R@1"] for part in found.values()) / len(found)
        return point


def start_from(stage1: Path, recipe: Stage2Recipe, collator: GenerativeCollator) -> InternVLForGenerativeTraining:
    """Stage 1's model with queries, cross-attention and heads that start from nothing."""
    config = InternVLConfig.from_pretrained(stage1)
    config.num_query_token = recipe.num_query_token
    config.qllama_config.cross_attention_frequency = recipe.cross_attention_frequency
    settings: dict[str, Any] = {"rows_per_chunk": recipe.rows_per_chunk, **collator.prefix_lengths()}
    return InternVLForGenerativeTraining.from_pretrained(stage1, config=config, **settings)


def learn_queries(
    model: InternVLForGenerativeTraining,
    collator: GenerativeCollator,
    recipe: Stage2Recipe,
    name: str,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """One phase, by its name in the recipe; see `run_phase`."""
    phase = recipe.phases[name]
    train_parts(model, phase.parts)
    model.contrast_tower = "qllama" in phase.parts
    logits = (model.qllama.lm_head, model.itm_head)
    groups = muon_groups(model, phase.muon_lr, phase.adamw_lr, recipe.weight_decay, output_layers=logits)
    curve = RetrievalCurve(collator.processor, recipe.curve_steps, recipe.curve_pairs)
    data = CaptionBatches(f"stage2/{name}", phase, recipe.seed, collator)
    return run_phase(model, groups, data, folder, callbacks=[LossParts(model), curve], **how)


def train(recipe: Stage2Recipe, stage1: Path, output: Path, resume: bool = False, use_bf16: bool = True) -> None:
    """Train and write the checkpoint of stage 2. A recipe without phases writes what it would start from.

    Args:
        recipe: The run.
        stage1: Folder of stage 1.
        output: Folder of the checkpoint; Trainer's own checkpoints lie in `output/trainer`.
        resume: Go on from the last of those, if there is one.
        use_bf16: Compute in bfloat16; weights stay in float32.
    """
    set_seed(recipe.seed)
    processor = InternVLProcessor.from_pretrained(stage1)
    collator = GenerativeCollator(processor, recipe.max_text_length, padding="longest")
    model = start_from(stage1, recipe, collator)
    model.set_attn_implementation(ATTENTION)
    log: dict[str, Any] = {"recipe": asdict(recipe)}
    for name in recipe.phases:
        log[name] = learn_queries(
            model, collator, recipe, name, output / "trainer" / name, resume=resume, use_bf16=use_bf16
        )
    write_run(model, processor, log, output)


def main() -> None:
    """Train stage 2 from the command line."""
    parser = command_line("Train stage 2 of the default checkpoint from stage 1.")
    parser.add_argument("--stage1", type=Path, required=True, help="folder of stage 1")
    arguments = parser.parse_args()
    recipe = replace(stage2(), seed=arguments.seed)
    train(recipe, arguments.stage1, arguments.output, arguments.resume, not arguments.fp32)


if __name__ == "__main__":
    main()
