"""Which weights results belong to: a folder may hold others tomorrow, under the same name."""

import hashlib
from pathlib import Path


PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "processor_config.json")


def checkpoint_state(model: str | Path, subfolder: str = "") -> str | None:
    """Returns a short text that changes when files of a model change, by their names, sizes and times.

    None for a name on the Hub.
    """
    folder = Path(model, subfolder)
    if not folder.is_dir():
        return None
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    rows = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
