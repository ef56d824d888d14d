"""README.md of a model that was assembled of parts."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .card import TAGS, front_matter, hub_id, snippet_of
from .licence import OTHER, license_fields
from .result import Result


def write_assembly_card(
    target: Path, result: Result, sources: dict[str, tuple[str, Path]], added: list[str], num_parameters: str
) -> None:
    """Writes README.md, which names the parts, their licences, and what has to be trained first.

    Args:
        target: Folder of the result.
        result: What is written.
        sources: Name of a part to the title and the folder of its source.
        added: Names of tensors that start from random values.
        num_parameters: Number of parameters.
    """
    ids = {name: hub_id(folder) for name, (_, folder) in sources.items()}
    licences = {name: license_fields(_published(folder), None, ids[name]) for name, (_, folder) in sources.items()}
    data = ModelCardData(
        **_of_all(list(licences.values())),
        library_name="transformers",
        pipeline_tag=result.pipeline_tag,
        base_model=list(dict.fromkeys(name for name in ids.values() if name)) or None,
        tags=["internvl", "custom_code", *TAGS[result.kind]],
    )
    lines = ["---", data.to_yaml(), "---", "", "# A model assembled of parts", ""]
    lines += ["Assembled by the InternVL package of:", ""]
    for name, (title, _) in sources.items():
        licence = licences[name].get("license_name", licences[name]["license"])
        lines.append(f"- {name}: {ids[name] or 'a folder'}, {title}, licence {licence}")
    lines += ["", f"{num_parameters} parameters."]
    if added:
        lines += ["", "It has to be trained before it is of use. These start from random values:", ""]
        lines += [f"- `{name}`" for name in added]
    lines += ["", "```python", snippet_of(result, "internvl").rstrip(), "```"]
    (target / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _published(folder: Path) -> dict[str, str]:
    card = folder / "README.md"
    return front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}


def _of_all(licences: list[dict[str, Any]]) -> dict[str, Any]:
    """The licence of the whole: that of all parts where they have one, else one that the Hub has no name for."""
    if any(licence != licences[0] for licence in licences):
        return {"license": OTHER, "license_name": "licences-of-the-parts"}
    return licences[0]
