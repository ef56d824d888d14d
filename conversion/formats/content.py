"""A model in this package's terms, after it was read and before it is written."""

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
from .format import Format


@dataclass(frozen=True, kw_only=True)
class Content:
    """The model and all that belongs to it.

    Args:
        source_format: Format of the source.
        source: The opened source.
        settings: This package's config.json; the image token is added once the tokenizer is there.
        config: The configuration object built from `settings`.
        tensors: The model's tensors under this package's names.
        image_size: Size of images, where it differs from the source's.
        tokenizer_folder: Folder that the tokenizer is copied from, or None.
        records: What is remembered of formats that the model had before, by their `to`.
        beside: Of a part of a model, tensors that belong to it and that its class has no place for.
        tokenizer: The tokenizer, once written.
    """

    source_format: Format
    source: Source
    settings: dict[str, Any]
    config: Any
    tensors: Tensors
    image_size: int | None
    tokenizer_folder: Path | None
    records: dict[str, Record] = field(default_factory=dict)
    beside: Tensors = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def result(self) -> Result:
        """The kind of model."""
        return self.source_format.result

    @property
    def image_processor(self) -> InternVLImageProcessor:
        """This package's image processor for the model."""
        mode = self.source_format.resize_mode
        return image_processor_for(self.result, mode, self.config, self.source, self.image_size)
