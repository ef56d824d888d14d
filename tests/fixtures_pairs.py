"""Small shards of image-text pairs."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet

from internvl.synthetic.textures import as_png, texture


def png(number: int = 0, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def write_textures(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        (folder / f"{seed}.png").write_bytes(as_png(texture(seed)))
    return folder


def sample(number: int, **changes: bytes | None) -> dict[str, bytes]:
    metadata = {"similarity": number / 100, "width": 4, "height": 4}
    columns = {
        "png": png(number),
        "txt": f"caption {number}".encode(),
        "json": json.dumps(metadata).encode(),
        **changes,
    }
    return {column: content for column, content in columns.items() if content is not None}


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, columns in enumerate(samples, start=first):
            for column, content in columns.items():
                member = tarfile.TarInfo(f"part/{number:06d}.{column}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, numbers: list[int]) -> Path:
    rows = [
        {"image": {"bytes": png(n), "path": f"{n}.png"}, "caption": f"caption {n}", "similarity": n / 100}
        for n in numbers
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path
