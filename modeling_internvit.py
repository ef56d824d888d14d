"""InternViT, the vision tower of every InternVL configuration (paper section 3.2).

Does: features of square and non-square images of any size that the patch size divides, features of chosen blocks
without running the blocks above, feature maps as a backbone, the published classification and segmentation heads. Does
not: any preprocessing; that is the image processor.

Parameter names are those of the published Hub checkpoints, so these load unrenamed; names in the heads and the feature
pyramid are those of the published classification and segmentation code.

Shape letters of the whole package: B images or rows, N image tokens (1 + patches), M learned queries, L text tokens, T
attended length, D width of the respective tower, H heads, K head dim, E joint embedding, V vocabulary.
"""

import torch
from einops import rearrange
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_internvl import InternViTConfig
from .hub_internvl import HubModelMixin
from .keywords_internvl import refuse_unknown
from .layers_internvit import (
    InternViTAttention,
    InternViTEmbeddings,
    InternViTEncoder,
    InternViTLayer,
    resize_position_grid,
)
from .layers_internvl import (
    IGNORE_INDEX,
    InternVLAttentionPooling,
    InternVLPoolingAttention,
    clamp_to_dtype,
    fp16_safe_stream,
    zero_without_labels,
)


def tokens_to_map(tokens: torch.Tensor, height: int) -> torch.Tensor:
    """(B, N, D) of a grid `height` patches high -> (B, D, height, width), without the class token."""
    return rearrange(tokens[:, 1:], "b (h w) d -> b d h w", h=height).contiguous()


class InternViTPreTrainedModel(HubModelMixin, PreTrainedModel):
    """What all InternViT classes share."""

    config: InternViTConfig
    config_class = InternViTConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["InternViTEmbeddings", "InternViTLayer"]
    _can_compile_fullgraph = True
    _modules_kept_unquantized = ("attn_pooling", "clip_projector", "head")
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": InternViTLayer, "attentions": InternViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternViTEmbeddings):
            # The published code leaves them at unit deviation, which a training from scratch does not recover from
            # quickly.
            init.normal_(module.class_embedding, std=self.config.initializer_range)
            init.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, InternViTLayer):
            init.constant_(module.ls1, self.config.initializer_factor)
            init.constant_(module.ls2, self.config.initializer_factor)
        elif isinstance(module, InternVLPoolingAttention):
            module.init_biases()


class InternVisionModel(InternViTPreTrainedModel):
    """InternViT without a head. There is no final norm: `last_hidden_state` is the output of the last block."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__(config)
        self.embeddings = InternViTEmbeddings(config)
        self.encoder = InternViTEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_embeds: torch.Tensor | None = None,
        num_layers: int | None = None,
        num_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Features of a batch of images.

        Args:
            pixel_values: (B, 3, height, width), normalised; both sides multiples of the patch size.
            pixel_embeds: (B, N, D), token embeddings in place of `pixel_values`.
            num_layers: Run only so many blocks; None runs all.
            num_patches: Accepted and unused, so that the image processor's whole output can be passed.

        Returns:
            `last_hidden_state` (B, N, D), `pooler_output` (B, D): the class token; `hidden_states` when asked for: the
            embeddings and the output of every block that was run, each (B, N, D), in fp32 for an fp16 model.

        Raises:
            ValueError: Not exactly one input, a shape that does not fit, or an unknown keyword.
        """
        refuse_unknown(kwargs, "`InternVisionModel.forward`")
        hidden_states = self._embed(pixel_values, pixel_embeds)
        hidden_states = self.encoder(hidden_states, stop=num_layers, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Resizes the learned positions in place, from images of `old_size` to `new_size` pixels, as published."""
        embeddings = self.embeddings
        if embeddings.position_embedding.shape[1] != 1 + (old_size // patch_size) ** 2:
            raise ValueError(
                f"`old_size` {old_size} with patches of {patch_size} means {(old_size // patch_size) ** 2} positions, "
                f"the model has {embeddings.position_embedding.shape[1] - 1}."
            )
        side = new_size // patch_size
        with torch.no_grad():
            resized = resize_position_grid(embeddings.position_embedding, side, side)
        embeddings.position_embedding = nn.Parameter(resized)
        self.config.image_size = new_size

    def _embed(self, pixel_values: torch.Tensor | None, pixel_embeds: torch.Tensor | None) -> torch.Tensor:
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError("Give exactly one of `pixel_values` and `pixel_embeds`.")
        if pixel_embeds is None:
            return self.embeddings(pixel_values)
        if pixel_embeds.ndim != 3:
            raise ValueError(f"`pixel_embeds` must be (B, N, D), got {tuple(pixel_embeds.shape)}.")
        return pixel_embeds


class InternViTMapLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a feature map (B, D, height, width)."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.movedim(1, -1)).movedim(-1, 1).contiguous()


def feature_pyramid(config: InternViTConfig) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential, nn.Sequential]:
    """The layers that resize four equal maps by 4, 2, 1 and 1/2 (published segmentation backbone)."""
    width = config.hidden_size

    def double() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    def norm() -> nn.Module:
        return InternViTMapLayerNorm(width, eps=1e-6)  # eps: published segmentation code

    def final_norm() -> nn.Module:
        return norm() if config.feature_pyramid == "final_norm" else nn.Identity()

    return (
        nn.Sequential(double(), norm(), nn.GELU(), double(), final_norm()),
        nn.Sequential(double(), final_norm()),
        nn.Sequential(nn.Identity(), final_norm()),
        nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2), final_norm()),
    )


class InternViTBackbone(BackboneMixin, InternViTPreTrainedModel):
    """Feature maps of chosen blocks for detection and segmentation; loads the checkpoints of `InternVisionModel`.

    With `config.feature_pyramid` the four maps have strides of 1/4, 1/2, 1 and 2 patches, as a UperNet or Mask R-CNN
    expects them.
    """

    _auto_class = "AutoBackbone"

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = InternViTEmbeddings(config)
        self.encoder = InternViTEncoder(config)
        if config.feature_pyramid is not None:
            self.up1, self.up2, self.up3, self.up4 = feature_pyramid(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Feature maps of the stages in `config.out_features`; blocks above the last of them are not run.

        Args:
            pixel_values: (B, 3, height, width).
            num_patches: Accepted and unused.

        Returns:
            `feature_maps`: one (B, D, height / patch, width / patch) per stage, without the class token; with a
            feature pyramid the sides are 4, 2, 1 and 1/2 times that, an odd side halved downwards. When asked for,
            `hidden_states`, of all blocks, and `attentions` (B, H, N, N), of the blocks that were run.
        """
        refuse_unknown(kwargs, "`InternViTBackbone.forward`")
        tokens = self.embeddings(pixel_values)
        stages = [fp16_safe_stream(tokens)]
        is_deep = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        depth = self.config.num_hidden_layers if is_deep else max(self.config.out_indices_from_front)
        for index in range(depth):
            stages.append(self.encoder(stages[-1], start=index, stop=index + 1, **kwargs))
        height = pixel_values.shape[-2] // self.config.patch_size
        feature_maps = tuple(
            tokens_to_map(clamp_to_dtype(stages[index], tokens.dtype), height)
            for index in self.config.out_indices_from_front
        )
        if self.config.feature_pyramid is not None:
            pyramid = (self.up1, self.up2, self.up3, self.up4)
            feature_maps = tuple(layers(level) for layers, level in zip(pyramid, feature_maps, strict=True))
        return BackboneOutput(feature_maps=feature_maps)


class InternViTForImageClassification(InternViTPreTrainedModel):
    """A linear probe behind a batch norm on the features of `config.classifier_pooling` (published code)."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = InternVisionModel(config)
        width = config.hidden_size
        if config.classifier_pooling == "attention_pooling":
            pooled_width = width
            self.attn_pooling = InternVLAttentionPooling(config, width, config.num_attention_heads, pooled_width)
        elif config.classifier_pooling == "clip_projector":
            pooled_width = config.clip_embed_dim
            self.clip_projector = InternVLAttentionPooling(config, width, config.attn_pool_num_heads, pooled_width)
        else:
            pooled_width = 2 * width
        self.norm = nn.BatchNorm1d(pooled_width, eps=1e-6)  # eps: published classification/models/intern_vit_6b.py
        self.head = nn.Linear(pooled_width, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Class scores.

        Args:
            pixel_values: (B, 3, height, width).
            labels: (B,) class indices, -100 ignored.
            num_patches: Accepted and unused.

        Returns:
            `logits` (B, num_labels) and, with `labels`, the cross-entropy `loss`.
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        logits = self.head(self.norm(self._pool(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            is_class_index = not labels.is_floating_point()
            loss = zero_without_labels(loss, labels != IGNORE_INDEX) if is_class_index else loss
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> the input of the head, (B, D), (B, E) or (B, 2 D)."""
        if self.config.classifier_pooling == "attention_pooling":
            return self.attn_pooling(tokens)
        if self.config.classifier_pooling == "clip_projector":
            return self.clip_projector(tokens)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=-1)


class InternViTSegmentationHead(nn.Module):
    """A linear probe of every patch behind a batch norm (published `FCNHead` without convolutions)."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.conv_seg = nn.Conv2d(config.hidden_size, config.num_labels, kernel_size=1)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.norm(feature_map))


class InternViTForSemanticSegmentation(InternViTPreTrainedModel):
    """A linear probe on the feature map of the last block in `config.out_features` (published code)."""

    _auto_class = "AutoModelForSemanticSegmentation"
    # Otherwise Trainer divides the summed loss by a count that includes the pixels which the loss leaves out.
    accepts_loss_kwargs = False

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = InternVisionModel(config)
        self.decode_head = InternViTSegmentationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        """Class scores of every patch; blocks above the one that gives the feature map are not run.

        Args:
            pixel_values: (B, 3, height, width).
            labels: (B, label height, label width) class indices of the pixels, `config.semantic_loss_ignore_index`
                for pixels without a class.
            num_patches: Accepted and unused.

        Returns:
            `logits` (B, num_labels, height / patch, width / patch), to be resized to the image for a class per pixel;
            with `labels` the cross-entropy `loss` of the scores resized to them. `hidden_states` when asked for, of
            the blocks that were run.

        Raises:
            ValueError: A shape that does not fit.
        """
        num_layers = max(self.config.out_indices_from_front)
        outputs = self.vision_model(pixel_values, num_layers=num_layers, return_dict=True, **kwargs)
        height = pixel_values.shape[-2] // self.config.patch_size
        logits = self.decode_head(tokens_to_map(outputs.last_hidden_state, height))
        loss = None if labels is None else self._loss(logits, labels)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"`labels` must be ({logits.shape[0]}, height, width), a class per pixel of each image, got "
                f"{tuple(labels.shape)}."
            )
        ignored = self.config.semantic_loss_ignore_index
        loss = self.loss_function(logits.float(), labels.to(logits.device), ignore_index=ignored)
        return zero_without_labels(loss, labels != ignored)


__all__ = [
    "InternViTBackbone",
    "InternViTForImageClassification",
    "InternViTForSemanticSegmentation",
    "InternViTPreTrainedModel",
    "InternVisionModel",
]
