"""The public classes, registered with transformers' Auto classes when this file is imported."""

from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_internlm2 import InternLM2Config
from .configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig, QLlamaConfig
from .image_processing_internvl import InternVLImageProcessor
from .modeling_internlm2 import InternLM2ForCausalLM
from .modeling_internvit import (
    InternVisionModel,
    InternViTBackbone,
    InternViTForImageClassification,
    InternViTForSemanticSegmentation,
)
from .modeling_internvl import InternVLModel
from .modeling_internvl_chat import InternVLChatBaseModel as InternVLChatBaseModel
from .modeling_internvl_chat import InternVLChatForConditionalGeneration
from .modeling_qllama import QLlamaForCausalLM, QLlamaModel
from .processing_internvl import InternVLProcessor


def _register() -> None:
    """Registers every class; `exist_ok` because the sources may be imported under a second name."""
    models: dict[Any, dict[Any, type]] = {
        InternViTConfig: {
            AutoModel: InternVisionModel,
            AutoBackbone: InternViTBackbone,
            AutoModelForImageClassification: InternViTForImageClassification,
            AutoModelForSemanticSegmentation: InternViTForSemanticSegmentation,
        },
        QLlamaConfig: {AutoModel: QLlamaModel, AutoModelForCausalLM: QLlamaForCausalLM},
        InternVLConfig: {AutoModel: InternVLModel, AutoModelForZeroShotImageClassification: InternVLModel},
        InternVLChatConfig: {
            AutoModel: InternVLChatForConditionalGeneration,
            AutoModelForImageTextToText: InternVLChatForConditionalGeneration,
            AutoModelForMultimodalLM: InternVLChatForConditionalGeneration,
            AutoModelForCausalLM: InternVLChatForConditionalGeneration,
        },
        InternLM2Config: {AutoModelForCausalLM: InternLM2ForCausalLM},
    }
    for config_class, doors in models.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in doors.items():
            auto_class.register(config_class, model_class, exist_ok=True)
    image_processors = {"pil": InternVLImageProcessor, "torchvision": InternVLImageProcessor}
    for config_class in (InternViTConfig, InternVLConfig, InternVLChatConfig):
        AutoImageProcessor.register(config_class, image_processor_classes=image_processors, exist_ok=True)
    for config_class in (InternVLConfig, InternVLChatConfig):
        AutoProcessor.register(config_class, InternVLProcessor, exist_ok=True)


_register()
