"""This package's formats, and how a result is written; the other formats that can be written override what differs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ...sentence_files_internvl import write_sentence_files
from ..readers.damages import DAMAGES
from ..readers.source import Source
from ..readers.tensors import Tensors
from ..repository.code import copy_code, copy_endpoint, keep_written_code, write_json
from ..repository.generation import write_generation_config
from ..repository.processor import write_processor
from ..repository.records import Record, overlaid, restore_files
from ..repository.result import CHAT, CLASSIFICATION, PYRAMID, SEGMENTATION
from .content import Content
from .format import Format
from .hub_settings import CHAT_MARKS, CONTRASTIVE_MARKS, VISION_MARKS, map_chat, map_vision, spelled_out
from .parts import FACT_KEYS


@dataclass(frozen=True, kw_only=True)
class OwnFormat(Format):
    """A format of this package.

    Args:
        is_published: Whether a published layout has the same names and keys, so that only `auto_map` distinguishes
            them.
        find_obstacles: Reasons why a model with this configuration cannot be written.
    """

    to: ClassVar[str] = "internvl"
    title: ClassVar[str] = "this package's format"
    # Whether the folder holds code that the Auto classes need.
    brings_code: ClassVar[bool] = True

    is_published: bool = False
    find_obstacles: Callable[[Any], list[str]] = lambda config: []

    def matches(self, source: Source) -> bool:
        """Whether a source has this format."""
        return super().matches(source) and (not self.is_published or self._is_own(source.config))

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads the tensors as they are written."""
        return self.result.auto_class

    def spelling(self, name: str) -> str:
        """Name of a tensor in this format, given the one under which transformers stores it."""
        return name

    def obstacles(self, content: Content) -> list[str]:
        """Reasons why a model cannot be written in this format."""
        return self.find_obstacles(content.config)

    def notes(self, content: Content) -> list[str]:
        """Remarks for the user on a model in this format."""
        return []

    def named_tensors(self, content: Content) -> Tensors:
        """Tensors under their names in this format."""
        return content.tensors

    def config_json(self, content: Content) -> dict[str, Any]:
        """config.json: the remembered one with all changes since, or one made of the model."""
        record = content.records.get(self.to)
        kept = self._kept_config(content, record) if record else None
        return self._with_facts(content, kept or self._write_config(content), record if kept else None)

    def write(self, folder: Path, content: Content) -> None:
        """Writes everything but weights and tokenizer."""
        write_json(folder / "config.json", self.config_json(content))
        self._write_files(folder, content)
        keep_written_code(folder)

    def _is_own(self, config: dict[str, Any]) -> bool:
        own, auto_map = self.result.config_class, config.get("auto_map")
        place = auto_map.get("AutoConfig", "") if isinstance(auto_map, dict) else ""
        return config.get("model_type") == own.model_type and str(place).endswith(own.hub_auto_map["AutoConfig"])

    def _write_config(self, content: Content) -> dict[str, Any]:
        return content.settings

    def _compared(self, content: Content) -> dict[str, Any]:
        """The configuration with every default spelled out, so that equal models give equal dictionaries."""
        parts = {name: getattr(content.config, name) for name in content.config.sub_configs}
        return {
            **spelled_out(content.config),
            **{name: spelled_out(part) for name, part in parts.items() if part is not None},
        }

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        """Sets what must hold regardless of a record: `auto_map` names the code in the folder."""
        facts = {key: content.settings[key] for key in FACT_KEYS if key in content.settings}
        return {**config, **facts}

    def _write_files(self, folder: Path, content: Content) -> None:
        auto_maps = write_processor(folder, content.result, content.config, content.image_processor, content.tokenizer)
        write_generation_config(folder, content.result, content.config, content.source, content.tokenizer)
        copy_code(folder, [content.result.auto_map, *auto_maps])
        if content.result.kind != "vision" and content.tokenizer is not None:
            copy_endpoint(folder)
        if content.result.kind == "contrastive" and content.tokenizer is not None:
            write_sentence_files(folder)

    def _kept_config(self, content: Content, record: Record) -> dict[str, Any] | None:
        """The remembered configuration with all changes since; None if it describes no model of this format."""
        kept = record.config
        if not any(key in kept for key in self.config_keys):
            return None
        then_source = replace(content.source, tensors=content.tensors, config=kept, recorded_files=record.files)
        try:
            settings = self.map_config(then_source)
            before = replace(content, settings=settings, config=content.source_format.build_config(settings))
        except DAMAGES:
            return None  # An unreadable record is ignored.
        then, now = self._compared(before), self._compared(content)
        if now.get("image_token_id", 0) is None:
            now["image_token_id"] = then["image_token_id"]  # Only a tokenizer would say it.
        return overlaid(kept, then, now)


@dataclass(frozen=True, kw_only=True)
class ForeignFormat(OwnFormat):
    """A format that others define. A model that came from it is written as it was."""

    def named_tensors(self, content: Content) -> Tensors:
        """Tensors under the same names; what the source held twice is there twice again."""
        tensors, record = content.tensors, content.records.get(self.to)
        twice = record.stored_twice if record else {}
        restored = {name: other for name, other in twice.items() if other in tensors and name not in tensors}
        return {**tensors, **{name: tensors[other] for name, other in restored.items()}}

    def write(self, folder: Path, content: Content) -> None:
        """Writes everything but weights and tokenizer; a model that did not change gets its old files back."""
        super().write(folder, content)
        record = content.records.get(self.to)
        if record and self._kept_config(content, record) == record.config:
            has_its_tokenizer = content.tokenizer_folder == content.source.folder
            restore_files(folder, record, has_its_tokenizer)
            keep_written_code(folder)

    def _compared(self, content: Content) -> dict[str, Any]:
        return self._write_config(content)


def _own_name(model: str) -> str:
    return f"{model}, {OwnFormat.title}"


# In the order in which they are tried: a model with more parts stands before one with fewer.
OWN_FORMATS = (
    OwnFormat(name=_own_name("InternVL-14B"), **CONTRASTIVE_MARKS, is_published=True),
    OwnFormat(name=_own_name("InternVL-Chat"), **CHAT_MARKS, is_published=True),
    OwnFormat(
        name=_own_name("InternVL-Chat that reads queries alone"),
        result=CHAT,
        config_keys=("connector",),
        tensor_names=("mlp2.0.weight", "query_tokens", "vision_model.embeddings.class_embedding"),
        map_config=map_chat,
    ),
    OwnFormat(
        name=_own_name("InternViT with a classification head"),
        result=CLASSIFICATION,
        config_keys=("qk_normalization", "classifier_pooling"),
        tensor_names=("vision_model.embeddings.class_embedding", "head.weight", "norm.running_mean"),
        map_config=map_vision,
    ),
    OwnFormat(
        name=_own_name("InternViT with a linear segmentation head"),
        result=SEGMENTATION,
        config_keys=("qk_normalization", "out_indices"),
        tensor_names=("vision_model.embeddings.class_embedding", "decode_head.conv_seg.weight"),
        map_config=map_vision,
    ),
    OwnFormat(
        name=_own_name("InternViT with a feature pyramid"),
        result=PYRAMID,
        config_keys=("feature_pyramid",),
        tensor_names=("embeddings.class_embedding", "up1.0.weight"),
        map_config=map_vision,
    ),
    OwnFormat(name=_own_name("InternViT"), **VISION_MARKS, is_published=True),
)
