"""What every engine's run shares: the table's lines, processes, and the questions with their expected answers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environments import ENGINES, HERE


WORK = ENGINES / "checkpoints"


@dataclass
class Row:
    """One line of the table."""

    checkpoint: str
    asked: str
    equal: int
    of: int

    def __str__(self) -> str:
        return f"{self.checkpoint:<24} {self.asked:<36} {self.equal} of {self.of} equal"


class FailedError(Exception):
    """An engine ended with an error; the text is the end of what it printed."""


def call(command: list[Any], env: dict[str, str], cwd: Path = WORK) -> str:
    # Not in the repository: its folders would be importable there.
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError((done.stdout + done.stderr)[-3000:])
    return done.stdout


def checkpoints() -> dict[str, Any]:
    """Questions and expected answers by checkpoint, made by the first engine that asks for them."""
    answers = WORK / "questions.json"
    if not answers.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        # One thread: the models are tiny.
        call(
            [sys.executable, HERE / "checkpoints.py", WORK],
            {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    return json.loads(answers.read_text())


def answers_of(script: str, python: Path, arguments: list[str], job: dict[str, Any], env: dict[str, str]) -> Any:
    """What a script of this folder says to a job, run by an engine's Python."""
    with TemporaryDirectory(dir=WORK) as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(job))
        call([python, HERE / script, *arguments, asked, answered], env)
        return json.loads(answered.read_text())
