"""Rows in time boxes: a row that fails, hangs or lacks something costs its own line and nothing else."""

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ..harness import Options, Row
from .sizes import ModelSizes


BUILD_SECONDS = 60.0  # the most that making a model may take between two rows


@dataclass(frozen=True)
class Setting:
    """Where and at which sizes rows are measured.

    Args:
        options: Device and rounds.
        sizes: The released sizes, or those of a stand-in.
    """

    options: Options
    sizes: ModelSizes

    @property
    def device(self) -> str:
        """The device, "cuda" or "cpu"."""
        return self.options.device


@dataclass(frozen=True)
class Need:
    """Something without which a row cannot run.

    Args:
        name: What it is, as the table names it.
        is_met: Whether it is there.
    """

    name: str
    is_met: Callable[[Setting], bool]


@dataclass(frozen=True)
class Measurement:
    """A row that is yet to be measured.

    Args:
        name: Of the row.
        measure: Returns it.
        seconds: Time box.
        needs: What must be there.
        trains: Whether gradients are computed.
    """

    name: str
    measure: Callable[[], Row]
    seconds: float = 30.0
    needs: tuple[Need, ...] = ()
    trains: bool = False


Part = Callable[[Setting], Iterable[Measurement]]

CUDA = Need("a CUDA device", lambda setting: setting.device == "cuda")
FP8 = Need(
    "a device with fp8 (compute capability 8.9)",
    lambda setting: setting.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9),
)


def library(name: str) -> Need:
    """A library that must be installed."""
    return Need(name, lambda setting: find_spec(name) is not None)


class OutOfTimeError(Exception):
    """A time box is over."""


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raises an `OutOfTimeError` in what takes longer. The main thread alone can be interrupted, between two kernels.

    Args:
        seconds: The most that may pass.
    """

    def stop(number: int, frame: Any) -> None:
        raise OutOfTimeError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why_failed(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines[0] else type(error).__name__


def row_of_measurement(job: Measurement, setting: Setting, seconds_left: float) -> Row:
    """The row of a job, or why there is none."""
    missing = [need.name for need in job.needs if not need.is_met(setting)]
    if missing:
        return Row(job.name, skipped=f"{', '.join(missing)} missing")
    if seconds_left <= 0:
        return Row(job.name, skipped="no time left")
    start = time.monotonic()
    try:
        with time_box(min(job.seconds, seconds_left)), torch.set_grad_enabled(job.trains):
            row = job.measure()
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a row that fails must not cost those after it)
        return Row(job.name, skipped=f"failed: {why_failed(error)}")
    row.details["measured_in_seconds"] = round(time.monotonic() - start, 1)
    return row


def rows_of_part(title: str, part: Part, setting: Setting, deadline: float) -> Iterator[Row]:
    """The rows of a part, each as soon as it is measured.

    Args:
        title: Of the part; names the row that says why the rest of the part is missing.
        part: Yields jobs; what it does between them (making a model) has a time box of its own.
        setting: Where it runs.
        deadline: On the clock of `time.monotonic`.
    """
    jobs = iter(part(setting))
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            yield Row(title, skipped="no time left")
            return
        try:
            with time_box(min(BUILD_SECONDS, left)), torch.no_grad():
                job = next(jobs, None)
        except Exception as error:  # noqa: BLE001 (parts after this one are measured all the same)
            yield Row(title, skipped=f"failed: {why_failed(error)}")
            return
        if job is None:
            return
        yield row_of_measurement(job, setting, deadline - time.monotonic())
        del job  # with the model that it holds
        free(setting)


def free(setting: Setting) -> None:
    """Hands back memory of the device that nothing holds any more."""
    if setting.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
