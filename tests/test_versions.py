"""The supported range: what is imported from transformers exists there, the pins lie within it, and outside it the error says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tests" / "versions"


def requirements_in(text: str) -> dict[str, Requirement]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in map(Requirement, lines)}


def ranges() -> dict[str, Requirement]:
    """The `dependencies` of pyproject.toml; read by hand because Python 3.10 has no tomllib."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M).group(1)
    return requirements_in("\n".join(re.findall(r'"([^"]+)"', block)))


def pins() -> dict[str, Requirement]:
    return requirements_in((ROOT / "constraints.txt").read_text())


def test_every_name_imported_from_transformers_exists_in_the_installed_one():
    """`make versions` runs the same script on every supported release."""
    done = subprocess.run([sys.executable, VERSIONS / "imports.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pins_lie_within_the_ranges():
    for name, requirement in ranges().items():
        (pin,) = pins()[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{pin} is outside {requirement}"


def test_torch_is_pinned_without_a_build_label():
    """A looser pin pulls gigabytes of GPU packages onto machines without a GPU."""
    assert str(pins()["torch"]) == "torch==2.13.0"


def test_the_oldest_and_the_newest_release_of_the_range_are_in_the_matrix():
    listed = {path.stem for path in VERSIONS.glob("*.txt")}
    assert {"5.12.0", "5.16.1", "5.19.0"} <= listed
    assert all(ranges()["transformers"].specifier.contains(v) for v in listed - {"5.11.0"})
    (newest,) = pins()["transformers"].specifier
    assert newest.version == "5.23.0"


@pytest.mark.parametrize("found", ["4.57.6", "5.11.0", "6.0.0"])
def test_a_transformers_outside_the_range_is_named_in_one_error(found, tmp_path):
    """The version is faked by its metadata alone; `make versions` meets a real 5.11.0."""
    metadata = tmp_path / f"transformers-{found}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {found}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", "import internvl"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    last_error = done.stderr[done.stderr.index("ImportError") :]
    assert ">=5.12" in last_error
    assert found in last_error
