"""Watches single calls: what they raise, how long they take, what they start, and how far memory grows."""

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


SECONDS = 20  # for one input; the slowest takes one or two
GROWTH = 512 * 2**20  # of the largest resident memory, in bytes, over all inputs of a kind
STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")


class HangError(BaseException):
    """A call exceeded the time limit. Not an `Exception`, so that no handler of the package catches it."""


@dataclass
class Report:
    """Outcomes of the inputs of one kind."""

    kind: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    growth: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Row of the table in the README."""
        growth = f"{self.growth / 2**20:.0f} MiB"
        counts = f"{self.inputs:,} | {self.accepted:,} | {self.refused:,} | {len(self.faults)}"
        return f"| {self.kind} | {counts} | {self.slowest:.2f} s | {growth} |"


_started: list[str] = []
_is_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_watching and event.startswith(STARTS):
        _started.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_audit)


def _largest_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.01) if left else 0, interval)
        signal.signal(signal.SIGALRM, handler)


def watch(kind: str, inputs: Iterator[tuple[str, Callable[[], Any], str]]) -> Report:
    """Makes every call and counts the outcomes.

    Args:
        kind: Kind of the inputs.
        inputs: Label, call, and a pattern that the message of an error must match, because it names the input. A text
            that a call returns describes its fault.

    Returns:
        The counts. A fault is an error other than a ValueError or an OSError that names the input, a call that takes
        longer than SECONDS, a started program, or memory beyond GROWTH.
    """
    global _is_watching
    report, before = Report(kind), _largest_memory()
    for label, call, named in inputs:
        report.inputs += 1
        _started.clear()
        start = time.monotonic()
        fault = None
        _is_watching = True
        try:
            with _time_limit(SECONDS):
                fault = call()
            report.accepted += 1
        except HangError:
            fault = f"takes longer than {SECONDS} s"
        except (ValueError, OSError) as error:
            report.refused += 1
            if not re.search(named, str(error)):
                fault = f"does not name {named!r}: {type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 (all others are what is looked for)
            fault = f"{type(error).__name__}: {error}"
        finally:
            _is_watching = False
        report.slowest = max(report.slowest, time.monotonic() - start)
        if _started:
            fault = f"starts {_started[0]}"
        if fault:
            report.faults.append(f"{' '.join(str(fault).split())[:300]} ({kind}, {label})")
    report.growth = max(_largest_memory() - before, 0)
    if report.growth > GROWTH:
        report.faults.append(f"{kind}: memory grew by {report.growth / 2**20:.0f} MiB")
    return report


def limit_memory(beyond: int) -> None:
    """Limits the address space to what is in use and `beyond` bytes, so that no input takes the machine's memory."""
    with open("/proc/self/statm", encoding="ascii") as handle:
        used = int(handle.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + beyond, hard))


__all__ = ["Report", "limit_memory", "watch"]
