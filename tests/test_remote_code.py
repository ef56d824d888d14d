"""Checkpoint folders load as remote code, with nothing of this repository on the path.

1. Every door of every model type gives the same result from a copied folder, offline, in a fresh process elsewhere.
2. A saved copy gives that result again, buffers that are not saved included; so does the folder after it was moved.
3. Several processes may load a folder that no one has loaded before at the same time.
4. A configuration from remote code reaches a worker process that was started afresh.
5. With the package installed its classes are used and no trust is asked for.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

import internvl  # noqa: F401

from .fixtures_processes import elsewhere, run_elsewhere


HERE = Path(__file__).resolve().parent
SCENARIO = HERE / "versions" / "scenario.py"
NUM_PROCESSES = 2
NAMES = ("chat", "chat_full", "chat_internlm2", "contrastive", "vision")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of tiny checkpoints that no process has loaded yet."""
    out = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)  # undone with what the script adds
        from .versions import tiny_checkpoints
    tiny_checkpoints.main(out)
    return out


@pytest.fixture(scope="module")
def outcomes(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `scenario.py` found, by checkpoint."""
    folders = [checkpoints / name for name in NAMES]
    found = json.loads(run_elsewhere(tmp_path_factory.mktemp("elsewhere"), SCENARIO, *folders).splitlines()[-1])
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_copy_gives_the_same_result(name, outcomes):
    assert outcomes[name]["reloaded"] == outcomes[name]["result"]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_came_from_the_folder(name, outcomes):
    assert outcomes[name]["code"].startswith("transformers_modules.")


def test_the_answers_are_more_than_one_token_repeated(outcomes):
    """Else equal results would say little."""
    assert len(set(outcomes["chat"]["result"])) > 2


def test_processes_that_load_a_fresh_moved_folder_at_once_get_the_same_result(checkpoints, outcomes, tmp_path):
    moved = tmp_path / "another.name with spaces"
    shutil.copytree(checkpoints / "chat", moved)
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command, env = [sys.executable, "-P", SCENARIO, moved], elsewhere(tmp_path)
    processes = [subprocess.Popen(command, env=env, **options) for _ in range(NUM_PROCESSES)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        (found,) = json.loads(output.splitlines()[-1])
        assert found["result"] == outcomes["chat"]["result"]


PICKLE = """
import multiprocessing, sys
from transformers import AutoConfig

def model_type_of(config):
    return config.model_type, config.vision_config.hidden_size

if __name__ == "__main__":
    config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(model_type_of, [config])[0])
"""


def test_a_remote_configuration_reaches_a_spawned_worker(checkpoints, tmp_path):
    """Data loaders and vLLM start workers so; the code cache must be importable there, as transformers documents."""
    script = tmp_path / "script.py"
    script.write_text(PICKLE)
    found = run_elsewhere(tmp_path, script, checkpoints / "chat", PYTHONPATH=elsewhere(tmp_path)["HF_MODULES_CACHE"])
    assert found.split() == ["internvl_chat_model", "32"]


def test_the_installed_package_serves_every_door_without_trust(checkpoints):
    """transformers has classes of its own named `InternVLProcessor` and `InternVLModel`; they must not be taken."""
    doors = [
        (door, name) for door in (AutoModel, AutoProcessor, AutoImageProcessor) for name in ("chat", "contrastive")
    ]
    for door, name in [*doors, (AutoModel, "vision")]:
        assert type(door.from_pretrained(checkpoints / name)).__module__.startswith("internvl."), (door, name)


TWO_RELEASES = """
import sys
sys.modules["internvl"] = None
from transformers import AutoModel, AutoModelForImageTextToText
first, second = sys.argv[1:]
for auto in (AutoModel, AutoModelForImageTextToText):
    found = [auto.from_pretrained(folder, trust_remote_code=True) for folder in (first, second, first, second)]
    assert [getattr(model, "release", 1) for model in found] == [1, 2, 1, 2], found
    assert type(found[0]) is type(found[2]) and type(found[1]) is type(found[3])
"""


def test_two_folders_of_one_name_keep_their_own_modeling_code(checkpoints, tmp_path):
    """Their configuration code is the same, and it is what transformers remembers classes by."""
    folders = [shutil.copytree(checkpoints / "chat", tmp_path / parent / "model") for parent in ("first", "second")]
    code = folders[1] / "modeling_internvl_chat.py"
    own = "    _has_language_head = True\n"
    assert own in code.read_text()
    code.write_text(code.read_text().replace(own, own + "    release = 2\n"))
    run_elsewhere(tmp_path / "work", "-c", TWO_RELEASES, *folders)
