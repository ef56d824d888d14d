"""Conversion of an InternViT-6B shaped checkpoint: memory against its largest shard, speed against copying the same
files.

    python -m internvl.benchmarks.conversion [--layers 48] [--rounds 3] [--folder DIR] [--max-shard-size 5GB]

Does: makes a bf16 checkpoint in the published layout (48 blocks: 12 GB, random numbers), then converts and copies
it, interleaved, so that a change in the speed of the disk meets both; the files of a round are removed before the
next. Needs three times the checkpoint on disk. Both end with their data on the disk (fsync). Does not: other
layouts, downloads.

Memory is the growth of the process's peak (Linux, `VmHWM`) over what it held before; pages of memory-mapped input
count, though the system could take them back at any time. Speed is the time of a copy over that of a conversion: 1
means as fast.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl import InternVisionModel, InternViTConfig
from internvl.conversion import convert

from .checkpoints import write_random_weights
from .harness import memory_growth


RESULTS = Path("benchmarks", "results")  # of the current folder
TARGETS = {"conversion, peak memory over the largest shard": 1.5, "conversion, speed over copying": 0.7}


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """A published InternViT-6B with random weights, in bf16 shards of 5 GB."""
    config = InternViTConfig(num_hidden_layers=num_layers)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InternVisionModel(config).state_dict().items()}
    folder.mkdir(parents=True)
    settings = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(settings))
    write_random_weights(folder, shapes, "5GB")


def flush(folder: Path) -> None:
    """Waits until all files of a folder are on the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def time_and_memory(call: Callable[[], Any], target: Path) -> tuple[float, int]:
    """Seconds of a call that writes a folder, data on the disk, and bytes by which the peak of resident memory grew
    over what was resident before.
    """

    def write() -> None:
        call()
        flush(target)

    start = time.perf_counter()
    growth = memory_growth(write)
    return time.perf_counter() - start, growth


def measure_conversion(folder: Path, num_layers: int, rounds: int, max_shard_size: str) -> dict[str, Any]:
    """Both interleaved, the one that goes first changing every round; a first round, while memory still fills, is not
    counted.
    """
    source, copied, converted = folder / "source", folder / "copied", folder / "converted"
    write_checkpoint(source, num_layers)
    flush(source)
    calls = {
        "copy": (lambda: shutil.copytree(source, copied), copied),
        "conversion": (
            lambda: convert(source, converted, max_shard_size=max_shard_size, show_progress=False),
            converted,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks, largest = [], 0
    for index in range(rounds + 1):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            call, target = calls[name]
            elapsed, peak = time_and_memory(call, target)
            if index:
                seconds[name].append(elapsed)
            if name == "conversion":
                peaks.append(peak)
                largest = max(file.stat().st_size for file in target.glob("*.safetensors"))
            shutil.rmtree(target)
    speeds = [copy / conversion for copy, conversion in zip(seconds["copy"], seconds["conversion"], strict=True)]
    ratios = dict(zip(TARGETS, ([peak / largest for peak in peaks], speeds), strict=True))
    return {
        "rows": [
            {
                "name": name,
                "ratio": round(statistics.median(values), 3),
                "spread": [round(min(values), 3), round(max(values), 3)],
                "target": TARGETS[name],
            }
            for name, values in ratios.items()
        ],
        "gigabytes": round(sum(file.stat().st_size for file in source.iterdir()) / 1e9, 2),
        "largest_shard_gigabytes": round(largest / 1e9, 2),
        "seconds": {name: [round(value, 1) for value in values] for name, values in seconds.items()},
        "rounds": rounds,
        "torch": torch.__version__,
    }


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.conversion", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--folder", help="where to work; a folder in it is made and removed (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure_conversion(Path(folder), arguments.layers, arguments.rounds, arguments.max_shard_size)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "conversion.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(f"{row['name']}: {row['ratio']} (from {row['spread'][0]} to {row['spread'][1]}; target {row['target']})")
    print(f"{result['gigabytes']} GB; seconds {result['seconds']}; written to {path}")


if __name__ == "__main__":
    main()
