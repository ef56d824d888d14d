"""Encodes texts for InternVL-C and -G: the prefix `summarize:` and an end token, at which the text feature is read.

The processor adds both. `ContrastiveTexts` completes ids without them, from a bare tokenizer or a stock pipeline. It
decodes the text and tokenizes it again with the prefix, because a tokenizer may merge the last characters of the
prefix with the first ones of the text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)

TEXT_PREFIX = "summarize:"
MAX_TEXT_LENGTH = 80
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_HINT = 'Prepare texts with `processor(text=..., mode="contrastive")`.'


def without_end(row: Sequence[int], end: int | None) -> list[int]:
    """Removes trailing end tokens."""
    row = list(row)
    while row and row[-1] == end:
        row.pop()
    return row


def pad_row(row: list[int], width: int, value: int, is_left: bool = False) -> list[int]:
    """Pads ids to `width` with `value`."""
    padding = [value] * (width - len(row))
    return padding + row if is_left else row + padding


def pad_token_id(tokenizer: Any) -> int:
    """Returns the padding id. The model follows the mask, so any id will do; published code uses 0."""
    return tokenizer.pad_token_id or 0


def first_ids(tokenizer: Any, texts: Sequence[str], max_length: int | None, characters: int = 4096) -> list[list[int]]:
    """Returns ids without end token; of a long text, only as many as `max_length` needs.

    Tokenizes the first `characters` of each text, and more if they give too few ids.
    """
    longest = max(map(len, texts), default=0)
    length = longest if max_length is None else max(32 * max_length, characters)
    rows = tokenizer([text[:length] for text in texts], padding=False, truncation=False)["input_ids"]
    rows = [without_end(row, tokenizer.eos_token_id) for row in rows]
    if max_length is None or longest <= length:
        return rows
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        # The last ids of a cut text may differ from those of the whole text.
        if len(text) > length and len(row) < 2 * max_length:
            rows[index] = first_ids(tokenizer, [text], max_length, 4 * length)[0]
    return rows


def encode_rows(tokenizer: Any, texts: Sequence[str], max_length: int | None, with_end: bool) -> list[list[int]]:
    """Returns at most `max_length` ids per text, with one end token or none, whatever the tokenizer adds.

    Raises:
        ValueError: If `with_end` is set and the tokenizer has no end token.
    """
    if with_end and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end token, at which mode `contrastive` reads the feature of a text. Set "
            "`tokenizer.eos_token`."
        )
    end = [tokenizer.eos_token_id] if with_end else []
    rows = first_ids(tokenizer, texts, max_length)
    return [row[: max_length - len(end)] + end if max_length else row + end for row in rows]


def encode_batch(
    tokenizer: Any,
    texts: Sequence[str],
    with_end: bool,
    max_length: int | None = None,
    padding: bool | str | None = None,
    padding_side: str = "right",
) -> dict[str, list[list[int]]]:
    """Encodes texts of retrieval (with the end token) and captions (without it).

    Args:
        tokenizer: Tokenizer of the model.
        texts: The texts, including their prefix.
        with_end: Whether to add the end token.
        max_length: Largest number of ids per text.
        padding: "max_length" pads to `max_length`, False or "do_not_pad" not at all, other values to the longest text.
        padding_side: "left" or "right".

    Returns:
        `input_ids` and `attention_mask` as lists, 1 = attend.
    """
    rows = encode_rows(tokenizer, texts, max_length, with_end)
    width = max_length if padding == "max_length" and max_length else max(map(len, rows), default=0)
    if padding in (False, "do_not_pad"):
        width = 0
    is_left = padding_side == "left"
    pad_id = pad_token_id(tokenizer)
    return {
        "input_ids": [pad_row(row, width, pad_id, is_left) for row in rows],
        "attention_mask": [pad_row([1] * len(row), width, 0, is_left) for row in rows],
    }


def with_prefix(text: str, prefix: str) -> str:
    """Adds the prefix unless the text starts with it."""
    return text if text.startswith(prefix) else prefix + text


def file_beside(folder: str, name: str, **source: Any) -> str | None:
    """Returns the path of a file of a checkpoint, None if it is missing or cannot be reached."""
    try:
        return cached_file(folder, name, **source)
    except OSError:
        return None


class ContrastiveTexts:
    """Completes ids of texts with the prefix and end token of contrastive training.

    Args:
        tokenizer: Tokenizer of the model.
        prefix: Prefix of every text.
        max_length: Largest number of ids per text, including the end token.

    Raises:
        ValueError: If the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, prefix: str = TEXT_PREFIX, max_length: int = MAX_TEXT_LENGTH) -> None:
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.max_length = max_length
        *self.prefix_ids, self.end_id = encode_rows(tokenizer, [prefix], None, with_end=True)[0]

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, **source: Any) -> "ContrastiveTexts | None":
        """Loads tokenizer and processor settings of a checkpoint; returns None if there is no tokenizer.

        `folder` and `source` (`subfolder`, `revision`...) are as in `from_pretrained`, `config` is the model's.
        """
        if not any(file_beside(folder, name, **source) for name in TOKENIZER_FILES):
            return None
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **source)
        written = file_beside(folder, "processor_config.json", **source)
        settings = json.loads(Path(written).read_text(encoding="utf-8")) if written else {}
        return cls(
            tokenizer, settings.get("text_prefix", TEXT_PREFIX), settings.get("max_text_length", MAX_TEXT_LENGTH)
        )

    def completed(self, row: list[int]) -> list[int]:
        """Adds the prefix and the end token to a row of ids without padding, if they are missing.

        Raises:
            ValueError: If the text cannot be recovered from the ids.
        """
        body = without_end(row, self.end_id)
        has_end = len(body) < len(row)
        text = self._text(body)
        if text is None and not has_end:
            raise ValueError(
                f"A text without `{self.prefix}` in front and `{self.tokenizer.eos_token}` behind cannot be "
                "completed: its ids are not those that the tokenizer of the checkpoint gives for the text they spell. "
                f"{PROCESSOR_HINT}"
            )
        if text is None:
            logger.warning_once(
                f"A text ends in `{self.tokenizer.eos_token}`, but does not begin with `{self.prefix}`. "
                f"{PROCESSOR_HINT}"
            )
        if text is None or (has_end and text.startswith(self.prefix)):
            return row
        return encode_rows(self.tokenizer, [with_prefix(text, self.prefix)], self.max_length, with_end=True)[0]

    def _text(self, body: list[int]) -> str | None:
        """Returns the text with these ids, with or without begin token; None if there is none."""
        begin = [self.tokenizer.bos_token_id]
        spelled = body[1:] if body[:1] == begin else body
        text = self.tokenizer.decode(spelled, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # Some decoders strip a leading space that the tokenizer encoded.
        for candidate in (text, " " + text):
            ids = encode_rows(self.tokenizer, [candidate], None, with_end=False)[0]
            if ids in (body, [*begin, *body]):
                return candidate
        return None
