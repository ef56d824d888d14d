"""The kind of model that a folder holds, read from its configuration, to reject a wrong one before loading weights."""

import json
import os
import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies


if TYPE_CHECKING:  # commands check a folder before they import transformers
    from transformers import PretrainedConfig

KIND_NAMES = {
    "published chat": "a published chat checkpoint (`python -m internvl.conversion` turns it into one that loads)",
    "qllama": "a QLLaMA alone",
    "vision": "an InternViT vision tower",
    "InternVL-C": "an InternVL-C (contrastive, without queries)",
    "InternVL-G": "an InternVL-G (with QLLaMA's queries)",
    "InternVL-C or -G": "an InternVL-C or InternVL-G (for retrieval and captions)",
    "chat": "an InternVL-Chat model",
    "llama": "a LLaMA",
    "language": "a causal language model",
}
# Kinds that follow from the `model_type` alone.
MODEL_TYPES = {
    "intern_vit_6b": "vision",
    "internlm2": "language",
    "internvl_14b": "InternVL-C or -G",
    "internvl_chat": "published chat",
    "internvl_chat_model": "chat",
    "llama": "llama",
    "qllama": "qllama",
}


# What transformers reads beside `config.json`, each an object.
SETTINGS_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_SECONDS = 5  # for the Hub to answer
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def kind_of(config: "PretrainedConfig") -> str | None:
    """A key of `KIND_NAMES`; None for models of any other kind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type == "internvl_14b":
        return "InternVL-G" if config.has_queries else "InternVL-C"
    is_language = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return MODEL_TYPES.get(config.model_type, "language" if is_language else None)


# Formats of the package's conversion, by the `model_type` in which they come.
CONVERTED = {
    "internvl_chat": "a published chat checkpoint",
    "internvl": "a published InternVL-C or InternVL-G, or a native InternVL of transformers",
}


def wrong_kind(folder: str | os.PathLike, what: str, *expected: str, door: str) -> ValueError:
    """The error that a folder holds `what` where `door` needs one of `expected`, keys of `KIND_NAMES`."""
    wanted = " or ".join(KIND_NAMES[kind] for kind in expected)
    below = _models_below(Path(folder), expected)
    hint = f" Below it there is {' and '.join(f'`{path}`' for path in below)}." if below else ""
    return ValueError(f"{os.fspath(folder)} holds {what}, but {door} needs {wanted}.{hint}")


def _models_below(folder: Path, expected: Collection[str]) -> list[Path]:
    """Sub-folders that, by their `model_type`, hold a model of one of the kinds."""
    found = []
    for file in sorted(folder.glob("*/config.json")):
        try:
            kind = MODEL_TYPES.get(json.loads(file.read_text(encoding="utf-8"))["model_type"])
        except (KeyError, OSError, RecursionError, TypeError, ValueError):
            continue
        if kind in expected or (kind == "InternVL-C or -G" and {"InternVL-C", "InternVL-G"} & set(expected)):
            found.append(file.parent)
    return found


def check_folder(folder: str | os.PathLike, subfolder: str = "") -> str | None:
    """Check that a model may be in a folder, without asking the network for what can only be a path.

    Returns:
        Its `model_type`; None where that is not known yet, as of a name on the Hub.

    Raises:
        OSError: If it is no folder, or holds no model that transformers loads.
        ValueError: If its model has to be converted first, or a file of it is broken.
    """
    path = Path(folder, subfolder)
    if path.is_file():
        raise FileNotFoundError(f"`{path}` is a file: give the folder of a model, here perhaps `{path.parent}`.")
    if not path.is_dir():
        if _HUB_NAME.fullmatch(os.fspath(folder)) and not Path(folder).exists():
            _check_hub(os.fspath(folder), subfolder)
            return None  # a name on the Hub
        raise FileNotFoundError(f"`{path}` is not there: give the folder of a model, or its name on the Hub.")
    if not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        hint = ", but LoRA adapters: give the folder of the merged model, or of the model that they belong to"
        raise FileNotFoundError(f"`{path}` is a folder without config.json, so it holds no model{hint * is_adapter}.")
    model_type = str(read_config_file(path / "config.json").get("model_type"))
    if model_type in CONVERTED:
        raise ValueError(
            f"{path} holds {CONVERTED[model_type]}, which is turned into one that loads here by `python -m "
            f"internvl.conversion {path} NEW_FOLDER`."
        )
    for name in SETTINGS_FILES:
        if (path / name).is_file():
            read_config_file(path / name)
    check_weights(path)
    return model_type


def read_config_file(file: Path) -> dict[str, Any]:
    """Reads a configuration, before transformers does without expecting another content.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON object, or nested too deeply.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"`{file}` cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"`{file}` cannot be read: it holds {type(config).__name__} where settings by name belong.")
    return config


def check_weights(folder: str | os.PathLike) -> None:
    """Check that the weights in a folder were written to their end; a name on the Hub passes.

    Raises:
        ValueError: Naming the first file that was not.
    """
    for path in sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else ():
        if path.is_file() and not is_whole_safetensors(path):
            raise ValueError(f"{path} ends too early: copy or convert it again.")


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return False


def _check_hub(name: str, subfolder: str) -> None:
    """Check that the Hub answers, in seconds: transformers tries for a minute, file by file.

    Raises:
        OSError: If it does not, and its cache has no model of this name.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    address = urlsplit(constants.ENDPOINT)
    through_proxy = bool(getproxies().keys() & {address.scheme, "all"})
    path = f"{subfolder}/config.json" if subfolder else "config.json"
    if constants.HF_HUB_OFFLINE or through_proxy or isinstance(try_to_load_from_cache(name, path), str):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), HUB_SECONDS).close()
    except OSError as error:
        raise OSError(
            f"There is no folder `{name}`, and whether the Hub has such a model is not known: {constants.ENDPOINT} "
            f"cannot be reached ({error})."
        ) from error


def check_kind(folder: str | os.PathLike, *expected: str, door: str, **where: Any) -> "PretrainedConfig":
    """The configuration in a folder.

    Args:
        folder: Folder or Hub id.
        *expected: Keys of `KIND_NAMES`, any of which is accepted. A LLaMA is a language model too.
        door: What needs the model, for the message.
        **where: As for `from_pretrained`.

    Raises:
        OSError: If there is no configuration.
        ValueError: If it is one of another kind, or of a format that has to be converted first.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    check_folder(folder, where.get("subfolder") or "")
    try:
        config = AutoConfig.from_pretrained(folder, **where)
    except OSError as error:
        if Path(folder).exists():
            raise
        raise OSError(f"There is no folder `{folder}`, and no such model can be read from the Hub: {error}") from error
    found = kind_of(config)
    # A type that transformers does not have belongs to remote code, and may well be a language model.
    is_language = found == "llama" or (found is None and config.model_type not in CONFIG_MAPPING_NAMES)
    if found in expected or ("language" in expected and is_language):
        return config
    what = f"a model of type {config.model_type!r}" if found is None else KIND_NAMES[found]
    raise wrong_kind(folder, what, *expected, door=door)


__all__ = [
    "KIND_NAMES",
    "MODEL_TYPES",
    "check_folder",
    "check_kind",
    "check_weights",
    "is_whole_safetensors",
    "kind_of",
    "read_config_file",
    "wrong_kind",
]
