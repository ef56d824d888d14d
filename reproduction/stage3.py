"""Stage 3 of the default checkpoint: `python -m internvl.reproduction.stage3 --source DIR --output DIR [--resume]`.

Dialogue, in both configurations of InternVL-Chat: "queries_and_patches" (full) starts from stage 2's vision tower, QLLaMA and
queries, "patches" (simple) from its vision tower alone. The decoder starts from nothing, so it learns together with the
MLPs, which the paper trains alone first. Three phases:

- seeing: the vision tower and the MLP of the patches learn to name what each image token shows. Captions of stages 1 and 2
  say little about small text, and from answers alone a tower this small needs very many to begin to read;
- connecting: the MLPs and the decoder learn to answer;
- answering: so they go on, in the full configuration together with QLLaMA and its queries.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

from ..configuration_internvl import InternVLChatConfig
from ..conversation_internvl import get_conversation_template
from ..image_processing_internvl import InternVLImageProcessor
from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..processing_internvl import InternVLProcessor
from ..synthetic.scenes import TILE_SIZE, Scene, choose_questions, draw_scene, questions_about
from ..synthetic.tokenizer import build_tokenizer, tokenizer_corpus
from ..training.models.dense_supervision import TokenReader, token_labels
from ..training.models.parameter_groups import train_parts
from ..training.optimizers import muon_groups
from .phases import ATTENTION, Batch, Phase, SceneBatches, command_line, run_phase, write_run
from .tower import PATCH_SIZE, VISION_CONFIG


TEMPLATE = "internvl"
DOWNSAMPLE_RATIO = 0.5
MAX_TILES = 6
TOKENS_PER_TILE = int(TILE_SIZE // PATCH_SIZE * DOWNSAMPLE_RATIO) ** 2
SIMPLE, FULL = "patches", "queries_and_patches"
CONNECTORS = {"simple": SIMPLE, "full": FULL}
_FIRST = ("projector", "language")
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "connecting": {SIMPLE: _FIRST, FULL: _FIRST},
    "answering": {SIMPLE: _FIRST, FULL: (*_FIRST, "queries", "qllama")},
}


@dataclass(frozen=True)
class Stage3Recipe:
    """Everything that decides a run, with the default checkpoint's values. A phase of no steps is left out.

    Args:
        connector: "patches" (simple) or "queries_and_patches" (full).
        seeing: The vision tower and the MLP of the patches learn to name what each image token shows.
        connecting: The MLPs and the decoder learn to answer; all else is frozen.
        answering: They go on, in the full configuration with QLLaMA; the frozen vision tower halves the cost.
        turns: Questions about each picture.
    """

    connector: str
    seeing: Phase
    connecting: Phase
    answering: Phase
    turns: int = 12
    weight_decay: float = 0.05
    seed: int = 0


def stage3(connector: str) -> Stage3Recipe:
    """The default checkpoint's run, in either configuration."""
    seeing = Batch(1.0, 8, {"crowd": 4, "page": 2, "mixed": 1, "reading": 1, "many_tiles": 1})
    conversations = (
        Batch(0.76, 8, {"mixed": 3, "reading": 2, "crowd": 1, "digits": 1}),
        Batch(0.12, 3, {"few_tiles": 1}),
        Batch(0.12, 2, {"many_tiles": 1}),
    )
    return Stage3Recipe(
        connector,
        seeing=Phase(steps=2400, batches=(seeing,)),
        connecting=Phase(steps=500, batches=conversations, muon_lr=4e-3, decay=0.0),
        answering=Phase(steps=2200, batches=conversations, muon_lr=4e-3),
    )


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
        vision_config=dict(VISION_CONFIG),
        text_config=text_config,
        qllama_config=qllama_config,
        connector=SIMPLE if qllama_config is None else FULL,
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
    model.skips_unlabelled_logits = True
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    return model


class SeeingBatches(SceneBatches):
    """Pictures as one tile each, with the labels of their tokens."""

    def __init__(self, phase: Phase, seed: int, processor: InternVLProcessor) -> None:
        super().__init__("stage3/seeing", phase, seed)
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

    def __init__(self, name: str, phase: Phase, seed: int, processor: InternVLProcessor, turns: int) -> None:
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


def learn_to_see(
    model: InternVLChatForConditionalGeneration,
    processor: InternVLProcessor,
    recipe: Stage3Recipe,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """Phase "seeing"; see `run_phase`."""
    phase = recipe.seeing
    reader = TokenReader(model)
    heads = [*reader.heads.values()]
    groups = muon_groups(reader, phase.muon_lr, phase.adamw_lr, recipe.weight_decay, output_layers=heads)
    log = run_phase(reader, groups, SeeingBatches(phase, recipe.seed, processor), folder, **how)
    reader.name_tokens(model.get_input_embeddings().get_parameter("weight"), processor.tokenizer)
    return log


def start_from(
    source: Path, tokenizer: PreTrainedTokenizerFast, connector: str
) -> InternVLChatForConditionalGeneration:
    """The chat model with stage 2's vision tower, in the full configuration its QLLaMA and queries too.

    Args:
        source: Folder of stage 2; the simple configuration takes one of stage 1 as well.
        tokenizer: Of the decoder.
        connector: "patches" or "queries_and_patches".

    Raises:
        ValueError: The full configuration is wanted of a model without queries.
    """
    base = InternVLModel.from_pretrained(source)
    if connector == SIMPLE:
        model = build_model(tokenizer)
    else:
        if not base.config.has_queries:
            raise ValueError(
                f"`connector` {connector!r} needs the queries of stage 2, but {source} has none. Run stage 2 first, or take "
                f"the connector {SIMPLE!r}."
            )
        model = build_model(tokenizer, base.config.qllama_config.to_dict())
        base.qllama.model.embed_tokens = None  # a chat model gives QLLaMA no text
        model.qllama.load_state_dict(base.qllama.model.state_dict())
        model.query_tokens = nn.Parameter(base.query_tokens.detach())
    model.vision_model.load_state_dict(base.vision_model.state_dict())
    return model


def learn_to_answer(
    model: InternVLChatForConditionalGeneration,
    processor: InternVLProcessor,
    recipe: Stage3Recipe,
    name: str,
    folder: Path,
    **how: Any,
) -> list[dict[str, float]]:
    """Phase "connecting" or "answering"; see `run_phase`."""
    phase: Phase = getattr(recipe, name)
    train_parts(model, PARTS[name][recipe.connector])
    head = model.get_output_embeddings()
    groups = muon_groups(model, phase.muon_lr, phase.adamw_lr, recipe.weight_decay, output_layers=[head])
    data = AnsweringBatches(f"stage3/{name}", phase, recipe.seed, processor, recipe.turns)
    return run_phase(model, groups, data, folder, **how)


def train(recipe: Stage3Recipe, source: Path, output: Path, resume: bool = False, use_bf16: bool = True) -> None:
    """Train and write a chat checkpoint.

    Args:
        recipe: The run.
        source: Folder of stage 2.
        output: Folder of the checkpoint; Trainer's own checkpoints lie in `output/trainer`.
        resume: Go on from the last of those, if there is one.
        use_bf16: Compute in bfloat16; weights stay in float32.
    """
    set_seed(recipe.seed)
    tokenizer = build_tokenizer(tokenizer_corpus())
    model = start_from(source, tokenizer, recipe.connector)
    num_queries = 0 if recipe.connector == SIMPLE else model.config.qllama_config.num_query_token
    processor = build_processor(tokenizer, num_queries)
    model.set_attn_implementation(ATTENTION)
    log: dict[str, Any] = {"recipe": asdict(recipe)}
    how: dict[str, Any] = {"resume": resume, "use_bf16": use_bf16}
    if recipe.seeing.steps:
        log["seeing"] = learn_to_see(model, processor, recipe, output / "trainer" / "seeing", **how)
    for name in PARTS:
        if getattr(recipe, name).steps:
            log[name] = learn_to_answer(model, processor, recipe, name, output / "trainer" / name, **how)
    write_run(model, processor, log, output)


def main() -> None:
    """Train stage 3 from the command line."""
    parser = command_line("Train a chat model of the default checkpoint from stage 2.")
    parser.add_argument("--source", type=Path, required=True, help="folder of stage 2")
    parser.add_argument("--configuration", choices=CONNECTORS, default="full")
    arguments = parser.parse_args()
    recipe = replace(stage3(CONNECTORS[arguments.configuration]), seed=arguments.seed)
    train(recipe, arguments.source, arguments.output, arguments.resume, not arguments.fp32)


if __name__ == "__main__":
    main()
