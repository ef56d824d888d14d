"""Where the bundled models looked, in five bundled images: `python -m internvl.reproduction maps --output FILE`."""

import argparse
import json
from pathlib import Path

from PIL import Image
from transformers import AutoModel, AutoProcessor

from ..evaluation.attention_maps import answer_maps, caption_maps
from ..evaluation.map_drawing import drawn_over, sheet_of


ROOT = Path(__file__).resolve().parents[1]
# Of `examples/questions.json`, the first question about each.
ASKED = ("handwriting.png", "shapes.png", "words.png", "wide_small_text.png")
CAPTIONED = "star.png"


def run(options: argparse.Namespace) -> None:
    """Draws a sheet: above the images with a question each, below the maps of the answers."""
    examples = ROOT / "examples"
    questions = json.loads((examples / "questions.json").read_text(encoding="utf-8"))
    above, below = [], []
    chat = AutoModel.from_pretrained(ROOT, dtype="float32").eval(), AutoProcessor.from_pretrained(ROOT)
    for name in ASKED:
        question = next(row["question"] for row in questions if row["file"] == name)
        image = Image.open(examples / name).convert("RGB")
        found = answer_maps(*chat, image, question)[0]
        above.append((question, image))
        below.append((found.text, drawn_over(image, found)))
    where = {"pretrained_model_name_or_path": ROOT, "subfolder": "internvl_g"}
    internvl_g = AutoModel.from_pretrained(**where, dtype="float32").eval(), AutoProcessor.from_pretrained(**where)
    image = Image.open(examples / CAPTIONED).convert("RGB")
    maps = caption_maps(*internvl_g, image)
    word = max(maps, key=lambda found: float(found.values.max()))
    above.append((" ".join(found.text for found in maps), image))
    below.append((word.text, drawn_over(image, word)))
    sheet_of([*above, *below], columns=len(above)).save(options.output, optimize=True)
