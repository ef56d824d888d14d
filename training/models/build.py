"""The model and the processor that each stage starts from: nothing, a LLaMA, a decoder, or the folder of the stage
before.

Weights are float32. Where the recipe computes under autocast (`use_bf16`), frozen parts keep the narrower dtype that a
folder may store them in.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from ...conversation_internvl import (
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    get_conversation_template,
)
from ...image_processing_internvl import InternVLImageProcessor
from ...kinds import check_kind, kind_of, read_config_file
from ...modeling_internvl import InternVLModel
from ...modeling_internvl_chat import InternVLChatForConditionalGeneration
from ...processing_internvl import InternVLProcessor
from ...synthetic.tokenizer import caption_tokenizer, question_tokenizer
from ..recipes import (
    CaptionRecipe,
    ContrastiveRecipe,
    DialogueRecipe,
    EmbeddingRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RecipeType,
    RetrievalRecipe,
)
from .parameter_groups import part_of
from .pretraining import (
    InternVLForCaptionTraining,
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)
from .vision_start import init_as_beit, init_embeddings_for_scenes


logger = logging.get_logger(__name__)

Folder = str | Path
C_AND_G = ("InternVL-C", "InternVL-G")


def set_dtypes(recipe: Recipe, model: nn.Module, adapted: Collection[str] = ()) -> None:
    """Set the dtypes that the recipe computes in, in place: float32 for all where it does not use autocast, else for
    the parts that it trains.

    Args:
        recipe: The recipe.
        model: The model.
        adapted: Parts that get LoRA adapters, whose own weights keep their dtype like those of frozen parts.
    """
    if not recipe.use_bf16:
        model.float()
        return
    parts = {part for phase in recipe.phases for part in phase.learning_rates} - set(adapted)
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.data = parameter.data.float()


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, without reentrant autograd."""
    # `gradient_checkpointing_enable` is its name in transformers 5.19.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def fit_image_sizes(recipe: RecipeType, source: Folder | None = None) -> RecipeType:
    """The recipe with image sizes that whole patches fill, those of the model it starts from: the next larger ones.

    Args:
        recipe: The recipe.
        source: Folder of the model; None for one that starts from nothing.
    """
    if source is not None:
        kinds = (*C_AND_G, "chat") if isinstance(recipe, DialogueRecipe) else C_AND_G
        patch_size = check_kind(source, *kinds, door="`--model`").vision_config.patch_size
    else:
        patch_size = InternViTConfig(**getattr(recipe, "vision_config", {})).patch_size
    unit = round(patch_size / getattr(recipe, "downsample_ratio", 1))  # of stage 3: patches that become one token
    phases = [replace(phase, image_size=-(-phase.image_size // unit) * unit) for phase in recipe.phases]
    for phase, given in zip(phases, recipe.phases, strict=True):
        if phase != given:
            logger.warning(
                f"Phase {phase.name} has images of {phase.image_size} px instead of {given.image_size}, which {unit} "
                "px do not divide."
            )
    return replace(recipe, phases=tuple(phases))


def check_whole_patches(side: int | None, config: PretrainedConfig) -> None:
    """Check that whole patches, or tokens, of a model fill the images that a command line asks for.

    Raises:
        ValueError: If they do not; the message names the next sizes.
    """
    unit = round(getattr(config, "vision_config", config).patch_size / getattr(config, "downsample_ratio", 1))
    if side is not None and side % unit:
        sides = [str(one) for one in (side // unit * unit, -(-side // unit) * unit) if one]
        raise ValueError(f"`--image-size {side}` is no multiple of the model's {unit} px: give {' or '.join(sides)}.")


def set_up_phase(model: PreTrainedModel, recipe: Recipe, phase: Phase) -> None:
    """Sets what the phases of a stage change in its model, besides which parts are trained."""
    if isinstance(recipe, ContrastiveRecipe):
        model.patch_drop_rate = phase.patch_drop_rate
    if isinstance(recipe, GenerativeRecipe):
        model.itc_on_vision_tower = phase.itc_on_vision_tower


# ------------------------------------------------------------------------------------------------------- the processor
def load_tokenizer(recipe: ContrastiveRecipe, folder: Folder | None) -> PreTrainedTokenizerBase:
    """The tokenizer of stage 1: one in a folder, or for generated scenes one of their captions.

    Raises:
        ValueError: If there is none.
    """
    if folder is not None:
        config = Path(folder, "config.json")
        if config.is_file():
            read_config_file(config)
        return AutoTokenizer.from_pretrained(folder)
    if recipe.is_generated:
        return caption_tokenizer()
    raise ValueError(
        "Stage 1 needs a tokenizer: give a folder with one (`--tokenizer`), or a LLaMA to start from (`--llama`)."
    )


def build_pair_processor(recipe: ContrastiveRecipe, tokenizer: PreTrainedTokenizerBase) -> InternVLProcessor:
    """The processor of stage 1, as the finished model needs it: images of the last phase's size."""
    side = recipe.phases[-1].image_size
    image_processor = InternVLImageProcessor(size={"height": side, "width": side}, resize_mode="squash")
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive", max_text_length=recipe.max_text_length)


def load_pair_processor(
    source: Folder, recipe: ContrastiveRecipe | GenerativeRecipe | RetrievalRecipe | CaptionRecipe
) -> InternVLProcessor:
    """The processor in a folder, with the recipe's image size."""
    processor = InternVLProcessor.from_pretrained(source)
    side = recipe.phases[-1].image_size
    processor.image_processor.size = {"height": side, "width": side}
    # The stage before may have read longer texts than this one trains on.
    processor.max_text_length = max(processor.max_text_length, recipe.max_text_length)
    return processor


def build_chat_processor(
    recipe: DialogueRecipe, tokenizer: PreTrainedTokenizerBase, patch_size: int, num_queries: int = 0
) -> InternVLProcessor:
    """The processor of stage 3: the decoder's tokenizer with the image tokens and the recipe's template.

    Args:
        recipe: The recipe.
        tokenizer: The decoder's tokenizer; the image tokens that it lacks are added.
        patch_size: Patch size of the vision tower.
        num_queries: Image tokens of a tile that come from QLLaMA.
    """
    known = tokenizer.get_vocab()
    encloses = recipe.model_config.get("use_image_start_end", True)
    image_tokens = (*((IMAGE_START_TOKEN, IMAGE_END_TOKEN) if encloses else ()), IMAGE_CONTEXT_TOKEN)
    tokenizer.add_tokens([token for token in image_tokens if token not in known], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    side = recipe.phases[-1].image_size
    image_processor = InternVLImageProcessor(
        size={"height": side, "width": side},
        resize_mode=recipe.resize_mode,
        min_num=1,
        max_num=recipe.max_tiles,
        use_thumbnail=recipe.max_tiles > 1,
    )
    num_tokens = num_queries + int(side // patch_size * recipe.downsample_ratio) ** 2
    template = get_conversation_template(recipe.template).to_jinja()
    return InternVLProcessor(
        image_processor,
        tokenizer,
        image_seq_length=num_tokens,
        chat_template=template,
        use_image_start_end=encloses,
    )


# --------------------------------------------------------------------------------------------------- stages 1 and 2
def _drop_path(recipe: Recipe) -> dict[str, Any]:
    """Settings of a vision tower."""
    return {"drop_path_rate": recipe.drop_path_rate, "drop_path_schedule": recipe.drop_path_schedule}


def _config_of(source: Folder, recipe: Recipe) -> InternVLConfig:
    needs_queries = isinstance(recipe, RetrievalRecipe | CaptionRecipe)
    check_kind(source, *(("InternVL-G",) if needs_queries else C_AND_G), door="`--model`")
    config = InternVLConfig.from_pretrained(source)
    for name, value in _drop_path(recipe).items():
        setattr(config.vision_config, name, value)
    config.force_image_size = recipe.phases[-1].image_size
    if isinstance(recipe, EmbeddingRecipe) and recipe.matryoshka_dims:
        config = InternVLConfig.from_dict({**config.to_dict(), "matryoshka_dims": list(recipe.matryoshka_dims)})
    return config


def _read_llama(folder: Folder, num_tokens: int) -> LlamaForCausalLM:
    check_kind(folder, "llama", door="`--llama`")
    llama = LlamaForCausalLM.from_pretrained(folder)
    if llama.config.vocab_size != num_tokens:
        llama.resize_token_embeddings(num_tokens)  # new words start around the mean of the others
    return llama


def _copy_weights(module: nn.Module, weights: dict[str, torch.Tensor], source: Folder) -> None:
    """Loads weights that must be there for everything but what stage 2 adds."""
    try:
        found = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The weights of {source} do not fit this model: {error}") from error
    missing = [name for name in found.missing_keys if ".cross_attn." not in name]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"The weights of {source} do not fit this model: {missing} are missing, {found.unexpected_keys} are too "
            "many."
        )


def build_contrastive_model(
    recipe: ContrastiveRecipe,
    tokenizer: PreTrainedTokenizerBase,
    source: Folder | None = None,
    llama: Folder | None = None,
) -> InternVLForContrastiveTraining:
    """The model of stage 1.

    Args:
        recipe: The recipe.
        tokenizer: Whose vocabulary the text encoder gets.
        source: Folder of an InternVL-C to go on from; None starts from nothing.
        llama: Folder of a LLaMA that the text encoder starts from, in place of the recipe's `text_config`.

    Raises:
        ValueError: If both folders are given, or the LLaMA does not fit.
    """
    settings: dict[str, Any] = {
        "objective": recipe.objective,
        "drop_low_contrast_patches": recipe.drop_low_contrast_patches,
        "num_length_buckets": recipe.num_length_buckets,
        "grad_cache_chunk_size": recipe.grad_cache_chunk_size,
        "max_logit_scale": recipe.max_logit_scale,
    }
    if source is not None:
        if llama is not None:
            raise ValueError(f"The text encoder starts from {source} or from {llama}; give one of them.")
        config = _config_of(source, recipe)
        return InternVLForContrastiveTraining.from_pretrained(source, config=config, **settings)
    start = None if llama is None else _read_llama(llama, len(tokenizer))
    text_config = dict(recipe.text_config if start is None else start.config.to_dict())
    for key in ("model_type", "architectures", "auto_map"):
        text_config.pop(key, None)
    text_config.update(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id or 0,
        bos_token_id=tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config={**recipe.vision_config, **_drop_path(recipe)},
        qllama_config=text_config,
        num_query_token=0,
        force_image_size=recipe.phases[-1].image_size,
        matryoshka_dims=list(recipe.matryoshka_dims) or None,
        **recipe.model_config,
    )
    model = InternVLForContrastiveTraining(config, **settings)
    if recipe.init_as_beit:
        init_as_beit(model)
    if recipe.init_for_scenes:
        init_embeddings_for_scenes(model)
    if start is not None:
        _copy_weights(model.qllama.model, start.model.state_dict(), str(llama))
    return model


def build_generative_model(
    recipe: GenerativeRecipe, source: Folder, prefix_lengths: dict[str, int], llama: Folder | None = None
) -> InternVLForGenerativeTraining:
    """The model of stage 2: InternViT and LLaMA of stage 1, with queries, cross-attention and heads that start from
    nothing.

    Args:
        recipe: The recipe.
        source: Folder of stage 1, or of a stage 2 to go on from.
        prefix_lengths: As from `GenerativeCollator.prefix_lengths`.
        llama: Folder of the LLaMA whose language head is taken; None starts it from nothing.
    """
    config = _config_of(source, recipe)
    if not config.has_queries:
        config.num_query_token = recipe.num_query_token
        config.qllama_config.cross_attention_frequency = recipe.cross_attention_frequency
    settings: dict[str, Any] = {
        "grad_cache_chunk_size": recipe.grad_cache_chunk_size,
        "max_logit_scale": recipe.max_logit_scale,
        **prefix_lengths,
    }
    model = InternVLForGenerativeTraining.from_pretrained(source, config=config, **settings)
    if llama is not None:
        head = _read_llama(llama, config.qllama_config.vocab_size).lm_head
        _copy_weights(model.qllama.lm_head, head.state_dict(), llama)
    return model


def build_retrieval_model(recipe: RetrievalRecipe, source: Folder) -> InternVLForRetrievalTraining:
    """The model of retrieval fine-tuning, from the folder of stage 2."""
    settings: dict[str, Any] = {
        "grad_cache_chunk_size": recipe.grad_cache_chunk_size,
        "max_logit_scale": recipe.max_logit_scale,
    }
    return InternVLForRetrievalTraining.from_pretrained(source, config=_config_of(source, recipe), **settings)


def build_caption_model(recipe: CaptionRecipe, source: Folder) -> InternVLForCaptionTraining:
    """The model of caption fine-tuning, from the folder of stage 2."""
    settings = {"grad_cache_chunk_size": recipe.grad_cache_chunk_size}
    return InternVLForCaptionTraining.from_pretrained(source, config=_config_of(source, recipe), **settings)


# ------------------------------------------------------------------------------------------------------------- stage 3
def build_chat_model(
    recipe: DialogueRecipe, source: Folder, decoder: Folder | None = None
) -> tuple[InternVLChatForConditionalGeneration, InternVLProcessor]:
    """The model of stage 3 and its processor.

    The simple configuration takes stage 2's vision tower, the full one its QLLaMA and queries too. The projectors
    start from random weights, and so does the decoder without `decoder`.

    Args:
        recipe: The recipe.
        source: Folder of stage 2, or of stage 1 for the simple configuration.
        decoder: Folder of any causal language model with its tokenizer; None builds one by the recipe's `text_config`,
            with the tokenizer of generated questions.

    Raises:
        ValueError: If the full configuration is wanted of a model without queries, or there is no decoder.
    """
    check_kind(source, *C_AND_G, door="`--model`")
    if decoder is not None:
        check_kind(decoder, "language", door="`--decoder`")
    elif not recipe.text_config:
        raise ValueError("This recipe has no `text_config` of a decoder: give the folder of one by `--decoder`.")
    base = InternVLModel.from_pretrained(source)
    is_full = recipe.connector != "patches"
    if is_full and not base.config.has_queries:
        raise ValueError(
            f"`connector` {recipe.connector!r} needs the queries of stage 2, but {source} has none. Run stage 2 "
            "first, or take the connector 'patches'."
        )
    side, vision_config = recipe.phases[-1].image_size, base.config.vision_config
    if vision_config.image_size != side:
        base.vision_model.resize_pos_embeddings(vision_config.image_size, side, vision_config.patch_size)
    num_queries = base.config.num_query_token if is_full else 0
    tokenizer = question_tokenizer() if decoder is None else AutoTokenizer.from_pretrained(decoder)
    processor = build_chat_processor(recipe, tokenizer, vision_config.patch_size, num_queries)
    language = None if decoder is None else _read_decoder(decoder, len(tokenizer))
    model = InternVLChatForConditionalGeneration(_chat_config(recipe, base, language, processor))
    model.skips_unlabelled_logits = True
    _fill_chat(model, base, language, str(source), str(decoder))
    model.generation_config = GenerationConfig(
        eos_token_id=get_conversation_template(recipe.template).end_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **recipe.generation_config,
    )
    return model, processor


def is_chat_model(source: Folder) -> bool:
    """Whether a folder or repository holds a chat model."""
    return kind_of(AutoConfig.from_pretrained(source)) == "chat"


def load_chat_model(
    recipe: DialogueRecipe, source: Folder
) -> tuple[InternVLChatForConditionalGeneration, InternVLProcessor]:
    """The model and the processor of a chat model that is fine-tuned, with the recipe's image size and tiles.

    Args:
        recipe: The recipe.
        source: Folder of a chat model, or its name on the Hub.
    """
    check_kind(source, "chat", door="`--model`")
    model = InternVLChatForConditionalGeneration.from_pretrained(source, dtype="auto")
    model.skips_unlabelled_logits = True
    processor = InternVLProcessor.from_pretrained(source)
    config, side = model.config, recipe.phases[-1].image_size
    vision_config, image_processor = config.vision_config, processor.image_processor
    if vision_config.image_size != side:
        model.vision_model.resize_pos_embeddings(vision_config.image_size, side, vision_config.patch_size)
        tokens = [
            int(size // vision_config.patch_size * config.downsample_ratio) ** 2
            for size in (image_processor.size["height"], side)
        ]
        processor.image_seq_length += tokens[1] - tokens[0]
        image_processor.size = {"height": side, "width": side}
        config.force_image_size = side
    image_processor.max_num = config.max_dynamic_patch = recipe.max_tiles
    config.dynamic_image_size = recipe.max_tiles > 1
    return model, processor


def _read_decoder(folder: Folder, num_tokens: int) -> PreTrainedModel:
    decoder = AutoModelForCausalLM.from_pretrained(folder)
    if decoder.get_input_embeddings().num_embeddings < num_tokens:
        decoder.resize_token_embeddings(num_tokens)
    return decoder


def _chat_config(
    recipe: DialogueRecipe, base: InternVLModel, language: PreTrainedModel | None, processor: InternVLProcessor
) -> InternVLChatConfig:
    tokenizer = processor.tokenizer
    if language is not None:
        text_config, is_tied = language.config.to_dict(), language.config.tie_word_embeddings
    else:
        is_tied = recipe.text_config.get("tie_word_embeddings", False)
        text_config = {
            **recipe.text_config,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return InternVLChatConfig(
        vision_config={**base.config.vision_config.to_dict(), **_drop_path(recipe)},
        text_config=text_config,
        qllama_config=None if recipe.connector == "patches" else base.config.qllama_config.to_dict(),
        connector=recipe.connector,
        downsample_ratio=recipe.downsample_ratio,
        ps_version="v2",
        template=recipe.template,
        force_image_size=recipe.phases[-1].image_size,
        dynamic_image_size=recipe.max_tiles > 1,
        use_thumbnail=recipe.max_tiles > 1,
        min_dynamic_patch=1,
        max_dynamic_patch=recipe.max_tiles,
        pad2square=recipe.resize_mode == "pad",
        image_token_id=processor.image_token_id,
        tie_word_embeddings=is_tied,
        **recipe.model_config,
    )


def _fill_chat(
    model: InternVLChatForConditionalGeneration,
    base: InternVLModel,
    language: PreTrainedModel | None,
    source: str,
    decoder: str,
) -> None:
    """Weights of the parts, in the dtypes they are stored in."""
    parts: list[tuple[nn.Module, nn.Module, str]] = [(model.vision_model, base.vision_model, source)]
    if language is not None:
        parts.append((model.language_model, language, decoder))
    if model.qllama is not None:
        base.qllama.model.embed_tokens = None  # a chat model gives QLLaMA no text
        parts.append((model.qllama, base.qllama.model, source))
        model.query_tokens.data = base.query_tokens.data.clone()
    for module, start, name in parts:
        module.to(next(start.parameters()).dtype)
        _copy_weights(module, start.state_dict(), name)
