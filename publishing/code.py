"""Finds the code that loading a folder with `trust_remote_code=True` runs, without running it.

- `auto_map`, anywhere in a JSON file, names `module.Class`, a file of the folder, or `repository--module.Class`, code
  that lies elsewhere. A file brings the files that it imports by `from .name import`.
- transformers also runs `custom_pipelines` of config.json and `custom_generate/generate.py`, loads an attention called
  `user/kernel` from the Hub, and follows an adapter without a model beside it to its base.
- sentence-transformers instantiates the modules that modules.json names; PEFT imports the library of an adapter's
  `auto_mapping`.
- Inference Endpoints import handler.py, or pipeline.py, and make its class.
- Further tokenizers lie in sub-folders; the files that they name lie in the folder itself.
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


# Run where they lie in a folder, whether or not a configuration names them.
UNNAMED_CODE = ("custom_generate/generate.py", "handler.py", "pipeline.py")
# No loader looks for code in these.
DATA_FILES = ("conversion.json", "tokenizer.json", "vocab.json", "added_tokens.json")
# Classes of these libraries are installed, not part of a repository.
LIBRARIES = ("internvl.", "sentence_transformers.", "transformers.")
# Auto classes for the snippet; the first one in `auto_map` is used.
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
    """A file that is run.

    Args:
        name: Path within the folder.
        sha256: Hash of the content; None if the file is missing.
        is_ours: Whether it equals, byte for byte, a file of this package or one that its conversion writes.
    """

    name: str
    sha256: str | None
    is_ours: bool

    @property
    def whose(self) -> str:
        """Whose file it is, in words."""
        if self.sha256 is None:
            return "named, but not there"
        return "this package's" if self.is_ours else "NOT this package's"


@dataclass
class Listing:
    """The code that loading a folder runs.

    Args:
        folder: The folder.
        files: Files of the folder, sorted by name.
        foreign: Code elsewhere, each with the key and file that name it.
    """

    folder: Path
    files: list[CodeFile] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        """Whether only files of this package are run."""
        return not self.foreign and all(file.is_ours for file in self.files)

    def describe(self) -> list[str]:
        """Return the listing as lines of text."""
        if not self.files and not self.foreign:
            return [f"Nothing in `{self.folder}` names code: it loads without trust_remote_code."]
        lines = [f"Loading `{self.folder}` with trust_remote_code=True, or as an Inference Endpoint, runs:"]
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
                f"Not in this folder: {', '.join(missing)}. For a sub-folder, transformers takes them from the top of "
                "the repository: list that one as well."
            )
        return lines


def list_code(folder: Path) -> Listing:
    """List the code that loading a folder runs.

    Raises:
        OSError: If there is no such folder, or a file cannot be read.
        ValueError: If a JSON file cannot be parsed.
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
    files = _with_imports(folder, [*waiting, *(name for name in UNNAMED_CODE if (folder / name).is_file())])
    found.files = [_code_file(folder, name) for name in sorted(files)]
    return found


def pinned_snippet(folder: Path, repository: str | None = None, revision: str | None = None) -> str:
    """Return Python code that loads a repository by its commit, so that the files that were read are those that run.

    If the folder lies in the Hub's cache, its path holds name and commit.
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


# Names of code in JSON files
def _references(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield where code is named ("key in file") and the reference itself."""
    for file in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        if file.name not in DATA_FILES and not file.name.endswith(".index.json") and file.is_file():
            name = file.relative_to(folder).as_posix()
            for key, reference in (*_named(read_any_json(file)), *_named_by_libraries(file)):
                yield f"{key} in {name}", reference


def _named(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the references that transformers follows in any file, each with its key."""
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
    """Yield the references in files of sentence-transformers and PEFT, each with its key."""
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
    """Yield the values of a key at any depth."""
    if isinstance(content, dict):
        if key in content:
            yield content[key]
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _values_of(part, key)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the references of an `auto_map`. Tokenizers have two per name, of which one may be None."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _module_of(reference: Any) -> str | None:
    """Return the file of this folder that a reference names; None if it leads elsewhere."""
    if not isinstance(reference, str) or "--" in reference or reference.count(".") != 1:
        return None
    name = f"{reference.partition('.')[0]}.py"
    return name if is_plain(name) else None


def _with_imports(folder: Path, names: list[str]) -> set[str]:
    """Return the files together with all that they import from the same folder."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if (folder / name).is_file():
            with suppress(UnicodeDecodeError):  # Python cannot run such a file either
                waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found


def _code_file(folder: Path, name: str) -> CodeFile:
    file = folder / name
    if not file.is_file():
        return CodeFile(name, None, False)
    content = file.read_bytes()
    return CodeFile(name, hashlib.sha256(content).hexdigest(), content in own_contents(name))
