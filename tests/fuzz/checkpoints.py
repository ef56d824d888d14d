"""Damaged checkpoints, given to the conversion's command line."""

import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from internvl.conversion.__main__ import main

from ..fixtures_published import GOLDEN, published, published_chat
from .mutations import ODD_VALUES, damaged, with_odd_values


def _convert(source: Path, out: Path) -> str | None:
    """Runs the command and returns what is wrong with its answer, or None; raises for a refusal."""
    said, told = io.StringIO(), io.StringIO()
    shutil.rmtree(out, ignore_errors=True)
    try:
        with redirect_stdout(said), redirect_stderr(told):
            code = main([str(source), str(out)])
    except SystemExit as stop:
        code = stop.code
    lines = told.getvalue().strip().splitlines()
    if code == 0:
        return None
    if code != 2 or not lines or not lines[-1].startswith("error: "):
        return f"exit status {code}: {lines[-3:]}"
    if out.exists() or list(out.parent.glob(".OUT*")):
        return f"leaves something behind: {lines[-1]}"
    raise ValueError(lines[-1])


def _write_weights(path: Path, generator: random.Random, number: int) -> None:
    """Damages a safetensors file; in every second one, values of its header, which then is consistent again."""
    data = path.read_bytes()
    if number % 2:
        path.write_bytes(damaged(data, generator, number))
        return
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(with_odd_values(json.loads(data[8 : 8 + size]), generator, 0.01)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _write_json(path: Path, generator: random.Random, number: int) -> None:
    if number % 4 == 1:
        path.write_bytes(damaged(path.read_bytes(), generator, number))
        return
    if number % 4 == 3:
        depth = generator.choice([100, 100_000])
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        return
    content = with_odd_values(json.loads(path.read_text()), generator, generator.choice([0.02, 0.2]))
    if isinstance(content, dict) and content and generator.random() < 0.5:
        content[generator.choice(sorted(content))] = generator.choice(ODD_VALUES)
    path.write_text(json.dumps(content))


def inputs(seed: int, count: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Weights, configurations, tokenizers and pickles, damaged in turn."""
    generator = random.Random(f"{seed}/checkpoints")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat, vision = published_chat(folder / "a"), published("intern_vit_6b", folder / "b")
        pickled = GOLDEN / "classification_raw" / "intern_vit_6b_224px.pth"
        for number in range(count):
            work, out = folder / "work", folder / "OUT"
            shutil.rmtree(work, ignore_errors=True)
            what = ("weights", "config", "pickle", "tokenizer")[number % 4]
            source: Path = work
            if what == "pickle":
                work.mkdir()
                source = work / "weights.pth"
                source.write_bytes(damaged(pickled.read_bytes(), generator, number // 4))
            else:
                shutil.copytree(chat if what == "tokenizer" or number % 8 < 4 else vision, work)
            if what == "weights":
                _write_weights(work / "model.safetensors", generator, number // 4)
            elif what == "config":
                _write_json(work / "config.json", generator, number // 4)
            elif what == "tokenizer":
                _write_json(
                    work / ("tokenizer.json", "tokenizer_config.json")[number // 4 % 2], generator, number // 8
                )
            yield f"{what} {number}", partial(_convert, source, out), "error: "


__all__ = ["inputs"]
