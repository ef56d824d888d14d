"""The published Hub layouts, which the published code reads, and of chat models also engines and GGUF converters.

vLLM has `InternVLChatModel` built in, llama.cpp's `convert_hf_to_gguf.py` splits one into decoder and tower. No engine
reads InternVL-C/G: none has QLLaMA, queries or attention pooling. Names of tensors are those of this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..readers.adapters import LORA_RANK_KEYS
from ..repository.generation import write_generation_config
from ..repository.records import Record
from ..repository.result import CHAT
from .content import Content
from .hub_settings import CHAT_MARKS, CONTRASTIVE_MARKS, VISION_MARKS
from .own_format import ForeignFormat
from .published_files import write_clip_settings, write_published_code, write_published_template
from .published_settings import (
    chat_obstacles,
    contrastive_obstacles,
    published_chat,
    published_contrastive,
    published_vision,
)


@dataclass(frozen=True, kw_only=True)
class PublishedFormat(ForeignFormat):
    """One of the published Hub layouts.

    Args:
        published_config: Builds its config.json, without the type of the weights, from this package's configuration.
    """

    to: ClassVar[str] = "published"
    title: ClassVar[str] = "the published Hub layout"

    published_config: Callable[[Any], dict[str, Any]]

    def _write_config(self, content: Content) -> dict[str, Any]:
        return self.published_config(content.config)

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        facts: dict[str, Any] = {
            key: 0 for key in LORA_RANK_KEYS.values() if key in config
        }  # Conversion merges adapters.
        facts["auto_map"] = config.get("auto_map") or self._write_config(content)["auto_map"]
        if record is None or record.dtype != content.settings["dtype"]:
            facts["torch_dtype"] = content.settings["dtype"]
        # The published code keeps the size before stretching there, and builds positions of that size when it loads.
        if "vision_config" in config:
            size = content.config.vision_config.image_size
            facts["vision_config"] = {**config["vision_config"], "image_size": size}
        return {**config, **facts}

    def _write_files(self, folder: Path, content: Content) -> None:
        write_clip_settings(folder, content.image_processor)
        if content.tokenizer is not None and content.result is CHAT:
            write_published_template(folder, content.config)
        write_generation_config(folder, content.result, content.config, content.source, content.tokenizer)
        write_published_code(folder, content.result)


PUBLISHED_FORMATS = (
    PublishedFormat(
        name="InternVL-14B, published Hub layout",
        **CONTRASTIVE_MARKS,
        published_config=published_contrastive,
        find_obstacles=contrastive_obstacles,
    ),
    PublishedFormat(
        name="InternVL-Chat, published Hub layout",
        **CHAT_MARKS,
        published_config=published_chat,
        find_obstacles=chat_obstacles,
    ),
    PublishedFormat(
        name="InternViT, published Hub layout",
        **VISION_MARKS,
        published_config=published_vision,
    ),
)
