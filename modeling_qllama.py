"""QLLaMA, the language middleware of InternVL (paper section 3.2).

A LLaMA with learned queries in front of the text, which attend to the image through cross-attention.

Does: the five attention modes of attention_masks_qllama in one model, also mixed within a batch or packed in a row;
rotary positions over queries then text; captioning with a KV cache. Does not: hold the queries (`query_tokens` belongs
to the model around it); rotary scaling.

Cross-attention acts on the queries only, in the prefill only: a cached step holds no query. Its keys and values are
computed once per image, for any number of rows, passes or beams. Rotary angles are computed per call in fp32, so there
is no buffer that loading could leave uninitialised. Shape letters as in modeling_internvit, P images; parameter names
are those of the published checkpoints.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_masks_qllama import ATTENTION_MODES, PackedPasses, mask_functions, packed_passes, text_positions
from .configuration_internvl import QLlamaConfig
from .keywords_internvl import refuse_unknown
from .layers_internvl import (
    InternVLRMSNorm,
    eager_attention_forward,
    next_token_loss,
    plan_without_cut_heads,
)
from .renaming_internvl import renamed_arguments, renamed_names


def rotary_angles(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (B, L, K) of the rotary angles of `position_ids` (B, L), in fp32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None].float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary angles (B, L, K) to heads (B, H, L, K); the halves of a head form the rotated pairs."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def kernel_for_blocks(implementation: str) -> str:
    """The kernel for the block masks of a prefill with queries.

    Flash kernels support causal and padded attention only, and flex attention would compile a kernel for every mask,
    so these short prefills run on sdpa. Decoding, text alone and queries alone run on the chosen kernel.
    """
    return "sdpa" if "flash" in implementation or implementation == "flex_attention" else implementation


class QLlamaAttention(nn.Module):
    """Self-attention over queries and text."""

    def __init__(self, config: QLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width, heads = config.hidden_size, config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            rearrange(projection(hidden_states), "b l (h k) -> b h l k", k=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            implementation = kernel_for_blocks(implementation)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2).contiguous()), weights


class QLlamaCrossAttention(nn.Module):
    """Attention of the queries to the image; both sides are normalised first. Neither masked nor rotated."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.norm1 = InternVLRMSNorm(width, config.rms_norm_eps)
        self.norm2 = InternVLRMSNorm(config.vision_hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(config.vision_hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.vision_hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        # So a QLLaMA made from a LLaMA first computes what that LLaMA computes. (A flag on the layer, because
        # transformers does not call `_init_weights` for modules of custom code that hold no parameter directly.)
        setattr(self.o_proj, "starts_at_zero", True)  # noqa: B010  (type checkers know no such attribute)

    def forward(
        self, queries: torch.Tensor, vision_hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, M, D) queries and (P, N, D_vision) images -> (B, M, D) and weights (B, H, M, N).

        B is a multiple of P; rows that share an image stand next to each other.
        """
        image = self.norm2(vision_hidden_states.to(queries.dtype))
        key, value = (
            rearrange(x, "p n (h k) -> p h n k", k=self.head_dim) for x in (self.k_proj(image), self.v_proj(image))
        )
        # All rows of an image attend to it as one long row: its keys and values are computed once and never copied.
        query = self.q_proj(self.norm1(queries))
        query = rearrange(query, "(p r) m (h k) -> p h (r m) k", p=image.shape[0], k=self.head_dim)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs)
        output = rearrange(output, "p (r m) h k -> (p r) m (h k)", m=queries.shape[1])
        if weights is not None:
            weights = rearrange(weights, "p h (r m) n -> (p r) h m n", m=queries.shape[1])
        return self.o_proj(output), weights


class QLlamaMLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class QLlamaDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention of the queries (in every `cross_attention_frequency`-th layer), MLP."""

    def __init__(self, config: QLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = InternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = QLlamaAttention(config, layer_idx)
        self.cross_attn = QLlamaCrossAttention(config) if config.has_cross_attention(layer_idx) else None
        self.post_attention_layernorm = InternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = QLlamaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_hidden_states: torch.Tensor | None = None,
        num_queries: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.cross_attn is not None and vision_hidden_states is not None and num_queries:
            queries, text = hidden_states[:, :num_queries], hidden_states[:, num_queries:]
            seen, _ = self.cross_attn(queries, vision_hidden_states)
            hidden_states = torch.cat([queries + seen, text], dim=1)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class QLlamaPreTrainedModel(PreTrainedModel):
    """What all QLLaMA classes share."""

    config: QLlamaConfig
    config_class = QLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": QLlamaDecoderLayer,
        "attentions": OutputRecorder(QLlamaAttention, index=1),
        "cross_attentions": OutputRecorder(QLlamaCrossAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class QLlamaModel(QLlamaPreTrainedModel):
    """QLLaMA without its language head.

    Args:
        config: The configuration.
        has_text: False leaves out the word embeddings, for uses that only read the queries (InternVL-Chat).
    """

    def __init__(self, config: QLlamaConfig, has_text: bool = True) -> None:
        super().__init__(config)
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id) if has_text else None
        )
        self.layers = nn.ModuleList([QLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = InternVLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()
        self._tp_plan: dict[str, str] = plan_without_cut_heads(self._tp_plan, config)
        if not config.has_queries:
            # transformers warns of a plan that names absent parts.
            self._tp_plan = {name: how for name, how in self._tp_plan.items() if "cross_attn" not in name}

    @renamed_arguments(visibility="attention_mode")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        vision_hidden_states: torch.Tensor | None = None,
        attention_mode: str | Sequence[str] | PackedPasses | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of queries, text, or both (queries first).

        Args:
            input_ids: (B, L) text.
            attention_mask: 1 = attend; (B, L) over the text, or (B, M + L) over queries and text; with a cache over
                everything seen so far as well. Padding may stand on either side.
            position_ids: (B, M + L); by default queries count from 0 and text goes on from M (or from 0 without
                queries), padding not counted.
            past_key_values: Cache of a "generation" or "text" prefill.
            inputs_embeds: (B, L, D) in place of `input_ids`.
            query_embeds: (B, M, D) learned queries, in the prefill.
            vision_hidden_states: (P, N, D_vision) image features for the cross-attention, B a multiple of P: the first
                B / P rows read the first image.
            attention_mode: One of `ATTENTION_MODES`, or one per row of the batch, or the `PackedPasses` of each row.
                Default: "generation" with queries and text, "image" with queries alone, "text" otherwise.
            use_cache: Whether to return a cache.

        Returns:
            `last_hidden_state` (B, M + L, D), `past_key_values`.

        Raises:
            ValueError: Neither text nor queries, both kinds of text, an unknown or unfitting `attention_mode`, images
                that do not fit the rows, or an unknown keyword.
        """
        refuse_unknown(kwargs, "`QLlamaModel.forward`")
        hidden_states, num_queries = self._embed(input_ids, inputs_embeds, query_embeds)
        self._check_images(vision_hidden_states, hidden_states.shape[0])
        rows = packed_passes(attention_mode, num_queries, *hidden_states.shape[:2])
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        attention_mask = self._over_queries(attention_mask, num_queries, hidden_states)
        if position_ids is None:
            position_ids = self._default_positions(attention_mask, past_key_values, hidden_states, rows[0])
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_parameters["rope_theta"])
        is_causal = not {mode for passes in rows for mode in passes.modes} <= {"image", "matching"}
        mask = self._mask(hidden_states, attention_mask, past_key_values, position_ids, rows)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                vision_hidden_states,  # positional, so that reentrant checkpointing tracks its gradient
                num_queries=num_queries,
                attention_mask=mask,
                position_embeddings=angles,
                past_key_values=past_key_values,
                **{**kwargs, "is_causal": is_causal},
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, query_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Give only one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None:
            if self.embed_tokens is None:
                raise ValueError("This QLLaMA was built without word embeddings; it takes `query_embeds` only.")
            inputs_embeds = self.embed_tokens(input_ids)
        if query_embeds is None:
            if inputs_embeds is None:
                raise ValueError("Give `input_ids`, `inputs_embeds` or `query_embeds`.")
            return inputs_embeds, 0
        if inputs_embeds is None:
            return query_embeds, query_embeds.shape[1]
        query_embeds = query_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return torch.cat([query_embeds, inputs_embeds], dim=1), query_embeds.shape[1]

    @staticmethod
    def _check_images(vision_hidden_states: torch.Tensor | None, batch: int) -> None:
        if vision_hidden_states is not None and batch % vision_hidden_states.shape[0]:
            raise ValueError(
                f"Every image needs as many rows as any other, got {batch} rows for {vision_hidden_states.shape[0]} "
                "images in `vision_hidden_states`."
            )

    @staticmethod
    def _over_queries(
        attention_mask: torch.Tensor | None, num_queries: int, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """Puts ones for the queries in front of a mask that covers the text only."""
        if attention_mask is None or attention_mask.ndim != 2 or not num_queries:
            return attention_mask
        if attention_mask.shape[1] != hidden_states.shape[1] - num_queries:
            return attention_mask
        return torch.cat([attention_mask.new_ones(attention_mask.shape[0], num_queries), attention_mask], dim=1)

    @staticmethod
    def _default_positions(
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        hidden_states: torch.Tensor,
        passes: PackedPasses,
    ) -> torch.Tensor:
        length = hidden_states.shape[1]
        if len(passes.modes) > 1:
            is_real = hidden_states.new_ones(hidden_states.shape[:2]) if attention_mask is None else attention_mask
            return passes.position_ids(is_real)
        if attention_mask is not None and attention_mask.ndim == 2:
            return text_positions(attention_mask)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)

    def _mask(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
        rows: list[PackedPasses],
    ) -> torch.Tensor | None:
        """The mask for the attention kernel in use: a causal one, changed by `mask_functions`."""
        modes = {passes.modes for passes in rows}
        if modes == {("image",)} or (modes == {("matching",)} and attention_mask is None):
            return None
        arguments = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        if modes == {("text",)} or not rows[0].num_queries:
            return create_causal_mask(position_ids=position_ids, **arguments)
        is_added, is_kept = mask_functions(rows, hidden_states.shape[0], hidden_states.device)
        arguments["config"] = copy.copy(self.config)
        arguments["config"]._attn_implementation = kernel_for_blocks(self.config._attn_implementation)
        return create_causal_mask(or_mask_function=is_added, and_mask_function=is_kept, **arguments)


class QLlamaTextEncoder(QLlamaPreTrainedModel):
    """QLLaMA without its language head, for InternVL-C alone; `model` has the name it has in `QLlamaForCausalLM`."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__(config)
        self.model = QLlamaModel(config)
        self.post_init()


class QLlamaForCausalLM(QLlamaPreTrainedModel, GenerationMixin):
    """QLLaMA with its language head; generates captions.

    To generate after queries, pass `query_embeds` (B, M, D), `vision_hidden_states`, and `input_ids` and
    `attention_mask` that start with M placeholders (of any id, mask 1), so that the lengths which `generate` counts
    are those of the cache. Beams and several captions of an image share its keys and values.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__(config)
        self.model = QLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @renamed_arguments(visibility="attention_mode")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        vision_hidden_states: torch.Tensor | None = None,
        attention_mode: str | Sequence[str] | PackedPasses | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) over the text, the queries left out; the loss with `labels` (B, L), -100 ignored.

        `logits_to_keep` is the number of last positions (or their indices) to compute logits for, 0 meaning all.
        Everything else is as in `QLlamaModel.forward`.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # as an argument, Trainer would take it for labels
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            query_embeds=query_embeds,
            vision_hidden_states=vision_hidden_states,
            attention_mode=attention_mode,
            use_cache=use_cache,
            **kwargs,
        )
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]
        text = outputs.last_hidden_state[:, num_queries:]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(text[:, kept, :])
        vocab_size = self.config.vocab_size
        loss = next_token_loss(self.loss_function, logits, labels, vocab_size, shift_labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        query_embeds: torch.Tensor | None = None,
        vision_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Swaps the placeholders for the queries in the prefill; later steps find both in the cache."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if query_embeds is not None and model_inputs["input_ids"].shape[1] == input_ids.shape[1]:
            model_inputs["input_ids"] = model_inputs["input_ids"][:, query_embeds.shape[1] :]
            model_inputs["query_embeds"] = query_embeds
            model_inputs["vision_hidden_states"] = vision_hidden_states
        return model_inputs

    def _expand_inputs_for_generation(
        self, *args: Any, vision_hidden_states: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As in transformers, but without a copy of the image for every beam."""
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, model_kwargs | {"vision_hidden_states": vision_hidden_states}

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None, is_first_iteration: bool = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """The mask of transformers for a static cache, which is causal; the prefill builds another."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)


# Former public names.
__getattr__ = renamed_names(globals(), VISIBILITIES="ATTENTION_MODES")

__all__ = ["ATTENTION_MODES", "QLlamaForCausalLM", "QLlamaModel", "QLlamaPreTrainedModel", "QLlamaTextEncoder"]
