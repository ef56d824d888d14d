"""Texts of rows, which may hold anything."""

import re


# What the published retrieval fine-tuning (and BLIP's) makes of a caption.
_DROPPED = re.compile(r"[.!\"()*#:;~]")
MAX_WORDS = 50


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


def simple_caption(text: str) -> str:
    """A caption in lower case, without most punctuation, of at most `MAX_WORDS` words, as published."""
    return " ".join(_DROPPED.sub(" ", text.lower()).split()[:MAX_WORDS])
