"""A model of this package, before it is written in some form."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...image_processing_internvl import InternVLImageProcessor
from ..readers.source import Source
from ..readers.tensors import Tensors
from ..repository.processor import image_processor_for
from ..repository.records import Record
from ..repository.result import Result
from .format import Layout


@dataclass(frozen=True, kw_only=True)
class Content:
    """The model and all that belongs to it.

    Args:
        layout: Of the source.
        source: The opened source.
        settings: config.json of the model in this package's form; the image token comes once the tokenizer is there.
        config: The same as an object.
        tensors: Those of the model under this package's names.
        image_size: Size of pictures, where it is not that of the source.
        tokenizer_folder: Where its tokenizer comes from, or None.
        records: What is remembered of other forms, by name.
        tokenizer: Its tokenizer, once written.
    """

    layout: Layout
    source: Source
    settings: dict[str, Any]
    config: Any
    tensors: Tensors
    image_size: int | None
    tokenizer_folder: Path | None
    records: dict[str, Record] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def result(self) -> Result:
        """What it is."""
        return self.layout.result

    @property
    def image_processor(self) -> InternVLImageProcessor:
        """Its image processor in this package's form."""
        return image_processor_for(self.result, self.layout.resize_mode, self.config, self.source, self.image_size)
