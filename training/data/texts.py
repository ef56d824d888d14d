"""Texts of rows, which may hold anything: what can be shown, and what can be read."""


def printable(text: str) -> str:
    """A text on one line, without what a terminal or a file cannot take: line breaks, control characters, lone
    surrogates.
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(text.split()))


def check_text(text: str, name: str) -> None:
    """Refuses a text that no tokenizer takes.

    Args:
        text: From a row.
        name: Of it, for the message.

    Raises:
        ValueError: If it holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate at character {error.start}, which is no text.") from error
