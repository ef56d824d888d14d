"""Runs a job on two gloo processes: `python -m tests.two_processes JOB FOLDER` writes what each rank found to
FOLDER/rank0.pt and rank1.pt.

Run as a module of its own, so that the processes it spawns can import it under the same name.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode


ROOT = Path(__file__).parents[1]


def run(job: str, folder: Path) -> list[dict]:
    """The results of both ranks."""
    command = [sys.executable, "-m", "tests.two_processes", job, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return results(folder)


def results(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def sharded_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2 by the blocks that the model names, in place."""
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def goldens(rank: int, folder: Path, wrap: Callable = lambda model: model) -> dict:
    """Losses and gradients of the recorded batches, with and without gradient caching."""
    from .training_models import golden_inputs, golden_model

    found = {}
    for tag in ("stage2", "retrieval"):
        for grad_cache_chunk_size in (None, 2):
            model = golden_model(tag, grad_cache_chunk_size=grad_cache_chunk_size)
            wrapped = wrap(model)
            outputs = wrapped(**golden_inputs("internvl_14b_training_ws2", f"{tag}.rank{rank}"))
            outputs.loss.backward()
            losses = {name: value.detach() for name, value in outputs.items()}
            found[tag, grad_cache_chunk_size] = losses | gradients(model)
    return found


def replicated(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def contrastive(rank: int, folder: Path, wrap: Callable = replicated) -> dict:
    """Stage 1 under DDP, chunk by chunk, each rank with its half of the batch."""
    from internvl.training.models.pretraining import InternVLForContrastiveTraining

    from . import tiny
    from .training_models import tiny_model

    found = {}
    for objective in ("softmax", "sigmoid"):
        model = tiny_model(InternVLForContrastiveTraining, objective=objective, grad_cache_chunk_size=2)
        half = slice(rank * 3, rank * 3 + 3)
        wrapped = wrap(model)  # DDP must outlive the backward pass
        outputs = wrapped(pixel_values=tiny.pixels(6)[half], input_ids=tiny.text_ids(6)[half])
        outputs.loss.backward()
        found[objective] = {"loss": outputs.loss.detach()} | gradients(model)
    return found


def sharded(rank: int, folder: Path) -> dict:
    """Both of them under FSDP2, which has averaged the gradients."""
    return {"goldens": goldens(rank, folder, sharded_blocks), "contrastive": contrastive(rank, folder, sharded_blocks)}


def gathered(rank: int, folder: Path) -> dict:
    """Stage 1 in three chunks under FSDP2, as it is and with weights gathered once: gathers, and the gradients."""
    from internvl.training.models.pretraining import InternVLForContrastiveTraining
    from internvl.training.models.sharding import fsdp_units, keep_gathered, reshard

    from . import tiny
    from .training_models import tiny_model

    class Gathers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "all_gather_copy_in" in str(function)
            return function(*args, **(kwargs or {}))

    found = {}
    for once in (False, True):
        model = sharded_blocks(tiny_model(InternVLForContrastiveTraining, grad_cache_chunk_size=1))
        half = slice(rank * 3, rank * 3 + 3)
        for _ in range(2):  # the second step with the weights that the first has changed
            if once:
                keep_gathered(model)
            with Gathers() as gathers:
                loss = model(pixel_values=tiny.pixels(6)[half], input_ids=tiny.text_ids(6)[half]).loss
                loss.backward()
            if once:
                reshard(model)
            found[once] = {"loss": loss.detach(), "gathers": gathers.count, "units": len(fsdp_units(model))}
            found[once] |= gradients(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad if parameter.grad is not None else 0)
                    parameter.grad = None
    return found


def text_only_rank(rank: int, folder: Path) -> dict:
    """A training step of both chat models, sharded and not, while the second rank's batch holds no image."""
    from . import tiny

    found = {}
    for connector in ("patches", "queries_and_patches"):
        for engine in ("ddp", "fsdp"):
            model = tiny.chat_model(connector=connector).train()
            inputs = tiny.chat_inputs(model, tiles=[[1], [2]] if rank == 0 else [[], []])
            if engine == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                for layer in [*model.vision_model.encoder.layers, *model.language_model.model.layers]:
                    fully_shard(layer)
                wrapped = fully_shard(model)
            loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            found[connector, engine] = loss.detach()
    return found


JOBS = (goldens, contrastive, sharded, text_only_rank)


def every_job(rank: int, folder: Path) -> dict:
    """All that needs nothing from the tests, in one pair of processes: starting them takes longer than the jobs."""
    return {job.__name__: job(rank, folder) for job in JOBS}


def tensor_parallel(rank: int, folder: Path) -> dict:
    """Every FOLDER/NAME/model with `tp_plan="auto"` on FOLDER/NAME/inputs.pt: its output, its tokens where it was
    asked to generate, and local elements per tensor.
    """
    return {path.name: load_in_tensor_parallel(path) for path in sorted(folder.iterdir()) if path.is_dir()}


@torch.no_grad()
def load_in_tensor_parallel(folder: Path) -> dict:
    import internvl

    from . import tiny

    job = torch.load(folder / "inputs.pt")
    model = getattr(internvl, job["class"]).from_pretrained(folder / "model", tp_plan="auto").eval()
    found = {"output": tiny.main_output(model(**job["inputs"]))}
    if job["generate"] is not None:
        found["tokens"] = model.generate(**job["generate"], do_sample=False, max_new_tokens=4, min_new_tokens=4)
    found["sizes"] = {name: local(parameter).numel() for name, parameter in model.named_parameters()}
    return found


def stage_of_two(rank: int, folder: Path) -> dict:
    """Stage 1 on FOLDER/bad/*.tar, which is refused, and on FOLDER/good/*.tar: the errors, and what was drawn in each
    step.
    """
    from .test_stage_faults import numbers_drawn

    # As launchers do; the group is there already.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    found = {}
    try:
        numbers_drawn(folder / "bad")
    except ValueError as error:
        found = {"error": str(error), "is_there": (folder / "bad" / "out").exists()}
    return {**found, "drawn": numbers_drawn(folder / "good")}


def stopped_stage(rank: int, folder: Path) -> dict:
    """Stage 1 with nothing random on FOLDER/*.tar: to FOLDER/whole, and to FOLDER/part until it is stopped."""
    from .test_restarts import calm_stage, stopped_after_3

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    calm_stage(folder, "whole")
    with stopped_after_3():
        calm_stage(folder, "part")
    return {}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """What FSDP2 has spread over the ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A rank's own share, whether or not the release of transformers wraps it in a `DTensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """In the shapes of files."""
    from internvl.training.models.saving import SCALARS

    found = {f"grad.{name}": whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.reshape([]) if name.endswith(SCALARS) else grad for name, grad in found.items()}


def _process(rank: int, job: str, folder: str) -> None:
    # What transformers' tensor parallelism reads.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(globals()[job](rank, Path(folder)), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(_process, args=tuple(sys.argv[1:]), nprocs=2)
