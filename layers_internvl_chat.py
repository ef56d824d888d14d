"""Connector, decoder and losses of InternVL-Chat. Shape letters as in modeling_internvit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from .layers_internvl import plan_without_cut_heads
from .modeling_internlm2 import InternLM2ForCausalLM, InternLM2Model


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


def build_decoder(config: Any, has_head: bool) -> PreTrainedModel:
    """The language model of a decoder configuration, in the default dtype of the moment."""
    if config.model_type == "internlm2":
        decoder: Any = InternLM2ForCausalLM(config) if has_head else InternLM2Model(config)
    else:
        auto_class: Any = AutoModelForCausalLM if has_head else AutoModel
        decoder = auto_class.from_config(config, dtype=torch.get_default_dtype())
    if not is_for_vllm(config):  # vLLM shards the heads itself, and copies key/value heads where there are too few
        decoder._tp_plan = plan_without_cut_heads(decoder._tp_plan, config)
    return decoder


def is_for_vllm(config: Any) -> bool:
    """Whether vLLM builds the model with this decoder: its attention implementation exists only inside vLLM."""
    return config._attn_implementation == "vllm"


@contextmanager
def head_reads_only(head: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within it, the `head` of a decoder computes logits (P, V) of these positions (P,) alone.

    A hook, because `logits_to_keep` takes the same positions of every row, and the decoder should still
    do what it does with logits (scaling, capping, the loss of its experts).
    """

    def select(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, 1).index_select(0, positions.to(args[0].device)),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def next_along(values: torch.Tensor, last: float) -> torch.Tensor:
    """What each position predicts: (B, L) one step to the left, with `last` at the end."""
    return nn.functional.pad(values[:, 1:], (0, 1), value=last)


def weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, total_weight: torch.Tensor
) -> torch.Tensor:
    """Loss of logits (P, V) for `targets` (P,), -100 ignored: the sum weighted by `weight` (P,), over `total_weight`.

    0 if the total weight is 0.
    """
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weight).sum() / total_weight.where(total_weight != 0, 1)
