"""The stages: `python -m internvl.training stage1|stage2|stage3|retrieval|captions --output DIR ...`.

Each stage writes a folder, see `trainer`, that the next stage starts from; the same command with `--resume` gives the
weights of an unbroken run. On several processes start the same command with `accelerate launch`. A recipe of generated
scenes ("bundled") needs no data.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..processing_internvl import InternVLProcessor
from .curves import AnswerCurve, CaptionCurve, RetrievalCurve, ZeroShotCurve
from .data.augmentation import Augmentation
from .data.collators import CaptionCollator, GenerativeCollator, RetrievalCollator
from .data.dialogues import DialogueCollator, DialogueEncoder
from .data.filters import Funnel
from .data.generated import Encode, dialogue_batches, encode_captions, encode_pairs, only_item, scene_batches
from .data.negatives import CaptionPool
from .data.pairs import PairCollator, PairStream
from .data.sources import StreamMixture, dialogue_data, pair_data
from .models.build import (
    Folder,
    build_caption_model,
    build_chat_model,
    build_contrastive_model,
    build_generative_model,
    build_pair_processor,
    build_retrieval_model,
    fit_image_sizes,
    is_chat_model,
    load_chat_model,
    load_pair_processor,
    load_tokenizer,
)
from .recipes import (
    CaptionRecipe,
    ContrastiveRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RetrievalRecipe,
)
from .trainer import (
    Data,
    DataOfPhase,
    Evaluation,
    Run,
    Stage,
    check_has_pairs,
    finished_model,
    is_first_process,
    num_processes,
    train,
    training_arguments,
    with_lora,
)


def check_data(recipe: Recipe, files: list[str] | None) -> None:
    """Check that data is given where a phase needs it, and only there.

    Raises:
        ValueError: If not.
    """
    if recipe.is_generated and files:
        raise ValueError("This recipe trains on generated scenes: leave out `--data`.")
    if not recipe.is_generated and not files:
        raise ValueError("This recipe needs data: give files by `--data`.")


def check_batches(recipe: Recipe, run: Run) -> None:
    """Check that every forward of a loss that compares pairs with each other sees all pairs of its process.

    Raises:
        ValueError: If a step has one pair, or accumulates gradients of several forwards.
    """
    if isinstance(recipe, CaptionRecipe | DialogueRecipe):
        return
    for phase in recipe.phases:
        if not phase.steps or phase.batches:
            continue
        if phase.batch_size == 1:
            raise ValueError(
                "A step has one pair, but this loss compares the pairs of a step with each other: give a "
                "`--batch-size` of 2 or more."
            )
        share = phase.batch_size // num_processes()
        steps = run.arguments.get("gradient_accumulation_steps", 1)
        if steps > 1 or run.arguments.get("per_device_train_batch_size", share) < share:
            raise ValueError(
                "This loss compares the pairs of a step with each other, which accumulated gradients of several "
                "forwards would not: leave `--gradient-accumulation-steps` out, and give the whole batch by "
                "`--batch-size`. Memory is bounded by the recipe's `grad_cache_chunk_size` (here "
                f"{recipe.grad_cache_chunk_size}), with the gradients of the whole batch."
            )


def _pair_data(
    recipe: Recipe,
    shards: list[str] | None,
    run: Run,
    processor: InternVLProcessor,
    collate: Callable[..., Any],
    encode: Encode | None = None,
) -> DataOfPhase:
    """What each phase trains on: the given shards, or generated batches where the phase has some.

    `collate` makes a collator, given the settings of the image processor; `encode` makes inputs from scenes.
    """
    check_data(recipe, shards)
    check_batches(recipe, run)

    def data(number: int, phase: Phase, arguments: TrainingArguments) -> Data:
        if phase.batches and encode is not None:
            return scene_batches(recipe, phase, encode), only_item
        stream = pair_stream(
            shards or [],
            processor,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            seed=recipe.seed + number,  # the next phase goes through the data in another order
            funnel=None if run.funnel_stage is None else Funnel(run.funnel_stage),
            images=run.images,
            max_bad_rate=run.max_bad_rate,
        )
        side = phase.image_size
        settings: dict[str, Any] = {"size": {"height": side, "width": side}, "resize_mode": "squash"}
        if recipe.crop_scale is not None or recipe.flip_rate:
            settings["augment"] = Augmentation(recipe.crop_scale, recipe.flip_rate, stream.seed)
        if isinstance(recipe, RetrievalRecipe) and recipe.negatives == "random":
            streams: Any = stream.streams if isinstance(stream, StreamMixture) else [stream]
            settings["pool"] = CaptionPool.read(*streams)
        return stream, collate(**settings)

    return data


def pair_stream(shards: list[str], processor: InternVLProcessor, **settings: Any) -> PairStream | StreamMixture:
    """Return a stream of pairs whose images are read as those of a processor."""
    image_processor = processor.image_processor
    return pair_data(
        shards,
        max_image_pixels=image_processor.max_image_pixels,
        background_color=image_processor.background_color,
        **settings,
    )


class HeldOutPairs(Dataset):
    """Held-out pairs, in memory.

    Args:
        pairs: As from `PairStream`.
    """

    def __init__(self, pairs: Iterable[dict[str, Any]]) -> None:
        self.pairs = [{**pair, "is_held_out": True} for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pairs[index]


def _pair_evaluation(
    run: Run, processor: InternVLProcessor, kind: type[RetrievalCurve | CaptionCurve] = RetrievalCurve
) -> Evaluation | None:
    """What is measured on held-out pairs: the loss, and recall or CIDEr."""
    if not run.eval_data:
        return None
    stream = pair_stream(
        list(run.eval_data), processor, images=run.images, max_bad_rate=run.max_bad_rate, shuffle_buffer=1, epochs=1
    )
    held_out = HeldOutPairs(islice(stream, run.eval_samples))
    images, captions = [pair["image"] for pair in held_out.pairs], [pair["text"] for pair in held_out.pairs]
    return Evaluation(held_out, kind(processor, images, captions))


def run_stage1(
    recipe: ContrastiveRecipe,
    shards: list[str] | None,
    run: Run,
    tokenizer: Folder | None = None,
    source: Folder | None = None,
    llama: Folder | None = None,
) -> PreTrainedModel:
    """Contrastive training; the folder it writes is an InternVL-C.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, see `PairStream`; None for a recipe of generated scenes.
        run: How to run it.
        tokenizer: Folder of the tokenizer; by default that of `source` or `llama`, or one of generated captions.
        source: Folder of an InternVL-C to go on from.
        llama: Folder of a LLaMA that the text encoder starts from.

    Returns:
        The trained model.

    Raises:
        ValueError: If there is no tokenizer, or the data does not fit the recipe.
    """
    recipe = fit_image_sizes(recipe, source)
    run = run.reading(source, tokenizer, llama, *(shards or ()))
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    if source is None or tokenizer is not None:
        processor = build_pair_processor(recipe, load_tokenizer(recipe, tokenizer or source or llama))
    else:
        processor = load_pair_processor(source, recipe)
    collate = partial(PairCollator, processor, "contrastive", max_length=recipe.max_text_length)
    data = _pair_data(recipe, shards, run, processor, collate, partial(encode_pairs, processor))
    model = build_contrastive_model(recipe, processor.tokenizer, source, llama)
    curve = None if recipe.eval_steps is None else ZeroShotCurve(processor, recipe.eval_samples)
    evaluation = _pair_evaluation(run, processor)
    return train(Stage(model, processor, recipe, run, data, curve=curve, evaluation=evaluation))


def run_stage2(
    recipe: GenerativeRecipe, shards: list[str] | None, run: Run, source: Folder, llama: Folder | None = None
) -> PreTrainedModel:
    """Generative training; the folder it writes is an InternVL-G.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, see `PairStream`; None for a recipe of generated scenes.
        run: How to run it.
        source: Folder of stage 1.
        llama: Folder of the LLaMA whose language head is taken; None starts it from random weights.

    Returns:
        The trained model.

    Raises:
        ValueError: If the data does not fit the recipe.
    """
    recipe = fit_image_sizes(recipe, source)
    run = run.reading(source, llama, *(shards or ()))
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    processor = load_pair_processor(source, recipe)
    collate = partial(GenerativeCollator, processor, recipe.max_text_length, recipe.padding)
    data = _pair_data(recipe, shards, run, processor, collate, partial(encode_captions, collate()))
    model = build_generative_model(recipe, source, collate().prefix_lengths(), llama)
    curve = None if recipe.eval_steps is None else RetrievalCurve.of_scenes(processor, recipe.eval_samples)
    evaluation = _pair_evaluation(run, processor)
    return train(Stage(model, processor, recipe, run, data, curve=curve, evaluation=evaluation))


def run_retrieval(recipe: RetrievalRecipe, shards: list[str], run: Run, source: Folder) -> PreTrainedModel:
    """Retrieval fine-tuning; the folder it writes is an InternVL-G.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, one for each caption of an image.
        run: How to run it.
        source: Folder of stage 2.

    Returns:
        The trained model.

    Raises:
        ValueError: If there is no data.
    """
    recipe = fit_image_sizes(recipe, source)
    run = run.reading(source, *shards)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    processor = load_pair_processor(source, recipe)
    collate = partial(
        RetrievalCollator,
        processor,
        recipe.max_text_length,
        seed=recipe.seed,
        simple_captions=recipe.simple_captions,
    )
    data = _pair_data(recipe, shards, run, processor, collate)
    evaluation = _pair_evaluation(run, processor)
    return train(Stage(build_retrieval_model(recipe, source), processor, recipe, run, data, evaluation=evaluation))


def run_captions(recipe: CaptionRecipe, shards: list[str], run: Run, source: Folder) -> PreTrainedModel:
    """Caption fine-tuning; the folder it writes is an InternVL-G.

    Args:
        recipe: The recipe.
        shards: Image-text pairs, one for each caption of an image.
        run: How to run it.
        source: Folder of stage 2.

    Returns:
        The trained model.

    Raises:
        ValueError: If there is no data.
    """
    recipe = fit_image_sizes(recipe, source)
    run = run.reading(source, *shards)
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    set_seed(recipe.seed)
    processor = load_pair_processor(source, recipe)
    if recipe.prompt is not None:
        processor.caption_prompt = recipe.prompt
    collate = partial(CaptionCollator, processor, recipe.max_text_length, recipe.padding)
    data = _pair_data(recipe, shards, run, processor, collate)
    evaluation = _pair_evaluation(run, processor, CaptionCurve)
    return train(Stage(build_caption_model(recipe, source), processor, recipe, run, data, evaluation=evaluation))


def run_stage3(
    recipe: DialogueRecipe,
    files: list[str] | None,
    run: Run,
    source: Folder,
    decoder: Folder | None = None,
    images: Folder | None = None,
) -> PreTrainedModel:
    """Instruction tuning; the folder it writes is an InternVL-Chat.

    Args:
        recipe: The recipe.
        files: Dialogues, see `DialogueDataset`; None for a recipe of generated scenes.
        run: How to run it.
        source: Folder of stage 2, or of a chat model to go on from.
        decoder: Folder of a causal language model with its tokenizer; None builds the recipe's own, or keeps that of
            the chat model.
        images: As `images` of the run.

    Returns:
        The trained model.

    Raises:
        ValueError: If the data does not fit the recipe, or there is no decoder.
    """
    recipe = fit_image_sizes(recipe, source)
    run = run.reading(source, decoder, images, *(files or ()))
    if (finished := finished_model(recipe, run)) is not None:
        return finished
    check_data(recipe, files)
    set_seed(recipe.seed)
    if decoder is None and is_chat_model(source):
        model, processor = load_chat_model(recipe, source)
    else:
        model, processor = build_chat_model(recipe, source, decoder)
    images = run.images if images is None else images
    encoder = DialogueEncoder(processor, recipe.max_length, video_frames=recipe.video_frames)
    settings: dict[str, Any] = {"images": images, "max_bad_rate": run.max_bad_rate}
    indexed: Any = None
    if files and not run.is_streamed:
        indexed = dialogue_data(files, encoder, seed=recipe.seed, **settings)
    for rows in [] if indexed is None else getattr(indexed, "datasets", [indexed]):
        rows.check_has_rows()

    def data(number: int, phase: Phase, arguments: TrainingArguments) -> Data:
        if phase.batches or not files:
            return dialogue_batches(recipe, phase, processor), only_item
        place = {"rank": arguments.process_index, "world_size": arguments.world_size}
        streamed = {"is_streamed": True, "seed": recipe.seed + number, **settings, **place}
        return indexed or dialogue_data(files, encoder, **streamed), DialogueCollator(encoder, recipe.pack)

    evaluation = None
    if run.eval_data:
        held_out = dialogue_data(run.eval_data, encoder, **settings)
        evaluation = Evaluation(held_out, AnswerCurve(processor, held_out, run.eval_samples))
    return train(Stage(model, processor, recipe, run, data, recipe.grad_cache_chunk_size, evaluation=evaluation))


__all__ = [
    "Run",
    "check_has_pairs",
    "is_first_process",
    "run_captions",
    "run_retrieval",
    "run_stage1",
    "run_stage2",
    "run_stage3",
    "training_arguments",
    "with_lora",
]
