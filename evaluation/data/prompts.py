"""Names of classes and templates of prompts, which `clip-benchmark` ships as JSON; none of its code runs.

`pip install --no-deps clip-benchmark` installs it: only its files are wanted, not the libraries of its data sets.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...rows.json_files import read_json_file


LANGUAGE_FILES = {"en": "en", "zh": "cn", "ja": "jp", "ar": "ar", "it": "it"}
SIMPLE_TEMPLATES = ("a photo of a {c}.",)  # of other data, as CLIP has it


@cache
def _read(language: str, kind: str) -> dict[str, Any]:
    if language not in LANGUAGE_FILES:
        raise ValueError(f"There are no prompts in the language {language!r}, only in {', '.join(LANGUAGE_FILES)}.")
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "The names and prompts of this benchmark come with clip-benchmark, which is not installed: "
            "`pip install --no-deps clip-benchmark`."
        )
    (folder,) = found.submodule_search_locations
    path = Path(folder, "datasets", f"{LANGUAGE_FILES[language]}_{kind}.json")
    return read_json_file(path)


def benchmark_classes(name: str, language: str = "en") -> list[str] | None:
    """The names of the classes of a benchmark in its order; None if clip-benchmark has none for it.

    Raises:
        ValueError: If clip-benchmark is not installed, or has nothing in this language.
    """
    return _read(language, "classnames").get(name)


def benchmark_templates(name: str, language: str = "en") -> list[str]:
    """The templates of a benchmark's prompts, in which `{c}` stands for the class.

    Raises:
        ValueError: As from `benchmark_classes`, and if there are none for it.
    """
    templates = _read(language, "zeroshot_classification_templates").get(name)
    if not templates:
        raise ValueError(f"clip-benchmark has no prompts for {name!r} in the language {language!r}.")
    return templates


def check_templates(templates: Sequence[str]) -> None:
    """Checks templates of prompts.

    Raises:
        ValueError: If there is none, or one has no `{c}`.
    """
    if not templates:
        raise ValueError("Zero-shot classification needs at least one template.")
    if bad := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"A template has to hold {{c}} for the name of the class: {bad[0]!r} has none.")


def prompts_of(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The prompts of each class.

    Raises:
        ValueError: If there is no class or no template, or a template has no `{c}`.
    """
    if not classes:
        raise ValueError("Zero-shot classification needs at least one class.")
    check_templates(templates)
    return [[template.replace("{c}", name) for template in templates] for name in classes]


__all__ = ["benchmark_classes", "benchmark_templates", "check_templates", "prompts_of"]
