"""The recipes of the checkpoint that this repository holds, trained from nothing on generated scenes.

Stage 1: a tiny InternVL-C (InternViT and a LLaMA as text encoder) learns by contrast, each image with a caption in
every one of five languages, since encoding an image costs more than reading about it. As in the paper, patches are
dropped at first and the last phase sees whole images. Here the patches with the lowest contrast go, since most are
blank, and images are never smaller than 448 px, where a digit covers as many patches as it does later.

Stage 2: the LLaMA becomes QLLaMA, which learns to contrast (ITC), match (ITM) and caption (ITG); the vision tower is
frozen. The first phase trains what is new, as in the paper. There the LLaMA could write before stage 1; this one
starts from nothing and has only learned to read, so the second phase trains it too, together with the contrast of
InternVL-C, which would deteriorate otherwise.

Stage 3: dialogue, in both configurations. The decoder starts from nothing, so it learns together with the projector,
which the paper trains alone first. Phases:

- seeing: the vision tower and the projector of the patches learn to name what each image token shows. Captions say
  little about small text, and a tower this small needs very many answers before it begins to read;
- connecting: the projectors and the decoder learn to answer;
- answering: they go on, in the full configuration together with QLLaMA and its queries.
"""

from typing import Any

from ...synthetic.scenes import TILE_SIZE
from .base import Batch, ContrastiveRecipe, DialogueRecipe, GenerativeRecipe, Phase


PATCH_SIZE = 28
VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "patch_size": PATCH_SIZE,
    "image_size": TILE_SIZE,
    "initializer_range": 0.05,  # more than in large models, since the layers are narrow
    "initializer_factor": 1.0,
}
LLAMA_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}
DECODER_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
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
}
_INTERNVL_C = ("vision", "pooling", "qllama", "text_projection", "temperature")
_NEW_IN_STAGE_2 = ("queries", "query_heads", "language_head", "temperature")
_SETTINGS: dict[str, Any] = {
    "weight_decay": 0.05,
    "betas": (0.9, 0.98),
    "gradient_checkpointing": False,
    # On CPUs, plain matrix products in bfloat16 are twice as fast as the fused kernel at the lengths of these stages.
    "attn_implementation": "eager",
    "save_steps": 250,
    "logging_steps": 50,
}


def _phase(
    name: str,
    steps: int,
    parts: tuple[str, ...],
    *batches: Batch,
    muon: float = 6e-3,
    adamw: float = 2e-3,
    cooldown_fraction: float = 0.4,
    **settings: Any,
) -> Phase:
    return Phase(
        name,
        steps,
        dict.fromkeys(parts, adamw),
        TILE_SIZE,
        warmup_steps=30,
        batch_size=1,
        muon_learning_rate=muon,
        cooldown_fraction=cooldown_fraction,
        batches=batches,
        **settings,
    )


def stage1_bundled() -> ContrastiveRecipe:
    """Contrastive training on images of one shape or digit, then on scenes of more, at last with all patches."""
    singles = Batch(1.0, 64, {"one_shape": 2, "one_digit": 4, "few": 3})
    scenes = Batch(1.0, 64, {"one_shape": 1, "one_digit": 6, "few": 3, "mixed": 2})  # digits are the hardest
    return ContrastiveRecipe(
        phases=(
            _phase("objects", 1100, _INTERNVL_C, singles, patch_drop_rate=13 / 16),
            _phase("half", 700, _INTERNVL_C, scenes, muon=4e-3, adamw=1.3e-3, patch_drop_rate=0.5),
            _phase("whole", 60, _INTERNVL_C, scenes, muon=2e-3, adamw=7e-4),
        ),
        max_text_length=256,
        drop_low_contrast_patches=True,
        # Texts are a few words or many sentences: together, four in five tokens would be padding.
        num_length_buckets=8,
        init_for_scenes=True,
        eval_steps=100,
        eval_samples=200,
        vision_config=VISION_CONFIG,
        text_config=LLAMA_CONFIG,
        model_config={"clip_embed_dim": 192, "attn_pool_num_heads": 3, "initializer_range": 0.05},
        **_SETTINGS,
    )


def stage2_bundled() -> GenerativeRecipe:
    """Queries, cross-attention and heads, then QLLaMA with them."""
    scenes = Batch(1.0, 64, {"one_shape": 1, "one_digit": 1, "few": 2, "mixed": 2, "crowd": 2})
    # Captions of one length: less padding, and negatives that are harder to tell apart.
    simple = Batch(0.4, 64, {"one_shape": 1, "one_digit": 1, "few": 2})
    crowded = Batch(0.6, 64, {"few": 1, "mixed": 2, "crowd": 2})
    both = (*_NEW_IN_STAGE_2, "qllama", "text_projection", "pooling")
    return GenerativeRecipe(
        phases=(
            _phase("queries", 200, _NEW_IN_STAGE_2, scenes, cooldown_fraction=0.0),
            _phase("queries_and_llama", 1000, both, simple, crowded, muon=3e-3, itc_on_vision_tower=True),
        ),
        num_query_token=16,
        cross_attention_frequency=1,
        max_text_length=128,
        padding="longest",
        eval_steps=100,
        eval_samples=150,
        **_SETTINGS,
    )


def stage3_bundled(
    connector: str = "patches", freeze_language: bool | None = None, also_train: str | None = None
) -> DialogueRecipe:
    """Dialogue from a decoder that starts from nothing.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        freeze_language: Not possible here.
        also_train: Likewise.

    Raises:
        ValueError: If the decoder is to be frozen.
    """
    if freeze_language or also_train:
        raise ValueError("The decoder of the bundled recipe starts from random weights and cannot be frozen.")
    seeing = Batch(1.0, 8, {"crowd": 4, "page": 2, "mixed": 1, "reading": 1, "many_tiles": 1})
    conversations = (
        Batch(0.76, 8, {"mixed": 3, "reading": 2, "crowd": 1, "digits": 1}),
        Batch(0.12, 3, {"few_tiles": 1}),
        Batch(0.12, 2, {"many_tiles": 1}),
    )
    first = ("projector", "language")
    then = first if connector == "patches" else (*first, "queries", "qllama")
    return DialogueRecipe(
        phases=(
            _phase("seeing", 2400, ("vision", "projector", "token_heads"), seeing, dense_supervision=True),
            _phase("connecting", 500, first, *conversations, muon=4e-3, cooldown_fraction=0.0),
            _phase("answering", 2200, then, *conversations, muon=4e-3),
        ),
        connector=connector,
        template="internvl",
        max_tiles=6,
        text_config=DECODER_CONFIG,
        model_config={"initializer_range": 0.05},
        generation_config={"max_new_tokens": 64},
        **_SETTINGS,
    )
