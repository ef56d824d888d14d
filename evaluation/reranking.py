"""The nearest candidates of a search, ordered again by InternVL-G's matching head, which sees image and text."""

from collections.abc import Mapping, Sequence

import torch

from .matching import matching_scores
from .metrics import check_finite, ranks_of_matches
from .runs import TaskRun


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
            scores = similarity[near] + _matching(run, pairs)
            check_finite(scores, "A probability that image and text match")
            is_own = torch.tensor([one in set(own) for one in near])
            if is_own.any():
                of_side.append(int(((scores >= scores[is_own].max()) & ~is_own).sum()))
            else:
                of_side.append(int(ranks_of_matches(similarity[None], _is_match(own, len(similarity)))))
        ranks[f"InternVL-G+ITM/{side}"] = torch.tensor(of_side)
    return ranks


def _is_match(own: Sequence[int], count: int) -> torch.Tensor:
    found = torch.zeros(1, count, dtype=torch.bool)
    found[0, list(own)] = True
    return found


def _matching(run: TaskRun, pairs: Sequence[tuple[int, str]]) -> torch.Tensor:
    images = [run.data.items[place].read()[0] for place, _ in pairs]
    return matching_scores(run.model, run.processor, images, [text for _, text in pairs], run.batch_size)
