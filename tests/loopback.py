"""Servers that tests start on loopback."""

import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class ServerEndedError(Exception):
    """A server ended or did not answer in time; the text is the end of what it printed."""


def free_port() -> int:
    """From below the range that the system gives out itself: a server may take a minute to bind it, and another
    program's answers would be taken for its own.
    """
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@contextmanager
def serving(
    command: list[str], port: int, log: Path, env: dict[str, str], cwd: Path, limit_s: float = 120
) -> Iterator[subprocess.Popen]:
    """Runs `command` in a session of its own until the block ends, entered once `port` answers.

    Raises:
        ServerEndedError: If the command ends before it answers, or does not within `limit_s`.
    """
    with log.open("w") as output:
        server = subprocess.Popen(command, env=env, cwd=cwd, stdout=output, stderr=output, start_new_session=True)
    end = time.monotonic() + limit_s
    try:
        while not is_up(port):
            if server.poll() is not None or time.monotonic() > end:
                raise ServerEndedError(without_colours(log.read_text(errors="replace"))[-3000:])
            time.sleep(0.3)
        yield server
    finally:
        stop(server)


def is_up(port: int) -> bool:
    """Whether it answers with anything but 503, which servers give while their workers start."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 503
    except OSError:
        return False


def stop(server: subprocess.Popen, limit_s: float = 60) -> None:
    """Asks the session of a server to end, and kills what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            continue
