"""The supported range: what is imported from transformers exists there, the pins lie within it, and outside it the
error says so."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .versions.imports import missing_names


ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tests" / "versions"


def by_name(lines: Iterable[str]) -> dict[str, Requirement]:
    requirements = map(Requirement, lines)
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in requirements}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges() -> dict[str, Requirement]:
    """The `dependencies` of pyproject.toml."""
    return by_name(project()["dependencies"])


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return by_name(line for line in lines if line and not line.startswith("#"))


def test_every_name_imported_from_transformers_exists_in_the_installed_one():
    """`make versions` runs the same script on every supported release."""
    assert missing_names() == []


def test_pins_lie_within_the_ranges():
    for name, requirement in ranges().items():
        (pin,) = pins()[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{pin} is outside {requirement}"


def test_one_python_is_the_lowest_everywhere():
    """What pip asks for, what the linter takes for granted, what is said to be supported, what CI runs."""
    lowest = project()["requires-python"].removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert tools["mypy"]["python_version"] == lowest
    supported = [name.split(" :: ")[-1] for name in project()["classifiers"] if "Python ::" in name]
    assert min(supported, key=Version) == lowest
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert f'python-version: "{lowest}"' in path.read_text(), path.name


def test_torch_is_pinned_without_a_build_label():
    """A looser pin pulls gigabytes of GPU packages onto machines without a GPU."""
    assert str(pins()["torch"]) == "torch==2.13.0"


def test_the_oldest_and_the_newest_release_of_the_range_are_in_the_matrix():
    listed = {path.stem for path in VERSIONS.glob("*.txt")}
    below = {version for version in listed if not ranges()["transformers"].specifier.contains(version)}
    assert (listed - below, below) == ({"5.19.0"}, {"5.18.0"})
    (newest,) = pins()["transformers"].specifier
    assert newest.version == "5.23.0"


@pytest.mark.parametrize("found", ["4.57.6", "5.18.0", "6.0.0"])
def test_a_transformers_outside_the_range_is_named_in_one_error(found, tmp_path):
    """The version is faked by its metadata alone; `make versions` meets a real 5.18.0."""
    metadata = tmp_path / f"transformers-{found}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {found}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", "import internvl"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    last_error = done.stderr[done.stderr.index("ImportError") :]
    assert ">=5.19" in last_error
    assert found in last_error
