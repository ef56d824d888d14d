"""Records of the formats that a model had before, kept in conversion.json so that the way back loses nothing.

A remembered config.json is used again, changed only where the model has changed since: what follows from the
remembered one is compared with what follows from the model at hand.
"""

import hashlib
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..readers.damages import DAMAGES
from ..readers.foreign_settings import only_data
from ..readers.source import Source
from .code import write_json
from .tokenizer import TOKENIZER_FILES


MANIFEST_FILE = "conversion.json"
# Written again as long as nobody changed what they became.
RECORDED_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# The only one that is no JSON; a record holds it as an object with one key.
TEMPLATE_FILE = "chat_template.jinja"
# Files that belong together: a record gives back all of them or none.
_TEXT_FILES = {*TOKENIZER_FILES, TEMPLATE_FILE}
# conversion.json itself must hold no `auto_map`, as the code that was named there is not in its folder.
_REMEMBERED_AUTO_MAP = "remembered_auto_map"


@dataclass(frozen=True)
class Record:
    """A checkpoint as it was.

    Args:
        config: config.json.
        dtype: Type of most of the weights.
        stored_twice: Name of a tensor that was there twice, to its other name.
        files: Name to content of `RECORDED_FILES` and the template.
    """

    config: dict[str, Any]
    dtype: str
    stored_twice: dict[str, str]
    files: dict[str, dict[str, Any]]


def new_record(source: Source, dtype: str, stored_twice: dict[str, str]) -> Record:
    """Records a source, as `Record` describes it."""
    files = {name: source.read_json(name) for name in RECORDED_FILES}
    template = source.folder / TEMPLATE_FILE
    if template.is_file():
        files[TEMPLATE_FILE] = {"text": template.read_text(encoding="utf-8")}
    return Record(source.config, dtype, stored_twice, {name: content for name, content in files.items() if content})


def read_records(source: Source) -> dict[str, Record]:
    """Reads the records of a source, by `to` of the format; ignores unreadable ones and files changed since."""
    manifest = _with_key(source.read_json(MANIFEST_FILE), _REMEMBERED_AUTO_MAP, "auto_map")
    found, written = manifest.get("forms"), manifest.get("written")
    if not isinstance(found, dict):
        return {}
    hashes = hashes_of(source.folder)
    changed = {name for name in hashes if not isinstance(written, dict) or written.get(name) != hashes[name]}
    if changed & _TEXT_FILES:
        changed |= _TEXT_FILES
    records = {name: _read(record, changed) for name, record in found.items()}
    return {name: record for name, record in records.items() if record is not None}


def manifest_of(records: dict[str, Record]) -> dict[str, Any]:
    """Records as conversion.json holds them."""
    return _with_key({name: asdict(record) for name, record in records.items()}, "auto_map", _REMEMBERED_AUTO_MAP)


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that records depend on."""
    names = sorted({*RECORDED_FILES, *_TEXT_FILES})
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }


def overlaid(kept: dict[str, Any], then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A remembered configuration with all changes since.

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
    """Writes the files of a record again; those of the tokenizer only with the tokenizer that it had."""
    files = record.files
    tokenizer_settings = files.get("tokenizer_config.json", {})
    # Code that a tokenizer names is not carried along; what the conversion made of it needs none.
    if not with_tokenizer or "auto_map" in tokenizer_settings:
        files = {name: content for name, content in files.items() if name not in TOKENIZER_FILES}
    elif "chat_template" in tokenizer_settings:
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # It would be read in place of that one.
    for name, content in files.items():
        if name == TEMPLATE_FILE:
            (folder / name).write_text(str(content.get("text", "")), encoding="utf-8")
        else:
            write_json(folder / name, content)


def _with_key(content: Any, old: str, new: str) -> Any:
    """Renames a key at every depth."""
    if isinstance(content, list):
        return [_with_key(part, old, new) for part in content]
    if not isinstance(content, dict):
        return content
    return {new if key == old else key: _with_key(value, old, new) for key, value in content.items()}


def _read(content: Any, changed: set[str]) -> Record | None:
    """The data of a record in conversion.json; None where it is none."""
    try:
        files = {name: only_data(name, dict(file)) for name, file in content["files"].items()}
        config, twice = only_data("config.json", dict(content["config"])), dict(content["stored_twice"])
        dtype = content["dtype"]
    except DAMAGES:
        return None
    if not all(isinstance(text, str) for text in (dtype, *twice.values())):
        return None
    names = {*RECORDED_FILES, TEMPLATE_FILE} - changed
    return Record(config, dtype, twice, {name: file for name, file in files.items() if name in names})
