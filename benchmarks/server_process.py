"""A server that a benchmark starts, kills and stops, and the memory of its processes (Linux)."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .load_requests import exchange


START_LIMIT_S = 600.0


class ServerProcess:
    """A command that serves on a port of loopback; all processes of its session belong to it.

    Args:
        command: Of the server; `--port N` is added to it.
    """

    def __init__(self, command: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.command = [*command, "--port", str(self.port)]
        self.process: subprocess.Popen | None = None
        self.log = Path(tempfile.mkdtemp(prefix="serving_load_")) / "server.log"

    def start(self) -> bool:
        """Starts it; returns whether it serves before the time is over."""
        with self.log.open("a") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=output, start_new_session=True)
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end and self.process.poll() is None:
            if self._is_ready():
                return True
            time.sleep(0.3)
        return False

    def _is_ready(self) -> bool:
        return exchange(self.port, "GET", "/health", b"", 5).status == 200

    def processes(self) -> list[int]:
        """Those of its session that are alive."""
        if self.process is None:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, *_, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                except OSError:  # it ended meanwhile
                    continue
                if int(session) == self.process.pid and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def memory(self) -> float:
        """Bytes that its processes hold; pages that several share count once."""
        total = 0
        for number in self.processes():
            try:
                lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return 1024.0 * total

    def kill(self, seconds: float = 10) -> int:
        """Kills its first process; returns how many others are left after some seconds, which are killed too."""
        if self.process is None:
            return 0
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(left)

    def wait_for_requests(self, count: int) -> None:
        """Waits until it has read what so many clients sent to its port, ten seconds at most."""
        end, seen = time.monotonic() + 10, 0
        while seen < 3 and time.monotonic() < end:
            time.sleep(0.02)
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            # Local address, state 01 (established) and bytes that wait to be read, in hexadecimal.
            waiting = [
                line[4].partition(":")[2]
                for line in lines
                if line[1].endswith(f":{self.port:04X}") and line[3] == "01"
            ]
            seen = seen + 1 if len(waiting) >= count and not any(int(size, 16) for size in waiting) else 0

    def stop(self, limit_s: float) -> float | None:
        """Asks it to end; returns the seconds until no process is left, None if one is after `limit_s`."""
        if self.process is None:
            return None
        begun = time.monotonic()
        self.process.terminate()
        while time.monotonic() < begun + limit_s:
            if self.process.poll() is not None and not self.processes():
                return time.monotonic() - begun
            time.sleep(0.05)
        return None

    def log_end(self) -> str:
        """What it printed last."""
        return self.log.read_text(errors="replace")[-2000:]
