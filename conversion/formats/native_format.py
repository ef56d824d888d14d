"""transformers' own InternVL, `InternVLForConditionalGeneration`, to read and to write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration

from ..readers.tensors import Tensors
from ..repository.generation import write_generation_config
from ..repository.records import Record
from ..repository.result import CHAT, stored_state
from .content import Content
from .hub_settings import spelled_out
from .native_files import native_notes, write_native_files
from .native_settings import map_native, native_obstacles, to_native
from .native_tables import NATIVE_NAMES, NATIVE_RULES, spelling_of_today
from .own_format import ForeignFormat
from .rules import inverse, translate


@dataclass(frozen=True, kw_only=True)
class NativeFormat(ForeignFormat):
    """The native format in one of its two spellings; written is today's."""

    to: ClassVar[str] = "native"
    title: ClassVar[str] = "transformers' native InternVL"
    brings_code: ClassVar[bool] = False

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads the tensors as they are written."""
        return AutoModelForImageTextToText

    def spelling(self, name: str) -> str:
        """Today's spelling, which the model itself has."""
        return spelling_of_today(name)

    def obstacles(self, content: Content) -> list[str]:
        """Reasons why a model cannot be written in this format."""
        reasons = super().obstacles(content)
        if content.config.image_token_id is None and content.tokenizer_folder is None:
            reasons.append("`image_token_id` is not known: give `--image-token-id N` or `--tokenizer DIR`")
        return reasons

    def notes(self, content: Content) -> list[str]:
        """Remarks on what the native image processor does otherwise."""
        return native_notes(content.config)

    def named_tensors(self, content: Content) -> Tensors:
        """Tensors under native names, compared with the native model."""
        translation = translate(super().named_tensors(content), inverse(NATIVE_RULES), content.settings)
        # The image token may only be known once the tokenizer is there.
        settings = {**self._write_config(content), "image_token_id": content.config.image_token_id or 0}
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

    def _write_config(self, content: Content) -> dict[str, Any]:
        return to_native(content.settings, content.config)

    def _compared(self, content: Content) -> dict[str, Any]:
        # Rotary positions of a decoder have two spellings.
        return {**self._write_config(content), "text_config": spelled_out(content.config.text_config)}

    def _with_facts(self, content: Content, config: dict[str, Any], record: Record | None) -> dict[str, Any]:
        if record is not None and record.dtype == content.settings["dtype"]:
            return config
        return {
            **{key: value for key, value in config.items() if key != "torch_dtype"},
            "dtype": content.settings["dtype"],
        }

    def _write_files(self, folder: Path, content: Content) -> None:
        write_native_files(folder, content.config, content.image_processor, content.tokenizer)
        write_generation_config(folder, content.result, content.config, content.source, content.tokenizer)


NATIVE_FORMATS = tuple(
    NativeFormat(
        name=f"InternVL-Chat, native layout of transformers{remark}",
        result=CHAT,
        config_keys=("text_config", "image_seq_length"),
        tensor_names=names,
        map_config=map_native,
        rules=NATIVE_RULES,
        find_obstacles=native_obstacles,
    )
    for names, remark in zip(NATIVE_NAMES, ("", ", names of its first releases"), strict=True)
)
