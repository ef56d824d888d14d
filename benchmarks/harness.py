"""What every benchmark shares: two interleaved calls, peak memory, and rows with a target.

The machine may be noisy, so seconds mean little alone: two calls are interleaved in one process, the one that goes
first changing every round, and a row holds the median and the interquartile range of the ratios of the single rounds.
"""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode


PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}
Calls: TypeAlias = Mapping[str, Callable[[], Any]]


def sizes_of(width: int, mlp_width: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    """The settings that a tower or decoder of these sizes has in its configuration."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (width, mlp_width, depth, heads), strict=True)), **others}


@dataclass(frozen=True)
class Options:
    """How the rows are measured.

    Args:
        device: "cpu" or "cuda".
        rounds: Counted rounds of each row; rows of long calls may take fewer.
    """

    device: str = "cpu"
    rounds: int = 15

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in on the device."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def on(self, device: str) -> "Options":
        """The same on another device."""
        return replace(self, device=device)

    def at_most(self, rounds: int) -> "Options":
        """The same with fewer rounds, for calls that take long."""
        return replace(self, rounds=min(rounds, self.rounds))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What is compared, and with what.
        ratio: Ours against the peer; None where nothing was measured.
        target: What the ratio must reach; None where it is only reported.
        is_lower_better: For ratios of memory or of time, where the target is a bound from above.
        spread: Middle half of the ratios of the single rounds.
        details: Whatever else was measured, for the JSON file.
        skipped: Why nothing was measured.
    """

    name: str
    ratio: float | None = None
    target: float | None = None
    is_lower_better: bool = False
    spread: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None where there is no target or no ratio."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target if self.is_lower_better else self.ratio >= self.target


def format_row(row: Row) -> str:
    """The row as a line of a table in Markdown."""
    if row.ratio is None:
        return f"| {row.name} | - | - | - | skipped: {row.skipped} |"
    spread = f"{row.spread[0]:.3g} to {row.spread[1]:.3g}" if row.spread else "-"
    sign = "<=" if row.is_lower_better else ">="
    target = "-" if row.target is None else f"{sign} {row.target:g}"
    reached = {None: "reported", True: "yes", False: "no"}[row.is_met]
    return f"| {row.name} | {row.ratio:.3g} | {spread} | {target} | {reached} |"


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def interleave(calls: Calls, options: Options, warmups: int = 2) -> dict[str, list[float]]:
    """Seconds of every call in every counted round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warmups + options.rounds):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            elapsed = seconds_of(calls[name], options.device)
            if index >= warmups:
                seconds[name].append(elapsed)
    return seconds


def speed_row(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    options: Options,
    target: float | None = None,
    warmups: int = 2,
    **details: Any,
) -> Row:
    """How many times as fast as `peer` our call is: the peer's time over ours, above 1 where ours is faster."""
    return row_of(name, interleave({"ours": ours, "peer": peer}, options, warmups), target=target, **details)


def row_of(
    name: str,
    seconds: dict[str, list[float]],
    ours: str = "ours",
    peer: str = "peer",
    target: float | None = None,
    scale: float = 1.0,
    is_lower_better: bool = False,
    **details: Any,
) -> Row:
    """A row of two of the interleaved calls: `scale` times the time of `peer` over that of `ours`."""
    ratios = [scale * b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    medians = {call: statistics.median(seconds[call]) for call in (ours, peer)}
    return Row(
        name,
        ratio=statistics.median(ratios),
        target=target,
        is_lower_better=is_lower_better,
        spread=interquartile_range(ratios),
        details={**details, "median_seconds": medians, "rounds": len(ratios)},
    )


def share_row(
    name: str, seconds: dict[str, list[float]], call: str, flops: int, target: float | None = None, **details: Any
) -> Row:
    """Which share of the matrix rate a call reached; `matrix_product` is interleaved as "product"."""
    scale = flops / product_flops(details["device"])
    return row_of(name, seconds, call, "product", target, scale, flops=flops, **details)


def interquartile_range(values: list[float]) -> tuple[float, float]:
    """The first and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def matrix_product(options: Options) -> Callable[[], torch.Tensor]:
    """A square matrix product, the measure of what the machine can do."""
    size = PRODUCT_SIZES[options.device]
    a, b = (torch.randn(size, size, device=options.device, dtype=options.dtype) for _ in range(2))
    return lambda: a @ b


def product_flops(device: str) -> int:
    """Of `matrix_product`."""
    return 2 * PRODUCT_SIZES[device] ** 3


def matrix_rate(options: Options) -> dict[str, Any]:
    """FLOP/s of `matrix_product`, the calibration of a run: a wide interquartile range means a noisy machine."""
    seconds = interleave({"product": matrix_product(options)}, options.at_most(10))["product"]
    rates = [product_flops(options.device) / elapsed for elapsed in seconds]
    return {
        "flops_per_second": statistics.median(rates),
        "interquartile_range": interquartile_range(rates),
        "dtype": str(options.dtype),
    }


def flops_of(call: Callable[[], Any]) -> int:
    """FLOPs of the products, convolutions and attention in a call with model and inputs on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def require_equal(ours: torch.Tensor, peer: torch.Tensor) -> float:
    """The largest difference, relative to the largest element, beside which 1e-6 counts as 0; there is nothing to
    compare in calls that give different results.
    """
    difference = ((ours.float() - peer.float()).abs().max() / (peer.float().abs().max() + 1e-6)).item()
    tolerance = 1e-3 if ours.dtype == torch.float32 else 0.05
    if ours.shape != peer.shape or not difference <= tolerance:
        raise SystemExit(f"The two results differ by {difference}: nothing to compare.")
    return difference


def no_compiler(device: str) -> str | None:
    """Why `torch.compile` cannot work here; None where it can."""
    names = ("g++", "clang++", "c++") if device == "cpu" else ("gcc", "clang", "cc")
    is_here = any(map(shutil.which, names))
    return None if is_here else f"torch.compile needs a compiler: none of {', '.join(names)} is here"


@contextmanager
def one_core() -> Iterator[None]:
    """All threads of this process on one core, those that libraries have started included, and PyTorch with one
    thread: several would wait for each other.
    """
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def move(cores: set[int]) -> None:
        for task in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # a thread that has ended since
                os.sched_setaffinity(int(task), cores)

    move({min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        move(cores)


def in_fresh_process(call: Callable[..., int], *arguments: str | int) -> int:
    """What a public function of a module returns in a process that did nothing else: only there can peak memory be
    read.

    Every tensor has a mapping of its own there (glibc), so that resident memory is what tensors hold and not what the
    allocator kept.
    """
    code = f"from {call.__module__} import {call.__name__} as call; print(call(*{arguments!r}))"
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{call.__module__}.{call.__name__}` failed:\n{done.stderr}")
    return int(done.stdout)


def memory_growth(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a call holds at its most beyond what was held before it: of resident memory on the CPU (Linux), else
    by the device's allocator.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from what is resident
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


# Of the vector units that decide which kernels run.
VECTOR_FLAGS = re.compile(r"^(avx|amx|fma|asimd|sve|bf16|i8mm)")
# Variables that make PyTorch and oneDNN leave instructions unused: this processor then stands in for another kind.
STAND_INS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def processor() -> dict[str, Any]:
    """The processor, its vector instructions, and which of them the kernels use."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = found.get("flags", found.get("Features", "")).split()
    return {
        "name": found.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(filter(VECTOR_FLAGS.match, flags)),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "stands_in_by": {name: os.environ[name] for name in STAND_INS if name in os.environ},
    }


def describe_processor() -> str:
    """The processor in a line, for people who compare figures."""
    found = processor()
    changes = ", ".join(f"{name}={value}" for name, value in found["stands_in_by"].items())
    return f"{found['name']}, {found['kernels']} kernels{f' (stands in by {changes})' if changes else ''}"


def versions() -> dict[str, Any]:
    """What a result was measured with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
