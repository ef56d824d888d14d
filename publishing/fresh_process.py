"""Loads the models of a repository in a process of its own, offline, in which this package is not imported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ..console import printable


SCRIPT = Path(__file__).with_name("loads_alone.py")
WRONG = {
    "missing_keys": "is missing in the files",
    "unexpected_keys": "is in the files, and the model has no such tensor",
    "mismatched_keys": "has another shape in the files",
    "error_msgs": "could not be loaded",
}


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
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": there, "PYTHONPATH": ""}
        command = [sys.executable, "-P", str(SCRIPT), str(folder.resolve()), subfolder, "yes"]
        done = subprocess.run(command, env=environment, cwd=there, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield f"{name} does not load in a fresh process: {printable(reason)}"
        return
    for kind, tensors in json.loads(lines[-1]).items():
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            yield f"{name}: `{tensors[0]}`{more} {WRONG.get(kind, kind)}."
