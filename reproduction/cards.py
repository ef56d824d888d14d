"""Writes the measured results into the front matter of the cards: `python -m internvl.reproduction cards`.

The Hub shows `model-index` of the top card. Its newer `.eval_results/*.yaml` can only name data sets of the Hub that
are registered as benchmarks, and what is measured here are generated scenes.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard import metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("reproduction", "results", "results.json")
DATASET = {
    "dataset_type": "generated-scenes",
    "dataset_name": "Generated scenes and handwriting of held-out writers",
    "dataset_split": "held-out",
}


def run(options: argparse.Namespace) -> None:
    """Writes `model-index` of every card from the results."""
    write_results(options.root or ROOT)


def write_results(root: Path) -> None:
    """Writes `model-index` of every card of a repository from its results; the rest of a card stays."""
    results = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    for folder, (name, results_of) in CARDS.items():
        card = root / folder / "README.md"
        data = metadata_load(card) or {}
        data["model-index"] = eval_results_to_model_index(name, list(results_of(results)))
        metadata_save(card, data)


def _result(task: str, task_name: str, metric: str, name: str, value: float) -> EvalResult:
    settings: dict[str, Any] = {**DATASET, "task_type": task, "task_name": task_name}
    return EvalResult(**settings, metric_type=metric, metric_name=name, metric_value=round(value, 2))


def _percent(share: float) -> float:
    return 100 * share


def _dialogue(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    report = results["dialogue"]["full"]["with_tiles"]
    shares = {"all questions": report["accuracy"]}
    shares |= {kind: part["accuracy"] for kind, part in report["by_kind"].items()}
    for name, share in shares.items():
        yield _result("image-text-to-text", "Dialogue", "accuracy", name, _percent(share))


def _contrastive(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Means over five languages, by mode."""
    task = ("zero-shot-image-classification", "Zero-shot classification", "accuracy")
    for mode, languages in results["zero_shot"]["stage2"]["accuracy"].items():
        for kind in next(iter(languages.values())):
            share = mean(accuracies[kind] for accuracies in languages.values())
            yield _result(*task, f"{kind}, {mode}", _percent(share))
    task = ("image-text-retrieval", "Retrieval", "recall_at_1")
    for mode, languages in results["retrieval"]["stage2"]["recall"].items():
        for way in ("image_to_text", "text_to_image"):
            share = mean(recalls[way]["R@1"] for recalls in languages.values())
            yield _result(*task, f"{way.replace('_', ' ')} R@1, {mode}", _percent(share))
    for language, scores in results["captioning"]["stage2"].items():
        if isinstance(scores, Mapping):
            yield _result("image-to-text", "Captions", "cider", f"CIDEr-D (best: 10), {language}", scores["cider"])


def _tower(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The tower of stage 1, which stage 2 does not change."""
    for kind, share in results["linear_probe"]["stage1"]["accuracy"].items():
        yield _result("image-classification", "Linear probe", "accuracy", kind, _percent(share))


# Folder of a card to the name of its model and what was measured of it.
CARDS = {
    "": ("InternVL-Chat, bundled", _dialogue),
    "internvl_g": ("InternVL-G, bundled", _contrastive),
    "internvit": ("InternViT, bundled", _tower),
}
