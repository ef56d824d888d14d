"""Uploads a result to the Hub."""

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


def upload(folder: Path, repo_id: str) -> str:
    """Uploads a complete folder, which stays as it is, to an existing repository; returns the address of the commit.

    Raises:
        OSError: The Hub refuses; run the command again to go on, since stored files are not sent twice.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Convert to the InternVL package"
        )
    except HfHubHTTPError as error:
        raise OSError(f"`{folder}` is complete, but was not uploaded to `{repo_id}`: {error}") from error
    return str(commit)
