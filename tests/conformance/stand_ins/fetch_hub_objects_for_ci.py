"""Stands in for transformers' own helper: without a network, the address of an image becomes a generated image."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def url_to_local_path(url: str, *args: Any, **kwargs: Any) -> str:
    """Path of a 640 x 480 image of gradients, the same for every call; addresses of videos and sounds stay as they
    are."""
    if not url.lower().endswith((".png", ".jpg", ".jpeg")):
        return url
    path = Path(tempfile.gettempdir()) / f"conformance-{hashlib.sha1(url.encode()).hexdigest()[:12]}.png"
    if not path.exists():
        y, x = np.mgrid[0:480, 0:640]
        waves = (np.sin(x / 40) * np.cos(y / 30) * 100 + 128).astype(int)
        Image.fromarray(np.stack([x * 255 // 639, y * 255 // 479, waves], -1).astype("uint8")).save(path)
    return str(path)
