"""`python -m internvl.benchmarks gpu [--minutes 10] [--only PART...] [--stand-in]`."""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..harness import Options, Row, format_row, matrix_rate, seconds_of, versions
from .correctness import chat_jobs, golden_jobs, qllama_jobs, tower_jobs
from .jobs import Part, Setting, rows_of_part
from .language import caption_jobs, decoder_jobs, quantised_jobs
from .models import copy_of
from .sizes import STAND_IN, ModelSizes
from .training import stage1_jobs, stage3_jobs
from .vision import vision_jobs


# In this order: what is wrong is known before anything is timed, and the dearest comes last.
PARTS: dict[str, Part] = {
    "tower": tower_jobs,
    "qllama": qllama_jobs,
    "chat": chat_jobs,
    "vision": vision_jobs,
    "decoder": decoder_jobs,
    "captions": caption_jobs,
    "stage1": stage1_jobs,
    "stage3": stage3_jobs,
    "quantised": quantised_jobs,
    "goldens": golden_jobs,
}
LIBRARIES = ("torchao", "bitsandbytes", "accelerate", "triton", "flash_attn")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks gpu", description="Correctness, then speed and memory of a GPU."
    )
    found.add_argument("--minutes", type=float, default=10.0, help="of all rows together (default: %(default)g)")
    found.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    found.add_argument("--rounds", type=int, default=7, help="of each row, at most (default: %(default)s)")
    found.add_argument("--stand-in", action="store_true", help="the same rows with tiny models, on a CPU too")
    found.add_argument("--output", type=Path, default=Path("benchmarks", "results", "gpu.json"))
    return found


def environment(options: Options) -> dict[str, Any]:
    """The device, what is installed, and the rates that rows are shares of."""
    found: dict[str, Any] = {**versions(), "python": platform.python_version(), "libraries": {}}
    for name in LIBRARIES:
        try:
            found["libraries"][name] = version(name)
        except PackageNotFoundError:
            found["libraries"][name] = None
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["memory_bytes"] = properties.total_memory
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    num_bytes = 2**30 if options.device == "cuda" else 2**24
    copy = copy_of(num_bytes, options)
    copy()
    found["bytes_per_second"] = 2 * num_bytes / min(seconds_of(copy, options.device) for _ in range(5))
    found["calibration"] = matrix_rate(options)
    return found


def rows_of_parts(names: Sequence[str], setting: Setting, seconds: float) -> Iterator[Row]:
    """The rows of the parts, one after the other."""
    deadline = time.monotonic() + seconds
    for name in names:
        yield from rows_of_part(name, PARTS[name], setting, deadline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a line and rewrites the results after every row.

    Args:
        arguments: Of the command line, without `gpu`.

    Returns:
        Exit code 0, or 1 where a row failed or is wrong.
    """
    given = parser().parse_args(arguments)
    start = time.monotonic()
    if not torch.cuda.is_available() and not given.stand_in:
        parser().error("no CUDA device is here; `--stand-in` runs the same rows with tiny models on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(device, given.rounds)
    setting = Setting(options, STAND_IN if given.stand_in else ModelSizes())
    content: dict[str, Any] = {"stand_in": given.stand_in, **environment(options), "rows": []}
    rate, copied = content["calibration"]["flops_per_second"], content["bytes_per_second"]
    print(f"{content['gpu'] or 'CPU'}: {rate / 1e12:.3g} TFLOP/s in {options.dtype}, {copied / 1e9:.4g} GB/s copied")
    print("| row | ratio | interquartile range | target | reached |\n|---|---|---|---|---|")
    failed = False
    for row in rows_of_parts(given.only or list(PARTS), setting, 60 * given.minutes - (time.monotonic() - start)):
        print(format_row(row), flush=True)
        failed |= (row.skipped or "").startswith("failed")
        content["rows"].append({**asdict(row), "met": row.is_met})
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s; results in {given.output}")
    return int(failed)
