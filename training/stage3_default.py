"""Stage 3 of the default checkpoint: `python -m internvl.training.stage3_default --source DIR --output DIR [--resume]`.

Dialogue, in both configurations of InternVL-Chat: "queries_and_patches" (full) starts from stage 2's vision tower, QLLaMA and
queries, "patches" (simple) from its vision tower alone. The decoder starts from nothing, so it learns together with the
MLPs, which the paper trains alone first. Three phases:

- seeing: the vision tower and the MLP of the patches learn to name what each image token shows. Captions of stages 1 and 2
  say little about small text, and from answers alone a tower this small needs very many to begin to read;
- connecting: the MLPs and the decoder learn to answer;
- answering: so they go on, in the full configuration together with QLLaMA and its queries.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed

from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..processing_internvl import InternVLProcessor
from .default_checkpoint import (
    AnsweringBatches,
    Phase,
    Recipe,
    build_model,
    build_processor,
    command_line,
    learn_to_see,
    run_phase,
    write_run,
)
from .muon import muon_groups
from .parameter_groups import train_parts
from .tokenizer import build_tokenizer, tokenizer_corpus


SIMPLE, FULL = "patches", "queries_and_patches"
CONNECTORS = {"simple": SIMPLE, "full": FULL}
_FIRST = ("projector", "language")
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "connecting": {SIMPLE: _FIRST, FULL: _FIRST},
    "answering": {SIMPLE: _FIRST, FULL: (*_FIRST, "queries", "qllama")},
}


@dataclass(frozen=True)
class Stage3Recipe(Recipe):
    """Everything that decides a run. A phase of no steps is left out.

    Args:
        connector: "patches" (simple) or "queries_and_patches" (full).
        connecting: The MLPs and the decoder learn to answer; all else is frozen.
    """

    connector: str = FULL
    connecting: Phase = field(default_factory=lambda: replace(Recipe.answering, steps=500, decay=0.0))


def stage3(connector: str) -> Stage3Recipe:
    """The default checkpoint's run, in either configuration."""
    return Stage3Recipe(
        connector=connector,
        seeing=replace(Recipe.seeing, steps=2400),
        answering=replace(Recipe.answering, steps=3500),
    )


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
    data = AnsweringBatches(phase, recipe.seed, processor, recipe.turns, f"stage3/{name}")
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
    model.set_attn_implementation("eager")  # as in default_checkpoint
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
