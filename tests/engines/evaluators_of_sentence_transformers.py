"""Evaluators of sentence-transformers on generated images: `python evaluators_of_sentence_transformers.py FOLDER
IMAGES.json`, in its own environment.

FOLDER holds the checkpoint, IMAGES.json is of figures.py. Prints what they found, in the form of figures.json;
`SentenceTransformer` embeds as InternVL-C does.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from sentence_transformers import SentenceTransformer

import internvl  # noqa: F401 (registers the classes, whose code the folder does not have)
from internvl.evaluation.harnesses.sentence_transformers import classification_evaluator, retrieval_evaluators


CUTS = (1, 5, 10)


def opened(paths: list[str]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def main(folder: str, images: dict[str, Any]) -> None:
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
    classes, pairs = images["classes"], images["pairs"]
    prompts = [texts[0] for texts in classes["prompts"]]
    zero_shot = classification_evaluator(opened(classes["files"]), classes["labels"], prompts)(model)
    recalls = {}
    for way, evaluator in retrieval_evaluators(opened(pairs["files"]), pairs["captions"], cuts=CUTS).items():
        figures = evaluator(model)
        recalls[way] = {f"R@{k}": figures[f"{way}_cosine_accuracy@{k}"] for k in CUTS}
    found = {"first prompt": zero_shot["zero_shot_cosine_accuracy@1"], "recalls": recalls}
    print(json.dumps({"InternVL-C": found}, default=float))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
