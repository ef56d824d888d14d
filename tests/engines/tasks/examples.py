"""The questions about the bundled images, as lm-eval and lmms-eval want them; INTERNVL_EXAMPLES names the folder."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def load(**_: Any) -> dict[str, datasets.Dataset]:
    """For lm-eval, which takes a function in place of a data set."""
    rows = json.loads((Path(os.environ["INTERNVL_EXAMPLES"]) / "questions.json").read_text())
    return {"test": datasets.Dataset.from_list(rows)}


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(Path(os.environ["INTERNVL_EXAMPLES"]) / doc["file"]).convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return doc["question"]


def doc_to_text_with_image(doc: dict[str, Any]) -> str:
    return f"<image>{doc['question']}"
