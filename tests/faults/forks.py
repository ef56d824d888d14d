"""Work in forks of a process that has imported everything, so that a kill costs a fraction of a second."""

import os
import signal
import time
from collections.abc import Callable


def started(work: Callable[[], object]) -> int:
    """A process that does the work; its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def killed(work: Callable[[], object], seconds: float) -> None:
    """Begins the work in a process of its own, and kills it after some time."""
    process = started(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def finished(work: Callable[[], object]) -> float:
    """Does the work to the end in a process of its own; seconds."""
    start = time.monotonic()
    _, status = os.waitpid(started(work), 0)
    assert status == 0, "the work failed"
    return time.monotonic() - start
