"""The full-scale recipes: of the paper, and of the code published with it.

Each number names its source: a table (or section) of the paper (arXiv 2312.14238); a file of the published code
(github.com/OpenGVLab/InternVL), "published" for short; or "own", where neither says.
"""

from dataclasses import replace

from .base import CaptionRecipe, ContrastiveRecipe, DialogueRecipe, GenerativeRecipe, Phase, RetrievalRecipe


# What retrieval fine-tuning trains, and stage 1 as far as it has it: all but the language head, which neither uses.
_STAGE_1 = ("vision", "pooling", "qllama", "text_projection", "temperature")
_ALL_BUT_HEAD = (*_STAGE_1, "queries", "query_heads")
# Captions to train on by data set, and passes over them (published `internvl_g/shell/finetune`; captions of Karpathy's
# splits: 29,000 images with 5 each, 113,287 images with 566,747).
RETRIEVAL_DATA = {"flickr30k": (145_000, 10), "flickr30k-cn": (145_000, 10), "coco": (566_747, 5)}


def stage1() -> ContrastiveRecipe:
    """Contrastive training of InternViT (from nothing) and LLaMA, both whole: 28.7 B samples in batches of 164 K.

    First at 196 px with half of the patches, the last 0.5 B samples at 224 px with all; one cosine over both (table
    20: 175 K steps, 5 K of warm-up).
    """
    # Table 20 has one rate for the image encoder and one for the text encoder; which is whose below is own.
    learning_rates = {
        "vision": 1e-3,
        "pooling": 1e-3,
        "qllama": 1e-4,
        "text_projection": 1e-4,
        "temperature": 1e-4,
    }
    short = Phase(
        "half_patches", 172_119, learning_rates, 196, warmup_steps=5000, batch_size=163_840, patch_drop_rate=0.5
    )  # table 20; 28.7 B and 0.5 B samples in steps
    whole = Phase("all_patches", 3_052, learning_rates, 224, warmup_steps=0, batch_size=163_840)
    return ContrastiveRecipe(
        phases=(short, whole),
        one_schedule=True,  # table 20
        weight_decay=0.1,  # table 20
        betas=(0.9, 0.95),  # table 20
        drop_path_rate=0.2,  # table 20
        drop_path_schedule="uniform",  # table 20
        crop_scale=(0.9, 1.0),  # table 20 has a random resized crop and no range; this is open_clip's
        init_as_beit=True,  # table 20
        grad_cache_chunk_size=256,  # own: all pairs of a GPU at once where there are 640 of 80 GB, as the paper had
        save_steps=200,  # own: an hour on 640 GPUs
        # The released sizes are the defaults of the configurations.
        model_config={"clip_embed_dim": 768, "attn_pool_num_heads": 16},  # published configurations
    )


def stage2() -> GenerativeRecipe:
    """Queries, cross-attention and their heads learn by ITC, ITM and ITG: 1.6 B samples in batches of 20 K.

    InternViT and the LLaMA layers are frozen (table 20), and so are the pooling and the text projection (own): by
    these InternVL-C works, which stays what it was but for the temperature.
    """
    learning_rates = {"queries": 5e-5, "query_heads": 5e-5, "language_head": 5e-5, "temperature": 5e-5}  # table 20
    return GenerativeRecipe(
        phases=(Phase("queries", 80_000, learning_rates, 224, warmup_steps=2000, batch_size=20_480),),  # table 20
        weight_decay=0.05,  # table 20
        betas=(0.9, 0.98),  # table 20
        crop_scale=(0.5, 1.0),  # table 20 has a random resized crop and no range; this is BLIP-2's, as the losses are
        grad_cache_chunk_size=128,  # own: likewise on 160
    )


def retrieval(image_size: int | None = None, dataset: str = "flickr30k", heads_only: bool = False) -> RetrievalRecipe:
    """Fine-tuning for retrieval of all that it uses, or of the text projection alone.

    Args:
        image_size: None takes 364 px (table 21), for heads 224 px (published `shell/head_finetune`).
        dataset: Whose length: one of `RETRIEVAL_DATA`.
        heads_only: Train the text projection alone, as published: the language head, which is unfrozen there too, has
            no part in the loss.

    Raises:
        ValueError: If the data set is unknown.
    """
    if dataset not in RETRIEVAL_DATA:
        raise ValueError(f"`dataset` must be one of {list(RETRIEVAL_DATA)}, got {dataset!r}.")
    num_captions, epochs = RETRIEVAL_DATA[dataset]
    steps = -(-num_captions // 1024) * epochs  # the last batch of an epoch is smaller in the published code
    learning_rates = dict.fromkeys(("text_projection",) if heads_only else _ALL_BUT_HEAD, 1e-6)  # table 21
    side = image_size or (224 if heads_only else 364)
    recipe = RetrievalRecipe(
        phases=(Phase("retrieval", steps, learning_rates, side, warmup_steps=100, batch_size=1024),),  # table 21
        weight_decay=0.05,  # table 21
        decay_inputs=True,  # published `train/trainer_monkey_patch.py`
        betas=(0.9, 0.999),  # table 21
        layer_decay=0.9,  # table 21
        qllama_layer_decay=0.9,  # table 21
        drop_path_rate=0.3,  # table 21; rising linearly, published `modeling_intern_vit.py`
        crop_scale=(0.5, 1.0),  # published `train/dataset.py`, the flip too
        flip_rate=0.5,
        grad_cache_chunk_size=32,  # own: likewise on 32
        max_text_length=80,  # published `shell/finetune`
        negatives="random",  # published `train/dataset.py`
        simple_captions=True,  # published `train/dataset.py`
    )
    if heads_only:  # published `shell/head_finetune`
        return replace(recipe, layer_decay=1.0, qllama_layer_decay=1.0, drop_path_rate=0.0)
    return recipe


def captions(image_size: int = 364) -> CaptionRecipe:
    """Fine-tuning for captions like those of COCO, 5 epochs of 566,747.

    Neither the paper nor its code fine-tunes for captions: the numbers are BLIP-2's for COCO (arXiv 2301.12597,
    appendix), whose stage 2 the model's is. Trained is all that writes captions.

    Args:
        image_size: Side of the images.
    """
    learning_rates = dict.fromkeys(("vision", "queries", "qllama", "language_head"), 1e-5)
    return CaptionRecipe(
        phases=(Phase("captions", 11_070, learning_rates, image_size, warmup_steps=1000, batch_size=256),),
        weight_decay=0.05,
        betas=(0.9, 0.999),
        layer_decay=0.95,
        qllama_layer_decay=0.95,  # own
        crop_scale=(0.5, 1.0),
        flip_rate=0.5,
        grad_cache_chunk_size=8,  # own
    )


def stage3(
    connector: str = "patches", freeze_language: bool | None = None, also_train: str | None = None
) -> DialogueRecipe:
    """Instruction tuning in one of the paper's two configurations; both take Vicuna as their decoder.

    - "patches" (simple): LLaVA-1.5's recipe at 336 px, the MLP on LGS-558K, then the decoder with it on
      LLaVA-Mix-665K, an epoch each (supplement; tables 9 and 12). With a frozen decoder the MLP alone on
      LLaVA-Mix-665K.
    - "queries_and_patches" (full): both MLPs on the 4 M dialogues of table 3 at 224 px, while the decoder stays
      frozen: 64 M or 90 M trained parameters (table 9). With a decoder that is trained: at 336 px the MLPs, then the
      decoder with them, on the same data.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        freeze_language: Whether the decoder stays as it is; None means as said above: in the full configuration.
        also_train: With a frozen decoder, train this with the MLP in a second phase: "qllama" with its queries
            (section 3.4), or "vision" (own).

    Raises:
        ValueError: If something is to be trained that there is not, or beside a decoder that is trained.
    """
    is_full = connector != "patches"
    is_frozen = is_full if freeze_language is None else freeze_language
    more = _parts_beside_mlp(is_full, is_frozen, also_train)
    side = 336 if not is_full or not is_frozen else 224  # table 9
    if is_full:  # 4 M in batches of 512: supplement
        first, second = (7_813, 512), (7_813, 512)
    else:  # 558,128 and 665,298 dialogues: published `internvl_chat_llava/scripts_internvl`
        first, second = (2_181, 256), (5_198, 128)
    if is_frozen and not more:  # tables 9 and 12
        first = second
    phases = [_dialogue_phase("mlp", first, {"projector": 1e-3}, side)]
    if more:
        phases.append(_dialogue_phase("whole", second, dict.fromkeys(("projector", *more), 2e-5), side))
    return DialogueRecipe(
        phases=tuple(phases),
        weight_decay=0.0,  # published `scripts_internvl`, and so below
        betas=(0.9, 0.999),
        grad_cache_chunk_size=4,  # own
        connector=connector,
        template="vicuna_v1",  # of both phases; the published first one has bare captions
        resize_mode="pad",  # likewise, there a crop
        downsample_ratio=1.0,
        max_length=2048,
        model_config={
            "projector_type": "mlp2x_gelu",
            "select_layer": -1 if is_full else -4,
            "use_image_start_end": False,
            "mask_image_token_logit": True,  # own: a frozen decoder would never learn not to write the placeholder
        },
    )


def _parts_beside_mlp(is_full: bool, is_frozen: bool, also_train: str | None) -> tuple[str, ...]:
    if also_train is None:
        return () if is_frozen else ("language",)
    if also_train not in ("qllama", "vision"):
        raise ValueError(f"`also_train` must be 'qllama' or 'vision', got {also_train!r}.")
    if not is_frozen:
        raise ValueError(f"`also_train` {also_train!r} is for a frozen decoder, and this one is trained.")
    if also_train == "qllama" and not is_full:
        raise ValueError("`also_train` 'qllama' needs the connector 'queries_and_patches'.")
    return ("queries", "qllama") if also_train == "qllama" else ("vision",)


def _dialogue_phase(name: str, length: tuple[int, int], learning_rates: dict[str, float], side: int) -> Phase:
    """A phase of so many steps and samples in a step; published: 3 % of warm-up."""
    steps, batch_size = length
    return Phase(name, steps, learning_rates, side, warmup_steps=-(-steps * 3 // 100), batch_size=batch_size)
