"""What every benchmark shares: two calls timed in turns, peak memory, and rows with a target.

The machine may be noisy, so seconds mean little alone: two calls take turns in one process, the one that goes first changing every
round, and a row holds the ratio of their medians with the middle half of the ratios of the single rounds.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Options:
    """How the rows are measured.

    Args:
        device: "cpu" or "cuda".
        rounds: Counted rounds of each row; rows of long calls may take fewer.
    """

    device: str = "cpu"
    rounds: int = 15


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


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict[str, Callable[[], Any]], options: Options, warmups: int = 2) -> dict[str, list[float]]:
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
    """How many times as fast as `peer` our call is: the peer's median time over ours, above 1 where ours is faster."""
    seconds = take_turns({"ours": ours, "peer": peer}, options, warmups)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return Row(
        name,
        ratio=medians["peer"] / medians["ours"],
        target=target,
        spread=middle_half(ratios),
        details={**details, "median_seconds": medians, "rounds": options.rounds},
    )


def middle_half(values: list[float]) -> tuple[float, float]:
    """The first and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, rounds: int = 10) -> dict:
    """The calibration of a run: FLOP/s of a square matrix product, as median and middle half; a wide spread means a noisy machine."""
    size = size if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: a @ b}, Options(device, rounds))["product"]
    rates = [2 * size**3 / elapsed for elapsed in seconds]
    return {"flops_per_second": statistics.median(rates), "middle_half": middle_half(rates), "dtype": str(dtype)}


def in_fresh_process(module: str, *arguments: str) -> str:
    """The standard output of `python -m module arguments`: peak memory of a process can only be read in one that did nothing else."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`python -m {module}` failed:\n{done.stderr}")
    return done.stdout


def peak_memory() -> int:
    """Bytes of resident memory that this process held at its most (Linux)."""
    return _status_bytes("VmHWM")


def resident_memory() -> int:
    """Bytes of resident memory that this process holds now (Linux)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def versions() -> dict[str, Any]:
    """What a result was measured with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
