"""What the decoder sees of a tile: 96 queries of QLLaMA, 256 patches, or both. Time to the first token, and memory.

The models have the sizes of the published InternVL-Chat 13 B (`configs/models/internvl-chat-full-13b.json`) with tiles
of 448 px, random weights, and an eighth of the layers of tower, QLLaMA and decoder alike, so that their parts weigh as
in the whole model and a small machine holds them. All three share their weights. Nothing here says how well a model
answers.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration
from internvl.configuration_internvl import CONNECTORS

from .harness import Options, Row, in_fresh_process, interleave, memory_growth, row_of
from .quantizers import held_bytes


SIZES = Path(__file__).parents[1] / "configs" / "models" / "internvl-chat-full-13b.json"
SHARE_OF_LAYERS = 8
PARTS = ("vision_config", "qllama_config", "text_config")
IMAGE_SIZE = 448
TILES = {"1 tile": 1, "4 tiles and a thumbnail": 5}
TEXT_TOKENS = 64
IMAGE_TOKEN_ID = 3
DTYPE = torch.bfloat16
PEER = "patches"  # what the others are compared with
OTHERS = [connector for connector in CONNECTORS if connector != PEER]
ROUNDS = 5


def configuration(connector: str) -> InternVLChatConfig:
    """The published sizes with fewer layers, larger tiles and a connector."""
    sizes = json.loads(SIZES.read_text(encoding="utf-8"))
    for part in PARTS:
        sizes[part]["num_hidden_layers"] //= SHARE_OF_LAYERS
    sizes["vision_config"]["image_size"] = IMAGE_SIZE
    if connector == "patches":
        del sizes["qllama_config"]
    settings = {"connector": connector, "downsample_ratio": 0.5, "ps_version": "v2", "image_token_id": IMAGE_TOKEN_ID}
    return InternVLChatConfig(**{**sizes, **settings})


def build_models(device: str) -> dict[str, Any]:
    """A model for each connector; what several have is one module."""
    torch.manual_seed(0)
    build = InternVLChatForConditionalGeneration._from_config
    with torch.device(device):
        whole = build(configuration("queries_and_patches"), dtype=DTYPE).eval()
    models = {"queries_and_patches": whole}
    for connector in CONNECTORS:
        if connector not in models:
            with torch.device("meta"):
                models[connector] = build(configuration(connector), dtype=DTYPE).eval()
            for name, _ in [*models[connector].named_children(), *models[connector].named_parameters(recurse=False)]:
                setattr(models[connector], name, getattr(whole, name))
    for model in models.values():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return models


def decoder_tokens(model: Any, tiles: int) -> int:
    """What the decoder reads: the tokens of the image and the text."""
    return tiles * model.config.num_image_token + TEXT_TOKENS


def first_token_of(model: Any, tiles: int) -> Callable[[], torch.Tensor]:
    """A call that answers an image and a text with one token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IMAGE_TOKEN_ID + 1, 1000, (1, decoder_tokens(model, tiles)), generator=generator)
    ids[:, : tiles * model.config.num_image_token] = IMAGE_TOKEN_ID
    pixels = torch.randn(tiles, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(DTYPE)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)


def first_token_bytes(connector: str, tiles: int, device: str) -> int:
    """What the first token takes beside the weights."""
    return memory_growth(first_token_of(build_models(device)[connector], tiles), device)


def rows(options: Options) -> Iterator[Row]:
    """Time to the first token and memory of each connector against patches."""
    options = options.at_most(ROUNDS)
    models = build_models(options.device)
    for name, tiles in TILES.items():
        seconds = interleave(
            {connector: first_token_of(model, tiles) for connector, model in models.items()}, options, warmups=1
        )
        for connector in OTHERS:
            title = f"{name}, connector `{connector}` against `{PEER}`: speed of the first token"
            tokens = {each: decoder_tokens(models[each], tiles) for each in (connector, PEER)}
            yield row_of(title, seconds, connector, PEER, tokens=tokens)
    weights = {connector: held_bytes(model) for connector, model in models.items()}
    del models
    for name, tiles in TILES.items():
        taken = {each: in_fresh_process(first_token_bytes, each, tiles, options.device) for each in CONNECTORS}
        for connector in OTHERS:
            yield Row(
                f"{name}, connector `{connector}` against `{PEER}`: memory of the first token beside weights",
                ratio=taken[connector] / taken[PEER],
                is_lower_better=True,
                details={"bytes": taken, "weight_bytes": weights},
            )
