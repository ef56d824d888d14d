"""Whether a folder is fit for the Hub: what would be sent, and every fault found in it.

Looked at are the files (strays, links out of the folder, access tokens, sizes), the weights of every model (checksums,
index, Git LFS pointers), the code that loading runs, the card, and whether each model loads in a fresh process.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..console import printable
from ..conversion.readers.checkpoint_files import is_plain, read_json
from ..conversion.readers.links import hub_snapshot
from ..conversion.repository.records import MANIFEST_FILE
from .card_check import card_faults
from .code import list_code
from .fresh_process import loading_faults


# Not sent: of other programs, or made again by them. The Hub makes a `.gitattributes` that stores weights by Git LFS.
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "Thumbs.db")
SENT_ALTHOUGH_HIDDEN = (".eval_results",)
# What lies beside a model and does not belong there, by what it is.
STRAYS = {
    "the state of a training": (
        *("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args.bin", "trainer_state.json"),
        *("checkpoint-*", "global_step*", "events.out.tfevents*", "wandb", "runs"),
    ),
    "a pickle, which loading it would run": ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),
    "left by a program": ("*.log", "*.tmp", "*.incomplete", "*.lock", "*.swp", "*~", "*.orig", "*.rej"),
    "a key": ("*.pem", "*.key", "id_rsa*", "id_ed25519*"),
}
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_TEXT_BYTES = 10 * 2**20  # beyond which no file is searched for tokens
# Of the Hub: the hard limit of a file, and the largest number of files of a folder.
MOST_FILE_BYTES = 500 * 10**9
MOST_FILES_OF_FOLDER = 10_000
INDEX_FILE = "model.safetensors.index.json"


@dataclass
class Inspection:
    """What was found in a folder.

    Args:
        folder: The folder.
        files: Names of the files that would be sent, sorted.
        left_out: Names of files and folders that would not.
        faults: What has to be mended first, one line each.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size of all files that would be sent."""
        return sum((self.folder / name).stat().st_size for name in self.files if (self.folder / name).is_file())

    def describe(self) -> list[str]:
        """Returns the findings as lines of text."""
        lines = [f"{len(self.files)} files, {self.num_bytes / 1e6:,.1f} MB."]
        if self.left_out:
            lines.append(printable(f"Not sent: {', '.join(self.left_out)}."))
        lines += [printable(f"fault: {fault}") for fault in self.faults]
        return [*lines, f"Faults: {len(self.faults)}." if self.faults else "Fit for the Hub."]


def inspect_folder(folder: Path, load: bool = True, trust: bool = False) -> Inspection:
    """Looks for faults in a folder.

    Args:
        folder: Folder of a repository; models lie in it and in its sub-folders.
        load: Whether to load every model in a fresh process.
        trust: Whether code in the folder that is not this package's is no fault, and is run.

    Raises:
        OSError: If there is no such folder, or a file cannot be read.
        ValueError: If a JSON file cannot be parsed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}`.")
    folder = folder.resolve()
    found = Inspection(folder)
    found.files, found.left_out = _listed(folder)
    found.faults += _place_faults(folder, found.files)
    if found.faults:  # what lies elsewhere is not read, nor what may have no end, as a pipe
        return found
    places = (folder, *sorted(folder.iterdir()))
    models = [place for place in places if (place / "config.json").relative_to(folder).as_posix() in found.files]
    if not models:
        found.faults.append("There is no model: `config.json` is missing.")
    found.faults += _file_faults(folder, found.files)
    for model in models:
        found.faults += _stray_faults(folder, model)
        found.faults += _weight_faults(model, "" if model == folder else f"{model.name}/")
    code_faults = _code_faults(folder, models, trust)
    found.faults += code_faults + card_faults(folder, found.files)
    if load and not code_faults:  # what is not this package's own is not run
        found.faults += [fault for model in models for fault in loading_faults(folder, model)]
    return found


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files that are sent, and of what is left out."""
    files, left_out = [], []
    for place, folders, names in os.walk(folder):
        below = Path(place).relative_to(folder)
        for name in [*folders, *names]:
            is_hidden = name not in SENT_ALTHOUGH_HIDDEN and any(fnmatch(name, pattern) for pattern in LEFT_OUT)
            if is_hidden or (name in folders and Path(place, name).is_symlink()):
                left_out.append((below / name).as_posix())
                if name in folders:
                    folders.remove(name)
            elif name in names:
                files.append((below / name).as_posix())
    return sorted(files), sorted(name for name in left_out if "__pycache__" not in name)


# --------------------------------------------------------------------------------------------------------------- files
def _place_faults(folder: Path, files: list[str]) -> Iterator[str]:
    snapshots = hub_snapshot(folder)
    allowed = [folder.resolve(), *([snapshots.parent / "blobs"] if snapshots else [])]
    for name in files:
        file = folder / name
        if not any(Path(os.path.realpath(file)).is_relative_to(place) for place in allowed):
            yield f"`{name}` is a link to {os.path.realpath(file)}, outside of the folder."
        elif not file.is_file():
            yield f"`{name}` is no file."


def _file_faults(folder: Path, files: list[str]) -> Iterator[str]:
    for name in files:
        file = folder / name
        if file.stat().st_size > MOST_FILE_BYTES:
            yield f"`{name}` has {file.stat().st_size / 1e9:.0f} GB; the Hub takes 500 at most."
        elif file.stat().st_size <= MOST_TEXT_BYTES and TOKEN.search(file.read_bytes()):
            yield f"`{name}` holds an access token of the Hub. Take it out, and revoke it."
    counts: dict[str, int] = {}
    for name in files:
        counts[Path(name).parent.as_posix()] = counts.get(Path(name).parent.as_posix(), 0) + 1
    for place, count in counts.items():
        if count > MOST_FILES_OF_FOLDER:
            yield f"`{place}` has {count} files; the Hub takes {MOST_FILES_OF_FOLDER} in one folder."


def _stray_faults(folder: Path, model: Path) -> Iterator[str]:
    for entry in sorted(model.iterdir()):
        kinds = (what for what, patterns in STRAYS.items() if any(fnmatch(entry.name, form) for form in patterns))
        if what := next(kinds, None):
            yield f"`{entry.relative_to(folder).as_posix()}` does not belong beside a model: it is {what}."


# ------------------------------------------------------------------------------------------------------------- weights
def _weight_faults(model: Path, place: str) -> Iterator[str]:
    """Faults of a model whose files are named with `place` before them."""
    files = sorted(file for file in model.glob("*.safetensors") if file.is_file())
    if not files:
        yield f"`{place}config.json` has no weights beside it: there is no .safetensors file."
    names: dict[str, str] = {}
    for file in files:
        with file.open("rb") as handle:
            is_pointer = handle.read(len(LFS_POINTER)) == LFS_POINTER
        if is_pointer:
            yield f"`{place}{file.name}` is a pointer of Git LFS, not the weights: run `git lfs pull`."
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                names |= dict.fromkeys(tensors.keys(), file.name)
        except (SafetensorError, OSError) as error:
            yield f"`{place}{file.name}` cannot be read ({error})."
    faults = (*_index_faults(model, names, len(files)), *_hash_faults(model))
    yield from (fault.replace("`", f"`{place}", 1) for fault in faults)


def _index_faults(model: Path, names: dict[str, str], num_files: int) -> Iterator[str]:
    if not (model / INDEX_FILE).is_file():
        if num_files > 1:
            yield f"`{INDEX_FILE}` is missing; it names the file of each tensor."
        return
    listed = read_json(model / INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict):
        yield f"`{INDEX_FILE}` has no `weight_map`."
        return
    wrong = sorted(name for name in listed.keys() | names.keys() if listed.get(name) != names.get(name))
    if wrong:
        yield f"`{INDEX_FILE}` and the files differ in {len(wrong)} tensors, the first is `{wrong[0]}`."


def _hash_faults(model: Path) -> Iterator[str]:
    """Compares the checksums that a conversion noted."""
    noted = read_json(model / MANIFEST_FILE).get("sha256")
    for name, digest in (noted if isinstance(noted, dict) else {}).items():
        if not is_plain(name) or not (model / name).is_file():
            yield f"`{name}` is noted in `{MANIFEST_FILE}`, but not there."
        elif _sha256(model / name) != digest:
            yield f"`{name}` has another SHA-256 than `{MANIFEST_FILE}` notes: it changed since the conversion."


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------- code
def _code_faults(folder: Path, models: Iterable[Path], trust: bool) -> list[str]:
    faults = []
    for model in models:
        listing = list_code(model)
        missing = [file.name for file in listing.files if file.sha256 is None]
        if model != folder:  # transformers takes them from the top of the repository
            missing = [name for name in missing if not (folder / name).is_file()]
        faults += [f"`{name}` is named as code, but is not there." for name in missing]
        others = [] if trust else [file.name for file in listing.files if file.sha256 and not file.is_ours]
        others += listing.foreign
        faults += [
            f"{name} is not this package's code, and loading the repository runs it; "
            "`--trust` says that this is wanted."
            for name in others
        ]
    return sorted(set(faults))
