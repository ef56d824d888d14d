"""Folders written by the code of commit a090a6c (`old_folders/write.py`) and calls written for it keep working.

With the package installed its classes are used, without it the code in the folders. Both give the outputs recorded
then.
"""

import dataclasses
import importlib
import json
import runpy
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest

from internvl.moved import DOORS, MOVED, PACKAGES, MovedModules

from .fixtures_processes import run_elsewhere
from .old_folders.run_folder import run


ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "old_folders"
TOLERANCE = 2e-4  # outputs are recorded with four decimals


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD / "a090a6c.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def assert_same(found: dict, folders: Path) -> None:
    recorded = json.loads((folders / "outputs.json").read_text())
    assert recorded["chat"]["answer"] != recorded["adapter"]["answer"]
    for part, outputs in recorded.items():
        for name, value in outputs.items():
            where = f"{part}, {name}"
            if isinstance(value, list) and any(isinstance(item, float) for item in value):
                assert found[part][name] == pytest.approx(value, abs=TOLERANCE), where
            else:
                assert found[part][name] == value, where


def test_the_installed_package_takes_precedence_and_gives_the_outputs_of_then(folders):
    found = run(folders)
    assert all(module.startswith("internvl.") for module in found["code"])
    assert_same(found, folders)


def test_a_folder_alone_gives_the_outputs_of_then(folders, tmp_path):
    found = json.loads(run_elsewhere(tmp_path, OLD / "run_folder.py", folders).splitlines()[-1])
    assert all(module.startswith("transformers_modules.") for module in found["code"])
    assert_same(found, folders)


MODULES = (OLD / "modules.txt").read_text().split()  # of a090a6c, without `internvl.`


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_then_is_importable(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert importlib.import_module(f"internvl.{name}")


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_one_module_with_one_warning(old):
    sys.modules.pop(f"internvl.{old}", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        found = importlib.import_module(f"internvl.{old}")
    said = [str(warning.message) for warning in caught if "internvl." in str(warning.message)]
    assert said == ([] if old in PACKAGES else [f"internvl.{old} is now internvl.{MOVED[old]}."])
    assert found is importlib.import_module(f"internvl.{MOVED[old]}")
    assert not (ROOT / f"{old.replace('.', '/')}.py").exists()


def test_an_old_command_runs_the_new_one_which_registers_the_classes_once_it_has_read_its_arguments():
    command = [sys.executable, "-m", "internvl.memory", str(ROOT), "--max-memory", "cuda:0=1GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "InternVLChatForConditionalGeneration" in done.stdout
    assert "It fits." in done.stdout
    assert "internvl.memory is now internvl.planning memory" in done.stderr


@pytest.mark.parametrize("old", DOORS)
def test_every_old_command_has_a_new_one(old, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", f"internvl.{old}", "--help"])
    with pytest.warns(FutureWarning, match="is now internvl"):
        spec = MovedModules.find_spec(f"internvl.{old}")
    assert spec.loader.get_code(spec.name)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(spec.name, run_name="__main__", alter_sys=True)
    assert stopped.value.code == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_python_calls_that_the_documents_of_then_show_still_work():
    from internvl.evaluation.captioning import describe
    from internvl.evaluation.dialogue import ask, is_right
    from internvl.training.objectives import info_nce_loss
    from internvl.training.parameter_groups import lora_targets
    from internvl.training.recipes import Phase, stage1
    from internvl.training.stages import Run, run_stage1
    from internvl.visibility_qllama import Readings

    assert all(map(callable, (describe, ask, is_right, info_nce_loss, lora_targets, Run, run_stage1, Readings)))
    phase = Phase("short", 10, {"vision": 1e-3}, 196, warmup_steps=5, batch_size=8, dropped_patches=0.5)
    assert phase.dropped_patches == 0.5
    assert phase.rates == {"vision": 1e-3}
    recipe = dataclasses.replace(stage1(), objective="sigmoid", rows_at_a_time=8)
    assert (recipe.objective, recipe.rows_at_a_time) == ("sigmoid", 8)
