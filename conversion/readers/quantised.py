"""Quantised checkpoints: those of bitsandbytes become the numbers that its layers compute with, others are refused.

In 8 bits, bitsandbytes stores a linear layer as `x.weight` (int8) and the largest magnitude of each row (`x.SCB`), in
units of 1/127 of it. In 4 bits, `x.weight` packs two indices into a table of 16 numbers in a byte, with the largest
magnitude of each block (of 64, say), which may itself be stored in 8 bits. Both define the numbers exactly; what
quantising lost stays lost.
"""

import json
import math
import re
from dataclasses import replace
from typing import Any

import torch

from .checkpoint_files import read_json
from .damages import naming
from .source import Source
from .tensors import LazyTensor, TensorReader, Tensors, computed


# Ends of names that other quantisations give their tensors, and who does.
OTHER_MARKS = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors, FP8 or the like",
    ".weight_scale_inv": "fine-grained FP8",
    ".weight._data": "quanto",
    ".weight_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}
STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
PARTS_OF_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dequantised(source: Source) -> Source:
    """A source with plain weights: the same where nothing is quantised.

    Raises:
        ValueError: The quantisation is another one, or its parts do not fit together.
    """
    other = next((who for name in source.tensors for mark, who in OTHER_MARKS.items() if name.endswith(mark)), None)
    if other is not None:
        raise ValueError(
            f"`{source.folder}` is quantised ({_method(source) or other}), and only weights that bitsandbytes "
            "quantised are converted. Give the checkpoint that this one was made of."
        )
    states = {match["weight"]: match[0] for match in map(STATE.fullmatch, source.tensors) if match}
    scales = [name for name in source.tensors if name.endswith(".SCB")]
    if states:
        source = _from_four_bits(source, states)
    return _from_eight_bits(source, scales) if scales else source


def _method(source: Source) -> str | None:
    """The name that config.json gives the quantisation, if it is a plain name."""
    config = read_json(source.folder / "config.json")
    for part in (config, *config.values()):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if isinstance(method, str) and re.fullmatch(r"[\w.-]{1,40}", method):
            return method
    return None


# -------------------------------------------------------------------------------------------------------------- 8 bits
def _from_eight_bits(source: Source, scales: list[str]) -> Source:
    tensors = dict(source.tensors)
    reader = TensorReader()
    for name in scales:
        module = name.removesuffix(".SCB")
        scale, weight = tensors.pop(name), tensors.get(f"{module}.weight")
        order = tensors.pop(f"{module}.weight_format", None)
        if weight is None or weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
            raise ValueError(
                f"`{scale.file}` holds `{name}` {scale.shape} without the int8 weight that it belongs to."
            )
        if order is not None and int(order.load(reader)) != 0:
            raise ValueError(f"`{scale.file}` holds `{module}.weight` in an order of one kind of GPU, not row by row.")
        tensors[f"{module}.weight"] = computed(_times_scale, weight, scale)
    widened = {name: _widened(tensor) for name, tensor in tensors.items()}
    note = f"Dequantised {len(scales)} layers of 8 bits (bitsandbytes) to the float32 numbers that they stand for."
    return replace(source, tensors=widened, notes=[*source.notes, note], dtype=None)


def _times_scale(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantises bit by bit as bitsandbytes, which multiplies by the rounded reciprocal of 127."""
    return weight * scale.float().view(-1, 1) * 7.874015718698502e-3


def _widened(tensor: LazyTensor) -> LazyTensor:
    is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return computed(lambda value: value.float(), tensor) if is_narrow else tensor


# -------------------------------------------------------------------------------------------------------------- 4 bits
def _from_four_bits(source: Source, states: dict[str, str]) -> Source:
    tensors = dict(source.tensors)
    reader = TensorReader()
    for name, state_name in states.items():
        state = tensors.pop(state_name)
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in PARTS_OF_FOUR_BITS}
        with naming(state.file, f"checkpoint of 4 bits: `{name}` does not fit its `quant_state`", ValueError):
            settings = json.loads(bytes(state.load(reader).tolist()))
            tensors[name] = _four_bit_tensor(tensors[name], parts, settings)
    note = f"Dequantised {len(states)} layers of 4 bits (bitsandbytes) to the numbers that they compute with."
    return replace(source, tensors=tensors, notes=[*source.notes, note])


def _four_bit_tensor(packed: LazyTensor, parts: dict[str, Any], settings: dict[str, Any]) -> LazyTensor:
    shape, block, dtype = tuple(settings["shape"]), settings["blocksize"], FLOATS[settings["dtype"]]
    count, nested_block = math.prod(shape), settings.get("nested_blocksize")
    offset = float(settings.get("nested_offset") or 0.0)
    inputs: Tensors = {"weight": packed, **{name: part for name, part in parts.items() if part is not None}}
    num_blocks = -(-count // block)
    if math.prod(packed.shape) != -(-count // 2) or inputs["absmax"].shape != (num_blocks,):
        raise ValueError(f"{packed.shape} bytes for {shape} numbers in blocks of {block}")

    def unpacked(*found: torch.Tensor) -> torch.Tensor:
        values = dict(zip(inputs, found, strict=True))
        largest = values["absmax"]
        if nested_block:
            unit = values["nested_absmax"].repeat_interleave(nested_block)[:num_blocks]
            largest = values["nested_quant_map"][largest.int()] * unit + offset
        pair = values["weight"].flatten()
        places = torch.stack([pair >> 4, pair & 15], dim=1).flatten()[:count]
        numbers = values["quant_map"][places.int()] * largest.float().repeat_interleave(block)[:count]
        return numbers.to(dtype).view(shape)

    return computed(unpacked, *inputs.values())
