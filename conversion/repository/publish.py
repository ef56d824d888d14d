"""Uploads a result to the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


def create_repository(repo_id: str, private: bool) -> None:
    """Creates a repository, which may exist, and so proves the right to write before the work begins.

    Raises:
        ValueError: `repo_id` is no `user/name` or `organisation/name`.
        OSError: The Hub refuses, or nobody is logged in.
    """
    try:
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
    except HFValidationError as error:
        raise ValueError(f"`{repo_id}` is no name of a repository (user/name): {error}") from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise OSError(
            f"`{repo_id}` cannot be written on the Hub: {error}. Log in with `hf auth login`, or set `HF_TOKEN`."
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    files: list[str] | None = None,
    message: str = "Convert to the InternVL package",
    revision: str | None = None,
) -> str:
    """Uploads a complete folder, which stays as it is, to an existing repository; returns the address of the commit.

    Args:
        folder: The folder.
        repo_id: `user/name`.
        files: Names of the files to send; None sends all.
        message: Message of the commit.
        revision: An existing branch; None is the main one.

    Raises:
        OSError: The Hub refuses; run the command again to go on, since stored files are not sent twice.
    """
    with _refusals_as_os_errors(folder, repo_id):
        return str(
            HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                allow_patterns=None if files is None else [escape(name) for name in files],
            )
        )


def upload_text(text: str, file: Path, repo_id: str, message: str, revision: str | None = None) -> str:
    """Uploads a text in place of a file of the top folder; returns the address of the commit.

    Raises:
        OSError: The Hub refuses.
    """
    with _refusals_as_os_errors(file, repo_id):
        return str(
            HfApi().upload_file(
                path_or_fileobj=text.encode(),
                path_in_repo=file.name,
                repo_id=repo_id,
                commit_message=message,
                revision=revision,
            )
        )


@contextmanager
def _refusals_as_os_errors(place: Path, repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        raise OSError(f"`{place}` is complete, but was not uploaded to `{repo_id}`: {error}") from error
