"""The objectives against slow re-implementations with loops, in fp64, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F

from internvl.training.models.losses import (
    capped_scale,
    draw_hard_negatives,
    generation_loss,
    info_nce_loss,
    matching_loss,
    matryoshka_loss,
    retrieval_loss,
    scaled_similarities,
    sigmoid_loss,
)


NUM_PAIRS = 6


def features(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Images, texts, scale and bias as leaves in fp64."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(NUM_PAIRS, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    return tuple(x.requires_grad_() for x in (F.normalize(images), F.normalize(texts), scale, bias))


def slow_cross_entropy(row: list[torch.Tensor], target: list[float]) -> torch.Tensor:
    total = sum(torch.exp(x) for x in row)
    return -sum(t * (x - torch.log(total)) for x, t in zip(row, target, strict=True))


def slow_symmetric(images, texts, scale, targets: list[list[float] | None]) -> torch.Tensor:
    """Mean over both directions and the rows with a target; the same targets for both, as published."""
    losses = []
    for i, target in enumerate(targets):
        if target is not None:
            losses.append(slow_cross_entropy([scale * (images[i] @ text) for text in texts], target))
            losses.append(slow_cross_entropy([scale * (texts[i] @ image) for image in images], target))
    return sum(losses) / len(losses)


def one_hot(i: int, smoothing: float = 0.0) -> list[float]:
    return [smoothing / NUM_PAIRS + (1 - smoothing) * (j == i) for j in range(NUM_PAIRS)]


def slow_sigmoid(images, texts, scale, bias) -> torch.Tensor:
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = scale * (image @ text) + bias
            total = total + torch.log(1 + torch.exp(-logit if i == j else logit))
    return total / len(images)


def gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


def assert_same_loss_and_gradients(found, wanted, leaves) -> None:
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_info_nce_is_the_mean_cross_entropy_of_both_directions(smoothing, chunk_size):
    leaves = features()
    found = info_nce_loss(*leaves[:3], label_smoothing=smoothing, chunk_size=chunk_size)
    wanted = slow_symmetric(*leaves[:3], [one_hot(i, smoothing) for i in range(NUM_PAIRS)])
    assert_same_loss_and_gradients(found, wanted, leaves)


def test_ignored_pairs_have_no_row_but_stay_columns():
    leaves = features()
    is_ignored = torch.tensor([False, True, False, False, True, False])
    found = info_nce_loss(*leaves[:3], is_ignored=is_ignored)
    wanted = slow_symmetric(*leaves[:3], [None if is_ignored[i] else one_hot(i) for i in range(NUM_PAIRS)])
    assert_same_loss_and_gradients(found, wanted, leaves)


def test_a_batch_without_a_row_that_counts_has_the_loss_zero():
    leaves = features()
    losses = [
        info_nce_loss(*leaves[:3], is_ignored=torch.ones(NUM_PAIRS, dtype=torch.bool)),
        matching_loss(leaves[0][:, :2], torch.full((NUM_PAIRS,), -100)),
        generation_loss(leaves[0][None], torch.full((1, NUM_PAIRS), -100), lambda x: x),
    ]
    for loss in losses:
        assert loss == 0
        assert all((g == 0).all() for g in gradients(loss, leaves))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_captions_of_one_image_share_the_target_of_retrieval(chunk_size):
    leaves = features()
    ids = [7, 3, 7, 5, 7, 3]
    targets = [[(ids[j] == ids[i]) / ids.count(ids[i]) for j in range(NUM_PAIRS)] for i in range(NUM_PAIRS)]
    found = retrieval_loss(*leaves[:3], torch.tensor(ids), chunk_size=chunk_size)
    assert_same_loss_and_gradients(found, slow_symmetric(*leaves[:3], targets), leaves)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_sigmoid_loss_asks_of_every_image_and_text_whether_they_are_a_pair(chunk_size):
    leaves = features()
    found = sigmoid_loss(*leaves, chunk_size=chunk_size)
    assert_same_loss_and_gradients(found, slow_sigmoid(*leaves), leaves)


@pytest.mark.parametrize("name", ["info_nce", "info_nce smoothed", "retrieval", "sigmoid"])
def test_mean_of_the_losses_of_three_processes_is_the_loss_of_the_whole_batch(name):
    leaves = features()
    images, texts, scale, bias = leaves
    ids = torch.tensor([1, 2, 1, 3, 3, 1])

    def loss_of(rows: slice, rank: int, gather) -> torch.Tensor:
        pair = (images[rows], texts[rows])
        if name == "retrieval":
            return retrieval_loss(*pair, scale, ids[rows], gather)
        if name == "sigmoid":
            return sigmoid_loss(*pair, scale, bias, gather, rank, chunk_size=4)
        return info_nce_loss(*pair, scale, gather, rank, label_smoothing=0.2 if "smoothed" in name else 0.0)

    def loss_of_rank(rank: int) -> torch.Tensor:
        rows = slice(2 * rank, 2 * rank + 2)
        wholes = {images[rows]: images, texts[rows]: texts, ids[rows]: ids}

        def gather(own: torch.Tensor) -> torch.Tensor:
            return next(whole for part, whole in wholes.items() if part.shape == own.shape and torch.equal(part, own))

        return loss_of(rows, rank, gather)

    whole = loss_of(slice(None), 0, lambda rows: rows)
    assert_same_loss_and_gradients(sum(loss_of_rank(rank) for rank in range(3)) / 3, whole, leaves)


@pytest.mark.parametrize("dims", [(5, 3, 1), (3, 1)])
def test_matryoshka_loss_is_the_mean_over_vectors_cut_to_every_length_and_whole(dims):
    images, texts, scale, _ = leaves = features()
    found = matryoshka_loss(lambda *cut: info_nce_loss(*cut, scale), images, texts, dims)
    targets = [one_hot(i) for i in range(NUM_PAIRS)]
    wanted = slow_symmetric(images, texts, scale, targets)
    for size in (3, 1):
        cut = ([row[:size] / row[:size].norm() for row in rows] for rows in (images, texts))
        wanted = wanted + slow_symmetric(*cut, scale, targets)
    wanted = wanted / 3
    assert_same_loss_and_gradients(found, wanted, leaves)


def test_without_lengths_the_matryoshka_loss_is_that_of_whole_vectors():
    images, texts, scale, _ = features()
    found = matryoshka_loss(lambda *cut: info_nce_loss(*cut, scale), images, texts, None)
    assert torch.equal(found, info_nce_loss(images, texts, scale))


def test_matching_loss_is_the_mean_over_the_rows_that_count():
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    found = matching_loss(logits, torch.tensor([0, 1, -100, 1]))
    targets = {0: [1.0, 0.0], 1: [0.0, 1.0], 3: [0.0, 1.0]}
    wanted = sum(slow_cross_entropy(list(logits[i]), target) for i, target in targets.items()) / 3
    assert_same_loss_and_gradients(found, wanted, (logits,))


def test_generation_makes_logits_at_label_positions_only():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[4, -100, 2, 6, -100], [-100, -100, -100, 0, 1]])
    seen = []

    def lm_head(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states @ weight.T

    found = generation_loss(hidden, labels, lm_head)
    wanted = F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same_loss_and_gradients(found, wanted, (hidden, weight))
    assert torch.equal(seen[0], hidden[[0, 0, 1, 1], [1, 2, 2, 3]])


def test_parts_of_a_generative_loss_add_up_to_the_whole():
    hidden, labels = torch.randn(3, 5, 8), torch.randint(0, 8, (3, 5))
    labels[0, 2:] = -100
    count = (labels[:, 1:] != -100).sum()
    parts = [generation_loss(hidden[i : i + 1], labels[i : i + 1], lambda x: x, count) for i in range(3)]
    torch.testing.assert_close(sum(parts), generation_loss(hidden, labels, lambda x: x))


def test_hard_negatives_follow_the_similarities_among_the_candidates():
    similarities = torch.tensor([[9.0, 1.0, 0.0, 5.0], [0.0, 9.0, 2.0, 2.0]]).repeat(4000, 1)
    is_candidate = torch.tensor([[False, True, True, False], [True, False, True, True]]).repeat(4000, 1)
    drawn, has_candidate = draw_hard_negatives(similarities, is_candidate, torch.Generator().manual_seed(0))
    assert has_candidate.all()
    for row, weights in enumerate([{1: math.e, 2: 1.0}, {0: 1.0, 2: math.e**2, 3: math.e**2}]):
        counts = torch.bincount(drawn[row::2], minlength=4) / 4000
        wanted = torch.tensor([weights.get(j, 0.0) / sum(weights.values()) for j in range(4)])
        torch.testing.assert_close(counts, wanted, atol=0.03, rtol=0)
        assert set(drawn[row::2].tolist()) == set(weights)


def test_hard_negatives_are_the_same_for_the_same_generator_and_missing_ones_are_told():
    similarities = torch.randn(3, 8)
    is_candidate = torch.ones(3, 8, dtype=torch.bool)
    is_candidate[1] = False
    draws = [draw_hard_negatives(similarities, is_candidate, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][1].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("exponent", "direction", "passes"), [(1.0, 1, True), (1.0, -1, True), (6.0, 1, True), (6.0, -1, False)]
)
def test_the_scale_is_capped_and_only_a_step_back_passes_beyond_the_cap(exponent, direction, passes):
    logit_scale = torch.tensor(exponent, requires_grad=True)
    scale = capped_scale(logit_scale, 100.0)
    wanted = min(math.exp(exponent), 100.0)
    torch.testing.assert_close(scale, torch.tensor(wanted))
    (direction * scale).backward()  # descent lowers the scale where `direction` is 1
    torch.testing.assert_close(logit_scale.grad, torch.tensor(direction * wanted if passes else 0.0))


def test_similarities_are_exact_to_fp32_under_autocast():
    images, texts = F.normalize(torch.randn(4, 32)), F.normalize(torch.randn(4, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (images @ texts.T).dtype == torch.bfloat16  # else this would compare nothing
        found = scaled_similarities(images, texts, torch.tensor(100.0))
    torch.testing.assert_close(found, 100 * images @ texts.T)
