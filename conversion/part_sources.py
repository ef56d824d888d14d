"""Reads a part of a new model: from a folder that holds it alone, or out of a whole model in any format."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..configuration_internlm2 import InternLM2Config
from ..configuration_internvl import QLlamaConfig
from ..layers_internvl_chat import build_decoder
from .formats.hub_settings import without_old_defaults
from .formats.key_tables import DERIVED_BUFFERS, OLD_DEFAULTS
from .formats.part_formats import image_settings
from .formats.parts import PROJECTOR_TYPE, ModelPart, take_part
from .plan import ConversionOptions, check_counts, plan_conversion
from .readers.checkpoint_files import read_json
from .readers.damages import DAMAGES, describing, reason_of
from .readers.hub import find_source
from .readers.opening import open_files, open_source
from .readers.source import Source
from .readers.tensors import LazyTensor, Tensors
from .repository.result import stored_state
from .repository.shards import BESIDE_STEM
from .repository.tokenizer import has_tokenizer


# Models that are a part by themselves, by `model_type`. A LLaMA is a QLLaMA without queries.
ALONE = {"qllama": (QLlamaConfig.model_type, "llama"), "projector": (PROJECTOR_TYPE,)}


@dataclass(frozen=True, kw_only=True)
class FoundPart:
    """A part, and where it was found.

    Args:
        part: The part.
        source: The opened source.
        title: What the source is.
        tokenizer_folder: Folder of its tokenizer, or None.
        image_settings: Of a tower, its preprocessor_config.json.
    """

    part: ModelPart
    source: Source
    title: str
    tokenizer_folder: Path | None = None
    image_settings: dict[str, Any] | None = None

    @property
    def tensors(self) -> list[LazyTensor]:
        """Its tensors, and those beside it."""
        return [*self.part.tensors.values(), *self.part.beside.values()]

    @property
    def files(self) -> list[Path]:
        """Files with its tensors."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors))


def find_part(place: str | Path, name: str, image_size: int | None = None) -> FoundPart:
    """Reads names and shapes of a part, and no weights.

    Args:
        place: A folder, a file with weights, or a repository on the Hub (`user/name`).
        name: One of `PART_NAMES`.
        image_size: Size of images to resize the positions of a tower to; None keeps them.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: There is no such part, or it cannot be read.
    """
    path = find_source(str(place))
    folder = path if path.is_dir() else path.parent
    model_type = read_json(folder / "config.json").get("model_type")
    if name == "decoder":
        is_alone = model_type in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, InternLM2Config.model_type)
    else:
        is_alone = model_type in ALONE.get(name, ())
    return _alone(path, name) if is_alone else _in_model(path, name, image_size)


def _in_model(path: Path, name: str, image_size: int | None) -> FoundPart:
    plan = plan_conversion(path, ConversionOptions(image_size=image_size))
    part = take_part(plan, name)
    beside = part.beside | _beside(plan.source.folder)
    return FoundPart(
        part=ModelPart(name=name, settings=part.settings, tensors=part.tensors, beside=beside),
        source=plan.source,
        title=plan.source_format.name,
        tokenizer_folder=plan.tokenizer_folder if name in ("qllama", "decoder") else None,
        image_settings=image_settings(plan) if name == "vision" else None,
    )


def _alone(path: Path, name: str) -> FoundPart:
    with describing(path):
        source = open_source(path)
        if source.doubled:
            raise ValueError(f"`{path}` holds tensors in more than one file: {', '.join(source.doubled)}.")
        settings = without_old_defaults(source.config, OLD_DEFAULTS)
        check_counts(source, settings)
        tensors = {key: tensor for key, tensor in source.tensors.items() if not key.endswith(DERIVED_BUFFERS)}
        title = f"{settings['model_type']} alone"
        if name == "decoder":
            settings, tensors = _as_saved_today(settings, tensors, path)
        elif name == "qllama":
            settings = _qllama_settings(settings)
            tensors = {_under_model(key): tensor for key, tensor in tensors.items()}
    folder = source.folder if has_tokenizer(source.folder) else None
    part = ModelPart(name=name, settings=settings, tensors=tensors, beside=_beside(source.folder))
    return FoundPart(part=part, source=source, title=title, tokenizer_folder=folder)


def _beside(folder: Path) -> Tensors:
    """What `--extract` wrote beside a part."""
    files = sorted(folder.glob(f"{BESIDE_STEM}*.safetensors"))
    return open_files(folder, files).tensors if files else {}


def _qllama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["model_type"] == QLlamaConfig.model_type:
        return settings
    return {**settings, "model_type": QLlamaConfig.model_type, "num_query_token": 0}


def _under_model(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _as_saved_today(settings: dict[str, Any], tensors: Tensors, path: Path) -> tuple[dict[str, Any], Tensors]:
    """A decoder as transformers saves it: files of models without their head lack a prefix."""
    try:
        model_type = settings["model_type"]
        kept = {key: value for key, value in settings.items() if key != "model_type"}
        own = model_type == InternLM2Config.model_type
        config = InternLM2Config(**kept) if own else AutoConfig.for_model(model_type, **kept)
        with torch.device("meta"):
            model = build_decoder(config, has_head=True)
    except DAMAGES as error:
        raise ValueError(f"config.json of `{path}` does not describe a decoder: {reason_of(error)}") from error
    known, start = stored_state(model), f"{model.base_model_prefix}."
    names = {name: name if name in known else start + name for name in tensors}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unknown = [name for name, new in names.items() if new not in known]
    unread = [name for name in unknown if not any(pattern.search(names[name]) for pattern in ignored)]
    if unread:
        raise ValueError(f"`{path}` holds tensors that {type(model).__name__} has not: {', '.join(unread)}.")
    settings = {**settings, "tie_word_embeddings": bool(config.tie_word_embeddings)}
    return settings, {names[name]: tensor for name, tensor in tensors.items() if name not in unknown}
