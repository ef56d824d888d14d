"""Damaged training data: dialogue files, and shards of image-text pairs."""

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from internvl.rows.bad_rows import BadRows
from internvl.rows.json_rows import JsonRows
from internvl.training.data.pairs import PairStream
from internvl.training.data.validate import find_invalid_rows

from ..fixtures_dialogues import BAD_ROWS, llava
from ..fixtures_pairs import png, sample, write_parquet, write_tar
from ..test_videos import write_video
from .mutations import damaged, with_odd_values


def _validate(path: Path) -> None:
    """All faults of a file; each row is either good or has one."""
    for fault in find_invalid_rows(JsonRows(path)):
        str(fault).encode("utf-8", "backslashreplace")


def _stream(path: Path) -> None:
    stream = PairStream(str(path), epochs=1, shuffle_buffer=1, bad_rows=BadRows(1.0))
    for pair in stream:
        if pair["image"].mode != "RGB" or not isinstance(pair["text"], str):
            raise TypeError(f"gives {pair}")


def _dialogue_file(folder: Path, generator: random.Random, number: int) -> Path:
    good = [llava("<image>\nWhat?", "A bus.", image="a.png"), {"query": "a", "response": "b", "history": [["c", "d"]]}]
    good += [row for row, _ in generator.sample(sorted(BAD_ROWS.values(), key=str), 3)]
    rows = [with_odd_values(row, generator, generator.choice([0.02, 0.2])) for row in good]
    path = folder / f"rows.{('jsonl', 'json')[number % 2]}"
    if path.suffix == ".json":
        text = json.dumps(rows).encode()
    else:
        text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if number % 3 == 0:
        text = damaged(text, generator, number // 3)
    if number % 20 == 7:
        depth = 100_000
        text = b'{"conversations":' * depth + b"1" + b"}" * depth + b"\n" + text
    path.write_bytes(text)
    return path


def _video_file(folder: Path, generator: random.Random, number: int) -> Path:
    """A row with a damaged video."""
    file = io.BytesIO()
    kind, codec = (("mp4", "mpeg4"), ("webm", "libvpx"), ("avi", "mjpeg"), ("mpegts", "libx264"))[number % 4]
    write_video(file, 12, codec, kind=kind)
    (folder / "a.mp4").write_bytes(damaged(file.getvalue(), generator, number // 4))
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(llava("<video>", "a", video="a.mp4")) + "\n")
    return path


def _pair_file(folder: Path, generator: random.Random, number: int) -> Path:
    """Damaged rows of pairs."""
    path = folder / f"pairs.{('csv', 'jsonl')[number % 2]}"
    good = {"image": "a.png", "caption": "a, b"}
    lines = [with_odd_values(good, generator, 0.3) for _ in range(3)]
    if path.suffix == ".csv":
        fields = [row.values() if isinstance(row, dict) else [row] for row in [good, *lines]]
        text = "image,caption\n" + "".join(",".join(f'"{value}"' for value in values) + "\n" for values in fields)
        text = text.encode("utf-8", "surrogatepass")
    else:
        text = "".join(json.dumps(row) + "\n" for row in [good, *lines]).encode()
    path.write_bytes(damaged(text, generator, number // 2) if number % 3 else text)
    return path


def _shard(folder: Path, generator: random.Random, number: int) -> Path:
    if number % 3 == 2:
        path = write_parquet(folder / "pairs.parquet", [0, 1, 2])
        path.write_bytes(damaged(path.read_bytes(), generator, number // 3))
        return path
    metadata = with_odd_values({"similarity": 0.1, "width": 4, "height": 4, "key": "a"}, generator, 0.3)
    changes: dict[str, bytes | None] = {
        "json": json.dumps(metadata).encode(),
        "png": damaged(png(1), generator, number),
        "txt": generator.choice([b"", b"\xff\xfe", b"caption", b"\xed\xa0\x80", b"x" * 100_000, b"\0"]),
    }
    changed = {key: value for key, value in changes.items() if generator.random() < 0.5}
    path = write_tar(folder / "pairs.tar", [sample(0), sample(1, **changed), sample(2)])
    if number % 3 == 1:
        path.write_bytes(damaged(path.read_bytes(), generator, number // 3))
    return path


KINDS = ((_dialogue_file, _validate), (_shard, _stream), (_video_file, _validate), (_pair_file, _stream))


def inputs(seed: int, count: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Dialogue files and shards in turn. An error names the file, or where a whole epoch gives nothing says so."""
    generator = random.Random(f"{seed}/rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(png())
        for number in range(count):
            make, read = KINDS[number % len(KINDS)]
            path = make(folder, generator, number // len(KINDS))
            yield f"{path.name} {number}", partial(read, path), rf"{path.name}|samples"


__all__ = ["inputs"]
