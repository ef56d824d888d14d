"""InternVL 1.0 whole: InternViT, QLLaMA, InternVL-C/G and InternVL-Chat.

Importing this package registers its classes with transformers' Auto classes, so that `AutoModel.from_pretrained(...)`
and `AutoProcessor.from_pretrained(...)` use the installed code and no remote code need be trusted.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import DOORS, install


if TYPE_CHECKING:
    from .registration import (
        InternLM2Config,
        InternLM2ForCausalLM,
        InternVisionModel,
        InternViTBackbone,
        InternViTConfig,
        InternViTForImageClassification,
        InternViTForSemanticSegmentation,
        InternVLChatBaseModel,
        InternVLChatConfig,
        InternVLChatForConditionalGeneration,
        InternVLConfig,
        InternVLImageProcessor,
        InternVLModel,
        InternVLProcessor,
        QLlamaConfig,
        QLlamaForCausalLM,
        QLlamaModel,
    )

# Registering imports torch and transformers, which takes seconds. These commands parse their arguments first, and call
# `register` after that.
COMMANDS = tuple("chat conversion demo evaluation export planning publishing reproduction serving training".split())


def register() -> None:
    """Registers the classes with the Auto classes, as `import internvl` does; calling it again changes nothing."""
    import_module(".registration", __name__)


def starts_a_command() -> bool:
    """Whether `python -m` is starting a command: `sys.argv[0]` is "-m" while Python looks for the module."""
    return sys.argv[:1] == ["-m"] and any(f"{__name__}.{name}" in sys.orig_argv for name in (*COMMANDS, *DOORS))


install()
if not starts_a_command():
    register()

__all__ = [
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternVLChatBaseModel",
    "InternVLChatConfig",
    "InternVLChatForConditionalGeneration",
    "InternVLConfig",
    "InternVLImageProcessor",
    "InternVLModel",
    "InternVLProcessor",
    "InternViTBackbone",
    "InternViTConfig",
    "InternViTForImageClassification",
    "InternViTForSemanticSegmentation",
    "InternVisionModel",
    "QLlamaConfig",
    "QLlamaForCausalLM",
    "QLlamaModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".registration", __name__), name)
