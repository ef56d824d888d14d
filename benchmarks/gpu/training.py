"""A step of stage 1 and one of stage 3 at the released sizes, as a share of the matrix rate.

Forward and backward with weights in the device's dtype, without an optimizer: what a step computes, not what its
states take. Operations are those of the model itself: what checkpointing and gradient caching compute again counts as
time and not as work, as in published MFU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration, InternVLConfig, InternVLModel
from internvl.layers_internvl import IGNORE_INDEX
from internvl.training.models.build import enable_checkpointing
from internvl.training.models.parameter_groups import train_parts
from internvl.training.models.pretraining import InternVLForContrastiveTraining
from internvl.training.recipes import stage1

from ..harness import Options, Row, interleave, matrix_product, share_row
from .jobs import Measurement, Setting
from .models import build_random, noise, size_name


IMAGE_TOKEN_ID = 3
TEXT_TOKENS = 80  # of a caption, the longest of the published code
STEP_SECONDS = 120.0


def flops_of_backward_too(loss: Callable[[], torch.Tensor]) -> int:
    """Operations of a forward and its backward on the meta device."""
    with FlopCounterMode(display=False) as counter:
        loss().sum().backward()
    return counter.get_total_flops()


def step_row(name: str, model: nn.Module, step: Callable[[], torch.Tensor], flops: int, setting: Setting) -> Row:
    """Forward and backward, as a share of the matrix rate."""

    def train() -> None:
        step().backward()
        model.zero_grad(set_to_none=True)

    options = setting.options.at_most(3)
    seconds = interleave({"step": train, "product": matrix_product(options)}, options, warmups=1)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if setting.device == "cuda" else {}
    return share_row(name, seconds, "step", flops, device=setting.device, **peak)


def step_jobs(
    name: str, build: Callable[[Options], tuple[Any, Callable]], count: Callable[[], int], setting: Setting
) -> Iterator[Measurement]:
    """The job of a step: `build` makes a model and its loss as a call, `count` the operations of both passes."""

    def measure() -> Row:
        flops = count()
        model, step = build(setting.options)
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        enable_checkpointing(model)
        return step_row(f"{name} ({size_name(model)})", model, step, flops, setting)

    yield Measurement(name, measure, STEP_SECONDS, trains=True)


def stage1_jobs(setting: Setting) -> Iterator[Measurement]:
    """Stage 1: both towers learn from pairs, with gradient caching."""
    sizes = setting.sizes
    side = min(sizes.vision.get("image_size", 224), 224)
    text = {**sizes.qllama, "num_query_token": 0}

    config = InternVLConfig(vision_config={**sizes.vision, "image_size": side}, qllama_config=text)

    def build(options: Options) -> tuple[Any, Callable[[], torch.Tensor]]:
        settings = {"grad_cache_chunk_size": sizes.chunk}
        model = build_random(InternVLForContrastiveTraining, config, options, **settings).train()
        train_parts(model, stage1().phases[0].learning_rates)
        batch = {"pixel_values": noise(sizes.pairs, side, options), **texts(options)}
        return model, lambda: model(**batch).loss

    def texts(options: Options) -> dict[str, torch.Tensor]:
        ids = torch.full((sizes.pairs, TEXT_TOKENS), 4, device=options.device)
        ids[:, 0] = torch.arange(sizes.pairs, device=options.device) % config.qllama_config.vocab_size
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def count() -> int:
        options = setting.options.on("meta")
        model = build_random(InternVLModel, config, options)
        tiles, ids = noise(sizes.pairs, side, options), texts(options)["input_ids"]
        vision = flops_of_backward_too(lambda: model.vision_model(tiles).last_hidden_state)
        return vision + flops_of_backward_too(lambda: model.qllama.model(input_ids=ids).last_hidden_state)

    yield from step_jobs(f"stage-1 step, {sizes.pairs} pairs at {side} px: MFU", build, count, setting)


def stage3_jobs(setting: Setting) -> Iterator[Measurement]:
    """Stage 3: the projector learns from dialogues, tower and decoder are frozen, as published."""
    sizes = setting.sizes

    config = InternVLChatConfig(
        vision_config=sizes.vision,
        text_config={"tie_word_embeddings": False, **sizes.decoder},
        image_token_id=IMAGE_TOKEN_ID,
    )

    def build(options: Options) -> tuple[Any, Callable[[], torch.Tensor]]:
        model = build_random(InternVLChatForConditionalGeneration, config, options).train()
        train_parts(model, ("projector",))
        places = sizes.dialogue_tiles * model.num_image_token
        ids = torch.full((1, max(sizes.dialogue, places + 2)), 4, device=options.device)
        ids[:, 1 : 1 + places] = IMAGE_TOKEN_ID
        labels = ids.clone()
        labels[:, : 1 + places] = IGNORE_INDEX
        tiles = noise(sizes.dialogue_tiles, config.vision_config.image_size, options)
        return model, lambda: model(input_ids=ids, labels=labels, pixel_values=tiles).loss

    name = f"stage-3 step, a row of {sizes.dialogue} tokens with {sizes.dialogue_tiles} tiles: MFU"
    yield from step_jobs(name, build, lambda: flops_of_backward_too(build(setting.options.on("meta"))[1]), setting)
