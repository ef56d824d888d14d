"""Tokenizer files of the result, which need no remote code, no sentencepiece and no protobuf.

Published cards ask for the slow tokenizer, so where a source has a sentencepiece model, a tokenizer.json is made of
that model; else the source's files are copied.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...conversation_internvl import IMAGE_CONTEXT_TOKEN, IMAGE_END_TOKEN, IMAGE_START_TOKEN
from ..readers.checkpoint_files import read_json
from ..readers.damages import describing
from ..readers.foreign_settings import FILES, only_data
from .sentencepiece_model import tokenizer_from_sentencepiece


TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# Slow tokenizers that are a sentencepiece model and added tokens; InternLM2's came as remote code.
SENTENCEPIECE_TOKENIZERS = ("LlamaTokenizer", "InternLM2Tokenizer")


SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Settings of slow tokenizers that mean the same today.
KEPT_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
)
# Names under which transformers' native InternVL asks its tokenizer for tokens.
VIDEO_TOKEN = "<video>"
NATIVE_TOKENS = {
    "start_image_token": IMAGE_START_TOKEN,
    "end_image_token": IMAGE_END_TOKEN,
    "context_image_token": IMAGE_CONTEXT_TOKEN,
    "video_token": VIDEO_TOKEN,
}
# Where tokenizer_config.json holds such names, if not at its top; the first may also be a list of tokens.
NATIVE_TOKEN_KEYS = ("extra_special_tokens", "model_specific_special_tokens")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def copy_tokenizer(
    source: Path, target: Path, config: PretrainedConfig, is_for_retrieval: bool = False
) -> PreTrainedTokenizerBase:
    """Writes the tokenizer of one folder to another and loads it from there; no code in it is run.

    `is_for_retrieval`: it will be loaded with `add_eos_token=True`, as published for InternVL-14B.

    Raises:
        OSError: If `source` has none.
        ValueError: If it cannot be read without remote code.
    """
    if not has_tokenizer(source):
        raise FileNotFoundError(
            f"`{source}` has no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json."
        )
    for file in TOKENIZER_FILES:
        if file.endswith(".json"):
            read_json(source / file)  # raises with the name of the file
    with describing(source, "tokenizer_config.json"):
        return _copied(source, target, config, is_for_retrieval)


def _copied(source: Path, target: Path, config: PretrainedConfig, is_for_retrieval: bool) -> PreTrainedTokenizerBase:
    settings = read_json(source / "tokenizer_config.json")
    name = str(settings.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
    if (source / "tokenizer.model").is_file() and name in SENTENCEPIECE_TOKENIZERS:
        _write_from_sentencepiece(source, target, settings)
    else:
        _copy_files(source, target, settings)
        nested = [settings.get(key) or {} for key in NATIVE_TOKEN_KEYS]
        if any(NATIVE_TOKENS.keys() & set(names) for names in (settings, *nested)):
            _drop_native_tokens(target, config.text_config.vocab_size)
    if is_for_retrieval and name == "LlamaTokenizer":
        _keep_begin_token(target)
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, config=config, trust_remote_code=False)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library raises nothing narrower.
        raise ValueError(f"`{source / 'tokenizer.json'}` is no tokenizer: {error}. Copy it again.") from error
    return tokenizer if tokenizer.pad_token is not None else _with_padding(target, config, tokenizer)


def pad_left(target: Path) -> None:
    """Sets the padding side that generation needs, for code that pads with the tokenizer, such as pipelines.

    Published tokenizers of chat models say "right", or nothing, which means the same.
    """
    _write_settings(target, {**read_json(target / "tokenizer_config.json"), "padding_side": "left"})


def needed_image_tokens(config: Any) -> tuple[str, ...]:
    """Tokens that mark images in the texts of a chat model with this configuration."""
    around = (IMAGE_START_TOKEN, IMAGE_END_TOKEN) if config.use_image_start_end else ()
    return (*around, IMAGE_CONTEXT_TOKEN)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, needed_tokens: Sequence[str]) -> None:
    """Raises ValueError if a tokenizer has ids that the model has no embedding for, or lacks needed tokens."""
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= vocabulary_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, the model has embeddings for {vocabulary_size} tokens: it is not "
            "the tokenizer of this checkpoint. Give the right one with `--tokenizer DIR`."
        )
    missing = [token for token in needed_tokens if token not in vocabulary]
    if missing:
        raise ValueError(
            f"The tokenizer lacks {', '.join(f'`{token}`' for token in missing)}, so images have no place in its "
            "texts: it is not the tokenizer of this checkpoint. Give the right one with `--tokenizer DIR`."
        )


def image_token_id_of(tokenizer: PreTrainedTokenizerBase, given: int | None) -> int:
    """Id of the image token; ValueError if the user gave another one."""
    found = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
    if given not in (None, found):
        raise ValueError(
            f"`image_token_id` is {given}, the tokenizer has {found} for `{IMAGE_CONTEXT_TOKEN}`. Leave it out."
        )
    return found


# -------------------------------------------------------------------------------------------------------- copied files
def _copy_files(source: Path, target: Path, settings: dict[str, Any]) -> None:
    for name in TOKENIZER_FILES:
        if name in FILES and (source / name).is_file():
            _write_json(target / name, only_data(name, read_json(source / name)))
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    is_remote = "auto_map" in settings
    settings = only_data("tokenizer_config.json", settings)
    # The checkpoint's template is written beside it, as a file that every tool finds.
    settings.pop("chat_template", None)
    settings.pop("auto_map", None)
    if is_remote and not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"The tokenizer of `{source}` is remote code (`{settings.get('tokenizer_class')}`), which is not run. "
            "Load and save it once with code that you trust, and give that folder with `--tokenizer DIR`."
        )
    if is_remote:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_settings(target, settings)


def _drop_native_tokens(target: Path, vocabulary_size: int) -> None:
    """Removes the native processor's tokens; its video token may lie past the model's vocabulary."""

    def is_kept(text: str, index: int) -> bool:
        return text != VIDEO_TOKEN or index < vocabulary_size

    settings = {k: v for k, v in read_json(target / "tokenizer_config.json").items() if k not in NATIVE_TOKENS}
    for key in NATIVE_TOKEN_KEYS:
        if isinstance(settings.get(key), dict):
            others = {name: token for name, token in settings.pop(key).items() if name not in NATIVE_TOKENS}
            settings |= {key: others} if others else {}
    if "added_tokens_decoder" in settings:
        tokens = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {index: t for index, t in tokens if is_kept(_content(t), int(index))}
    _write_settings(target, settings)
    added, fast = read_json(target / "added_tokens.json"), read_json(target / "tokenizer.json")
    if not is_kept(VIDEO_TOKEN, added.get(VIDEO_TOKEN, 0)):
        added.pop(VIDEO_TOKEN)
        _write_json(target / "added_tokens.json", added)
    tokens = fast.get("added_tokens") or []
    kept = [token for token in tokens if is_kept(token["content"], token["id"])]
    if len(kept) < len(tokens):
        _write_json(target / "tokenizer.json", {**fast, "added_tokens": kept})


def _keep_begin_token(target: Path) -> None:
    """Lets `<s>` stay in front when the tokenizer is loaded with `add_eos_token=True`.

    Where there is a tokenizer.json, transformers forgets `add_bos_token` of tokenizer_config.json, and this call,
    which the published cards make, then turns the begin token off. CodeLLaMA's tokenizer is LLaMA's, but turns it on
    by itself; its tokens for filling in code are switched off.
    """
    settings = read_json(target / "tokenizer_config.json")
    if settings.get("add_bos_token") is False:
        return
    unused = dict.fromkeys(("prefix_token", "middle_token", "suffix_token", "eot_token", "fill_token"))
    _write_settings(target, {**settings, **unused, "tokenizer_class": "CodeLlamaTokenizer"})


def _with_padding(
    target: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Sets the padding token where the source leaves it to the user; pipelines pad with the tokenizer."""
    index = config.get_text_config().pad_token_id
    token = tokenizer.unk_token or tokenizer.eos_token if index is None else tokenizer.convert_ids_to_tokens(index)
    _write_settings(target, {**read_json(target / "tokenizer_config.json"), "pad_token": token})
    return AutoTokenizer.from_pretrained(target, config=config, trust_remote_code=False)


def _write_settings(target: Path, settings: dict[str, Any]) -> None:
    _write_json(target / "tokenizer_config.json", dict(sorted(settings.items())))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Not sorted inside: a tokenizer.json lists its vocabulary by id.
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ sentencepiece models
def _write_from_sentencepiece(source: Path, target: Path, settings: dict[str, Any]) -> None:
    added_tokens = _added_tokens(source, settings)
    # Slow LLaMA tokenizers that were saved before the key existed are of the legacy kind, and so is every InternLM2
    # tokenizer.
    is_legacy = "InternLM2" in str(settings.get("tokenizer_class")) or settings.get("legacy") is not False
    backend = tokenizer_from_sentencepiece(source / "tokenizer.model", added_tokens, is_legacy)
    special = {**read_json(source / "special_tokens_map.json"), **settings}
    kept = {"add_bos_token": True, "add_eos_token": False, "padding_side": "right"}
    kept |= {name: settings[name] for name in KEPT_SETTINGS if name in settings}
    names = {name: _content(special[name]) for name in SPECIAL_NAMES if special.get(name)}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **kept).save_pretrained(target)
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")


def _added_tokens(source: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens, id to content and properties, from the newer or the older place."""
    tokens = {int(index): dict(token) for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    special = read_json(source / "special_tokens_map.json")
    names = [special.get(name) for name in SPECIAL_NAMES] + list(special.get("additional_special_tokens") or [])
    special_names = {_content(name) for name in names if name}
    for text, index in read_json(source / "added_tokens.json").items():
        tokens.setdefault(index, {"content": text, "special": text in special_names})
    return tokens


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token
