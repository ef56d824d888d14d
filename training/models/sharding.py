"""A model under FSDP2: when its weights are gathered, and how it is whole again.

accelerate shards a model once: it does not know the classes of one that is sharded already. torch has no way back, so
`unshard` undoes what `fully_shard` does to a module; `tests/test_engines.py` trains two phases.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def fsdp_units(model: nn.Module) -> list[Any]:
    """The modules whose weights FSDP2 gathers at a time; none of a model that it does not shard."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def keep_gathered(model: nn.Module) -> None:
    """Gather weights once: they stay from the first forward pass until `reshard`.

    Gradient caching runs every layer many times in a step. Without this each run gathers the weights again.
    """
    for unit in fsdp_units(model):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free gathered weights, which must be done before the optimizer or anything else changes the sharded ones."""
    for unit in fsdp_units(model):
        unit.reshard()


@torch.no_grad()
def unshard(model: nn.Module, is_keeper: bool = True) -> None:
    """Make a model whole again, in place; nothing happens to one that is not sharded.

    Args:
        model: The model, the same in all processes.
        is_keeper: Whether this process gets the weights, in the memory of the host; the others get memory that is
            never written to, which accelerate fills with what the first process has.
    """
    units = fsdp_units(model)
    reshard(model)
    whole: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and isinstance(parameter.data, DTensor):
                if parameter not in whole:
                    weights = parameter.data.full_tensor()
                    weights = weights.cpu() if is_keeper else torch.empty_like(weights, device="cpu")
                    whole[parameter] = nn.Parameter(weights, parameter.requires_grad)
                module._parameters[name] = whole[parameter]
    for unit in units:
        _forget(unit)
        unit.__dict__.pop("generate", None)  # `Trainer` has wrapped it


def _forget(module: Any) -> None:
    state = module._get_fsdp_state()
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter in torch 2.10
    for group in (group for group in groups if group is not None):
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    del module.__dict__[STATE_KEY], module.__dict__[REGISTRY_KEY]
    _module_state_mapping.pop(module, None)
    module.__class__ = type(module).__bases__[1]
