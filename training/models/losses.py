"""The objectives of contrastive and generative training (paper section 3.3) as pure functions: features in, losses
out.

Does: InfoNCE and SigLIP's sigmoid loss over the batch of all processes, soft targets where several texts describe one
image, matching with hard negatives, generation. Similarities and losses are computed in fp32 or wider, also under
autocast. Does not: run a model, or know about processes: a function that needs the rows of all of them is given a
`gather`, which takes (B, ...) to (W*B, ...) with the rows of this process from `rank * B` on. Every process must hold
as many rows. The mean over processes of the losses is then the loss of the whole batch, and likewise the gradients,
which the gather sums.

Shape letters as in modeling_internvit; W is the number of processes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather
from transformers.utils.generic import maybe_autocast

from ...layers_internvl import IGNORE_INDEX
from ...renaming_internvl import renamed_arguments, renamed_names
from .gradient_cache import in_chunks


Gather = Callable[[torch.Tensor], torch.Tensor]


def local_rows(rows: torch.Tensor) -> torch.Tensor:
    """The gather of a single process: what it holds is the batch."""
    return rows


def rows_of_all_processes(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (W*B, ...), in the order of the ranks; the backward pass sums the gradients of all processes."""
    return torch.cat(all_gather(rows))


def current_gather() -> tuple[Gather, int]:
    """The gather and the rank of this process; without a process group, those of a single one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return rows_of_all_processes, dist.get_rank()
    return local_rows, 0


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(features: torch.Tensor) -> torch.Tensor:
    """Features (B, E) of unit length, in fp32 or wider."""
    return F.normalize(_wide(features), dim=-1)


def scaled_similarities(rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(R, E) and (C, E) -> (R, C) in fp32 or wider: at a scale of 100, bf16 would round similarities to halves."""
    with maybe_autocast(rows.device.type, enabled=False):
        # The factor goes to the rows: for its gradient, the product would have to be kept.
        return (_wide(scale) * _wide(rows)) @ _wide(columns).T


class _CappedExp(torch.autograd.Function):
    """exp up to a cap, beyond which only gradients pass whose descent leads back: a plain clamp would never come down
    again.
    """

    @staticmethod
    def forward(ctx: Any, logit_scale: torch.Tensor, cap: float) -> torch.Tensor:
        scale = logit_scale.exp()
        capped = scale.clamp(max=cap)
        ctx.save_for_backward(scale, capped)
        return capped

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        scale, capped = ctx.saved_tensors
        passes = (scale == capped) | (gradient > 0)
        return torch.where(passes, gradient * capped, torch.zeros_like(gradient)), None


def capped_scale(logit_scale: torch.Tensor, cap: float) -> torch.Tensor:
    """The factor of the similarities: exp of the learned temperature, at most `cap` (CLIP's logit-scale clamp).

    It caps what is used and not what is stored, so it holds under every engine, whoever keeps the parameter.
    """
    return _CappedExp.apply(_wide(logit_scale), cap)


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return F.cross_entropy(
        logits, targets, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing
    )


def _num_targets(targets: torch.Tensor) -> torch.Tensor:
    """How many rows count, at least 1: a batch of nothing but ignored rows has the loss 0 and not 0/0."""
    rows = targets != IGNORE_INDEX if targets.ndim == 1 else targets.new_ones(len(targets))
    return rows.sum().clamp(min=1)


def _symmetric_cross_entropy(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    gather: Gather,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Mean of both directions; `targets` are columns (B,) or probabilities (B, W*B)."""
    image_embeds, text_embeds = _wide(image_embeds), _wide(text_embeds)
    all_images, all_texts = gather(image_embeds), gather(text_embeds)

    def loss_of(images: torch.Tensor, texts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        of_images = _cross_entropy_sum(scaled_similarities(images, all_texts, scale), wanted, label_smoothing)
        of_texts = _cross_entropy_sum(scaled_similarities(texts, all_images, scale), wanted, label_smoothing)
        return (of_images + of_texts)[None]

    losses = in_chunks(loss_of, chunk_size, image_embeds, text_embeds, targets)
    return losses.sum() / (2 * _num_targets(targets))


@renamed_arguments(rows_per_chunk="chunk_size")
def info_nce_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    gather: Gather = local_rows,
    rank: int = 0,
    label_smoothing: float = 0.0,
    is_ignored: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE: among the texts of all processes the image's own, among all images the text's own.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length; row i belongs to image i.
        scale: Factor of the similarities.
        gather: Collects the rows of all processes.
        rank: Of this process.
        label_smoothing: Share of the target spread over all columns.
        is_ignored: (B,), rows whose loss is left out; as columns they stay (published: pairs with an empty text).
        chunk_size: Rows of similarities in memory at a time.

    Returns:
        The mean over the rows that count and both directions; 0 if none counts.
    """
    targets = rank * len(image_embeds) + torch.arange(len(image_embeds), device=image_embeds.device)
    if is_ignored is not None:
        targets = targets.masked_fill(is_ignored, IGNORE_INDEX)
    return _symmetric_cross_entropy(image_embeds, text_embeds, scale, targets, gather, label_smoothing, chunk_size)


@renamed_arguments(rows_per_chunk="chunk_size")
def retrieval_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    image_ids: torch.Tensor,
    gather: Gather = local_rows,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Symmetric cross-entropy in which all pairs of one image share the target: captions of an image are no negatives.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length.
        scale: Factor of the similarities.
        image_ids: (B,), equal for pairs of the same image.
        gather: Collects the rows of all processes.
        chunk_size: Rows of similarities in memory at a time.
    """
    is_same = image_ids[:, None] == gather(image_ids)  # (B, W*B)
    targets = is_same / is_same.sum(dim=1, keepdim=True)
    targets = targets.to(_wide(image_embeds).dtype)
    return _symmetric_cross_entropy(image_embeds, text_embeds, scale, targets, gather, chunk_size=chunk_size)


@renamed_arguments(columns_per_chunk="chunk_size")
def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    gather: Gather = local_rows,
    rank: int = 0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """SigLIP's loss (https://arxiv.org/abs/2303.15343): every image with every text of all processes, a pair or not.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length; row i belongs to image i.
        scale: Factor of the similarities.
        bias: Added to them; starts at -10, since almost all are no pairs.
        gather: Collects the rows of all processes.
        rank: Of this process.
        chunk_size: Texts whose similarities are in memory at a time.

    Returns:
        The sum over all texts, as the mean over the images.
    """
    num_rows = len(image_embeds)
    own_columns = rank * num_rows + torch.arange(num_rows, device=image_embeds.device)
    all_texts = gather(_wide(text_embeds))

    def loss_of(texts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        logits = scaled_similarities(image_embeds, texts, scale) + _wide(bias)
        sign = torch.where(own_columns[:, None] == columns, 1.0, -1.0)  # integers would be twice as wide
        return -F.logsigmoid(sign * logits).sum()[None]

    columns = torch.arange(len(all_texts), device=image_embeds.device)
    return in_chunks(loss_of, chunk_size, all_texts, columns).sum() / num_rows


def matryoshka_loss(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    dims: Sequence[int] | None,
) -> torch.Tensor:
    """The mean of a contrastive loss over embeddings cut to several lengths, the whole ones among them: their first
    components are trained to be embeddings, too (https://arxiv.org/abs/2205.13147, with equal weights).

    Args:
        loss_of: Gives the loss of unit vectors of images (B, e) and texts (B, e).
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length.
        dims: Lengths; None leaves the loss of the whole embeddings alone.
    """
    losses = [loss_of(image_embeds, text_embeds)]
    for size in dims or ():
        if size < image_embeds.shape[1]:
            losses.append(loss_of(l2_normalize(image_embeds[:, :size]), l2_normalize(text_embeds[:, :size])))
    return torch.stack(losses).mean()


def draw_hard_negatives(
    similarities: torch.Tensor, is_candidate: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row a column that does not belong to it, the likelier the more similar it is (as in ALBEF and BLIP-2).

    Args:
        similarities: (R, C), scaled.
        is_candidate: (R, C), which columns may be drawn.
        generator: Of the random numbers; None takes torch's own.

    Returns:
        Columns (R,), and which rows (R,) had a candidate; the column of a row without one means nothing.
    """
    has_candidate = is_candidate.any(dim=1)
    # Rows without a candidate draw among all columns: a softmax over nothing would not be a distribution.
    is_candidate = is_candidate | ~has_candidate[:, None]
    weights = _wide(similarities).masked_fill(~is_candidate, -float("inf")).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), has_candidate


def matching_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Image-text matching (ITM).

    Args:
        logits: (R, 2), scores that image and text do not (0) or do (1) belong together.
        labels: (R,) of 0 and 1, -100 ignored.

    Returns:
        The mean cross-entropy of the rows that count; 0 if none does.
    """
    return _cross_entropy_sum(_wide(logits), labels, 0.0) / _num_targets(labels)


def generation_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Next-token loss (ITG), with logits at the positions that have a label and nowhere else.

    Args:
        hidden_states: (B, L, D), position i predicts the label of position i + 1.
        labels: (B, L), -100 ignored.
        lm_head: (positions, D) -> (positions, V).
        num_items_in_batch: What the sum is divided by, if not the number of labels: of the batch that this is a part
            of.

    Returns:
        The mean over the labels; 0 if there is none.
    """
    targets = labels[:, 1:]
    is_kept = targets != IGNORE_INDEX
    logits = lm_head(hidden_states[:, :-1][is_kept])
    if num_items_in_batch is None:
        num_items_in_batch = is_kept.sum().clamp(min=1)
    return _cross_entropy_sum(_wide(logits), targets[is_kept], 0.0) / num_items_in_batch


__getattr__ = renamed_names(globals(), IGNORED="IGNORE_INDEX", own_rows="local_rows", unit="l2_normalize")
