"""A wheel, installed elsewhere, has all files that the package reads; every command runs from it without the clone."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from internvl.extras import MissingLibraryError, extra

from .conftest import ROOT


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "tests", "build", "*.egg-info", "*.safetensors", "__pycache__", "runs_output"
)
COMMANDS = (
    "chat",
    "demo",
    "conversion",
    "training",
    "evaluation",
    "export",
    "planning",
    "publishing",
    "reproduction",
    "benchmarks",
)
QUESTION = "What colour is the star?"
ZERO_SHOT = ("evaluation", "zero_shot", str(ROOT), "--subfolder", "internvl_g", "--images", "2", "--batch-size", "2")
# Arguments: exit status, and a part of what is printed.
CALLS = {
    ("chat", "images/star.png", "--ask", QUESTION, "--model", str(ROOT)): (0, "red"),
    ("chat", "images/star.png", "--ask", QUESTION): (2, "The bundled checkpoint comes with a clone"),
    ("demo", "--images", "images", "--model", str(ROOT)): (0, "1 of 1 answers"),
    ("conversion", str(ROOT / "internvit"), "out"): (0, "out"),
    ("publishing", "code", "out"): (0, "All of it is this package's."),
    ("training", "validate", "rows.jsonl"): (1, "no list"),
    ZERO_SHOT: (0, '"images": 2'),
    ("planning", "memory", "internvl-14b"): (0, "13,834,975,747"),
    ("reproduction", "report", "no_run"): (2, "no_run"),
}
# Runs commands one after the other in one process, which imports torch once, and prints status and output as JSON.
RUN = """
import contextlib, io, json, runpy, sys
import internvl
results = [internvl.__file__]
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv, output = [module, *arguments], io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(f"internvl.{module}", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as error:
            status = error.code or 0
    results.append([status, output.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source"]
    subprocess.run([*PIP, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run([*PIP, *install], check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def test_it_has_all_files_but_tests_and_weights(site):
    installed = {file.relative_to(site / "internvl").as_posix() for file in (site / "internvl").rglob("*")}
    sources = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "tests"))]
    expected = {path.relative_to(ROOT).as_posix() for path in sources if "build" not in path.parts}
    shipped = ("configs/*/*", "evaluation/templates/*", "examples/*.png", "examples/*.json", "examples/*.ipynb")
    for pattern in (*shipped, "[a-z]*/README.md"):
        found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        expected |= {name for name in found if not name.startswith(("tests", "docs"))}
    assert expected <= installed
    assert not [name for name in installed if name.endswith(".safetensors") or name.startswith("tests/")]


def run_commands(site: Path, folder: Path, commands: list) -> list[tuple[int, str]]:
    # PYTHONPATH comes before the clone, which may be installed as well.
    env = {"PYTHONPATH": str(site), "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    place, *results = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(site)
    return results


@pytest.fixture(scope="module")
def run(site, tmp_path_factory) -> tuple[list[tuple[int, str]], Path]:
    """Exit status and output of `--help` of every command and of every call, and the folder in which they ran."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "images").mkdir()
    shutil.copy(ROOT / "examples" / "star.png", folder / "images")
    row = {"file": "star.png", "question": QUESTION, "answer": "red"}
    (folder / "images" / "questions.json").write_text(json.dumps([row]))
    (folder / "rows.jsonl").write_text('{"messages": "no list"}\n')
    return run_commands(site, folder, [[name, "--help"] for name in COMMANDS] + list(CALLS)), folder


def test_every_command_says_how_it_is_used(run):
    for name, (status, output) in zip(COMMANDS, run[0], strict=False):
        assert status == 0, (name, output)
        assert f"usage: python -m internvl.{name}" in output


def test_every_command_runs(run):
    results, folder = run
    for (call, (status, expected)), found in zip(CALLS.items(), results[len(COMMANDS) :], strict=True):
        assert found[0] == status, (call, found[1])
        assert expected in found[1], call
    assert (folder / "out" / "modeling_internvit.py").is_file()


@pytest.mark.slow
def test_a_benchmark_runs(site, tmp_path):
    ((status, output),) = run_commands(site, tmp_path, [["benchmarks", "start_up", "--rounds", "1"]])
    assert status == 0, output
    assert "time of `import internvl`" in output
    assert (tmp_path / "benchmarks" / "results" / "start_up-cpu.json").is_file()


def test_a_missing_library_is_one_line_with_the_command_that_installs_it():
    expected = r"^This needs no_such, .*: `pip install 'internvl\[train\]'`\.$"
    with pytest.raises(MissingLibraryError, match=expected), extra("train"):
        import no_such.part  # noqa: F401
    assert issubclass(MissingLibraryError, ValueError)  # which every command prints in one line


def test_extras_that_are_named_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            named |= {part.split('"')[0] for part in path.read_text().split('with extra("')[1:]}
    assert named
    assert named <= project["optional-dependencies"].keys()
