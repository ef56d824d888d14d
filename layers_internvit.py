"""Embeddings and blocks of InternViT (paper section 3.2). Shape letters as in modeling_internvit."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_internvl import InternViTConfig
from .layers_internvl import (
    InternVLRMSNorm,
    clamp_to_dtype,
    eager_attention_forward,
    fp16_safe_linear,
    fp16_safe_stream,
)


def resize_position_grid(position_embedding: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes learned positions to another patch grid; the class position in front stays.

    Bicubic in fp32 without antialiasing, as published: timm's antialiased resize moves features by up to 1.1.

    Args:
        position_embedding: (1, 1 + S*S, D), on a square grid.
        height: Of the wanted grid, in patches.
        width: Of the wanted grid, in patches.

    Returns:
        (1, 1 + height*width, D), in the dtype of the input.
    """
    class_position, grid = position_embedding[:, :1], position_embedding[:, 1:]
    side = int(grid.shape[1] ** 0.5)
    # Bicubic resizing to the same size is the identity. A program that is exported takes every size and has no branch.
    if not torch.compiler.is_exporting() and (height, width) == (side, side):
        return position_embedding
    grid = rearrange(grid.float(), "1 (h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([class_position, rearrange(grid, "1 d h w -> 1 (h w) d").to(class_position.dtype)], dim=1)


def resize_patch_kernel(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes the kernel of the patch embedding to another patch size.

    Bicubic in fp32 without antialiasing, as published.

    Args:
        weight: (D, 3, patch, patch).
        size: Of the wanted patch, in pixels.

    Returns:
        (D, 3, size, size), in the dtype of the input.
    """
    if weight.shape[-2:] == (size, size):
        return weight
    return F.interpolate(weight.float(), size=(size, size), mode="bicubic", align_corners=False).to(weight.dtype)


class InternViTLayerNorm(nn.LayerNorm):
    """Layer norm that also takes the fp32 residual stream of an fp16 model."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float32:
            return super().forward(hidden_states)
        return F.layer_norm(hidden_states, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


NORMS: dict[str, Callable[..., nn.Module]] = {"rms_norm": InternVLRMSNorm, "layer_norm": InternViTLayerNorm}


class InternViTDropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is dropped with probability `rate` and scaled up otherwise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        kept = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * kept.to(branch.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class InternViTEmbeddings(nn.Module):
    """Patches to tokens, a class token in front, learned positions."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, height, width) -> (B, N, D)."""
        height, width = self._grid(pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.position_embedding.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (B, N - 1, D)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], -1, -1), patches], dim=1)
        return tokens + resize_position_grid(self.position_embedding, height, width)

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels:
            raise ValueError(f"`pixel_values` must be (B, {self.num_channels}, height, width), got {shape}.")
        if shape[2] % self.patch_size or shape[3] % self.patch_size:
            raise ValueError(
                f"Height and width must be multiples of the patch size {self.patch_size}, got {shape[2:]}."
            )
        return shape[2] // self.patch_size, shape[3] // self.patch_size


class InternViTAttention(nn.Module):
    """Self-attention; q and k are normalised over the full width before the split into heads."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.q_norm: nn.Module
        self.k_norm: nn.Module
        if config.qk_normalization:
            # RMS also in the LayerNorm flavour, as published.
            self.q_norm = InternVLRMSNorm(config.hidden_size, config.layer_norm_eps)
            self.k_norm = InternVLRMSNorm(config.hidden_size, config.layer_norm_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (
            rearrange(x, "b n (h k) -> b h n k", h=self.num_heads)
            for x in (self.q_norm(query), self.k_norm(key), value)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.proj_drop(fp16_safe_linear(self.proj, output.flatten(2))), weights


class InternViTMLP(nn.Module):
    """Two linear layers and an activation.

    Without gradients GELU is computed in place, which halves the memory of the wide layer.
    """

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.is_gelu = config.hidden_act == "gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        if self.is_gelu and not torch.is_grad_enabled():
            return fp16_safe_linear(self.fc2, torch.ops.aten.gelu_(hidden_states))
        return fp16_safe_linear(self.fc2, self.act(hidden_states))


class InternViTLayer(GradientCheckpointingLayer):
    """Pre-norm block with layer scale and stochastic depth."""

    def __init__(self, config: InternViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = NORMS[config.norm_type](config.hidden_size, eps=config.layer_norm_eps)
        self.attn = InternViTAttention(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.drop_path1 = InternViTDropPath(drop_path_rate)
        self.norm2 = NORMS[config.norm_type](config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = InternViTMLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))
        self.drop_path2 = InternViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        dtype = self.ls1.dtype  # of `hidden_states` too, except in fp16, where the residual stream is fp32
        # Scale and sum in one pass over memory. A variable for a branch would keep it alive while the next is
        # computed.
        hidden_states = torch.addcmul(
            hidden_states, self.drop_path1(self.attn(self.norm1(hidden_states).to(dtype), **kwargs)[0]), self.ls1
        )
        return torch.addcmul(hidden_states, self.drop_path2(self.mlp(self.norm2(hidden_states).to(dtype))), self.ls2)


class InternViTEncoder(nn.Module):
    """The stack of blocks; any contiguous part of it can be run.

    In fp16 the residual stream is kept in fp32: it grows from block to block, and in a large tower a few channels
    leave the range of fp16.
    """

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([InternViTLayer(config, rate) for rate in config.drop_path_rates])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        start: int = 0,
        stop: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = fp16_safe_stream(hidden_states)
        for layer in self.layers[start:stop]:
            hidden_states = layer(hidden_states, **kwargs)
        return clamp_to_dtype(hidden_states, dtype)
