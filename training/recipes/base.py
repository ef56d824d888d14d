"""What a recipe consists of: dataclasses with every number of a run."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from ...renaming_internvl import renamed_arguments


NEGATIVES = ("random", "similar")


@dataclass(frozen=True)
class Batch:
    """A kind of batch of generated scenes.

    Args:
        weight: Relative frequency of this kind among the batches of a phase.
        num_images: Scenes in a batch.
        layouts: Layouts of the scenes with their relative frequencies, see `synthetic`.
    """

    weight: float
    num_images: int
    layouts: dict[str, float]


@renamed_arguments(rates="learning_rates", dropped_patches="patch_drop_rate")
@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimizer, warm-up and schedule.

    Args:
        name: Name of the phase; its checkpoints are stored under it.
        steps: Length in optimizer steps. A phase of 0 steps is skipped.
        learning_rates: Peak learning rate of each trained part; parts that are not listed are frozen.
        image_size: Side of the images in pixels.
        warmup_steps: Steps of linear warm-up.
        batch_size: Samples of a step over all processes; with `batches`, batches of a step.
        patch_drop_rate: Share of the patches left out (stage 1).
        muon_learning_rate: Peak learning rate of hidden weight matrices under Muon. Weight decay then applies to these
            alone, and everything else is trained by AdamW at `learning_rates`. None trains all by AdamW.
        cooldown_fraction: Share of the steps over which the learning rates fall to zero linearly after a constant
            stretch (warm-up-stable-decay). None means a cosine decay.
        batches: Kinds of batches of generated scenes, one of which is drawn for each step. Empty means that the phase
            trains on the data given to the stage.
        dense_supervision: Train the vision tower and the projector to name what each image token shows (stage 3).
            Needs `batches`, since only generated scenes have such labels.
        itc_on_vision_tower: Contrast texts with the embeddings of InternVL-C too, for phases that train the LLaMA
            (stage 2): otherwise texts would drift away from them.

    Raises:
        ValueError: If a value is out of its range, or dense supervision lacks `batches`.
    """

    name: str
    steps: int
    learning_rates: dict[str, float]
    image_size: int
    warmup_steps: int
    batch_size: int
    patch_drop_rate: float = 0.0
    muon_learning_rate: float | None = None
    cooldown_fraction: float | None = None
    batches: tuple[Batch, ...] = ()
    dense_supervision: bool = False
    itc_on_vision_tower: bool = False

    def __post_init__(self) -> None:
        if self.cooldown_fraction is not None and not 0 <= self.cooldown_fraction <= 1:
            raise ValueError(f"`cooldown_fraction` must be in [0, 1], got {self.cooldown_fraction}.")
        if self.dense_supervision and not self.batches:
            raise ValueError("`dense_supervision` needs labels of image tokens, which only generated `batches` have.")


@renamed_arguments(rows_at_a_time="grad_cache_chunk_size")
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of all stages.

    Args:
        phases: Phases, in order.
        one_schedule: The phases share one warm-up (the first one's) and one schedule, of which each has its stretch.
            AdamW's moments begin anew in each phase.
        weight_decay: Weight decay of matrices, see `parameter_groups.decays`.
        decay_inputs: Decay queries, positions, the class token and the temperature too, as the published fine-tuning
            code does.
        betas: Betas of AdamW.
        layer_decay: Factor by which each layer of the vision tower learns slower than the layer above, counted as the
            published fine-tuning code does, see `parameter_groups.layers_above`.
        qllama_layer_decay: The same factor for QLLaMA.
        drop_path_rate: Stochastic depth of the last vision block.
        drop_path_schedule: "linear" lets it rise from 0 in the first block, "uniform" gives all blocks the same.
        crop_scale: Augmentation of pairs: least and most area of a random crop of each image, as shares of the image.
            None takes whole images.
        flip_rate: Augmentation of pairs: share of the images that are mirrored.
        max_grad_norm: Gradients are clipped to this norm; 0 disables clipping.
        grad_cache_chunk_size: Samples of a process in memory at a time: gradient caching in the contrastive stages,
            accumulation in stage 3. None means all.
        gather_once: Under FSDP, keep the weights gathered from the first chunk of gradient caching to the end of the
            backward pass: less traffic for more memory, that of the whole model in bfloat16.
        ema_decay: Decay of the exponential moving average of the trained weights, which is measured and exported in
            their stead; each phase begins its own. None keeps no average.
        gradient_checkpointing: Recompute activations in the backward pass.
        use_bf16: Compute in bfloat16 (autocast); trained weights stay in float32.
        attn_implementation: Attention of all parts during training; None keeps the default.
        save_steps: Steps between two checkpoints.
        save_total_limit: How many whole checkpoints of a phase are kept.
        logging_steps: Steps between two entries of the log.
        eval_steps: Steps between two points of the learning curve on held-out generated scenes (stages 1 and 2):
            zero-shot accuracy in stage 1, retrieval in stage 2. None measures nothing.
        eval_samples: Held-out images of each kind per point.
        seed: Decides the order of the data and all random numbers.
    """

    stage: ClassVar[str]
    phases: tuple[Phase, ...]
    one_schedule: bool = False
    weight_decay: float
    decay_inputs: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0
    qllama_layer_decay: float = 1.0
    drop_path_rate: float = 0.0
    drop_path_schedule: str = "linear"
    crop_scale: tuple[float, float] | None = None
    flip_rate: float = 0.0
    max_grad_norm: float = 1.0
    grad_cache_chunk_size: int | None = None
    gather_once: bool = True
    ema_decay: float | None = None
    gradient_checkpointing: bool = True
    use_bf16: bool = True
    attn_implementation: str | None = None
    save_steps: int = 1000
    save_total_limit: int = 3
    logging_steps: int = 10
    eval_steps: int | None = None
    eval_samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be two rising shares in (0, 1], got {self.crop_scale}.")
        if not 0 <= self.flip_rate <= 1:
            raise ValueError(f"`flip_rate` must be in [0, 1], got {self.flip_rate}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay}.")

    def schedule_of(self, phase: Phase) -> tuple[int, int, int]:
        """The schedule of a phase: the step at which the phase begins in it, its length, and its steps of warm-up."""
        if not self.one_schedule:
            return 0, phase.steps, phase.warmup_steps
        names = [part.name for part in self.phases]
        before = sum(part.steps for part in self.phases[: names.index(phase.name)])
        return before, sum(part.steps for part in self.phases), self.phases[0].warmup_steps

    @property
    def is_generated(self) -> bool:
        """Whether all phases train on generated scenes, so that the stage needs no data."""
        return all(phase.batches for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe(Recipe):
    """What stages 1 and 2 and retrieval fine-tuning share.

    Args:
        max_logit_scale: Upper limit of the scale of the similarities.
        max_text_length: Tokens of every text.
        matryoshka_dims: Lengths to which embeddings can be cut afterwards, see `losses.matryoshka_loss`. Without any,
            those of the model that training starts from stay.
    """

    max_logit_scale: float = 100.0
    max_text_length: int = 80
    matryoshka_dims: tuple[int, ...] = ()


@renamed_arguments(rows_at_a_time="grad_cache_chunk_size")
@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe(EmbeddingRecipe):
    """Stage 1.

    Args:
        objective: "softmax" (InfoNCE) or "sigmoid" (SigLIP).
        drop_low_contrast_patches: Of the patches, drop those with the lowest contrast instead of random ones.
        num_length_buckets: Number of groups of similar length that texts are encoded in.
        init_as_beit: Start a vision tower from nothing as BEiT does, see `vision_start.init_as_beit`.
        init_for_scenes: Start the patch and position embeddings as `vision_start.init_embeddings_for_scenes` does.
        vision_config: Configuration of a vision tower that starts from random weights.
        text_config: Configuration of a LLaMA that starts from random weights; its vocabulary is the tokenizer's.
        model_config: Further keys of `InternVLConfig`.
    """

    stage: ClassVar[str] = "stage1"
    objective: str = "softmax"
    drop_low_contrast_patches: bool = False
    num_length_buckets: int = 1
    init_as_beit: bool = False
    init_for_scenes: bool = False
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)


@renamed_arguments(rows_at_a_time="grad_cache_chunk_size")
@dataclass(frozen=True, kw_only=True)
class GenerativeRecipe(EmbeddingRecipe):
    """Stage 2.

    Args:
        num_query_token: Number of queries that QLLaMA gets.
        cross_attention_frequency: Every how many layers one has cross-attention.
        padding: "max_length" pads all texts to `max_text_length`, "longest" to the longest of their batch.
    """

    stage: ClassVar[str] = "stage2"
    num_query_token: int = 96
    cross_attention_frequency: int = 2
    padding: str = "max_length"


@renamed_arguments(rows_at_a_time="grad_cache_chunk_size")
@dataclass(frozen=True, kw_only=True)
class RetrievalRecipe(EmbeddingRecipe):
    """Retrieval fine-tuning of InternVL-C and -G.

    Args:
        negatives: Texts that do not match: "random" draws one for each image among the captions of all other images of
            the data, as published; "similar" among those of the batch, the likelier the more similar it is.
        simple_captions: Lower-case letters, no punctuation, at most 50 words, as published.
    """

    stage: ClassVar[str] = "retrieval"
    negatives: str = "similar"
    simple_captions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives not in NEGATIVES:
            raise ValueError(f"`negatives` must be one of {list(NEGATIVES)}, got {self.negatives!r}.")


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe(Recipe):
    """Caption fine-tuning of InternVL-G.

    Args:
        max_text_length: Tokens of every text.
        padding: "max_length" pads all texts to `max_text_length`, "longest" to the longest of their batch.
        prompt: What a caption begins after; None keeps the processor's own prompt.
    """

    stage: ClassVar[str] = "captions"
    max_text_length: int = 80
    padding: str = "longest"
    prompt: str | None = None


@renamed_arguments(rows_at_a_time="grad_cache_chunk_size")
@dataclass(frozen=True, kw_only=True)
class DialogueRecipe(Recipe):
    """Stage 3.

    Args:
        connector: "patches" (InternVL-Chat, simple) or "queries_and_patches" (full).
        template: Name of the conversation template.
        max_tiles: Maximum number of tiles of an image.
        resize_mode: How an image becomes square: "tiles" of up to `max_tiles`, or with one tile "pad" or "crop".
        downsample_ratio: Pixel shuffle factor per side.
        max_length: Maximum number of tokens of a dialogue; longer ones are left out.
        video_frames: Fewest and most frames of a video, each an image of one tile.
        pack: Pack the dialogues of a batch into one row, without padding.
        num_turns: Questions about each generated scene.
        text_config: Configuration of a decoder that starts from random weights; its vocabulary is that of the
            tokenizer of generated questions. Empty means that a decoder must be given.
        model_config: Further keys of `InternVLChatConfig`.
        generation_config: Further keys of the generation configuration.
    """

    stage: ClassVar[str] = "stage3"
    connector: str = "patches"
    template: str = "internvl2_5"
    max_tiles: int = 1
    resize_mode: str = "tiles"
    downsample_ratio: float = 0.5
    max_length: int = 2048
    video_frames: tuple[int, int] = (8, 32)
    pack: bool = False
    num_turns: int = 12
    text_config: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tiles > 1 and self.resize_mode != "tiles":
            raise ValueError(
                f"`max_tiles` is {self.max_tiles}, but with `resize_mode` {self.resize_mode!r} an image is one tile."
            )


RecipeType = TypeVar("RecipeType", bound=Recipe)


def phase_named(recipe: Recipe, name: str) -> Phase:
    """Return a phase of a recipe by its name."""
    return next(phase for phase in recipe.phases if phase.name == name)


def with_steps(recipe: RecipeType, steps: int) -> RecipeType:
    """Return the recipe with `steps` steps in each phase and warm-ups of at most a tenth of them, for a trial."""
    phases = [
        replace(phase, steps=steps, warmup_steps=min(phase.warmup_steps, steps // 10)) for phase in recipe.phases
    ]
    return replace(recipe, phases=tuple(phases))
