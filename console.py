"""What command lines share: an error is one line that a terminal can take, and exit status 2."""

import re
import sys
from collections.abc import Callable


def printable(text: str) -> str:
    """Returns a text on one line, with escapes for control characters and lone surrogates."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(text.split()))


def message_of(error: Exception) -> str:
    """Returns what an error says, without the traceback that torch puts around one of a `DataLoader`'s worker."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return re.split(rf"(?m)^(?:\w+\.)*{type(error).__name__}: ", text)[-1]


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status: 2 where it raises an error of its input, which is printed.

    These are `ValueError` and `OSError`, and `RecursionError` of JSON that libraries read.
    """
    try:
        return command() or 0
    except (ValueError, OSError, RecursionError) as error:
        sys.stderr.write(f"error: {printable(message_of(error))}\n")
        return 2
