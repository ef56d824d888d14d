"""The released sizes with random weights, on an accelerator: how much of its matrix rate and of its memory bandwidth
is used.

InternViT-6B at 448 px and InternVL-G (with QLLaMA, 8 B) are measured against the rate of a large matrix product,
captions of InternVL-G and the decoding of a 13 B chat model against the rate at which memory is copied: each new token
reads every weight once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, StaticCache

from internvl import (
    InternVisionModel,
    InternViTConfig,
    InternVLChatConfig,
    InternVLChatForConditionalGeneration,
    InternVLConfig,
    InternVLModel,
)

from .harness import Options, Row, flops_of, interleave, matrix_product, no_compiler, row_of, share_row, sizes_of


@dataclass(frozen=True)
class FullSizes:
    """What is measured; the defaults are the released sizes, 13 B of InternVL-Chat in its decoder alone.

    Args:
        vision: Changes of InternViT-6B.
        qllama: Changes of QLLaMA.
        decoder: A LLaMA configuration.
        tiles: Images of a forward.
        prompt: Tokens before the decoding.
        tokens: Decoded tokens of a round.
        copied_bytes: Of the copy that bandwidth is measured with.
    """

    vision: dict[str, Any] = field(default_factory=lambda: {"image_size": 448})
    qllama: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=lambda: sizes_of(5120, 13824, 40, 40, vocab_size=32000))
    tiles: int = 8
    prompt: int = 128
    tokens: int = 32
    copied_bytes: int = 4 * 2**30


def build_random(model_class: type[PreTrainedModel], config: PretrainedConfig, options: Options) -> Any:
    """A model that is made on the device in its type, since the host may not hold it."""
    torch.manual_seed(0)
    with torch.device(options.device):
        return model_class._from_config(config, dtype=options.dtype).eval()


def shapes_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Any:
    """The model without weights, to count with."""
    with torch.device("meta"):
        return model_class(config).eval().requires_grad_(False)  # else the counter tracks gradients


def size_name(model: nn.Module) -> str:
    """Parameters, in words."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e9:.2g} B"


def weight_bytes(model: nn.Module, unread: nn.Module) -> int:
    """Bytes of the weights, without a part of which a new token reads nothing or one row."""
    total, left_out = (sum(p.numel() * p.element_size() for p in part.parameters()) for part in (model, unread))
    return total - left_out


def copy_of(num_bytes: int, options: Options) -> Callable[[], Any]:
    """Copies so many bytes within the memory of the device: they are read and written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=options.device)
    return partial(torch.empty_like(source).copy_, source)


def vision_rows(options: Options, sizes: FullSizes) -> Iterator[Row]:
    """InternViT, plain and compiled."""
    config = InternViTConfig(**sizes.vision)
    model, side = build_random(InternVisionModel, config, options), config.image_size
    tiles = torch.randn(sizes.tiles, 3, side, side, device=options.device, dtype=options.dtype)
    flops = flops_of(partial(shapes_of(InternVisionModel, config), tiles.to("meta", torch.float32)))
    calls = {"eager": partial(model, tiles), "product": matrix_product(options)}
    missing = no_compiler(options.device)
    if not missing:
        calls["compiled"] = partial(torch.compile(model, fullgraph=True, dynamic=False), tiles)
    seconds = interleave(calls, options)
    for call, target in (("eager", 0.6), ("compiled", None)):
        name = f"InternViT {size_name(model)}, {side} px, {sizes.tiles} tiles: {call}, share of the matrix rate"
        if call not in calls:
            yield Row(name, skipped=missing)
        else:
            yield share_row(name, seconds, call, flops, target, device=options.device)


def qllama_rows(options: Options, sizes: FullSizes) -> Iterator[Row]:
    """InternVL-G: features of images, and the tokens of a caption."""
    config = InternVLConfig(vision_config={**sizes.vision, "image_size": 224}, qllama_config=sizes.qllama)
    model = build_random(InternVLModel, config, options)
    images = torch.randn(sizes.tiles, 3, 224, 224, device=options.device, dtype=options.dtype)
    features = partial(model.get_image_features, images, mode="InternVL-G")
    shapes = shapes_of(InternVLModel, config)
    flops = flops_of(partial(shapes.get_image_features, images.to("meta", torch.float32), mode="InternVL-G"))
    seconds = interleave({"features": features, "product": matrix_product(options)}, options)
    name = f"InternVL-G {size_name(model)}, features of {sizes.tiles} images: share of the matrix rate"
    yield share_row(name, seconds, "features", flops, device=options.device)

    def caption(tokens: int) -> torch.Tensor:
        return model.generate(images[:1], min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    # The difference is the decoding alone.
    calls = {
        "copy": copy_of(sizes.copied_bytes, options),
        "short": partial(caption, 1),
        "long": partial(caption, 1 + sizes.tokens),
    }
    seconds = interleave(calls, options)
    seconds["decoding"] = [b - a for a, b in zip(seconds.pop("short"), seconds.pop("long"), strict=True)]
    name = f"caption by QLLaMA {size_name(model.qllama)}, eager: share of the bandwidth in decoding"
    num_bytes = sizes.tokens * weight_bytes(model.qllama, model.qllama.get_input_embeddings())
    yield bandwidth_row(name, seconds, num_bytes, sizes)


def decoder_rows(options: Options, sizes: FullSizes) -> Iterator[Row]:
    """Decoding of a chat model for one stream, with a static cache, compiled and plain."""
    text = {"model_type": "llama", "tie_word_embeddings": False, **sizes.decoder}
    config = InternVLChatConfig(vision_config=sizes_of(64, 64, 1, 1), text_config=text)
    model = build_random(InternVLChatForConditionalGeneration, config, options)
    steps = {"eager": model}
    missing = no_compiler(options.device)
    if not missing:
        steps["compiled"] = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    warmups = 2
    length = sizes.prompt + (warmups + options.rounds) * sizes.tokens
    calls = {call: decoding_steps(model, step, length, sizes) for call, step in steps.items()}
    seconds = interleave({"copy": copy_of(sizes.copied_bytes, options), **calls}, options, warmups)
    num_bytes = sizes.tokens * weight_bytes(model.language_model, model.get_input_embeddings())
    size = size_name(model.language_model)
    for call, target in (("compiled", 0.7), ("eager", None)):
        name = f"decoding of a {size} chat model, one stream, {call}: share of the bandwidth"
        if call not in calls:
            yield Row(name, skipped=missing)
        else:
            seconds["decoding"] = seconds[call]
            yield bandwidth_row(name, seconds, num_bytes, sizes, target)


def decoding_steps(model: nn.Module, step: Callable, length: int, sizes: FullSizes) -> Callable[[], torch.Tensor]:
    """A call that decodes `sizes.tokens` more tokens after a prompt, greedily."""
    device, cache = model.device, StaticCache(config=model.config.text_config, max_cache_len=length)
    prompt = torch.arange(sizes.prompt, device=device)[None] % model.config.text_config.vocab_size
    token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    position = torch.full((1, 1), sizes.prompt, device=device)

    def decode() -> torch.Tensor:
        for _ in range(sizes.tokens):
            logits = step(input_ids=token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits
            token.copy_(logits.argmax(-1))
            position.add_(1)
        return token

    return decode


def bandwidth_row(
    name: str, seconds: dict[str, list[float]], num_bytes: int, sizes: FullSizes, target: float | None = None
) -> Row:
    """Bytes that "decoding" must read, per second, over those that "copy" reads and writes."""
    scale = num_bytes / (2 * sizes.copied_bytes)
    return row_of(name, seconds, "decoding", "copy", target, scale, read_bytes=num_bytes)


PARTS = {
    "InternViT-6B forward at 448 px: share of the matrix rate": vision_rows,
    "InternVL-G 14 B with QLLaMA 8 B: share of the matrix rate and of the bandwidth": qllama_rows,
    "13 B chat model: share of the bandwidth in decoding": decoder_rows,
}


@torch.no_grad()
def rows(options: Options, sizes: FullSizes | None = None) -> Iterator[Row]:
    """One model after the other; without `sizes`, the released ones, for which a CPU is too slow."""
    for name, part in PARTS.items():
        if sizes is None and options.device == "cpu":
            yield Row(name, skipped="needs an accelerator with 80 GB: `python -m internvl.benchmarks --device cuda`")
        else:
            yield from part(options, sizes or FullSizes())
