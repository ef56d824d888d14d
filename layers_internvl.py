"""Layers, fp16 safety and losses that all models share. Shape letters as in modeling_internvit."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import distributed, nn
from transformers import PretrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


# Label that the losses of torch and transformers leave out.
IGNORE_INDEX = -100


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the readable definition of what every other kernel must compute.

    Takes query (B, H, N, K), key and value (B, H or fewer, T, K), an additive mask that broadcasts to (B, H, N, T), or
    None; gives (B, N, H, K) and the weights (B, H, N, T).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # by one it would only copy
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.dtype == torch.float16:
        query, key = query.float(), key.float()  # before it is scaled, the product may leave the range of fp16
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def fp16_safe_stream(hidden_states: torch.Tensor) -> torch.Tensor:
    """The residual stream that starts from `hidden_states`: fp32 in place of fp16, whose range it may leave."""
    return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states


def clamp_to_dtype(hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts to `dtype`; numbers beyond its range become its largest number, not infinity."""
    if hidden_states.dtype == dtype:
        return hidden_states
    limit = torch.finfo(dtype).max
    return hidden_states.clamp(-limit, limit).to(dtype)


def fp16_safe_linear(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Calls the last linear layer of a residual branch, (B, N, D) -> (B, N, D'), so that it stays finite in fp16.

    The branch is scaled down only after this layer (`ls1`, `ls2`), whose output would leave the range of fp16 first:
    with scales at their initial 0.1, once the residual stream reaches 6,550. So an fp16 input is divided by 16 and the
    output, in fp32, multiplied again. An extra all-zero token recovers the bias, which must not be multiplied; so the
    layer can be any module (LoRA, sharded, offloaded).
    """
    if hidden_states.dtype != torch.float16:
        return linear(hidden_states)
    outputs = linear(F.pad(hidden_states, (0, 0, 0, 1)) / 16).float()
    bias = outputs[:, -1:]
    return 16 * (outputs[:, :-1] - bias) + bias


# How a projection is sharded if each process has some of the heads, and how if each has all of them: weights and their
# products stay sharded.
WHOLE_ATTENTION = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
# These sum the gradients of weights that each process holds whole but uses for some heads only.
PARTIAL_GRADIENTS = ("replicated_with_grad_allreduce", "mla_kv_a_proj")


def plan_without_cut_heads(plan: dict[str, str], config: PretrainedConfig) -> dict[str, str]:
    """The tensor-parallel plan, changed so that each process computes whole attention if heads cannot be split evenly.

    With further kinds of parallelism, fewer processes share the heads than the world has: then more than needed may be
    computed, never less.

    Args:
        plan: Names of modules and how they are sharded; attention modules have "attn" or "attention" in their names.
        config: Has the numbers of heads.
    """
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    heads = config.num_attention_heads
    if not any(count % processes for count in (heads, getattr(config, "num_key_value_heads", None) or heads)):
        return plan
    attention = {name for name in plan if "attn" in name or "attention" in name}
    return {
        name: WHOLE_ATTENTION.get(how, how) if name in attention else how
        for name, how in plan.items()
        if name not in attention or how not in PARTIAL_GRADIENTS
    }


def zero_without_labels(loss: torch.Tensor, is_labelled: torch.Tensor) -> torch.Tensor:
    """The loss, or 0 if no position has a label and the mean is undefined; part of the graph in both cases."""
    return torch.where(is_labelled.any().to(loss.device), loss, torch.zeros_like(loss))


def next_token_loss(
    loss_function: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """A model's loss of next tokens, 0 if no position has a label; None without labels.

    Args:
        loss_function: The model's.
        logits: (B, L, V), or (P, V) of as many `shift_labels`.
        labels: (B, L), -100 ignored.
        vocab_size: V.
        shift_labels: In place of `labels`, what each position predicts, from trainers that shard sequences.
        **kwargs: For the loss function.
    """
    if shift_labels is None:
        if labels is None:
            return None
        targets = labels[:, 1:]
    else:
        targets = labels = shift_labels
    loss = loss_function(logits=logits, labels=labels, vocab_size=vocab_size, shift_labels=shift_labels, **kwargs)
    return zero_without_labels(loss, targets != IGNORE_INDEX)


class InternVLRMSNorm(nn.Module):
    """Root mean square norm, the statistics in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class InternVLPoolingAttention(nn.Module):
    """Cross-attention of the pooling heads. The biases are separate parameters, as in the published checkpoints."""

    def __init__(self, config: PretrainedConfig, width: int, num_heads: int, output_width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (width // num_heads) ** -0.5
        self.is_causal = False
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.k_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.proj = nn.Linear(width, output_width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, 1, D), (B, N, D), (B, N, D) -> (B, 1, E)."""
        query, key, value = (
            rearrange(x, "b n (h k) -> b h n k", h=self.num_heads)
            for x in (self.q(query) + self.q_bias, self.k(key) + self.k_bias, self.v(value) + self.v_bias)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.proj(output.flatten(2))

    def init_biases(self) -> None:
        """Initialises what is in no layer of torch, for `_init_weights` of the models that pool."""
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            init.zeros_(bias)


class InternVLAttentionPooling(nn.Module):
    """Pools tokens into one vector; the query is their mean (paper figure 4)."""

    # Named here, so that only models with such a pooling list it: sharders refuse the names of absent classes.
    _no_split_modules = ("InternVLAttentionPooling",)

    def __init__(self, config: PretrainedConfig, width: int, num_heads: int, output_width: int) -> None:
        super().__init__()
        eps = 1e-5  # published AttentiveBlock, independent of the eps of the towers
        self.norm1_q = nn.LayerNorm(width, eps=eps)
        self.norm1_k = nn.LayerNorm(width, eps=eps)
        self.norm1_v = nn.LayerNorm(width, eps=eps)
        self.cross_attn = InternVLPoolingAttention(config, width, num_heads, output_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, E)."""
        query = tokens.mean(dim=1, keepdim=True)
        return self.cross_attn(self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)
