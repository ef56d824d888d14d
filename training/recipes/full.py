"""The full-scale recipes of the paper.

Numbers come from the paper's main text where it has them. Those marked "appendix" are recalled from its appendix and
not checked; those marked "own" are this package's choice.
"""

from .base import ContrastiveRecipe, DialogueRecipe, GenerativeRecipe, Phase, RetrievalRecipe


# What retrieval fine-tuning trains, and stage 1 as far as it has it: all but the language head, which neither uses.
_STAGE_1 = ("vision", "pooling", "qllama", "text_projection", "temperature")
_ALL_BUT_HEAD = (*_STAGE_1, "queries", "query_heads")


def stage1() -> ContrastiveRecipe:
    """Contrastive training of InternViT (from nothing) and LLaMA, both whole: 28.7 B samples in batches of 164 K.

    First at 196 px with half of the patches, the last 0.5 B at 224 px with all (appendix).
    """
    learning_rates = {
        "vision": 1e-3,
        "pooling": 1e-3,
        "qllama": 1e-4,
        "text_projection": 1e-4,
        "temperature": 1e-4,
    }  # appendix
    short = Phase(
        "half_patches", 172_119, learning_rates, 196, warmup_steps=5000, batch_size=163_840, patch_drop_rate=0.5
    )
    # The learning rates have come down by then; a tenth of them (own) does not undo it.
    last_rates = {part: rate / 10 for part, rate in learning_rates.items()}
    whole = Phase("all_patches", 3_052, last_rates, 224, warmup_steps=100, batch_size=163_840)
    return ContrastiveRecipe(
        phases=(short, whole),
        weight_decay=0.1,
        layer_decay=0.95,  # own
        drop_path_rate=0.2,  # appendix
        grad_cache_chunk_size=32,
        # The released sizes are the defaults of the configurations.
        model_config={"clip_embed_dim": 768, "attn_pool_num_heads": 16},
    )


def stage2() -> GenerativeRecipe:
    """Queries, cross-attention and their heads learn by ITC, ITM and ITG: 1.6 B samples in batches of 20 K.

    InternViT and the LLaMA layers are frozen, and so are the pooling and the text projection: by these InternVL-C
    works, which stays what it was but for the temperature.
    """
    learning_rates = {"queries": 5e-5, "query_heads": 5e-5, "language_head": 5e-5, "temperature": 5e-5}  # appendix
    return GenerativeRecipe(
        phases=(Phase("queries", 80_000, learning_rates, 224, warmup_steps=2000, batch_size=20_480),),
        weight_decay=0.05,  # appendix
        betas=(0.9, 0.98),  # appendix
        grad_cache_chunk_size=32,
    )


def retrieval(image_size: int = 364) -> RetrievalRecipe:
    """Fine-tuning of all that retrieval uses, on pairs such as those of Flickr30K: 10 epochs of 145 K captions.

    Args:
        image_size: 364 px, or 224 px.
    """
    learning_rates = dict.fromkeys(_ALL_BUT_HEAD, 1e-6)  # appendix, and the rest of these numbers too
    return RetrievalRecipe(
        phases=(Phase("retrieval", 1416, learning_rates, image_size, warmup_steps=100, batch_size=1024),),
        weight_decay=0.05,
        betas=(0.9, 0.999),
        layer_decay=0.9,
        drop_path_rate=0.3,
        grad_cache_chunk_size=8,
    )


def stage3(connector: str = "patches", freeze_language: bool = False) -> DialogueRecipe:
    """Instruction tuning by LLaVA's recipe: the MLP alone, then more.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        freeze_language: The decoder stays as it is; what gives it the image is trained in its stead: the queries of
            the full configuration, the vision tower of the simple one.
    """
    more = "language"
    if freeze_language:
        more = "vision" if connector == "patches" else "queries"
    mlp = Phase("mlp", 2_181, {"projector": 1e-3}, 448, warmup_steps=66, batch_size=256)
    # 4 M samples in batches of 128
    whole = Phase("whole", 31_250, {"projector": 2e-5, more: 2e-5}, 448, warmup_steps=938, batch_size=128)
    return DialogueRecipe(
        phases=(mlp, whole), weight_decay=0.0, betas=(0.9, 0.999), grad_cache_chunk_size=4, connector=connector
    )
