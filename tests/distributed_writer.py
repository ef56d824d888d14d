"""Run on its own: writes a checkpoint with torch.distributed.checkpoint in several processes on the CPU.

`python distributed_writer.py FOLDER`, with a model.safetensors in FOLDER. Writes `fsdp/checkpoint-7`, FSDP2 as
accelerate saves it, and `dimensions/checkpoint-7`, tensors that are cut along any dimension, unevenly.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


PROCESSES = 2


def as_module(tensors):
    """A module whose parameters have the names of a checkpoint, and which touches all of them."""
    root = Holder()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


class Holder(nn.Module):
    def forward(self):
        return sum(parameter.square().sum() for parameter in self.parameters())


def save_fsdp(tensors, out):
    model = fully_shard(as_module(tensors))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model().backward()
    optimizer.step()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=out / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=out / "optimizer_0")


def save_dimensions(tensors, out):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    placements = [
        Shard(index % max(tensor.ndim, 1)) if tensor.ndim else Replicate()
        for index, tensor in enumerate(tensors.values())
    ]
    cut = {
        name: distribute_tensor(tensor, mesh, [place])
        for (name, tensor), place in zip(tensors.items(), placements, strict=True)
    }
    dcp.save({"state_dict": cut, "optimizer": {"step": 3}}, checkpoint_id=out)


def run(rank, folder):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), PROCESSES), rank=rank, world_size=PROCESSES
    )
    tensors = load_file(folder / "model.safetensors")
    save_fsdp(tensors, folder / "fsdp" / "checkpoint-7")
    save_dimensions(tensors, folder / "dimensions" / "checkpoint-7")
    dist.barrier()
    os._exit(0)  # with two device meshes the threads of gloo now and then abort the process at its regular end


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A fork need not import torch again.
    multiprocessing.start_processes(run, (Path(sys.argv[1]),), nprocs=PROCESSES, start_method="fork")
