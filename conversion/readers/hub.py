"""Downloads a repository of the Hub into the cache of `huggingface_hub`: files that a conversion reads, and no code.

Token, endpoint, offline mode and cache are that library's (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`),
and so is the download: run again, it goes on where it broke off.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SETTINGS = ["*.json", "*.jinja", "LICENSE*", "README.md", "merges.txt", "tokenizer.model", "vocab.txt"]
SAFETENSORS = ["*.safetensors"]
PICKLES = ["*.bin", "*.pth", "*.pt"]
# Folders hold other formats of the weights, or states of a training.
IGNORED = ["*/*", "optimizer*", "scheduler*", "training_args.bin", "rng_state*"]


def find_source(source: str | Path, revision: str | None = None) -> Path:
    """Where a source lies; one that is named as on the Hub (`user/name`, and no such path) is downloaded first.

    Raises:
        OSError: The Hub has no such repository or revision, does not give it, or cannot be reached.
        ValueError: `revision`, a branch, tag or commit of it, has no effect.
    """
    path = Path(source)
    if path.exists() or not NAME.fullmatch(str(source)):
        if revision is not None:
            raise ValueError(f"`revision` has no effect: `{source}` is no repository on the Hub (user/name).")
        return path
    name = str(source)
    with _said_in_one_line(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SETTINGS, ignore_patterns=IGNORED))
        commit = folder.name
        weights = SAFETENSORS if _has_safetensors(name, commit, folder) else PICKLES
        # All at once, so that offline a part of them is not taken for the whole.
        snapshot_download(name, revision=commit, allow_patterns=[*SETTINGS, *weights], ignore_patterns=IGNORED)
    return folder


def _has_safetensors(name: str, commit: str, folder: Path) -> bool:
    if constants.HF_HUB_OFFLINE:
        files = [file.name for file in folder.iterdir()]
    else:
        files = HfApi().list_repo_files(name, revision=commit)
    return any(file.endswith(".safetensors") and "/" not in file for file in files)


@contextmanager
def _said_in_one_line(name: str, revision: str | None) -> Iterator[None]:
    there = f"`{name}`" if revision is None else f"`{name}` at `{revision}`"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{there} is gated: accept its terms on its page on the Hub, then log in with `hf auth login`, or set "
            "`HF_TOKEN`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub has {there.partition(' at ')[0]}, but no revision `{revision}` of it."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no `{name}` here, and on the Hub no such repository that may be read. Give the folder of a "
            "checkpoint, or log in with `hf auth login` where it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        why = "offline mode is on" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"There is no `{name}` here, {there} is not whole in the Hub's cache, and {why}. Run it again when it can "
            "be downloaded."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"The Hub did not give {there}: {str(error).splitlines()[0]} Run it again to go on.") from error
    except HTTPError as error:
        raise ConnectionError(f"The download of {there} broke off ({error}). Run it again to go on.") from error
