"""Peak memory of the tiles that a chat model reads, by rows, tiles and dtype, against what `python -m
internvl.planning memory` says.

The width of InternViT-300M at 448 px with few blocks: without gradients, blocks use the same memory one after the
other.
"""

import tempfile
from collections.abc import Iterator
from functools import partial

import torch

from internvl import InternVLChatForConditionalGeneration
from internvl.planning.memory import inspect_model

from .harness import Options, Row, in_fresh_process, memory_growth
from .native import build_chat
from .vision import SIZES as VISION
from .vision import TEXT


DTYPES = ("float32", "bfloat16")
IMAGES = ((1, 1), (1, 7), (1, 13), (4, 13))  # rows, and tiles of each


def build_chat_of(dtype: str, device: str) -> InternVLChatForConditionalGeneration:
    """The model, with random weights."""
    return build_chat(VISION, TEXT, Options(device)).to(getattr(torch, dtype))


@torch.no_grad()
def taken_bytes(dtype: str, tiles: int, device: str) -> int:
    """What encoding so many tiles takes, the pixels included."""
    model, size = build_chat_of(dtype, device), VISION["image_size"]

    def encode(tiles: int) -> torch.Tensor:
        return model.extract_feature(torch.randn(tiles, 3, size, size, device=device))

    encode(1)  # libraries make their buffers
    return memory_growth(partial(encode, tiles), device)


def rows(options: Options) -> Iterator[Row]:
    """One row for each dtype and number of tiles."""
    for dtype in DTYPES:
        config = build_chat_of(dtype, "meta").config
        for batch, tiles in IMAGES:
            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                said = inspect_model(folder, dtype, tiles, batch).vision_activations
            taken = in_fresh_process(taken_bytes, dtype, batch * tiles, options.device)
            yield Row(
                f"{batch} x {tiles} tile(s) of 448 px, 300M width, {dtype}: peak memory against what is said",
                ratio=taken / said,
                is_lower_better=True,
                details={"bytes": taken, "said": said},
            )
