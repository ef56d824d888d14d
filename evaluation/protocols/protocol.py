"""Protocols: how a published figure was measured. A new one is a JSON file more in this folder, and needs no code.

A protocol has these keys, of which all but `task` and `data` may be missing:

| key | holds |
|---|---|
| `task` | `zero_shot`, `retrieval`, `caption`, `probe`, `segmentation` |
| `title` | its name on the paper card |
| `data` | `layout`, `folders` (where it may lie below the data's root), and what the layout asks for |
| `prompts` | `classes`, `templates` (a name in clip-benchmark, or the templates themselves), `language` |
| `image_size` | pixels of the published figures |
| `modes` | `InternVL-C`, `InternVL-G` |
| `frames` | of a video |
| `published` | figures by mode and metric, in percent or the metric's own unit, and their `source` |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
TASKS = ("zero_shot", "retrieval", "caption", "probe", "segmentation")
MODES = ("InternVL-C", "InternVL-G")


@dataclass(frozen=True)
class Protocol:
    """How a figure is measured; see the module for its fields.

    Raises:
        ValueError: If a field has a value that no task takes.
    """

    name: str
    task: str
    data: Mapping[str, Any]
    title: str = ""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    modes: tuple[str, ...] = ()
    frames: int = 1
    published: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"The protocol {self.name}: task {self.task!r} is none of {', '.join(TASKS)}.")
        if not isinstance(self.data, dict) or not isinstance(self.data.get("layout"), str):
            raise ValueError(f'The protocol {self.name}: "data" has to be an object with a "layout".')
        if bad := [mode for mode in self.modes if mode not in MODES]:
            raise ValueError(f"The protocol {self.name}: mode {bad[0]!r} is none of {', '.join(MODES)}.")
        if not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f'The protocol {self.name}: "frames" has to be a number above 0, not {self.frames!r}.')

    def folders_below(self, root: Path) -> list[Path]:
        """Where its data may lie, of a root that holds data sets."""
        return [root / name for name in self.data.get("folders", [])]


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol from its JSON.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no protocol.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    known = {entry.name for entry in fields(Protocol)} - {"name"}
    if not isinstance(content, dict) or not {"task", "data"} <= set(content):
        raise ValueError(f'{path} is no protocol: it has to be a JSON object with "task" and "data".')
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{path}: a protocol has no key {unknown[0]!r}, only {', '.join(sorted(known))}.")
    content["modes"] = tuple(content.get("modes", ()))
    return Protocol(name=path.stem, **content)


def shipped_protocols() -> dict[str, Protocol]:
    """All protocols of the package by their names, in the order of their tasks and names."""
    found = [read_protocol(path) for path in sorted(FOLDER.rglob("*.json"))]
    return {found.name: found for found in sorted(found, key=lambda one: (TASKS.index(one.task), one.name))}


def find_protocol(name: str, task: str | None = None) -> Protocol:
    """A protocol by its name or the path of a JSON file.

    Args:
        name: As in `protocols/`, or a path that ends in `.json`.
        task: That it has to belong to.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If there is none, or it belongs to another task.
    """
    if name.endswith(".json"):
        found = read_protocol(Path(name))
    else:
        known = shipped_protocols()
        if name not in known:
            ours = [one.name for one in known.values() if task in (None, one.task)]
            raise ValueError(f"There is no protocol {name!r}; there are {', '.join(ours)}.")
        found = known[name]
    if task not in (None, found.task):
        raise ValueError(f"The protocol {found.name} belongs to the task {found.task}, not to {task}.")
    return found


__all__ = ["MODES", "TASKS", "Protocol", "find_protocol", "read_protocol", "shipped_protocols"]
