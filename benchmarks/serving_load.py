"""An endpoint under load: `python -m internvl.benchmarks.serving_load MODEL --minutes 10`.

Starts `python -m internvl.serving embeddings MODEL` and, for every number of `--workers`:

1. asks each text and image alone, which gives the expected answers;
2. lets clients ask for several at a time until the minutes are over, and compares every answer with what is expected
   of its own request, while another client sends requests that must be refused (4xx);
3. kills the server (SIGKILL), starts it again and asks again;
4. asks it to stop (SIGTERM) with requests under way, which must be answered.

Prints one line for each number, writes `benchmarks/results/serving_load.json`, and returns exit status 1 where an
answer was lost or mixed up, memory grew, a bad request was not refused, or a server did not start or stop as it
should.

Memory is what the processes of the server hold, pages shared among them counted once (Linux, `Pss`). It is flat if
after the first fifth of the time, in which caches fill, no tenth has a median 5 % above the first one.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from .load_requests import PATH, Exchange, exchange, hostile_requests, sample_inputs, vectors_of
from .server_process import ServerProcess


RESULTS = Path("benchmarks", "results", "serving_load.json")  # of the current folder
MOST_INPUTS = 4  # of a request
MOST_EXAMPLES = 3  # of what went wrong for a client
TOLERANCE = 1e-4  # of unit vectors: a batch may change the last bits
WARM_UP, TENTHS, MOST_GROWTH = 0.2, 10, 1.05
SECONDS_TO_STOP = 60.0


@dataclass
class Tally:
    """What clients saw.

    Args:
        seconds: Of every right answer.
        vectors: Texts and images that were answered rightly.
        lost: Requests that got no answer, or an error.
        mixed: Requests whose answer is not their own.
        refused: Hostile requests by their status; 0 without any.
        examples: A few of what went wrong.
    """

    seconds: list[float] = field(default_factory=list)
    vectors: int = 0
    lost: int = 0
    mixed: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def note(self, asked: list[str], found: Exchange, expected: dict[str, np.ndarray]) -> None:
        """Counts the answer to a request."""
        if found.status != 200:
            self.lost += 1
            self.examples.append(f"{found.status}: {found.body[:200]!r}")
            return
        wanted = np.stack([expected[one] for one in asked])
        vectors = vectors_of(found.body)
        if vectors is None or vectors.shape != wanted.shape or not np.abs(vectors - wanted).max() <= TOLERANCE:
            self.mixed += 1
            self.examples.append(f"not of its own request: {[one[:40] for one in asked]}")
            return
        self.seconds.append(found.seconds)
        self.vectors += len(asked)

    def note_hostile(self, name: str, found: Exchange) -> None:
        """Counts the answer to a hostile request."""
        self.refused[found.status] = self.refused.get(found.status, 0) + 1
        if not 400 <= found.status < 500:
            self.examples.append(f"{name}: {found.status}: {found.body[:200]!r}")

    @classmethod
    def merged(cls, tallies: Iterable["Tally"]) -> "Tally":
        """The sum of several."""
        total = cls()
        for one in tallies:
            total.seconds += one.seconds
            total.vectors += one.vectors
            total.lost += one.lost
            total.mixed += one.mixed
            total.examples += one.examples[:MOST_EXAMPLES]
            for status, count in one.refused.items():
                total.refused[status] = total.refused.get(status, 0) + count
        return total


@dataclass(frozen=True)
class LoadRow:
    """What one run showed; `memory_mb` has a median for each tenth of the time after the warm-up."""

    workers: int
    clients: int
    minutes: float
    answers: int
    vectors: int
    lost: int
    mixed: int
    p50_ms: float
    p95_ms: float
    memory_mb: list[float]
    growth: float
    refused: int
    not_refused: int
    processes_left: int
    restart_seconds: float | None
    answered_while_stopping: str
    stop_seconds: float | None
    examples: list[str]

    @property
    def is_met(self) -> bool:
        """Whether nothing was lost, mixed up, left over or let in, and memory is flat."""
        answered, _, begun = self.answered_while_stopping.partition(" of ")
        return (
            self.answers > 0
            and not (self.lost or self.mixed or self.not_refused or self.processes_left)
            and self.refused > 0
            and self.growth <= MOST_GROWTH
            and None not in (self.restart_seconds, self.stop_seconds)
            and answered == begun
        )

    def __str__(self) -> str:
        return (
            f"{self.workers} worker(s), {self.clients} clients, {self.minutes:g} min: {self.answers} answers "
            f"({self.vectors} vectors), {self.lost} lost, {self.mixed} mixed; p50 {self.p50_ms:.0f} ms, p95 "
            f"{self.p95_ms:.0f} ms; memory {self.memory_mb[-1]:.0f} MB, x{self.growth:.3f}; hostile: {self.refused} "
            f"refused, {self.not_refused} not; killed: {self.processes_left} processes left, serving again after "
            f"{_shown(self.restart_seconds)}; stopped after {_shown(self.stop_seconds)}, "
            f"{self.answered_while_stopping} answered: {'as it should be' if self.is_met else 'NOT as it should be'}"
        )


def _shown(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


def tenths_of(samples: list[float]) -> list[float]:
    """The medians of the tenths of the samples after the warm-up; one median of all where they are few."""
    kept = samples[int(WARM_UP * len(samples)) :]
    parts = np.array_split(np.array(kept), TENTHS if len(kept) >= TENTHS else 1)
    return [statistics.median(part.tolist()) for part in parts]


def growth_of(samples: list[float]) -> float:
    """How much higher the highest tenth of the samples after the warm-up is than the first one."""
    medians = tenths_of(samples)
    return max(medians) / medians[0]


def _payload(asked: list[str]) -> bytes:
    return json.dumps({"input": asked, "encoding_format": "base64"}).encode()


def ask(port: int, asked: list[str], timeout: float = 120) -> Exchange:
    """Asks for the embeddings of texts and images."""
    return exchange(port, "POST", PATH, _payload(asked), timeout)


def expected_answers(port: int, inputs: list[str]) -> dict[str, np.ndarray]:
    """The vectors of inputs that are asked for one by one.

    Raises:
        ValueError: If one is refused, or two cannot be told apart.
    """
    expected = {}
    for one in inputs:
        found = ask(port, [one])
        vectors = vectors_of(found.body) if found.status == 200 else None
        if vectors is None:
            raise ValueError(f"A request alone is answered by {found.status}: {found.body[:200]!r}.")
        expected[one] = vectors[0]
    nearest = min(float(np.abs(a - b).max()) for a, b in combinations(expected.values(), 2))
    if nearest < 10 * TOLERANCE:
        raise ValueError(
            f"Two inputs have vectors that differ by {nearest:.1e} only: mixed answers would not be seen."
        )
    return expected


def _client(number: int, port: int, end: float, expected: dict[str, np.ndarray]) -> Tally:
    """Asks for random inputs, one request after the other."""
    choose, tally = random.Random(number), Tally()
    inputs = list(expected)
    while time.monotonic() < end:
        asked = choose.sample(inputs, choose.randint(1, MOST_INPUTS))
        tally.note(asked, ask(port, asked), expected)
    return tally


def _attacker(port: int, end: float) -> Tally:
    """Sends hostile requests, with pauses, so that they are not what is measured."""
    tally = Tally()
    while time.monotonic() < end or not tally.refused:
        for name, method, path, body, headers in hostile_requests():
            tally.note_hostile(name, exchange(port, method, path, body, 60, headers))
            time.sleep(0.05)
    return tally


def load(server: ServerProcess, clients: int, seconds: float, expected: dict[str, np.ndarray]) -> tuple[Tally, list]:
    """What clients and an attacker saw, and the memory of the server, about once a second."""
    memory: list[float] = []
    end = time.monotonic() + seconds

    def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.memory())
            time.sleep(min(1.0, seconds / 60))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    with ThreadPoolExecutor(clients + 1) as pool:
        asking = [pool.submit(_client, number, server.port, end, expected) for number in range(clients)]
        asking.append(pool.submit(_attacker, server.port, end))
        tallies = [one.result() for one in asking]
    watcher.join()
    return Tally.merged(tallies), memory


def killed_and_restarted(server: ServerProcess, expected: dict[str, np.ndarray]) -> tuple[int, float | None]:
    """How many processes a killed server leaves behind, and the seconds until it serves again, None if it does not."""
    left = server.kill()
    begun = time.monotonic()
    if not server.start():
        return left, None
    tally = Tally()
    for one in list(expected)[:8]:
        tally.note([one], ask(server.port, [one]), expected)
    return left, None if tally.lost or tally.mixed else time.monotonic() - begun


def stopped(server: ServerProcess, expected: dict[str, np.ndarray], clients: int = 8) -> tuple[str, float | None]:
    """How many of the requests under way a stopping server answered, and the seconds it took, None if it did not."""
    inputs = list(expected)
    asked = [inputs[index : index + 2 * MOST_INPUTS] for index in range(clients)]
    tally = Tally()
    with ThreadPoolExecutor(clients) as pool:
        under_way = [pool.submit(ask, server.port, one) for one in asked]
        server.wait_for_requests(clients)
        seconds = server.stop(SECONDS_TO_STOP)
        for one, found in zip(asked, under_way, strict=True):
            tally.note(one, found.result(), expected)
    return f"{len(tally.seconds)} of {clients}", seconds


def measure_endpoint(server: ServerProcess, options: argparse.Namespace, workers: int) -> LoadRow:
    """One run, from the start of a server to its end."""
    inputs = sample_inputs()
    if not server.start():
        raise ValueError(f"The server does not start: {server.log_end()}")
    try:
        expected = expected_answers(server.port, inputs)
        tally, memory = load(server, options.clients, 60 * options.minutes, expected)
        left, restart_seconds = killed_and_restarted(server, expected)
        answered, stop_seconds = stopped(server, expected)
    finally:
        server.kill()
    milliseconds = np.array(tally.seconds or [float("nan")]) * 1000
    bad = sum(count for status, count in tally.refused.items() if not 400 <= status < 500)
    return LoadRow(
        workers=workers,
        clients=options.clients,
        minutes=options.minutes,
        answers=len(tally.seconds),
        vectors=tally.vectors,
        lost=tally.lost,
        mixed=tally.mixed,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p95_ms=float(np.percentile(milliseconds, 95)),
        memory_mb=[round(tenth / 1e6, 1) for tenth in tenths_of(memory)],
        growth=growth_of(memory),
        refused=sum(tally.refused.values()) - bad,
        not_refused=bad,
        processes_left=left,
        restart_seconds=restart_seconds,
        answered_while_stopping=answered,
        stop_seconds=stop_seconds,
        examples=tally.examples,
    )


def main(arguments: list[str] | None = None, make_server: Callable[..., Any] = ServerProcess) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.serving_load", description="Puts the embeddings API under load."
    )
    parser.add_argument("model", metavar="MODEL", help="folder of an InternVL-C or -G")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of the server (default: 1 2)")
    parser.add_argument("--clients", type=int, default=32, help="at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of load (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows = []
    for workers in options.workers:
        command = [sys.executable, "-m", "internvl.serving", "embeddings", options.model, "--dtype", "float32"]
        command += ["--subfolder", options.subfolder, "--workers", str(workers), "--timeout", "100"]
        row = measure_endpoint(make_server(command), options, workers)
        print(row, *row.examples, sep="\n  ", flush=True)
        rows.append(row)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(row), "met": row.is_met} for row in rows]
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(not all(row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
