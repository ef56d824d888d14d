"""InternVL-Chat: InternViT, a connector and any causal language model (paper section 3.4, later chat releases).

Does: the simple configuration (patches through an MLP), the full one (QLLaMA queries and patches, each through its
MLP), training and generation with any number of images per sample and turn, and the published helpers `chat`,
`batch_chat`, `extract_feature`. Does not: tiling and prompts in general; these are the image processor's and the
processor's work.

A tile becomes `config.num_image_token` features, which take the place of as many `<IMG_CONTEXT>` tokens, in order.
Shape letters as in modeling_internvit.
"""

import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .chat_helpers_internvl import ChatHelpersMixin
from .configuration_internvl import InternVLChatConfig
from .feature_cache_internvl import CachesImageFeatures
from .generation_internvl_chat import ImageGenerationMixin
from .hub_internvl import HubModelMixin, OwnParameters, loaded_parameter
from .image_placement_internvl import NO_IMAGE_TOKEN, TILES_HINT, check, on_host, place_by_row, place_in_order
from .keywords_internvl import refuse_unknown
from .layers_internvl import IGNORE_INDEX, next_token_loss
from .layers_internvl_chat import (
    build_decoder,
    build_projector,
    head_reads_only,
    is_for_vllm,
    next_along,
    pixel_shuffle,
    weighted_loss,
)
from .modeling_internvit import InternVisionModel
from .modeling_qllama import QLlamaModel


# Weights of a decoder's head, by the names of the published checkpoints.
LANGUAGE_HEADS = ("language_model.lm_head.", "language_model.output.")
# What the outputs pass on from the decoder's.
DECODER_OUTPUTS = ("past_key_values", "hidden_states", "attentions", "router_logits")


def _joined(parts: Sequence) -> Any:
    """One tensor, tuple of tensors or output of all tiles from those of the chunks."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    if isinstance(parts[0], BaseModelOutputWithPooling):
        return BaseModelOutputWithPooling(**{name: _joined([part[name] for part in parts]) for name in parts[0]})
    return tuple(_joined(layer) for layer in zip(*parts, strict=True))


class ImageInputs(NamedTuple):
    """The images of a forward, as in its arguments."""

    pixel_values: torch.Tensor | None
    image_flags: torch.Tensor | None
    num_patches: torch.Tensor | None
    image_embeds: torch.Tensor | None


@dataclass
class InternVLChatBaseOutput(BaseModelOutputWithPast):
    """Output of a language model without its head, and the features of the images.

    Args:
        image_hidden_states: (tiles, num_image_token, D) when images were given as pixels.
        router_logits: Per layer with experts, if the decoder has experts and was asked for them.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class InternVLChatOutput(CausalLMOutputWithPast):
    """Output of a causal language model, and the features of the images.

    Args:
        image_hidden_states: (tiles, num_image_token, D) when images were given as pixels.
        router_logits: Per layer with experts, if the decoder has experts and `output_router_logits` asks for them.
        aux_loss: In that case, the load-balancing loss of the experts; part of `loss`, as in the decoder.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class InternVLChatPreTrainedModel(HubModelMixin, PreTrainedModel):
    """What the InternVL-Chat classes share."""

    config: InternVLChatConfig
    config_class = InternVLChatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _modules_kept_unquantized = (
        "vision_model",
        "mlp1",
        "mlp2",
        "language_model.lm_head",
        "language_model.output",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVLChatBaseModel) and module.query_tokens is not None:
            init.normal_(module.query_tokens, std=self.config.qllama_config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Always: the decoder may have experts. transformers looks for its decorator in this file alone."""
        return True


class InternVLChatBaseModel(CachesImageFeatures, InternVLChatPreTrainedModel):
    """InternVL-Chat without its language head; `config.connector` says what the decoder sees of a tile.

    Loads any chat checkpoint (decoders whose head is called `lm_head` or `output`, and the rest `model`) and saves
    under the same names.

    `vision_batch_size` may be set on a model: without gradients the vision tower encodes so many tiles at a time,
    which bounds the memory of its activations. The default takes 1 GiB for tiles of 448 px in InternViT-6B in
    bfloat16, and keeps a GPU busy. With gradients, and in a group of processes, all tiles go through the tower at
    once.
    """

    vision_batch_size: int = 14
    _image_token_id: int | None = None  # of the tokenizer that `chat` was given, where it is another
    _has_language_head = False
    _text_part = "language_model"

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = build_decoder(config.text_config, self._has_language_head)
        self._decoder_keywords = frozenset(inspect.signature(self.language_model.forward).parameters)
        self.mlp1: Any = None
        self.mlp2: Any = None
        self.qllama: Any = None
        self.query_tokens: Any = None
        if config.connector != "queries":
            channels = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
            self.mlp1 = build_projector(channels, width, config.projector_type)
        if config.connector != "patches":
            qllama_config = config.qllama_config
            self.qllama = QLlamaModel(qllama_config, has_text=False)
            self.query_tokens = nn.Parameter(torch.empty(1, qllama_config.num_query_token, qllama_config.hidden_size))
            self.mlp2 = build_projector(qllama_config.hidden_size, width, config.projector_type)
        self.post_init()
        if self.query_tokens is not None:
            self.own_parameters = OwnParameters(self)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """As in transformers, but a headless model does not report the head of the checkpoint.

        `_keys_to_ignore_on_load_unexpected` would not do: vLLM adds its head to this class, and skips weights named
        there.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if not self._has_language_head:
            loading_info.unexpected_keys = {
                name for name in loading_info.unexpected_keys if not name.startswith(LANGUAGE_HEADS)
            }

    @property
    def vision_chunk_bytes(self) -> int:
        """Former setting, in bytes of activations: 1 GiB stands for the default of `vision_batch_size`."""
        return self.vision_batch_size * 2**30 // InternVLChatBaseModel.vision_batch_size

    @vision_chunk_bytes.setter
    def vision_chunk_bytes(self, value: int) -> None:
        message = "`vision_chunk_bytes` is now `vision_batch_size`, in tiles. Use the new name."
        warnings.warn(message, FutureWarning, stacklevel=3)  # behind torch's `__setattr__`
        self.vision_batch_size = max(1, value * InternVLChatBaseModel.vision_batch_size // 2**30)

    @property
    def num_image_token(self) -> int:
        """Positions of the decoder that one tile takes."""
        return self.config.num_image_token

    @property
    def img_context_token_id(self) -> int | None:
        """Id of the image placeholder; setting it sets that of the configuration."""
        return self.config.image_token_id if self._image_token_id is None else self._image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int) -> None:
        self.config.image_token_id = value

    @property
    def select_layer(self) -> int:
        """Hidden state of the vision tower that gives the patches."""
        return self.config.select_layer

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.language_model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        if self._has_language_head:
            setattr(self.language_model, self.language_model.base_model_prefix, decoder)
        else:
            self.language_model = decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Features of tiles in the width of the decoder.

        Args:
            pixel_values: (tiles, 3, height, width). Without gradients, `vision_batch_size` of them are encoded at a
                time.

        Returns:
            `pooler_output` (tiles, num_image_token, D); `last_hidden_state` (tiles, N, D_vision): the output of the
            last vision block that was run. Blocks above `select_layer` are run only for the queries.

        Raises:
            ValueError: A shape that does not fit, or an unknown keyword.
        """
        for name in ("num_patches", "num_image_patches"):  # of the processor and of vLLM
            kwargs.pop(name, None)
        return _joined([self._encode_chunk(tiles, **kwargs) for tiles in self._chunks(pixel_values)])

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Published name: features (tiles, num_image_token, D) of tiles (tiles, 3, height, width).

        Frees the vision tower's output of each chunk, which `get_image_features` returns as well. With
        `image_feature_cache_bytes` on the model, a tile that was seen before is not encoded again.
        """

        def encode(pixel_values: torch.Tensor) -> torch.Tensor:
            return _joined([self._encode_chunk(tiles).pooler_output for tiles in self._chunks(pixel_values)])

        config = self.config
        settings = config.connector, config.select_layer, config.downsample_ratio, config.ps_version
        return self._cached_features(pixel_values, encode, *settings, without="language_model")

    def _chunks(self, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
        """The tiles in chunks that go through the vision tower one after the other."""
        # With gradients every activation is kept anyway, so chunks would save nothing. Processes that share sharded
        # weights gather them in every call, so all must call the tower equally often, for any number of tiles.
        in_a_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if in_a_group or torch.is_grad_enabled():
            return [pixel_values]
        return pixel_values.split(self.vision_batch_size)

    def _encode_chunk(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        depth, kept = self.config.vision_config.num_hidden_layers, self.config.num_vision_layers
        if self.config.connector == "queries":
            kept = depth
        # With activation checkpointing transformers makes the embeddings of every part require gradients; a frozen
        # tower would then run a backward.
        is_trained = pixel_values.requires_grad or any(x.requires_grad for x in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            vision = self.vision_model(pixel_values, num_layers=kept, return_dict=True, **kwargs)
            tokens = vision.last_hidden_state
            last = None if self.qllama is None else self.vision_model.encoder(tokens, start=kept)
        features = []
        if last is not None:
            queries = self.qllama(
                query_embeds=loaded_parameter(self, "query_tokens").expand(len(last), -1, -1),
                vision_hidden_states=last,
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
            features.append(self.mlp2(queries))
        if self.mlp1 is not None:
            patches = pixel_shuffle(tokens[:, 1:], self.config.downsample_ratio, self.config.ps_version)
            features.append(self.mlp1(patches))
        # The cat of a single tensor would copy it.
        device = features[0].device
        vision.pooler_output = (
            features[0] if len(features) == 1 else torch.cat([x.to(device) for x in features], dim=1)
        )
        return vision

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InternVLChatBaseOutput:
        """Hidden states of the decoder; arguments as in `InternVLChatForConditionalGeneration`."""
        refuse_unknown(kwargs, f"`{type(self).__name__}.forward`", self._decoder_keywords)
        outputs, features = self._decode(
            input_ids,
            inputs_embeds,
            ImageInputs(pixel_values, image_flags, num_patches, image_embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return InternVLChatBaseOutput(
            last_hidden_state=outputs.last_hidden_state,
            image_hidden_states=features,
            **{name: getattr(outputs, name, None) for name in DECODER_OUTPUTS},
        )

    def _decode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        images: ImageInputs,
        **settings: Any,
    ) -> tuple[Any, torch.Tensor | None]:
        """The output of the decoder over text and images, and the features of the tiles; `settings` are the decoder's.

        The order matters. Placeholders are counted on the host before anything of this forward is queued, so that the
        host waits for no tower. Tiles are encoded before the text is embedded, with and without images, because
        sharded processes must gather the weights of the parts in one order.
        """
        image_embeds = images.image_embeds
        has_images = images.pixel_values is not None or image_embeds is not None
        placeholders = self._find_placeholders(input_ids, inputs_embeds, has_images)
        features = self._encode_tiles(images.pixel_values, images.image_flags, images.num_patches)
        if features is None and image_embeds is None and self.training and torch.is_grad_enabled():
            features = self._features_of_nothing()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if placeholders is not None and features is None and image_embeds is not None:
            if self.img_context_token_id is None:
                raise ValueError(NO_IMAGE_TOKEN)
            inputs_embeds = place_by_row(inputs_embeds, placeholders[0], image_embeds, self.num_image_token)
        elif placeholders is not None:
            inputs_embeds = place_in_order(inputs_embeds, *placeholders, features, self.num_image_token)
        # Trainer turns the cache off in the outer configuration, which the decoder does not read; and with a cache
        # transformers does not recognise packed samples by their position ids.
        use_cache = getattr(self.config, "use_cache", None)
        if use_cache is not None:
            settings = {"use_cache": use_cache, **settings}
        return self.language_model(inputs_embeds=inputs_embeds, return_dict=True, **settings), features

    def _encode_tiles(
        self, pixel_values: torch.Tensor | None, image_flags: torch.Tensor | None, num_patches: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Features of the tiles that are no dummies; None without any."""
        if pixel_values is None:
            return None
        if self.img_context_token_id is None:
            raise ValueError(NO_IMAGE_TOKEN)
        if num_patches is not None:
            total, given = on_host(torch.as_tensor(num_patches).sum()), len(pixel_values)
            check(total == given, TILES_HINT, lambda: f"`num_patches` sums to {int(total)}, got {given} tiles.")
        if image_flags is not None:
            if image_flags.numel() != len(pixel_values):
                raise ValueError(f"`image_flags` has {image_flags.numel()} entries for {len(pixel_values)} tiles.")
            pixel_values = pixel_values[image_flags.flatten().to(pixel_values.device) == 1]
            if not len(pixel_values):
                return None
        return self.extract_feature(pixel_values)

    def _features_of_nothing(self) -> torch.Tensor:
        """No features (0, num_image_token, D), computed from a blank tile.

        The vision tower takes part in every training step, forward and backward (with zero gradients), whether the
        batch holds images or not: sharded training (FSDP, ZeRO-3) would wait forever for a process whose batch has
        none.
        """
        size, weight = self.config.image_size, self.vision_model.embeddings.position_embedding
        channels = self.config.vision_config.num_channels
        # `weight.new_zeros` would be sharded like the weight.
        blank = torch.zeros(1, channels, size, size, dtype=weight.dtype, device=weight.device)
        return self.extract_feature(blank)[:0]

    def _find_placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, has_images: bool
    ) -> tuple[torch.Tensor, int | torch.Tensor] | None:
        """Where the placeholders are (B, L), and how many; None in a decoding step, which never has one, and in vLLM,
        which places the features itself."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give exactly one of `input_ids` and `inputs_embeds`; for the features of images alone use "
                "`get_image_features`."
            )
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        if not has_images and (length == 1 or is_for_vllm(self.config.text_config)):
            return None
        is_image = self._image_positions(input_ids, inputs_embeds)
        return is_image, on_host(is_image.sum())

    def _image_positions(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the placeholders are: (B, L)."""
        given: Any = inputs_embeds if input_ids is None else input_ids
        if self.img_context_token_id is None:
            return torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        if input_ids is not None:
            return input_ids == self.img_context_token_id
        # Filled on the device: a tensor made from a number would be copied there, and the host would wait for it.
        token = torch.full((), self.img_context_token_id, device=given.device)
        return (given == self.get_input_embeddings()(token)).all(dim=-1)


# Loading drops one level of the published names for a headless decoder, saving restores it.
register_checkpoint_conversion_mapping(
    InternVLChatBaseModel.__name__,
    [
        WeightRenaming(r"^language_model\.model\.", "language_model."),
        # So that vLLM finds the head of InternLM2.
        WeightRenaming(r"^language_model\.(?:output|lm_head)\.", "language_model.lm_head."),
    ],
    overwrite=True,  # because this file may be imported under several names
)


class InternVLChatForConditionalGeneration(
    ChatHelpersMixin, ImageGenerationMixin, InternVLChatBaseModel, GenerationMixin
):
    """InternVL-Chat; `config.connector` says what the decoder sees of a tile.

    `skips_unlabelled_logits` may be set on a model: training steps then compute logits only for positions that predict
    a label, which saves memory and time where most positions are prompts and images. The logits of such a step are
    (positions, V).
    """

    skips_unlabelled_logits: bool = False
    _auto_class = "AutoModelForImageTextToText"
    _has_language_head = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.system_message = self.conv_template.default_system_message if self.conv_template else None

    @classmethod
    def _from_config(cls, config: InternVLChatConfig, **kwargs: Any) -> InternVLChatBaseModel:
        """As in transformers; for vLLM the model without its head.

        vLLM takes its model from `AutoModel.from_config`, which for transformers' classes has no head, and adds one.
        The published repositories give users the whole model there.
        """
        if is_for_vllm(config.text_config):
            return InternVLChatBaseModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @property
    def base_model(self) -> InternVLChatBaseModel:
        """This model without its language head, over the same parts, for trainers that compute the logits (TRL).

        A view: a part `model` that holds all the others would give every parameter another name than the published
        one, in memory, for PEFT's targets, device maps and quantisation too. The copy shares all parts, hooks and
        settings.
        """
        view = copy(self)
        view.__class__ = InternVLChatBaseModel
        view.__dict__.pop("forward", None)  # accelerate and trainers replace it on the instance
        view._modules = {**self._modules, "language_model": self.language_model.base_model}
        return view

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        loss_weight: torch.Tensor | Sequence | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_patches: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InternVLChatOutput:
        """Next-token logits.

        Args:
            input_ids: (B, L), with `num_image_token` placeholders per tile.
            pixel_values: (tiles, 3, height, width), the tiles of the whole batch in the order of their placeholders.
            attention_mask: (B, L), 1 = attend, padding on either side.
            position_ids: As in every decoder of transformers.
            past_key_values: Cache of earlier positions.
            inputs_embeds: (B, L, D) in place of `input_ids`.
            labels: (B, L), -100 ignored; the loss of a batch without labels is 0.
            image_flags: (tiles,) or (tiles, 1); tiles with 0 are dummies and are left out (published training code).
                Read on the host: leave it out if no tile is a dummy.
            image_embeds: (B, most placeholders of a row, D), features encoded before, in place of `pixel_values`.
            loss_weight: (B, L) weights of the label positions; the loss is then their weighted mean.
            logits_to_keep: Number of last positions (or their indices) to compute logits for; 0 means all.
            num_patches: Tiles per image, as the image processor returns them; their sum is checked.
            mm_token_type_ids: Accepted and unused: placeholders are found by their id.
            **kwargs: The decoder's. `shift_labels` (B, L) in place of `labels` are what each position predicts.

        Raises:
            ValueError: Placeholders and features differ in number, an argument is missing, a keyword is unknown.
        """
        shift_labels: Any = kwargs.pop("shift_labels", None)  # as an argument, Trainer would take it for labels
        refuse_unknown(kwargs, f"`{type(self).__name__}.forward`", self._decoder_keywords)
        positions = None if shift_labels is not None else self._positions_with_labels(labels, logits_to_keep)
        with nullcontext() if positions is None else head_reads_only(self.get_output_embeddings(), positions):
            outputs, features = self._decode(
                input_ids,
                inputs_embeds,
                ImageInputs(pixel_values, image_flags, num_patches, image_embeds),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if self.config.mask_image_token_logit:
            outputs.logits[..., self.img_context_token_id] = torch.finfo(outputs.logits.dtype).min
        return InternVLChatOutput(
            loss=self._loss(outputs, labels, loss_weight, positions, shift_labels=shift_labels, **kwargs),
            image_hidden_states=features,
            **{name: getattr(outputs, name, None) for name in (*DECODER_OUTPUTS, "logits", "aux_loss")},
        )

    def _positions_with_labels(
        self, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor | None:
        """Positions (P,) of all B x L that predict a label, in a training step that needs no other; else None.

        Reads the labels on the host, so it is called before a step queues any work.
        """
        is_training_step = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        wants_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None or not (self.skips_unlabelled_logits and is_training_step and wants_all):
            return None
        return (next_along(labels, IGNORE_INDEX).flatten() != IGNORE_INDEX).nonzero().flatten()

    def _loss(
        self,
        outputs: CausalLMOutputWithPast,
        labels: torch.Tensor | None,
        loss_weight: torch.Tensor | Sequence | None,
        positions: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return None
        logits, chosen = outputs.logits, slice(None) if positions is None else positions
        targets: Any = shift_labels
        if shift_labels is None:
            targets = next_along(labels, IGNORE_INDEX)  # type: ignore[arg-type]
        targets = targets.flatten()[chosen].to(logits.device)
        if loss_weight is None:
            if positions is not None:
                shift_labels = targets
            vocab_size = self.config.text_config.vocab_size
            loss: Any = next_token_loss(self.loss_function, logits, labels, vocab_size, shift_labels, **kwargs)
        else:
            weight = next_along(torch.as_tensor(loss_weight, dtype=torch.float32, device=logits.device), 0.0).flatten()
            loss = weighted_loss(logits.flatten(0, -2), targets, weight[chosen], weight.sum())
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is None:
            return loss
        return loss + self.config.text_config.router_aux_loss_coef * aux_loss.to(loss.device)


__all__ = [
    "InternVLChatBaseModel",
    "InternVLChatBaseOutput",
    "InternVLChatForConditionalGeneration",
    "InternVLChatOutput",
    "InternVLChatPreTrainedModel",
]
