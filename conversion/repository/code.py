"""The code of a result, and its JSON files."""

import ast
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..readers.checkpoint_files import read_json
from ..readers.foreign_settings import FILES, is_own_code


PACKAGE = Path(__file__).resolve().parents[2]


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes a JSON object as transformers does: sorted, indented by two."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def code_files(modules: Iterable[str]) -> list[Path]:
    """Lists the files of modules and of all that they import from the same folder, as the remote loader does.

    Args:
        modules: Names of modules at the root of the package.

    Returns:
        Their files, sorted.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        waiting += [node.module for node in nodes if node.level == 1 and node.module]
    return [PACKAGE / f"{module}.py" for module in sorted(found)]


def copy_code(target: Path, auto_maps: Iterable[dict[str, str]]) -> list[str]:
    """Copies the code that Auto classes need.

    Args:
        target: Folder of the result.
        auto_maps: Every `auto_map` of the result.

    Returns:
        Names of the files.
    """
    modules = {reference.partition(".")[0] for auto_map in auto_maps for reference in auto_map.values()}
    files = code_files(modules)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def keep_written_code(target: Path) -> None:
    """Removes every `auto_map` of a result that names a module other than those in its folder.

    Settings of a source name modules of this package at most (see `foreign_settings`); not every format writes all of
    them.

    Args:
        target: Folder of the result, its code written.
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
