"""Conversions in tests: running one, and reading and editing the folders on either side of it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.conversion import convert
from internvl.conversion.__main__ import main

from .fixtures_text import make_image


def run(source: Path, out: Path, **options: Any) -> Path:
    return convert(source, out, show_progress=False, **options)


def assert_rejected(
    source: Path, folder: Path, match: str, kind: type[Exception] = ValueError, **options: Any
) -> None:
    """Converts to `out` in a folder, which fails with a message and writes nothing."""
    with pytest.raises(kind, match=match):
        run(source, folder / "out", **options)
    assert not (folder / "out").exists()


def told(source: Path, out: Path, **options: Any) -> tuple[Path, str]:
    """Runs a conversion; returns the result and what was said."""
    lines: list[str] = []
    return run(source, out, report=lines.append, **options), "\n".join(lines)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of all files with weights."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "io.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refused(capsys, source: Path, out: Path, *options: str) -> str:
    """The one line with which the command answers a source; nothing was written."""
    before = sorted(os.listdir(out.parent))
    assert main([str(source), str(out), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert sorted(os.listdir(out.parent)) == before
    return lines[-1]


def ask(processor, size: tuple[int, int] = (90, 60), question: str = "What is shown?"):
    """Inputs of a model for a question about an image."""
    content = [{"type": "image", "image": make_image(*size)}, {"type": "text", "text": question}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([{"role": "user", "content": content}], **settings)


class BoobyTrap:
    """What a hostile file would hold: code that runs, and makes a folder, when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def assert_same_weights(found: Path, wanted: Path) -> None:
    assert_same(weights_of(found), weights_of(wanted))


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file, which need not exist; `...` removes one."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@contextmanager
def edited_weights(source: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of a source, written again after the block."""
    tensors = load_file(source / "model.safetensors")
    yield tensors
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def state_of(folder: Path) -> dict[str, str]:
    """Checksum of every file in a folder, at any depth."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
