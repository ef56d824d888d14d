"""Writes ZeRO checkpoints as DeepSpeed lays them out, without DeepSpeed: slow and obvious."""

import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad


CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
Tensors = dict[str, torch.Tensor]


@contextmanager
def classes_of_deepspeed():
    """Classes under the names of DeepSpeed's, for as long as something is pickled."""
    paths = [path.split(".") for path in CLASSES]
    names = {".".join(parts[:count]) for parts in paths for count in range(1, len(parts) + 1)}
    modules = {name: types.ModuleType(name) for name in names}
    classes = {name: type(name, (), {"__module__": path}) for path, names in CLASSES.items() for name in names}
    for made in classes.values():
        setattr(modules[made.__module__], made.__name__, made)
    sys.modules.update(modules)
    try:
        yield classes
    finally:
        for name in modules:
            del sys.modules[name]


def filled(classes: dict[str, type], name: str, **state: Any) -> Any:
    made = classes[name]()
    made.__dict__.update(state)
    return made


def cut_by_stretch(groups: list[Tensors], processes: int, gap: int, strip: bool) -> list[list[torch.Tensor]]:
    """Stages 1 and 2: for each process, its stretch of every group."""
    result: list[list[torch.Tensor]] = [[] for _ in range(processes)]
    for group in groups:
        vector = torch.cat([pad(tensor.flatten(), (0, gap), value=7.0) for tensor in group.values()])
        length = -(-len(vector) // (2 * processes)) * 2
        for rank, stretch in enumerate(pad(vector, (0, length * processes - len(vector))).split(length)):
            # As it is saved: without the padding at the end.
            kept = stretch[: max(0, len(vector) - rank * length)] if strip else stretch
            result[rank].append(kept.clone())
    return result


def cut_by_part(tensor: torch.Tensor, processes: int) -> list[torch.Tensor]:
    """Stage 3: equal parts of one tensor, one for each process."""
    length = -(-tensor.numel() // processes)
    whole = pad(tensor.flatten(), (0, length * processes - tensor.numel()))
    return [part.clone() for part in whole.split(length)]


def write_zero(
    folder: Path,
    groups: list[Tensors],
    stage: int,
    processes: int,
    dtype: torch.dtype = torch.bfloat16,
    frozen: Tensors | None = None,
    buffers: Tensors | None = None,
    shared: dict[str, str] | None = None,
    tag: str = "global_step7",
    gap: int = 0,
    strip: bool = True,
    flat_groups: int = 1,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes `latest` and the files of a checkpoint that `processes` wrote; returns the folder with the files.

    `groups` are the float32 tensors of every optimizer group, `shared` second names of parameters, `gap` the padding
    after every parameter (stages 1 and 2), `extra` more entries of the optimizer's state. With `strip` the padding at
    the end is taken off, as most releases do; in stage 3 the parts of a process lie in `flat_groups` flat tensors.
    """
    place = folder / tag
    place.mkdir(parents=True)
    (folder / "latest").write_text(tag)
    frozen = {name: tensor.to(dtype) for name, tensor in (frozen or {}).items()}
    buffers = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in (buffers or {}).items()
    }
    prefix = "bf16_" if dtype == torch.bfloat16 else ""
    stretches = cut_by_stretch(groups, processes, gap, strip)
    with classes_of_deepspeed() as classes:
        for rank in range(processes):
            if stage == 3 or rank == 0:
                model = model_states(groups, frozen, buffers, shared or {}, stage, rank, processes, dtype)
                name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
                torch.save(model, place / f"{name}_model_states.pt")
            scaler = "LossScaler" if dtype == torch.bfloat16 else "DynamicLossScaler"
            optimizer = {
                "zero_stage": filled(classes, "ZeroStageEnum", value=stage),
                "loss_scaler": filled(classes, scaler, cur_scale=1.0),
                "base_optimizer_state": {"state": {0: {"exp_avg": torch.full((50,), 9.0)}}},
                **(extra or {}),
            }
            if stage == 3:
                flat = torch.cat(
                    [cut_by_part(tensor, processes)[rank] for group in groups for tensor in group.values()]
                )
                optimizer |= {"partition_count": processes, "fp32_flat_groups": list(flat.tensor_split(flat_groups))}
            else:
                slices = {name: filled(classes, "fragment_address", numel=3) for group in groups for name in group}
                optimizer |= stretches_of_a_process(groups, stretches[rank], processes, gap, slices)
            content = {"optimizer_state_dict": optimizer, "ds_version": "0.0"}
            torch.save(content, place / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return place


def model_states(
    groups: list[Tensors],
    frozen: Tensors,
    buffers: Tensors,
    shared: dict[str, str],
    stage: int,
    rank: int,
    processes: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Model states: the weights in the training's dtype, which in stage 3 lie in the optimizer's files."""
    everything = {name: tensor.to(dtype) for group in groups for name, tensor in group.items()} | frozen
    everything |= {name: everything[first] for name, first in shared.items()}
    fragments = frozen
    if stage == 3:
        everything = {name: torch.zeros(0, dtype=dtype) for name in everything}
        fragments = {name: cut_by_part(tensor, processes)[rank] for name, tensor in frozen.items()}
    return {
        "module": {**everything, **buffers},
        "buffer_names": list(buffers),
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
        # Stage 1 keeps no record of frozen parameters.
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()} if stage > 1 else None,
        "frozen_param_fragments": fragments if stage > 1 else None,
        "shared_params": shared,
        "lr_scheduler": {"last_epoch": 7},
        "dp_world_size": processes,
        "mp_world_size": 1,
    }


def stretches_of_a_process(
    groups: list[Tensors], stretches: list[torch.Tensor], processes: int, gap: int, slices: dict[str, Any]
) -> dict[str, Any]:
    """Stages 1 and 2: the master weights."""
    padding = {"param_alignment_paddings": [[gap] * len(group) for group in groups]} if gap else {}
    return {
        "partition_count": [processes] * len(groups),
        "single_partition_of_fp32_groups": stretches,
        "param_slice_mappings": [slices],
        **padding,
    }
