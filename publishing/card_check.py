"""Whether a model card is one that the Hub takes and shows whole, without asking it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..conversion.readers.checkpoint_files import read_json


CARD = "README.md"
# Tasks of the Hub that models of this package have.
PIPELINE_TAGS = (
    "image-classification",
    "image-feature-extraction",
    "image-segmentation",
    "image-text-to-text",
    "image-to-text",
    "visual-question-answering",
    "zero-shot-image-classification",
)
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Links of the text to files of the repository.
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)|src=\"(?!https?:|data:)([^\"]+)\"")


def card_faults(folder: Path, files: list[str]) -> list[str]:
    """Returns the faults of README.md, one line each.

    Args:
        folder: Folder of the repository.
        files: Names of the files that are published with it.
    """
    if CARD not in files:
        return [f"There is no card: `{CARD}` is missing. `python -m internvl.conversion DIR OUT` writes one."]
    try:
        _check_aliases(folder / CARD)
        card = ModelCard.load(folder / CARD)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        return [f"The front matter of `{CARD}` is not valid: {' '.join(str(error).split())}"]
    data = card.data.to_dict()
    config = read_json(folder / "config.json")
    return [
        *_license_faults(data, files),
        *_task_faults(data, config),
        *_widget_faults(data.get("widget"), files),
        *(f"`{CARD}` leads to `{link}`, which is not published." for link in _broken_links(card.text, files)),
    ]


def _check_aliases(card: Path) -> None:
    """Raises a ValueError for a front matter that repeats a part by its name: it could repeat itself, or grow."""
    front = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8"))
    for event in yaml.parse(front[2] if front else ""):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 2} repeats a part as `*{event.anchor}`: write it out")


def _license_faults(data: dict[str, Any], files: list[str]) -> Iterator[str]:
    identifier, link = data.get("license"), data.get("license_link")
    if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
        yield f"`license` must be an identifier, such as `mit` or `other`, got {identifier!r}."
    elif identifier == "unknown":
        yield "`license` is `unknown`: nobody may use the weights. Write whose terms hold."
    elif identifier == "other":
        if not IDENTIFIER.fullmatch(str(data.get("license_name"))):
            yield "`license: other` needs a `license_name` of lower-case letters, digits, dots and hyphens."
        if not str(link).startswith("https://") and link not in files:
            yield f"`license: other` needs a `license_link`, an https address or a file here, got {link!r}."


def _task_faults(data: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        yield "`tags` must be a list of texts."
        return
    if data.get("library_name") != "transformers":
        yield f"`library_name` must be `transformers`, got {data.get('library_name')!r}."
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        yield f"`pipeline_tag` must be one of {', '.join(PIPELINE_TAGS)}, got {data.get('pipeline_tag')!r}."
    if "auto_map" in config and "custom_code" not in tags:
        yield "`tags` lack `custom_code`, by which the Hub says that loading runs code of the repository."
    if data.get("pipeline_tag") == "image-text-to-text" and "conversational" not in tags:
        yield "`tags` lack `conversational`, by which the Hub shows a chat."
    bases = data.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not REPOSITORY.fullmatch(str(base)):
            yield f"`base_model` must be a name on the Hub, got {base!r}."


def _widget_faults(widget: Any, files: list[str]) -> Iterator[str]:
    if not isinstance(widget or [], list):
        yield "`widget` must be a list of examples."
    for source in shown_files(widget):
        if source not in files:
            yield f"An example of `widget` shows `{source}`, which is neither an https address nor published."


def shown_files(widget: Any) -> list[str]:
    """Returns the files of the repository that the examples of a widget show."""
    found: list[str] = []
    with_shown_files(widget, found.append)
    return found


def with_shown_files(widget: Any, change: Callable[[str], Any]) -> Any:
    """Returns the examples of a widget, with the names of files of the repository that they show changed."""
    if isinstance(widget, list):
        return [with_shown_files(part, change) for part in widget]
    if not isinstance(widget, dict):
        return widget
    return {
        key: change(value)
        if key in ("src", "url") and isinstance(value, str) and not value.startswith(("https://", "data:"))
        else with_shown_files(value, change)
        for key, value in widget.items()
    }


def _broken_links(text: str, files: list[str]) -> list[str]:
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    links = [first or second for first, second in LINK.findall(text)]
    return sorted({link for link in links if link.rstrip("/") not in files and link.rstrip("/") not in folders})
