"""Embeddings of sentence-transformers beside `get_*_features` of the processor's inputs: `python
in_sentence_transformers.py FOLDER`.

Prints a JSON object per kind of input: what was asked, and how many rows are exactly equal of how many.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor


TEXTS = ["a red bus", "two cats", "summarize:two cats", "how many people are there? answer briefly."]


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 90), (56, 56), (30, 30)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.inference_mode()
def main(folder: str) -> None:
    engine = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    texts = processor(text=TEXTS, mode="contrastive", return_tensors="pt")
    pixels = processor(images=images(), mode="contrastive", return_tensors="pt")
    expected = {
        "texts": (TEXTS, model.get_text_features(**texts)),
        "images": (images(), model.get_image_features(**pixels)),
    }
    for asked, (inputs, features) in expected.items():
        features = getattr(features, "pooler_output", features).numpy()
        # One by one as well: what else is in a batch must not matter.
        for how, rows in {
            "together": engine.encode(inputs),
            "one by one": np.stack([engine.encode([row])[0] for row in inputs]),
        }.items():
            close = np.abs(rows - features).max(axis=1) < 1e-5
            print(json.dumps({"asked": f"{asked} {how}", "equal": int(close.sum()), "of": len(inputs)}))


if __name__ == "__main__":
    main(sys.argv[1])
