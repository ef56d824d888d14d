"""HTML files that need nothing else: templates, with the images in them."""

import base64
import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ..writing import write_whole


TEMPLATES = Path(__file__).with_name("templates")
THUMBNAIL_SIDE = 320


def write_html(output: Path, **content: Any) -> None:
    """Writes a page with the content that the template takes, whole or not at all."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html").render(script=script, digest=digest, **content)
    write_whole(output, text.encode(errors="xmlcharrefreplace"))


def data_address(image: Image.Image, side: int = THUMBNAIL_SIDE) -> str:
    """A `data:` address of an image, made smaller where a side is longer than `side`."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    encoded = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = BytesIO()
        small.save(file, kind, **settings)
        encoded.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(encoded, key=len)
