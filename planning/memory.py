"""What a model needs and where it would go, before anything is downloaded: `python -m internvl.planning memory MODEL`.

Only the configuration is read; the model is built on the meta device, without a byte of weights.

Does: parameters and bytes of each part in a given dtype; the key-value cache; the most memory the vision tower takes
while it runs (measured on the meta device); and, given the memory of each device, where `device_map` would put every
module, by the code that `from_pretrained` runs. Does not count: activations of the language models, workspace of
kernels, what the allocator holds back, and the rest of the process (a CUDA context takes some 0.5 GiB per card).
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, get_max_memory, infer_auto_device_map
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from ..configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig, QLlamaConfig
from ..kinds import read_config_file
from ..modeling_internvit import (
    InternVisionModel,
    InternViTBackbone,
    InternViTForImageClassification,
    InternViTForSemanticSegmentation,
)
from ..modeling_internvl import InternVLModel
from ..modeling_internvl_chat import InternVLChatBaseModel, InternVLChatForConditionalGeneration
from ..modeling_qllama import QLlamaForCausalLM
from .commands import ATTENTIONS, DEVICE_MAPS, DTYPES
from .counting import counted_step


GIB = 1024**3
TEXT_LENGTH = 512  # positions of text beside the images, where `--length` does not say
# What each is computed in: weights of a quantised model are stored in blocks, and computed with in bfloat16.
COMPUTE_DTYPES = dict(
    zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.bfloat16), strict=True)
)
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5}  # of a weight, without its scales: what transformers places by
# bitsandbytes: one fp32 scale per row of an int8 matrix, and one per block of 64 nf4 weights; two of these share a
# byte.
NF4_BLOCK, SCALE_BYTES = 64, 4
# transformers leaves a tenth of every device to what quantising allocates.
QUANTIZER_SHARE = 0.9
PARTS = ("vision tower", "QLLaMA", "heads", "connector", "decoder", "embeddings")

MODEL_CLASSES: dict[str, tuple[Any, ...]] = {  # by `model_type`; the first is what `AutoModel` gives
    InternViTConfig.model_type: (
        InternVisionModel,
        InternViTBackbone,
        InternViTForImageClassification,
        InternViTForSemanticSegmentation,
    ),
    QLlamaConfig.model_type: (QLlamaForCausalLM,),
    InternVLConfig.model_type: (InternVLModel,),
    InternVLChatConfig.model_type: (InternVLChatForConditionalGeneration, InternVLChatBaseModel),
}


# The published sizes: a name and its `config.json`.
SIZES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs" / "models").glob("*.json"))}


def read_config(model: str | Path) -> PretrainedConfig:
    """The configuration that a name or path stands for.

    Args:
        model: Folder, `config.json`, Hub name, or a key of `SIZES`.

    Raises:
        ValueError: A configuration that is not one of this package.
        OSError: Nothing there.
    """
    path = SIZES.get(str(model), Path(model))
    if path.is_dir() and not (path / "config.json").is_file():
        raise OSError(f"{path} holds no `config.json`: name the folder of a checkpoint, or its configuration.")
    if path.exists():
        read_config_file(path / "config.json" if path.is_dir() else path)
    try:
        found, _ = PretrainedConfig.get_config_dict(path if path.exists() else model)
    except OSError as error:
        if path.exists():
            raise
        raise OSError(
            f"`{model}` is no folder or file here, no Hub repository that can be reached, and none of the published "
            f"sizes {sorted(SIZES)}."
        ) from error
    model_type = found.pop("model_type", None)
    if model_type not in MODEL_CLASSES:
        raise ValueError(
            f"`{model}` has the `model_type` {model_type!r}, expected one of {sorted(MODEL_CLASSES)}. A published "
            "InternVL checkpoint is converted first: `python -m internvl.conversion SOURCE OUT`."
        )
    return AutoConfig.for_model(model_type, **found)


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str = ATTENTIONS[0]) -> PreTrainedModel:
    """Build the model of a configuration on the meta device: the class it was saved as, else that of `AutoModel`."""
    classes = MODEL_CLASSES[config.model_type]
    saved = {model_class.__name__: model_class for model_class in classes}
    model_class = next((saved[name] for name in config.architectures or [] if name in saved), classes[0])
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    model.config._attn_implementation = attention  # not by the model's own setter, which asks for the kernels
    return model


class WeightSizes:
    """Bytes of a model's tensors as `from_pretrained` stores them.

    Stands where transformers' placement asks a quantiser, so that quantised models are measured without bitsandbytes.

    Args:
        model: On the meta device, in the dtype it computes in.
        dtype: One of `DTYPES`.
    """

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self.quantized_bytes = QUANTIZED_BYTES.get(dtype)
        self.dtype = dtype
        self.quantized: set[str] = set()
        if self.quantized_bytes is not None:
            kept = getattr(model, "_modules_kept_unquantized", None)
            if kept is None:
                raise ValueError(
                    f"{type(model).__name__} is not loaded in 8 or 4 bits on its own; choose a dtype of "
                    f"{list(DTYPES[:3])}."
                )
            self.quantized = {
                f"{name}.weight"
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and should_convert_module(name, list(kept))
            }

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element of a tensor, as transformers' quantisers count: without the scales."""
        if self.quantized_bytes is not None and param_name in self.quantized:
            return self.quantized_bytes
        return param.element_size()

    def stored_bytes(self, name: str, tensor: torch.Tensor) -> int:
        """Bytes of a tensor with the scales that belong to it."""
        if name not in self.quantized:
            return tensor.numel() * tensor.element_size()
        if self.dtype == "int8":
            return tensor.numel() + SCALE_BYTES * tensor.shape[0]
        return math.ceil(tensor.numel() / 2) + SCALE_BYTES * math.ceil(tensor.numel() / NF4_BLOCK)

    def adjust_max_memory(self, max_memory: dict[int | str, int]) -> dict[int | str, int]:
        """What of each device transformers fills."""
        if self.quantized_bytes is None:
            return max_memory
        return {device: int(size * QUANTIZER_SHARE) for device, size in max_memory.items()}


@dataclass
class PartSize:
    """Parameters and stored bytes of one part of a model."""

    part: str
    parameters: int
    bytes: int


def _own_tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, tied ones once."""
    tied = set(model.all_tied_weights_keys)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if name not in tied]


def _part_of(name: str, embeddings: tuple[str, ...], config: PretrainedConfig) -> str:
    if name.startswith(embeddings):
        return "embeddings"
    first = name.split(".")[0]
    if first in ("vision_model", "embeddings", "encoder"):
        return "vision tower"
    if first in ("qllama", "query_tokens") or config.model_type == QLlamaConfig.model_type:
        return "QLLaMA"
    return {"language_model": "decoder", "mlp1": "connector", "mlp2": "connector"}.get(first, "heads")


def count_parts(model: PreTrainedModel, sizes: WeightSizes) -> list[PartSize]:
    """The parts that a model has, in the order of `PARTS`."""
    names = {id(module): name for name, module in model.named_modules()}
    has_words = not isinstance(model.config, InternViTConfig)
    word_layers = (model.get_input_embeddings(), model.get_output_embeddings()) if has_words else ()
    embeddings = tuple(f"{names[id(layer)]}." for layer in word_layers if layer is not None)
    parts = {part: PartSize(part, 0, 0) for part in PARTS}
    for name, tensor in _own_tensors(model):
        part = parts[_part_of(name, embeddings, model.config)]
        part.parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        part.bytes += sizes.stored_bytes(name, tensor)
    return [part for part in parts.values() if part.bytes]


def vision_config_of(config: PretrainedConfig) -> InternViTConfig | None:
    """The vision tower's configuration, or None where a model has no tower."""
    return config if isinstance(config, InternViTConfig) else getattr(config, "vision_config", None)


def cached_text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """Configuration of the language model that generates, or None where a model generates no text."""
    if isinstance(config, InternViTConfig):
        return None
    text_config = config.get_text_config(decoder=True)
    return None if getattr(text_config, "num_query_token", None) == 0 else text_config


def image_positions(config: PretrainedConfig, tiles: int) -> int:
    """Positions of a row that its tiles take in the language model: a tile's tokens each, or QLLaMA's queries once."""
    if config.model_type == InternVLChatConfig.model_type:
        return tiles * config.num_image_token
    return getattr(config, "num_query_token", 0)


def cache_bytes_per_layer(text_config: PretrainedConfig, batch: int, length: int, element_size: int) -> int:
    """Bytes of a layer's keys and values: 2 x rows x positions x heads x head width. Sliding windows do not count."""
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return 2 * batch * length * kv_heads * head_dim * element_size


def vision_activation_bytes(
    config: InternViTConfig, tiles: int, image_size: int, dtype: torch.dtype, tiles_at_once: int | None = None
) -> int:
    """The most memory the vision tower takes beside its weights while it encodes `tiles`, without gradients.

    Measured on the meta device with `tiles_at_once` of them (None: all), in a tower of two blocks: further ones take
    no more. All pixels in fp32 come on top. What a kernel allocates for itself differs by processor: it does not
    count; flash attention takes no more than sdpa.
    """
    shallow = deepcopy(config)
    shallow.num_hidden_layers = min(2, config.num_hidden_layers)
    shallow._attn_implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        tower = InternVisionModel._from_config(shallow, dtype=dtype).eval()
        pixel_values = torch.empty(tiles, config.num_channels, image_size, image_size)
    with torch.no_grad(), counted_step() as counter:
        tower(pixel_values[:tiles_at_once])
    return counter.peak_bytes + pixel_values.nbytes


@dataclass
class DevicePlan:
    """What one device would hold, in bytes; `budget` is None for the disk."""

    device: str
    budget: int | None
    weights: int = 0
    kv_cache: int = 0
    vision_activations: int = 0

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.kv_cache + self.vision_activations

    @property
    def fits(self) -> bool:
        """Whether the device has so much."""
        return self.budget is None or self.total <= self.budget


def parse_max_memory(text: str) -> dict[int | str, int]:
    """`0=24GiB,1=24GiB,cpu=64GiB` as accelerate's `max_memory`, in bytes; a card may be called `cuda:0` as well.

    Raises:
        ValueError: Not of that form, or a device twice.
    """
    memory: dict[int | str, int] = {}
    for entry in text.split(","):
        name, separator, size = (word.strip() for word in entry.partition("="))
        device = re.fullmatch(r"(?i)(?:(?:cuda|xpu|npu):)?([0-9]+)|(cpu|mps|disk)", name)
        if not separator or device is None:
            raise ValueError(
                "`--max-memory` takes DEVICE=SIZE pairs such as `0=24GiB,1=24GiB,cpu=64GiB`, where DEVICE is the "
                f"number of a card (`0` or `cuda:0`), `cpu`, `mps` or `disk`; got {entry.strip()!r}."
            )
        if not re.fullmatch(r"(?i)[0-9]+(\.[0-9]+)?\s*[kmg]i?b", size):
            raise ValueError(f"`--max-memory` sizes look like `24GiB` or `24GB`, got {size!r} for device {name}.")
        key = int(device[1]) if device[1] else device[2].lower()
        if key in memory:
            raise ValueError(f"`--max-memory` names the device {key} twice.")
        memory[key] = convert_file_size_to_int(size.replace(" ", ""))
    return memory


def infer_placement(
    model: PreTrainedModel, sizes: WeightSizes, device_map: str, max_memory: dict[int | str, int]
) -> dict[str, Any]:
    """The map that `from_pretrained(device_map=..., max_memory=...)` would infer, by the same functions.

    Args:
        model: On the meta device.
        sizes: How its weights are stored.
        device_map: One of `DEVICE_MAPS`; "auto" means "balanced" in transformers.
        max_memory: Bytes per device; devices that are not here are not needed.
    """
    shared: Any = {"no_split_module_classes": model._no_split_modules, "hf_quantizer": sizes}
    if device_map == "sequential":
        budgets = get_max_memory(dict(max_memory))
    else:
        low_zero = device_map == "balanced_low_0"
        budgets = get_balanced_memory(model, dict(max_memory), low_zero=low_zero, **shared)
    return dict(infer_auto_device_map(model, sizes.adjust_max_memory(budgets), **shared))


def device_of(name: str, device_map: dict[str, Any]) -> Any:
    """Where a module or parameter goes: the entry for it, or for the closest module around it."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map[name]


def _layer_names(model: PreTrainedModel, beginning: str, count: int) -> list[str]:
    """Names of the `count` layers of the part that begins so."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and f"{name}.".startswith(beginning):
            return [f"{name}.{index}" for index in range(count)]
    raise ValueError(f"{type(model).__name__} has no list of {count} layers under {beginning!r}.")


@dataclass
class Report:
    """Everything the command says, sizes in bytes."""

    model: str
    model_class: str
    dtype: str
    parts: list[PartSize]
    attention: str
    batch: int
    images: int
    tiles: int
    length: int
    kv_cache: int
    tiles_at_once: int
    vision_activations: int
    device_map: str | None = None
    devices: list[DevicePlan] | None = None
    modules: dict[str, str] | None = None

    @property
    def fits(self) -> bool | None:
        """Whether every device holds its part and nothing is left for the disk; None where no device was named."""
        if self.devices is None:
            return None
        return all(plan.fits and not (plan.budget is None and plan.total) for plan in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        weights = {name: sum(getattr(part, name) for part in self.parts) for name in ("parameters", "bytes")}
        found = {**asdict(self), "weights": weights, "fits": self.fits}
        if self.devices is not None:
            found["devices"] = [{**asdict(plan), "total": plan.total, "fits": plan.fits} for plan in self.devices]
        return found


def _check_choices(**arguments: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in arguments.items():
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")


def _check_counts(**arguments: tuple[int | None, int]) -> None:
    for name, (value, least) in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _vision_work(model: PreTrainedModel, tiles: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many tiles the model encodes at a time, and the most memory the vision tower takes then."""
    vision = vision_config_of(model.config)
    if vision is None or not tiles:
        return tiles, 0
    side = getattr(model.config, "force_image_size", None) or vision.image_size
    at_once = min(tiles, model.vision_batch_size) if isinstance(model, InternVLChatBaseModel) else tiles
    return at_once, vision_activation_bytes(vision, tiles, side, dtype, at_once)


def inspect_model(
    model: str | Path,
    dtype: str = "bfloat16",
    tiles: int = 1,
    batch: int = 1,
    length: int | None = None,
    max_memory: dict[int | str, int] | None = None,
    device_map: str = "auto",
    images: int = 1,
    attention: str = ATTENTIONS[0],
) -> Report:
    """What a model needs, and where it would go.

    Args:
        model: As for `read_config`.
        dtype: One of `DTYPES`.
        tiles: Of each image.
        batch: Rows.
        length: Positions of a row in the key-value cache, images included; None takes those of the tiles and 512 of
            text.
        max_memory: Bytes per device, as accelerate takes them; None places nothing.
        device_map: One of `DEVICE_MAPS`.
        images: Of one row.
        attention: One of `ATTENTIONS`.

    Raises:
        ValueError: An argument out of range, or not a model of this package.
        OSError: No configuration there.
    """
    _check_choices(dtype=(dtype, DTYPES), device_map=(device_map, DEVICE_MAPS), attention=(attention, ATTENTIONS))
    _check_counts(images=(images, 0), tiles=(tiles, 0), batch=(batch, 1), length=(length, 0))
    config = read_config(model)
    meta_model = build_on_meta(config, COMPUTE_DTYPES[dtype], attention)
    config = meta_model.config
    sizes = WeightSizes(meta_model, dtype)
    length = image_positions(config, images * tiles) + TEXT_LENGTH if length is None else length
    text = cached_text_config(config)
    per_layer = 0 if text is None else cache_bytes_per_layer(text, batch, length, COMPUTE_DTYPES[dtype].itemsize)
    layers = 0 if text is None else text.num_hidden_layers
    at_once, activations = _vision_work(meta_model, batch * images * tiles, COMPUTE_DTYPES[dtype])
    report = Report(
        model=str(model),
        model_class=type(meta_model).__name__,
        dtype=dtype,
        parts=count_parts(meta_model, sizes),
        attention=attention,
        batch=batch,
        images=images,
        tiles=tiles,
        length=length,
        kv_cache=layers * per_layer,
        tiles_at_once=at_once,
        vision_activations=activations,
    )
    if max_memory is not None:
        placed = infer_placement(meta_model, sizes, device_map, max_memory)
        report.device_map = device_map
        report.modules = {name or type(meta_model).__name__: str(device) for name, device in placed.items()}
        report.devices = _fill_devices(meta_model, sizes, placed, max_memory, per_layer, activations)
    return report


def _fill_devices(
    model: PreTrainedModel,
    sizes: WeightSizes,
    placed: dict[str, Any],
    max_memory: dict[int | str, int],
    cache_per_layer: int,
    activations: int,
) -> list[DevicePlan]:
    """Sum what each device holds. What is offloaded runs on the first device, with its cache and activations."""
    order = get_max_memory(dict(max_memory))
    plans = {device: DevicePlan(str(device), None if device == "disk" else size) for device, size in order.items()}
    plans.setdefault("disk", DevicePlan("disk", None))
    cards = [device for device in order if isinstance(device, int) or device == "mps"]
    runs_on = cards[0] if cards else "cpu"

    def where_it_runs(name: str) -> DevicePlan:
        device = device_of(name, placed)
        return plans[runs_on if device in ("cpu", "disk") and runs_on in plans else device]

    for name, tensor in _own_tensors(model):
        # accelerate leaves buffers where they are used.
        plan = plans[device_of(name, placed)] if isinstance(tensor, nn.Parameter) else where_it_runs(name)
        plan.weights += sizes.stored_bytes(name, tensor)
    if cache_per_layer:
        layers = cached_text_config(model.config).num_hidden_layers
        beginning = {InternVLChatConfig.model_type: "language_model.", InternVLConfig.model_type: "qllama."}
        for name in _layer_names(model, beginning.get(model.config.model_type, ""), layers):
            where_it_runs(name).kv_cache += cache_per_layer
    if activations:
        vision_layers = vision_config_of(model.config).num_hidden_layers
        tower = "encoder." if hasattr(model, "encoder") else "vision_model."
        homes = {id(plan): plan for plan in map(where_it_runs, _layer_names(model, tower, vision_layers))}
        for plan in homes.values():
            plan.vision_activations = activations
    return list(plans.values())


def _amount(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / 1024**2:.2f} MiB"


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def report_lines(report: Report) -> list[str]:
    """The report for people, line by line."""
    found = report.as_dict()
    rows = [["part", "parameters", report.dtype]]
    rows += [[part.part, f"{part.parameters:,}", _amount(part.bytes)] for part in report.parts]
    rows += [["all weights", f"{found['weights']['parameters']:,}", _amount(found["weights"]["bytes"])]]
    lines = [f"{report.model} ({report.model_class})", "", *_table(rows), ""]
    if report.kv_cache:
        lines += [f"key-value cache, {report.batch} x {report.length} positions: {_amount(report.kv_cache)}"]
    if report.vision_activations:
        tiles = f"{report.batch * report.images * report.tiles} tile(s), {report.tiles_at_once} at once"
        lines += [f"vision tower at work on {tiles}: at most {_amount(report.vision_activations)}"]
    return lines + (_placement_lines(report) if report.devices is not None else [])


def _placement_lines(report: Report) -> list[str]:
    rows = [["device", "has", "weights", "cache", "vision", "all", "fits"]]
    for plan in report.devices or []:
        amounts = [plan.budget, plan.weights, plan.kv_cache, plan.vision_activations, plan.total]
        fits = "yes" if plan.fits else f"no, {_amount(plan.total - (plan.budget or 0))} short"
        rows.append([plan.device, *map(_amount, amounts), "-" if plan.budget is None else fits])
    lines = ["", f"device_map {report.device_map!r}", *_table(rows), ""]
    modules = list((report.modules or {}).items())
    start = 0
    for index, (_, device) in enumerate(modules):
        if index + 1 == len(modules) or modules[index + 1][1] != device:
            first, last = modules[start][0], modules[index][0]
            lines.append(
                f"{device}: {first}" if start == index else f"{device}: {first} ... {last} ({index - start + 1})"
            )
            start = index + 1
    return [*lines, "", _verdict(report)]


def _verdict(report: Report) -> str:
    plans = {plan.device: plan for plan in report.devices or []}
    if report.fits:
        offloaded = [plans["cpu"].weights] if "cpu" in plans and len(plans) > 2 and plans["cpu"].weights else []
        return f"It fits, with {_amount(offloaded[0])} offloaded to the CPU: slow." if offloaded else "It fits."
    if plans["disk"].weights:
        return f"It does not fit: {_amount(plans['disk'].weights)} of weights would be read from disk in every step."
    short = ", ".join(plan.device for plan in plans.values() if not plan.fits)
    return (
        f"The weights fit, but not with cache and activations, on device {short}: give it less in `max_memory`, take "
        "fewer tiles, rows or positions, or a smaller dtype."
    )


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Prints the report; returns exit code 1 where the model does not fit the devices."""
    transformers_logging.set_verbosity_error()
    # It would warn that the devices to plan for are not in this machine.
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    report = inspect_model(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        images=options.images,
        tiles=options.tiles,
        batch=options.batch,
        length=options.length,
        max_memory=None if options.max_memory is None else parse_max_memory(options.max_memory),
        device_map=options.device_map,
    )
    print_fn(json.dumps(report.as_dict(), indent=2) if options.json else "\n".join(report_lines(report)))
    return 1 if report.fits is False else 0
