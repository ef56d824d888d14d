"""The licence of a result: that of its source, as the front matter of a card names it on the Hub."""

import re
import shutil
from pathlib import Path
from typing import Any


LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
MOST_BYTES = 2**20
# Of a licence that has no identifier on the Hub.
OTHER = "other"
UNKNOWN = "unknown"
UNNAMED = "license-of-the-source"


def copy_license(source: Path, target: Path) -> str | None:
    """Copies the text of a licence that lies beside a checkpoint; returns the name of the file, None without one."""
    for name in LICENSE_FILES:
        if (source / name).is_file() and (source / name).stat().st_size <= MOST_BYTES:
            shutil.copyfile(source / name, target / name)
            return name
    return None


def license_fields(published: dict[str, str], file: str | None, base_model: str | None) -> dict[str, Any]:
    """Returns `license`, and for one without an identifier on the Hub also `license_name` and `license_link`.

    Args:
        published: Front matter of the source's card.
        file: Name of the text of the licence in the result's folder.
        base_model: The source's name on the Hub.
    """
    named = _as_identifier(published.get("license", ""))
    if named not in ("", OTHER):
        return {"license": named}
    link = published.get("license_link", "")
    if not link.startswith("https://") and link != file:
        page = f"https://huggingface.co/{base_model}" if base_model else ""
        link = file or (f"{page}/blob/main/{link}" if page and link else page)
    if not named and not link:
        return {"license": UNKNOWN}
    fields = {"license": OTHER, "license_name": _as_identifier(published.get("license_name", "")) or UNNAMED}
    return {**fields, "license_link": link} if link else fields


def _as_identifier(text: str) -> str:
    """A name as the Hub takes it: lower-case letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-")
