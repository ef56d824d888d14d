"""Metrics as pure functions: accuracy, recall, exact match, precision and recall of facts, CIDEr."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..synthetic.scenes import Question


CUTS = (1, 5, 10)
LONGEST_NGRAM = 4
SIGMA = 6.0  # of the length penalty of CIDEr-D, in words
SCALE = 10.0
BLOCK_BYTES = 2**27  # of similarities that are held at once
NEIGHBOURS = 10  # of a query, which hubness looks at


# ------------------------------------------------------------------------------------------- classification, retrieval
def accuracy(image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: Sequence[int]) -> float:
    """Computes the share of images (B, E) whose most similar class, of (classes, E), is the one in `labels`.

    Raises:
        ValueError: A similarity is no number.
    """
    similarity = image_embeds @ class_embeds.T
    check_finite(similarity)
    predicted = similarity.argmax(dim=1)
    return (predicted == torch.tensor(labels, device=predicted.device)).float().mean().item()


def check_finite(scores: torch.Tensor, what: str = "A similarity") -> None:
    """Raises a ValueError if a score is no finite number: it would come out as a perfect rank, or as some class."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{what} is not finite: the features that it was computed of are damaged.")


def recalls(similarity: torch.Tensor, is_match: torch.Tensor, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Computes the share of queries with a match among the k most similar items.

    Args:
        similarity: (queries, items).
        is_match: (queries, items), booleans; every query has at least one match.
        cuts: Each k.

    Returns:
        "R@k" for each k. Items as similar as the best match count as ranked before it.

    Raises:
        ValueError: A query has no match.
    """
    rank = ranks_of_matches(similarity, is_match)
    return {f"R@{k}": (rank < k).float().mean().item() for k in cuts}


def ranks_of_matches(similarity: torch.Tensor, is_match: torch.Tensor) -> torch.Tensor:
    """Counts the items before the best match of each query.

    Args:
        similarity: (queries, items).
        is_match: (queries, items), booleans; every query has at least one match.

    Returns:
        (queries,), 0 where a match comes first. Items as similar as the best match count as before it.

    Raises:
        ValueError: A query has no match, or a similarity is no number.
    """
    if not bool(is_match.any(dim=1).all()):
        raise ValueError("Every query needs a match among the items, but a row of `is_match` has none.")
    check_finite(similarity)
    best = similarity.masked_fill(~is_match, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~is_match).sum(dim=1)


def rank_in_blocks(
    queries: torch.Tensor,
    items: torch.Tensor,
    matches: Sequence[Sequence[int]],
    dual_softmax: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks items by their similarity to queries, as many queries at a time as fit into memory.

    Args:
        queries: (queries, E), unit length; may be mapped from a file.
        items: (items, E), likewise.
        matches: The items that match each query.
        dual_softmax: Logit scale with which similarities are weighted by their softmax over all queries (CAMoE,
            arXiv 2109.04290); None leaves them as they are.

    Returns:
        Ranks (queries,) as from `ranks_of_matches`, and the `NEIGHBOURS` most similar items (queries, neighbours).
    """
    rows = max(1, BLOCK_BYTES // (4 * max(1, len(items))))
    shift = None if dual_softmax is None else _log_sums(queries, items, dual_softmax, rows)
    ranks, neighbours = [], []
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ items.T
        if dual_softmax is not None and shift is not None:
            similarity = similarity * torch.exp(dual_softmax * similarity - shift)
        is_match = torch.zeros_like(similarity, dtype=torch.bool)
        for row, own in enumerate(matches[start : start + rows]):
            is_match[row, list(own)] = True
        ranks.append(ranks_of_matches(similarity, is_match))
        neighbours.append(similarity.topk(min(NEIGHBOURS, len(items)), dim=1).indices)
    return torch.cat(ranks), torch.cat(neighbours)


def _log_sums(queries: torch.Tensor, items: torch.Tensor, scale: float, rows: int) -> torch.Tensor:
    """The logarithm of the sum over all queries of exp(scale * similarity), for each item."""
    total = torch.full((len(items),), -torch.inf)
    for start in range(0, len(queries), rows):
        block = torch.logsumexp(scale * (queries[start : start + rows] @ items.T), dim=0)
        total = torch.logaddexp(total, block)
    return total


def hubness(neighbours: torch.Tensor, num_items: int) -> float:
    """Skewness of how often each item is among the nearest of the queries: 0 where none is a hub.

    Args:
        neighbours: (queries, k), as from `rank_in_blocks`.
        num_items: How many items there are.

    Returns:
        The skewness of the k-occurrences (Radovanovic et al. 2010, JMLR 11); 0 where all occur as often.
    """
    counts = torch.bincount(neighbours.flatten(), minlength=num_items).double()
    deviations = counts - counts.mean()
    variance = deviations.square().mean()
    return 0.0 if variance == 0 else float(deviations.pow(3).mean() / variance**1.5)


def mean_per_class(is_right: Sequence[float], labels: Sequence[Any]) -> float:
    """Averages the accuracies of the classes, each with the same weight."""
    by_class: dict[Any, list[float]] = {}
    for right, label in zip(is_right, labels, strict=True):
        by_class.setdefault(label, []).append(right)
    return sum(sum(found) / len(found) for found in by_class.values()) / len(by_class)


def recalls_both_ways(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    texts: Sequence[str],
    cuts: Sequence[int] = CUTS,
    image_of_text: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Computes recalls of images by texts and of texts by images.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (T, E), unit length.
        texts: The T texts; equal texts match each other's images.
        cuts: Each k.
        image_of_text: T indices of images; None pairs the texts with the images in order.

    Returns:
        "image_to_text" and "text_to_image", as from `recalls`.
    """
    number = {text: index for index, text in enumerate(texts)}
    index = torch.tensor([number[text] for text in texts])
    image = torch.arange(len(texts)) if image_of_text is None else torch.tensor(image_of_text)
    has_text = torch.zeros(len(image_embeds), len(texts), dtype=torch.bool)
    has_text[image, index] = True
    is_match = has_text[:, index]
    similarity = image_embeds @ text_embeds.T
    return {
        "image_to_text": recalls(similarity, is_match, cuts),
        "text_to_image": recalls(similarity.T, is_match.T, cuts),
    }


# ------------------------------------------------------------------------------------------------------------- answers
def is_correct(answer: str, expected: str) -> bool:
    """Returns whether an answer equals the expected one, apart from case and surrounding blanks."""
    return answer.strip().lower() == expected.strip().lower()


def accuracy_by_kind(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Counts the correct answers to the questions in the same order.

    Returns:
        For each kind that was asked: "asked", "right", "accuracy", and "most_common_answer", the accuracy of always
        giving the kind's most frequent expected answer, which needs no image.
    """
    report = {}
    pairs = list(zip(questions, answers, strict=True))
    for kind in dict.fromkeys(question.kind for question in questions):
        asked = [(question, answer) for question, answer in pairs if question.kind == kind]
        right = sum(is_correct(answer, question.answer) for question, answer in asked)
        most_common = Counter(question.answer for question, _ in asked).most_common(1)[0][1]
        report[kind] = {
            "asked": len(asked),
            "right": right,
            "accuracy": right / len(asked),
            "most_common_answer": most_common / len(asked),
        }
    return report


# --------------------------------------------------------------------------------------------------------------- boxes
Box = tuple[float, float, float, float]
_BOX = re.compile(r"\[([^\n,]*),([^\n,]*),([^\n,]*),([^\n\]]*)\]")  # as published, in linear time
BOX_SCALE = 1000


def box_in(answer: str, width: float, height: float) -> Box | None:
    """Reads the first box of an answer, `[x1, y1, x2, y2]`, within more brackets or without.

    As in the published evaluation, its numbers are thousandths of the image, or shares of it if their sum is below 4.

    Returns:
        (x1, y1, x2, y2) in pixels of an image of this width and height; None if the first four things in brackets are
        no finite numbers.
    """
    found = _BOX.search(answer)
    if found is None:
        return None
    try:
        x1, y1, x2, y2 = (float(part.strip("[")) for part in found.groups())
    except ValueError:
        return None
    total = x1 + y1 + x2 + y2
    if not math.isfinite(total):
        return None
    scale = BOX_SCALE if total >= 4 else 1
    return x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height


def box_overlap(box: Box | None, other: Box) -> float:
    """Computes what two boxes share over what they cover together (IoU); 0 if the first is none or inside out."""
    if box is None or box[0] >= box[2] or box[1] >= box[3]:
        return 0.0
    sides = [min(box[2 + axis], other[2 + axis]) - max(box[axis], other[axis]) for axis in (0, 1)]
    shared = max(0.0, sides[0]) * max(0.0, sides[1])
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
    return shared / (sum(areas) - shared)


# ------------------------------------------------------------------------------------------------------------ captions
def precision_and_recall(found: Sequence[Counter[Any]], expected: Sequence[Counter[Any]]) -> dict[str, float]:
    """Compares what was found with what should be, each a multiset.

    Returns:
        "precision" (share of all found that is expected), "recall" (share of all expected that is found), and "exact",
        the share of multisets that are equal.
    """
    right = sum((one & other).total() for one, other in zip(found, expected, strict=True))
    exact = sum(one == other for one, other in zip(found, expected, strict=True))
    return {
        "precision": right / max(1, sum(one.total() for one in found)),
        "recall": right / max(1, sum(one.total() for one in expected)),
        "exact": exact / max(1, len(found)),
    }


def words_of(text: str) -> list[str]:
    """Splits a text into lower-case words without punctuation; kana and Chinese characters one by one."""
    return re.findall(r"[\u3041-\u30ff\u4e00-\u9fff]|[^\W\u3041-\u30ff\u4e00-\u9fff]+", text.lower())


def _ngrams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Counts the n-grams of every length."""
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
        for n in range(1, LONGEST_NGRAM + 1)
    ]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Computes CIDEr of each candidate; 10 is the best.

    It is the usually reported variant, CIDEr-D (https://arxiv.org/abs/1411.5726, section 4), over `words_of`.

    Args:
        candidates: One caption per image.
        references: The captions that each image should have. They also define how rare an n-gram is: in how many
            images' references it occurs. With a single image no n-gram is rare, and the score is 0.

    Raises:
        ValueError: There are not as many lists of references as candidates, or a list is empty.
    """
    if len(candidates) != len(references) or not all(references):
        raise ValueError(
            f"Each of the {len(candidates)} candidates needs a list of references, got {len(references)} lists, of "
            f"lengths {sorted({len(texts) for texts in references})}."
        )
    counted = [[_ngrams(words_of(text)) for text in texts] for texts in references]
    images_with = Counter(
        gram for image in counted for gram in {gram for text in image for counts in text for gram in counts}
    )
    log_images = math.log(max(1, len(references)))

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_images - math.log(max(1, images_with[gram]))) for gram, count in counts.items()}

    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        own = _ngrams(words_of(candidate))
        weighted = [weigh(counts) for counts in own]
        total = 0.0
        for text in texts:
            penalty = math.exp(-((own[0].total() - text[0].total()) ** 2) / (2 * SIGMA**2))
            parts = [_clipped_cosine(*pair) for pair in zip(weighted, map(weigh, text), strict=True)]
            total += penalty * sum(parts) / LONGEST_NGRAM
        scores.append(SCALE * total / len(texts))
    return scores


def _clipped_cosine(candidate: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine similarity in which repeating an n-gram more often than the reference does earns nothing."""
    dot = sum(min(candidate[gram], weight) * weight for gram, weight in reference.items() if gram in candidate)
    lengths = [math.sqrt(sum(weight**2 for weight in part.values())) for part in (candidate, reference)]
    return dot / math.prod(lengths) if all(lengths) else 0.0


# -------------------------------------------------------------------------------------------------------- segmentation
def class_areas(
    predicted: torch.Tensor, expected: torch.Tensor, num_classes: int, ignore_index: int = 255
) -> torch.Tensor:
    """Counts the pixels of every class in maps of class indices.

    Args:
        predicted: Any shape.
        expected: The same shape; where it is `ignore_index` nothing counts.
        num_classes: Number of classes.
        ignore_index: Of pixels without a class.

    Returns:
        (3, num_classes): pixels that are right, predicted, expected.
    """
    counted = expected != ignore_index
    predicted, expected = predicted[counted], expected[counted]
    parts = (expected[predicted == expected], predicted, expected)
    return torch.stack([torch.bincount(part, minlength=num_classes) for part in parts])


def mean_iou(areas: np.ndarray) -> np.ndarray:
    """Computes mean intersection over union, over the classes that are predicted or expected anywhere.

    Args:
        areas: (..., 3, classes), as from `class_areas`, summed over the images of a set.

    Returns:
        (...); NaN without any class.
    """
    iou = class_ious(areas)
    present = ~np.isnan(iou)
    number = present.sum(axis=-1)
    return np.where(number > 0, np.nansum(iou, axis=-1) / np.maximum(number, 1), np.nan)


def class_ious(areas: np.ndarray) -> np.ndarray:
    """Computes the IoU of every class (..., classes), NaN for one that is nowhere; for `areas` see `mean_iou`."""
    right, predicted, expected = np.moveaxis(areas, -2, 0)
    union = predicted + expected - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def pixel_accuracy(areas: np.ndarray) -> np.ndarray:
    """Computes the share of pixels with a class that are right (...); for `areas` see `mean_iou`."""
    return areas[..., 0, :].sum(axis=-1) / np.maximum(areas[..., 2, :].sum(axis=-1), 1)


def mean_accuracy(areas: np.ndarray) -> np.ndarray:
    """Computes the share of right pixels of every class that is expected anywhere, and their mean (...); for `areas`
    see `mean_iou`.
    """
    expected = areas[..., 2, :]
    present = expected > 0
    share = np.where(present, areas[..., 0, :] / np.maximum(expected, 1), 0)
    return share.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
