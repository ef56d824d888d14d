"""What a conversion makes: one kind of repository, and how its model is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from ...modeling_internvit import (
    InternVisionModel,
    InternViTBackbone,
    InternViTForImageClassification,
    InternViTForSemanticSegmentation,
)
from ...modeling_internvl import InternVLModel
from ...modeling_internvl_chat import InternVLChatForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Result:
    """One kind of repository that a conversion makes.

    Args:
        kind: "vision", "contrastive" or "chat".
        config_class: Class of its configuration.
        model_class: The class whose weights it holds.
        pipeline_tag: Task on the Hub.
    """

    kind: str
    config_class: Any
    model_class: type[PreTrainedModel]
    pipeline_tag: str

    @property
    def auto_map(self) -> dict[str, str]:
        """Its Auto classes."""
        return dict(self.config_class.hub_auto_map)


VISION = Result(
    kind="vision",
    config_class=InternViTConfig,
    model_class=InternVisionModel,
    pipeline_tag="image-feature-extraction",
)
CLASSIFICATION = replace(VISION, model_class=InternViTForImageClassification, pipeline_tag="image-classification")
SEGMENTATION = replace(VISION, model_class=InternViTForSemanticSegmentation, pipeline_tag="image-segmentation")
PYRAMID = replace(VISION, model_class=InternViTBackbone)
CONTRASTIVE = Result(
    kind="contrastive",
    config_class=InternVLConfig,
    model_class=InternVLModel,
    pipeline_tag="zero-shot-image-classification",
)
CHAT = Result(
    kind="chat",
    config_class=InternVLChatConfig,
    model_class=InternVLChatForConditionalGeneration,
    pipeline_tag="image-text-to-text",
)


def auto_class_of(model_class: type[PreTrainedModel], auto_map: dict[str, str]) -> Any:
    """The Auto class that gives a model class.

    Args:
        model_class: Class of the model.
        auto_map: Auto class to `module.Class`, as in config.json.

    Returns:
        The Auto class; for a backbone the class itself, as `AutoBackbone` loads from the Hub alone, and from no folder.
    """
    name = next(auto for auto, place in auto_map.items() if place.rpartition(".")[2] == model_class.__name__)
    return model_class if name == "AutoBackbone" else getattr(transformers, name)


def stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names in files, which transformers changes as it loads: there each expert of a mixture has its own.

    Args:
        model: Any model, also on the meta device.
    """
    return dict(revert_weight_conversion(model, model.state_dict()))
