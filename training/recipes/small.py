"""The recipes at a scale that one machine can train: each copies the full one and changes what does not fit."""

from dataclasses import replace
from typing import Any

from .base import CaptionRecipe, ContrastiveRecipe, DialogueRecipe, GenerativeRecipe, RetrievalRecipe, phase_named
from .full import captions, retrieval, stage1, stage2, stage3


def stage1_small() -> ContrastiveRecipe:
    """Stage 1 for one machine: a tower of 6 narrow layers, 98 px then 112 px."""
    full = stage1()
    scale: dict[str, Any] = {"image_size": 98, "steps": 1800, "warmup_steps": 100, "batch_size": 64}
    short = replace(phase_named(full, "half_patches"), **scale)
    whole = replace(phase_named(full, "all_patches"), image_size=112, steps=200, batch_size=64)
    return replace(
        full,
        phases=(short, whole),
        drop_path_rate=0.05,
        grad_cache_chunk_size=None,
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


def stage2_small() -> GenerativeRecipe:
    """Stage 2 for one machine: few queries, which start from nothing and learn faster."""
    full = stage2()
    phase = phase_named(full, "queries")
    learning_rates = dict.fromkeys(phase.learning_rates, 1e-3)
    return replace(
        full,
        phases=(
            replace(phase, steps=2000, learning_rates=learning_rates, image_size=112, warmup_steps=100, batch_size=32),
        ),
        num_query_token=16,
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_text_length=40,
    )


def retrieval_small(
    image_size: int | None = None, dataset: str = "flickr30k", heads_only: bool = False
) -> RetrievalRecipe:
    """Retrieval fine-tuning for one machine.

    Args:
        image_size: None takes a side half as large again as in `stage2_small`, as 364 px are to 224 px; for heads the
            same as there.
        dataset: As in `retrieval`; the length is the same for all.
        heads_only: As in `retrieval`.
    """
    full = retrieval(image_size or (112 if heads_only else 168), dataset, heads_only)
    phase = phase_named(full, "retrieval")
    learning_rates = dict.fromkeys(phase.learning_rates, 1e-4)
    return replace(
        full,
        phases=(replace(phase, steps=500, learning_rates=learning_rates, warmup_steps=20, batch_size=32),),
        drop_path_rate=min(full.drop_path_rate, 0.05),
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=100,
        max_text_length=40,
    )


def captions_small(image_size: int = 168) -> CaptionRecipe:
    """Caption fine-tuning for one machine.

    Args:
        image_size: As in `retrieval_small`.
    """
    full = captions(image_size)
    phase = phase_named(full, "captions")
    learning_rates = dict.fromkeys(phase.learning_rates, 1e-4)
    return replace(
        full,
        phases=(replace(phase, steps=500, learning_rates=learning_rates, warmup_steps=20, batch_size=32),),
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=100,
        max_text_length=40,
    )


def stage3_small(
    connector: str = "patches", freeze_language: bool = False, also_train: str | None = None
) -> DialogueRecipe:
    """Stage 3 for one machine, on any decoder, which is trained unless it is to be frozen.

    Args:
        connector: As in `stage3`.
        freeze_language: Whether the decoder stays as it is.
        also_train: As in `stage3`.
    """
    full = stage3(connector, bool(freeze_language), also_train)
    scale: dict[str, Any] = {"image_size": 112, "batch_size": 8}
    phases = [replace(phase_named(full, "mlp"), steps=300, warmup_steps=20, **scale)]
    for phase in full.phases[1:]:
        learning_rates = dict.fromkeys(phase.learning_rates, 5e-4)
        phases.append(replace(phase, steps=1500, learning_rates=learning_rates, warmup_steps=50, **scale))
    return replace(
        full,
        phases=tuple(phases),
        template=DialogueRecipe.template,
        resize_mode=DialogueRecipe.resize_mode,
        downsample_ratio=DialogueRecipe.downsample_ratio,
        model_config={},
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_length=512,
    )
