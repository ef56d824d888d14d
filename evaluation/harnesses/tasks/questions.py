"""Questions about images, as lm-eval and lmms-eval want them.

Both read `questions.json` (or JSON lines of that name) in the folder where they run: rows with `image` (or `file`), a
path from there, `question` and `answer`. The harnesses import this file by its path, so it imports nothing of the
package.
"""

from pathlib import Path
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Reads the image of a row."""
    with Image.open(Path(doc.get("image") or doc["file"])) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Returns the question of a row; lmms-eval puts the image before it."""
    return doc["question"]


def doc_to_text_with_image(doc: dict[str, Any]) -> str:
    """Returns the question of a row after the placeholder with which lm-eval marks the place of the image."""
    return f"<image>{doc['question']}"
