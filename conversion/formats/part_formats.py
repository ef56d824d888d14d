"""How a part of a model is written alone: a vision tower as any InternViT, a decoder as transformers writes it, QLLaMA
and a projector as `assemble` reads them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ...configuration_internlm2 import InternLM2Config
from ...configuration_internvl import QLlamaConfig
from ...modeling_internlm2 import InternLM2ForCausalLM
from ...modeling_internvl_chat import InternVLChatForConditionalGeneration
from ...modeling_qllama import QLlamaForCausalLM, QLlamaModel
from ..readers.tensors import main_dtype
from ..repository.code import copy_code
from ..repository.generation import write_generation_config
from ..repository.processor import KEPT_IMAGE_SETTINGS
from ..repository.result import VISION, Result
from .content import Content
from .format import Format
from .own_format import OwnFormat
from .parts import PROJECTOR_TYPE, ModelPart, take_part


class ProjectorConfig(PretrainedConfig):
    """Settings of a chat model that its projector depends on; no class loads a projector alone."""

    model_type = PROJECTOR_TYPE


@dataclass(frozen=True, kw_only=True)
class PartFormat(OwnFormat):
    """The format of a part.

    Args:
        starts: What stands before its names in its class but not in its own files.
    """

    to: ClassVar[str] = "part"
    title: ClassVar[str] = "a folder of its own"

    starts: str = ""

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads it.

        Raises:
            ValueError: If none does.
        """
        if self.result.kind == "part":
            raise ValueError(f"`verify` has no effect: no class loads {self.name.partition(' of ')[0]} alone.")
        return super().auto_class

    def spelling(self, name: str) -> str:
        """Name of a tensor in the files, given the one in its class."""
        return self.starts + name

    def _write_files(self, folder: Path, content: Content) -> None:
        if self.result.kind == "text":
            write_generation_config(folder, self.result, content.config, content.source, content.tokenizer)
        copy_code(folder, [self.result.auto_map])


def part_content(content: Content, name: str) -> Content:
    """A part of a model as a content that can be written.

    Raises:
        ValueError: If the model has no such part.
    """
    part = take_part(content, name)
    title = f"{name} of {content.source_format.name}"
    target = _vision_format(title) if name == "vision" else _part_format(title, part)
    auto_map = target.result.auto_map
    settings = {
        **part.settings,
        "architectures": [target.result.model_class.__name__],
        **({"auto_map": auto_map} if auto_map else {}),
        "dtype": main_dtype(part.tensors),
    }
    return replace(
        content,
        source_format=target,
        settings=settings,
        config=target.build_config(settings),
        tensors=part.tensors,
        beside=part.beside,
        image_size=None,
        tokenizer_folder=content.tokenizer_folder if target.result.kind in ("text", "encoder") else None,
        records={},
        source=replace(content.source, recorded_files=_recorded_files(content, name)),
    )


def image_settings(content: Content) -> dict[str, Any]:
    """preprocessor_config.json of a tower alone: the colours of the model, and whole images."""
    published = content.source.read_json("preprocessor_config.json")
    kept = {key: published[key] for key in KEPT_IMAGE_SETTINGS if published.get(key) is not None}
    return {**kept, "resize_mode": "squash"}


def _recorded_files(content: Content, name: str) -> dict[str, dict[str, Any]]:
    if name == "vision":
        return {"preprocessor_config.json": image_settings(content)}
    return {"generation_config.json": content.source.read_json("generation_config.json")}


def _vision_format(title: str) -> Format:
    return Format(name=title, result=VISION, tensor_names=(), map_config=lambda source: {})


def _part_format(title: str, part: ModelPart) -> PartFormat:
    config_class, model_class, kind = _classes(part)
    task = {"text": "text-generation", "encoder": "feature-extraction", "part": "image-text-to-text"}[kind]
    result = Result(kind=kind, config_class=config_class, model_class=model_class, pipeline_tag=task)
    starts = "model." if model_class is QLlamaModel else ""
    return PartFormat(name=title, result=result, tensor_names=(), map_config=lambda source: {}, starts=starts)


def _classes(part: ModelPart) -> tuple[Any, type[PreTrainedModel], str]:
    """Classes of a part's configuration and model, and its kind of result."""
    if part.name == "projector":
        return ProjectorConfig, InternVLChatForConditionalGeneration, "part"
    if part.name == "qllama":
        has_text = any(name.startswith("model.embed_tokens.") for name in part.tensors)
        has_head = any(name.startswith("lm_head.") for name in part.tensors)
        kind = ("text" if has_head else "encoder") if has_text else "part"
        return QLlamaConfig, QLlamaForCausalLM if has_head else QLlamaModel, kind
    model_type = part.settings["model_type"]
    if model_type == InternLM2Config.model_type:
        return InternLM2Config, InternLM2ForCausalLM, "text"
    config_class = CONFIG_MAPPING[model_type]
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class], "text"
