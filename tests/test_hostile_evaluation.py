"""Files of evaluation that somebody else wrote, with every value in turn replaced by one that nobody expects: each is
read, or refused by a `ValueError`; nothing else comes out, and nothing hangs.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl.evaluation.card import card
from internvl.evaluation.compare import compare_results, comparison_as_json, format_comparison, read_results
from internvl.evaluation.data.annotations import captioned_items, read_annotations
from internvl.evaluation.data.folders import class_names_beside
from internvl.evaluation.data.opening import open_data
from internvl.evaluation.grounding import read_expressions
from internvl.evaluation.harness_results import read_harness_results, read_harness_samples
from internvl.evaluation.page import report_and_samples, write_page
from internvl.evaluation.protocols.protocol import Protocol, read_protocol
from internvl.evaluation.reports import metrics_of, read_report
from internvl.evaluation.sample_images import SampleImages
from internvl.evaluation.samples import read_samples
from internvl.rows.json_files import is_finite_number

from .fixtures_pairs import png


ODD = [
    *(None, True, -1, 2.5, float("nan"), 10**400, 1e308, "", "\u00b2", "a\nb\x1b[31m", "\ud800", "a" * 5000, "\0"),
    *("{x}", "../..", [], [1], ["x", ["y"]], {}, {"a": 1}),
]
DEEP = "[" * 100_000 + "]" * 100_000


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*place, key))


def spoiled(content: Any) -> Iterator[Any]:
    """The content with each of its values replaced, and with each left out."""
    for place in places(content):
        for odd in ODD:
            if not place:
                yield odd
                continue
            changed = copy.deepcopy(content)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = odd
            yield changed
        if place:
            del holder[place[-1]]
            yield changed


def survives(content: Any, read: Callable[[Any], object]) -> int:
    """Reads all spoiled versions; returns how many were refused."""
    read(content)  # else all the others may be refused for a reason that has nothing to do with them
    refused = 0
    for changed in spoiled(content):
        try:
            read(changed)
        except (ValueError, OSError):
            refused += 1
    return refused


REPORT = {
    "task": "zero_shot",
    "model": "m",
    "title": "t",
    "protocol": "cifar10",
    "samples": "r.samples.jsonl",
    "settings": {"limit": 3, "images": 5, "published_images": 10, "image_size": 224, "published_image_size": 448},
    "metrics": {"InternVL-C/top-1": {"value": 0.5, "interval": [0.4, 0.6], "samples": 5, "scale": 1.0, "notes": []}},
    "published": {"InternVL-C": {"top-1": 3.0}, "source": "s"},
}
SAMPLE = {"cluster": "c", "image": "i", "expected": "e", "answer": "z", "question": "q"}
SAMPLES = [
    {"settings": {"task": "x", "model": "m"}},
    {"id": "a", **SAMPLE, "scores": {"acc": 1, "b": 0.5}},
    {"id": "b", **SAMPLE, "scores": {"acc": 0, "b": 0.25}},
]
OWN_CLASSES = {"task": "zero_shot", "data": {"layout": "class_folders", "folders": ["classes"], "count": 2}}
PROTOCOLS = [
    {
        **OWN_CLASSES,
        "title": "t",
        "image_size": 224,
        "frames": 1,
        "modes": ["InternVL-C"],
        "options": {"rerank": 3},
        "prompts": {"templates": ["a {c}"], "language": "en"},
        "published": {"source": "s", "InternVL-C": {"top-1": 3.0}},
    },
    {
        "task": "retrieval",
        "data": {"layout": "captions", "folders": ["captions"], "annotations": ["{language}.json"], "images": ["."]},
        "prompts": {"language": "en"},
    },
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes JSON, or as lines where the name says so."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = content if isinstance(content, list) else [content]
        text = "".join(f"{json.dumps(row)}\n" for row in rows) if name.endswith(".jsonl") else json.dumps(content)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Classes and captions."""
    for name in ("classes/a/0.png", "classes/b/1.png", "captions/0.png", "captions/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    rows = [{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": ["b", "c"]}]
    (tmp_path / "captions" / "en.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["classes", "captions"])
def test_protocols(protocol, write, images):
    assert survives(protocol, lambda content: open_data(read_protocol(write("p.json", content)), str(images))) > 100


def test_reports_and_pages_of_them(write, tmp_path):
    def show(content):
        report, samples = report_and_samples(write("r.json", content))
        images = SampleImages({**report["settings"], "task": report["task"]}, tmp_path, None)
        write_page(report, samples, images, tmp_path / "r.html")
        return card([read_report(tmp_path / "r.json")])

    write("r.samples.jsonl", SAMPLES)
    assert survives(REPORT, show) > 100


def test_results_of_samples_and_comparisons_with_them(write):
    good = read_results(write("good.jsonl", SAMPLES))

    def compare(content):
        path = write("s.jsonl", content)
        metrics_of(read_samples(path)[1])
        results = read_results(path)
        (rows,) = compare_results([(good, results)], 2.0)
        format_comparison(rows, 2.0)
        json.dumps([comparison_as_json(row) for row in rows], allow_nan=False)

    assert survives(SAMPLES, compare) > 100


ANNOTATIONS = {
    "coco": {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]},
    "karpathy": {"images": [{"filename": "0.png", "split": "test", "sentences": [{"raw": "a"}]}]},
    "rows": [{"image": "0.png", "caption": ["a", "b"]}, {"image": "1.png", "caption": "b"}],
    "msr-vtt": {"videos": [{"video_id": "0.png"}], "sentences": [{"video_id": "0.png", "caption": "x"}]},
}


@pytest.mark.parametrize("layout", ANNOTATIONS)
def test_annotations(layout, write, images):
    def read(content):
        return captioned_items(read_annotations(write("a.json", content)), images / "captions")

    assert survives(ANNOTATIONS[layout], read) > 40


def test_names_of_classes_and_expressions(write, images):
    expression = {"image": "0.png", "sent": "x", "bbox": [0, 0, 1, 1], "width": 2, "height": 2}
    assert survives(expression, lambda row: read_expressions(write("e.jsonl", row), images / "captions")) > 50
    (images / "images" / "chair").mkdir(parents=True)
    (images / "images" / "chair" / "1.png").write_bytes(png())

    def objectnet(content):
        names = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
        for name, part in zip(names, content if isinstance(content, list) else [], strict=True):
            write(f"mappings/{name}", part)
        return open_data(Protocol("objects", "zero_shot", {"layout": "objectnet"}), str(images))

    assert survives([{"chair": "Chair"}, {"Chair": "folding chair"}], objectnet) > 20
    names = lambda content: class_names_beside(write("names/classnames.json", content).parent, ["a", "b"])  # noqa: E731
    assert survives({"a": "x", "b": "y"}, names) > 20


HARNESSES = {
    "lm-eval": {
        "results": {"t": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}},
        "config": {"model": "hf", "model_args": "pretrained=x"},
        "n-samples": {"t": {"effective": 5}},
    },
    "MTEB": {"scores": {"test": [{"hf_subset": "a", "ndcg_at_10": 0.5}]}, "task_name": "t", "mteb_version": "2"},
    "clip-benchmark": {
        "metrics": {"acc1": 0.5},
        "dataset": "wds/imagenet1k",
        "pretrained": "x",
        "task": "zeroshot_classification",
        "model": "InternVL-G",
        "language": "en",
    },
}


@pytest.mark.parametrize("harness", HARNESSES)
def test_results_of_harnesses(harness, write):
    assert survives(HARNESSES[harness], lambda content: card(read_harness_results(write("h.json", content)))) > 40
    row = {"doc_id": 1, "filtered_resps": ["a"], "doc": {"image": "i", "question": "q"}, "metrics": ["acc"], "acc": 1}
    assert survives(row, lambda content: read_harness_samples(write("h.jsonl", content)))


def test_a_description_of_embeddings(write, tmp_path):
    files = pytest.importorskip("internvl.evaluation.vectors.files")
    description = files.Description("m", "InternVL-C", "float16", 8, 1, 10, 1, "digest")
    content = json.loads(json.dumps(vars(description)))

    def read(content):
        write("embeds/index.json", content)
        return files.EmbeddingFolder(tmp_path / "embeds").unfinished_parts()

    assert survives(content, read) > 80
    write("embeds/index.json", content)
    assert survives({"blocks": 1, "rows": 3}, lambda done: read_done(files, write, tmp_path, done)) > 20


def read_done(files, write, tmp_path, done):
    write("embeds/done/000000.json", done)
    return files.EmbeddingFolder(tmp_path / "embeds").is_done(0)


def test_files_that_are_nested_deeply_are_refused(write, images):
    (images / "names").mkdir()
    (images / "names" / "classnames.json").write_text(DEEP)
    (images / "deep.json").write_text(DEEP)
    with pytest.raises(ValueError, match="no JSON"):
        class_names_beside(images / "names", ["a"])
    for read in (read_protocol, read_report, read_annotations, read_harness_results):
        with pytest.raises(ValueError, match="no JSON"):
            read(images / "deep.json")


def test_numbers_without_use_are_none():
    assert is_finite_number(0.5)
    assert is_finite_number(10**20)
    assert not any(map(is_finite_number, (float("nan"), float("inf"), 10**400, 1e308, "1", None)))
