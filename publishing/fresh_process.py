"""Loads the models of a repository in a process of its own, offline, in which this package is not imported."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ..console import printable


SCRIPT = Path(__file__).with_name("loads_alone.py")
# Not handed to the code of a repository.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
WRONG = {
    "missing_keys": "is missing in the files",
    "unexpected_keys": "is in the files, and the model has no such tensor",
    "mismatched_keys": "has another shape in the files",
    "error_msgs": "could not be loaded",
}


def last_error(text: str) -> str:
    """Returns the error that ended a program, in one line, from what it wrote."""
    lines = text.strip().splitlines() or ["no reason was given"]
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return printable(" ".join(lines[starts[-1] if starts else -1 :]))[:500]


def loading_faults(folder: Path, model: Path) -> Iterator[str]:
    """Yields the faults of a model that its users would meet, one line each.

    Args:
        folder: Folder of the repository. The code in it is run.
        model: Folder of the model, the same or a sub-folder.
    """
    name = "The model" if model == folder else f"`{model.name}`"
    subfolder = "" if model == folder else model.name
    with TemporaryDirectory() as there:
        # The code is copied to a cache of its own, so that nothing of an earlier one is found there.
        kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
        environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": there, "PYTHONPATH": ""}
        command = [sys.executable, "-P", str(SCRIPT), str(folder.resolve()), subfolder]
        done = subprocess.run(command, env=environment, cwd=there, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        yield f"{name} does not load in a fresh process: {last_error(done.stderr)}"
        return
    for kind, tensors in json.loads(lines[-1]).items():
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            yield f"{name}: `{tensors[0]}`{more} {WRONG.get(kind, kind)}."
