"""Kills stage 1 at random moments, start, steps, saves and end: going on from whatever is left gives the weights of an
unbroken run.

Three of ten kills take one of two processes (gloo), and the other goes down with it, as launchers see to. Each run is
a fork of this process, which has imported everything; it saves after every second of its steps.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from internvl.training.models.whole_folders import INCOMPLETE, READY, checkpoints_in, fault_of
from internvl.training.stages import Run, run_stage1
from tests.fixtures_pairs import sample, write_tar
from tests.fixtures_text import make_tokenizer
from tests.test_stage_faults import RECIPE


PHASES = [phase.name for phase in RECIPE.phases]


def main(kills: int, seed: int) -> None:
    """Raises AssertionError where a kill lost something.

    Args:
        kills: How many.
        seed: Of the moments.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        make_tokenizer().save_pretrained(data / "tokenizer")
        for shard in range(2):
            numbers = range(shard * 8, shard * 8 + 8)
            write_tar(data / f"{shard}.tar", [sample(number) for number in numbers], shard * 8)
        took, wanted = {}, {}
        for processes in (1, 2):
            took[processes] = max(finished(data, f"whole{processes}", processes) for _ in range(2))
            wanted[processes] = load_file(data / f"whole{processes}" / "model.safetensors")
        seen: Counter[tuple[int, str]] = Counter()
        for number in range(kills):
            processes = 2 if number % 10 in (3, 6, 9) else 1
            out = data / "out"
            running = started(data, "out", processes)
            time.sleep(rng.uniform(0, 1.2 * took[processes]))
            for process in rng.sample(running, len(running)):
                os.kill(process, signal.SIGKILL)
            for process in running:
                os.waitpid(process, 0)
            seen[processes, found_at(out, processes, wanted[processes])] += 1
            finished(data, "out", processes)
            assert_same(load_file(out / "model.safetensors"), wanted[processes], f"after kill {number}")
            assert not (out / INCOMPLETE).exists(), "a half-written model was left"
            shutil.rmtree(out)
    print("| processes | what the kill left | times |\n|---|---|---|")
    for (processes, what), count in sorted(seen.items()):
        print(f"| {processes} | {what} | {count} |")
    print(f"\nUnbroken runs take {took[1]:.2f} s, with two processes {took[2]:.2f} s.")


def found_at(out: Path, processes: int, wanted: dict[str, torch.Tensor]) -> str:
    """What a kill left; raises where something half-written has its final name."""
    for name in PHASES:
        for checkpoint in checkpoints_in(out / "trainer" / name):
            assert fault_of(checkpoint, processes) is None, f"{checkpoint} is half-written: {fault_of(checkpoint)}"
    if (out / "training_log.json").exists():
        assert_same(load_file(out / "model.safetensors"), wanted, "in a finished folder")
        return "the finished model"
    if (out / READY).exists():
        return "the finished model, to be moved"
    assert not (out / "config.json").exists(), "half a model"
    for name in reversed(PHASES):
        if newest := checkpoints_in(out / "trainer" / name):
            return f"{newest[0].name} of {name}"
    return "nothing yet"


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), f"{name} differs {where}"


def started(data: Path, name: str, processes: int) -> list[int]:
    """Processes that train to DATA/NAME, going on from what is there; their ids."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [_forked(data, name, rank, processes, port) for rank in range(processes)]


def _forked(data: Path, name: str, rank: int, processes: int, port: int) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                shards = sorted(str(path) for path in data.glob("*.tar"))
                run_stage1(RECIPE, shards, Run(data / name, resume=True), data / "tokenizer")
            code = 0
        finally:
            os._exit(code)
    return process


def finished(data: Path, name: str, processes: int) -> float:
    """Trains to the end; seconds."""
    start = time.monotonic()
    codes = [os.waitpid(process, 0)[1] for process in started(data, name, processes)]
    assert not any(codes), "a run failed"
    return time.monotonic() - start
