"""The code that loading a folder with `trust_remote_code=True` runs, followed as transformers follows it; none of it is run here.

`auto_map`, wherever it stands in a JSON file, names `module.Class`, a file of the folder, or `repository--module.Class`, code that lies
elsewhere; a file brings those that it imports by `from .name import`. Beside it transformers runs `custom_pipelines` of config.json and
`custom_generate/generate.py`, loads an attention that is called `user/kernel` from the Hub, and goes to the base of an adapter that lies
alone; sentence-transformers makes the modules that modules.json names, and PEFT imports the library of an adapter's `auto_mapping`.
Tokenizers besides the first lie in sub-folders, and what they name lies in the folder itself.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from ..conversion.formats.published_files import own_contents
from ..conversion.readers.checkpoint_files import is_plain, read_any_json, read_json
from ..conversion.readers.foreign_settings import ATTENTION_KEYS
from ..conversion.readers.links import hub_snapshot
from ..conversion.repository.card import hub_id


CUSTOM_GENERATE = "custom_generate/generate.py"
# Read by no loader of code.
DATA_FILES = ("conversion.json", "tokenizer.json", "vocab.json", "added_tokens.json")
# Libraries whose classes are no code of a repository.
LIBRARIES = ("internvl.", "sentence_transformers.", "transformers.")
# Auto classes for the snippet, the first that there is.
MODELS = (
    "AutoModelForImageTextToText",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForImageClassification",
    "AutoModel",
)
SNIPPET = """\
from transformers import {classes}

repository, revision = "{repository}", "{revision}"  # the commit whose files are those above
pinned = {{"revision": revision, "code_revision": revision, "trust_remote_code": True}}
{calls}"""


@dataclass(frozen=True)
class CodeFile:
    """One file that is run.

    Args:
        name: Within the folder.
        sha256: Of its content; None where it is missing.
        is_ours: Whether it is a file of this package, byte for byte, or one that its conversion writes.
    """

    name: str
    sha256: str | None
    is_ours: bool

    @property
    def whose(self) -> str:
        """What it is, in words."""
        if self.sha256 is None:
            return "named, but not there"
        return "this package's" if self.is_ours else "NOT this package's"


@dataclass
class Listing:
    """What loading a folder runs.

    Args:
        folder: The folder.
        files: Of the folder, sorted.
        foreign: Code elsewhere, and who names it.
    """

    folder: Path
    files: list[CodeFile] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        """Whether nothing but files of this package is run."""
        return not self.foreign and all(file.is_ours for file in self.files)

    def describe(self) -> list[str]:
        """Line by line."""
        if not self.files and not self.foreign:
            return [f"Nothing in `{self.folder}` names code: it loads without trust_remote_code."]
        lines = [f"Loading `{self.folder}` with trust_remote_code=True runs:"]
        lines += [f"{file.sha256 or '-' * 64}  {file.name}  ({file.whose})" for file in self.files]
        lines += [f"{'elsewhere':64}  {reference}" for reference in self.foreign]
        missing = [file.name for file in self.files if file.sha256 is None]
        others = [file.name for file in self.files if file.sha256 and not file.is_ours] + self.foreign
        if self.is_ours:
            lines.append("All of it is this package's.")
        if others:
            lines.append(f"Not this package's, so read it first: {', '.join(others)}.")
        if missing:
            lines.append(
                f"Not in this folder: {', '.join(missing)}. For a sub-folder, transformers takes them from the top of the repository: "
                "list that one as well."
            )
        return lines


def list_code(folder: Path) -> Listing:
    """Looks at a folder.

    Args:
        folder: Of a repository.

    Returns:
        What loading it runs.

    Raises:
        OSError: There is no such folder, or a file cannot be read.
        ValueError: A JSON file is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}`.")
    found = Listing(folder)
    waiting = []
    for where, reference in _references(folder):
        module = _module_of(reference)
        if module is None:
            found.foreign.append(f"{reference!r} ({where})")
        else:
            waiting.append(module)
    files = _with_imports(folder, waiting)
    if (folder / CUSTOM_GENERATE).is_file():
        files.add(CUSTOM_GENERATE)
    found.files = [_code_file(folder, name) for name in sorted(files)]
    return found


def pinned_snippet(folder: Path, repository: str | None = None, revision: str | None = None) -> str:
    """Code that loads a repository by one commit, so that what was looked at is what runs.

    Args:
        folder: Of the repository; in the Hub's cache it tells name and commit.
        repository: Its name on the Hub.
        revision: Its commit there.
    """
    config = read_json(folder / "config.json")
    auto_map = config.get("auto_map") if isinstance(config.get("auto_map"), dict) else {}
    model = next((name for name in MODELS if not auto_map or name in auto_map), "AutoModel")
    processors = {"processor_config.json": "AutoProcessor", "preprocessor_config.json": "AutoImageProcessor"}
    processor = next((name for file, name in processors.items() if (folder / file).is_file()), None)
    classes = [name for name in (model, processor) if name]
    names = {model: "model", processor: "processor"}
    snapshots = hub_snapshot(folder)
    commit = folder.resolve().relative_to(snapshots).parts[0] if snapshots else None
    return SNIPPET.format(
        classes=", ".join(sorted(classes)),
        repository=repository or hub_id(folder) or "user/name",
        revision=revision or commit or "<commit>",
        calls="\n".join(f"{names[name]} = {name}.from_pretrained(repository, **pinned)" for name in classes),
    )


# ------------------------------------------------------------------------------------------------------------- what is named
def _references(folder: Path) -> Iterator[tuple[str, Any]]:
    """Where code is named, and by what."""
    for file in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        if file.name not in DATA_FILES and not file.name.endswith(".index.json") and file.is_file():
            name = file.relative_to(folder).as_posix()
            for key, reference in (*_named(read_any_json(file)), *_named_by_libraries(file)):
                yield f"{key} in {name}", reference


def _named(content: Any) -> Iterator[tuple[str, Any]]:
    """What transformers follows in any file: key and reference."""
    for auto_map in _values_of(content, "auto_map"):
        yield from (("auto_map", reference) for reference in _leaves(auto_map))
    for pipelines in _values_of(content, "custom_pipelines"):
        for task in pipelines.values() if isinstance(pipelines, dict) else [pipelines]:
            yield "custom_pipelines", task.get("impl") if isinstance(task, dict) else task
    for key in ATTENTION_KEYS:
        for attention in _values_of(content, key):
            kernels = (name for name in _leaves(attention) if isinstance(name, str) and "/" in name)
            yield from ((key, kernel) for kernel in kernels)


def _named_by_libraries(file: Path) -> Iterator[tuple[str, Any]]:
    """What a file of sentence-transformers, or of PEFT, names."""
    if file.name == "modules.json":
        for name in _values_of(read_any_json(file), "type"):
            if not str(name).startswith(LIBRARIES):
                yield "type", name
    if file.name == "adapter_config.json":
        content = read_json(file)
        if not (file.parent / "config.json").is_file():
            yield "base_model_name_or_path", f"{content.get('base_model_name_or_path')}--its code"
        for library in _values_of(content, "parent_library"):
            if not f"{library}.".startswith(LIBRARIES):
                yield "parent_library", f"{library}--all of it"


def _values_of(content: Any, key: str) -> Iterator[Any]:
    """Values of a key at any depth."""
    if isinstance(content, dict):
        if key in content:
            yield content[key]
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _values_of(part, key)


def _leaves(value: Any) -> Iterator[Any]:
    """References of an `auto_map`: tokenizers have two to a name, of which one may be None."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _module_of(reference: Any) -> str | None:
    """The file of this folder that a reference names; None where it leads elsewhere."""
    if not isinstance(reference, str) or "--" in reference or reference.count(".") != 1:
        return None
    name = f"{reference.partition('.')[0]}.py"
    return name if is_plain(name) else None


def _with_imports(folder: Path, names: list[str]) -> set[str]:
    """Files with all that they import from the same folder."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if (folder / name).is_file():
            with suppress(UnicodeDecodeError):  # nor can such a file be run
                waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found


def _code_file(folder: Path, name: str) -> CodeFile:
    file = folder / name
    if not file.is_file():
        return CodeFile(name, None, False)
    content = file.read_bytes()
    return CodeFile(name, hashlib.sha256(content).hexdigest(), content in own_contents(name))
