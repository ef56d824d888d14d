"""The code of a result, and its JSON files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..readers.checkpoint_files import read_json
from ..readers.foreign_settings import FILES, is_own_code


PACKAGE = Path(__file__).resolve().parents[2]
# Serve the model on Inference Endpoints.
ENDPOINT_FILES = ("handler.py", "requirements.txt")


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes a JSON object as transformers does: sorted, indented by two."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def code_files(modules: Iterable[str]) -> list[Path]:
    """Files of modules and of all that they import from the same folder, as the remote loader does, sorted."""
    entries = [PACKAGE / f"{module}.py" for module in modules]
    imported = [Path(file) for entry in entries for file in get_relative_import_files(entry)]
    return sorted({*entries, *imported})


def copy_code(target: Path, auto_maps: Iterable[dict[str, str]]) -> None:
    """Copies the code that Auto classes need."""
    modules = {reference.partition(".")[0] for auto_map in auto_maps for reference in auto_map.values()}
    for file in code_files(modules):
        shutil.copyfile(file, target / file.name)


def copy_endpoint(target: Path) -> None:
    """Copies the handler of Inference Endpoints and its requirements."""
    for name in ENDPOINT_FILES:
        shutil.copyfile(PACKAGE / name, target / name)


def keep_written_code(target: Path) -> None:
    """Removes every `auto_map` of a result that names a module other than those in its folder.

    Settings of a source name modules of this package at most (see `foreign_settings`); not every format writes all of
    them.
    """
    written = {file.stem for file in target.glob("*.py")}
    for file in sorted(target.glob("*.json")):
        if file.name not in FILES:
            continue
        content = read_json(file)
        if _drop_foreign(content, written):
            write_json(file, content)


def _drop_foreign(content: Any, written: set[str]) -> bool:
    """Removes them from a content, and says whether there was any."""
    parts = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    found = [_drop_foreign(part, written) for part in parts]
    if isinstance(content, dict) and "auto_map" in content and not _is_written(content["auto_map"], written):
        del content["auto_map"]
        return True
    return any(found)


def _is_written(auto_map: Any, written: set[str]) -> bool:
    return is_own_code(auto_map) and all(place.partition(".")[0] in written for place in auto_map.values())
