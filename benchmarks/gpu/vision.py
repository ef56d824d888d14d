"""InternViT-6B at 448 px: share of the matrix rate, eager, compiled, as a CUDA graph and in fp8; native beside it."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvl import InternVisionModel, InternViTConfig

from ..harness import Calls, Row, flops_of, interleave, matrix_product, no_compiler, row_of, share_row
from .jobs import CUDA, FP8, Measurement, Need, Setting, library
from .models import build_random, captured, compile_blocks, noise, shapes_of, size_name


ROUNDS = {1: 15, 16: 7, 64: 3}  # tiles, and the most rounds
COMPILED_SECONDS = 75.0
TARGETS = {"eager": 0.70, "compiled": 0.80}
COMPILER = Need("a C compiler", lambda setting: no_compiler(setting.device) is None)


def native_tower(config: InternViTConfig, setting: Setting) -> Any:
    """transformers' own tower of the same shape, with random weights."""
    native = InternVLVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        image_size=[config.image_size] * 2,
        patch_size=[config.patch_size] * 2,
        use_qk_norm=config.qk_normalization,
        norm_type=config.norm_type,
        attention_bias=config.qkv_bias,
    )
    return build_random(InternVLVisionModel, native, setting.options)


def vision_jobs(setting: Setting) -> Iterator[Measurement]:
    """Every batch eager, compiled, as a graph, in fp8, and by transformers' own tower."""
    config = InternViTConfig(**setting.sizes.vision)
    model = build_random(InternVisionModel, config, setting.options)
    native = native_tower(config, setting)
    shapes = shapes_of(InternVisionModel, config)
    for batch in setting.sizes.batches:
        tiles = noise(batch, config.image_size, setting.options)
        flops = flops_of(partial(shapes, tiles.to("meta", torch.float32)))
        title = f"InternViT {size_name(model)}, {config.image_size} px, {batch} tile(s)"
        yield from batch_jobs(title, model, native, tiles, flops, setting)
    del native
    yield from fp8_jobs(model, setting)


def batch_jobs(
    title: str, model: Any, native: Any, tiles: torch.Tensor, flops: int, setting: Setting
) -> Iterator[Measurement]:
    """Jobs of one batch."""
    options = setting.options.at_most(ROUNDS.get(len(tiles), setting.options.rounds))

    def share(call: str, run: Callable[[], Callable[[], Any]]) -> Row:
        seconds = interleave({call: run(), "product": matrix_product(options)}, options)
        name = f"{title}: {call}, share of the matrix rate"
        per_image = min(seconds[call]) / len(tiles)
        return share_row(name, seconds, call, flops, TARGETS[call], device=setting.device, seconds_per_image=per_image)

    def against(name: str, runs: Callable[[], Calls], target: float | None) -> Row:
        return row_of(name, interleave(runs(), options), target=target)

    yield Measurement(
        f"{title}: eager, share of the matrix rate", partial(share, "eager", lambda: partial(model, tiles))
    )
    yield Measurement(
        f"{title}: compiled, share of the matrix rate",
        partial(share, "compiled", lambda: partial(compile_blocks(model), tiles)),
        COMPILED_SECONDS,
        (COMPILER,),
    )
    name = f"{title}: eager, against native"
    runs = {"ours": partial(model, tiles), "peer": partial(native, tiles)}
    yield Measurement(name, partial(against, name, lambda: runs, 1.0))
    name = f"{title}: CUDA graph, against eager"
    target = 1.15 if len(tiles) == 1 else None
    yield Measurement(name, partial(against, name, lambda: graph_and_eager(model, tiles), target), 45.0, (CUDA,))


def graph_and_eager(model: Any, tiles: torch.Tensor) -> Calls:
    """The forward as a graph, and as it is."""
    eager = partial(model, tiles)
    return {"ours": captured(eager), "peer": eager}


def fp8_jobs(model: Any, setting: Setting) -> Iterator[Measurement]:
    """Weights and activations in fp8 by torchao, compiled as it asks for, against bf16 compiled."""
    batch = setting.sizes.batches[-1]
    title = f"InternViT {size_name(model)}, {batch} tile(s): fp8 (torchao), against bf16, both compiled"
    yield Measurement(
        title,
        partial(fp8_row, title, model, batch, setting),
        2 * COMPILED_SECONDS,
        (FP8, library("torchao"), COMPILER),
    )


def fp8_row(name: str, model: Any, batch: int, setting: Setting) -> Row:
    """Speed, with the error of the features beside it."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    tiles = noise(batch, model.config.image_size, setting.options)
    eighth = copy.deepcopy(model)
    quantize_(eighth, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    calls = {"ours": partial(compile_blocks(eighth), tiles), "peer": partial(compile_blocks(model), tiles)}
    found, expected = (calls[who]().last_hidden_state.float() for who in ("ours", "peer"))
    cosine = torch.cosine_similarity(found, expected, dim=-1).mean().item()
    options = setting.options.at_most(ROUNDS.get(batch, setting.options.rounds))
    return row_of(name, interleave(calls, options), target=1.4, cosine_of_features=cosine)
