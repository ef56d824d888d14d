"""Texts of rows, which may hold anything."""


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
