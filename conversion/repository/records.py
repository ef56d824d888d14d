"""What a result remembers of the forms it came from (in conversion.json), so that the way back loses nothing.

A configuration of another form is kept as it was. On the way back it is used again, changed only where the model has changed since:
the configuration that follows from the kept one is compared with the one that follows from the model at hand.
"""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..readers.foreign_settings import only_data
from ..readers.source import Source
from ..readers.tensors import Tensors
from .code import write_json
from .tokenizer import TOKENIZER_FILES


# Beside config.json; kept as long as nobody changes what they became.
RECORDED_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# The one that is no JSON; in a record it is an object with one key.
TEMPLATE_FILE = "chat_template.jinja"
_TEXT_FILES = (*TOKENIZER_FILES, TEMPLATE_FILE)
MANIFEST_FILE = "conversion.json"
# What `auto_map` is called there.
AUTO_MAP_MEMORY = "remembered_auto_map"
Record = dict[str, Any]


def read_records(source: Source) -> dict[str, Record]:
    """Records of a source by name of the form, without files that were changed since.

    Args:
        source: An opened source.
    """
    content = source.read_json(MANIFEST_FILE)
    found = _with_key(content.get("forms"), AUTO_MAP_MEMORY, "auto_map")
    if not isinstance(found, dict):
        return {}
    written = content.get("written")
    changed = _changed_files(source.folder, written if isinstance(written, dict) else {})
    records = {name: record for name, record in found.items() if _is_record(record)}
    return {
        name: {
            **record,
            "config": only_data("config.json", record["config"]),
            "files": {file: only_data(file, content) for file, content in _kept_files(record, changed).items()},
        }
        for name, record in records.items()
    }


def new_record(source: Source, dtype: str, twice: dict[str, str]) -> Record:
    """A record of a source.

    Args:
        source: An opened source.
        dtype: Type of most of its weights.
        twice: Names of tensors that it holds twice, to the other name.
    """
    files = {name: source.read_json(name) for name in RECORDED_FILES}
    template = source.folder / TEMPLATE_FILE
    if template.is_file():
        files[TEMPLATE_FILE] = {"text": template.read_text(encoding="utf-8")}
    return {
        "config": source.config,
        "dtype": dtype,
        "stored_twice": twice,
        "files": {name: content for name, content in files.items() if content},
    }


@dataclass(frozen=True)
class RecordedSource(Source):
    """A source as it once was.

    Args:
        recorded: Files by name, in place of those in the folder.
    """

    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read_json(self, name: str) -> dict[str, Any]:
        """A recorded file; empty where there is none."""
        return dict(self.recorded.get(name, {}))


def recorded_source(source: Source, tensors: Tensors, record: Record) -> RecordedSource:
    """The source of a record.

    Args:
        source: That of today.
        tensors: Of the model under this package's names.
        record: The record.
    """
    return RecordedSource(
        **{**vars(source), "tensors": tensors, "config": record["config"], "recorded": record["files"]}
    )


def in_manifest(records: dict[str, Record]) -> dict[str, Record]:
    """Records as they are written: what they remember of code is no `auto_map` that this folder has.

    Args:
        records: By name of the form.
    """
    return _with_key(records, "auto_map", AUTO_MAP_MEMORY)


def _with_key(content: Any, old: str, new: str) -> Any:
    """The same with another name of a key, at every depth."""
    if isinstance(content, list):
        return [_with_key(part, old, new) for part in content]
    if not isinstance(content, dict):
        return content
    return {new if key == old else key: _with_key(value, old, new) for key, value in content.items()}


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that records depend on."""
    names = (*RECORDED_FILES, *_TEXT_FILES)
    return {name: _hash(folder / name) for name in sorted(set(names)) if (folder / name).is_file()}


def overlaid(kept: dict[str, Any], then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A kept configuration with all changes since.

    Args:
        kept: The configuration as it was.
        then: What follows from it, defaults spelled out.
        now: What follows from the model at hand, likewise.
    """
    result = deepcopy(kept)
    for key in {**then, **now}:
        if key in then and key in now and then[key] == now[key]:
            continue
        if key not in now:
            result.pop(key, None)
        elif all(isinstance(part.get(key), dict) for part in (result, then, now)):
            result[key] = overlaid(result[key], then[key], now[key])
        else:
            result[key] = deepcopy(now[key])
    return result


def restore_files(folder: Path, record: Record, with_tokenizer: bool) -> None:
    """Writes the files of a record again.

    Args:
        folder: Of the result.
        record: Of its form.
        with_tokenizer: Whether the tokenizer is the one that it had.
    """
    files = record["files"]
    # Code that a tokenizer names is not carried along; what the conversion made of it needs none.
    if not with_tokenizer or "auto_map" in files.get("tokenizer_config.json", {}):
        files = {name: content for name, content in files.items() if name not in TOKENIZER_FILES}
    elif "chat_template" in files.get("tokenizer_config.json", {}):
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # it would be read in place of that one
    for name, content in files.items():
        if name == TEMPLATE_FILE:
            (folder / name).write_text(str(content.get("text", "")), encoding="utf-8")
        else:
            write_json(folder / name, content)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    kinds: dict[str, Callable[[Any], bool]] = {
        "config": lambda value: isinstance(value, dict),
        "dtype": lambda value: isinstance(value, str),
        "stored_twice": lambda value: (
            isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
        ),
        "files": lambda value: isinstance(value, dict) and all(isinstance(part, dict) for part in value.values()),
    }
    return all(is_right(record.get(key)) for key, is_right in kinds.items())


def _changed_files(folder: Path, written: dict[str, Any]) -> set[str]:
    return {name for name, digest in hashes_of(folder).items() if written.get(name) != digest}


def _kept_files(record: Record, changed: set[str]) -> dict[str, dict[str, Any]]:
    """Of the tokenizer all or nothing, since its files belong together."""
    dropped = {name for name in changed if name not in TOKENIZER_FILES}
    if changed & set(_TEXT_FILES):
        dropped |= set(_TEXT_FILES)
    return {
        name: content
        for name, content in record["files"].items()
        if name in (*RECORDED_FILES, TEMPLATE_FILE) and name not in dropped
    }


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
