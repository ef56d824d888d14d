"""What kind of model a folder holds, asked of its configuration before weights are read: a wrong one is refused in a sentence."""

import os
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


WORDS = {
    "vision": "an InternViT vision tower",
    "InternVL-C": "an InternVL-C (contrastive, without queries)",
    "InternVL-G": "an InternVL-G (with QLLaMA's queries)",
    "chat": "an InternVL-Chat model",
    "llama": "a LLaMA",
    "language": "a causal language model",
}
_MODEL_TYPES = {"intern_vit_6b": "vision", "internvl_chat_model": "chat", "llama": "llama", "internlm2": "language"}


def kind_of(config: PretrainedConfig) -> str | None:
    """A key of `WORDS`; None for models of any other kind."""
    if config.model_type == "internvl_14b":
        return "InternVL-G" if config.has_queries else "InternVL-C"
    if config.model_type in _MODEL_TYPES:
        return _MODEL_TYPES[config.model_type]
    return "language" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def check_kind(folder: str | os.PathLike, *expected: str, door: str, **where: Any) -> PretrainedConfig:
    """The configuration in a folder.

    Args:
        folder: Folder or Hub id.
        *expected: Keys of `WORDS`, any of which will do. A LLaMA is a language model too.
        door: What wants the model, for the message.
        **where: As for `from_pretrained`.

    Raises:
        OSError: If there is no configuration.
        ValueError: If it is one of another kind.
    """
    config = AutoConfig.from_pretrained(folder, **where)
    found = kind_of(config)
    # Types that transformers does not have are others' own, and may well be language models.
    is_language = found == "llama" or (found is None and config.model_type not in CONFIG_MAPPING_NAMES)
    if found in expected or ("language" in expected and is_language):
        return config
    what = f"a model of type {config.model_type!r}" if found is None else WORDS[found]
    wanted = " or ".join(WORDS[kind] for kind in expected)
    raise ValueError(f"{os.fspath(folder)} holds {what}, but {door} needs {wanted}.")


__all__ = ["check_kind", "kind_of"]
