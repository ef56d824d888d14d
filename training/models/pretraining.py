"""Models that return the losses of stages 1 and 2 and of retrieval and caption fine-tuning: plain `Trainer` trains
each of them.

Each class is an `InternVLModel` with the same parameters, and what it saves is one, with its code. It adds what
belongs to training: which texts an image is read with, the objectives, chunks for large batches, frozen parts. Nothing
is remembered between calls; a process group is used where there is one. Not covered: tensor parallelism, where
processes share their rows.

What is trained is up to the caller (`requires_grad_`). A vision tower without a trained parameter runs without
gradient, in its own dtype and without stochastic depth. Frozen layers of QLLaMA keep their dtype too; where it is not
that of the trained ones, train under autocast (`bf16=True` of `Trainer`).

Stage 2 and retrieval read each image three times with QLLaMA, once per text, in one forward of each tower and one row
per image. Shape letters as in modeling_internvit.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ...configuration_internvl import InternVLConfig
from ...layers_internvl import IGNORE_INDEX
from ...modeling_internvl import InternVLOutput
from ...renaming_internvl import renamed_arguments
from .base import InternVLTrainingModel, Texts
from .gradient_cache import in_chunks
from .losses import (
    generation_loss,
    info_nce_loss,
    l2_normalize,
    matching_loss,
    matryoshka_loss,
    retrieval_loss,
    sigmoid_loss,
)


OBJECTIVES = ("softmax", "sigmoid")


@dataclass
class TrainingOutput(ModelOutput):
    """Losses of a batch.

    Args:
        loss: Their sum, to be minimised.
        loss_itc: Contrastive part, without gradient, for logs.
        loss_itc_tower: That of InternVL-C's images, where stage 2 has it, likewise.
        loss_itm: Matching part, likewise.
        loss_itg: Generative part, likewise.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itc_tower: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None


@renamed_arguments(
    dropped_patches="patch_drop_rate",
    drops_plain_patches="drop_low_contrast_patches",
    text_groups="num_length_buckets",
)
class InternVLForContrastiveTraining(InternVLTrainingModel):
    """Stage 1: InternVL-C by InfoNCE, or by SigLIP's sigmoid loss, over the pairs of all processes.

    With a configuration without queries (`num_query_token` 0) there is nothing else in the model.

    Args:
        config: The configuration.
        objective: "softmax" or "sigmoid"; the latter learns a bias (`logit_bias`) that other uses ignore.
        patch_drop_rate: Share of the patches left out in training (stage 1 begins with half of them).
        drop_low_contrast_patches: Leave out the plainest patches instead of any: for images that are mostly blank.
        num_length_buckets: Encode the texts in so many groups of similar length, each without the padding that the
            longest text of all would give it. More than one waits for the device once per group.
        **settings: As for `InternVLTrainingModel`.

    Raises:
        ValueError: An unknown objective, a share outside [0, 1), or no group.
    """

    def __init__(
        self,
        config: InternVLConfig,
        objective: str = "softmax",
        patch_drop_rate: float = 0.0,
        drop_low_contrast_patches: bool = False,
        num_length_buckets: int = 1,
        **settings: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, got {objective!r}.")
        if not 0 <= patch_drop_rate < 1:
            raise ValueError(f"`patch_drop_rate` must be in [0, 1), got {patch_drop_rate}.")
        if num_length_buckets < 1:
            raise ValueError(f"`num_length_buckets` must be at least 1, got {num_length_buckets}.")
        super().__init__(config, **settings)
        self.objective = objective
        self.patch_drop_rate = patch_drop_rate
        self.drop_low_contrast_patches = drop_low_contrast_patches
        self.num_length_buckets = num_length_buckets
        self.logit_bias: Any = nn.Parameter(torch.empty_like(self.logit_scale)) if objective == "sigmoid" else None
        self._init_sigmoid()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self._init_sigmoid()

    @torch.no_grad()
    def _init_sigmoid(self) -> None:
        """Temperature and bias as in SigLIP (section 3.2), where no checkpoint gives them."""
        if getattr(self, "logit_bias", None) is not None:  # the base class initialises before there is one
            init.constant_(self.logit_bias, -10.0)
            init.constant_(self.logit_scale, 2.302585092994046)  # log(10)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> InternVLOutput:
        """Features and the contrastive loss of a batch of pairs.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids: (B, L), texts with the prefix `summarize:` and an end token. (k*B, L) are k texts for each
                image, the first of all images before the second; the loss is the mean of k, each over one text per
                image.
            attention_mask: As `input_ids`, derived from `pad_token_id` when absent.
            return_loss: False leaves out the loss.

        Returns:
            `loss`, `image_embeds` (B, E) and `text_embeds` (k*B, E), unit length.

        Raises:
            ValueError: The texts are no multiple of the images.
        """
        if not len(input_ids) or len(input_ids) % len(pixel_values):
            raise ValueError(
                "`pixel_values` and `input_ids` must be pairs, or have as many texts for each image, got "
                f"{len(pixel_values)} images and {len(input_ids)} texts."
            )
        image_embeds = in_chunks(self._image_embeds, self.grad_cache_chunk_size, pixel_values)
        text_embeds = self._unit_text_embeds(self._texts(input_ids, attention_mask))
        loss = None
        if return_loss:
            losses = [self._loss(image_embeds, texts) for texts in text_embeds.split(len(image_embeds))]
            loss = torch.stack(losses).mean()
        return InternVLOutput(loss=loss, image_embeds=image_embeds, text_embeds=text_embeds)

    def _image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patch_drop_rate = self.patch_drop_rate if self.training else 0.0
        return self._pool(self._vision_tokens(pixel_values, patch_drop_rate, self.drop_low_contrast_patches))

    def _unit_text_embeds(self, texts: Texts) -> torch.Tensor:
        if self.num_length_buckets == 1:
            return l2_normalize(in_chunks(self.get_text_features, self.grad_cache_chunk_size, texts.ids, texts.mask))
        by_length = texts.mask.sum(dim=1).argsort()
        groups = [
            texts[rows].trimmed() for rows in by_length.tensor_split(min(self.num_length_buckets, len(by_length)))
        ]
        embeds = [
            in_chunks(self.get_text_features, self.grad_cache_chunk_size, group.ids, group.mask) for group in groups
        ]
        return l2_normalize(torch.cat(embeds)[by_length.argsort()])

    def _loss(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        return matryoshka_loss(self._loss_of_vectors, image_embeds, text_embeds, self.config.matryoshka_dims)

    def _loss_of_vectors(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        gather, rank = self.current_gather()
        features = (image_embeds, text_embeds, self._scale())
        if self.objective == "sigmoid":
            return sigmoid_loss(*features, self.logit_bias, gather, rank, chunk_size=self.grad_cache_chunk_size)
        smoothing = self.config.label_smoothing
        return info_nce_loss(*features, gather, rank, smoothing, chunk_size=self.grad_cache_chunk_size)


@renamed_arguments(contrast_tower="itc_on_vision_tower")
class InternVLForGenerativeTraining(InternVLTrainingModel):
    """Stage 2: contrastive (ITC), matching (ITM) and generative (ITG) losses from one forward of both towers.

    Texts with nothing after their prefix take no part in ITM and, as rows, in ITC.

    Args:
        config: The configuration.
        matching_prefix_length: Tokens of a matching text without a caption (`len(tokenizer("").input_ids)`).
        summarize_prefix_length: Tokens of a contrastive text without a caption
            (`len(tokenizer("summarize:").input_ids)`).
        itc_on_vision_tower: Contrast the texts with InternVL-C's images too, for runs that train the LLaMA: texts
            would move away from these otherwise.
        **settings: As for `InternVLTrainingModel`.
    """

    def __init__(
        self,
        config: InternVLConfig,
        matching_prefix_length: int = 0,
        summarize_prefix_length: int = 0,
        itc_on_vision_tower: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(config, **settings)
        self._check_has_queries("Stage 2")
        self.itc_on_vision_tower = itc_on_vision_tower
        self.matching_prefix_length = matching_prefix_length
        self.summarize_prefix_length = summarize_prefix_length

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        positive_input_ids: torch.Tensor,
        summarize_input_ids: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positive_attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        summarize_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> TrainingOutput:
        """Losses of a batch of pairs; every text has a row per image, and a mask that is derived when absent.

        Args:
            pixel_values: (B, 3, height, width).
            positive_input_ids: (B, L), the images' captions.
            summarize_input_ids: (B, L), the captions with the prefix `summarize:` and an end token.
            input_ids: (B, L), the captions with a prefix such as `English caption:` and an end token.
            labels: (B, L) for `input_ids`, -100 ignored.
            positive_attention_mask: (B, L) of `positive_input_ids`.
            negative_input_ids: (B, L), captions of other images; without them similar ones of the batch are drawn.
            negative_attention_mask: (B, L) of `negative_input_ids`.
            summarize_attention_mask: (B, L) of `summarize_input_ids`.
            attention_mask: (B, L) of `input_ids`.

        Returns:
            `loss` and its three parts.
        """
        positive = self._texts(positive_input_ids, positive_attention_mask)
        summarize = self._texts(summarize_input_ids, summarize_attention_mask)
        caption = self._texts(input_ids, attention_mask)
        tokens, text_embeds = in_chunks(self._vision_tokens, self.grad_cache_chunk_size, pixel_values), None
        if negative_input_ids is None:
            is_text = ~positive.is_empty(self.matching_prefix_length)
            # The texts' features are needed first, to draw by, so the images are read without these texts.
            text_embeds = self._text_embeds(summarize)
            negative, has_negative = self._draw_negatives(tokens, positive, text_embeds, is_text)
        else:
            negative = self._texts(negative_input_ids, negative_attention_mask)
            has_negative = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        matching, matching_labels = self._matching_rows(positive, negative, has_negative)
        inputs = (tokens, text_embeds, matching, summarize, caption, labels)
        num_labels = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        encode = partial(self._encode, num_labels=num_labels)
        image_embeds, text_embeds, logits, parts = in_chunks(encode, self.grad_cache_chunk_size, *inputs)
        itc = self._contrast(image_embeds, text_embeds, summarize)
        itm, itg = matching_loss(logits, matching_labels), parts.sum()
        loss, of_tower = itm + itc + itg, None
        if self.itc_on_vision_tower:
            of_tower = self._contrast(
                in_chunks(self._pool, self.grad_cache_chunk_size, tokens), text_embeds, summarize
            )
            loss, of_tower = loss + of_tower, of_tower.detach()
        return TrainingOutput(
            loss=loss, loss_itc=itc.detach(), loss_itc_tower=of_tower, loss_itm=itm.detach(), loss_itg=itg.detach()
        )

    def _contrast(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, texts: Texts) -> torch.Tensor:
        gather, rank = self.current_gather()
        loss_of = partial(
            info_nce_loss,
            scale=self._scale(),
            gather=gather,
            rank=rank,
            label_smoothing=self.config.label_smoothing,
            is_ignored=texts.is_empty(self.summarize_prefix_length),
            chunk_size=self.grad_cache_chunk_size,
        )
        return matryoshka_loss(loss_of, image_embeds, text_embeds, self.config.matryoshka_dims)

    def _matching_rows(
        self, positive: Texts, negative: Texts, has_negative: torch.Tensor
    ) -> tuple[Texts, torch.Tensor]:
        """Negatives for the first images, positives for the last B // 2 (published order), and the labels (B,)."""
        num_negatives = len(positive.ids) - len(positive.ids) // 2
        matching = Texts.concatenate([negative[:num_negatives], positive[num_negatives:]])
        is_positive = torch.arange(len(matching.ids), device=matching.ids.device) >= num_negatives
        is_ignored = matching.is_empty(self.matching_prefix_length) | ~(is_positive | has_negative)
        return matching, is_positive.long().masked_fill(is_ignored, IGNORE_INDEX)

    def _encode(
        self,
        tokens: torch.Tensor,
        text_embeds: torch.Tensor | None,
        matching: Texts,
        summarize: Texts,
        caption: Texts,
        labels: torch.Tensor,
        num_labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return contrastive embeddings, matching logits, and the rows' share of the generative loss (1,)."""
        matched, contrastive, generated = self._read(
            tokens, ("matching", matching), self._contrastive_pass(summarize, text_embeds), ("generation", caption)
        )
        image_embeds, text_embeds = self._contrastive_embeds(*contrastive, summarize.mask, text_embeds)
        itg = generation_loss(generated[1], labels, self.qllama.lm_head, num_labels)
        return image_embeds, text_embeds, self._matching_logits(matched[0]), itg[None]


class InternVLForRetrievalTraining(InternVLTrainingModel):
    """Retrieval fine-tuning: matching, and contrastive losses of InternVL-G's and InternVL-C's images with the texts.

    Captions of the same image are no negatives of each other: `image_ids` spread the targets over them.
    """

    def __init__(self, config: InternVLConfig, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._check_has_queries("Retrieval fine-tuning")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        positive_input_ids: torch.Tensor,
        summarize_input_ids: torch.Tensor,
        image_ids: torch.Tensor,
        positive_attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        summarize_attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> TrainingOutput:
        """Losses of a batch of pairs; the texts are those of `InternVLForGenerativeTraining`.

        Args:
            pixel_values: (B, 3, height, width).
            positive_input_ids: (B, L), the images' captions.
            summarize_input_ids: (B, L), the captions with the prefix `summarize:` and an end token.
            image_ids: (B,) or (B, 1), equal for pairs of the same image.
            positive_attention_mask: (B, L) of `positive_input_ids`.
            negative_input_ids: (B, L), captions of other images; without them similar ones of the batch are drawn.
            negative_attention_mask: (B, L) of `negative_input_ids`.
            summarize_attention_mask: (B, L) of `summarize_input_ids`.
            return_loss: False gives an empty output: the class has nothing but losses to give.

        Returns:
            `loss` and its two parts.
        """
        if not return_loss:
            return TrainingOutput()
        image_ids = image_ids.flatten()
        positive = self._texts(positive_input_ids, positive_attention_mask)
        summarize = self._texts(summarize_input_ids, summarize_attention_mask)
        tokens, text_embeds = in_chunks(self._vision_tokens, self.grad_cache_chunk_size, pixel_values), None
        negative_labels = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        if negative_input_ids is None:
            is_other_image = image_ids[:, None] != image_ids
            text_embeds = self._text_embeds(summarize)
            negative, has_negative = self._draw_negatives(tokens, positive, text_embeds, is_other_image)
            negative_labels = negative_labels.masked_fill(~has_negative, IGNORE_INDEX)
        else:
            negative = self._texts(negative_input_ids, negative_attention_mask)
        inputs = (tokens, text_embeds, negative, positive, summarize)
        embeds = in_chunks(self._encode, self.grad_cache_chunk_size, *inputs)
        *negative_and_positive, image_embeds, pooled_embeds, text_embeds = embeds
        gather, _ = self.current_gather()
        loss_of = partial(
            retrieval_loss,
            scale=self._scale(),
            image_ids=image_ids,
            gather=gather,
            chunk_size=self.grad_cache_chunk_size,
        )
        itc = matryoshka_loss(loss_of, image_embeds, text_embeds, self.config.matryoshka_dims)
        itc = itc + matryoshka_loss(loss_of, pooled_embeds, text_embeds, self.config.matryoshka_dims)
        labels = torch.cat([negative_labels, torch.ones_like(negative_labels)])
        itm = matching_loss(torch.cat(negative_and_positive), labels)
        return TrainingOutput(loss=itm + itc, loss_itc=itc.detach(), loss_itm=itm.detach())

    def _encode(
        self,
        tokens: torch.Tensor,
        text_embeds: torch.Tensor | None,
        negative: Texts,
        positive: Texts,
        summarize: Texts,
    ) -> tuple[torch.Tensor, ...]:
        """Return matching logits of negatives and positives, then embeddings of queries, tower and texts."""
        *matched, contrastive = self._read(
            tokens, ("matching", negative), ("matching", positive), self._contrastive_pass(summarize, text_embeds)
        )
        image_embeds, text_embeds = self._contrastive_embeds(*contrastive, summarize.mask, text_embeds)
        logits = [self._matching_logits(queries) for queries, _ in matched]
        return *logits, image_embeds, self._pool(tokens), text_embeds


class InternVLForCaptionTraining(InternVLTrainingModel):
    """Caption fine-tuning: the generative loss alone, as the mean over all labels of an optimiser step."""

    accepts_loss_kwargs = True

    def __init__(self, config: InternVLConfig, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._check_has_queries("Caption fine-tuning")
        self.loss_type = "ForCausalLM"  # so `Trainer` counts the labels that are predicted, which the first is not

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> TrainingOutput:
        """The loss of a batch of images and captions.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids: (B, L), captions with a prefix such as `English caption:` and an end token.
            labels: (B, L), -100 ignored.
            attention_mask: (B, L), derived from `pad_token_id` when absent.
            num_items_in_batch: Labels of all batches of the optimiser step, from `Trainer`; by default those of this
                one.

        Returns:
            `loss`.
        """
        caption = self._texts(input_ids, attention_mask)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        encode = partial(self._encode, num_labels=num_items_in_batch)
        parts = in_chunks(encode, self.grad_cache_chunk_size, pixel_values, caption, labels)
        return TrainingOutput(loss=parts.sum())

    def _encode(
        self,
        pixel_values: torch.Tensor,
        caption: Texts,
        labels: torch.Tensor,
        num_labels: torch.Tensor | int,
    ) -> torch.Tensor:
        """Return the rows' share of the loss (1,)."""
        ((_, text),) = self._read(self._vision_tokens(pixel_values), ("generation", caption))
        return generation_loss(text, labels, self.qllama.lm_head, num_labels)[None]
