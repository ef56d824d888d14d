"""Chat servers, started as a user starts them and asked through the `openai` client (over_http.py).

What they answer to text, one image and several, whole, streamed and to eight requests at once, are the tokens of
`generate`; where a server does not give tokens, the text. None of their environments holds this package.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environments
from engine import WORK, FailedError, Row, answers_of, call, checkpoints
from environments import ROOT, variables


sys.path.insert(0, str(ROOT))

from tests.guide import Reader, blocks_of, copy_by_links, sections
from tests.loopback import ServerEndedError, free_port, serving


START_LIMIT_S = 1800
EAGER = ("--dtype", "float32", "--enforce-eager")  # compiling takes minutes


def check_package_is_absent(python: Path, env: dict[str, str]) -> None:
    command = "from importlib.util import find_spec; print(find_spec('internvl'))"
    if call([python, "-c", command], env).strip() != "None":
        raise FailedError("This package can be imported in the engine's environment.")


@contextmanager
def server(command: Sequence[Any], env: dict[str, str]) -> Iterator[str]:
    """Its address.

    Raises:
        FailedError: With the end of what it printed, if it does not start.
    """
    port = free_port()
    words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    try:
        with serving(words, port, WORK / f"server-{port}.log", env, WORK, START_LIMIT_S):
            yield f"http://127.0.0.1:{port}"
    except ServerEndedError as error:
        raise FailedError(str(error)) from error


# ------------------------------------------------------------------------------------------------------------- asking
def kind_of(question: dict[str, Any]) -> str:
    return ("text", "one image")[len(question["images"])] if len(question["images"]) < 2 else "several images"


def ask(
    python: Path, env: dict[str, str], url: str, model: str, checkpoint: dict[str, Any], name: str, **more: Any
) -> Iterator[Row]:
    """A line for each way of asking, the first by kind of question.

    Args:
        python: Of an environment with `openai`.
        env: Of its process.
        url: Address of the server.
        model: Name of the model in requests.
        checkpoint: Questions with the expected answers.
        name: First column of the lines.
        more: Further entries of the job.
    """
    questions = checkpoint["questions"]
    job = {**checkpoint, "readable": str(ROOT / "examples" / "star.png"), **more}
    found = answers_of("over_http.py", python, [f"{url}/v1", model], job, env)
    kinds = list(dict.fromkeys(map(kind_of, questions)))
    of_kind = {kind: [n for n, question in enumerate(questions) if kind_of(question) == kind] for kind in kinds}
    for kind, numbers in of_kind.items():
        yield Row(name, kind, sum(is_equal(found["whole"][n], questions[n]) for n in numbers), len(numbers))
    for way, label in {"streamed": "streamed", "in parallel": "8 in parallel"}.items():
        answers = found[way]
        equal = [is_equal(answer, questions[n % len(questions)]) for n, answer in enumerate(answers)]
        yield Row(name, label, sum(equal), len(equal))
    statuses = list(found["refused"].values())
    said = ", ".join(map(str, sorted(set(statuses))))
    yield Row(name, f"unreadable images refused ({said})", sum(status >= 400 for status in statuses), len(statuses))


def is_equal(answer: dict[str, Any], question: dict[str, Any]) -> bool:
    """Whether the text is the expected one, and the tokens too if the server gave them."""
    same_tokens = answer["tokens"] is None or answer["tokens"] == question["tokens"]
    return same_tokens and answer["text"] == question["answer"]


# --------------------------------------------------------------------------------------------------------------- vLLM
def vllm_variables(processes: int = 1) -> dict[str, str]:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(processes)))} if processes > 1 else {}
    return variables("vllm", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **bound)


def vllm_rows(python: Path, folder: Path, models: dict[str, tuple[str, str]], *flags: Any) -> Iterator[Row]:
    """Serves a folder; `models` has by the name that requests give the checkpoint whose questions are asked, and the
    first column of the lines.
    """
    env = vllm_variables(2 if "--tensor-parallel-size" in flags else 1)
    with server([python.with_name("vllm"), "serve", folder, *flags], env) as url:
        for model, (questions, name) in models.items():
            yield from ask(python, env, url, model, checkpoints()[questions], name, asks_for_tokens=True)


def vllm_serve(python: Path) -> Iterator[Row]:
    """The command as a user types it, which compiles the decoder and computes in bf16."""
    check_package_is_absent(python, vllm_variables())
    models = {str(ROOT): ("root in bf16", "root, no more flags")}
    yield from vllm_rows(python, ROOT, models, "--trust-remote-code")


def vllm_serve_eager(python: Path) -> Iterator[Row]:
    for name in ("simple-tied", "converted-internlm2", "converted-qwen2", "fine-tuned"):
        folder = checkpoints()[name]["folder"]
        yield from vllm_rows(python, folder, {folder: (name, name)}, "--trust-remote-code", *EAGER)


def vllm_tensor_parallel(python: Path) -> Iterator[Row]:
    models = {str(ROOT): ("root", "root, tensor parallel 2")}
    yield from vllm_rows(python, ROOT, models, "--trust-remote-code", *EAGER, "--tensor-parallel-size", 2)


def vllm_lora(python: Path) -> Iterator[Row]:
    """The adapter that fine-tuning left beside its merged model, on the model it began with: answers of the merged."""
    adapter = Path(checkpoints()["fine-tuned"]["folder"]) / "adapter"
    models = {str(ROOT): ("root", "root"), "own": ("fine-tuned", "root, adapter")}
    flags = ("--enable-lora", "--lora-modules", f"own={adapter}")
    yield from vllm_rows(python, ROOT, models, "--trust-remote-code", *EAGER, *flags)


def vllm_native(python: Path) -> Iterator[Row]:
    """vLLM's built-in class, which runs no code of the folder."""
    folder = checkpoints()["converted-qwen2"]["native"]
    yield from vllm_rows(python, folder, {folder: ("converted-qwen2", "converted-qwen2, native")}, *EAGER)


# ------------------------------------------------------------------------------------------------------- transformers
def transformers_server(python: Path) -> tuple[list[Any], dict[str, str]]:
    """The command and its environment."""
    options = "serve --trust-remote-code --dtype float32 --device cpu".split()
    env = variables("transformers_serve", INTERNVL_ALLOW_LOCAL_FILES="0")
    (Path(env["HF_HOME"]) / "hub").mkdir(parents=True, exist_ok=True)  # its list of models wants the folder
    return [python.with_name("transformers"), *options], env


def transformers_serve(python: Path) -> Iterator[Row]:
    """One server, which loads the models that requests name."""
    command, env = transformers_server(python)
    check_package_is_absent(python, env)
    with server(command, env) as url:
        for name in ("root", "simple-tied", "converted-internlm2", "converted-qwen2", "fine-tuned"):
            yield from ask(python, env, url, checkpoints()[name]["folder"], checkpoints()[name], name)


# -------------------------------------------------------------------------------------------------------------- guide
def guide(python: Path) -> Iterator[Row]:
    """What docs/serving.md shows of chat, followed in the environments of both servers."""
    of_transformers = environments.make("transformers_serve")
    yield from follow_guide(
        "Chat", (python, vllm_variables()), (of_transformers, transformers_server(of_transformers)[1])
    )


def follow_guide(title: str, *environments_of: tuple[Path, dict[str, str]]) -> Iterator[Row]:
    """Follows a section of docs/serving.md, by the Python of each environment what it has the modules for."""
    section = sections((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))[title]
    followed: set[int] = set()
    for interpreter, env in environments_of:
        shutil.rmtree(WORK / "guide", ignore_errors=True)
        reader = Reader(copy_by_links(WORK / "guide"), interpreter, env, START_LIMIT_S)
        try:
            followed.update(reader.follow(section))
        except (AssertionError, ServerEndedError) as error:
            raise FailedError(str(error)[-3000:]) from error
    yield Row("docs/serving.md", f"{title}, blocks followed", len(followed), len(blocks_of(section)))
