"""What the training models of stages 1 and 2 share: texts to read images with, frozen parts, features.

The stages themselves are in pretraining. Shape letters as in modeling_internvit.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...attention_masks_qllama import PackedPasses
from ...configuration_internvl import InternVLConfig
from ...modeling_internvl import last_token_states
from ...renaming_internvl import renamed_arguments
from .gradient_cache import in_chunks
from .losses import capped_scale, current_gather, draw_hard_negatives, l2_normalize, scaled_similarities
from .saving import SavedAsInternVLModel


@dataclass(frozen=True)
class Texts:
    """Padded texts, on either side.

    Args:
        ids: (B, L).
        mask: (B, L), 1 = a token.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> "Texts":
        return Texts(self.ids[rows], self.mask[rows])

    def is_empty(self, prefix_length: int) -> torch.Tensor:
        """(B,), whether nothing follows the prefix; `prefix_length` counts the tokens that every text has, end token
        too.
        """
        return self.mask.sum(dim=1) <= prefix_length

    def trimmed(self) -> "Texts":
        """Without the columns in which all texts are padding."""
        columns = self.mask.any(dim=0)
        return Texts(self.ids[:, columns], self.mask[:, columns])

    @staticmethod
    def concatenate(parts: list["Texts"]) -> "Texts":
        """One after the other, padded on the right to the longest."""
        length = max(part.ids.shape[1] for part in parts)
        ids = [F.pad(part.ids, (0, length - part.ids.shape[1])) for part in parts]
        mask = [F.pad(part.mask, (0, length - part.mask.shape[1])) for part in parts]
        return Texts(torch.cat(ids), torch.cat(mask))


def drop_patches(tokens: torch.Tensor, share: float, contrast: torch.Tensor | None = None) -> torch.Tensor:
    """Leaves out a share of each image's patches, by chance (FLIP, https://arxiv.org/abs/2212.00794) or the plainest
    ones.

    Args:
        tokens: (B, N, D), embedded with their positions; the class token stays.
        share: Of the patches, in [0, 1).
        contrast: (B, N - 1), of which the highest stay; among equals, as blank patches are, chance decides.

    Returns:
        (B, 1 + kept patches, D), in an order of its own, which attention without positions of its own does not see.
    """
    num_patches = tokens.shape[1] - 1
    num_kept = max(1, round(num_patches * (1 - share)))
    kept = torch.rand(len(tokens), num_patches, device=tokens.device).argsort(dim=1)
    if contrast is not None:
        kept = kept.gather(1, contrast.gather(1, kept).argsort(dim=1, descending=True, stable=True))
    kept = kept[:, :num_kept] + 1
    patches = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], dim=1)


def patch_contrast(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, height, width) -> (B, patches): how far the pixels of each patch differ, in the channel where they differ
    most.
    """
    patches = rearrange(pixel_values, "b c (i p) (j q) -> b (i j) c (p q)", p=patch_size, q=patch_size)
    return (patches.amax(dim=-1) - patches.amin(dim=-1)).amax(dim=-1)


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in it is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


@renamed_arguments(rows_per_chunk="grad_cache_chunk_size")
class InternVLTrainingModel(SavedAsInternVLModel):
    """What the training models share.

    Args:
        config: The configuration.
        grad_cache_chunk_size: Gradient caching: pairs whose activations are in memory at a time; None means all of the
            batch.
        max_logit_scale: Cap of the factor of the similarities (CLIP: 100).
    """

    # A contrastive loss is no sum over samples: `Trainer` averages it over accumulation steps and processes.
    accepts_loss_kwargs = False
    completes_texts = False  # the collators do
    # How features of all processes are gathered, and the rank; planning/costs.py puts one there that counts bytes.
    current_gather = staticmethod(current_gather)

    def __init__(
        self, config: InternVLConfig, grad_cache_chunk_size: int | None = None, max_logit_scale: float = 100.0
    ) -> None:
        super().__init__(config)
        self.grad_cache_chunk_size = grad_cache_chunk_size
        self.max_logit_scale = max_logit_scale

    def train(self, mode: bool = True) -> "InternVLTrainingModel":
        """As in torch; a frozen vision tower stays in evaluation mode: stochastic depth would only add noise to it."""
        super().train(mode)
        if mode and is_frozen(self.vision_model):
            self.vision_model.eval()
        return self

    def _scale(self) -> torch.Tensor:
        return capped_scale(self.logit_scale, self.max_logit_scale)

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Texts:
        return Texts(ids, self._text_mask(ids, mask))

    def _vision_tokens(
        self, pixel_values: torch.Tensor, patch_drop_rate: float = 0.0, drop_low_contrast_patches: bool = False
    ) -> torch.Tensor:
        """(B, 3, height, width) -> (B, N, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.vision_model)):
            if not patch_drop_rate:
                return self.vision_model(pixel_values, return_dict=True).last_hidden_state
            patch_size = self.config.vision_config.patch_size
            contrast = patch_contrast(pixel_values, patch_size) if drop_low_contrast_patches else None
            embeds = drop_patches(self.vision_model.embeddings(pixel_values), patch_drop_rate, contrast)
            return self.vision_model(pixel_embeds=embeds, return_dict=True).last_hidden_state

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """InternVL-C's embedding (B, E) of vision tokens, which a frozen tower may give in a narrower dtype."""
        return l2_normalize(self.clip_projector(tokens.to(self.clip_projector.norm1_q.weight.dtype)))

    def _read(self, tokens: torch.Tensor, *passes: tuple[str, Texts]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One forward of QLLaMA that reads every image once per pass, all passes of an image packed in one row.

        So the image's keys and values are computed once, and queries that see no text once for all such passes.

        Args:
            tokens: (B, N, D_vision).
            *passes: An attention mode and the texts (B, L) that it reads with the images.

        Returns:
            Per pass the hidden states of the queries (B, M, D) and of the text (B, L, D).
        """
        modes, texts = zip(*passes, strict=True)
        lengths = tuple(part.ids.shape[1] for part in texts)
        shared = PackedPasses(modes, lengths, self.query_tokens.shape[1])
        hidden_states = self.qllama.model(
            input_ids=torch.cat([part.ids for part in texts], dim=1),
            attention_mask=torch.cat([part.mask for part in texts], dim=1),
            query_embeds=self.query_tokens.repeat(1, shared.num_copies, 1).expand(len(tokens), -1, -1),
            vision_hidden_states=tokens,
            attention_mode=shared,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return shared.split(hidden_states)

    def _text_embeds(self, texts: Texts) -> torch.Tensor:
        """Unit vectors (B, E) of texts that are read without an image."""
        return l2_normalize(in_chunks(self.get_text_features, self.grad_cache_chunk_size, texts.ids, texts.mask))

    @staticmethod
    def _contrastive_pass(texts: Texts, text_embeds: torch.Tensor | None) -> tuple[str, Texts]:
        """The pass that the contrastive loss needs: of the queries alone where the texts' features are known."""
        return ("contrastive", texts) if text_embeds is None else ("image", texts[:, :0])

    def _contrastive_embeds(
        self, queries: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, text_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (B, E) of images and texts from what `_contrastive_pass` gave, or the known ones of texts."""
        if text_embeds is None:
            text_embeds = l2_normalize(last_token_states(text, mask) @ self.text_projection)
        return l2_normalize(self.clip_projector2(queries)), text_embeds

    def _matching_logits(self, queries: torch.Tensor) -> torch.Tensor:
        """(B, 2) of the pass "matching": the mean over the queries."""
        return self.itm_head(queries).mean(dim=1)

    @torch.no_grad()
    def _draw_negatives(
        self, tokens: torch.Tensor, positive: Texts, text_embeds: torch.Tensor, may_be_drawn: torch.Tensor
    ) -> tuple[Texts, torch.Tensor]:
        """For each image the text of another one, drawn by InternVL-C's similarity, and which rows (B,) have one."""
        images = in_chunks(self._pool, self.grad_cache_chunk_size, tokens)
        similarities = scaled_similarities(images, text_embeds, self._scale())
        is_other_text = (positive.ids[:, None] != positive.ids).any(dim=-1)
        drawn, has_negative = draw_hard_negatives(similarities, is_other_text & may_be_drawn)
        return positive[drawn], has_negative

    def _check_has_queries(self, name: str) -> None:
        if not self.config.has_queries:
            raise ValueError(
                f"{name} needs the queries of QLLaMA, but `num_query_token` is 0. To go on from stage 1, load its "
                "folder with `from_pretrained(folder, num_query_token=96)`."
            )
