"""The supported transformers releases give the same tokens from the same checkpoints.

    python tests/versions/matrix.py [VERSION...]

Each release listed as VERSION.txt beside this file is installed, without its dependencies, into `.versions/VERSION`
once and put in front of the installed packages by PYTHONPATH. In each: every name that the package imports exists
(`imports.py`); the default checkpoint and the tiny ones (`tiny_checkpoints.py`) load as remote code, generate, and
reload with equal tokens (`scenario.py`). The release below the range must be refused with one clear error.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INSTALLED = version("transformers")
TOO_OLD = "5.18.0"
# What the default checkpoint consists of, beside the Python files; the repository has much else.
CHECKPOINT_SUFFIXES = {".py", ".json", ".jinja", ".safetensors", ".model"}


def install(release: str) -> Path:
    """Folder with one transformers release and the packages that it needs in other versions than the pinned ones."""
    target, requirements = ROOT / ".versions" / release, HERE / f"{release}.txt"
    stamp = target / requirements.name
    if not stamp.exists() or stamp.read_bytes() != requirements.read_bytes():
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(target), "-r", str(requirements)], check=True)
        shutil.copy(requirements, stamp)
    return target


def environment(release: str, work: Path, *paths: Path) -> dict[str, str]:
    """Of a process that sees one transformers release, no network and a code cache of its own."""
    ours = [] if release == INSTALLED else [install(release)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*ours, *paths])),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work / f"modules-{release}"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def call(script: Path, arguments: list, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, [script, *arguments])]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)


def make_checkpoints(work: Path) -> list[Path]:
    """The tiny checkpoints, and the default one of this repository if it is there."""
    call_or_stop(HERE / "tiny_checkpoints.py", [work / "tiny"], environment(INSTALLED, work, package_link(work)), work)
    folders = sorted((work / "tiny").iterdir())
    if (ROOT / "config.json").exists():
        default = work / "default"
        default.mkdir()
        for path in ROOT.iterdir():
            if path.suffix in CHECKPOINT_SUFFIXES:
                shutil.copy(path, default)
        folders.append(default)
    return folders


def package_link(work: Path) -> Path:
    """A folder through which this repository is importable as `internvl`, installed or not."""
    link = work / "package"
    link.mkdir(exist_ok=True)
    if not (link / "internvl").exists():
        (link / "internvl").symlink_to(ROOT, target_is_directory=True)
    return link


def call_or_stop(script: Path, arguments: list, env: dict[str, str], cwd: Path) -> str:
    done = call(script, arguments, env, cwd)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_release(release: str, folders: list[Path], work: Path) -> tuple[list[str], dict[str, list]]:
    """Faults of one release, and its results by checkpoint."""
    env = environment(release, work)
    faults = []
    names = call(HERE / "imports.py", [], env, work)
    if names.returncode:
        faults.append(f"{names.stdout}{names.stderr}")
    done = call(HERE / "scenario.py", folders, env, work)
    if done.returncode:
        return [*faults, f"{done.stdout}\n{done.stderr}"], {}
    runs = dict(zip((folder.name for folder in folders), json.loads(done.stdout.splitlines()[-1]), strict=True))
    for name, outcome in runs.items():
        if outcome["transformers"] != release:
            faults.append(f"{name}: transformers {outcome['transformers']} was loaded")
        if outcome["reloaded"] != outcome["result"]:
            faults.append(f"{name}: {outcome['result']} became {outcome['reloaded']} after saving and loading")
    return faults, {name: outcome["result"] for name, outcome in runs.items()}


def check_refusal(work: Path) -> list[str]:
    """The release below the range: one ImportError that names the range and what was found."""
    script = work / "import_package.py"
    script.write_text("import internvl\n")
    done = call(script, [], environment(TOO_OLD, work, package_link(work)), work)
    wanted = ("ImportError", ">=5.19", TOO_OLD)
    return [] if done.returncode and all(word in done.stderr for word in wanted) else [f"not refused: {done.stderr}"]


def main() -> int:
    releases = sys.argv[1:] or sorted({INSTALLED, *(p.stem for p in HERE.glob("*.txt"))} - {TOO_OLD})
    first: dict[str, list] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        folders = make_checkpoints(work)
        for release in releases:
            start = time.monotonic()
            faults, results = check_release(release, folders, work)
            for name, result in results.items():
                if result != first.setdefault(name, result):
                    faults.append(f"{name}: {result} here, {first[name]} on transformers {releases[0]}")
            failed += bool(faults)
            state = "FAILED" if faults else "passed"
            print(
                f"transformers {release}: {len(results)} checkpoints {state} in {time.monotonic() - start:.0f} s",
                flush=True,
            )
            print("".join(f"  {fault}\n" for fault in faults), end="")
        faults = check_refusal(work)
        failed += bool(faults)
        print(f"transformers {TOO_OLD}: {'; '.join(faults) or 'refused with one clear error, as it should be'}")
    print(f"versions: {len(releases) + 1 - failed} passed, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
