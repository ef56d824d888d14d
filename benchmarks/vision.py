"""InternViT against transformers' own tower, plain and compiled, and against what the machine can do; features of an
inner block.

The width of InternViT-300M (1024, LayerNorm) at 448 px with few blocks, so that a laptop finishes; features with a
narrow tower that has as many blocks as that one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from internvl import InternVisionModel, InternViTConfig

from .harness import (
    Options,
    Row,
    flops_of,
    in_fresh_process,
    interleave,
    matrix_product,
    memory_growth,
    no_compiler,
    require_equal,
    row_of,
    share_row,
    sizes_of,
    speed_row,
)
from .native import build_pair


BATCHES = {1: 15, 8: 5}  # tiles, and the most rounds
TILE_BY_TILE = "compiled, tile by tile"
# Against native eager, and as a share of the matrix rate.
TARGETS = {"eager": (1.0, 0.75), "compiled": (1.1, 0.85), TILE_BY_TILE: (1.1, 0.85)}
SIZES = sizes_of(1024, 4096, 4, 16, image_size=448, patch_size=14)
# Of the decoder, which has no part in this.
TEXT = sizes_of(64, 64, 1, 1, vocab_size=64, num_key_value_heads=1)
FEATURE_SIZES = sizes_of(384, 1536, 24, 6, image_size=448, patch_size=14)
FEATURE_LAYER = -4
FEATURE_TILES = 8


def pixels(batch: int, size: int, options: Options) -> torch.Tensor:
    """Tiles (batch, 3, size, size) of noise."""
    return torch.randn(batch, 3, size, size, device=options.device, dtype=options.dtype)


def compiled(model: Callable[..., Any], tiles: torch.Tensor) -> partial[Any]:
    """The forward of these tiles as one graph with its weights frozen in; to be made without gradients.

    Freezing is a setting of the moment of the first call: as an option of `torch.compile` it has no effect (torch
    2.13).
    """
    call = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(freezing=True):
        call(tiles)
    return partial(call, tiles)


def tile_by_tile(call: Callable[..., Any], tiles: torch.Tensor) -> BaseModelOutputWithPooling:
    """What a chat model with `vision_batch_size` 1 does: one compiled shape serves any number of tiles."""
    features = torch.cat([call(tile).last_hidden_state for tile in tiles.split(1)])
    return BaseModelOutputWithPooling(last_hidden_state=features)


def forward_rows(options: Options) -> Iterator[Row]:
    """Both towers, and ours compiled, for one tile and for eight."""
    chat, native_chat = build_pair(SIZES, TEXT, options)
    ours: Any = chat.vision_model
    native = native_chat.model.vision_tower
    with torch.device("meta"):
        shapes: Any = InternVisionModel(ours.config)
    missing = no_compiler(options.device)
    for batch, rounds in BATCHES.items():
        tiles = pixels(batch, SIZES["image_size"], options)
        flops = flops_of(partial(shapes, tiles.to("meta", torch.float32)))
        calls: dict[str, Callable[[], Any]] = {"eager": partial(ours, tiles), "native": partial(native, tiles)}
        calls["product"] = matrix_product(options)
        if not missing:
            torch.compiler.reset()  # each shape anew
            calls["compiled"] = compiled(ours, tiles)
            if batch > 1:
                single = compiled(ours, tiles[:1])
                calls[TILE_BY_TILE] = partial(tile_by_tile, single.func, tiles)
        wanted = native(tiles).last_hidden_state
        difference = {
            name: require_equal(call().last_hidden_state, wanted) for name, call in calls.items() if name != "product"
        }
        seconds = interleave(calls, options.at_most(rounds), warmups=1)
        shape = f"vision forward, 300M shape, {batch} tile(s)"
        for name, (against_native, of_rate) in TARGETS.items():
            if name == TILE_BY_TILE and batch == 1:
                continue
            titles = f"{shape}: {name} against native eager", f"{shape}: {name}, share of the matrix rate"
            if name not in calls:
                yield from (Row(title, skipped=missing) for title in titles)
                continue
            details: dict[str, Any] = {"largest_difference": difference[name], "device": options.device}
            yield row_of(titles[0], seconds, name, "native", against_native, **details)
            yield share_row(titles[1], seconds, name, flops, of_rate, **details)


def feature_tower(options: Options) -> InternVisionModel:
    """A tower with as many blocks as InternViT-300M has."""
    torch.manual_seed(0)
    config = InternViTConfig(**FEATURE_SIZES, norm_type="layer_norm", qk_normalization=False, qkv_bias=True)
    return InternVisionModel(config).eval().to(options.device, options.dtype)


def features_at_layer(tower: InternVisionModel, tiles: torch.Tensor) -> torch.Tensor:
    """Only the blocks below the layer are run."""
    depth = tower.config.num_hidden_layers
    return tower(tiles, num_layers=depth + 1 + FEATURE_LAYER).last_hidden_state


def features_of_all_layers(tower: InternVisionModel, tiles: torch.Tensor) -> torch.Tensor:
    """All blocks are run and all hidden states kept, as in the published code."""
    return tower(tiles, output_hidden_states=True).hidden_states[FEATURE_LAYER]


WAYS = {"ours": features_at_layer, "peer": features_of_all_layers}


def feature_rows(options: Options) -> Iterator[Row]:
    """Time and memory of the features that a chat model reads."""
    tower, tiles = feature_tower(options), pixels(FEATURE_TILES, FEATURE_SIZES["image_size"], options)
    require_equal(features_at_layer(tower, tiles), features_of_all_layers(tower, tiles))
    depth = FEATURE_SIZES["num_hidden_layers"]
    name = f"vision features, hidden state {FEATURE_LAYER} of {depth} blocks, against running and keeping all"
    calls = {way: partial(call, tower, tiles) for way, call in WAYS.items()}
    # Embedding the pixels is in both.
    yield speed_row(
        f"{name}: speed", calls["ours"], calls["peer"], options, target=depth / (depth + 1 + FEATURE_LAYER)
    )
    if options.device == "cpu":
        memory = {way: in_fresh_process(feature_memory, way) for way in WAYS}
    else:
        memory = {way: memory_growth(call, options.device) for way, call in calls.items()}
    yield Row(
        f"{name}: activation memory",
        ratio=memory["ours"] / memory["peer"],
        target=0.4,
        is_lower_better=True,
        details={"bytes": memory, "measured": "growth of resident memory" if options.device == "cpu" else "allocator"},
    )


@torch.no_grad()
def feature_memory(way: str) -> int:
    """Bytes that getting features takes at its most; libraries have made their buffers in a forward before."""
    options = Options()
    tower, size = feature_tower(options), FEATURE_SIZES["image_size"]
    tower(pixels(1, size, options), num_layers=1)
    tiles = pixels(FEATURE_TILES, size, options)
    return memory_growth(partial(WAYS[way], tower, tiles))


@torch.no_grad()
def rows(options: Options) -> Iterator[Row]:
    """The forward, then features."""
    yield from forward_rows(options)
    yield from feature_rows(options)
