"""Sends a folder that was found fit to the Hub.

`huggingface_hub` splits large folders into several commits, and a push that broke off goes on where it was: what the
Hub has is not sent twice. The repository keeps the `.gitattributes` that the Hub made with it, by which weights are
stored by Git LFS; the one of a clone of this project stores them plainly.
"""

from collections.abc import Iterable

from huggingface_hub import ModelCard, constants

from ..conversion.repository.publish import create_repository, upload, upload_text
from .card_check import CARD, shown_files
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
    text = card.read_text(encoding="utf-8")
    with_addresses = name_shown_files(text, repository, shown_files(ModelCard(text).data.get("widget")))
    is_changed = with_addresses != text
    files = [name for name in found.files if not (is_changed and name == CARD)]
    create_repository(repository, private)
    commit = upload(found.folder, repository, files=files, message=MESSAGE, revision=revision)
    return upload_text(with_addresses, card, repository, MESSAGE, revision) if is_changed else commit


def name_shown_files(card: str, repository: str, files: Iterable[str]) -> str:
    """Writes the addresses of files into the front matter of a card: examples of a widget cannot be relative."""
    start, block, rest = card.partition("---\n")[0], *card.partition("---\n")[2].partition("\n---")[::2]
    for name in sorted(set(files), key=len, reverse=True):
        block = block.replace(f": {name}", f": {constants.ENDPOINT}/{repository}/resolve/main/{name}")
    return f"{start}---\n{block}\n---{rest}"
