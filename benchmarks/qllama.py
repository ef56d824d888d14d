"""QLLaMA: a step of stage 2 against three separate passes, and captions against plainer ways to make them.

The proportions of the released sizes (a vision block costs what a QLLaMA block costs, three blocks to two) at a fifth
of the width.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationMixin

from internvl.configuration_internvl import InternVLConfig
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_qllama import QLlamaForCausalLM
from internvl.training.models.losses import generation_loss, info_nce_loss, matching_loss
from internvl.training.models.parameter_groups import train_parts
from internvl.training.models.pretraining import InternVLForGenerativeTraining
from internvl.training.recipes import stage2

from .harness import Options, Row, sizes_of, speed_row


BATCH = 8
TEXT_LENGTH = 32
NEW_TOKENS = 20
BEAMS = 5
VISION = sizes_of(640, 2560, 9, 10, image_size=224, patch_size=14)
QLLAMA = sizes_of(768, 2064, 6, 12, vocab_size=4096)

Model = TypeVar("Model", bound=InternVLModel)


def build_pretraining(model_class: type[Model], device: str) -> Model:
    """A model of either class with the same random weights, in which every part has a say."""
    torch.manual_seed(0)
    model = model_class(InternVLConfig(vision_config=VISION, qllama_config=QLLAMA, attn_pool_num_heads=8))
    with torch.no_grad():
        for layer in model.qllama.model.layers:
            if layer.cross_attn is not None:  # a fresh one adds nothing
                layer.cross_attn.o_proj.weight.normal_(std=0.02)
    return model.to(device)


def stage2_batch(device: str) -> dict[str, torch.Tensor]:
    """Pairs with the texts that the collator of stage 2 gives, all equally long; negatives are drawn."""
    generator = torch.Generator().manual_seed(1)
    side = VISION["image_size"]
    batch = {"pixel_values": torch.randn(BATCH, 3, side, side, generator=generator)}
    for name in ("positive_input_ids", "summarize_input_ids", "input_ids"):
        batch[name] = torch.randint(3, QLLAMA["vocab_size"], (BATCH, TEXT_LENGTH), generator=generator)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    return {name: tensor.to(device) for name, tensor in batch.items()}


def separate_step(model: InternVLForGenerativeTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The three losses as three trainings would compute them: each with a forward of both towers and a backward pass
    of its own.

    The negatives of matching are drawn with the features that the contrastive pass has anyway.
    """
    torch.manual_seed(2)
    positive, summarize = (model._texts(batch[f"{name}_input_ids"], None) for name in ("positive", "summarize"))

    tokens = model._vision_tokens(batch["pixel_values"])
    (found,) = model._read(tokens, ("contrastive", summarize))
    image_embeds, text_embeds = model._contrastive_embeds(*found, summarize.mask)
    contrastive = info_nce_loss(image_embeds, text_embeds, model._scale())
    contrastive.backward()
    drawn = model._draw_negatives(tokens, positive, text_embeds, ~positive.is_empty(0))

    texts, labels = model._matching_rows(positive, *drawn)
    ((queries, _),) = model._read(model._vision_tokens(batch["pixel_values"]), ("matching", texts))
    matching = matching_loss(model._matching_logits(queries), labels)
    matching.backward()

    captions = ("generation", model._texts(batch["input_ids"], None))
    ((_, text),) = model._read(model._vision_tokens(batch["pixel_values"]), captions)
    generation = generation_loss(text, batch["labels"], model.qllama.lm_head)
    generation.backward()
    return (contrastive + matching + generation).detach()


def joint_step(model: InternVLForGenerativeTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The training model's own step."""
    torch.manual_seed(2)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def gradients_of(step: partial, model: nn.Module) -> dict[str, torch.Tensor]:
    """The loss of a step and every gradient that it leaves."""
    model.zero_grad()
    found = {"loss": step()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference_of_gradients(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> float:
    """Relative to the largest element of the peer's tensor, or to a thousandth of that of all its tensors."""
    if ours.keys() != peer.keys():
        raise SystemExit(f"Only one of the two steps gives {sorted(ours.keys() ^ peer.keys())}: nothing to compare.")
    sizes = {name: value.abs().max().item() for name, value in peer.items()}
    smallest = max(sizes.values()) / 1000
    return max((ours[name] - value).abs().max().item() / max(sizes[name], smallest) for name, value in peer.items())


def training_row(options: Options) -> Row:
    """Forward and backward of stage 2 with the parts frozen that its recipe freezes."""
    model = build_pretraining(InternVLForGenerativeTraining, options.device)
    train_parts(model, stage2().phases[0].learning_rates)
    batch = stage2_batch(options.device)
    ours, peer = partial(joint_step, model.train(), batch), partial(separate_step, model, batch)
    difference = difference_of_gradients(gradients_of(ours, model), gradients_of(peer, model))
    if difference > 1e-3:
        raise SystemExit(f"The losses or gradients of the two steps differ by {difference}: nothing to compare.")
    name = f"stage-2 step, {BATCH} pairs, against three separate passes"
    return speed_row(name, ours, peer, options, target=1.8, warmups=1, largest_difference=difference)


class CopiesImages(QLlamaForCausalLM):
    """Expands a batch for beams as any model of transformers does, the images too."""

    _expand_inputs_for_generation = GenerationMixin._expand_inputs_for_generation


@torch.no_grad()
def caption_rows(options: Options) -> Iterator[Row]:
    """Captions of a few images, of which tower and queries are most of the work."""
    ours, peer = (build_pretraining(InternVLModel, options.device).eval() for _ in range(2))  # same seed, same weights
    peer.qllama.__class__ = CopiesImages
    images = stage2_batch(options.device)["pixel_values"][:2]
    length = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "against no cache: all anew in every step": ({}, {"use_cache": False}),
        f"{BEAMS} beams, against keys and values for every beam": ({"num_beams": BEAMS},) * 2,
    }
    for case, settings in cases.items():
        call, plain_call = (
            partial(model.generate, pixel_values=images, **length, **of_model)
            for model, of_model in zip((ours, peer), settings, strict=True)
        )
        if not torch.equal(call(), plain_call()):
            raise SystemExit(f"The captions of the two differ ({case}): nothing to compare.")
        yield speed_row(f"captions with QLLaMA, {NEW_TOKENS} tokens, {case}", call, plain_call, options, warmups=1)


def rows(options: Options) -> Iterator[Row]:
    """A step of training, then captions."""
    yield training_row(options)
    yield from caption_rows(options)
