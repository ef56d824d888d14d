"""InternVL-Chat: InternViT, a connector and any causal language model (paper section 3.4 and the later chat releases).

Does: the simple configuration (patches through an MLP), the full one (QLLaMA queries and patches, each through its own MLP), training
and generation with any number of pictures per sample and turn, and the published helpers `chat`, `batch_chat`, `extract_feature`.
Does not: tiling and prompts in general; these are the image processor's and the processor's work.

A tile becomes `config.num_image_token` features, which take the place of as many `<IMG_CONTEXT>` tokens, in order. Shape letters as in
modeling_internvit.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
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
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_internvl import InternVLChatConfig
from .conversation_internvl import (
    IMAGE_CONTEXT_TOKEN,
    ConversationTemplate,
    build_query,
    get_conversation_template,
    with_image_placeholder,
)
from .hub_internvl import HubModelMixin, OwnParameters
from .keywords_internvl import refuse_unknown
from .layers_internvl import next_token_loss, plan_without_cut_heads
from .modeling_internlm2 import InternLM2ForCausalLM, InternLM2Model
from .modeling_internvit import InternVisionModel, activation_bytes_per_token
from .modeling_qllama import QLlamaModel


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
PLACEHOLDERS_HINT = (
    "The number of image placeholders in the text differs from that of the image features. Pass the tiles of every picture in the text, "
    "in order, and do not truncate the text. Run it uncompiled to see the numbers."
)
# Weights of a decoder's head, by the names of the published checkpoints.
LANGUAGE_HEADS = ("language_model.lm_head.", "language_model.output.")
TILES_HINT = "`num_patches` does not sum to the number of tiles in `pixel_values`."
# Arguments of the published `generate`, by position.
PUBLISHED_ORDER = ("pixel_values", "input_ids", "attention_mask", "visual_features", "generation_config")
# What `generate` tells its own steps.
SEARCH_STATE = ("prompt_length", "assistant_image_embeds", "is_assisted")
NO_IMAGE_TOKEN = (
    "`config.image_token_id` is not set, so pictures have no place in the text. Set it to the id of "
    f"`{IMAGE_CONTEXT_TOKEN}` in the tokenizer, or convert the checkpoint with `--image-token-id`."
)


def pixel_shuffle(patches: torch.Tensor, ratio: float, version: str) -> torch.Tensor:
    """Folds neighbouring patches into the channels.

    Args:
        patches: (B, S*S, D), row by row.
        ratio: Sides shrink by it, e.g. 0.5.
        version: "v2", or "v1" which leaves the grid transposed, as the first releases were trained.

    Returns:
        (B, S*S*ratio**2, D/ratio**2).
    """
    side, fold = int(patches.shape[1] ** 0.5), round(1 / ratio)
    order = "(i j)" if version == "v2" else "(j i)"
    return rearrange(patches, f"n (i a j b) c -> n {order} (a b c)", i=side // fold, a=fold, j=side // fold, b=fold)


def build_projector(input_size: int, output_size: int, projector_type: str) -> nn.Sequential:
    """The MLP between two widths; indices are those of the published checkpoints (`mlp1.0`...)."""
    norm = [nn.LayerNorm(input_size)] if projector_type == "layer_norm_mlp" else []
    return nn.Sequential(*norm, nn.Linear(input_size, output_size), nn.GELU(), nn.Linear(output_size, output_size))


def next_along(values: torch.Tensor, last: float) -> torch.Tensor:
    """What each position predicts: (B, L) one step to the left, with `last` at the end."""
    return nn.functional.pad(values[:, 1:], (0, 1), value=last)


def weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, total_weight: torch.Tensor
) -> torch.Tensor:
    """Loss of logits (P, V) for `targets` (P,), -100 ignored: the sum weighted by `weight` (P,), over `total_weight`; 0 if that is 0."""
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weight).sum() / total_weight.where(total_weight != 0, 1)


def _joined(parts: Sequence) -> Any:
    """One tensor, tuple of tensors or output of all tiles from those of the chunks."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)  # type: ignore[arg-type]
    if isinstance(parts[0], BaseModelOutputWithPooling):
        return BaseModelOutputWithPooling(**{name: _joined([part[name] for part in parts]) for name in parts[0]})
    return tuple(_joined(layer) for layer in zip(*parts, strict=True))


def on_host(number: torch.Tensor) -> int | torch.Tensor:
    """The value of a single number; the tensor itself where there is none to read yet: in compiled or captured code, on the meta device."""
    is_captured = number.is_cuda and torch.cuda.is_current_stream_capturing()
    return number if torch.compiler.is_compiling() or number.is_meta or is_captured else int(number)


def require(condition: bool | torch.Tensor, hint: str, message: Callable[[], str]) -> None:
    """Stops unless `condition` holds.

    A value of the host stops by a `ValueError` with `message()`, whatever device the model is on, and leaves the device as it was. A
    tensor, of compiled or captured code, is asserted by the device, which prints `hint`; on CUDA no kernel runs in that process after.

    Args:
        condition: A boolean, or one as a tensor ().
        hint: What was expected and what to do, less than 256 characters, without numbers of the batch.
        message: The same with numbers.

    Raises:
        ValueError: It does not hold.
    """
    if isinstance(condition, torch.Tensor):
        torch._assert_async(condition, hint)
    elif not condition:
        raise ValueError(message())


def build_decoder(config: Any, has_head: bool) -> PreTrainedModel:
    """The language model of a decoder configuration, in the default dtype of the moment."""
    if config.model_type == "internlm2":
        decoder: Any = InternLM2ForCausalLM(config) if has_head else InternLM2Model(config)
    else:
        auto_class: Any = AutoModelForCausalLM if has_head else AutoModel
        decoder = auto_class.from_config(config, dtype=torch.get_default_dtype())
    if not is_for_vllm(
        config
    ):  # which shares out the heads itself, and copies key/value heads where there are too few
        decoder._tp_plan = plan_without_cut_heads(decoder._tp_plan, config)
    return decoder


def is_for_vllm(config: Any) -> bool:
    """Whether vLLM builds the model around this decoder configuration: it has the attention that exists only inside vLLM."""
    return config._attn_implementation == "vllm"


@dataclass(frozen=True)
class Tiles:
    """The images of a call to `generate`, as in its arguments."""

    pixel_values: torch.Tensor | None
    image_flags: torch.Tensor | None
    num_patches: torch.Tensor | None
    visual_features: torch.Tensor | None

    def __len__(self) -> int:
        given: Any = self.pixel_values if self.visual_features is None else self.visual_features
        return len(given)

    def only(self, is_kept: list[bool]) -> "Tiles":
        """Those of the tiles that are marked."""
        given: Any = self.pixel_values if self.visual_features is None else self.visual_features
        kept = given[torch.tensor(is_kept, device=given.device)]
        is_pixels = self.visual_features is None
        return Tiles(kept if is_pixels else None, self.image_flags, None, None if is_pixels else kept)


class ImageTokenBlocker(LogitsProcessor):
    """Keeps generation from emitting the image placeholder, which a later turn would take for a picture.

    Greedy search only ever takes the best token, so there only rows where the placeholder is the best are touched; every other score
    stays what the model said.
    """

    def __init__(self, image_token_id: int, is_greedy: bool) -> None:
        self.image_token_id = image_token_id
        self.is_greedy = is_greedy

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        best = scores.argmax(dim=-1) == self.image_token_id
        blocked[:, self.image_token_id] = best if self.is_greedy else True
        return scores.masked_fill(blocked, -float("inf"))


@dataclass
class InternVLChatBaseOutput(BaseModelOutputWithPast):
    """Output of a language model without its head, and the features of the pictures.

    Args:
        image_hidden_states: (tiles, num_image_token, D) when pictures were given as pixels.
        router_logits: Of each layer with experts, where the decoder has any and was asked for them.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class InternVLChatOutput(CausalLMOutputWithPast):
    """Output of a causal language model, and the features of the pictures.

    Args:
        image_hidden_states: (tiles, num_image_token, D) when pictures were given as pixels.
        router_logits: Of each layer with experts, where the decoder has any and was asked for them by `output_router_logits`.
        aux_loss: Then also how unevenly the experts are used; part of `loss`, as in the decoder.
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
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
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
        """Always: a decoder may have experts. Transformers looks for `@use_experts_implementation` in this file; the decoder has it."""
        return True


class InternVLChatBaseModel(InternVLChatPreTrainedModel):
    """InternVL-Chat without its language head, for hidden states; `config.connector` says what the decoder sees of a tile.

    Loads any chat checkpoint (decoders whose head is called `lm_head` or `output`, and the rest `model`) and saves under the same
    names.

    `vision_chunk_bytes` bounds the memory of the vision tower's activations without gradients (1 GiB is 14 tiles of 448 px through
    InternViT-6B in bfloat16, more than a GPU needs to be busy); it may be set on a model. With gradients, and in a group of
    processes, all tiles go through the tower at once.
    """

    vision_chunk_bytes: int = 2**30
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
        """As in transformers; a headless model is not surprised by the head of the checkpoint.

        Not by `_keys_to_ignore_on_load_unexpected`: vLLM adds a head of its own to this class, and loads no weight that stands there.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if not self._has_language_head:
            loading_info.unexpected_keys = {
                name for name in loading_info.unexpected_keys if not name.startswith(LANGUAGE_HEADS)
            }

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
            pixel_values: (tiles, 3, height, width). Without gradients, more tiles than `tiles_per_chunk` are encoded chunk by chunk.

        Returns:
            `pooler_output` (tiles, num_image_token, D); `last_hidden_state` (tiles, N, D_vision): the output of the last vision
            block that was run. Blocks above `select_layer` are run only for the queries.

        Raises:
            ValueError: A shape that does not fit, or an unknown keyword.
        """
        for name in ("num_patches", "num_image_patches"):  # of the processor and of vLLM
            kwargs.pop(name, None)
        return _joined([self._encode_chunk(tiles, **kwargs) for tiles in self._chunks(pixel_values)])

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Published name: features (tiles, num_image_token, D) of tiles (tiles, 3, height, width). Of the vision tower, only a chunk's
        output is ever kept."""
        return _joined([self._encode_chunk(tiles).pooler_output for tiles in self._chunks(pixel_values)])

    def _chunks(self, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
        # With gradients every activation is kept anyway. Processes that share sharded weights must call the tower equally often.
        in_a_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if in_a_group or torch.is_grad_enabled() or pixel_values.ndim != 4:
            return [pixel_values]  # of a wrong rank: the tower says so
        return pixel_values.split(self.tiles_per_chunk(*pixel_values.shape[-2:]))

    def tiles_per_chunk(self, height: int, width: int) -> int:
        """Tiles of `height` x `width` pixels whose activations in the vision tower take at most `vision_chunk_bytes`; at least one."""
        vision = self.config.vision_config
        num_tokens = 1 + (height // vision.patch_size) * (width // vision.patch_size)
        per_token = activation_bytes_per_token(
            vision, self.vision_model.embeddings.position_embedding.dtype, num_tokens
        )
        return max(1, self.vision_chunk_bytes // (num_tokens * per_token))

    def _encode_chunk(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        depth, kept = self.config.vision_config.num_hidden_layers, self.config.num_vision_layers
        if self.config.connector == "queries":
            kept = depth
        # Checkpointing makes transformers ask for gradients of every part's embeddings, which a frozen tower would then compute.
        is_trained = pixel_values.requires_grad or any(x.requires_grad for x in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            vision = self.vision_model(pixel_values, num_layers=kept, return_dict=True, **kwargs)
            tokens = vision.last_hidden_state
            last = None if self.qllama is None else self.vision_model.encoder(tokens, start=kept)
        features = []
        if last is not None:
            queries = self.qllama(
                query_embeds=self.query_tokens.expand(len(last), -1, -1),
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
        """Hidden states of the decoder; arguments as in `InternVLChatForConditionalGeneration`, without those of the head."""
        refuse_unknown(kwargs, f"`{type(self).__name__}.forward`", self._decoder_keywords)
        placeholders = self._find_placeholders(input_ids, inputs_embeds, pixel_values, image_embeds)
        features = self._encode_pictures(pixel_values, image_flags, num_patches, image_embeds)
        inputs_embeds = self._embed(input_ids, inputs_embeds, features, image_embeds, placeholders)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **self._with_own_choice(kwargs),
        )
        return InternVLChatBaseOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            router_logits=getattr(outputs, "router_logits", None),
        )

    def _with_own_choice(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder. Trainer turns off the cache in the outer configuration, which the decoder does not read; with a
        cache, transformers does not see from position ids that samples are packed."""
        use_cache = getattr(self.config, "use_cache", None)
        return settings if use_cache is None else {"use_cache": use_cache, **settings}

    def _encode_pictures(
        self,
        pixel_values: torch.Tensor | None,
        image_flags: torch.Tensor | None,
        num_patches: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
    ) -> torch.Tensor | None:
        features = self._encode_tiles(pixel_values, image_flags, num_patches)
        if features is None and image_embeds is None and self.training and torch.is_grad_enabled():
            features = self._features_of_nothing()
        return features

    def _encode_tiles(
        self, pixel_values: torch.Tensor | None, image_flags: torch.Tensor | None, num_patches: torch.Tensor | None
    ) -> torch.Tensor | None:
        if pixel_values is None:
            return None
        if self.img_context_token_id is None:
            raise ValueError(NO_IMAGE_TOKEN)
        if num_patches is not None:
            total, given = on_host(torch.as_tensor(num_patches).sum()), len(pixel_values)
            require(total == given, TILES_HINT, lambda: f"`num_patches` sums to {int(total)}, got {given} tiles.")
        if image_flags is not None:
            if image_flags.numel() != len(pixel_values):
                raise ValueError(f"`image_flags` has {image_flags.numel()} entries for {len(pixel_values)} tiles.")
            pixel_values = pixel_values[image_flags.flatten().to(pixel_values.device) == 1]
            if not len(pixel_values):
                return None
        return self.extract_feature(pixel_values)

    def _find_placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, int | torch.Tensor] | None:
        """Where the placeholders are (B, L), and how many; None in a decoding step, since `generate` never emits one.

        The number is read on the host before anything of this forward is queued, so that the host waits for no tower.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give exactly one of `input_ids` and `inputs_embeds`; for the features of images alone use `get_image_features`."
            )
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        if pixel_values is None and image_embeds is None and length == 1:
            return None
        is_image = self._image_positions(input_ids, inputs_embeds)
        return is_image, on_host(is_image.sum())

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        features: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        placeholders: tuple[torch.Tensor, int | torch.Tensor] | None,
    ) -> torch.Tensor:
        """What the decoder reads, images in their places: (B, L, D)."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if placeholders is None:
            return inputs_embeds
        if features is None and image_embeds is not None:
            if self.img_context_token_id is None:
                raise ValueError(NO_IMAGE_TOKEN)
            return self._place_rows(inputs_embeds, placeholders[0], image_embeds)
        return self._place(inputs_embeds, *placeholders, features)

    def _features_of_nothing(self) -> torch.Tensor:
        """No features (0, num_image_token, D), computed from a blank tile.

        So the vision tower takes part in every training step, forward and backward (with zero gradients), whatever the batch holds:
        sharded training (FSDP, ZeRO-3) would wait forever for a process whose batch has no picture. For the same reason it comes
        before the embedding, as with pictures: processes gather the weights of the parts in one order.
        """
        size, weight = self.config.image_size, self.vision_model.embeddings.position_embedding
        channels = self.config.vision_config.num_channels
        # `weight.new_zeros` would be sharded like the weight.
        blank = torch.zeros(1, channels, size, size, dtype=weight.dtype, device=weight.device)
        return self.extract_feature(blank)[:0]

    def _image_positions(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the placeholders are: (B, L)."""
        given: Any = inputs_embeds if input_ids is None else input_ids
        if self.img_context_token_id is None:
            return torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        if input_ids is not None:
            return input_ids == self.img_context_token_id
        # Filled there: a tensor made from a number would be copied there, and the host would wait for it.
        token = torch.full((), self.img_context_token_id, device=given.device)
        return (given == self.get_input_embeddings()(token)).all(dim=-1)

    def _place(
        self,
        inputs_embeds: torch.Tensor,
        is_image: torch.Tensor,
        found: int | torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Puts the features (tiles, num_image_token, D), in order, where the placeholders are.

        Neither this nor its backward reads a value on the host, as indexing by a mask and `masked_scatter` do."""
        count = 0 if features is None else features.shape[:-1].numel()
        require(found == count, PLACEHOLDERS_HINT, lambda: self._mismatch(is_image.sum(dim=1).tolist(), count))
        if features is None:
            return inputs_embeds
        positions = is_image.flatten().int().argsort(descending=True, stable=True)[:count].to(inputs_embeds.device)
        features = features.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.flatten(0, 1).index_copy(0, positions, features).view_as(inputs_embeds)

    def _place_rows(
        self, inputs_embeds: torch.Tensor, is_image: torch.Tensor, image_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Puts the features (B, M, D) of each row, in order, where its placeholders are; the rest of the M is padding."""
        most = image_embeds.shape[1]
        order = is_image.cumsum(dim=1) - 1
        require(
            on_host(order[:, -1].max()) < most,
            PLACEHOLDERS_HINT,
            lambda: self._mismatch(is_image.sum(dim=1).tolist(), int(is_image.sum(dim=1).clamp(max=most).sum())),
        )
        if not most:
            return inputs_embeds
        image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        index = order.clamp(min=0, max=most - 1).unsqueeze(-1).to(inputs_embeds.device)
        placed = image_embeds.gather(1, index.expand(-1, -1, image_embeds.shape[-1]))
        return torch.where(is_image.unsqueeze(-1).to(inputs_embeds.device), placed, inputs_embeds)

    def _mismatch(self, found: list[int], num_features: int) -> str:
        """Says what is wrong with `found` placeholders per sample."""
        per_tile = self.num_image_token
        broken = [i for i, count in enumerate(found) if count % per_tile]
        sample = (
            f"Sample {broken[0]} has {found[broken[0]]} placeholders, which is no multiple of {per_tile}: was it truncated?"
            if broken
            else f"Placeholders per sample: {dict(enumerate(found))}."
        )
        return (
            f"The text has {sum(found)} image placeholders but {num_features} image features were given "
            f"({num_features // per_tile} tiles of {per_tile}). {sample} Pass the tiles of every picture in the text, in order, and "
            f"{per_tile} placeholders for each."
        )


# On loading the headless decoder drops one level of the published names, on saving it gets it back.
register_checkpoint_conversion_mapping(
    InternVLChatBaseModel.__name__,
    [
        WeightRenaming(r"^language_model\.model\.", "language_model."),
        # So that vLLM finds the head of InternLM2.
        WeightRenaming(r"^language_model\.(?:output|lm_head)\.", "language_model.lm_head."),
    ],
    overwrite=True,  # this file may be imported under several names
)


class InternVLChatForConditionalGeneration(InternVLChatBaseModel, GenerationMixin):
    """InternVL-Chat; `config.connector` says what the decoder sees of a tile.

    `skips_unlabelled_logits` may be set on a model: training steps then compute the logits of positions with a label alone, which saves
    memory and time where most positions are prompts and images. The logits of such a step are (positions, V).
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

        vLLM takes its model from `AutoModel.from_config`, which by transformers' custom has no head, and adds one of its own. The
        published repositories have the whole model there."""
        if is_for_vllm(config.text_config):
            return InternVLChatBaseModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @property
    def base_model(self) -> InternVLChatBaseModel:
        """This model without its language head, over the same parts: trainers that project hidden states themselves (TRL) call it."""
        view = copy(self)
        view.__class__ = InternVLChatBaseModel
        view.__dict__.pop("forward", None)  # one that was put over this class's own
        view._modules = {**self._modules, "language_model": self.language_model.base_model}
        return view

    @property
    def template(self) -> str | None:
        """Name of the conversation template."""
        return self.config.template

    @property
    def conv_template(self) -> ConversationTemplate | None:
        """The conversation template."""
        return get_conversation_template(self.config.template) if self.config.template else None

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
            labels: (B, L), -100 ignored; the loss of a batch without any is 0. With `self.skips_unlabelled_logits`, a training step
                computes logits only for the positions that predict a label, and they are (positions, V).
            image_flags: (tiles,) or (tiles, 1); tiles with 0 are dummies and are left out (published training code). Read on the
                host: leave it out where no tile is a dummy.
            image_embeds: (B, most placeholders of a row, D), features encoded before, in place of `pixel_values`.
            loss_weight: (B, L) weights of the label positions; the loss is then their weighted mean.
            logits_to_keep: Number of last positions (or their indices) to compute logits for; 0 means all.
            num_patches: Tiles per picture, as the image processor returns them; their sum is checked.
            mm_token_type_ids: Accepted and unused: placeholders are found by their id.
            **kwargs: Passed on to the decoder; what neither it nor transformers knows is refused. `shift_labels` (B, L) in place of
                `labels` are what each position predicts, from trainers that share out sequences.

        Raises:
            ValueError: Placeholders and features differ in number, an argument is missing, or a keyword is unknown.
        """
        shift_labels: Any = kwargs.pop("shift_labels", None)  # no argument: Trainer takes those for labels
        refuse_unknown(kwargs, f"`{type(self).__name__}.forward`", self._decoder_keywords)
        # First, while nothing of this step is queued: it reads the labels on the host.
        wants_all = not isinstance(logits_to_keep, int) or logits_to_keep != 0 or shift_labels is not None
        positions = None if wants_all else self._positions_with_labels(labels)
        placeholders = self._find_placeholders(input_ids, inputs_embeds, pixel_values, image_embeds)
        features = self._encode_pictures(pixel_values, image_flags, num_patches, image_embeds)
        inputs_embeds = self._embed(input_ids, inputs_embeds, features, image_embeds, placeholders)
        with nullcontext() if positions is None else self._head_reads_only(positions):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **self._with_own_choice(kwargs),
            )
        if self.config.mask_image_token_logit:
            outputs.logits[..., self.img_context_token_id] = torch.finfo(outputs.logits.dtype).min
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self._loss(outputs, labels, loss_weight, positions, shift_labels=shift_labels, **kwargs)
        return InternVLChatOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            router_logits=getattr(outputs, "router_logits", None),
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    def _positions_with_labels(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Positions (P,) of all B x L that predict a label, in a training step that asks for these alone; None elsewhere."""
        is_training_step = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if labels is None or not (self.skips_unlabelled_logits and is_training_step):
            return None
        return (next_along(labels, IGNORED_LABEL).flatten() != IGNORED_LABEL).nonzero().flatten()

    @contextmanager
    def _head_reads_only(self, positions: torch.Tensor) -> Iterator[None]:
        """The decoder computes logits (P, V) of these positions (P,) alone.

        A hook, because `logits_to_keep` of decoders takes the same positions of every row, and what a decoder does with its logits
        (scaling, capping, a loss of its experts) should still happen."""

        def select(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0].flatten(0, 1).index_select(0, positions.to(args[0].device)),)

        handle = self.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    def _loss(
        self,
        outputs: CausalLMOutputWithPast,
        labels: torch.Tensor | None,
        loss_weight: torch.Tensor | Sequence | None,
        positions: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        logits, chosen = outputs.logits, slice(None) if positions is None else positions
        targets: Any = next_along(labels, IGNORED_LABEL) if shift_labels is None else shift_labels  # type: ignore[arg-type]
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

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *published: Any,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: the prompt followed by the new tokens, or the new tokens alone after `inputs_embeds`.

        Images are encoded once, before the search begins, whatever the number of beams or samples. With `past_key_values` of
        earlier turns, images whose placeholders the cache covers are not encoded again; `pixel_values` may hold the tiles of all
        turns or only the new ones. Drafts of assisted decoding (an assistant model, prompt lookup, generators of one's own) never hold
        an image; an assistant that is an InternVL-Chat itself sees the images with its own tower.

        The published positional call `generate(pixel_values, input_ids, attention_mask, visual_features)` is understood too.

        Args:
            inputs: (B, L), also as `input_ids`.
            generation_config: A `GenerationConfig`.
            *published: The rest of a published positional call.
            pixel_values: As in `forward`.
            image_flags: As in `forward`.
            num_patches: As in `forward`.
            visual_features: (tiles, num_image_token, D), what `extract_feature` gives, in place of `pixel_values`.
            **kwargs: Everything else that `generate` of transformers takes; `inputs_embeds` (B, L, D) may hold embedded placeholders.

        Raises:
            ValueError: Placeholders and features differ in number, or the arguments do not go together.
        """
        if published or isinstance(generation_config, torch.Tensor) or _is_pixels(inputs):
            named = dict(zip(PUBLISHED_ORDER, (inputs, generation_config, *published), strict=False))
            given = {"pixel_values": pixel_values, "visual_features": visual_features, **kwargs}
            return self.generate(image_flags=image_flags, num_patches=num_patches, **_merged(given, named))
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings = generation_config or self.generation_config
        chosen = {
            key: kwargs.get(key, getattr(settings, key, None))
            for key in ("do_sample", "num_beams", "prefill_chunk_size")
        }
        self._check_search(inputs, kwargs, settings)
        if pixel_values is not None or visual_features is not None:
            if chosen["prefill_chunk_size"]:
                raise ValueError("`prefill_chunk_size` would cut pictures apart; leave it out where there are any.")
            tiles = Tiles(pixel_values, image_flags, num_patches, visual_features)
            kwargs |= self._with_images(inputs, tiles, kwargs)
        if self.img_context_token_id is not None:
            is_greedy = not chosen["do_sample"] and (chosen["num_beams"] or 1) == 1
            blocker = ImageTokenBlocker(self.img_context_token_id, is_greedy)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), blocker])
            kwargs["prompt_length"] = None if inputs is None else inputs.shape[1]
        return super().generate(inputs, generation_config, **kwargs)

    def _check_search(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any], settings: Any) -> None:
        """Refuses searches that transformers would break off without saying why."""
        drafts = {
            name: value
            for name in ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens")
            if (value := kwargs.get(name, getattr(settings, name, None))) is not None
        }
        if "assistant_early_exit" in drafts:
            raise ValueError(
                "`assistant_early_exit` needs a model that is nothing but a decoder: draft by `assistant_model` or "
                "`prompt_lookup_num_tokens` instead."
            )
        # Without ids, prompt lookup finds its drafts in the new tokens alone.
        is_read_by_drafts = input_ids is not None or "assistant_model" in drafts
        if drafts and kwargs.get("inputs_embeds") is not None and is_read_by_drafts:
            raise ValueError(
                f"`{next(iter(drafts))}` drafts from ids: pass the prompt as `input_ids`, without `inputs_embeds`."
            )
        negative = kwargs.get("negative_prompt_ids")
        if negative is not None and bool((negative == self.img_context_token_id).any()):
            raise ValueError(
                "`negative_prompt_ids` is read as text, without the images: leave their placeholders out of it."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_length: int | None = None,
        assistant_image_embeds: torch.Tensor | None = None,
        is_assisted: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Passes the images on in the steps that may hold placeholders: all but those of one new token.

        Behind the prompt a placeholder can only be part of a draft, copied from the prompt. It is never accepted, whatever it reads
        as; so it reads as another token.
        """
        cache = kwargs.get("past_key_values")
        reads_all = is_assisted and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None
        if reads_all and cache is not None and (seen := int(cache.get_seq_length())):
            # The first step of assisted decoding would read again what a cache of earlier turns holds.
            kwargs["next_sequence_length"] = input_ids.shape[1] - seen
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids = model_inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1:
            return model_inputs
        model_inputs["image_embeds"] = image_embeds
        if prompt_length is not None and input_ids.shape[1] > prompt_length:
            image_token = self.img_context_token_id
            positions = torch.arange(input_ids.shape[1], device=ids.device)[-ids.shape[1] :]
            is_draft = (ids == image_token) & (positions >= prompt_length)
            model_inputs["input_ids"] = ids.masked_fill(is_draft, 0 if image_token else 1)
        return model_inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers, which asks `prepare_inputs_for_generation` for its arguments; PEFT puts another in its place."""
        super()._validate_model_kwargs({name: v for name, v in model_kwargs.items() if name not in SEARCH_STATE})

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; an assistant gets the images as it sees them, or none if it is a language model alone."""
        model_kwargs["is_assisted"] = True  # of the search, which goes on with this dictionary
        seen = model_kwargs.get("assistant_image_embeds")
        ours = ("image_embeds", *SEARCH_STATE)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        if seen is not None:
            model_kwargs["image_embeds"] = seen
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def _with_images(self, input_ids: torch.Tensor | None, tiles: "Tiles", kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the search that hold the images: embeddings with the images in place, or the features of each row."""
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is not None:
            is_image = self._image_positions(input_ids, None if input_ids is not None else inputs_embeds)
            features = self._features_of(tiles)
            return {"inputs_embeds": self._place(inputs_embeds, is_image, int(is_image.sum()), features)}
        if input_ids is None:
            raise ValueError(
                "`generate` with images needs `input_ids` or `inputs_embeds` that hold their placeholders."
            )
        cache, assistant = kwargs.get("past_key_values"), kwargs.get("assistant_model")
        found: dict[str, Any] = {"image_embeds": self._image_embeds_of_new_tiles(input_ids, tiles, cache)}
        if isinstance(assistant, InternVLChatForConditionalGeneration) and tiles.pixel_values is not None:
            if assistant.num_image_token != self.num_image_token:
                raise ValueError(
                    f"The `assistant_model` takes {assistant.num_image_token} positions for a tile, this model {self.num_image_token}: "
                    "take an assistant that reads the same prompts, or a language model alone."
                )
            pixels = replace(tiles, visual_features=None)
            found["assistant_image_embeds"] = assistant._image_embeds_of_new_tiles(input_ids, pixels, None)
        return found

    def _features_of(self, tiles: "Tiles") -> torch.Tensor | None:
        if tiles.visual_features is not None:
            return tiles.visual_features
        return self._encode_tiles(tiles.pixel_values, tiles.image_flags, tiles.num_patches)

    def _image_embeds_of_new_tiles(
        self, input_ids: torch.Tensor, tiles: "Tiles", past_key_values: Cache | None
    ) -> torch.Tensor | None:
        """Features of the tiles that the cache does not cover: (B, most new placeholders of a row, D), padded with zeros.

        Reads on the host how many placeholders each row has, once and before any work is queued."""
        if self.img_context_token_id is None:
            raise ValueError(NO_IMAGE_TOKEN)
        is_image = input_ids == self.img_context_token_id
        cached_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        counts = torch.stack([is_image.sum(dim=1), is_image[:, :cached_length].sum(dim=1)])
        found, cached = counts.tolist()
        if cached_length:
            all_tiles, old = ([count // self.num_image_token for count in row] for row in (found, cached))
            if sum(all_tiles) == len(tiles):
                tiles = tiles.only(
                    [i >= known for all_, known in zip(all_tiles, old, strict=True) for i in range(all_)]
                )
        new = [all_ - known for all_, known in zip(found, cached, strict=True)]
        features = self._features_of(tiles) if len(tiles) else None
        num_features = 0 if features is None else features.shape[:-1].numel()
        if sum(new) != num_features:
            raise ValueError(self._mismatch(new, num_features))
        if features is None:
            return None
        return pad_sequence(features.flatten(0, 1).split(new), batch_first=True)

    # Published helpers; signatures as published.

    def chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """One turn of a conversation in the checkpoint's published prompt form.

        Args:
            tokenizer: The checkpoint's tokenizer.
            pixel_values: (tiles, 3, height, width) of all pictures of the conversation, or None.
            question: What the user says, with one `<image>` per picture; without any, `<image>` and a line break are put first.
            generation_config: Arguments of `generate` as a plain dictionary; may hold a `streamer`. Not changed.
            history: (question, answer) of earlier turns. Not changed.
            return_history: Whether to return the history with this turn appended as well.
            num_patches_list: Tiles of each picture; None means all tiles are one picture.
            IMG_START_TOKEN: Must be the token of the checkpoint.
            IMG_END_TOKEN: Must be the token of the checkpoint.
            IMG_CONTEXT_TOKEN: Must be the token of the checkpoint.
            verbose: Whether to log prompt and answer.

        Returns:
            The answer, or `(answer, history)`.
        """
        _check_image_tokens(IMG_START_TOKEN, IMG_END_TOKEN)
        if num_patches_list is None:
            num_patches_list = [len(pixel_values)] if pixel_values is not None else []
        if pixel_values is not None and len(pixel_values) != sum(num_patches_list):
            raise ValueError(f"`num_patches_list` sums to {sum(num_patches_list)}, got {len(pixel_values)} tiles.")
        query = self._build_query(question, history, num_patches_list)
        answers = self._answer(tokenizer, pixel_values, query, generation_config, IMG_CONTEXT_TOKEN)
        if verbose:
            logger.info("%s %s", query, answers[0])
        asked = with_image_placeholder(question, history, bool(num_patches_list))
        return (answers[0], [*(history or []), (asked, answers[0])]) if return_history else answers[0]

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        questions: list[str],
        generation_config: dict[str, Any],
        num_patches_list: list[int] | list[list[int]] | None = None,
        history: list[list[tuple[str, str]] | None] | None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
        image_counts: list[int] | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """One turn of several conversations at once.

        Args:
            tokenizer: As in `chat`.
            pixel_values: The tiles of all conversations, in order.
            questions: One per conversation.
            generation_config: As in `chat`.
            num_patches_list: Per conversation the tiles of its picture, or a list with the tiles of each of its pictures (an
                empty list for none).
            history: Per conversation its earlier turns or None; the published code takes none at all.
            return_history: Whether to return the histories with this turn appended as well.
            IMG_START_TOKEN: As in `chat`.
            IMG_END_TOKEN: As in `chat`.
            IMG_CONTEXT_TOKEN: As in `chat`.
            verbose: Whether to log prompts and answers.
            image_counts: Former name of `num_patches_list`.
        """
        _check_image_tokens(IMG_START_TOKEN, IMG_END_TOKEN)
        counts: Any = image_counts if num_patches_list is None else num_patches_list
        if counts is None:
            counts = [[] for _ in questions] if pixel_values is None else [1] * len(questions)
        tiles = [[entry] if isinstance(entry, int) else list(entry) for entry in counts]
        histories = list(history) if history is not None else [None] * len(questions)
        if not len(questions) == len(tiles) == len(histories):
            raise ValueError(
                f"`questions`, `num_patches_list` and `history` must be equally long, got {len(questions)}, {len(tiles)} and "
                f"{len(histories)}."
            )
        num_tiles = 0 if pixel_values is None else len(pixel_values)
        if num_tiles != sum(map(sum, tiles)):
            raise ValueError(f"`num_patches_list` sums to {sum(map(sum, tiles))}, got {num_tiles} tiles.")
        turns = list(zip(questions, histories, tiles, strict=True))
        queries = [self._build_query(*turn) for turn in turns]
        answers = self._answer(tokenizer, pixel_values, queries, generation_config, IMG_CONTEXT_TOKEN)
        if verbose:
            logger.info("%s %s", queries, answers)
        if not return_history:
            return answers
        asked = [with_image_placeholder(question, past, bool(pictures)) for question, past, pictures in turns]
        return answers, [
            [*(past or []), (question, answer)]
            for past, question, answer in zip(histories, asked, answers, strict=True)
        ]

    def _build_query(self, question: str, history: list[tuple[str, str]] | None, num_patches: list[int]) -> str:
        if self.conv_template is None:
            raise ValueError("`config.template` is not set; name one of `conversation_internvl` to use `chat`.")
        return build_query(
            self.conv_template,
            question,
            history,
            num_patches,
            self.num_image_token,
            self.system_message,
            self.config.use_image_start_end,
        )

    @contextmanager
    def _placeholder_of(self, token: str, index: int) -> Iterator[None]:
        """The id of the placeholder is that of the user's tokenizer, for this call; from then on where none was known."""
        known = self._image_token_id
        if self.img_context_token_id not in (None, index):
            logger.warning_once(
                f"The model's image placeholder has the id {self.img_context_token_id}, the tokenizer's `{token}` {index}: using the "
                "tokenizer's."
            )
        is_new = self.img_context_token_id is None
        self._image_token_id = index
        try:
            yield
        finally:
            if not is_new:
                self._image_token_id = known

    def _answer(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        query: str | list[str],
        generation_config: dict[str, Any],
        image_token: str,
    ) -> list[str]:
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        is_batch = not isinstance(query, str)
        encoded = tokenizer(query, return_tensors="pt", padding=is_batch, padding_side="left")
        settings = dict(generation_config)
        stop_id = tokenizer.convert_tokens_to_ids(self.conv_template.stop.strip())
        if stop_id is not None and stop_id != getattr(tokenizer, "unk_token_id", None):
            settings.setdefault("eos_token_id", stop_id)
        input_ids = encoded["input_ids"].to(self.device)
        with self._placeholder_of(image_token, image_token_id):
            output = self.generate(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=encoded["attention_mask"].to(self.device),
                **settings,
            )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [self.conv_template.cut_answer(text) for text in texts]


def _is_pixels(inputs: torch.Tensor | None) -> bool:
    return isinstance(inputs, torch.Tensor) and inputs.is_floating_point()


def _merged(given: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments given by name and by position, as one."""
    named = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(name for name in named if given.get(name) is not None):
        raise ValueError(f"`generate` got {', '.join(f'`{name}`' for name in twice)} by position and by name.")
    return {**given, **named}


def _check_image_tokens(start: str, end: str) -> None:
    if (start, end) != ("<img>", "</img>"):
        raise ValueError(f"Pictures stand between `<img>` and `</img>` in every release, got {start!r} and {end!r}.")


__all__ = [
    "InternVLChatBaseModel",
    "InternVLChatBaseOutput",
    "InternVLChatForConditionalGeneration",
    "InternVLChatOutput",
    "InternVLChatPreTrainedModel",
]
