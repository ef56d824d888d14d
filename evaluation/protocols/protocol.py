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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...rows.json_files import check_keys, is_finite_number, read_json_file


FOLDER = Path(__file__).parent
TASKS = ("zero_shot", "retrieval", "caption", "probe", "segmentation")
MODES = ("InternVL-C", "InternVL-G")
OWN_DATA = "own-data"  # the protocol of data that belong to none
OWN_LAYOUTS = {
    "zero_shot": "class_folders",
    "retrieval": "captions",
    "caption": "captions",
    "probe": "probe_folders",
    "segmentation": "segmentation",
}
KINDS_OF_KEYS = {
    "title": "a text",
    "prompts": "an object",
    "image_size": "a number above 0",
    "modes": "a list of texts",
    "frames": "a number above 0",
    "published": "an object",
    "options": "an object",
}
KINDS_IN_DATA = {
    "folders": "a list of texts",
    "annotations": "a text or a list of texts",
    "images": "a list of texts",
    "evaluate": "a list of texts",
    "split": "a text",
    "subset": "a text",
    "labels": "a text",
    "count": "a number above 0",
}
LAYOUTS_OF_TASK = {
    "zero_shot": ("class_folders", "objectnet"),
    "retrieval": ("captions", "xtd"),
    "caption": ("captions", "xtd"),
    "probe": ("probe_folders",),
    "segmentation": ("segmentation",),
}
KINDS_IN_PROMPTS = {
    "classes": "a text",
    "templates": "a text or a list of texts",
    "language": "a text",
    "source": "a text",
    "InternVL-G": "a text",
    "chat": "a text",
}
POOLINGS = ("linear", "attention")  # of a probe
KINDS_IN_OPTIONS = {
    "rerank": "a number above 0",
    "dual_softmax": "true or false",
    "pooling": "a text",
    "epochs": "a number above 0",
    "views": "a whole number",
    "sweep": "true or false",
    "training_limit": "a number above 0",
    "InternVL-G": "an object",
    "chat": "an object",
}
KINDS_IN_GENERATION = {
    "num_beams": "a number above 0",
    "min_new_tokens": "a whole number",
    "max_new_tokens": "a number above 0",
}


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
        place = f"The protocol {self.name}"
        if not isinstance(self.data, dict) or not isinstance(self.data.get("layout"), str):
            raise ValueError(f'{place}: "data" has to be an object with a "layout".')
        check_keys(place, vars(self), KINDS_OF_KEYS)
        check_keys(f"{place}, data", self.data, KINDS_IN_DATA)
        check_keys(f"{place}, prompts", self.prompts, KINDS_IN_PROMPTS)
        _check_known(f"{place}, data", self.data, ("layout", *KINDS_IN_DATA))
        _check_known(f"{place}, prompts", self.prompts, KINDS_IN_PROMPTS)
        _check_options(f"{place}, options", self.options)
        check_published(place, self.published)
        if bad := [mode for mode in self.modes if mode not in MODES]:
            raise ValueError(f"The protocol {self.name}: mode {bad[0]!r} is none of {', '.join(MODES)}.")

    def folders_below(self, root: Path) -> list[Path]:
        """Where its data may lie, of a root that holds data sets."""
        return [root / name for name in self.data.get("folders", [])]


def _check_known(place: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses what no task reads: a misspelt key would change a figure, and nothing would say so."""
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{place}: there is no key {unknown[0]!r}, only {', '.join(sorted(known))}.")


def _check_options(place: str, options: Mapping[str, Any]) -> None:
    _check_known(place, options, KINDS_IN_OPTIONS)
    check_keys(place, options, KINDS_IN_OPTIONS)
    if options.get("pooling") not in (None, *POOLINGS):
        raise ValueError(f"{place}: pooling {options['pooling']!r} is none of {', '.join(POOLINGS)}.")
    for kind in ("InternVL-G", "chat"):
        generation = options.get(kind) or {}
        check_keys(f"{place}, {kind}", generation, KINDS_IN_GENERATION)
        if bad := [name for name, value in generation.items() if not is_finite_number(value)]:
            raise ValueError(f"{place}, {kind}: {bad[0]!r} has to be a number, or true or false.")


def check_published(place: str, published: Mapping[str, Any]) -> None:
    """Checks published figures: numbers by metric, or by mode and metric, beside texts such as their source.

    Raises:
        ValueError: If one is something else.
    """
    for name, figure in published.items():
        figures = figure.values() if isinstance(figure, dict) else [figure]
        if not isinstance(figure, str) and not all(map(is_finite_number, figures)):
            raise ValueError(f'{place}: the "published" figure {name!r} has to be a number, or numbers by metric.')


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol from its JSON.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no protocol.
    """
    content = read_json_file(path)
    known = {entry.name for entry in fields(Protocol)} - {"name"}
    if isinstance(content, dict):
        content = {key: _without_nulls(value) for key, value in content.items() if value is not None}
    if not isinstance(content, dict) or not {"task", "data"} <= set(content):
        raise ValueError(f'{path} is no protocol: it has to be a JSON object with "task" and "data".')
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{path}: a protocol has no key {unknown[0]!r}, only {', '.join(sorted(known))}.")
    if isinstance(content.get("modes"), list):
        content["modes"] = tuple(content["modes"])
    return Protocol(name=path.stem, **content)


def _without_nulls(value: Any) -> Any:
    """An object without what is null, which means the same as what is missing."""
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def own_protocol(task: str, title: str = "") -> Protocol:
    """The protocol of a task on data of a user that belong to none."""
    return Protocol(OWN_DATA, task, {"layout": OWN_LAYOUTS[task]}, title=title)


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


__all__ = [
    "LAYOUTS_OF_TASK",
    "MODES",
    "OWN_DATA",
    "OWN_LAYOUTS",
    "POOLINGS",
    "TASKS",
    "Protocol",
    "check_published",
    "find_protocol",
    "own_protocol",
    "read_protocol",
    "shipped_protocols",
]
