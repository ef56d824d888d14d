"""The results page of a bundled run: `python -m internvl.reproduction report RUN`.

RUN is what `python -m internvl.reproduction run` wrote. Each evaluation writes `parts/EVALUATION_STAGE.json`; from
these come `results.json`, `results.md` (tables) and the plots. Missing stages are left out.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..evaluation.captioning import evaluate_captioning
from ..evaluation.dialogue import evaluate_questions
from ..evaluation.generated import CLASSES, held_out_questions
from ..evaluation.linear_probe import evaluate_linear_probe
from ..evaluation.metrics import CUTS
from ..evaluation.retrieval import evaluate_retrieval
from ..evaluation.zero_shot import evaluate_zero_shot
from ..modeling_internvl import MODES
from ..renaming_internvl import renamed_arguments
from ..synthetic.captions import LANGUAGES
from ..synthetic.scenes import QUESTION_KINDS
from .plots import mean_and_deviation, plot_all


@renamed_arguments(probe_pictures="probe_images", pictures="images")
@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        probe_images: Images of each kind that the linear probe is fitted on.
        images: Held-out images of each kind, for the probe and for zero-shot classification.
        pairs: Held-out pairs of retrieval.
        captions: Held-out images to caption.
        questions: Held-out questions.
    """

    probe_images: int = 1500
    images: int = 500
    pairs: int = 500
    captions: int = 200
    questions: int = 500


def evaluate_tiles(model: PreTrainedModel, processor: ProcessorMixin, questions: int) -> dict[str, Any]:
    """Asks the same held-out questions "with_tiles" and with each image as "one_tile", see `evaluate_questions`."""
    asked = held_out_questions(questions)
    return {
        "with_tiles": evaluate_questions(model, processor, asked),
        "one_tile": evaluate_questions(model, processor, asked, max_num=1),
    }


def evaluate_chat(folder: Path, questions: int) -> dict[str, Any]:
    """Asks the chat model in a folder held-out questions, with tiles, see `evaluate_questions`."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return evaluate_questions(model, AutoProcessor.from_pretrained(folder), held_out_questions(questions))


def mean_recalls(folder: Path, pairs: int) -> dict[str, float]:
    """Measures R@1 of the `InternVLModel` in a folder by mode, the mean of all languages and both ways."""
    model = AutoModel.from_pretrained(folder).eval()
    recall = evaluate_retrieval(model, AutoProcessor.from_pretrained(folder), pairs)["recall"]
    return {
        mode: mean(way["R@1"] for ways in languages.values() for way in ways.values())
        for mode, languages in recall.items()
    }


@dataclass(frozen=True)
class StageEvaluation:
    """An evaluation, and the folders of the stages that have it."""

    stages: tuple[str, ...]
    measure: Callable[[PreTrainedModel, ProcessorMixin, Sizes], dict[str, Any]]


RENAMED_KEYS = {"pictures": "images", "train_pictures": "train_images"}
CHATS = ("full", "simple")
EVALUATIONS = {
    "linear_probe": StageEvaluation(
        ("stage1", *CHATS),  # stage 2 does not change the tower
        lambda model, processor, sizes: evaluate_linear_probe(model, processor, sizes.probe_images, sizes.images),
    ),
    "zero_shot": StageEvaluation(
        ("stage1", "stage2"), lambda model, processor, sizes: evaluate_zero_shot(model, processor, sizes.images)
    ),
    "retrieval": StageEvaluation(
        ("stage1", "stage2"), lambda model, processor, sizes: evaluate_retrieval(model, processor, sizes.pairs)
    ),
    "captioning": StageEvaluation(
        ("stage2",), lambda model, processor, sizes: evaluate_captioning(model, processor, sizes.captions)
    ),
    "dialogue": StageEvaluation(
        CHATS, lambda model, processor, sizes: evaluate_tiles(model, processor, sizes.questions)
    ),
}


def evaluate_run(
    run: Path, output: Path, sizes: Sizes | None = None, resume: bool = False, ablation: Path | None = None
) -> dict[str, Any]:
    """Evaluates every stage in the folder of a run and writes the page; `resume` keeps finished evaluations.

    `ablation` is the report of `python -m internvl.reproduction ablation`.

    Returns:
        The reports by evaluation and stage, and under "ablation" that of the ablation.
    """
    (output / "parts").mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, evaluation in EVALUATIONS.items():
        for stage in evaluation.stages:
            if not (run / stage / "config.json").exists():
                continue
            file = output / "parts" / f"{name}_{stage}.json"
            if not (resume and file.exists()):
                _write(file, _evaluate(name, run / stage, sizes or Sizes()))
            text = file.read_text(encoding="utf-8")
            results.setdefault(name, {})[stage] = json.loads(text, object_hook=_with_new_keys)
    if ablation is not None:
        results["ablation"] = json.loads(ablation.read_text(encoding="utf-8"))
    _write(output / "results.json", results)
    (output / "results.md").write_text("\n".join(tables(results)) + "\n", encoding="utf-8")
    plot_all(results, run, output)
    return results


def _evaluate(name: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    auto_class: Any = AutoModelForImageTextToText if folder.name in CHATS else AutoModel
    model = auto_class.from_pretrained(folder).eval()
    return EVALUATIONS[name].measure(model, AutoProcessor.from_pretrained(folder), sizes)


def _with_new_keys(report: dict[str, Any]) -> dict[str, Any]:
    """Renames the keys of reports that version 1.0 wrote."""
    return {RENAMED_KEYS.get(key, key): value for key, value in report.items()}


def _write(file: Path, report: dict[str, Any]) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the tables
def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def markdown_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table under its title."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return [f"**{title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]


def tables(results: dict[str, Any]) -> list[str]:
    """Returns the lines of the page, one table for each evaluation."""
    lines: list[str] = []
    for name, make in _TABLES.items():
        if name in results:
            lines += make(results[name])
    return lines


def _probe_table(report: dict[str, Any]) -> list[str]:
    rows = [["chance", *(_percent(next(iter(report.values()))["chance"][kind]) for kind in CLASSES)]]
    rows += [
        [f"tower of {stage}", *(_percent(part["accuracy"][kind]) for kind in CLASSES)]
        for stage, part in report.items()
    ]
    return markdown_table("Linear probe of frozen InternViT features", ["", *CLASSES], rows)


def _rows_by_language(
    report: dict[str, Any], key: str, values_of: Callable[[Any], list[float]]
) -> Iterator[list[str]]:
    """Yields for each stage and mode a row of the mean of all languages, then one of each."""
    for stage, part in report.items():
        for mode, languages in part[key].items():
            found = {language: values_of(measured) for language, measured in languages.items()}
            averages = [mean(values) for values in zip(*found.values(), strict=True)]
            for language, values in {"mean": averages, **found}.items():
                yield [f"{mode}, {stage}", language, *map(_percent, values)]


def _zero_shot_table(report: dict[str, Any]) -> list[str]:
    rows = list(_rows_by_language(report, "accuracy", lambda kinds: [kinds[kind] for kind in CLASSES]))
    chance = next(iter(report.values()))["chance"]
    rows.insert(0, ["chance", "", *(_percent(chance[kind]) for kind in CLASSES)])
    return markdown_table("Zero-shot classification", ["", "prompts", *CLASSES], rows)


def _retrieval_table(report: dict[str, Any]) -> list[str]:
    columns = [(way, f"R@{cut}") for way in ("image_to_text", "text_to_image") for cut in CUTS]
    rows = list(_rows_by_language(report, "recall", lambda ways: [ways[way][cut] for way, cut in columns]))
    head = [f"{way.replace('_', ' ')} {cut}" for way, cut in columns]
    pairs = next(iter(report.values()))["pairs"]
    return markdown_table(f"Retrieval among {pairs} pairs", ["", "captions", *head], rows)


def _captioning_table(report: dict[str, Any]) -> list[str]:
    (part,) = report.values()
    columns = {
        "precision": "facts said that are right",
        "recall": "facts that are said",
        "exact": "all facts and no other",
    }
    rows = [
        [language, f"{part[language]['cider']:.2f}", *(_percent(part[language][name]) for name in columns)]
        for language in LANGUAGES
    ]
    head = ["captions", "CIDEr (best: 10)", *columns.values()]
    return markdown_table(f"Captions of {part['images']} images", head, rows)


def _dialogue_table(report: dict[str, Any]) -> list[str]:
    rows = [
        [f"{stage}, {tiles.replace('_', ' ')}", *(_accuracies(part[tiles]))]
        for tiles in ("with_tiles", "one_tile")
        for stage, part in report.items()
    ]
    kinds = next(iter(report.values()))["with_tiles"]["by_kind"]
    commonest = (_percent(kind["most_common_answer"]) for kind in kinds.values())
    rows.append(["always the commonest answer", *commonest, ""])
    asked = next(iter(report.values()))["with_tiles"]["questions"]
    head = ["", *(kind.replace("_", " ") for kind in kinds), "all"]
    return markdown_table(f"Dialogue, {asked} questions", head, rows)


def _accuracies(report: dict[str, Any]) -> list[str]:
    return [*(_percent(kind["accuracy"]) for kind in report["by_kind"].values()), _percent(report["accuracy"])]


def _ablation_table(report: dict[str, Any]) -> list[str]:
    kinds = [kind for kind in QUESTION_KINDS if kind in next(iter(next(iter(report.values())).values()))["by_kind"]]
    rows = []
    for variant, seeds in report.items():
        cells = [[part["by_kind"][kind]["accuracy"] for part in seeds.values()] for kind in kinds]
        cells.append([part["accuracy"] for part in seeds.values()])
        cells += [[part["recall_at_1"][mode] for part in seeds.values()] for mode in MODES]
        percents = ((100 * x for x in mean_and_deviation(cell)) for cell in cells)
        rows.append([variant, *("{:.1f} \u00b1 {:.1f} %".format(*cell) for cell in percents)])
    seeds_used = len(next(iter(report.values())))
    head = ["", *(kind.replace("_", " ") for kind in kinds), "all", *(f"R@1 of {mode}" for mode in MODES)]
    title = f"Ablation: dialogue and retrieval, {seeds_used} seeds (mean and standard deviation)"
    return markdown_table(title, head, rows)


_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "linear_probe": _probe_table,
    "zero_shot": _zero_shot_table,
    "retrieval": _retrieval_table,
    "captioning": _captioning_table,
    "dialogue": _dialogue_table,
    "ablation": _ablation_table,
}


def run(options: argparse.Namespace) -> None:
    """Evaluates a run, as the command line says."""
    if not options.run.is_dir():
        raise FileNotFoundError(f"There is no folder `{options.run}`.")
    output = options.output or options.run / "results"
    evaluate_run(options.run, output, resume=options.resume, ablation=options.ablation)
