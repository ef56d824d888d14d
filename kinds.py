"""The kind of model that a folder holds, read from its configuration, to reject a wrong one before loading weights."""

import os
from typing import TYPE_CHECKING, Any


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


def kind_of(config: "PretrainedConfig") -> str | None:
    """A key of `KIND_NAMES`; None for models of any other kind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type == "internvl_14b":
        return "InternVL-G" if config.has_queries else "InternVL-C"
    is_language = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return MODEL_TYPES.get(config.model_type, "language" if is_language else None)


def wrong_kind(folder: str | os.PathLike, what: str, *expected: str, door: str) -> ValueError:
    """The error that a folder holds `what` where `door` needs one of `expected`, keys of `KIND_NAMES`."""
    wanted = " or ".join(KIND_NAMES[kind] for kind in expected)
    return ValueError(f"{os.fspath(folder)} holds {what}, but {door} needs {wanted}.")


def check_kind(folder: str | os.PathLike, *expected: str, door: str, **where: Any) -> "PretrainedConfig":
    """The configuration in a folder.

    Args:
        folder: Folder or Hub id.
        *expected: Keys of `KIND_NAMES`, any of which is accepted. A LLaMA is a language model too.
        door: What needs the model, for the message.
        **where: As for `from_pretrained`.

    Raises:
        OSError: If there is no configuration.
        ValueError: If it is one of another kind.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = AutoConfig.from_pretrained(folder, **where)
    found = kind_of(config)
    # A type that transformers does not have belongs to remote code, and may well be a language model.
    is_language = found == "llama" or (found is None and config.model_type not in CONFIG_MAPPING_NAMES)
    if found in expected or ("language" in expected and is_language):
        return config
    what = f"a model of type {config.model_type!r}" if found is None else KIND_NAMES[found]
    raise wrong_kind(folder, what, *expected, door=door)


__all__ = ["KIND_NAMES", "MODEL_TYPES", "check_kind", "kind_of", "wrong_kind"]
