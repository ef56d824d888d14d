"""The kinds of models that a repository may hold."""

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
    """One kind of model.

    Args:
        kind: "vision", "contrastive" or "chat"; of a part alone "text", "encoder" without a
            head, or "part" where no class loads it.
        config_class: Class of its configuration.
        model_class: Class of the model.
        pipeline_tag: Task on the Hub.
    """

    kind: str
    config_class: Any
    model_class: type[PreTrainedModel]
    pipeline_tag: str

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto class to `module.Class`, as in config.json."""
        return dict(getattr(self.config_class, "hub_auto_map", {}))

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads the model; for a backbone its class, as `AutoBackbone` loads from no folder."""
        own = self.model_class.__name__
        names = (auto for auto, place in self.auto_map.items() if place.rpartition(".")[2] == own)
        name = next(names, "AutoModelForCausalLM")  # of a decoder of transformers
        return self.model_class if name == "AutoBackbone" else getattr(transformers, name)


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


def stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names that files have; loading fuses some, such as the experts of a mixture."""
    return dict(revert_weight_conversion(model, model.state_dict()))
