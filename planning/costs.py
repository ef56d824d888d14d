"""Costs of the full recipes: memory of a GPU and days on many, `python -m internvl.planning costs`.

One forward and backward pass of every phase runs on the meta device as its trainer would run it: with frozen parts,
dropped patches, gradient caching, activation checkpointing, and the features of all processes to compare with. FLOPs,
live tensors and calls of sharded layers are counted while it runs. `ASSUMPTIONS` is printed below the tables.

Not covered: reading data, evaluation, restarts, pipeline and tensor parallelism.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..configuration_internvl import InternVLChatConfig, InternVLConfig
from ..modeling_internvl_chat import InternVLChatForConditionalGeneration
from ..training.models import pretraining
from ..training.models.build import enable_checkpointing, set_up_phase
from ..training.models.parameter_groups import part_of, train_parts
from ..training.recipes import (
    CaptionRecipe,
    DialogueRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RetrievalRecipe,
    captions,
    retrieval,
    stage1,
    stage2,
    stage3,
)
from .cluster import DECODERS, Cluster
from .counting import OperationCounter, counted_step
from .memory import TEXT_LENGTH, image_positions, read_config


GIGABYTE = 1e9
HALF, FULL = 2, 4  # bytes of bfloat16 and float32
ADAM = 2 * FULL
ASSUMPTIONS = (
    "1 FLOP is one multiplication or one addition, counted by torch's formulas: matrix products, convolutions and "
    "attention count, masked places too, and attention computes its scores again in the backward pass; norms, "
    'softmax, activations and the optimizer count nothing. "Executed" adds what gradient caching and activation '
    "checkpointing compute again.",
    "Texts have the recipe's full length; a dialogue has one image of one tile and {dialogue} tokens of text, with "
    "logits at all positions.",
    "Days = steps x samples of a GPU x executed FLOPs / (peak x utilization): {gpus} GPUs of {peak:g} TFLOP/s, of "
    "which all executed operations, recomputed ones too, reach {utilization:.0%}. Waiting for data or for other GPUs "
    "is in that share; where a batch has fewer samples than there are GPUs, the others idle.",
    "Trained parameters take 16 bytes (float32 weight and gradient, two AdamW states), frozen ones 2 (bfloat16). "
    "{sharding}",
    "Activations: the most that live tensors take in a step computed in bfloat16, the batch and the features of all "
    "processes among them, with an attention kernel that keeps no weights. Under gradient caching they contain the "
    "bfloat16 gradients of one tower, which autograd sums over all chunks before it hands them on. Buffers of kernels "
    "and fragmentation are not counted: leave a tenth.",
    "Traffic: what a GPU receives in a step. {traffic} Features and their gradients go to all processes in float32.",
)
SHARDING_WORDS = {
    "fsdp": "Both are shared out to all GPUs; the gathered weights of two layers (with gradient caching of all, see "
    "`gather_once`) and the gradient of one come on top.",
    "ddp": "Every GPU holds all of them; autocast's bfloat16 copies of trained weights come on top.",
}
TRAFFIC_WORDS = {
    "fsdp": "Weights are gathered in bfloat16 whenever a layer runs, with gradient caching once; gradients are "
    "reduced in bfloat16, once.",
    "ddp": "Gradients are reduced in float32, once.",
}


# --------------------------------------------------------------------------------------------------- one step, counted
@dataclass(frozen=True)
class StepCost:
    """What a step of one GPU does.

    Args:
        flops: Of a sample, every operation once.
        executed: Of a sample, with what is computed again.
        activations: Bytes of live tensors at most, weights and their accumulated gradients left out.
        gathered: Parameters that are gathered under FSDP, each as often as its layer runs, or once (`gather_once`).
        features: Bytes of features and their gradients from other processes.
        keeps_gathered: Whether gathered weights are kept from the first chunk of gradient caching to the last.
    """

    flops: float
    executed: float
    activations: float
    gathered: float
    features: float
    keeps_gathered: bool = False


def step_inputs(model: PreTrainedModel, recipe: Recipe, phase: Phase, rows: int, text_length: int) -> dict[str, Any]:
    """A batch of `rows` on the meta device, its texts of full length; `text_length` tokens of text in a dialogue."""
    pixel_values = torch.empty(rows, 3, phase.image_size, phase.image_size, device="meta")
    if isinstance(recipe, DialogueRecipe):
        length = text_length + image_positions(model.config, 1)
    else:
        length = recipe.max_text_length  # type: ignore[attr-defined]
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    pairs = {"positive_input_ids": ids.clone(), "summarize_input_ids": ids.clone()}
    if isinstance(recipe, RetrievalRecipe):
        negatives = {"negative_input_ids": ids.clone()} if recipe.negatives == "random" else {}
        return {"pixel_values": pixel_values, **pairs, **negatives, "image_ids": ids[:, 0]}
    inputs = {"pixel_values": pixel_values, "input_ids": ids}
    if isinstance(recipe, GenerativeRecipe):
        return {**inputs, **pairs, "labels": ids.clone()}
    if isinstance(recipe, CaptionRecipe):
        return {**inputs, "labels": ids.clone()}
    return {**inputs, "labels": ids.clone(), "use_cache": False} if isinstance(recipe, DialogueRecipe) else inputs


def _count_features(model: PreTrainedModel, num_rows: int) -> list[int]:
    """Lets a model gather features as if `num_rows` were those of all processes; the bytes that others send go into
    the list.
    """
    received: list[int] = []

    def gather(features: torch.Tensor) -> torch.Tensor:
        copies = math.ceil(num_rows / len(features))
        gathered = features.repeat(copies, *[1] * (features.ndim - 1))[:num_rows]
        received.append((gathered.nbytes - features.nbytes) * (2 if features.requires_grad else 1))
        return gathered

    model.current_gather = lambda: (gather, 0)
    return received


def sharded_units(model: PreTrainedModel) -> list[nn.Module]:
    """What FSDP gathers at a time: the blocks that the model names, and its embeddings."""
    names = set(model._no_split_modules)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in model.modules() if type(module).__name__ in names or module in embeddings]


@contextmanager
def _counted_gathers(model: PreTrainedModel, is_cached: bool) -> Iterator[Counter[nn.Module]]:
    """Yields how often FSDP gathers every unit that runs, forward and backward, unless it keeps what it gathers."""
    gathers: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any, output: Any) -> None:
        has_backward = any(leaf.requires_grad for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        gathers[module] += 1 + has_backward * (1 + is_cached)  # gradient caching runs it forward once more

    hooks = [unit.register_forward_hook(count) for unit in sharded_units(model)]
    try:
        yield gathers
    finally:
        for hook in hooks:
            hook.remove()


def _run(
    model: PreTrainedModel, make_inputs: Callable[[], dict[str, Any]], is_cached: bool, with_backward: bool = True
) -> tuple[OperationCounter, int, Counter[nn.Module]]:
    """A counted step, the bytes that are alive between its forward and backward pass, and the gathers of each unit."""
    with counted_step() as counter:
        inputs = make_inputs()
        with _counted_gathers(model, is_cached) as gathers:
            loss = model(**inputs).loss
        alive = counter.live_bytes
        if with_backward:
            loss.backward()
    return counter, alive, gathers


def prepare(model: PreTrainedModel, recipe: Recipe, phase: Phase) -> None:
    """Sets a model on the meta device up for a phase as its trainer does, with gradients that exist already."""
    train_parts(model, phase.learning_rates)
    model.train()
    set_up_phase(model, recipe, phase)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
        model.disable_input_require_grads()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def count_step(
    model: PreTrainedModel, recipe: Recipe, phase: Phase, share: int, num_rows: int, text_length: int = TEXT_LENGTH
) -> StepCost:
    """Count a step of one GPU.

    With gradient caching three chunks are counted: the first backward, a middle one and the last. What further ones do
    is the same, and what they keep is what the third one keeps once it has been forward.

    Args:
        model: On the meta device, in the dtype it computes in.
        recipe: Of its training.
        phase: Of the recipe.
        share: Samples of a step on one GPU.
        num_rows: Samples of a step on all.
        text_length: Tokens of text in a dialogue.
    """
    prepare(model, recipe, phase)
    chunk = min(recipe.grad_cache_chunk_size or share, share)
    is_cached = chunk < share and not isinstance(recipe, DialogueRecipe)
    model.grad_cache_chunk_size = chunk if is_cached else None
    rows = min(3 * chunk, share) if is_cached else chunk
    keeps_gathered = is_cached and recipe.gather_once

    def count(rows: int, with_backward: bool = True) -> tuple[OperationCounter, int, Counter[nn.Module]]:
        return _run(model, lambda: step_inputs(model, recipe, phase, rows, text_length), is_cached, with_backward)

    features = _count_features(model, num_rows)
    counter, alive, gathers = count(rows)
    num_features, kept_by_others = sum(features), 0.0
    if is_cached and rows < share:
        third = alive - count(2 * chunk, with_backward=False)[1]
        kept_by_others = third * (share - rows) / chunk
    sizes = {unit: sum(p.numel() for p in unit.parameters()) for unit in gathers}
    gathered: float = sum(sizes.values())
    if not keeps_gathered:
        gathered = sum(sizes[unit] * times for unit, times in gathers.items())
        gathered *= math.ceil(share / chunk) / math.ceil(rows / chunk)
    return StepCost(
        flops=(counter.flops - counter.repeated_flops) / rows,
        executed=counter.flops / rows,
        activations=counter.peak_bytes + kept_by_others,
        gathered=gathered,
        features=num_features * (num_rows - share) / max(1, num_rows - rows),
        keeps_gathered=keeps_gathered,
    )


# -------------------------------------------------------------------------------------------------------------- states
def unit_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of the largest unit that FSDP gathers at a time, and of all that is in no unit and stays gathered."""
    sizes = [sum(p.numel() for p in module.parameters()) for module in sharded_units(model)]
    return max(sizes), sum(p.numel() for p in model.parameters()) - sum(sizes)


def _num_trained(model: PreTrainedModel, phase: Phase) -> tuple[int, int]:
    """Parameters that a phase trains, and all others."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[part_of(name) in phase.learning_rates] += parameter.numel()
    return counts[True], counts[False]


def state_bytes(model: PreTrainedModel, phase: Phase, cluster: Cluster, keeps_gathered: bool = False) -> float:
    """Weights, gradients and optimizer on one GPU; `keeps_gathered` as in `StepCost`."""
    trained, frozen = _num_trained(model, phase)
    total = trained * (2 * FULL + ADAM) + frozen * HALF
    if cluster.sharding == "ddp":
        return total + trained * HALF
    largest, rest = unit_sizes(model)
    gathered = trained + frozen - rest if keeps_gathered else 2 * largest
    return total / cluster.gpus + (gathered + largest) * HALF + 2 * rest * HALF


def traffic_bytes(model: PreTrainedModel, phase: Phase, cluster: Cluster, step: StepCost) -> float:
    """What one GPU receives in a step: gathered weights, reduced gradients and the features of the other processes.

    The (W - 1) / W of a gather or a reduce-scatter over W GPUs come from the others; an all-reduce is one of each.
    """
    trained, _ = _num_trained(model, phase)
    if cluster.sharding == "ddp":
        states: float = 2 * trained * FULL
    else:
        states = (step.gathered + unit_sizes(model)[1] + trained) * HALF
    return states * (cluster.gpus - 1) / cluster.gpus + step.features


# ---------------------------------------------------------------------------------------------------- the full recipes
def full_models(decoder: str) -> dict[str, tuple[PreTrainedModel, Recipe]]:
    """Every full recipe with its model of the released size, on the meta device in bfloat16.

    `decoder` is a key of `DECODERS`.
    """
    first, second = stage1(), stage2()
    config = InternVLConfig(num_query_token=0, **first.model_config)
    with torch.device("meta"):
        found: dict[str, tuple[PreTrainedModel, Recipe]] = {
            "stage 1": (pretraining.InternVLForContrastiveTraining(config), first),
            "stage 2": (pretraining.InternVLForGenerativeTraining(InternVLConfig()), second),
            "retrieval": (pretraining.InternVLForRetrievalTraining(InternVLConfig()), retrieval()),
            "captions": (pretraining.InternVLForCaptionTraining(InternVLConfig()), captions()),
        }
        chats = {
            f"simple, {decoder}": stage3(),
            f"full, {decoder}": stage3("queries_and_patches"),
            f"full, {decoder} trained": stage3("queries_and_patches", freeze_language=False),
        }
        for name, recipe in chats.items():
            chat = InternVLChatForConditionalGeneration(chat_config(recipe, decoder))
            found[f"stage 3, {name}"] = (chat, recipe)
    return {name: (model.to(torch.bfloat16), recipe) for name, (model, recipe) in found.items()}


def chat_config(recipe: DialogueRecipe, decoder: str) -> InternVLChatConfig:
    """The chat model of a recipe over a decoder of the released sizes."""
    return InternVLChatConfig(
        **recipe.model_config,
        vision_config={"image_size": recipe.phases[-1].image_size},
        text_config=read_config(DECODERS[decoder]).text_config.to_dict(),
        qllama_config=None if recipe.connector == "patches" else {},
        connector=recipe.connector,
        downsample_ratio=recipe.downsample_ratio,
        image_token_id=0,  # any will do
    )


@dataclass(frozen=True)
class PhaseCost:
    """A phase on a cluster. FLOPs are those of a sample, sizes those of a GPU, traffic that of a GPU in a step."""

    name: str
    parameters: int
    trained: int
    samples: int
    flops: float
    executed: float
    days: float
    states: float
    activations: float
    traffic: float

    @property
    def total(self) -> float:
        """Bytes of a GPU."""
        return self.states + self.activations


def cost_of(
    name: str, model: PreTrainedModel, recipe: Recipe, phase: Phase, cluster: Cluster, text_length: int
) -> PhaseCost:
    """What a phase costs."""
    share = math.ceil(phase.batch_size / cluster.gpus)
    step = count_step(model, recipe, phase, share, phase.batch_size, text_length)
    seconds = phase.steps * share * step.executed / (cluster.peak_tflops * 1e12 * cluster.utilization)
    trained, frozen = _num_trained(model, phase)
    return PhaseCost(
        name=f"{name}: {phase.name}",
        parameters=trained + frozen,
        trained=trained,
        samples=phase.steps * phase.batch_size,
        flops=step.flops,
        executed=step.executed,
        days=seconds / 86400,
        states=state_bytes(model, phase, cluster, step.keeps_gathered),
        activations=step.activations,
        traffic=traffic_bytes(model, phase, cluster, step),
    )


def costs(cluster: Cluster, decoder: str = "13b", text_length: int = TEXT_LENGTH) -> Iterator[PhaseCost]:
    """All phases of all full recipes."""
    for name, (model, recipe) in full_models(decoder).items():
        for phase in recipe.phases:
            yield cost_of(name, model, recipe, phase, cluster, text_length)


# ---------------------------------------------------------------------------------------------------- the command line
def work_cells(cost: PhaseCost, cluster: Cluster) -> dict[str, str]:
    """What a phase computes, by the columns of the first table."""
    return {
        "phase": cost.name,
        "trained": f"{cost.trained / 1e9:.2f} of {cost.parameters / 1e9:.2f} B",
        "samples": f"{cost.samples / 1e6:,.1f} M",
        "TFLOP a sample": f"{cost.flops / 1e12:.2f}",
        "executed": f"{cost.executed / 1e12:.2f}",
        "days": f"{cost.days:.2f}",
        "GPU hours": f"{cost.days * 24 * cluster.gpus:,.0f}",
    }


def memory_cells(cost: PhaseCost, cluster: Cluster) -> dict[str, str]:
    """What a GPU holds, and receives in a step, by the columns of the second table."""
    spare = cluster.gpu_memory * GIGABYTE - cost.total
    return {
        "phase": cost.name,
        "states": f"{cost.states / GIGABYTE:.1f} GB",
        "activations": f"{cost.activations / GIGABYTE:.1f} GB",
        f"fits in {cluster.gpu_memory:g} GB": "yes" if spare >= 0 else f"{-spare / GIGABYTE:.0f} GB short",
        "traffic": f"{cost.traffic / GIGABYTE:,.1f} GB",
    }


def table_lines(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """A table in Markdown of rows by column, each line as soon as its row is there, and an empty line."""
    for number, row in enumerate(rows):
        if number == 0:
            yield f"| {' | '.join(row)} |"
            yield "|---" + "|---:" * (len(row) - 1) + "|"
        yield f"| {' | '.join(row.values())} |"
    yield ""


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Prints both tables and what they assume; returns exit code 0."""
    cluster = Cluster(options.gpus, options.gpu_memory, options.peak_tflops, options.utilization, options.sharding)
    text_length = TEXT_LENGTH if options.text_length is None else options.text_length
    of_work, of_memory = tee(costs(cluster, options.decoder, text_length))
    for line in table_lines(work_cells(cost, cluster) for cost in of_work):
        print_fn(line)
    for line in table_lines(memory_cells(cost, cluster) for cost in of_memory):
        print_fn(line)
    facts = {
        "dialogue": text_length,
        "gpus": cluster.gpus,
        "peak": cluster.peak_tflops,
        "utilization": cluster.utilization,
        "sharding": SHARDING_WORDS[cluster.sharding],
        "traffic": TRAFFIC_WORDS[cluster.sharding],
    }
    for assumption in ASSUMPTIONS:
        print_fn(f"- {assumption.format(**facts)}")
    return 0
