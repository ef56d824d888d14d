"""Models with random weights on the device, ways to run them, and what their work is measured by."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.utils import compile_regions
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedModel

from ..harness import Options, Row, row_of


def build_random(
    model_class: type[PreTrainedModel], config: PretrainedConfig, options: Options, **settings: Any
) -> Any:
    """A model that is made on the device in its dtype, since the host may not hold it."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = model_class._from_config(config, dtype=options.dtype, **settings).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None  # generation ends at the length that is asked for
        model.generation_config.pad_token_id = 0
    return model


def shapes_of(model_class: type[PreTrainedModel], config: PretrainedConfig, **settings: Any) -> Any:
    """The model without weights, to count with."""
    with torch.device("meta"):
        return model_class(config, **settings).eval().requires_grad_(False)  # else the counter tracks gradients


def size_name(model: nn.Module) -> str:
    """Parameters, in words."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e9:.2g} B"


def weight_bytes(model: nn.Module, unread: nn.Module) -> int:
    """Bytes of the weights, without a part of which a new token reads nothing or one row."""
    total, left_out = (sum(p.numel() * p.element_size() for p in part.parameters()) for part in (model, unread))
    return total - left_out


def noise(batch: int, side: int, options: Options) -> torch.Tensor:
    """Tiles (batch, 3, side, side)."""
    return torch.randn(batch, 3, side, side, device=options.device, dtype=options.dtype)


def flash() -> AbstractContextManager[None]:
    """Inside, torch's scaled dot-product attention is its own flash kernel, or fails."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def compile_blocks(model: nn.Module) -> nn.Module:
    """The model with its blocks compiled: one compilation serves all that are alike, where the whole model takes
    minutes.
    """
    return compile_regions(model, fullgraph=True, dynamic=False)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """A call as a CUDA graph: what it launches, launched at once. It must use the same tensors every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations and autotuning of the first calls must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_of(num_bytes: int, options: Options) -> Callable[[], Any]:
    """Copies so many bytes within the memory of the device: they are read and written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=options.device)
    return partial(torch.empty_like(source).copy_, source)


def bandwidth_row(
    name: str,
    seconds: dict[str, list[float]],
    call: str,
    read_bytes: int,
    copied_bytes: int,
    target: float | None = None,
    **details: Any,
) -> Row:
    """Bytes that a call must read, per second, over those that the call "copy" reads and writes."""
    scale = read_bytes / (2 * copied_bytes)
    return row_of(name, seconds, call, "copy", target, scale, read_bytes=read_bytes, **details)
