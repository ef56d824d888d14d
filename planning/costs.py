"""What the recipes cost at full size: memory of a GPU and days on many, from shapes alone: `python -m internvl.planning costs`.

The models are built on the meta device. Counted are the matrix products of a sample as the training models run them: forward,
backward into weights that are trained and through layers that something trained lies before, frozen parts forward only, dropped
patches not at all, and what gradient caching and activation checkpointing compute again. `ASSUMPTIONS` goes with every table.

Not covered: reading data, evaluation, restarts, pipeline and tensor parallelism.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention_masks_qllama import PackedPasses
from ..configuration_internvl import InternVLChatConfig, InternVLConfig
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..training.models.parameter_groups import part_of
from ..training.models.pretraining import (
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)
from ..training.recipes import (
    ContrastiveRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    retrieval,
    stage1,
    stage2,
    stage3,
)
from .cluster import DECODERS, Cluster
from .memory import TEXT_LENGTH, read_config


GIGABYTE = 1e9
HALF, FULL = 2, 4  # bytes of bfloat16 and float32
ADAM = 2 * FULL
# How QLLaMA reads a picture, see pretraining: once for each loss.
STAGE_2 = ("matching", "image", "generation")
RETRIEVAL = ("matching", "matching", "image")
ASSUMPTIONS = (
    "1 FLOP is one multiplication or one addition; attention counts whole, padding and masked places too; norms, softmax, "
    "activations and the optimizer count nothing.",
    "Texts have the recipe's full length; a dialogue has one picture of one tile and {dialogue} tokens of text, with logits at all.",
    "Days = steps x samples of a GPU x executed FLOPs / (peak x utilization): {gpus} GPUs of {peak:g} TFLOP/s, of which all executed "
    "operations, recomputed ones too, reach {utilization:.0%}. Waiting for data or for other GPUs is in that share; where a batch has "
    "fewer samples than there are GPUs, the others idle.",
    "Trained parameters take 16 bytes (float32 weight and gradient, two AdamW states), frozen ones 2 (bfloat16). {sharding}",
    "Activations: bfloat16; checkpointed layers keep their input, and one layer at a time what its backward pass needs, with an "
    "attention kernel that keeps no weights. Buffers of kernels and fragmentation are not counted: leave a tenth.",
)
SHARDING_WORDS = {
    "fsdp": "Both are shared out to all GPUs; the gathered weights of two layers and the gradient of one come on top.",
    "ddp": "Every GPU holds all of them; autocast's bfloat16 copies of trained weights come on top.",
}


@dataclass(frozen=True)
class Products:
    """Matrix products of a sample in one place of a model.

    Args:
        weights: Elements of the matrices there.
        positions: That pass through them.
        attention: FLOPs of the products of attention, forward.
        is_trained: The matrices are trained.
        is_reached: Gradients go on to what lies before.
        is_layer: Activation checkpointing computes it again.
        is_cached: Gradient caching computes it again.
    """

    weights: int
    positions: float
    attention: float = 0.0
    is_trained: bool = False
    is_reached: bool = False
    is_layer: bool = False
    is_cached: bool = True

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return 2 * self.weights * self.positions + self.attention

    @property
    def backward(self) -> float:
        """FLOPs of a backward pass."""
        products = self.is_trained + self.is_reached
        return 2 * self.weights * self.positions * products + 2 * self.attention * bool(products)

    def executed(self, caches: bool, checkpoints: bool) -> float:
        """FLOPs of a step, with what is computed again."""
        has_gradient = self.is_trained or self.is_reached
        again = (caches and self.is_cached) + (checkpoints and self.is_layer)
        return self.forward * (1 + again * has_gradient) + self.backward


class Shapes:
    """What a phase of a recipe computes for one sample.

    Args:
        model: The training model, on any device.
        recipe: The recipe.
        phase: Its phase.
        share: Samples of a step on one GPU.
        num_columns: Rows that a contrastive loss compares with: the batch of all GPUs.
        text_length: Tokens of text in a dialogue.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        phase: Phase,
        share: int,
        num_columns: int,
        text_length: int = TEXT_LENGTH,
    ) -> None:
        self.config, self.phase = model.config, phase
        self.recipe: Any = recipe  # fields of its stage
        self.share, self.num_columns = share, num_columns
        self.text_length = getattr(recipe, "max_text_length", text_length)
        self.matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
        vision = self.config.vision_config
        self.num_patches = (phase.image_size // vision.patch_size) ** 2
        self.vision_length = 1 + max(1, round(self.num_patches * (1 - phase.dropped_patches)))
        self.trains_vision = "vision" in phase.rates

    @property
    def products(self) -> list[Products]:
        """All of them."""
        stages: dict[type, Callable[[], Iterator[Products]]] = {
            ContrastiveRecipe: self._contrastive,
            GenerativeRecipe: self._generative,
            DialogueRecipe: self._dialogue,
        }
        return [*self._vision(), *stages.get(type(self.recipe), self._retrieval)()]

    @property
    def caches(self) -> bool:
        """Whether a share is more than is in memory at a time, so that the contrastive stages compute their features twice."""
        rows = self.recipe.rows_at_a_time
        return not isinstance(self.recipe, DialogueRecipe) and rows is not None and rows < self.share

    def _place(self, pattern: str, positions: float, attention: float = 0.0, **settings: Any) -> Products:
        names = [name for name in self.matrices if re.match(pattern, name)]
        is_trained = {part_of(name) in self.phase.rates for name in names}
        if len(is_trained) != 1:
            raise ValueError(f"The model has no matrices named {pattern!r}, or trains some of them.")
        weights = sum(self.matrices[name] for name in names)
        return Products(weights, positions, attention, **{"is_trained": is_trained.pop(), **settings})

    def _vision(self) -> Iterator[Products]:
        vision = self.config.vision_config
        attention = 4 * self.vision_length**2 * vision.hidden_size * vision.num_hidden_layers
        yield self._place(r"vision_model\.embeddings\.patch_embedding", self.num_patches)
        layers = r"vision_model\.encoder\.layers\."
        yield self._place(layers, self.vision_length, attention, is_reached=self.trains_vision, is_layer=True)

    def _pooling(self, name: str, width: int, positions: int, **settings: Any) -> Iterator[Products]:
        yield self._place(rf"{name}\.cross_attn\.[qp]", 1, 4 * positions * width, **settings)
        yield self._place(rf"{name}\.cross_attn\.[kv]", positions, **settings)

    def _layers(self, positions: int, is_reached: bool, **settings: Any) -> Products:
        """QLLaMA's own layers over `positions` that see each other."""
        config = self.config.qllama_config
        attention = 4 * positions**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        pattern = r"qllama\.(model\.)?layers\.\d+\.(self_attn|mlp)\."
        return self._place(pattern, positions, attention, is_reached=is_reached, is_layer=True, **settings)

    def _cross_attention(self, num_queries: int) -> Iterator[Products]:
        config = self.config.qllama_config
        layers = sum(config.has_cross_attention(layer) for layer in range(config.num_hidden_layers))
        attention = 4 * num_queries * self.vision_length * config.num_attention_heads * config.head_dim * layers
        start = r"qllama\.(model\.)?layers\.\d+\.cross_attn\."
        reached = self.trains_vision or "queries" in self.phase.rates
        yield self._place(rf"{start}[qo]_proj", num_queries, attention, is_reached=reached, is_layer=True)
        yield self._place(rf"{start}[kv]_proj", self.vision_length, is_reached=self.trains_vision, is_layer=True)

    def _similarities(self, losses: float = 1) -> Products:
        return Products(self.num_columns * self.config.clip_embed_dim, 2 * losses, is_trained=True, is_reached=True)

    def _texts(self) -> Iterator[Products]:
        """Features of the texts, which are read without a picture."""
        is_reached = "qllama" in self.phase.rates
        yield self._layers(self.text_length, is_reached)
        yield self._place("text_projection", 1, is_reached=is_reached)

    def _contrastive(self) -> Iterator[Products]:
        width = self.config.vision_config.hidden_size
        yield from self._pooling("clip_projector", width, self.vision_length, is_reached=self.trains_vision)
        yield from self._texts()
        yield self._similarities(1 if self.recipe.objective == "softmax" else 0.5)

    def _passes(self, *modes: str) -> Iterator[Products]:
        """One forward of QLLaMA that reads an image so many times, and the heads behind it."""
        passes = self._packed(*modes)
        num_queries = passes.num_copies * passes.num_queries
        yield self._layers(num_queries + sum(passes.text_lengths), is_reached=True)
        yield from self._cross_attention(num_queries)
        width = self.config.qllama_config.hidden_size
        yield from self._pooling("clip_projector2", width, passes.num_queries, is_reached=True)
        yield self._place(r"itm_head\.", modes.count("matching") * passes.num_queries, is_reached=True)

    def _packed(self, *modes: str) -> PackedPasses:
        """A picture's row: "image", what the contrastive loss needs of it, has no text."""
        lengths = tuple(0 if mode == "image" else self.text_length for mode in modes)
        return PackedPasses(modes, lengths, self.config.num_query_token)

    def _draw_negatives(self) -> Iterator[Products]:
        """InternVL-C's similarities, without gradient."""
        width = self.config.vision_config.hidden_size
        yield from self._pooling("clip_projector", width, self.vision_length, is_reached=False, is_trained=False)
        yield Products(self.share * self.config.clip_embed_dim, 1)

    def _generative(self) -> Iterator[Products]:
        yield from self._texts()
        yield from self._draw_negatives()
        yield from self._passes(*STAGE_2)
        yield self._place(r"qllama\.lm_head", self.text_length, is_reached=True)
        yield self._similarities()

    def _retrieval(self) -> Iterator[Products]:
        yield from self._texts()
        yield from self._draw_negatives()
        yield from self._passes(*RETRIEVAL)
        width = self.config.vision_config.hidden_size
        yield from self._pooling("clip_projector", width, self.vision_length, is_reached=self.trains_vision)
        yield self._similarities(losses=2)

    def _dialogue(self) -> Iterator[Products]:
        config, rates = self.config, self.phase.rates
        reached = self.trains_vision or "queries" in rates
        patches = int(math.sqrt(self.num_patches) * config.downsample_ratio) ** 2
        length = self.text_length + patches
        if config.qllama_config is not None:
            num_queries = config.qllama_config.num_query_token
            length += num_queries
            yield self._layers(num_queries, is_reached=reached)
            yield from self._cross_attention(num_queries)
            yield self._place(r"mlp2\.", num_queries, is_reached=reached)
        yield self._place(r"mlp1\.", patches, is_reached=self.trains_vision)
        text = config.text_config
        attention = 4 * length**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
        yield self._place(r"language_model\.(model\.)?layers\.", length, attention, is_reached=True, is_layer=True)
        yield self._place(r"language_model\.lm_head", self.text_length, is_reached=True)

    # ------------------------------------------------------------------------------------------------------ activations
    def activation_bytes(self) -> float:
        """The most that one GPU keeps for the backward pass of what is in memory at a time."""
        rows = min(self.recipe.rows_at_a_time or self.share, self.share)
        towers = [rows * tower for tower in self._towers()]
        kept = max(towers) if self.caches else sum(towers)  # cached towers come one after the other
        pixels = self.share if not isinstance(self.recipe, DialogueRecipe) else rows
        kept += pixels * 3 * self.phase.image_size**2 * FULL
        if isinstance(self.recipe, GenerativeRecipe) or (type(self.recipe) is not ContrastiveRecipe and self.caches):
            kept += self.share * self.vision_length * self.config.vision_config.hidden_size * HALF
        return kept + rows * self._logits() * 3 * FULL  # logits, their softmax, their gradient

    def _logits(self) -> int:
        """Logits of a row: over the vocabulary, or over the batch of all GPUs."""
        if isinstance(self.recipe, DialogueRecipe):
            return self.text_length * self.config.text_config.vocab_size
        words = self.text_length * self.config.qllama_config.vocab_size
        return max(self.num_columns, words if isinstance(self.recipe, GenerativeRecipe) else 0)

    def _towers(self) -> Iterator[float]:
        """Bytes that a row's activations take in each tower that has gradients."""
        vision = self.config.vision_config
        if self.trains_vision:
            inside = vision_layer_widths(vision.hidden_size, vision.intermediate_size)
            yield self._tower(self.vision_length, vision.hidden_size, vision.num_hidden_layers, inside)
        for config, length in self._language_towers():
            inside = llama_layer_widths(config.hidden_size, config.intermediate_size)
            yield self._tower(length, config.hidden_size, config.num_hidden_layers, inside)

    def _language_towers(self) -> Iterator[tuple[Any, int]]:
        qllama = self.config.qllama_config
        if not isinstance(self.recipe, DialogueRecipe):
            if "qllama" in self.phase.rates:
                yield qllama, self.text_length
            if not isinstance(self.recipe, ContrastiveRecipe):
                passes = self._packed(*(STAGE_2 if isinstance(self.recipe, GenerativeRecipe) else RETRIEVAL))
                yield qllama, passes.num_copies * passes.num_queries + sum(passes.text_lengths)
            return
        num_queries = 0 if qllama is None else qllama.num_query_token
        if num_queries and (self.trains_vision or "queries" in self.phase.rates):
            yield qllama, num_queries
        patches = int(math.sqrt(self.num_patches) * self.config.downsample_ratio) ** 2
        yield self.config.text_config, self.text_length + patches + num_queries

    def _tower(self, length: int, width: int, num_layers: int, inside: float) -> float:
        if self.recipe.gradient_checkpointing:
            return HALF * length * (num_layers * width + inside)
        return HALF * length * num_layers * inside


def vision_layer_widths(width: int, inner: int) -> float:
    """Elements per position that the backward pass of an InternViT block needs.

    For both norms what goes in, what it is after scaling, what comes out (6 widths), likewise for the norms of q and k (6), v, the
    output of the attention twice, what the layer scales keep (3); the wide layer before and after its activation.
    """
    return 18 * width + 2 * inner


def llama_layer_widths(width: int, inner: int) -> float:
    """Elements per position that the backward pass of a LLaMA layer needs: the stream before and in the middle, both normed; q, k, v
    and what the rotation keeps; output of the attention; gate, its activation, up, their product."""
    return 10 * width + 4 * inner


# --------------------------------------------------------------------------------------------------------------- states
def unit_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of the largest unit that FSDP gathers at a time, and of what belongs to no unit and stays gathered."""
    names = set(model._no_split_modules)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    units = [module for module in model.modules() if type(module).__name__ in names or module in layers]
    sizes = [sum(p.numel() for p in module.parameters()) for module in units]
    return max(sizes), sum(p.numel() for p in model.parameters()) - sum(sizes)


def state_bytes(model: PreTrainedModel, phase: Phase, cluster: Cluster) -> float:
    """Weights, gradients and optimizer on one GPU."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[part_of(name) in phase.rates] += parameter.numel()
    total = counts[True] * (2 * FULL + ADAM) + counts[False] * HALF
    if cluster.sharding == "ddp":
        return total + counts[True] * HALF
    largest, rest = unit_sizes(model)
    return total / cluster.gpus + 3 * largest * HALF + 2 * rest * HALF


# ------------------------------------------------------------------------------------------------------- the full recipes
def full_models(decoder: str) -> dict[str, tuple[PreTrainedModel, Recipe]]:
    """Every full recipe with its model of the released size, on the meta device.

    Args:
        decoder: A key of `DECODERS`.
    """
    first, second, tuned = stage1(), stage2(), retrieval()
    with torch.device("meta"):
        contrastive = InternVLForContrastiveTraining(InternVLConfig(num_query_token=0, **first.model_config))
        generative = InternVLForGenerativeTraining(InternVLConfig())
        found: dict[str, tuple[PreTrainedModel, Recipe]] = {
            "stage 1": (contrastive, first),
            "stage 2": (generative, second),
            "retrieval": (InternVLForRetrievalTraining(InternVLConfig()), tuned),
        }
        for name, connector in (("simple", "patches"), ("full", "queries_and_patches")):
            recipe = stage3(connector)
            found[f"stage 3, {name}, {decoder}"] = (chat_model(recipe, decoder), recipe)
    return found


def chat_model(recipe: DialogueRecipe, decoder: str) -> InternVLChatForConditionalGeneration:
    """The chat model of a recipe over a decoder of the released sizes."""
    config = InternVLChatConfig(
        vision_config={"image_size": recipe.phases[-1].image_size},
        text_config=read_config(DECODERS[decoder]).text_config.to_dict(),
        qllama_config=None if recipe.connector == "patches" else {},
        connector=recipe.connector,
        downsample_ratio=recipe.downsample_ratio,
    )
    return InternVLChatForConditionalGeneration(config)


@dataclass(frozen=True)
class Cost:
    """A phase on a cluster. FLOPs are those of a sample, sizes those of a GPU."""

    name: str
    parameters: int
    trained: int
    samples: int
    flops: float
    executed: float
    days: float
    states: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes of a GPU."""
        return self.states + self.activations


def cost_of(
    name: str, model: PreTrainedModel, recipe: Recipe, phase: Phase, cluster: Cluster, text_length: int
) -> Cost:
    """What a phase costs."""
    share = math.ceil(phase.batch_size / cluster.gpus)
    shapes = Shapes(model, recipe, phase, share, phase.batch_size, text_length)
    executed = sum(place.executed(shapes.caches, recipe.gradient_checkpointing) for place in shapes.products)
    seconds = phase.steps * share * executed / (cluster.peak_tflops * 1e12 * cluster.utilization)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Cost(
        name=f"{name}: {phase.name}",
        parameters=sum(sizes.values()),
        trained=sum(size for name, size in sizes.items() if part_of(name) in phase.rates),
        samples=phase.steps * phase.batch_size,
        flops=sum(place.forward + place.backward for place in shapes.products),
        executed=executed,
        days=seconds / 86400,
        states=state_bytes(model, phase, cluster),
        activations=shapes.activation_bytes(),
    )


def costs(cluster: Cluster, decoder: str = "13b", text_length: int = TEXT_LENGTH) -> list[Cost]:
    """All phases of all full recipes."""
    return [
        cost_of(name, model, recipe, phase, cluster, text_length)
        for name, (model, recipe) in full_models(decoder).items()
        for phase in recipe.phases
    ]


# ----------------------------------------------------------------------------------------------------- the command line
def table(found: list[Cost], cluster: Cluster) -> list[str]:
    """Lines of a table in Markdown."""
    head = "phase | parameters | trained | samples | TFLOP a sample | executed | days | GPU hours | states | activations | fits"
    lines = [f"| {head} |", "|---" + "|---:" * 9 + "|---|"]
    for cost in found:
        spare = cluster.gpu_memory * GIGABYTE - cost.total
        cells = [
            cost.name,
            f"{cost.parameters / 1e9:.2f} B",
            f"{cost.trained / 1e9:.2f} B",
            f"{cost.samples / 1e6:,.1f} M",
            f"{cost.flops / 1e12:.2f}",
            f"{cost.executed / 1e12:.2f}",
            f"{cost.days:.2f}",
            f"{cost.days * 24 * cluster.gpus:,.0f}",
            f"{cost.states / GIGABYTE:.1f} GB",
            f"{cost.activations / GIGABYTE:.1f} GB",
            "yes" if spare >= 0 else f"{-spare / GIGABYTE:.0f} GB short",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Prints the table and what it assumes.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.
    """
    cluster = Cluster(options.gpus, options.gpu_memory, options.peak_tflops, options.utilization, options.sharding)
    text_length = TEXT_LENGTH if options.text_length is None else options.text_length
    for line in table(costs(cluster, options.decoder, text_length), cluster):
        print_fn(line)
    print_fn("")
    facts = {
        "dialogue": text_length,
        "gpus": cluster.gpus,
        "peak": cluster.peak_tflops,
        "utilization": cluster.utilization,
        "sharding": SHARDING_WORDS[cluster.sharding],
    }
    for assumption in ASSUMPTIONS:
        print_fn(f"- {assumption.format(**facts)}")
    return 0


__all__ = ["Cluster", "Cost", "Products", "Shapes", "cost_of", "costs", "full_models", "state_bytes"]
