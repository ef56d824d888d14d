"""Results that harnesses wrote, read as reports of this package, and the commands that write them.

    python -m internvl.evaluation.harness_results FILE [FILE...] --output DIR

writes each task in results of clip-benchmark, MTEB, lm-eval or lmms-eval as a report, with its samples beside it where
the harness logged them (`--log_samples`), so that `compare` and `page` take them.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import exit_status
from ..rows.json_files import check_keys, is_finite_number, read_json_file
from .protocols.protocol import shipped_protocols
from .reports import check_card_settings, metrics_of, new_report, samples_file, write_report
from .samples import SampleLog


HARNESSES = ("clip-benchmark", "MTEB", "lm-eval", "lmms-eval")
BENCHMARKS_FILE = Path(__file__).parent / "harnesses" / "benchmarks.json"
Z_95 = 1.959964  # of a normal distribution
# Of table 9, by the width of the language model and by the connector.
SIZES = {4096: "7B", 5120: "13B"}
CONNECTORS = {"patches": "MLP", "queries_and_patches": "QLLaMA"}
CLIP_TASKS = {"zeroshot_classification": "zero_shot", "zeroshot_retrieval": "retrieval", "linear_probe": "probe"}
# What clip-benchmark calls the data of protocols whose name here is another one, and the languages.
CLIP_DATA = {
    "imagenet1k": "imagenet-1k",
    "imagenetv2": "imagenet-v2",
    "imagenet_sketch": "imagenet-sketch",
    "mscoco_captions": "coco",
    "fgvc_aircraft": "aircraft",
    "renderedsst2": "sst2",
}
CLIP_LANGUAGES = {"jp": "ja"}
# Of some hundred scores of MTEB.
MTEB_METRICS = {
    "main_score": "main score",
    "accuracy": "accuracy",
    "ndcg_at_10": "nDCG@10",
    **{f"hit_rate_at_{k}": f"R@{k}" for k in (1, 5, 10)},
}
# What clip-benchmark calls the metrics of this package.
CLIP_METRICS = (
    (r"(?:lp_)?acc(\d+)", r"top-\1"),
    (r"(?:lp_)?mean_per_class_recall", "mean per class"),
    (r"text_retrieval_recall@(\d+)", r"image_to_text/R@\1"),
    (r"image_retrieval_recall@(\d+)", r"text_to_image/R@\1"),
)


# ---------------------------------------------------------------------------------------------------------- benchmarks
@dataclass(frozen=True)
class Benchmark:
    """A benchmark that a harness has, and that this package therefore does not have.

    Args:
        name: As in the paper.
        harness: "lm-eval" or "lmms-eval".
        task: The harness's name of it.
        metric: The harness's name of the metric that the paper gives.
        table: Of the paper.
        published: Figures by configuration, see `paper_configuration`; in percent as a rule.
        note: How the harness's figure differs from the paper's.
        scale: From the harness's unit to that of the published figures.
    """

    name: str
    harness: str
    task: str
    metric: str
    table: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    scale: float = 100.0


def harness_benchmarks() -> list[Benchmark]:
    """Returns the benchmarks of `harnesses/benchmarks.json`."""
    return [Benchmark(**row) for row in read_json_file(BENCHMARKS_FILE)]


def harness_command(harness: str, tasks: Sequence[str], model: str | Path) -> str:
    """Returns the command with which "lm-eval" or "lmms-eval" measures a chat model on tasks of its own."""
    settings = f"pretrained={model},trust_remote_code=True"
    rest = f"--tasks {','.join(tasks)} --batch_size 1 --log_samples --output_path results"
    if harness == "lm-eval":
        settings = shlex.quote(f"{settings},max_images=8")
        return f"lm_eval run --model hf-multimodal --model_args {settings} --apply_chat_template {rest}"
    return f"python -m lmms_eval --model huggingface --model_args {shlex.quote(settings)} {rest}"


def benchmark_commands(model: str | Path) -> str:
    """Returns what to run for the benchmarks of chat models, and how to show the results: a line each."""
    lines = []
    by_harness: dict[str, list[Benchmark]] = {}
    for benchmark in harness_benchmarks():
        by_harness.setdefault(benchmark.harness, []).append(benchmark)
    for harness, benchmarks in by_harness.items():
        names = ", ".join(benchmark.name for benchmark in benchmarks)
        lines += [f"{names}: by {harness}, whose results --harness-results FILE shows here", "  "]
        lines[-1] += harness_command(harness, [benchmark.task for benchmark in benchmarks], model)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- results
def read_harness_results(path: str | Path) -> list[dict[str, Any]]:
    """Reads what a harness wrote.

    Args:
        path: A file of results of clip-benchmark (`--output`), MTEB (TASK.json), lm-eval (`results_*.json`) or
            lmms-eval (`*_results.json`).

    Returns:
        A report for each task. The "interval" of a metric is that of its samples where the harness logged them beside
        the results, else from the standard error that it gives, else None; "samples", how many, is None where it does
        not say.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no results of one of these harnesses.
    """
    path = Path(path)
    results = read_json_file(path)
    try:
        reports = list(_reports_of(path, results)) if isinstance(results, dict) else []
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} looks like results of a harness, but a part has another form: {error}.") from error
    if not reports:
        raise ValueError(f"{path} holds no results of {', '.join(HARNESSES[:-1])} or {HARNESSES[-1]}.")
    by_task = {benchmark.task: benchmark for benchmark in harness_benchmarks()}
    for report in reports:
        check_keys(str(path), report, {"task": "a text", "protocol": "a text", "model": "a text"})
        check_card_settings(str(path), report["settings"])
        if logged := samples_beside(path, report["protocol"]):
            for metric, summary in metrics_of(read_harness_samples(logged)).items():
                if metric in report["metrics"]:
                    report["metrics"][metric] |= {key: summary[key] for key in ("interval", "samples")}
        if benchmark := by_task.get(report["protocol"]):
            _set_beside_the_paper(report, benchmark)
    return reports


def _set_beside_the_paper(report: dict[str, Any], benchmark: Benchmark) -> None:
    """Adds the published figure of the model's configuration to the metric that the paper gives."""
    if benchmark.metric not in report["metrics"]:
        return
    metric = report["metrics"][benchmark.metric]
    report["title"] = benchmark.name
    metric["scale"] = benchmark.scale
    if benchmark.note:
        metric["notes"] = [benchmark.note]
    configuration = paper_configuration(report["model"])
    if configuration and configuration in benchmark.published:
        source = f"{benchmark.table}, {configuration}"
        report["published"] = {"source": source, benchmark.metric: benchmark.published[configuration]}


def paper_configuration(model: str | Path) -> str | None:
    """Returns the configuration of the paper's table 9 that a folder holds, or None where it holds another one.

    It is told by the connector, the width of the language model, a LLaMA, and the size of the images.
    """
    try:
        config = read_json_file(Path(model, "config.json"))
        text, vision = config["text_config"], config["vision_config"]
        size = SIZES.get(text["hidden_size"]) if text["model_type"] == "llama" else None
        side = config.get("force_image_size") or vision["image_size"]
        connector = CONNECTORS[config["connector"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size and f"{connector}, Vicuna-{size}, {side} px"


def _reports_of(path: Path, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(results.get("metrics"), dict) and {"dataset", "pretrained", "task"} <= results.keys():
        yield _clip_benchmark_report(results)
    elif isinstance(results.get("scores"), dict) and {"task_name", "mteb_version"} <= results.keys():
        yield from _mteb_reports(path, results)
    elif isinstance(results.get("results"), dict) and "config" in results:
        yield from _lm_eval_reports(results)


def _metric(value: float, interval: list[float] | None = None, samples: int | None = None) -> dict[str, Any]:
    return {"value": float(value), "interval": interval, "samples": samples}


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that are finite numbers."""
    return {name: float(value) for name, value in scores.items() if is_finite_number(value)}


def _clip_benchmark_report(results: dict[str, Any]) -> dict[str, Any]:
    """Its metrics have the names that this package gives them, with the mode that its model type `internvl` names."""
    model, language = str(results.get("model")), str(results.get("language") or "en")
    found = re.match("internvl[-_]([cg])(_|$)", model.lower())
    mode = f"InternVL-{found[1].upper()}/" if found else ""
    metrics = {}
    for name, value in _numbers(results["metrics"]).items():
        for pattern, ours in CLIP_METRICS:
            name = re.sub(f"^{pattern}$", ours, name)
        metrics[mode + name] = _metric(value)
    settings = {"harness": HARNESSES[0], "model": model, "language": language}
    task, data = CLIP_TASKS.get(results["task"], results["task"]), str(results["dataset"])
    report = new_report(task, results["pretrained"], settings, metrics, protocol=data)
    language = CLIP_LANGUAGES.get(language, language)
    data = data.removeprefix("wds/").removeprefix("vtab/")
    known = shipped_protocols()
    for name in (f"{CLIP_DATA.get(data, data)}-{language}", CLIP_DATA.get(data, data) if language == "en" else ""):
        if name in known and known[name].task == task:
            report |= {"protocol": name, "title": known[name].title, "published": dict(known[name].published)}
            break
    return report


def _mteb_reports(path: Path, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One report for each split and subset; the model is described in a file beside the results."""
    beside = path.with_name("model_meta.json")
    model = read_json_file(beside) if beside.is_file() else {}
    for split, subsets in results["scores"].items():
        for scores in subsets:
            settings = {
                "harness": HARNESSES[1],
                "version": results["mteb_version"],
                "split": split,
                "subset": scores.get("hf_subset"),
                **(model.get("experiment_kwargs") or {}),
            }
            metrics = {MTEB_METRICS[name]: _metric(v) for name, v in _numbers(scores).items() if name in MTEB_METRICS}
            task = "retrieval" if "ndcg_at_10" in scores else "zero_shot"
            yield new_report(task, model.get("name") or "", settings, metrics, protocol=results["task_name"])


def _lm_eval_reports(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One report for each task of lm-eval, and of lmms-eval, which grew out of it."""
    config = results["config"] if isinstance(results["config"], dict) else {}
    is_lmms = "lmms_eval_version" in results
    arguments = config.get("model_args")
    settings = {
        "harness": HARNESSES[3] if is_lmms else HARNESSES[2],
        "version": results.get("lmms_eval_version" if is_lmms else "lm_eval_version"),
        "model": config.get("model"),
        "model_args": arguments,
    }
    for task, scores in results["results"].items():
        metrics = dict(_metrics_with_errors(scores, _samples_of(results, task)))
        if metrics:
            yield new_report("dialogue", _model_of(arguments), settings, metrics, protocol=task)


def _metrics_with_errors(scores: Mapping[str, Any], samples: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Metrics called `NAME,FILTER`, with their standard errors, `NAME_stderr,FILTER`."""
    for key, value in _numbers(scores).items():
        name, _, of_filter = key.partition(",")
        if not of_filter or re.search(r"_stderr(_|$)", name):
            continue
        error: Any = scores.get(f"{name}_stderr,{of_filter}")
        interval = [value - Z_95 * error, value + Z_95 * error] if is_finite_number(error) else None
        yield (name if of_filter == "none" else f"{name} ({of_filter})"), _metric(value, interval, samples)


def _samples_of(results: Mapping[str, Any], task: str) -> int | None:
    counts = (results.get("n-samples") or {}).get(task) or {}
    return counts.get("effective")


def _model_of(arguments: Any) -> str:
    """The checkpoint in `pretrained=...,dtype=...`, or in the same as a dictionary."""
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    if not isinstance(arguments, dict):
        return ""
    names = ("pretrained", "model", "model_version")
    return next((str(arguments[name]) for name in names if arguments.get(name)), "")


# ------------------------------------------------------------------------------------------------------------- samples
def read_harness_samples(path: str | Path) -> list[dict[str, Any]]:
    """Reads samples that lm-eval or lmms-eval logged.

    Args:
        path: A file `samples_TASK_*.jsonl` of lm-eval, or `*_samples_TASK.jsonl` of lmms-eval.

    Returns:
        Samples as in the files of this package: "id", "scores", "answer", "expected", and where the harness wrote the
        rows of the data, "question" and as "cluster" the image.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}.") from error
    samples = []
    # What else ends a line for Python may stand within a text.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        try:
            row = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from error
        if not isinstance(row, dict) or not {"doc_id", "filtered_resps"} <= row.keys():
            raise ValueError(f"{path}, line {number}: this is no sample of lm-eval or lmms-eval.")
        samples.append(_sample(row))
    return samples


# What is a number in a sample and yet no score.
NOT_SCORES = {"doc_id", "doc_hash", "prompt_hash", "target_hash", "idx"}


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    names = row.get("metrics")  # lmms-eval does not name them
    scores = _numbers({str(name): row.get(str(name)) for name in names} if isinstance(names, list) else row)
    scores = {name: value for name, value in scores.items() if name not in NOT_SCORES}
    sample = {
        "id": str(row["doc_id"]),
        "scores": scores,
        "answer": _first(row["filtered_resps"]),
        "expected": row.get("target"),
    }
    rows = row.get("doc")
    if isinstance(rows, dict):
        image = rows.get("image") or rows.get("file")
        if isinstance(image, str):
            sample |= {"cluster": image, "image": image}
        if isinstance(rows.get("question"), str):
            sample["question"] = rows["question"]
    return sample


def _first(value: Any) -> Any:
    while isinstance(value, list) and value:
        value = value[0]
    return value


def samples_beside(path: str | Path, task: str) -> Path | None:
    """Returns the samples of a task that a harness logged beside its results, or None."""
    path = Path(path)
    stamp = re.search(r"\d{4}-?\d\d-?\d\dT[\d.-]+|\d{8}_\d{6}", path.name)
    if not stamp:
        return None
    names = (f"samples_{task}_{stamp[0].rstrip('.')}.jsonl", f"{stamp[0]}_samples_{task}.jsonl")
    return next((file for name in names if (file := path.with_name(name)).is_file()), None)


# ------------------------------------------------------------------------------------------------------------- command
def write_harness_reports(path: str | Path, output: str | Path) -> list[Path]:
    """Writes the tasks in a harness's results as reports, and their samples where they were logged.

    Returns:
        The files of the reports.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If it holds no results of a harness.
    """
    reports = {}
    for report in read_harness_results(path):
        parts = [report["protocol"], report["settings"].get("split"), report["settings"].get("subset")]
        name = re.sub(r"[^\w.-]+", "-", "-".join(str(part) for part in parts if part))
        if name in reports:
            raise ValueError(f"{path} has two results that would both be called {name}.json.")
        reports[name] = report
    written = []
    for name, report in reports.items():
        target = Path(output, f"{name}.json")
        if logged := samples_beside(path, report["protocol"]):
            with SampleLog(samples_file(target), report["settings"]) as log:
                for sample in read_harness_samples(logged):
                    if sample["id"] not in log.done:
                        log.add(sample)
            report["samples"] = samples_file(target).name
        write_report(target, report)
        written.append(target)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.evaluation.harness_results",
        description=f"Writes results of {', '.join(HARNESSES)} as reports, which `compare` and `page` take.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the harness wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the reports go")
    options = parser.parse_args(arguments)

    def command() -> None:
        for file in options.files:
            for report in write_harness_reports(file, options.output):
                sys.stdout.write(f"{report}\n")

    return exit_status(command)


__all__ = [
    "Benchmark",
    "benchmark_commands",
    "harness_benchmarks",
    "harness_command",
    "read_harness_results",
    "read_harness_samples",
    "samples_beside",
    "write_harness_reports",
]


if __name__ == "__main__":
    sys.exit(main())
