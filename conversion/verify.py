"""Compares a written repository with its source: every tensor, and outputs that were recorded before."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..configuration_internvl import InternVLConfig
from .readers.tensors import TensorReader, Tensors
from .repository.result import stored_state


# Outputs may differ by rounding alone: a share of the largest recorded number, by type of the weights.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# What published code calls the same arguments.
PUBLISHED_ARGUMENTS = {"image": "pixel_values", "images": "pixel_values", "text": "input_ids"}
# Arguments that take the place of others; a record may hold both, for two calls, and the plain one is repeated.
REPLACEMENTS = {"pixel_embeds": "pixel_values", "inputs_embeds": "input_ids"}


@dataclass
class Verification:
    """What was compared.

    Args:
        num_tensors: Tensors that are equal to those of the source, bit by bit.
        differences: Name of an output to its largest difference.
        not_compared: Recorded names that could not be compared.
    """

    num_tensors: int
    differences: dict[str, float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Line by line."""
        lines = [f"Verified: {self.num_tensors} tensors of the reloaded model are those of the source, bit by bit."]
        if self.differences:
            name = max(self.differences, key=lambda key: self.differences[key])
            lines += [f"Output {key}: largest difference {value:.3g}." for key, value in self.differences.items()]
            lines.append(f"Largest difference of all: {self.differences[name]:.3g}, in {name}.")
        if self.not_compared:
            lines.append(f"Not compared, as `forward` takes and gives no such names: {', '.join(self.not_compared)}.")
        return lines


def compare_with_source(
    model: PreTrainedModel,
    tensors: Tensors,
    recorded: str | Path | None = None,
    spelling: Callable[[str], str] = str,
) -> Verification:
    """Compares a reloaded model with its source.

    Args:
        model: Loaded from the written folder in the type it was written in.
        tensors: What should be in it, read from the source once more.
        recorded: A safetensors file with `in.NAME`, arguments of `forward`, and `out.NAME`, what it returned
            (`out.logits`, `out.hidden_states.0`); of InternVL-C/G also `out.encode_text`, `out.c.encode_image`,
            `out.g.logits_per_image`...
        spelling: The name of a tensor in the written files, from the one under which transformers would store it.

    Raises:
        OSError: `recorded` cannot be read.
        ValueError: Something differs, or nothing of `recorded` could be compared.
    """
    _compare_tensors(model, tensors, spelling)
    done = Verification(len(tensors))
    if recorded is not None:
        _compare_outputs(model, Path(recorded), done)
    return done


def _compare_tensors(model: PreTrainedModel, tensors: Tensors, spelling: Callable[[str], str]) -> None:
    state = {spelling(name): tensor for name, tensor in stored_state(model).items()}
    missing = [name for name in tensors if name not in state]
    additional = [name for name in state if name not in tensors and name not in model.all_tied_weights_keys]
    reader = TensorReader()
    different = [
        name for name, tensor in tensors.items() if name in state and not torch.equal(state[name], tensor.load(reader))
    ]
    problems = {"not loaded": missing, "not of the source": additional, "different": different}
    found = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"The written model is not the source's. Tensors {'; '.join(found)}.")


def _compare_outputs(model: PreTrainedModel, path: Path, done: Verification) -> None:
    try:
        content = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"`{path}` cannot be read as recorded inputs and outputs (safetensors): {error}.") from error
    inputs, unknown = _inputs(model, content)
    observe = OBSERVERS.get(model.config.model_type, _observe_forward)
    try:
        with torch.no_grad():
            found = observe(model.eval(), inputs, any(name.startswith("out.hidden_states.") for name in content))
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The model cannot be run on the inputs in `{path}` ({', '.join(inputs) or 'none that it knows'}): "
            f"{error}. Record arguments of `{type(model).__name__}.forward` as `in.NAME`."
        ) from error
    far = []
    for name in (name for name in content if name.startswith("out.")):
        value, wanted = found.get(name.removeprefix("out.")), content[name].float()
        if value is None or value.shape != wanted.shape:
            unknown.append(name)
            continue
        difference = float((value.float() - wanted).abs().max())
        done.differences[name] = difference
        if not difference <= _tolerance(model.dtype, wanted):
            far.append(f"{name} by {difference:.3g}")
    done.not_compared = unknown
    if not done.differences:
        raise ValueError(
            f"Nothing in `{path}` could be compared: expected `in.NAME` (arguments of "
            f"`{type(model).__name__}.forward`) and `out.NAME` (one of {', '.join(found)}, in the recorded shape), "
            f"got {', '.join(content)}."
        )
    if far:
        raise ValueError(f"Outputs differ from `{path}`: {', '.join(far)}.")


def _tolerance(dtype: torch.dtype, wanted: torch.Tensor) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) * max(1.0, float(wanted.abs().max()))


def _inputs(model: PreTrainedModel, content: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Arguments of `forward`, floats in the model's type; names of others."""
    known = inspect.signature(type(model).forward).parameters
    inputs, unknown = {}, []
    for name in (name for name in content if name.startswith("in.")):
        argument = name.removeprefix("in.")
        plain = PUBLISHED_ARGUMENTS.get(argument, argument)
        if plain in known and f"in.{REPLACEMENTS.get(argument)}" not in content:
            value = content[name]
            inputs[plain] = value.to(model.dtype) if value.is_floating_point() else value
        else:
            unknown.append(name)
    return inputs, unknown


def _observe_forward(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], with_states: bool
) -> dict[str, torch.Tensor]:
    """All results of `forward`, items of tuples as `name.0`."""
    states = {"output_hidden_states": True} if with_states else {}
    found: dict[str, torch.Tensor] = {}
    for name, value in model(**inputs, **states, return_dict=True).items():
        items = (
            {f"{name}.{index}": item for index, item in enumerate(value)}
            if isinstance(value, tuple)
            else {name: value}
        )
        found |= {key: item for key, item in items.items() if isinstance(item, torch.Tensor)}
    return found


def _observe_contrastive(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], with_states: bool
) -> dict[str, torch.Tensor]:
    """Similarities and features of InternVL-C (`c.`, also without prefix) and InternVL-G (`g.`)."""
    modes = {"c.": "InternVL-C", "g.": "InternVL-G"} if model.config.num_query_token else {"c.": "InternVL-C"}
    found = {"encode_text": model.get_text_features(inputs["input_ids"], inputs.get("attention_mask"))}
    for prefix, mode in modes.items():
        outputs = model(**inputs, mode=mode, return_dict=True)
        found |= {prefix + name: value for name, value in outputs.items()}
        found[f"{prefix}encode_image"] = model.get_image_features(inputs["pixel_values"], mode=mode)
    return {**{name.removeprefix("c."): value for name, value in found.items()}, **found}


OBSERVERS = {InternVLConfig.model_type: _observe_contrastive}
