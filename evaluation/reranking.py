"""The nearest candidates of a search, ordered again by InternVL-G's matching head, which sees image and text."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .embeddings import batches, pixel_values_of
from .runs import TaskRun


def matching_texts(processor: ProcessorMixin, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (texts, L) as matching was trained with: without prefix, with an end token, padded on the right."""
    tokenizer = processor.tokenizer
    rows = processor(text=list(texts), mode="caption", padding=False)["input_ids"]
    rows = [torch.tensor([*row[: processor.max_text_length - 1], tokenizer.eos_token_id]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


@torch.inference_mode()
def matching_scores(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    texts: Sequence[str],
) -> torch.Tensor:
    """The probabilities (pairs,) that images and texts, as many of both, belong together, by an InternVL-G."""
    ids, mask = matching_texts(processor, texts)
    pixels = pixel_values_of(model, processor, images)
    logits = model.get_matching_logits(pixels, ids.to(model.device), mask.to(model.device))
    return logits.float().softmax(dim=-1)[:, 1].cpu()


def _scores_of_pairs(run: TaskRun, pairs: Sequence[tuple[int, str]]) -> torch.Tensor:
    found = []
    for batch in batches(pairs, run.batch_size, "matching images and texts"):
        images = [run.data.items[place].read()[0] for place, _ in batch]
        found.append(matching_scores(run.model, run.processor, images, [text for _, text in batch]))
    return torch.cat(found)


def reranked(
    run: TaskRun,
    images: torch.Tensor,
    texts: torch.Tensor,
    captions: Sequence[str],
    sides: Mapping[str, tuple[int, int, Sequence[Sequence[int]]]],
) -> dict[str, torch.Tensor]:
    """Orders the first `rerank` results of each query by matching and similarity together, as BLIP-2 does.

    Args:
        run: Of an InternVL-G; its option `rerank` says how many.
        images: (images, E), unit length.
        texts: (texts, E), unit length.
        captions: The texts.
        sides: Which of the two asks and which is searched, and the matches, by direction.

    Returns:
        Ranks of the best match of every query, by "InternVL-G+ITM/DIRECTION". A match that is none of the candidates
        keeps its rank.
    """
    count = int(run.options["rerank"])
    ranks = {}
    for side, (asking, searched, matches) in sides.items():
        queries, found = (images, texts)[asking], (images, texts)[searched]
        of_side = []
        for query, own in enumerate(matches):
            similarity = queries[query] @ found.T
            near = similarity.topk(min(count, len(found))).indices.tolist()
            pairs = [(query, captions[one]) if asking == 0 else (one, captions[query]) for one in near]
            scores = similarity[near] + _scores_of_pairs(run, pairs)
            is_own = torch.tensor([one in set(own) for one in near])
            if is_own.any():
                of_side.append(int(((scores >= scores[is_own].max()) & ~is_own).sum()))
            else:
                best = similarity[list(own)].max()
                of_side.append(int((similarity >= best).sum()) - 1)
        ranks[f"InternVL-G+ITM/{side}"] = torch.tensor(of_side)
    return ranks
