"""The three stages, and retrieval fine-tuning, as recipes: functions that return every number of a run.

Each function has the full scale of the paper; its `_small` twin copies it and changes what one machine cannot hold. What
a phase trains are the parts it has learning rates for (names of `parameter_groups.PARTS`), everything else is frozen. A
variant of a recipe is a `dataclasses.replace` of it.

Numbers come from the paper's main text where it has them. Those marked "appendix" are remembered from its appendix and
not checked; those marked "own" are this package's choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar


FUNNEL_STAGES = (1, 2)  # whose data the funnel filters


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a warm-up and a cosine decay of its own.

    Args:
        name: Of the phase; its checkpoints are kept under it.
        steps: Its length.
        rates: Highest learning rate of each trained part; parts that are not named are frozen.
        image_size: Side of the pictures in pixels.
        warmup_steps: Steps over which the rates rise.
        batch_size: Samples of a step, all processes together.
        dropped_patches: Share of the patches left out (stage 1).
    """

    name: str
    steps: int
    rates: dict[str, float]
    image_size: int
    warmup_steps: int
    batch_size: int
    dropped_patches: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all stages have.

    Args:
        phases: One after the other.
        weight_decay: Of matrices, see `parameter_groups.decays`.
        betas: Of AdamW.
        layer_decay: Each layer of the vision tower learns slower than the one above by this factor.
        drop_path_rate: Stochastic depth of the last vision block.
        max_grad_norm: Gradients are clipped to this length; 0 for no limit.
        rows_at_a_time: Samples of a process in memory at a time: gradient caching in the contrastive stages, accumulation
            in stage 3. None for all of them.
        gradient_checkpointing: Compute activations again in the backward pass.
        use_bf16: Compute in bfloat16 (autocast); trained weights stay in float32.
        save_steps: Steps between two checkpoints.
        logging_steps: Steps between two entries of the log.
        seed: Decides the order of the data and everything random.
    """

    phases: tuple[Phase, ...]
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0
    drop_path_rate: float = 0.0
    max_grad_norm: float = 1.0
    rows_at_a_time: int | None = None
    gradient_checkpointing: bool = True
    use_bf16: bool = True
    save_steps: int = 1000
    logging_steps: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe(Recipe):
    """Stage 1.

    Args:
        objective: "softmax" (InfoNCE) or "sigmoid" (SigLIP).
        max_logit_scale: Cap of the factor of the similarities.
        max_text_length: Tokens of every text.
        vision_config: Of a vision tower that starts from nothing.
        text_config: Of a LLaMA that starts from nothing; its vocabulary is the tokenizer's.
        model_config: The rest of `InternVLConfig`.
    """

    objective: str = "softmax"
    max_logit_scale: float = 100.0
    max_text_length: int = 80
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GenerativeRecipe(Recipe):
    """Stage 2.

    Args:
        num_query_token: Queries that QLLaMA gets.
        cross_attention_frequency: Every so many layers one with cross-attention.
        max_logit_scale: Cap of the factor of the similarities.
        max_text_length: Tokens of every text.
    """

    num_query_token: int = 96
    cross_attention_frequency: int = 2
    max_logit_scale: float = 100.0
    max_text_length: int = 80


@dataclass(frozen=True, kw_only=True)
class RetrievalRecipe(Recipe):
    """Retrieval fine-tuning of InternVL-C and -G.

    Args:
        max_logit_scale: Cap of the factor of the similarities.
        max_text_length: Tokens of every text.
    """

    max_logit_scale: float = 100.0
    max_text_length: int = 80


@dataclass(frozen=True, kw_only=True)
class DialogueRecipe(Recipe):
    """Stage 3.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        template: Name of the conversation template.
        max_tiles: Tiles of a picture at most.
        downsample_ratio: Pixel shuffle factor per side.
        max_length: Tokens of a dialogue at most; longer ones are left out.
        pack: Dialogues of a batch in one row, without padding.
    """

    connector: str = "patches"
    template: str = "internvl2_5"
    max_tiles: int = 1
    downsample_ratio: float = 0.5
    max_length: int = 2048
    pack: bool = False


# What retrieval fine-tuning trains, and stage 1 as far as it has it: all but the language head, which neither uses.
_STAGE_1 = ("vision", "pooling", "qllama", "text_projection", "temperature")
_ALL_BUT_HEAD = (*_STAGE_1, "queries", "query_heads")


def _phase(recipe: Recipe, name: str) -> Phase:
    return next(phase for phase in recipe.phases if phase.name == name)


def stage1() -> ContrastiveRecipe:
    """Contrastive training of InternViT (from nothing) and LLaMA, both whole: 28.7 B samples in batches of 164 K.

    First at 196 px with half of the patches, the last 0.5 B at 224 px with all (appendix).
    """
    rates = {"vision": 1e-3, "pooling": 1e-3, "qllama": 1e-4, "text_projection": 1e-4, "temperature": 1e-4}  # appendix
    short = Phase("half_patches", 172_119, rates, 196, warmup_steps=5000, batch_size=163_840, dropped_patches=0.5)
    # The rates have come down by then; a tenth of them (own) does not undo it.
    last_rates = {part: rate / 10 for part, rate in rates.items()}
    whole = Phase("all_patches", 3_052, last_rates, 224, warmup_steps=100, batch_size=163_840)
    return ContrastiveRecipe(
        phases=(short, whole),
        weight_decay=0.1,
        layer_decay=0.95,  # own
        drop_path_rate=0.2,  # appendix
        rows_at_a_time=32,
        # The released sizes are the defaults of the configurations.
        model_config={"clip_embed_dim": 768, "attn_pool_num_heads": 16},
    )


def stage1_small() -> ContrastiveRecipe:
    """Stage 1 for one machine: a tower of 6 narrow layers, 98 px then 112 px."""
    full = stage1()
    scale: dict[str, Any] = {"image_size": 98, "steps": 1800, "warmup_steps": 100, "batch_size": 64}
    short = replace(_phase(full, "half_patches"), **scale)
    whole = replace(_phase(full, "all_patches"), image_size=112, steps=200, warmup_steps=10, batch_size=64)
    return replace(
        full,
        phases=(short, whole),
        drop_path_rate=0.05,
        rows_at_a_time=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_text_length=40,
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 112,
            "initializer_factor": 1.0,  # so few layers need no damping
        },
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        model_config={"clip_embed_dim": 128, "attn_pool_num_heads": 4},
    )


def stage2() -> GenerativeRecipe:
    """Queries, cross-attention and their heads learn by ITC, ITM and ITG: 1.6 B samples in batches of 20 K.

    InternViT and the LLaMA layers are frozen, and so are the pooling and the text projection: by these InternVL-C works,
    which stays what it was but for the temperature.
    """
    rates = {"queries": 5e-5, "query_heads": 5e-5, "language_head": 5e-5, "temperature": 5e-5}  # appendix
    return GenerativeRecipe(
        phases=(Phase("queries", 80_000, rates, 224, warmup_steps=2000, batch_size=20_480),),
        weight_decay=0.05,  # appendix
        betas=(0.9, 0.98),  # appendix
        rows_at_a_time=32,
    )


def stage2_small() -> GenerativeRecipe:
    """Stage 2 for one machine: few queries, which start from nothing and learn faster."""
    full = stage2()
    phase = _phase(full, "queries")
    rates = dict.fromkeys(phase.rates, 1e-3)
    return replace(
        full,
        phases=(replace(phase, steps=2000, rates=rates, image_size=112, warmup_steps=100, batch_size=32),),
        num_query_token=16,
        rows_at_a_time=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_text_length=40,
    )


def retrieval(image_size: int = 364) -> RetrievalRecipe:
    """Fine-tuning of all that retrieval uses, on pairs such as those of Flickr30K: 10 epochs of 145 K captions.

    Args:
        image_size: 364 px, or 224 px.
    """
    rates = dict.fromkeys(_ALL_BUT_HEAD, 1e-6)  # appendix, and the rest of these numbers too
    return RetrievalRecipe(
        phases=(Phase("retrieval", 1416, rates, image_size, warmup_steps=100, batch_size=1024),),
        weight_decay=0.05,
        betas=(0.9, 0.999),
        layer_decay=0.9,
        drop_path_rate=0.3,
        rows_at_a_time=8,
    )


def retrieval_small(image_size: int = 168) -> RetrievalRecipe:
    """Retrieval fine-tuning for one machine.

    Args:
        image_size: Half as large again as in `stage2_small`, as 364 px are to 224 px.
    """
    full = retrieval(image_size)
    phase = _phase(full, "retrieval")
    rates = dict.fromkeys(phase.rates, 1e-4)
    return replace(
        full,
        phases=(replace(phase, steps=500, rates=rates, warmup_steps=20, batch_size=32),),
        drop_path_rate=0.05,
        rows_at_a_time=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=100,
        max_text_length=40,
    )


def stage3(connector: str = "patches", freeze_language: bool = False) -> DialogueRecipe:
    """Instruction tuning by LLaVA's recipe: the MLP alone, then more.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        freeze_language: The decoder stays as it is; what gives it the picture is trained in its stead: the queries of the
            full configuration, the vision tower of the simple one.
    """
    more = "language"
    if freeze_language:
        more = "vision" if connector == "patches" else "queries"
    mlp = Phase("mlp", 2_181, {"projector": 1e-3}, 448, warmup_steps=66, batch_size=256)
    # 4 M samples in batches of 128
    whole = Phase("whole", 31_250, {"projector": 2e-5, more: 2e-5}, 448, warmup_steps=938, batch_size=128)
    return DialogueRecipe(
        phases=(mlp, whole), weight_decay=0.0, betas=(0.9, 0.999), rows_at_a_time=4, connector=connector
    )


def stage3_small(connector: str = "patches", freeze_language: bool = False) -> DialogueRecipe:
    """Stage 3 for one machine.

    Args:
        connector: As in `stage3`.
        freeze_language: Likewise.
    """
    full = stage3(connector, freeze_language)
    scale: dict[str, Any] = {"image_size": 112, "batch_size": 8}
    mlp = replace(_phase(full, "mlp"), steps=300, warmup_steps=20, **scale)
    whole = _phase(full, "whole")
    whole = replace(whole, steps=1500, rates=dict.fromkeys(whole.rates, 5e-4), warmup_steps=50, **scale)
    return replace(
        full,
        phases=(mlp, whole),
        rows_at_a_time=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_length=512,
    )


RecipeType = TypeVar("RecipeType", bound=Recipe)
RECIPES: dict[str, dict[str, Callable[..., Any]]] = {
    "stage1": {"small": stage1_small, "full": stage1},
    "stage2": {"small": stage2_small, "full": stage2},
    "stage3": {"small": stage3_small, "full": stage3},
    "retrieval": {"small": retrieval_small, "full": retrieval},
}


def with_steps(recipe: RecipeType, steps: int) -> RecipeType:
    """The recipe with `steps` steps in each phase, and warm-ups no longer than a tenth of them, for a try."""
    phases = [
        replace(phase, steps=steps, warmup_steps=min(phase.warmup_steps, steps // 10)) for phase in recipe.phases
    ]
    return replace(recipe, phases=tuple(phases))


__all__ = [
    "FUNNEL_STAGES",
    "RECIPES",
    "ContrastiveRecipe",
    "DialogueRecipe",
    "GenerativeRecipe",
    "Phase",
    "Recipe",
    "RetrievalRecipe",
    "retrieval",
    "retrieval_small",
    "stage1",
    "stage1_small",
    "stage2",
    "stage2_small",
    "stage3",
    "stage3_small",
    "with_steps",
]
