"""Runs transformers' own test mixins against every class of this package.

    python tests/conformance/run.py [SPEC...] [--only GROUP,...] [--package DIR] [pytest arguments]
    python tests/conformance/run.py chat --only model -k 'sdpa or tied' -x

The mixins are not copied here: they come with the source distribution of exactly the installed transformers (its wheel
has no tests), fetched from PyPI once into `.conformance/`. That archive leaves out some files the mixins import;
`stand_ins/` takes their place, so transformers' generation and export suites do not run; `generation_checks.py` holds
generation checks of our own.

A specification (`specs/NAME.py`) says how a tiny model of one class is made, and names every test that is skipped with
the reason. A skip that no reason covers counts as a failure, so nothing is left out silently. `suite.py` turns a
specification into test classes. Exit status 0: no failure and no unexplained skip.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
]  # specifications import each other as `specs.name`, and the tests' fixtures
CACHE = Path(os.environ.get("CONFORMANCE_CACHE", ROOT / ".conformance"))
SPECS = ("chat", "chat_full", "image_modes", "contrastive", "contrastive_c", "qllama", "vision")
# What one of the tensor parallel tests needs; no part of the package uses it.
TORCHAO = "torchao==0.18.0"


def fetch_upstream_tests() -> Path:
    """Folder holding the installed transformers' tests as the importable package `tests`."""
    folder = CACHE / version("transformers")
    if not (folder / "ready").exists():
        requirement = f"transformers=={version('transformers')}"
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        (archive,) = folder.glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = member.name.split("/")
                if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                    member.name = "/".join(parts[1:])
                    tar.extract(member, folder, filter="data")
        (folder / "ready").touch()
    for source in sorted((HERE / "stand_ins").rglob("*.py")):
        target = folder / "tests" / source.relative_to(HERE / "stand_ins")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    # The one file that lies beside `tests`, not in it.
    utils = folder / "utils"
    utils.mkdir(exist_ok=True)
    (folder / "tests" / "fetch_hub_objects_for_ci.py").replace(utils / "fetch_hub_objects_for_ci.py")
    return folder


def fetch_torchao() -> Path:
    """Folder to import torchao from."""
    folder = CACHE / TORCHAO
    if not folder.exists():
        options = ["--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, TORCHAO], check=True)
    return folder


def load_spec(path: Path) -> ModuleType:
    """A specification as a module."""
    finder = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
    module = importlib.util.module_from_spec(finder)
    finder.loader.exec_module(module)
    return module


def stated_reason(spec: ModuleType, message: str) -> str | None:
    """Why the specification says a test that skipped itself with `message` may do so."""
    if message in getattr(spec, "NOT_RUN", {}).values():
        return message
    skips = getattr(spec, "SKIPS", {})
    return next((skips[pattern] for pattern in skips if fnmatch(message, pattern)), None)


def outcome_of(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def report(xml: Path, spec: ModuleType) -> tuple[Counter, list[str]]:
    """Prints one line per group and per reason; returns the counts and the skips that no reason covers."""
    total, reasons, unexplained = Counter(), Counter(), []
    groups: dict[str, Counter] = {}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        outcome, group = outcome_of(case), case.get("classname", "").split(".")[-1]
        total[outcome] += 1
        groups.setdefault(group, Counter())[outcome] += 1
        if outcome != "skipped":
            continue
        message = case.find("skipped").get("message", "")
        reason = stated_reason(spec, message)
        if reason is None:
            unexplained.append(f"{group}.{case.get('name')}: {message}")
        else:
            reasons[reason] += 1
    for group, counts in groups.items():
        print(f"  {group}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    for reason, count in reasons.most_common():
        print(f"    {count} skipped: {reason}")
    for line in unexplained:
        print(f"    SKIPPED WITHOUT A STATED REASON {line}")
    return total, unexplained


def run_spec(name: str, package: Path, only: str, pytest_arguments: list[str]) -> tuple[Counter, list[str], int]:
    """One specification in its own process."""
    upstream, spec, xml = fetch_upstream_tests(), HERE / "specs" / f"{name}.py", CACHE / f"report-{name}.xml"
    modules = CACHE / "hf_modules"
    folders = (upstream, HERE, modules, fetch_torchao())
    environment = {
        **os.environ,
        "CONFORMANCE_SPEC": str(spec),
        "CONFORMANCE_ONLY": only,
        "CONFORMANCE_PACKAGE": str(package),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(modules),
        "TOKENIZERS_PARALLELISM": "false",
        "RUN_TRAINING_TESTS": "1",
        "RUN_TENSOR_PARALLEL_TESTS": "1",
        # `modules`: processes that the tensor parallel tests start unpickle classes of the loaded package.
        "PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", str(HERE / "suite.py"), "--quiet", "--no-header", "--tb=short"]
    command += ["-c", os.devnull, "--rootdir", str(HERE), "--confcutdir", str(HERE), "--assert=plain", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-o", "python_files=suite.py", f"--junitxml={xml}", *pytest_arguments]
    start = time.monotonic()
    print(f"== {name}", flush=True)
    status = subprocess.run(command, env=environment, cwd=upstream, check=False).returncode
    counts, unexplained = report(xml, load_spec(spec))
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return counts, unexplained, status


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' own test mixins against this package")
    parser.add_argument("specs", nargs="*", metavar="SPEC", help=f"default: {' '.join(SPECS)}")
    parser.add_argument("--only", default="", help="groups, separated by commas")
    parser.add_argument(
        "--package", type=Path, default=ROOT, help="folder with the flat files (default: this repository)"
    )
    arguments, pytest_arguments = parser.parse_known_args()
    total, bad, results = Counter(), False, []
    for name in arguments.specs or SPECS:
        counts, unexplained, status = run_spec(name, arguments.package.resolve(), arguments.only, pytest_arguments)
        total += counts
        bad = bad or bool(status) or bool(unexplained)
        results.append(f"{name} {counts['passed']} passed {counts['failed']} failed {counts['skipped']} skipped")
    print("\n".join(results))
    print(f"conformance: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
