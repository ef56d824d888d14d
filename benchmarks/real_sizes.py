"""Models of the published sizes on a small machine: written, loaded, run, measured and deleted, one after the other.

    python -m internvl.benchmarks.real_sizes [SIZE ...] [--folder DIR] [--anew]

Does: writes a checkpoint with random bf16 weights, loads it by `from_pretrained` in a process of its own, shows it one
image of 224 px, and compares the peak of its memory with what `python -m internvl.planning memory` says before.
InternViT-6B is loaded in bf16; InternVL-14B (features of InternVL-C and -G, a caption) and InternVL-Chat 13 B (two
tokens) in nf4, and in bf16 with all but 12 GiB read from disk. Each size is deleted before the next is written, so
that 60 GB of disk and 24 GB of memory do. What was measured is written after each row, and passed over by the next
run. Does not: say how well a model answers, or compare speeds.

Memory is what the process has for itself at its most beyond what it had before, and the weights that stay mapped from
the files of the checkpoint; pages of files that loading merely reads through are the system's to take back.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from internvl import InternVLImageProcessor, register
from internvl.configuration_internvl import InternVLChatConfig, InternVLConfig
from internvl.console import exit_status
from internvl.planning.memory import (
    COMPUTE_DTYPES,
    MODEL_CLASSES,
    Report,
    build_on_meta,
    image_positions,
    inspect_model,
    parse_max_memory,
    read_config,
)
from internvl.synthetic.textures import texture
from internvl.writing import write_whole

from .__main__ import RESULTS, format_table
from .checkpoints import write_random_weights
from .harness import Row, versions


FILE = "real_sizes.json"  # in the folder of results
OWN = "random_weights"  # an empty file in folders that may be deleted
IMAGE_SIZE = 224
TEXT_TOKENS = 16
NEW_TOKENS = 2
IMAGE_TOKEN_ID = 3
ON_CPU = "12GiB"  # of a model that is read from disk
TARGET = 1.1
SAMPLING_SECONDS = 0.01
NF4 = "nf4"


@dataclass(frozen=True)
class Loading:
    """A way to load a model.

    Args:
        name: In the table.
        dtype: Of `planning memory`.
        cpu_memory: Of the weights; the rest is read from disk. None keeps all in memory.
    """

    name: str
    dtype: str
    cpu_memory: str | None = None


BF16 = Loading("bf16", "bfloat16")
SMALL = (Loading("nf4", NF4), Loading(f"bf16, all but {ON_CPU} on disk", "bfloat16", ON_CPU))
# Sizes of `planning memory`, or configurations, and how each is loaded.
CASES: dict[str, tuple[Loading, ...]] = {
    "internvit-6b": (BF16,),
    "internvl-14b": SMALL,
    "internvl-chat-13b": SMALL,
}


# --------------------------------------------------------------------------------------------------------- checkpoints
def write_model(folder: Path, config: PretrainedConfig) -> None:
    """Writes a model with random weights in bf16 shards of 2 GB."""
    model = build_on_meta(config, torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    folder.mkdir()
    (folder / OWN).touch()
    config.save_pretrained(folder)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    write_random_weights(folder, shapes, "2GB")


def config_of_size(size: str) -> PretrainedConfig:
    """The configuration of a size, with what generating needs."""
    config = read_config(size)
    if isinstance(config, InternVLChatConfig):
        config.image_token_id = IMAGE_TOKEN_ID
    return config


def delete_model(folder: Path) -> None:
    """Deletes a checkpoint that was written here, if there is one.

    Raises:
        ValueError: If the folder holds anything else.
    """
    if folder.exists() and not (folder / OWN).is_file():
        raise ValueError(f"{folder} is not of this benchmark, which would delete it: move it, or name another folder.")
    shutil.rmtree(folder, ignore_errors=True)


def check_disk(folder: Path, size: str, needed: int) -> None:
    """Raises an OSError where the weights of a size would not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"`{size}` needs {needed / 1e9:.1f} GB of disk, and {folder} has {free / 1e9:.1f} GB left. Free some, or "
            "name another folder by `--folder`."
        )


# -------------------------------------------------------------------------------------------------------------- memory
def own_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


@contextmanager
def sampled_peak(found: list[int]) -> Iterator[None]:
    """Appends the most that `own_bytes` was meanwhile."""
    done = threading.Event()
    peaks = [own_bytes()]

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peaks[0] = max(peaks[0], own_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(max(peaks[0], own_bytes()))


def mapped_bytes(model: PreTrainedModel, folder: Path) -> int:
    """Bytes of the weights that are mapped from the files of a folder."""
    ranges = []
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        place, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(str(folder.resolve())):
            start, _, end = place.partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in model.parameters() if not tensor.is_meta)
    }
    return sum(size for place, size in storages.items() if any(start <= place < end for start, end in ranges))


# --------------------------------------------------------------------------------------------------------------- tasks
def image_and_text(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values of one image, and ids of a text (1, `TEXT_TOKENS`)."""
    vision = getattr(model.config, "vision_config", model.config)
    processor = InternVLImageProcessor(size={"height": vision.image_size, "width": vision.image_size}, max_num=1)
    image = texture(0).resize((IMAGE_SIZE, IMAGE_SIZE))
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"].to(torch.bfloat16)
    return pixels, torch.arange(IMAGE_TOKEN_ID + 1, IMAGE_TOKEN_ID + 1 + TEXT_TOKENS)[None]


def run_tower(model: Any) -> dict[str, torch.Tensor]:
    """The features of an image."""
    pixels, _ = image_and_text(model)
    return {"features": model(pixels).pooler_output}


def run_internvl(model: Any) -> dict[str, torch.Tensor]:
    """Features of InternVL-C and -G, and the first tokens of a caption."""
    pixels, ids = image_and_text(model)
    features = {mode: model.get_image_features(pixels, mode=mode) for mode in ("InternVL-C", "InternVL-G")}
    caption = model.generate(pixels, ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {**features, "caption": caption}


def run_chat(model: Any) -> dict[str, torch.Tensor]:
    """The first tokens of an answer."""
    pixels, ids = image_and_text(model)
    ids = torch.cat([torch.full((1, model.num_image_token), IMAGE_TOKEN_ID), ids], dim=1)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return {"answer": model.generate(pixel_values=pixels, input_ids=ids, **length)[:, ids.shape[1] :]}


def task_of(config: PretrainedConfig) -> Callable[[Any], dict[str, torch.Tensor]]:
    """What a model is asked to do."""
    tasks = {InternVLConfig: run_internvl, InternVLChatConfig: run_chat}
    return tasks.get(type(config), run_tower)


def measure_loading(folder: Path, loading: Loading) -> dict[str, Any]:
    """Loads and runs a model; seconds, peak of memory, and what came out. For a process that did nothing else."""
    register()
    logging.set_verbosity_error()
    config = read_config(folder)
    settings: dict[str, Any] = {"dtype": COMPUTE_DTYPES[loading.dtype]}
    if loading.dtype == NF4:
        settings |= {"load_in_4bit": True, "device_map": {"": "cpu"}}
    if loading.cpu_memory is not None:
        memory = parse_max_memory(f"cpu={loading.cpu_memory}")
        settings |= {"device_map": "auto", "max_memory": memory, "offload_folder": folder / "offload"}
    before = own_bytes()
    peak: list[int] = []
    with sampled_peak(peak), torch.inference_mode():
        start = time.perf_counter()
        model = MODEL_CLASSES[config.model_type][0].from_pretrained(folder, **settings).eval()
        loaded = time.perf_counter()
        found = task_of(config)(model)
        ran = time.perf_counter()
    for name, tensor in found.items():
        if tensor.is_floating_point() and not (tensor.isfinite().all() and tensor.any()):
            raise SystemExit(f"`{name}` is not finite, or zero: nothing to measure.")
        if not tensor.is_floating_point() and tensor.shape[-1] != NEW_TOKENS:
            raise SystemExit(f"`{name}` has {tensor.shape[-1]} tokens in place of {NEW_TOKENS}.")
    return {
        "load_seconds": round(loaded - start, 1),
        "run_seconds": round(ran - loaded, 1),
        "bytes": peak[0] - before + mapped_bytes(model, folder),
        "outputs": {name: list(tensor.shape) for name, tensor in found.items()},
        "on_disk": sum(tensor.is_meta for tensor in model.parameters()),
    }


def said_bytes(size: str, loading: Loading) -> int:
    """What `planning memory` says of a size in memory."""
    positions = image_positions(read_config(size), 1) + TEXT_TOKENS + NEW_TOKENS
    memory = None if loading.cpu_memory is None else parse_max_memory(f"cpu={loading.cpu_memory}")
    report: Report = inspect_model(size, loading.dtype, length=positions, max_memory=memory)
    if report.devices is not None:
        return next(plan.total for plan in report.devices if plan.device == "cpu")
    return sum(part.bytes for part in report.parts) + report.kv_cache + report.vision_activations


# --------------------------------------------------------------------------------------------------------- the command
def rows(sizes: Iterable[str], folder: Path, results: Path, is_anew: bool = False) -> Iterator[Row]:
    """A row for each size and way to load it; what `results` holds is passed over unless it is made anew."""
    kept = json.loads(results.read_text("utf-8"))["rows"] if results.exists() else {}
    for size in sizes:
        left = [loading for loading in CASES[size] if is_anew or f"{size}, {loading.name}" not in kept]
        checkpoint = folder / f"internvl-real-size-{Path(size).stem}"
        delete_model(checkpoint)  # of a run that was stopped
        try:
            if left:
                config = config_of_size(size)
                weights = sum(part.bytes for part in inspect_model(size, "bfloat16").parts)
                check_disk(folder, size, int(weights * 1.02))
                write_model(checkpoint, config)
            for loading in left:
                said = said_bytes(size, loading)
                found = in_one_process(measure_loading, checkpoint, loading)
                row = Row(
                    f"{size}, {loading.name}: peak memory and what `planning memory` says, larger over smaller",
                    ratio=max(found["bytes"] / said, said / found["bytes"]),
                    target=TARGET,
                    is_lower_better=True,
                    details={**found, "said": said},
                )
                kept[f"{size}, {loading.name}"] = asdict(row)
                write_whole(results, json.dumps({**versions(), "rows": kept}, indent=1) + "\n")
        finally:
            delete_model(checkpoint)
        for loading in CASES[size]:
            yield Row(**kept[f"{size}, {loading.name}"])


def in_one_process(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a process that did nothing else; see `in_fresh_process` of the harness."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints one table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.real_sizes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(CASES)}; all of these unless named")
    parser.add_argument("--folder", type=Path, default=Path(), help="where checkpoints are written (default: here)")
    parser.add_argument("--anew", action="store_true", help="measure again what the folder of results holds")
    options = parser.parse_args(arguments)
    if unknown := [size for size in options.sizes if size not in CASES]:
        parser.error(f"no such size: {', '.join(unknown)}; there are {', '.join(CASES)}")
    register()
    logging.set_verbosity_error()

    def measured() -> int:
        if not options.folder.is_dir():
            raise ValueError(f"`--folder` {options.folder} is no folder: make it first, or name another.")
        found = list(rows(options.sizes or CASES, options.folder, RESULTS / FILE, options.anew))
        print(format_table(found))
        for row in found:
            seconds = {name: row.details[name] for name in ("load_seconds", "run_seconds")}
            print(f"{row.name.partition(':')[0]}: {row.details['bytes'] / 2**30:.2f} GiB, {seconds}")
        return 0

    return exit_status(measured)


if __name__ == "__main__":
    sys.exit(main())
