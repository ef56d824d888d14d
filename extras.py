"""Libraries that only some tasks need: the extras of `pip install 'internvl[NAME]'`."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingLibraryError(ImportError, ValueError):
    """A library of an extra is not installed; as a `ValueError`, command lines print it in one line."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports of libraries that come with an extra: `with extra("train"): import peft`.

    Args:
        name: The extra.

    Raises:
        MissingLibraryError: If one is not installed; the message has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        message = f"This needs {library}, which is not installed: `pip install 'internvl[{name}]'`."
        raise MissingLibraryError(message, name=error.name) from error


__all__ = ["MissingLibraryError", "extra"]
