"""MTEB on generated images: `python in_mteb.py FOLDER IMAGES.json OUT`, in MTEB's own environment.

FOLDER holds the checkpoint, IMAGES.json is of figures.py. MTEB writes its results below OUT; prints by mode what it
found, in the form of figures.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mteb

from internvl.evaluation.harnesses.mteb import ImageClassification, ImageTextRetrieval, internvl_meta


CUTS = (1, 5, 10)


def tasks_of(images: dict[str, Any]) -> dict[str, Any]:
    classes, pairs = images["classes"], images["pairs"]
    prompts = [texts[0] for texts in classes["prompts"]]
    return {
        "first prompt": ImageClassification("GeneratedClasses", classes["files"], classes["labels"], prompts),
        "image_to_text": ImageTextRetrieval("GeneratedI2T", pairs["files"], pairs["captions"], "text"),
        "text_to_image": ImageTextRetrieval("GeneratedT2I", pairs["files"], pairs["captions"], "image"),
    }


def main(folder: str, images: Path, out: Path) -> None:
    found: dict[str, Any] = {}
    for mode in ("InternVL-C", "InternVL-G"):
        tasks = tasks_of(json.loads(images.read_text()))
        result = mteb.evaluate(
            internvl_meta(folder, mode, dtype="float32"),
            list(tasks.values()),
            cache=mteb.ResultCache(out),
            encode_kwargs={"batch_size": 16},
            overwrite_strategy="always",
        )
        scores = {task.task_name: task.scores["test"][0] for task in result.task_results}
        scores = {name: scores[task.metadata.name] for name, task in tasks.items()}
        recalls = {way: {f"R@{k}": scores[way][f"hit_rate_at_{k}"] for k in CUTS} for way in list(tasks)[1:]}
        found[mode] = {"first prompt": scores["first prompt"]["accuracy"], "recalls": recalls}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
