"""Image-text pairs to the batches of stage 2, of retrieval and of caption fine-tuning; stage 1's are those of
`PairCollator`.

Every text has a fixed length, so that batches of all processes have one shape, unless asked otherwise. Each row of
`PairStream` becomes:

- `positive_*`, the caption for matching, with an end token;
- `summarize_*`, the caption with the prefix `summarize:` and an end token, for the contrastive loss;
- `input_ids` and `labels`, the caption with a prompt such as `English caption:` (the pair's own `prompt`, or the
  processor's) and an end token, for generation: the caption and its end are learned, the prompt and padding are not.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ...layers_internvl import IGNORE_INDEX
from ...processing_internvl import InternVLProcessor
from ...renaming_internvl import renamed_names
from ...rows.texts import simple_caption
from .negatives import CaptionPool
from .pairs import Augment, ImageCollator


PADDINGS = ("max_length", "longest")


def image_number(image: Image.Image) -> int:
    """A number that equal images share on all processes: 63 bits of a digest of size and pixels."""
    digest = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _length_of_start(row: list[int], start: list[int]) -> int:
    """How many tokens a row begins with that `start` begins with."""
    pairs = zip(row, start, strict=False)
    return next((i for i, (found, wanted) in enumerate(pairs) if found != wanted), len(start))


class GenerativeCollator(ImageCollator):
    """Pairs to inputs of `InternVLForGenerativeTraining`.

    Args:
        processor: Of the model.
        max_length: Tokens of every text at most, prefix and end token included.
        padding: "max_length" (published) makes all texts that long, "longest" as long as the longest of their kind in
            the batch.
        augment: Makes the training image of a pair; None takes its image as it is.
        **settings: Of the image processor, `size` for instance.

    Raises:
        ValueError: An unknown `padding`, or if `max_length` leaves no room for a caption.
    """

    def __init__(
        self,
        processor: InternVLProcessor,
        max_length: int = 80,
        padding: str = "max_length",
        augment: Augment | None = None,
        **settings: Any,
    ) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"`padding` must be one of {list(PADDINGS)}, got {padding!r}.")
        super().__init__(processor, augment, **settings)
        self.max_length = max_length
        self.padding = padding
        longest = max(*self.prefix_lengths().values(), len(self._rows([processor.caption_prompt])[0]) + 1)
        if max_length <= longest:
            raise ValueError(
                f"`max_length` must be above {longest}, which prefixes and end token take, got {max_length}."
            )

    def prefix_lengths(self) -> dict[str, int]:
        """Tokens of texts without a caption, for the training model to know empty texts by."""
        summary = self.processor(text=[""], mode="contrastive", padding=False)["input_ids"][0]
        return {"matching_prefix_length": len(self._rows([""])[0]) + 1, "summarize_prefix_length": len(summary)}

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prepares a batch.

        Args:
            pairs: B of them, as from `PairStream`.

        Returns:
            `pixel_values` (B, 3, H, W); ids and masks (B, L) of the three texts; `labels` (B, L).
        """
        return {**self._contrastive_and_matching(pairs), **self._generation(pairs)}

    def _images(self, pairs: Sequence[dict[str, Any]]) -> list[Image.Image]:
        return [self.training_image(pair) for pair in pairs]

    def _contrastive_and_matching(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images, texts = self._images(pairs), [pair["text"] for pair in pairs]
        settings = {"padding": self.padding, "max_length": self.max_length, "return_tensors": "pt", **self.settings}
        features = self.processor(images=images, text=texts, mode="contrastive", **settings)
        positive_ids, positive_mask = self._padded(self._rows(texts))
        return {
            "pixel_values": features["pixel_values"],
            "positive_input_ids": positive_ids,
            "positive_attention_mask": positive_mask,
            "summarize_input_ids": features["input_ids"],
            "summarize_attention_mask": features["attention_mask"],
        }

    def _generation(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # The prompt is tokenized with its caption, as one text; what both begin with is the prompt.
        prompts = [pair.get("prompt", self.processor.caption_prompt) for pair in pairs]
        rows = self._rows([f"{prompt} {pair['text']}" for prompt, pair in zip(prompts, pairs, strict=True)])
        ids, mask = self._padded(rows)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        for row, prompt_ids, label in zip(rows, self._rows(prompts), labels, strict=True):
            label[: _length_of_start(row, prompt_ids)] = IGNORE_INDEX
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _rows(self, texts: list[str]) -> list[list[int]]:
        """Ids without an end token, whatever the tokenizer adds."""
        return self.processor(text=texts, mode="caption", padding=False)["input_ids"]

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids with an end token and masks (B, L), padded on the right; texts that are too long lose their end."""
        tokenizer = self.processor.tokenizer
        rows = [[*row[: self.max_length - 1], tokenizer.eos_token_id] for row in rows]
        length = max(map(len, rows)) if self.padding == "longest" else self.max_length
        ids = torch.full((len(rows), length), tokenizer.pad_token_id or 0)  # the model goes by the mask
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids, mask


class RetrievalCollator(GenerativeCollator):
    """Pairs to inputs of `InternVLForRetrievalTraining`: without the texts of generation, with `image_ids` (B,).

    Images are told apart by their pixels, so the captions of one image may stand in rows of their own.

    Args:
        processor: Of the model.
        max_length: As in `GenerativeCollator`.
        pool: Captions to draw `negative_*` from, one for each image; None leaves it to the model to draw similar ones
            of the batch.
        seed: Decides what is drawn.
        simple_captions: Simplify all texts, see `texts.simple_caption`.
        **settings: As for `GenerativeCollator`.
    """

    def __init__(
        self,
        processor: InternVLProcessor,
        max_length: int = 80,
        pool: CaptionPool | None = None,
        seed: int = 0,
        simple_captions: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(processor, max_length, **settings)
        self.pool = pool
        self.seed = seed
        self.simplify = simple_caption if simple_captions else str

    def prepare(self, pair: dict[str, Any]) -> dict[str, Any]:
        """As in `ImageCollator`, after the image as it is stored was given its number."""
        return {**super().prepare(pair), "image_number": self._number_of(pair)}

    def _number_of(self, pair: dict[str, Any]) -> int:
        return pair["image_number"] if pair.get("is_prepared") else image_number(pair.get("stored", pair["image"]))

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        image_ids = torch.tensor([self._number_of(pair) for pair in pairs])
        simple = [{**pair, "text": self.simplify(pair["text"])} for pair in pairs]
        batch = {**self._contrastive_and_matching(simple), "image_ids": image_ids}
        if self.pool is not None:
            texts = [self.simplify(self.pool.draw(pair, self.seed)) for pair in pairs]
            batch["negative_input_ids"], batch["negative_attention_mask"] = self._padded(self._rows(texts))
        return batch


class CaptionCollator(GenerativeCollator):
    """Pairs to inputs of `InternVLForCaptionTraining`: images, and the texts of generation with their `labels`."""

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = self.processor.image_processor(self._images(pairs), return_tensors="pt", **self.settings)
        return {"pixel_values": images["pixel_values"], **self._generation(pairs)}


__getattr__ = renamed_names(globals(), picture_number="image_number")
