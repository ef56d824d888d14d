"""What clients send to an embeddings API under load, and how they read its answers."""

import base64
import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import count

import numpy as np

from ..evaluation.html_files import data_address
from ..synthetic.captions import caption
from ..synthetic.scenes import ONE_TILE, Layout, draw_scene, sample_scene, scene_generator


PATH = "/v1/embeddings"
HOSTILE = tuple[str, str, str, bytes, Mapping[str, str]]


@dataclass(frozen=True)
class Exchange:
    """An answer: `status` is 0 without one, `body` then what went wrong."""

    status: int
    body: bytes
    seconds: float


def exchange(
    port: int, method: str, path: str, body: bytes, timeout: float, headers: Mapping[str, str] | None = None
) -> Exchange:
    """Sends a request to a server on loopback and waits for the answer."""
    begun = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        status, content = answer.status, answer.read()
    except (OSError, HTTPException) as error:
        status, content = 0, f"{type(error).__name__}: {error}".encode()
    finally:
        connection.close()
    return Exchange(status, content, time.monotonic() - begun)


def vectors_of(body: bytes) -> np.ndarray | None:
    """The vectors (inputs, E) of an answer in base64, in the order of their indices; None if it has another form."""
    try:
        data = json.loads(body)["data"]
        rows = [np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in data]
        order = [one["index"] for one in data]
    except (ValueError, KeyError, TypeError):
        return None
    if order != list(range(len(rows))) or len({len(row) for row in rows}) != 1:
        return None
    return np.stack(rows)


def sample_inputs(texts: int = 48, images: int = 16) -> list[str]:
    """Texts, and images as `data:` addresses: generated scenes of shapes, and captions of others."""
    layout, found = Layout(ONE_TILE, shapes=(1, 3)), dict[str, None]()
    for index in count():
        scene = sample_scene(scene_generator("held_out", 0, index), layout, "held_out")
        if len(found) < texts:
            found[caption(scene)] = None
        elif len(found) < texts + images:
            found[data_address(draw_scene(scene), 224)] = None
        else:
            return list(found)
    raise AssertionError  # there are more scenes than this takes


def _png_of_size(width: int, height: int) -> str:
    """The address of a file of a few bytes that says it is an image of this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (head, b"IDAT" + zlib.compress(b""), b"IEND")
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def hostile_requests() -> Iterator[HOSTILE]:
    """Requests that must be refused: name, method, path, body and headers."""
    bodies: dict[str, object] = {
        "no input": {},
        "an empty list": {"input": []},
        "an empty text": {"input": ""},
        "a number": {"input": 5},
        "token ids": {"input": [1, 2, 3]},
        "a list of lists": {"input": [["a"]]},
        "too many inputs": {"input": ["a"] * 10_000},
        "a long text": {"input": "a " * 500_000},
        "an object with a path": {"input": [{"path": "/etc/passwd"}]},
        "half of a surrogate pair": {"input": "\ud800"},
        "an unknown field": {"input": "a", "path": "/etc/passwd"},
        "another model": {"input": "a", "model": "../../etc"},
        "a length of 0": {"input": "a", "dimensions": 0},
        "a huge length": {"input": "a", "dimensions": 10**30},
        "an unknown encoding": {"input": "a", "encoding_format": "pickle"},
        "a path as an address": {"image_urls": ["/etc/passwd"]},
        "a file address": {"image_urls": ["file:///etc/passwd"]},
        "an address on loopback": {"image_urls": ["http://127.0.0.1:22/"]},
        "an address of metadata": {"image_urls": ["http://169.254.169.254/latest/meta-data/"]},
        "broken base64": {"input": "data:image/png;base64,%%%"},
        "no image": {"input": "data:image/png;base64," + base64.b64encode(b"no image").decode()},
        "a program": {"input": "data:image/png;base64," + base64.b64encode(b"\x7fELF" + bytes(100)).decode()},
        "an image of 10^10 pixels": {"input": _png_of_size(100_000, 100_000)},
        "an image without pixels": {"input": _png_of_size(64, 64)},
    }
    for name, body in bodies.items():
        yield name, "POST", PATH, json.dumps(body).encode(), {}
    raw = {
        "no JSON": b"{",
        "nothing": b"",
        "no UTF-8": b"\xff\xfe",
        "deep lists": b"[" * 100_000,
        "a number that is none": b'{"input": NaN}',
        "a pickle": b"\x80\x04N.",
    }
    for name, content in raw.items():
        yield name, "POST", PATH, content, {}
    yield "another method", "DELETE", PATH, b"", {}
    yield "another path", "GET", "/../../etc/passwd", b"", {}
    yield "a body of a terabyte", "POST", PATH, b"", {"Content-Length": str(2**40)}
