"""What a stage trains: the parts of a model by name, the groups an optimizer gets of them, and LoRA targets per part.

The names of the parameters say which part they belong to, the same in all model classes, before and after PEFT has put
adapters in. Whatever can scale or shift a layer as a whole does not decay: norms, biases, layer scales, the
temperature; nor do queries, positions and the class token, which are inputs and no weights. The published fine-tuning
code decays all of these that are no vectors, which is a switch here. Layers are counted as it counts them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...renaming_internvl import renamed_arguments
from .parts import PARTS, part_of, plain_name


LORA_PARTS = ("vision", "qllama", "language")
_INPUTS = ("query_tokens", "position_embedding", "class_embedding", "logit_scale")
_OUTPUT_LAYER = re.compile(r"(^|\.)(lm_head|itm_head|token_heads\.\w+)$")
_VISION_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
_QLLAMA_BLOCK = re.compile(r"qllama\.(?:model\.)?layers\.(\d+)\.")
_BELOW_QLLAMA = re.compile(r"query_tokens$|logit_(scale|bias)$|qllama\.(model\.)?embed_tokens\.")


def idle_modules(model: nn.Module) -> list[str]:
    """Names of the modules that no forward of the model runs: vision blocks above the layer that gives the features.

    Gradients never reach them, which DistributedDataParallel waits for, and adapters on them would learn nothing.
    """
    config: Any = model.config
    if getattr(config, "connector", None) == "patches":  # queries read the last block
        used = config.num_vision_layers
    elif hasattr(model, "decode_head"):
        used = max(config.out_indices_from_front)
    else:
        return []
    blocks = ((name, _VISION_BLOCK.fullmatch(f"{plain_name(name)}.")) for name, _ in model.named_modules())
    return [name for name, block in blocks if block and int(block[1]) >= used]


def freeze_idle(model: nn.Module) -> list[str]:
    """Freezes what `idle_modules` names, whatever wraps the model or sits on it; for trainers of one's own, after
    PEFT.

    Returns:
        The names of the modules in which something was to be trained.
    """
    frozen = []
    for name in idle_modules(model):
        module = model.get_submodule(name)
        if any(parameter.requires_grad for parameter in module.parameters()):
            module.requires_grad_(False)
            frozen.append(name)
    return frozen


def train_parts(model: nn.Module, parts: Collection[str], adapted: Collection[str] = ()) -> list[str]:
    """Trains these parts of a model and freezes all others, and what no forward uses.

    Args:
        model: Any model of the package.
        parts: Names in `PARTS`.
        adapted: Parts that were given LoRA adapters: of these only the adapters are trained.

    Returns:
        Names of the modules in these parts that no forward uses.

    Raises:
        ValueError: If the model has no such part.
    """
    present = {part_of(name) for name, _ in model.named_parameters()}
    if missing := sorted({*parts, *adapted} - present):
        raise ValueError(f"There is no part {', '.join(missing)} to train in this model, it has {', '.join(present)}.")
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts and (part not in adapted or "lora_" in name))
    return freeze_idle(model)


def decays(name: str, parameter: nn.Parameter, with_inputs: bool = False) -> bool:
    """Whether weight decay is for this parameter: matrices and kernels, word embeddings too.

    Args:
        name: Of the parameter.
        parameter: The parameter.
        with_inputs: Also for queries, positions, the class token and the temperature, as in the published fine-tuning
            code.
    """
    if name.endswith(_INPUTS):
        return with_inputs
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps flat pieces
    return len(shape) > 1


def layers_above(name: str, depths: Mapping[str, int]) -> tuple[str, int]:
    """The tower that a parameter is in, and how many layers of it stand above (`internvl_g`, trainer_monkey_patch.py).

    A tower's heads are its uppermost layer. So there is 1 above its last block, and one more than it has blocks above
    its embeddings; the queries and the temperature count as embeddings of QLLaMA.

    Args:
        name: Of the parameter.
        depths: Blocks of the towers "vision" and "qllama".

    Returns:
        The tower, which is "" where there is nothing above; and the number.
    """
    name = plain_name(name)
    for tower, pattern in (("vision", _VISION_BLOCK), ("qllama", _QLLAMA_BLOCK)):
        if block := pattern.match(name):
            return tower, depths[tower] - int(block[1])
    if part_of(name) == "vision":
        return "vision", depths["vision"] + 1
    if _BELOW_QLLAMA.match(name):
        return "qllama", depths.get("qllama", -1) + 1
    return "", 0


@renamed_arguments(rates="learning_rates")
def parameter_groups(
    model: nn.Module,
    learning_rates: Mapping[str, float],
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    muon_learning_rate: float | None = None,
    qllama_layer_decay: float = 1.0,
    decay_inputs: bool = False,
) -> list[dict[str, Any]]:
    """Build parameter groups for an optimizer: one per part, learning rate, and decay or none.

    Args:
        model: The model with frozen parameters marked, see `train_parts`.
        learning_rates: Learning rate of each trained part.
        weight_decay: Weight decay of what decays, see `decays`.
        layer_decay: Factor by which each layer of the vision tower learns slower than the one above it, see
            `layers_above`.
        muon_learning_rate: Learning rate of hidden weight matrices, for `MuonWithAdamW`; only these then decay.
        qllama_layer_decay: The same factor for QLLaMA.
        decay_inputs: As `with_inputs` of `decays`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `part`, in the order of the model; for Muon with `use_muon` too.

    Raises:
        ValueError: If a trained parameter has no learning rate.
    """
    config: Any = model.config
    towers = {"vision": config.vision_config, "qllama": getattr(config, "qllama_config", None)}
    depths = {tower: part.num_hidden_layers for tower, part in towers.items() if part is not None}
    layer_decays = {"vision": layer_decay, "qllama": qllama_layer_decay, "": 1.0}
    with_muon = muon_learning_rate is not None
    hidden = hidden_matrices(model) if with_muon else set()
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, use_muon = part_of(name), parameter in hidden
        if part not in learning_rates:
            raise ValueError(
                f"`{name}` is to be trained, but `learning_rates` has none for `{part}`: {dict(learning_rates)}."
            )
        rate = muon_learning_rate if use_muon and muon_learning_rate is not None else learning_rates[part]
        tower, num_above = layers_above(name, depths)
        rate *= layer_decays[tower] ** num_above
        decay = weight_decay if (use_muon if with_muon else decays(name, parameter, decay_inputs)) else 0.0
        group = {"params": [], "lr": rate, "weight_decay": decay, "part": part}
        group |= {"use_muon": use_muon} if with_muon else {}
        groups.setdefault((part, rate, decay, use_muon), group)["params"].append(parameter)
    return list(groups.values())


def hidden_matrices(model: nn.Module) -> set[torch.Tensor]:
    """Return the weights of linear layers and convolutions, without layers whose outputs are logits."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    logits = {layer.weight for name, layer in layers.items() if layer is head or _OUTPUT_LAYER.search(name)}
    return {layer.weight for layer in layers.values()} - logits


def lora_targets(model: PreTrainedModel, parts: Collection[str] = LORA_PARTS) -> list[str]:
    """Names for `LoraConfig(target_modules=...)`: the linear layers of some parts, without output layers and those
    that no forward runs.

    Args:
        model: Any model of the package.
        parts: Names in `PARTS`; those that the model lacks are passed over.

    Returns:
        Full names, which no other layer ends in.

    Raises:
        ValueError: If a part is unknown, or nothing is found.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"`parts` must be among {', '.join(PARTS)}, got {', '.join(unknown)}.")
    head = model.get_output_embeddings()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    idle = tuple(f"{name}." for name in idle_modules(model))
    names = [
        name
        for name, layer in layers
        if layer is not head and part_of(f"{name}.weight") in parts and not name.startswith(idle)
    ]
    if not names:
        raise ValueError(f"This model has no linear layer in {', '.join(parts) or 'no part'}.")
    return names
