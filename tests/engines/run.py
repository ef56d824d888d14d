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
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environments
from environments import ENGINES, HERE, ROOT, CannotBeMadeError, variables


sys.path.insert(0, str(ROOT))

from internvl.evaluation.harness_results import (
    read_harness_results,
    read_harness_samples,
    samples_beside,
)


WORK = ENGINES / "checkpoints"
FIGURES = WORK / "figures"
TASKS = ROOT / "evaluation" / "harnesses" / "tasks"
MODES = ("InternVL-C", "InternVL-G")
CUTS = (1, 5, 10)
START_LIMIT_S = 900


@dataclass
class Row:
    """One line of the table."""

    checkpoint: str
    asked: str
    equal: int
    of: int

    def __str__(self) -> str:
        return f"{self.checkpoint:<22} {self.asked:<34} {self.equal} of {self.of} equal"


class FailedError(Exception):
    """An engine ended with an error; the text is the end of what it printed."""


def call(command: list[Any], env: dict[str, str], cwd: Path = WORK) -> str:
    # Not in the repository: its folders would be importable there.
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError((done.stdout + done.stderr)[-3000:])
    return done.stdout


def checkpoints() -> dict[str, Any]:
    """Questions and expected answers by checkpoint, made by the first engine that asks for them."""
    answers = WORK / "questions.json"
    if not answers.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        # One thread: the models are tiny.
        call(
            [sys.executable, HERE / "checkpoints.py", WORK],
            {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    return json.loads(answers.read_text())


def answers_of(script: str, python: Path, arguments: list[str], job: dict[str, Any], env: dict[str, str]) -> Any:
    """What a script of this folder says to a job, run by an engine's Python."""
    (WORK / "job.json").write_text(json.dumps(job))
    call([python, HERE / script, *arguments, WORK / "job.json", WORK / "out.json"], env)
    return json.loads((WORK / "out.json").read_text())


# --------------------------------------------------------------------------------------------------------------- vLLM
def vllm_variables(processes: int) -> dict[str, str]:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(processes)))} if processes > 1 else {}
    return variables("vllm", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **bound)


def vllm(python: Path) -> Iterator[Row]:
    """Offline, each checkpoint alone and two with tensor parallelism: the root's QLLaMA has three heads."""
    jobs = [(name, 1) for name in checkpoints()] + [("root", 2), ("converted-llama", 2)]
    for name, processes in jobs:
        checkpoint = checkpoints()[name]
        job = {**checkpoint, "new_tokens": 12, "tensor_parallel": processes}
        found = answers_of("in_vllm.py", python, [], job, vllm_variables(processes))
        expected = [question["tokens"] for question in checkpoint["questions"]]
        asked = "tokens" + (f", tensor parallel {processes}" if processes > 1 else "")
        yield Row(name, asked, sum(map(list.__eq__, found, expected)), len(expected))


def vllm_serve(python: Path) -> Iterator[Row]:
    """The command as a user types it, compiled; fp32, so that answers can be compared."""
    command = [python.with_name("vllm"), "serve", ROOT, "--trust-remote-code", "--dtype", "float32"]
    yield from over_http(python, command, vllm_variables(1))


def transformers_serve(python: Path) -> Iterator[Row]:
    yield from over_http(python, *transformers_server(python))


def transformers_server(python: Path) -> tuple[list[Any], dict[str, str]]:
    """The command and its environment."""
    options = "serve --trust-remote-code --dtype float32 --device cpu".split()
    env = variables("transformers_serve")
    (Path(env["HF_HOME"]) / "hub").mkdir(parents=True, exist_ok=True)  # its list of models wants the folder
    return [python.with_name("transformers"), *options], env


def over_http(python: Path, command: list[Any], env: dict[str, str]) -> Iterator[Row]:
    root = checkpoints()["root"]
    expected = [question["answer"] for question in root["questions"]]
    with serving(command, env) as url:
        found = answers_of("over_http.py", python, [f"{url}/v1", str(ROOT)], {**root, "new_tokens": 12}, env)
    for asked, answers in found.items():
        yield Row("root", f"chat completions, {asked}", sum(map(str.__eq__, answers, expected)), len(expected))


@contextmanager
def serving(command: list[Any], env: dict[str, str]) -> Iterator[str]:
    """A server on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*map(str, command), "--host", "127.0.0.1", "--port", port]
    with (WORK / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=env, cwd=WORK, stdout=log, stderr=log, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_LIMIT_S
    try:
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise FailedError((WORK / "server.log").read_text()[-3000:])
            time.sleep(1)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------- features, figures
def sentence_transformers(python: Path) -> Iterator[Row]:
    checkpoints()
    env = variables("sentence_transformers")
    for name in (
        "contrastive",
        "converted-14b",
    ):  # as the model saves itself, and with files for sentence-transformers beside it
        for line in call([python, HERE / "in_sentence_transformers.py", WORK / name], env).splitlines():
            if line.startswith("{"):
                yield Row(name, **json.loads(line))
    figures()
    script = HERE / "evaluators_of_sentence_transformers.py"
    said = call([python, script, ROOT / "internvl_g", FIGURES / "images.json"], with_package(env))
    yield from rows_of_modes(json.loads(said.splitlines()[-1]))


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
    with serving(*transformers_server(environments.make("transformers_serve"))) as url:
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


# Engine, environment, distribution whose version is printed.
RUNS: dict[str, tuple[Callable[[Path], Iterator[Row]], str, str]] = {
    "vllm": (vllm, "vllm", "vllm-cpu"),
    "vllm_serve": (vllm_serve, "vllm", "vllm-cpu"),
    "transformers_serve": (transformers_serve, "transformers_serve", "transformers"),
    "sentence_transformers": (sentence_transformers, "sentence_transformers", "sentence-transformers"),
    "clip_benchmark": (clip_benchmark, "clip_benchmark", "clip-benchmark"),
    "mteb": (mteb, "mteb", "mteb"),
    "lm_eval": (lm_eval, "lm_eval", "lm_eval"),
    "lmms_eval": (lmms_eval, "lmms_eval", "lmms_eval"),
    "lmms_eval_openai": (lmms_eval_openai, "lmms_eval", "lmms_eval"),
}


def version_of(python: Path, distribution: str) -> str:
    command = f"from importlib.metadata import version; print(version({distribution!r}), version('transformers'))"
    own, transformers = call([python, "-c", command], dict(os.environ)).split()
    return own if distribution == "transformers" else f"{own} (transformers {transformers})"


def run(name: str) -> tuple[int, bool]:
    """Prints the lines of one engine: how many of them differ, and whether it was run at all."""
    engine, environment, distribution = RUNS[name]
    try:
        python = environments.make(environment)
        print(f"{name} {version_of(python, distribution)}", flush=True)
        differing = 0
        for row in engine(python):
            differing += row.equal != row.of
            print(f"  {row}", flush=True)
    except CannotBeMadeError as reason:
        print(f"{name}: not run, its environment cannot be made here: {reason}", flush=True)
        return 0, False
    except FailedError as error:
        print(f"{name}: FAILED\n{error}", flush=True)
        return 1, True
    return differing, True


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compares the answers of engines and harnesses with those of `generate`."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"there is no {', '.join(unknown)}")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    outcomes = {name: run(name) for name in names or RUNS}
    differing = sum(count for count, _ in outcomes.values())
    not_run = [name for name, (_, was_run) in outcomes.items() if not was_run]
    print(f"engines: {differing} lines differ, not run: {', '.join(not_run) or 'none'}")
    return int(differing > 0 or any(name in names for name in not_run))


if __name__ == "__main__":
    sys.exit(main())
