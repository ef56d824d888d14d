"""Python in processes of its own, in which nothing of this repository is on the path."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def elsewhere(folder: Path) -> dict[str, str]:
    """Environment of a process without network and our paths, its code cache and home in `folder`; it computes with as
    many threads as this one, so that bits can be compared.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
    paths = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home")}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **paths, **threads, "HF_HUB_OFFLINE": "1"}


def run_elsewhere(folder: Path, *arguments: Any, **environment: str) -> str:
    """What Python prints in `folder`, which is the working folder and is made if it is not there."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-P", *map(str, arguments)]  # -P: nothing from the folder of a script either
    env = {**elsewhere(folder), **environment}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
