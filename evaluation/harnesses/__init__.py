"""What lets harnesses that others made measure these models, one file a harness. See evaluation/README.md."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...extras import MissingLibraryError


@contextmanager
def harness(distribution: str) -> Iterator[None]:
    """Imports of a harness: `with harness("mteb"): import mteb`.

    Raises:
        MissingLibraryError: If it, or a library that it needs, is not installed; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        is_own = library.replace("_", "-") in distribution
        needed = distribution if is_own else f"{distribution} {library}"  # what a harness imports and does not declare
        message = f"This needs {library}, which is not installed: `pip install {needed}`."
        raise MissingLibraryError(message, name=error.name) from error


__all__ = ["harness"]
