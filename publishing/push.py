"""Sends a folder that was found fit to the Hub.

`huggingface_hub` splits large folders into several commits, and a push that broke off goes on where it was: what the
Hub has is not sent twice. The repository keeps the `.gitattributes` that the Hub made with it, by which weights are
stored by Git LFS; the one of a clone of this project stores them plainly.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load, metadata_save

from ..conversion.repository.publish import create_repository, upload, upload_text
from .card_check import CARD, shown_files, with_shown_files
from .check import Inspection


MESSAGE = "Upload by the InternVL package"


def push_folder(found: Inspection, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Sends the files of an inspected folder; returns the address of the commit.

    Args:
        found: The folder, without faults.
        repository: `user/name`; made if it is not there.
        private: Whether a repository that is made is private.
        revision: Branch, which must exist; None is the main one.

    Raises:
        ValueError: If the folder has faults, or `repository` is no name.
        OSError: If the Hub refuses.
    """
    if found.faults:
        raise ValueError(f"`{found.folder}` is not fit for the Hub: {found.faults[0]}")
    card = found.folder / CARD
    text = card_with_addresses(card, repository)
    files = [name for name in found.files if text is None or name != CARD]
    create_repository(repository, private)
    commit = upload(found.folder, repository, files=files, message=MESSAGE, revision=revision)
    return commit if text is None else upload_text(text, card, repository, MESSAGE, revision)


def card_with_addresses(card: Path, repository: str) -> str | None:
    """Returns a card with addresses of the files that its widget shows, which cannot be relative; None without any."""
    data = metadata_load(card) or {}
    if not shown_files(data.get("widget")):
        return None
    start = f"{constants.ENDPOINT}/{repository}/resolve/main/"
    data["widget"] = with_shown_files(data["widget"], lambda name: start + name)
    with TemporaryDirectory() as there:
        copy = Path(shutil.copy(card, there))
        metadata_save(copy, data)
        return copy.read_text(encoding="utf-8")
