"""Builds a tokenizer of the tokenizers library from a sentencepiece model, with the ids of the slow tokenizer.

transformers needs sentencepiece and protobuf to read such a file; this module needs neither, and runs no foreign
parser on untrusted bytes. Added tokens may replace unused pieces: InternLM2's `<|im_start|>` is `[UNUSED_TOKEN_146]`.

Supported are BPE models with byte fallback, not unigram models, which no InternVL release has.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers


BPE_MODEL = 2  # values of sentencepiece_model.proto
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
LONGEST_PIECE = 1000  # those of published models have 16, added ones some more
SPACE = "\u2581"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Content of a tokenizer.model."""

    pieces: list[Piece]
    is_bpe: bool
    has_dummy_prefix: bool
    removes_extra_spaces: bool
    charsmap: bytes


def read_model(path: Path) -> SentencePieceModel:
    """Reads a tokenizer.model.

    Raises:
        ValueError: If it is no sentencepiece model.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        trainer, normalizer = (dict(_fields(_last(fields, number, b""))) for number in (2, 3))
        pieces = [_piece(dict(_fields(content))) for number, content in fields if number == 1]
    except (IndexError, struct.error, TypeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"`{path}` is no sentencepiece model ({error}).") from error
    return SentencePieceModel(
        pieces=pieces,
        is_bpe=trainer.get(3, 1) == BPE_MODEL,
        has_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
    )


def tokenizer_from_sentencepiece(path: Path, added_tokens: dict[int, dict[str, Any]], is_legacy: bool) -> Tokenizer:
    """Builds a tokenizer of the tokenizers library, without begin and end tokens.

    Args:
        path: A tokenizer.model.
        added_tokens: Id to content and properties of tokens outside the model, or in the place of its pieces.
        is_legacy: Whether a space is put before the text behind each added token, as in LLaMA's first slow tokenizer.

    Raises:
        ValueError: If the model is of another kind, or the added tokens leave ids free.
    """
    model = read_model(path)
    if not model.is_bpe or model.removes_extra_spaces:
        raise ValueError(f"`{path}` is no BPE model that keeps spaces; no InternVL release has such a tokenizer.")
    texts = [piece.text for piece in model.pieces]
    kept = {text for text, piece in zip(texts, model.pieces, strict=True) if piece.kind not in (UNUSED, CONTROL)}
    for index, token in added_tokens.items():
        if index < len(texts) and texts[index] != token["content"]:
            kept.discard(texts[index])
            texts[index] = token["content"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    has_bytes = any(piece.kind == BYTE for piece in model.pieces)
    merges = _merges(model.pieces, texts, kept)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    _add_spaces(tokenizer, model, is_legacy)
    _add_tokens(tokenizer, model, added_tokens)
    return tokenizer


def _merges(pieces: list[Piece], texts: list[str], kept: set[str]) -> list[tuple[str, str]]:
    """Pairs to merge, best first: sentencepiece prefers the pair whose merged piece scores highest."""
    found = []
    for text, piece in zip(texts, pieces, strict=True):
        if text not in kept or piece.kind in (BYTE, UNKNOWN, USER_DEFINED):
            continue
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [(-piece.score, left, right) for left, right in pairs if left in kept and right in kept]
    return [(left, right) for _, left, right in sorted(found, key=lambda entry: entry[0])]


def _add_spaces(tokenizer: Tokenizer, model: SentencePieceModel, is_legacy: bool) -> None:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    has_prefix = model.has_dummy_prefix
    if is_legacy:
        steps += [normalizers.Prepend(SPACE)] if has_prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
    else:
        scheme = "first" if has_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _add_tokens(tokenizer: Tokenizer, model: SentencePieceModel, added_tokens: dict[int, dict[str, Any]]) -> None:
    """Adds them in the order of their ids, since the library counts on from the vocabulary."""
    tokens = {index: dict(token) for index, token in added_tokens.items()}
    for index, piece in enumerate(model.pieces):
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED):
            tokens.setdefault(index, {"content": piece.text, "special": piece.kind != USER_DEFINED})
    for index in sorted(tokens):
        settings = {key: bool(tokens[index].get(key, False)) for key in ("lstrip", "rstrip", "single_word", "special")}
        token = AddedToken(tokens[index]["content"], normalized=False, **settings)
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"The added token `{token.content}` has id {index}, but the vocabulary of {len(model.pieces)} pieces "
                f"and the tokens before it end at {tokenizer.get_vocab_size() - 1}: ids in between have no token."
            )


# -------------------------------------------------------------------------------------------- the protobuf wire format
def _piece(fields: dict[int, Any]) -> Piece:
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    text = fields[1].decode("utf-8")
    if len(text) > LONGEST_PIECE:
        raise IndexError(f"a piece has {len(text)} characters")
    return Piece(text, score, fields.get(3, 1))


def _last(fields: list[tuple[int, Any]], number: int, default: Any) -> Any:
    return next((content for found, content in reversed(fields) if found == number), default)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and content of every field: an integer, or bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            content, position = _varint(data, position)
            yield number, content
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}[wire_type] if wire_type in (1, 5) else len(data) + 1
        if position + length > len(data):
            raise IndexError("a field ends behind the end of the file")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise IndexError("a number has more than 64 bits")
