"""The recipes at a scale that one machine can train: each copies the full one and changes what does not fit."""

from dataclasses import replace
from typing import Any

from .base import ContrastiveRecipe, DialogueRecipe, GenerativeRecipe, RetrievalRecipe, phase_named
from .full import retrieval, stage1, stage2, stage3


def stage1_small() -> ContrastiveRecipe:
    """Stage 1 for one machine: a tower of 6 narrow layers, 98 px then 112 px."""
    full = stage1()
    scale: dict[str, Any] = {"image_size": 98, "steps": 1800, "warmup_steps": 100, "batch_size": 64}
    short = replace(phase_named(full, "half_patches"), **scale)
    whole = replace(phase_named(full, "all_patches"), image_size=112, steps=200, warmup_steps=10, batch_size=64)
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


def retrieval_small(image_size: int = 168) -> RetrievalRecipe:
    """Retrieval fine-tuning for one machine.

    Args:
        image_size: Half as large again as in `stage2_small`, as 364 px are to 224 px.
    """
    full = retrieval(image_size)
    phase = phase_named(full, "retrieval")
    learning_rates = dict.fromkeys(phase.learning_rates, 1e-4)
    return replace(
        full,
        phases=(replace(phase, steps=500, learning_rates=learning_rates, warmup_steps=20, batch_size=32),),
        drop_path_rate=0.05,
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=100,
        max_text_length=40,
    )


def stage3_small(connector: str = "patches", freeze_language: bool = False) -> DialogueRecipe:
    """Stage 3 for one machine.

    Args:
        connector: As in `stage3`.
        freeze_language: Likewise.
    """
    full = stage3(connector, freeze_language)
    scale: dict[str, Any] = {"image_size": 112, "batch_size": 8}
    mlp = replace(phase_named(full, "mlp"), steps=300, warmup_steps=20, **scale)
    whole = phase_named(full, "whole")
    whole = replace(
        whole, steps=1500, learning_rates=dict.fromkeys(whole.learning_rates, 5e-4), warmup_steps=50, **scale
    )
    return replace(
        full,
        phases=(mlp, whole),
        grad_cache_chunk_size=None,
        gradient_checkpointing=False,
        use_bf16=False,
        save_steps=200,
        max_length=512,
    )
