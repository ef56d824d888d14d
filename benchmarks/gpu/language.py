"""QLLaMA's captions, prefill and decoding of a 13 B chat model, and what quantised decoders take.

Reading a prompt is measured against the rate of a matrix product, decoding against the rate at which memory is copied:
a new token reads every weight once.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig as NativeConfig
from transformers import InternVLForConditionalGeneration as NativeChat
from transformers import StaticCache

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration, InternVLConfig, InternVLModel

from ..harness import Calls, Options, Row, flops_of, interleave, matrix_product, row_of, share_row, sizes_of
from ..quantizers import held_bytes
from .jobs import CUDA, FP8, Measurement, Need, Setting, library
from .models import (
    bandwidth_row,
    build_random,
    captured,
    compile_blocks,
    copy_of,
    noise,
    shapes_of,
    size_name,
    weight_bytes,
)
from .sizes import ModelSizes
from .vision import COMPILED_SECONDS, COMPILER


DECODE_TARGET = 0.70
VISION_BESIDE = sizes_of(64, 64, 1, 1)  # of a chat model whose decoder alone is measured


def caption_jobs(setting: Setting) -> Iterator[Measurement]:
    """InternVL-G: features of images, and the tokens of a caption."""
    sizes, options = setting.sizes, setting.options
    side = min(sizes.vision.get("image_size", 224), 224)
    config = InternVLConfig(vision_config={**sizes.vision, "image_size": side}, qllama_config=sizes.qllama)
    model = build_random(InternVLModel, config, options)
    name = f"InternVL-G {size_name(model)}, features of {sizes.batches[-1]} images: share of the matrix rate"
    yield Measurement(name, partial(feature_row, name, model, setting))
    name = f"captions by QLLaMA {size_name(model.qllama)}, one image, eager: share of the bandwidth"
    yield Measurement(name, partial(caption_row, name, model, setting), 60.0)


def feature_row(name: str, model: Any, setting: Setting) -> Row:
    """Features of images by InternVL-G."""
    images = noise(setting.sizes.batches[-1], model.config.vision_config.image_size, setting.options)
    shapes = shapes_of(type(model), model.config)
    flops = flops_of(partial(shapes.get_image_features, images.to("meta", torch.float32), mode="InternVL-G"))
    features = partial(model.get_image_features, images, mode="InternVL-G")
    options = setting.options.at_most(5)
    seconds = interleave({"features": features, "product": matrix_product(options)}, options)
    return share_row(name, seconds, "features", flops, device=setting.device)


def caption_row(name: str, model: Any, setting: Setting) -> Row:
    """Tokens of a caption by `generate`: the longer one's time beyond that of one token is the decoding alone."""
    sizes, options = setting.sizes, setting.options.at_most(5)
    image = noise(1, model.config.vision_config.image_size, options)

    def caption(tokens: int) -> torch.Tensor:
        return model.generate(image, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    calls: Calls = {
        "copy": copy_of(sizes.copied_bytes, options),
        "short": partial(caption, 1),
        "long": partial(caption, 1 + sizes.new_tokens),
    }
    seconds = interleave(calls, options, warmups=1)
    seconds["decoding"] = [b - a for a, b in zip(seconds.pop("short"), seconds.pop("long"), strict=True)]
    read = sizes.new_tokens * weight_bytes(model.qllama, model.qllama.get_input_embeddings())
    return bandwidth_row(name, seconds, "decoding", read, sizes.copied_bytes)


# ------------------------------------------------------------------------------------------------- 13 B chat model
def build_large_chat(setting: Setting) -> Any:
    """A chat model, 13 B of it in its decoder."""
    text = {"tie_word_embeddings": False, **setting.sizes.decoder}
    config = InternVLChatConfig(vision_config=VISION_BESIDE, text_config=text)
    return build_random(InternVLChatForConditionalGeneration, config, setting.options)


def native_of(model: Any, setting: Setting) -> Any:
    """transformers' own chat model around the same decoder weights."""
    with torch.device("meta"):
        config = NativeConfig(text_config=model.config.text_config.to_dict())
        config.vision_config.update({**VISION_BESIDE, "image_size": [28, 28], "patch_size": [14, 14]})
        native = NativeChat._from_config(config, dtype=setting.options.dtype)
    native.model.vision_tower = native.model.multi_modal_projector = None  # text alone is read
    native.model.language_model = model.language_model.model
    native.lm_head = model.language_model.lm_head
    return native.eval()


def decoder_jobs(setting: Setting) -> Iterator[Measurement]:
    """Reading a prompt, and one token after another."""
    model = build_large_chat(setting)
    native = native_of(model, setting)
    title = f"{size_name(model.language_model)} chat model"
    name = f"{title}, prefill of {setting.sizes.prefill} tokens: share of the matrix rate"
    yield Measurement(name, partial(prefill_row, name, model, setting))
    name = f"{title}, prefill of {setting.sizes.prefill} tokens: against native"
    yield Measurement(name, partial(prefill_against_native, name, model, native, setting))
    name = f"{title}, decoding of one stream, eager: against native"
    yield Measurement(name, partial(decoding_against, name, model, native, setting, 1.0), 60.0)
    for way, seconds, needs in (
        ("eager", 45.0, ()),
        ("CUDA graph", 45.0, (CUDA,)),
        ("compiled, CUDA graph", COMPILED_SECONDS, (CUDA, COMPILER)),
    ):
        name = f"{title}, decoding of one stream, {way}: share of the bandwidth"
        yield Measurement(name, partial(decoding_row, name, model, way, setting), seconds, needs)


def text_of(model: Any, length: int) -> torch.Tensor:
    """Text (1, length)."""
    return torch.arange(length, device=model.device)[None] % model.config.get_text_config().vocab_size


def prefill_row(name: str, model: Any, setting: Setting) -> Row:
    """Share of the matrix rate, the logits of the last position alone computed."""
    options, ids = setting.options.at_most(7), text_of(model, setting.sizes.prefill)
    read = partial(model, input_ids=ids, logits_to_keep=1)
    shapes = shapes_of(type(model), model.config)
    flops = flops_of(partial(shapes, input_ids=ids.to("meta"), logits_to_keep=1))
    seconds = interleave({"prefill": read, "product": matrix_product(options)}, options)
    return share_row(name, seconds, "prefill", flops, device=setting.device)


def prefill_against_native(name: str, model: Any, native: Any, setting: Setting) -> Row:
    """The same prompt by both."""
    ids = text_of(model, setting.sizes.prefill)
    calls = {
        who: partial(each, input_ids=ids, logits_to_keep=1, use_cache=True)
        for who, each in (("ours", model), ("peer", native))
    }
    return row_of(name, interleave(calls, setting.options.at_most(7)), target=1.0)


def decoding_steps(model: Any, step: Callable[..., Any], sizes: ModelSizes, length: int) -> Callable[[], torch.Tensor]:
    """A call that decodes one more token after a prompt, greedily, in tensors that stay where they are.

    Args:
        model: The model.
        step: Its forward, or what stands for it.
        sizes: `ModelSizes`, for the prompt.
        length: Tokens that fit the cache.
    """
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    prompt = text_of(model, sizes.prompt)
    token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    position = torch.full((1, 1), sizes.prompt, device=model.device)

    def decode() -> torch.Tensor:
        logits = step(input_ids=token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits
        token.copy_(logits.argmax(-1))
        position.add_(1)
        return token

    return decode


def times(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that many times."""

    def repeat() -> Any:
        for _ in range(count - 1):
            call()
        return call()

    return repeat


def cache_length(setting: Setting, options: Options) -> int:
    """Tokens of the prompt, of all rounds with two to warm up, and of the capture of a graph."""
    return setting.sizes.prompt + (2 + options.rounds) * setting.sizes.new_tokens + 8


def decoding_row(name: str, model: Any, way: str, setting: Setting) -> Row:
    """Share of the bandwidth of one stream."""
    sizes, options = setting.sizes, setting.options.at_most(7)
    step = compile_blocks(model) if way.startswith("compiled") else model
    decode: Callable[[], Any] = decoding_steps(model, step, sizes, cache_length(setting, options))
    decode = captured(decode) if way.endswith("CUDA graph") else decode
    calls = {"copy": copy_of(sizes.copied_bytes, options), "decoding": times(sizes.new_tokens, decode)}
    seconds = interleave(calls, options)
    read = sizes.new_tokens * weight_bytes(model.language_model, model.get_input_embeddings())
    target = None if way == "eager" else DECODE_TARGET
    speed = sizes.new_tokens / min(seconds["decoding"])
    return bandwidth_row(name, seconds, "decoding", read, sizes.copied_bytes, target, tokens_per_second=speed)


def decoding_against(name: str, model: Any, peer: Any, setting: Setting, target: float | None = None) -> Row:
    """Both step by step."""
    options = setting.options.at_most(5)
    calls = {
        who: times(setting.sizes.new_tokens, decoding_steps(each, each, setting.sizes, cache_length(setting, options)))
        for who, each in (("ours", model), ("peer", peer))
    }
    return row_of(name, interleave(calls, options), target=target)


# ------------------------------------------------------------------------------------------------------ quantised
def quantise_torchao(decoder: nn.Module, name: str) -> None:
    """Weights in int8 or fp8, in place."""
    from torchao import quantization

    quantization.quantize_(decoder, getattr(quantization, name)())


def quantise_nf4(decoder: nn.Module) -> None:
    """Linear layers in nf4 by bitsandbytes, one after the other."""
    import bitsandbytes as bnb

    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            weight, device = layer.weight, layer.weight.device
            sizes = layer.in_features, layer.out_features, layer.bias is not None, weight.dtype
            quantised = bnb.nn.Linear4bit(*sizes, quant_type="nf4", device="meta")
            quantised.weight = bnb.nn.Params4bit(weight.data.cpu(), requires_grad=False, quant_type="nf4")
            quantised.bias = layer.bias
            setattr(parent, name, quantised.to(device))


QUANTISED: dict[str, tuple[Callable[[nn.Module], None], tuple[Need, ...]]] = {
    "nf4 (bitsandbytes)": (quantise_nf4, (library("bitsandbytes"),)),
    "int8 (torchao)": (partial(quantise_torchao, name="Int8WeightOnlyConfig"), (library("torchao"),)),
    "fp8 (torchao)": (partial(quantise_torchao, name="Float8WeightOnlyConfig"), (FP8, library("torchao"))),
}


def quantised_jobs(setting: Setting) -> Iterator[Measurement]:
    """Memory and tokens a second of decoders whose weights are quantised, against bf16."""
    plain = build_large_chat(setting)
    size = size_name(plain.language_model)
    for kind, (quantise, needs) in QUANTISED.items():
        made = cache(partial(build_quantised, quantise, setting))  # by the first of the two, which has the time for it
        name = f"{size} chat model, {kind}: memory, against {setting.options.dtype}"
        yield Measurement(name, partial(quantised_memory_row, name, plain, made), 90.0, needs)
        name = f"{size} chat model, {kind}, eager: tokens a second, against {setting.options.dtype}"
        yield Measurement(name, partial(quantised_decoding_row, name, plain, made, setting), 90.0, needs)


def build_quantised(quantise: Callable[[nn.Module], None], setting: Setting) -> Any:
    """A decoder that was quantised on the device."""
    model = build_large_chat(setting)
    quantise(model.language_model)
    return model


def quantised_memory_row(name: str, plain: Any, made: Callable[[], Any]) -> Row:
    """Bytes of the weights as they are held."""
    sizes = {"bytes": held_bytes(made()), "bytes_before": held_bytes(plain)}
    return Row(name, ratio=sizes["bytes"] / sizes["bytes_before"], is_lower_better=True, details=sizes)


def quantised_decoding_row(name: str, plain: Any, made: Callable[[], Any], setting: Setting) -> Row:
    """Tokens one after another by both."""
    row = decoding_against(name, made(), plain, setting)
    seconds = row.details["median_seconds"]["ours"]
    row.details["tokens_per_second"] = setting.sizes.new_tokens / seconds
    return row
