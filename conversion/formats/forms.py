"""The forms in which a model can be written: this package's own, the published Hub layouts, and transformers' native InternVL.

A form takes a model of this package and says how its tensors and its configuration are called, which files belong to it, and what it
cannot express. Its table of names is that of the layout which reads it, from right to left.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from ..readers.tensors import Tensors
from ..repository.code import copy_code, keep_written_code, write_json
from ..repository.generation import write_generation_config
from ..repository.processor import write_processor
from ..repository.records import Record, overlaid, recorded_source, restore_files
from ..repository.result import CHAT, Result, auto_class_of, stored_state
from .content import Content
from .format import Layout
from .hub_formats import HUB_LAYOUTS
from .native_files import native_notes, write_native_files
from .native_settings import NATIVE_LAYOUTS, native_obstacles, to_native
from .native_tables import NATIVE_RULES, spelling_of_today
from .published_files import write_clip_settings, write_published_code, write_published_template
from .published_settings import LORA_KEYS, PUBLISHED_KINDS, spelled_out
from .rules import inverse, translate
from .sentence_files import write_sentence_files


class OwnForm:
    """The form of this package; the others change what they have otherwise."""

    name = "internvl"
    title = "this package's form"
    # Whether a folder in this form holds code that Auto classes need.
    brings_code = True

    def layout_of(self, result: Result) -> Layout | None:
        """The layout by which a result in this form is read again; None where the form has no such model."""
        return next((layout for layout in HUB_LAYOUTS if layout.result.model_class is result.model_class), None)

    def auto_class(self, content: Content) -> Any:
        """The Auto class that gives the model whose tensors are written."""
        return auto_class_of(content.result.model_class, content.result.auto_map)

    def spelling(self, name: str) -> str:
        """The name of a tensor in this form, from the one under which transformers would store it."""
        return name

    def obstacles(self, content: Content) -> list[str]:
        """Why a model cannot be written in this form."""
        return []

    def notes(self, content: Content) -> list[str]:
        """What the user is told of a model in this form."""
        return []

    def named_tensors(self, content: Content) -> Tensors:
        """Tensors under their names in this form."""
        return content.tensors

    def config_json(self, content: Content) -> dict[str, Any]:
        """config.json: the one that is remembered with the changes since, or one made of the model."""
        record = content.records.get(self.name)
        kept = self._kept_config(content, record) if record else None
        return self._with_facts(content, kept or self._map_config(content), record if kept else None)

    def write(self, folder: Path, content: Content) -> None:
        """Writes everything but weights and tokenizer.

        Args:
            folder: Of the result.
            content: The model.
        """
        write_json(folder / "config.json", self.config_json(content))
        self._write_files(folder, content)
        keep_written_code(folder)

    def _map_config(self, content: Content) -> dict[str, Any]:
        return content.settings

    def _compared(self, content: Content) -> dict[str, Any]:
        """The same with every default spelled out, so that equal models give equal dictionaries."""
        parts = {name: getattr(content.config, name) for name in content.config.sub_configs}
        return {
            **spelled_out(content.config),
            **{name: spelled_out(part) for name, part in parts.items() if part is not None},
        }

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        """What must be so, whatever is remembered: the code of `auto_map` is that in the folder."""
        facts = {key: content.settings[key] for key in ("architectures", "auto_map", "dtype")}
        return {**config, **facts}

    def _write_files(self, folder: Path, content: Content) -> None:
        auto_maps = write_processor(folder, content.result, content.config, content.image_processor, content.tokenizer)
        write_generation_config(folder, content.result, content.config, content.source, content.tokenizer)
        copy_code(folder, [content.result.auto_map, *auto_maps])
        if content.result.kind == "contrastive" and content.tokenizer is not None:
            write_sentence_files(folder)

    def _kept_config(self, content: Content, record: Record) -> dict[str, Any] | None:
        """The remembered configuration with the changes since; None where it is not one of this model's layout."""
        layout, kept = self.layout_of(content.result), record["config"]
        if layout is None or not any(key in kept for key in layout.config_keys):
            return None
        try:
            settings = layout.map_config(recorded_source(content.source, content.tensors, record))
            before = replace(content, settings=settings, config=content.layout.build_config(settings))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # a damaged memory is none
        then, now = self._compared(before), self._compared(content)
        if now.get("image_token_id", 0) is None:
            now["image_token_id"] = then["image_token_id"]  # only a tokenizer would tell
        return overlaid(kept, then, now)


class PublishedForm(OwnForm):
    """The published Hub layouts."""

    name = "published"
    title = "the published Hub layout"

    def layout_of(self, result: Result) -> Layout | None:
        """None for models that were never published on the Hub."""
        return super().layout_of(result) if result.model_class.__name__ in PUBLISHED_KINDS else None

    def obstacles(self, content: Content) -> list[str]:
        """What the published classes have not."""
        kind = PUBLISHED_KINDS.get(content.result.model_class.__name__)
        if kind is None:
            return [f"it has no place for a {content.result.model_class.__name__}"]
        return kind.obstacles(content.config)

    def named_tensors(self, content: Content) -> Tensors:
        """The same names; heads are there twice where they were."""
        tensors = content.tensors
        twice = content.records.get(self.name, {}).get("stored_twice", {})
        restored = {name: other for name, other in twice.items() if other in tensors and name not in tensors}
        return {**tensors, **{name: tensors[other] for name, other in restored.items()}}

    def write(self, folder: Path, content: Content) -> None:
        """As in this package's form, but a model that did not change has its old files again."""
        super().write(folder, content)
        record = content.records.get(self.name)
        if record and self._kept_config(content, record) == record["config"]:
            has_its_tokenizer = content.tokenizer_folder == content.source.folder
            restore_files(folder, record, has_its_tokenizer)
            keep_written_code(folder)

    def _map_config(self, content: Content) -> dict[str, Any]:
        return PUBLISHED_KINDS[content.result.model_class.__name__].map_config(content.config)

    _compared = _map_config

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        facts: dict[str, Any] = {key: 0 for key in LORA_KEYS if key in config}
        facts["auto_map"] = config.get("auto_map") or self._map_config(content)["auto_map"]
        if record is None or record["dtype"] != content.settings["dtype"]:
            facts["torch_dtype"] = content.settings["dtype"]
        # The published code leaves the size before stretching there, and builds positions of that size when it loads.
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


class NativeForm(PublishedForm):
    """transformers' `InternVLForConditionalGeneration`."""

    name = "native"
    title = "transformers' native InternVL"
    brings_code = False

    def layout_of(self, result: Result) -> Layout | None:
        """Chat models only."""
        return NATIVE_LAYOUTS[0] if result.model_class is CHAT.model_class else None

    def auto_class(self, content: Content) -> Any:
        """Always the one of chat models."""
        return AutoModelForImageTextToText

    def spelling(self, name: str) -> str:
        """That of today, which the model itself has."""
        return spelling_of_today(name)

    def obstacles(self, content: Content) -> list[str]:
        """What the native classes have not."""
        if self.layout_of(content.result) is None:
            return [f"it has no place for a {content.result.model_class.__name__}, only for chat models"]
        reasons = native_obstacles(content.config)
        if content.config.image_token_id is None and content.tokenizer_folder is None:
            reasons.append("`image_token_id` is not known: give `--image-token-id N` or `--tokenizer DIR`")
        return reasons

    def notes(self, content: Content) -> list[str]:
        """What the native image processor does otherwise."""
        return native_notes(content.config)

    def named_tensors(self, content: Content) -> Tensors:
        """Native names, compared with the native model."""
        translation = translate(super().named_tensors(content), inverse(NATIVE_RULES), content.settings)
        # The image token may only be known once the tokenizer is there.
        settings = {**self._map_config(content), "image_token_id": content.config.image_token_id or 0}
        try:
            with torch.device("meta"):
                model = InternVLForConditionalGeneration(InternVLConfig.from_dict(settings))
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ValueError(f"This model cannot be written as {self.title}: {error}") from error
        shapes = {self.spelling(name): tuple(tensor.shape) for name, tensor in stored_state(model).items()}
        found = {name: tensor.shape for name, tensor in translation.tensors.items()}
        tied = model.all_tied_weights_keys
        wrong = [
            name
            for name in {**shapes, **found}
            if shapes.get(name) != found.get(name) and not (name in tied and name not in found)
        ]
        wrong += translation.unknown
        if wrong:
            raise ValueError(
                f"This model cannot be written as {self.title}: it has other tensors than {', '.join(wrong)}."
            )
        return translation.tensors

    def _map_config(self, content: Content) -> dict[str, Any]:
        return to_native(content.settings, content.config)

    def _compared(self, content: Content) -> dict[str, Any]:
        # Of a decoder, rotary positions can be said in two ways.
        return {**self._map_config(content), "text_config": spelled_out(content.config.text_config)}

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        if record is not None and record["dtype"] == content.settings["dtype"]:
            return config
        return {
            **{key: value for key, value in config.items() if key != "torch_dtype"},
            "dtype": content.settings["dtype"],
        }

    def _write_files(self, folder: Path, content: Content) -> None:
        write_native_files(folder, content.config, content.image_processor, content.tokenizer)
        write_generation_config(folder, content.result, content.config, content.source, content.tokenizer)


FORMS = {form.name: form for form in (OwnForm(), PublishedForm(), NativeForm())}


def form_of(layout: Layout, config: dict[str, Any]) -> str | None:
    """Name of the form that a source has, or None.

    Args:
        layout: Of the source.
        config: Its config.json.
    """
    if layout in NATIVE_LAYOUTS:
        return NativeForm.name
    if layout not in HUB_LAYOUTS:
        return None
    own = layout.result.config_class
    auto_map = config.get("auto_map")
    module = auto_map.get("AutoConfig", "") if isinstance(auto_map, dict) else ""
    is_own = config.get("model_type") == own.model_type and str(module).endswith(own.hub_auto_map["AutoConfig"])
    return OwnForm.name if is_own else PublishedForm.name
