"""Gradient caching: a large batch in small memory gives the gradients of the uncached batch, on one process and on
two.
"""

import pytest
import torch
from torch import nn

from internvl.training.models.gradient_cache import in_chunks
from internvl.training.models.pretraining import (
    InternVLForCaptionTraining,
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)

from . import tiny, two_processes
from .training_models import caption_batch, contrastive_batch, generative_batch, retrieval_batch, tiny_model


def without_negatives(inputs: dict) -> dict[str, torch.Tensor]:
    return {key: value for key, value in inputs.items() if not key.startswith("negative")}


STAGES = {
    "softmax": (InternVLForContrastiveTraining, contrastive_batch, {}),
    "sigmoid": (InternVLForContrastiveTraining, contrastive_batch, {"objective": "sigmoid"}),
    "stage 2": (InternVLForGenerativeTraining, generative_batch, {"matching_prefix_length": 4}),
    "retrieval": (InternVLForRetrievalTraining, retrieval_batch, {}),
    "stage 2, negatives drawn": (InternVLForGenerativeTraining, lambda: without_negatives(generative_batch()), {}),
    "retrieval, negatives drawn": (InternVLForRetrievalTraining, lambda: without_negatives(retrieval_batch()), {}),
    "captions": (InternVLForCaptionTraining, caption_batch, {}),
}


def loss_and_gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of drawn negatives and dropped parts
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | two_processes.gradients(model)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "layers checkpointed too"])
@pytest.mark.parametrize("name", STAGES)
def test_cached_gradients_are_those_of_the_uncached_batch(name, checkpointed):
    cls, batch, settings = STAGES[name]
    wanted = loss_and_gradients(tiny_model(cls, **settings), batch())
    model = tiny_model(cls, **settings, grad_cache_chunk_size=2)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = loss_and_gradients(model, batch())
    assert set(found) == set(wanted)
    assert max(g.abs().max() for g in wanted.values()) > 0.1
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_two_processes_with_caching_train_as_one_without(objective, on_two):
    model = tiny_model(InternVLForContrastiveTraining, objective=objective)
    wanted = loss_and_gradients(model, {"pixel_values": tiny.pixels(6), "input_ids": tiny.text_ids(6)})
    ranks = [rank["contrastive"][objective] for rank in on_two]
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, wanted.pop("loss"))
    for key, value in wanted.items():  # DDP has averaged
        for rank in ranks:
            torch.testing.assert_close(
                rank[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_random_numbers_of_a_chunk_are_replayed():
    """The gradient of w in sum(dropout(x * w)) shows which rows were kept; if the second pass drew anew, it would not
    fit the sum.
    """
    x, w = torch.rand(12, 50) + 1, torch.ones(50, requires_grad=True)
    torch.manual_seed(3)
    out = in_chunks(lambda rows: nn.functional.dropout((rows * w).exp(), 0.5), 4, x)
    out.sum().backward()
    torch.testing.assert_close(w.grad, (out * x).sum(0).detach())


def test_stochastic_depth_and_dropped_patches_are_replayed():
    def run(grad_cache_chunk_size: int | None) -> dict:
        model = tiny_model(
            InternVLForContrastiveTraining, patch_drop_rate=0.5, grad_cache_chunk_size=grad_cache_chunk_size
        )
        for layer in model.vision_model.encoder.layers:
            layer.drop_path1.rate = layer.drop_path2.rate = 0.4
        if grad_cache_chunk_size is None:  # the same chunks with their activations kept
            encode = model._image_embeds
            model._image_embeds = lambda pixels: torch.cat([encode(rows) for rows in pixels.split(2)])
        return loss_and_gradients(model, contrastive_batch())

    wanted, found = run(None), run(2)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)


def test_one_chunk_is_computed_again_at_a_time_and_no_activations_are_kept():
    weight = torch.randn(64, 64, requires_grad=True)
    events = []

    def encode(rows: torch.Tensor) -> torch.Tensor:
        number = int(rows[0, 0])
        events.append(f"run {number}")
        hidden = rows @ weight
        hidden.register_hook(lambda _: events.append(f"gradient {number}"))
        for _ in range(20):
            hidden = (hidden / 8).sin()
        return hidden.sum(1, keepdim=True)

    kept = []
    rows = torch.arange(6.0)[:, None].expand(-1, 64).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = in_chunks(encode, 2, rows)
        assert sum(kept) <= rows.numel()  # the inputs
        kept.clear()
        encode(rows)
        assert sum(kept) > 20 * rows.numel()  # what the test would see if nothing were cached
    del events[:]
    out.sum().backward()
    assert events == ["run 4", "gradient 4", "run 2", "gradient 2", "run 0", "gradient 0"]


def test_chunks_are_of_any_number_of_tensors_and_may_lack_some():
    x = torch.arange(5.0)[:, None]

    def function(rows: torch.Tensor, extra: None) -> tuple[torch.Tensor, torch.Tensor]:
        assert extra is None
        return rows + 1, rows.sum()[None]

    whole, parts = in_chunks(function, 2, x, None)
    assert torch.equal(whole, x + 1)
    assert parts.tolist() == [1.0, 5.0, 4.0]


@pytest.mark.parametrize(
    ("rows", "inputs", "message"),
    [
        (0, [torch.zeros(2)], "`chunk_size` must be at least 1, got 0"),
        (1, [torch.zeros(2), torch.zeros(3)], r"one length, got \[2, 3\]"),
    ],
)
def test_impossible_chunks_are_refused(rows, inputs, message):
    with pytest.raises(ValueError, match=message):
        in_chunks(lambda *x: x[0], rows, *inputs)
