"""Conversions in tests: running one, and reading and editing the folders on either side of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from internvl.conversion import convert


def run(source: Path, out: Path, **options: Any) -> Path:
    return convert(source, out, show_progress=False, **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of all files with weights."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "io.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_weights(found: Path, wanted: Path) -> None:
    assert_same(weights_of(found), weights_of(wanted))


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file, which need not exist; `...` removes one."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def state_of(folder: Path) -> dict[str, str]:
    """Checksum of every file in a folder, at any depth."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
