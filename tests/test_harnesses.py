"""Harnesses of others: their metrics on the features of ours, our model in their code, and the results that they
write. What runs in environments of their own is in tests/engines.
"""

import importlib
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

from internvl.evaluation.card import card_rows
from internvl.evaluation.embeddings import embed_images, embed_texts
from internvl.evaluation.harness_results import (
    benchmark_commands,
    harness_benchmarks,
    harness_command,
    main,
    paper_configuration,
    read_harness_results,
    read_harness_samples,
    write_harness_reports,
)
from internvl.evaluation.harnesses import clip_benchmark, harness
from internvl.evaluation.harnesses.clip_benchmark import MODEL_NAMES, as_float, load_internvl
from internvl.evaluation.harnesses.tasks import questions
from internvl.evaluation.metrics import CUTS, accuracy, recalls_both_ways
from internvl.evaluation.reports import read_report
from internvl.evaluation.samples import read_samples
from internvl.evaluation.zero_shot import embed_classes, ensemble
from internvl.extras import MissingLibraryError

from .test_pair_evaluations import few_images, tiny_model, tiny_processor


ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "evaluation" / "harnesses" / "tasks"


@pytest.fixture(autouse=True)
def _numbers_of_one_element(monkeypatch):
    """As the adapter does: NumPy 2.4 refuses `float` of the arrays that clip-benchmark gives it."""
    monkeypatch.setattr(zeroshot_classification, "float", as_float, raising=False)


# --------------------------------------------------------------------------------- clip-benchmark on the same features
class Features(torch.nn.Module):
    """A model whose images are their features, and whose texts are numbers of features."""

    def __init__(self, texts: torch.Tensor) -> None:
        super().__init__()
        self.texts = texts

    def encode_image(self, rows):
        return rows

    def encode_text(self, numbers):
        return self.texts[numbers]


class Batches(list):
    """Batches of a data set with as many classes."""

    def __init__(self, batches, classes=()):
        super().__init__(batches)
        self.dataset = self
        self.classes = classes


def theirs(model, loader, evaluate, tokenizer=torch.tensor, **arguments):
    return evaluate(model, loader, tokenizer, device="cpu", amp=False, **arguments)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def features(seed: int, rows: int, width: int, kind: int) -> torch.Tensor:
    """Random rows; some kinds nearly equal each other, or of very different lengths."""
    found = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    if kind == 1:
        found = found[:1] + 0.05 * found
    return found * 10.0 ** (torch.arange(rows) % 7 - 3)[:, None] if kind == 2 else found


@pytest.mark.parametrize("seed", range(100))
def test_zero_shot_accuracy_is_that_of_clip_benchmark_on_the_same_features(seed):
    random = Random(seed)
    counts = [random.randint(1, 4) for _ in range(random.randint(2, 12))]
    width, images = random.choice([2, 8, 33]), random.randint(1, 60)
    texts, rows = features(seed, sum(counts), width, seed % 3), features(seed + 500, images, width, seed % 3)
    labels = torch.tensor([random.randrange(len(counts)) for _ in range(images)])
    starts = [sum(counts[:number]) for number in range(len(counts))]
    templates = {str(n): list(range(start, start + counts[n])) for n, start in enumerate(starts)}
    loader = Batches([(rows[:7], labels[:7]), (rows[7:], labels[7:])], classes=list(templates))
    evaluate = zeroshot_classification.evaluate
    found = theirs(Features(texts), loader, evaluate, classnames=list(templates), templates=templates)
    of_classes = ensemble(unit(texts), [n for n, count in enumerate(counts) for _ in range(count)])
    assert accuracy(unit(rows), of_classes, labels.tolist()) == pytest.approx(found["acc1"])


@pytest.mark.parametrize("seed", range(100))
def test_recalls_are_those_of_clip_benchmark_on_the_same_features(seed):
    random = Random(seed)
    counts = [random.randint(1, 5) for _ in range(random.randint(10, 40))]
    width = random.choice([2, 8, 33])
    texts, rows = features(seed, sum(counts), width, seed % 3), features(seed + 500, len(counts), width, seed % 3)
    numbers = iter(range(sum(counts)))
    captions = [[next(numbers) for _ in range(count)] for count in counts]
    loader = [(rows[start : start + 6], captions[start : start + 6]) for start in range(0, len(counts), 6)]
    found = theirs(Features(texts), loader, zeroshot_retrieval.evaluate, recall_k_list=CUTS)
    owners = [number for number, count in enumerate(counts) for _ in range(count)]
    ours = recalls_both_ways(unit(rows), unit(texts), list(range(len(texts))), CUTS, owners)
    for k in CUTS:
        assert ours["image_to_text"][f"R@{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"])
        assert ours["text_to_image"][f"R@{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"])


# ----------------------------------------------------------------------------------------- our model in clip-benchmark
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["InternVL-C", "InternVL-G", "internvl_g_retrieval_hf"])
def test_clip_benchmark_measures_what_this_package_measures(name, checkpoint):
    images = [*few_images(12)]
    prompts = {"a star": ["a star", "the star"], "ring": ["a ring"], "7": ["7", "the digit seven"]}
    captions = [[f"a picture of {n}", f"{n} {n}"] for n in range(len(images))]
    model, prepare, tokenize = load_internvl(name, str(checkpoint))
    labels = [n % 3 for n in range(len(images))]
    pixels = torch.stack([prepare(image) for image in images])
    loader = Batches([(pixels, torch.tensor(labels))], classes=list(prompts))
    arguments = {"classnames": list(prompts), "templates": prompts}
    found = theirs(model, loader, zeroshot_classification.evaluate, tokenize, **arguments)
    found |= theirs(model, [(pixels, captions)], zeroshot_retrieval.evaluate, tokenize, recall_k_list=[1, 5])

    mode = MODEL_NAMES[name][0]
    embeds = embed_images(tiny_model(), tiny_processor(), images, mode)
    of_classes = embed_classes(tiny_model(), tiny_processor(), list(prompts.values()))
    assert found["acc1"] == pytest.approx(accuracy(embeds, of_classes, labels))
    texts = [text for of_image in captions for text in of_image]
    owners = [number for number, of_image in enumerate(captions) for _ in of_image]
    recalls = recalls_both_ways(embeds, embed_texts(tiny_model(), tiny_processor(), texts), texts, (1, 5), owners)
    for k in (1, 5):
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(recalls["image_to_text"][f"R@{k}"])
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(recalls["text_to_image"][f"R@{k}"])


def test_names_of_the_published_code_decide_how_images_are_prepared(checkpoint):
    image = next(few_images(1))  # 60 x 70
    prepared = {
        name: load_internvl(name, str(checkpoint))[1](image)
        for name in ("InternVL-C", "internvl_c_retrieval_hf", "internvl_c_classification")
    }
    assert torch.equal(prepared["InternVL-C"], prepared["internvl_c_retrieval_hf"])  # the checkpoint squashes
    assert not torch.equal(prepared["InternVL-C"], prepared["internvl_c_classification"])
    processor = partial(tiny_processor(), mode="contrastive", return_tensors="pt")
    assert torch.equal(
        prepared["internvl_c_classification"], processor(images=[image], resize_mode="crop")["pixel_values"][0]
    )


def test_a_model_that_does_not_fit_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"is one of InternVL-C, InternVL-G, .*not 'ViT-B-32'"):
        load_internvl("ViT-B-32", str(checkpoint))
    tiny_model(0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"InternVL-C .*but `--model InternVL-G` needs an InternVL-G"):
        load_internvl("InternVL-G", str(tmp_path))


def test_the_command_adds_the_model_type_to_that_of_clip_benchmark(monkeypatch):
    """Which imports open_clip and torchvision; stand-ins show what it is handed."""
    cli, models = type(sys)("cli"), type(sys)("models")
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]
    seen = []
    cli.main = lambda: seen.append((sys.argv[1:], models.MODEL_TYPES, models.TYPE2FUNC["internvl"]))
    for name, module in {"cli": cli, "models": models}.items():
        monkeypatch.setitem(sys.modules, f"clip_benchmark.{name}", module)
        monkeypatch.setattr(f"clip_benchmark.{name}", module, raising=False)
    monkeypatch.setattr(sys, "argv", ["clip"])
    assert clip_benchmark.main(["eval", "--dtype", "float32", "--model_type", "internvl", "--no_amp"]) == 0
    ((arguments, types, load),) = seen
    assert arguments == ["eval", "--model_type", "internvl", "--no_amp"]
    assert types == ["open_clip", "internvl"]
    assert load.keywords == {"dtype": "float32"}


# ------------------------------------------------------------------------------- our model in MTEB, which is not here
class Record(dict):
    """What a class of MTEB was made with."""

    def __init__(self, **arguments):
        super().__init__(arguments)


class Rows(list):
    """A data loader: batches of a data set with columns."""

    def __init__(self, batches):
        super().__init__(batches)
        self.dataset = SimpleNamespace(features=dict.fromkeys(batches[0]))


@pytest.fixture
def in_mteb(monkeypatch):
    """The adapter over stand-ins for MTEB's classes; tests/engines runs it in MTEB."""
    task = type("Task", (), {})
    names = {
        "": {},
        ".abstasks": {},
        ".abstasks.retrieval": {"AbsTaskRetrieval": task},
        ".abstasks.task_metadata": {"TaskMetadata": Record},
        ".abstasks.zeroshot_classification": {"AbsTaskZeroShotClassification": task},
        ".models": {},
        ".models.abs_encoder": {"AbsEncoder": object},
        ".models.model_meta": {"ModelMeta": Record},
    }
    for name, content in names.items():
        module = ModuleType(f"mteb{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"mteb{name}", module)
    adapter = "internvl.evaluation.harnesses.mteb"
    yield importlib.import_module(adapter)
    sys.modules.pop(adapter)


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
def test_mteb_gets_the_embeddings_of_this_package(mode, in_mteb, checkpoint):
    meta = in_mteb.internvl_meta(checkpoint, mode)
    assert meta["name"] == f"internvl/{checkpoint.name}"
    assert meta["embed_dim"] == 12
    encoder = meta["loader"](meta["name"], revision="local", **meta["loader_kwargs"], **meta["experiment_kwargs"])
    images, texts = [*few_images(5)], ["a star", "7", "a ring", "the digit one", "a red ring"]
    batches = [{"image": images[:3], "text": texts[:3]}, {"image": images[3:], "text": texts[3:]}]
    of_images = embed_images(tiny_model(), tiny_processor(), images, mode)
    of_texts = embed_texts(tiny_model(), tiny_processor(), texts)
    for columns, expected in ((["image"], of_images), (["text"], of_texts), (["image", "text"], of_images + of_texts)):
        rows = Rows([{column: batch[column] for column in columns} for batch in batches])
        found = encoder.encode(rows, batch_size=2, task_metadata=None, hf_split="test", hf_subset="default")
        torch.testing.assert_close(found, unit(expected))
    with pytest.raises(ValueError, match="embeds texts and images, but the task has audio"):
        encoder.encode(Rows([{"audio": []}]))
    with pytest.raises(ValueError, match="`mode` is one of InternVL-C, InternVL-G"):
        in_mteb.internvl_meta(checkpoint, "InternVL-D")


def test_mteb_reads_no_results_of_other_weights_of_the_same_name(in_mteb, checkpoint, tmp_path):
    """It keeps what it measured by name, revision and experiment, and does not measure it again."""
    shutil.copytree(checkpoint, tmp_path / "model")
    before = in_mteb.internvl_meta(tmp_path / "model")
    assert in_mteb.internvl_meta(tmp_path / "model") == before
    assert (
        in_mteb.internvl_meta(tmp_path / "model", dtype="float32")["experiment_kwargs"] != before["experiment_kwargs"]
    )
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    assert in_mteb.internvl_meta(tmp_path / "model")["revision"] != before["revision"]


def test_tasks_of_mteb_over_own_images(in_mteb, tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, image in zip(paths, few_images(3), strict=True):
        image.save(path)
    captions = [["a", "b"], ["c"], ["d"]]
    task = in_mteb.ImageTextRetrieval("Own", paths, captions, to="text")
    split = task.dataset["default"]["test"]
    assert split["queries"]["id"] == ["image0", "image1", "image2"]
    assert split["queries"][0]["image"].size == (60, 70)
    assert split["corpus"]["text"] == ["a", "b", "c", "d"]
    assert split["relevant_docs"]["image0"] == {"text0-0": 1, "text0-1": 1}
    split = in_mteb.ImageTextRetrieval("Own", paths, captions, to="image").dataset["default"]["test"]
    assert split["relevant_docs"] == {f"text{n}-{k}": {f"image{n}": 1} for n, k in ((0, 0), (0, 1), (1, 0), (2, 0))}
    task = in_mteb.ImageClassification("Own", [*few_images(3)], [0, 1, 1], ["a star", "a ring"])
    assert task.dataset["test"]["label"] == [0, 1, 1]
    assert task.get_candidate_labels() == ["a star", "a ring"]
    with pytest.raises(ValueError, match='`to` is "text" or "image"'):
        in_mteb.ImageTextRetrieval("Own", paths, captions, to="video")


def test_a_harness_that_is_not_there_is_one_line_that_says_how_to_install_it():
    expected = r"^This needs no_such, .*: `pip install no-such`\.$"
    with pytest.raises(MissingLibraryError, match=expected), harness("no-such"):
        import no_such.part  # noqa: F401


# ------------------------------------------------------------------------------------------------ what harnesses wrote
CLIP = {
    "dataset": "flickr30k",
    "model": "internvl_g_retrieval_hf",
    "pretrained": "./InternVL-14B-224px",
    "task": "zeroshot_retrieval",
    "metrics": {"image_retrieval_recall@1": 0.85, "text_retrieval_recall@1": 0.957},
    "language": "en",
}
MTEB = {
    "dataset_revision": "local",
    "task_name": "GeneratedI2T",
    "mteb_version": "2.26.24",
    "scores": {
        "test": [
            {
                "ndcg_at_10": 0.53,
                "hit_rate_at_1": 0.4,
                "nauc_recall_at_1_max": 0.3,
                "main_score": 0.4,
                "hf_subset": "default",
                "languages": ["eng-Latn"],
            }
        ]
    },
}
LM_EVAL = {
    "results": {
        "internvl_lm_eval": {
            "alias": "internvl_lm_eval",
            "sample_len": 84,
            "exact_match,none": 0.75,
            "exact_match_stderr,none": 0.0204,
        }
    },
    "n-samples": {"internvl_lm_eval": {"original": 84, "effective": 84}},
    "config": {"model": "hf-multimodal", "model_args": {"pretrained": "FOLDER", "dtype": "float32"}},
    "lm_eval_version": "0.4.13",
}
LMMS_EVAL = {
    "results": {
        "textvqa_val": {
            "alias": "textvqa_val",
            "exact_match,none": 0.57,
            "exact_match_stderr,none": "N/A",
            "exact_match_stderr_clt,none": 0.1,
            "submission,none": [],
        }
    },
    "n-samples": {"textvqa_val": {"original": 5000, "effective": 5000}},
    "config": {"model": "huggingface", "model_args": "pretrained=FOLDER,device=cpu"},
    "lmms_eval_version": "0.7.3",
}


def written(folder: Path, content: object, name: str = "results.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def values(report: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in report["metrics"].items()}


def test_results_of_clip_benchmark_stand_beside_the_protocol_that_they_are_of(tmp_path):
    (report,) = read_harness_results(written(tmp_path, CLIP))
    assert (report["task"], report["protocol"]) == ("retrieval", "flickr30k")
    assert values(report) == {"InternVL-G/text_to_image/R@1": 0.85, "InternVL-G/image_to_text/R@1": 0.957}
    assert report["published"]["InternVL-G"]["image_to_text/R@1"] == 95.7
    one = {**CLIP, "dataset": "wds/imagenet1k", "language": "jp", "task": "zeroshot_classification"}
    one |= {"model": "InternVL-C", "metrics": {"acc1": 0.6, "acc5": float("nan"), "mean_per_class_recall": 0.5}}
    (report,) = read_harness_results(written(tmp_path, one))
    assert report["protocol"] == "imagenet-1k-ja"
    assert values(report) == {
        "InternVL-C/top-1": 0.6,
        "InternVL-C/mean per class": 0.5,
    }  # what is no number is left out
    assert report["published"]["InternVL-C"]["top-1"] == 61.5
    assert ("61.5", "60.0") in {(row[4], row[2]) for row in card_rows(report)}
    (report,) = read_harness_results(written(tmp_path, {**CLIP, "dataset": "flickr30k", "language": "fr"}))
    assert report["published"] is None  # captions of another language


def test_results_of_mteb_are_read(tmp_path):
    written(tmp_path, {"name": "internvl/tiny", "experiment_kwargs": {"mode": "InternVL-G"}}, "model_meta.json")
    (report,) = read_harness_results(written(tmp_path, MTEB))
    assert (report["task"], report["protocol"], report["model"]) == ("retrieval", "GeneratedI2T", "internvl/tiny")
    assert values(report) == {"nDCG@10": 0.53, "R@1": 0.4, "main score": 0.4}
    assert report["settings"]["mode"] == "InternVL-G"


def test_results_of_lm_eval_have_the_interval_of_its_standard_error(tmp_path):
    (report,) = read_harness_results(written(tmp_path, LM_EVAL))
    assert report["settings"]["harness"] == "lm-eval"
    assert report["model"] == "FOLDER"
    assert report["metrics"].keys() == {"exact_match"}
    metric = report["metrics"]["exact_match"]
    assert metric["interval"] == pytest.approx([0.75 - 1.96 * 0.0204, 0.75 + 1.96 * 0.0204], abs=1e-5)
    assert metric["samples"] == 84


def config_of_the_paper(folder: Path, **changes) -> Path:
    config = {
        "connector": "queries_and_patches",
        "text_config": {"model_type": "llama", "hidden_size": 5120},
        "vision_config": {"image_size": 336},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    written(folder, config, "config.json")
    return folder


def test_results_of_lmms_eval_stand_beside_the_figure_of_the_models_configuration(tmp_path):
    path = written(tmp_path, LMMS_EVAL)
    (report,) = read_harness_results(path)
    assert report["settings"]["harness"] == "lmms-eval"
    assert report["title"] == "TextVQA"
    assert report["metrics"] == {"exact_match": {"value": 0.57, "interval": None, "samples": 5000, "scale": 100.0}}
    assert report["published"] is None  # FOLDER is not there
    model = config_of_the_paper(tmp_path / "model")
    LMMS = {**LMMS_EVAL, "config": {"model_args": f"pretrained={model},device=cpu"}}
    (report,) = read_harness_results(written(tmp_path, LMMS))
    assert report["published"] == {"source": "table 9, QLLaMA, Vicuna-13B, 336 px", "exact_match": 61.5}
    assert [row[:5] for row in card_rows(report)] == [("TextVQA", "exact_match", "57.0", "", "61.5")]
    for changes in ({"connector": "patches"}, {"vision_config": {"image_size": 224}}):
        found = paper_configuration(config_of_the_paper(tmp_path / "model", **changes))
        assert found not in (None, "QLLaMA, Vicuna-13B, 336 px")
    assert paper_configuration(config_of_the_paper(model, text_config={"model_type": "qwen2"})) is None


@pytest.mark.parametrize("content", [[], {"metrics": {}}, {"results": {}, "config": {}}, {"results": 3, "config": {}}])
def test_other_files_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="holds no results of clip-benchmark, MTEB, lm-eval or lmms-eval"):
        read_harness_results(written(tmp_path, content))


def test_what_is_no_json_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "results.json is no JSON" in line


SAMPLE = {
    "doc_id": 0,
    "doc": {"image": "shapes.png", "question": "Where is the green ring?", "answer": "bottom"},
    "target": "bottom",
    "resps": [["bottom"]],
    "filtered_resps": ["bottom"],
    "metrics": ["exact_match"],
    "exact_match": 1.0,
    "doc_hash": "b425",
}
NAMES = {
    "lm-eval": (
        "results_2026-11-30T05-16-38.39.json",
        "samples_internvl_lm_eval_2026-11-30T05-16-38.39.jsonl",
    ),
    "lmms-eval": ("20261130_052031_results.json", "20261130_052031_samples_internvl_lm_eval.jsonl"),
}


@pytest.mark.parametrize("name", NAMES)
def test_logged_samples_become_those_of_a_report(name, tmp_path):
    results, logged = NAMES[name]
    lines = [
        {**SAMPLE, "doc_id": n, "doc": {**SAMPLE["doc"], "image": f"{n}.png"}, "exact_match": float(n % 4 > 0)}
        for n in range(84)
    ]
    if name == "lmms-eval":  # which names no metrics and writes no rows of the data
        lines = [{k: v for k, v in line.items() if k not in ("metrics", "doc")} for line in lines]
    (tmp_path / logged).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "out"
    (path,) = write_harness_reports(written(tmp_path, LM_EVAL, results), out)
    report = read_report(path)
    settings, samples = read_samples(out / report["samples"])
    assert settings == report["settings"]
    assert [sample["scores"] for sample in samples] == [{"exact_match": line["exact_match"]} for line in lines]
    assert (samples[0]["answer"], samples[0]["expected"]) == ("bottom", "bottom")
    low, high = report["metrics"]["exact_match"]["interval"]
    assert 0.5 < low < 0.75 < high < 0.9
    assert high - low > 4 * 1.96 * 0.0204  # of the samples, not of the standard error in LM_EVAL
    if name == "lm-eval":
        assert (samples[0]["cluster"], samples[0]["question"]) == ("0.png", "Where is the green ring?")
    assert write_harness_reports(tmp_path / results, out) == [path]  # once more


@pytest.mark.parametrize("line", ["{", "[]", '{"doc_id": 1}'])
def test_a_line_that_is_no_sample_is_named(line, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(SAMPLE)}\n{line}\n")
    with pytest.raises(ValueError, match="line 2: this is no "):
        read_harness_samples(path)


def test_benchmarks_have_a_command_with_the_harnesss_name_of_the_task():
    benchmarks = {benchmark.name: benchmark for benchmark in harness_benchmarks()}
    assert {"VQAv2", "GQA", "TextVQA", "MME, perception", "POPE", "DocVQA", "MMMU"} <= benchmarks.keys()
    first, command = benchmark_commands("a folder").splitlines()
    assert "MME, perception, POPE" in first
    assert command.startswith("  python -m lmms_eval --model huggingface --model_args 'pretrained=a folder,")
    assert ",mme,pope," in command
    assert benchmarks["MME, perception"].published["QLLaMA, Vicuna-13B, 336 px"] == 1586.4
    names = {name for benchmark in benchmarks.values() for name in benchmark.published if benchmark.table == "table 9"}
    assert all(re.fullmatch(r"(MLP|QLLaMA), Vicuna-(7B|13B), \d+ px", name) for name in names)
    in_lm_eval = harness_command("lm-eval", ["mmmu_val"], "M")
    assert in_lm_eval.startswith("lm_eval run --model hf-multimodal --model_args pretrained=M,")


# -------------------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("name", ["internvl_lm_eval", "internvl_lmms_eval"])
def test_the_task_files_name_functions_that_are_there(name):
    text = (TASKS / f"{name}.yaml").read_text()
    assert f"task: {name}\n" in text
    functions = re.findall(r"!function questions\.(\w+)", text)
    assert len(functions) == 2
    assert all(callable(getattr(questions, function)) for function in functions)


def test_a_row_is_an_image_and_its_question(tmp_path, monkeypatch):
    Image.new("RGBA", (3, 2), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for key in ("image", "file"):
        row = {key: "a.png", "question": "Which colour?", "answer": "red"}
        (image,) = questions.doc_to_visual(row)
        assert (image.mode, image.size) == ("RGB", (3, 2))
        assert questions.doc_to_text(row, {}) == "Which colour?"
        assert questions.doc_to_text_with_image(row) == "<image>Which colour?"
