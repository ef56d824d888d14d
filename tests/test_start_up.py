"""Start-up: `import internvl` registers every class, and commands report wrong arguments before importing torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import internvl
from internvl.conversion import __main__ as conversion
from internvl.conversion.formats.own_format import OwnFormat
from internvl.conversion.formats.recognition import TARGETS
from internvl.conversion.plan import DTYPES
from internvl.planning import commands as planning
from internvl.planning import memory as planner


ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "numpy", "datasets", "peft", "matplotlib", "sklearn", "PIL"}
OF_TRAINING = [f"training {name}" for name in ("stage1", "stage3", "retrieval", "funnel", "validate")]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def imported(stderr: str) -> set[str]:
    """Packages in what `-X importtime` writes."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +([\w.]+)$", stderr, re.MULTILINE)}


@pytest.mark.parametrize("command", [*internvl.COMMANDS, *OF_TRAINING])
@pytest.mark.parametrize(("argument", "status"), [("--no-such-option", 2), ("--help", 0)])
def test_a_command_reads_its_arguments_before_it_imports_torch(command, argument, status):
    done = run("-X", "importtime", "-m", *f"internvl.{command}".split(), argument)
    assert done.returncode == status
    assert "usage:" in done.stdout + done.stderr
    names = imported(done.stderr)
    assert {"argparse", "internvl"} <= names
    assert not names & (HEAVY - {"PIL"} if command == "demo" else HEAVY)  # which draws


def test_the_choices_of_a_command_are_those_of_what_it_starts():
    """They are written out, because the tables they come from need torch."""
    assert ("auto", *DTYPES) == conversion.DTYPES
    assert tuple(TARGETS) == conversion.TARGETS
    assert conversion.TARGETS[0] == OwnFormat.to
    assert tuple(planner.COMPUTE_DTYPES) == planning.DTYPES


IMPORTS = """
import sys
from importlib import import_module
ONLY_FOR_TRAINING = {"datasets", "peft", "matplotlib", "sklearn"}
names = sys.argv[1:]
sys.argv[0] = "-m"  # as under `python -m` of a module that is not one of the commands
import internvl
from transformers import AutoConfig, AutoModel, AutoProcessor
types = ("intern_vit_6b", "internvl_14b", "internvl_chat_model")
assert {type(AutoConfig.for_model(name)).__module__ for name in types} == {"internvl.configuration_internvl"}
assert all(getattr(internvl, name).__module__.startswith("internvl.") for name in internvl.__all__)
print("internvl", *ONLY_FOR_TRAINING & set(sys.modules))
for name in names:
    import_module(f"internvl.{name}")
    print(name, *ONLY_FOR_TRAINING & set(sys.modules))
"""


def test_importing_the_package_registers_the_classes_and_no_command_imports_what_only_training_needs():
    """An evaluation needs scikit-learn or matplotlib when it fits or draws, not before."""
    evaluations = [f"evaluation.{path.stem}" for path in (ROOT / "evaluation").glob("[!_]*.py")]
    names = ["chat", "demo", "planning.memory", "conversion.__main__", "conversion.verify", "publishing.code"]
    done = run("-c", IMPORTS, *names, *evaluations)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["internvl", *names, *evaluations]


def test_a_served_model_needs_nothing_that_reads_data():
    """`pip install 'internvl[serving]'` brings none of these."""
    absent = "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'datasets', 'faiss', 'polars', 'sklearn']));"
    done = run("-c", f"{absent} import internvl.serving.embedding_engine, internvl.serving.embeddings_api")
    assert done.returncode == 0, done.stderr


def test_names_that_are_not_there_are_not_made_up():
    with pytest.raises(AttributeError, match="no attribute 'InternVLModle'"):
        internvl.InternVLModle  # noqa: B018
