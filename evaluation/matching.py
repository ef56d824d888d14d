"""Whether images and texts match, by the matching head (ITM) of an InternVL-G, which sees both at once."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from ..processing_internvl import InternVLProcessor
from .embeddings import batches, pixel_values_of


def matching_texts(processor: InternVLProcessor, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask (B, L) as in training: without a prefix, with an end token, padded on the right."""
    end = processor.tokenizer.eos_token_id
    rows = processor(text=list(texts), mode="caption", padding=False)["input_ids"]
    ids = [torch.tensor([*row[: processor.max_text_length - 1], end]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask


@torch.inference_mode()
def matching_scores(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    batch_size: int = 64,
) -> torch.Tensor:
    """Computes how likely each image matches the text in its place.

    Args:
        model: An InternVL-G.
        processor: Its processor.
        images: B of them, or one for all texts.
        texts: B of them.
        batch_size: Pairs at a time.

    Returns:
        Probabilities (B,) on the CPU.
    """
    shared = pixel_values_of(model, processor, images) if len(images) == 1 else None
    found = []
    for batch in batches(range(len(texts)), batch_size, "matching"):
        pixels = pixel_values_of(model, processor, [images[place] for place in batch]) if shared is None else shared
        ids, mask = (x.to(model.device) for x in matching_texts(processor, [texts[place] for place in batch]))
        logits = model.get_matching_logits(pixels, ids, mask)
        found.append(logits.float().softmax(dim=-1)[:, 1].cpu())
    return torch.cat(found) if found else torch.zeros(0)
