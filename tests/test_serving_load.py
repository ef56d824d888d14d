"""The load on an endpoint: what is lost, mixed up, let in or left over is counted, with servers that do each."""

import base64
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from internvl.benchmarks import server_process, serving_load
from internvl.benchmarks.load_requests import PATH, exchange, hostile_requests, sample_inputs, vectors_of
from internvl.benchmarks.server_process import ServerProcess
from internvl.benchmarks.serving_load import LoadRow, Tally, expected_answers, growth_of, load

from .conftest import ROOT


WORDS = [f"text {number}" for number in range(12)]
# An endpoint of the standard library: a process that serves, and one that belongs to it.
SERVER = """
import os, signal, sys, time
from http.server import *
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *a): pass
child = os.fork()
if not child:
    if "orphan" in sys.argv:
        time.sleep(600)
    while os.getppid() != 1 and os.getppid() == int(os.environ.setdefault("FIRST", str(os.getppid()))):
        time.sleep(0.05)
    os._exit(0)
def end(*a):
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0); os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else end)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def vector(text: str) -> np.ndarray:
    row = np.random.default_rng(list(text.encode())).standard_normal(8).astype("<f4")
    return row / np.linalg.norm(row)


class Endpoint(BaseHTTPRequestHandler):
    """Answers rightly but for its `fault`."""

    protocol_version = "HTTP/1.1"
    fault = ""
    count = 0

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        if length > 10**8:
            self.close_connection = True
            return self.answer(413, {})
        body = self.rfile.read(length)
        try:
            asked = json.loads(body)["input"]
            assert asked
            assert set(asked) <= set(WORDS)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            return self.answer(500 if self.fault == "lets in" else 400, {})
        type(self).count += 1
        if self.count > 12 and self.count % 3 == 0:  # after the answers that are expected
            if self.fault == "loses":
                self.close_connection = True
                return None
            if self.fault == "errs":
                return self.answer(500, {})
            if self.fault == "mixes":
                asked = [WORDS[(WORDS.index(asked[0]) + 1) % 12], *asked[1:]]
            if self.fault == "shortens":
                asked = asked[:-1]
        rows = [base64.b64encode(vector(one).tobytes()).decode() for one in asked]
        data = [{"index": index, "embedding": row} for index, row in enumerate(rows)]
        if self.fault == "numbers" and self.count > 12:
            data = [{**one, "index": 7} for one in data]
        return self.answer(200, {"data": data})

    def do_GET(self):
        self.answer(404, {})

    def do_DELETE(self):
        self.answer(405, {})

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Running:
    """As much of a server's process as the load needs."""

    def __init__(self, port: int) -> None:
        self.port = port

    def memory(self) -> float:
        return 1e6


def tally_of(fault: str) -> Tally:
    handler = type("Faulty", (Endpoint,), {"fault": fault, "count": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        expected = expected_answers(server.server_port, WORDS)
        tally, _ = load(Running(server.server_port), 4, 0.5, expected)
        server.shutdown()
    return tally


@pytest.mark.parametrize(
    ("fault", "counted"),
    [("", None), ("loses", "lost"), ("errs", "lost"), ("mixes", "mixed"), ("shortens", "mixed"), ("numbers", "mixed")],
)
def test_every_answer_is_compared_with_its_own(fault, counted):
    tally = tally_of(fault)
    assert tally.seconds or fault == "numbers"
    assert tally.vectors >= len(tally.seconds)
    assert [name for name in ("lost", "mixed") if getattr(tally, name)] == [name for name in (counted,) if name]
    assert bool(tally.examples) == bool(fault)
    assert set(tally.refused) == {400, 404, 405, 413}  # every hostile request, at least once
    assert sum(tally.refused.values()) >= len(list(hostile_requests()))


def test_a_server_that_fails_on_hostile_requests_is_seen():
    assert 500 in tally_of("lets in").refused


def test_requests_that_cannot_be_told_apart_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "vector", lambda text: np.ones(8, dtype="<f4"))
    with pytest.raises(ValueError, match="mixed answers would not be seen"):
        tally_of("")


def test_growth_is_measured_after_the_warm_up():
    rising = [float(x) for x in range(100)]
    assert growth_of([*rising, *[100.0] * 400]) == 1
    assert growth_of([*rising, *[100.0] * 200, *[112.0] * 200]) == pytest.approx(1.12)
    assert growth_of([*[100.0] * 499, 900.0]) == 1  # one sample is noise


GOOD = {
    "workers": 1, "clients": 2, "minutes": 1.0, "answers": 5, "vectors": 9, "lost": 0, "mixed": 0, "p50_ms": 1.0,
    "p95_ms": 2.0, "memory_mb": [3.0], "growth": 1.05, "refused": 9, "not_refused": 0, "processes_left": 0,
    "restart_seconds": 1.0, "answered_while_stopping": "8 of 8", "stop_seconds": 1.0, "examples": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        {"answers": 0}, {"lost": 1}, {"mixed": 1}, {"growth": 1.06}, {"growth": float("nan")}, {"refused": 0},
        {"not_refused": 1}, {"processes_left": 1}, {"restart_seconds": None}, {"stop_seconds": None},
        {"answered_while_stopping": "7 of 8"},
    ],
    ids=str,
)  # fmt: skip
def test_every_fault_fails_the_run(fault):
    assert LoadRow(**GOOD).is_met
    assert not LoadRow(**{**GOOD, **fault}).is_met
    assert "NOT as it should be" in str(LoadRow(**{**GOOD, **fault}))


def test_inputs_are_texts_and_images_of_different_scenes():
    inputs = sample_inputs(6, 2)
    assert len(set(inputs)) == 8
    assert [one.startswith("data:image/") for one in inputs] == [False] * 6 + [True] * 2


def test_a_lost_connection_is_an_exchange_without_status():
    found = exchange(1, "POST", PATH, b"", 5)
    assert found.status == 0
    assert b"Refused" in found.body


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": []}', b'{"data": [{"index": 0, "embedding": [1.0]}]}'])
def test_answers_of_another_form_are_none(body):
    assert vectors_of(body) is None


# ----------------------------------------------------------------------------------------------------------- processes
@pytest.fixture
def make_server(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    made: list[ServerProcess] = []

    def make(*words: str) -> ServerProcess:
        made.append(ServerProcess([sys.executable, str(tmp_path / "server.py"), *words]))
        assert made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.kill(0)


def test_a_server_is_started_killed_and_started_again(make_server):
    server = make_server()
    first = server.processes()
    assert len(first) == 2
    assert server.memory() > 5e6
    assert server.kill() == 0
    assert server.processes() == []
    assert server.start()
    assert len(server.processes()) == 2
    assert not set(server.processes()) & set(first)


def test_processes_that_outlive_their_server_are_counted_and_ended(make_server):
    server = make_server("orphan")
    (orphan,) = set(server.processes()) - {server.process.pid}
    assert server.kill(0.3) == 1
    end = time.monotonic() + 10
    while orphan in server.processes() and time.monotonic() < end:
        time.sleep(0.05)
    assert server.processes() == []


def test_stopping_takes_seconds_or_fails(make_server):
    assert make_server().stop(10) < 10
    assert make_server("deaf").stop(0.3) is None


def test_a_server_that_ends_at_once_has_not_started(monkeypatch):
    monkeypatch.setattr(server_process, "START_LIMIT_S", 20)
    server = ServerProcess([sys.executable, "-c", "raise SystemExit('no model')"])
    assert not server.start()
    assert "no model" in server.log_end()

    assert server.kill() == 0


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = iter([LoadRow(**GOOD), LoadRow(**{**GOOD, "lost": 1, "examples": ["0: refused"]})])
    commands = []
    monkeypatch.setattr(serving_load, "measure_endpoint", lambda server, options, workers: next(rows))
    assert serving_load.main(["model", "--workers", "2", "1"], commands.append) == 1
    assert [command[command.index("--workers") + 1] for command in commands] == ["2", "1"]
    found = json.loads((tmp_path / serving_load.RESULTS).read_text())
    assert [row["met"] for row in found] == [True, False]
    assert "0: refused" in capsys.readouterr().out


def test_the_guide_shows_what_was_measured():
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / serving_load.RESULTS).read_text())
    assert [row["workers"] for row in rows] == [1, 2]
    for row in rows:
        assert row["met"]
        hostile = row["refused"] + row["not_refused"]
        assert (
            f"| {row['workers']} | {row['answers']:,} ({row['vectors']:,}) | {row['lost']} | {row['mixed']} "
            f"| {row['p50_ms']:,.0f} ms | {row['p95_ms']:,.0f} ms | {row['memory_mb'][-1] / 1000:.2f} GB "
            f"| {row['growth'] - 1:.1%}".replace("%", " %")
            + f" | {row['refused']:,} of {hostile:,} | after {row['restart_seconds']:.0f} s |"
        ) in guide
