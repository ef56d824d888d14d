"""Errors that reading a damaged or hostile file may raise, turned into one sentence that names the file."""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


LONGEST_REASON = 300
# Of the readers of JSON, pickles, archives and safetensors, and of classes that are given settings of a wrong type or
# size. No list of them can be short: what they have in common is that the file is at fault, and that it must be named.
DAMAGES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError among them, and what torch raises
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    re.error,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def naming(
    file: Path, kind: str, error_class: type[Exception] = OSError, advice: str = "Download it again."
) -> Iterator[None]:
    """Gives the errors of reading a file its name.

    Args:
        file: The file.
        kind: What it should be, e.g. "complete PyTorch file".
        error_class: Class of the error that is raised instead.
        advice: What to do.
    """
    try:
        yield
    except (*DAMAGES, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # not what it holds, but the file itself
        raise error_class(f"`{file}` is no {kind} ({reason_of(error)}). {advice}") from error


@contextmanager
def describing(folder: Path, name: str = "config.json") -> Iterator[None]:
    """Gives the errors of settings that no model can have the name of their file; what names itself already passes.

    `folder` is that of the checkpoint, or a file in it.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except DAMAGES as error:
        file = (folder if folder.is_dir() else folder.parent) / name
        raise ValueError(
            f"`{file}`, or a file beside it, does not describe this checkpoint ({reason_of(error)}). Put the one in "
            "its place that was published with the weights."
        ) from error


def reason_of(error: BaseException) -> str:
    """The message of an error, in one line of limited length."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    said = " ".join(str(error).split())
    if not said or isinstance(error, LookupError):
        said = f"{type(error).__name__} {said}".strip()  # that of a look-up is but the key
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."
