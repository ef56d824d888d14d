"""InternVL-C and -G: contrastive features, matching, captions."""

import pytest
import torch
import torch.nn.functional as F

from . import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.internvl_model()


def padded(ids: torch.Tensor, side: str, pad_id: int, amount: int = 3):
    pad, mask = torch.full((len(ids), amount), pad_id), torch.ones_like(ids)
    parts = ([pad, ids], [0 * pad, mask]) if side == "left" else ([ids, pad], [mask, 0 * pad])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


@pytest.mark.parametrize("pad_id", [0, 2, 77])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_text_features(model, side, pad_id):
    ids = tiny.text_ids(3, 6)
    expected = model.get_text_features(ids, torch.ones_like(ids))
    torch.testing.assert_close(model.get_text_features(*padded(ids, side, pad_id)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_of_a_batch_equal_one_by_one(model):
    rows = [tiny.text_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch = tiny.pad(rows, "left")
    together = model.get_text_features(**batch)
    alone = torch.cat([model.get_text_features(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mask_is_derived_from_the_configured_pad_id():
    model = tiny.internvl_model()
    ids = tiny.text_ids(2, 5)
    model.config.qllama_config.pad_token_id = 88
    got = model.get_text_features(padded(ids, "right", 88)[0])
    torch.testing.assert_close(got, model.get_text_features(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_feature_is_the_projected_state_of_the_last_token(model):
    ids = tiny.text_ids(2, 5)
    states = model.qllama.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.get_text_features(ids), states[:, -1] @ model.text_projection)


@torch.no_grad()
def test_g_is_the_sum_of_two_unit_vectors_and_c_is_one_of_them(model):
    pictures = tiny.pixels()
    c, g = model.get_image_features(pictures, mode="InternVL-C"), model.get_image_features(pictures, mode="InternVL-G")
    queries = model.clip_projector2(model.get_query_features(pictures))
    torch.testing.assert_close(g, F.normalize(queries, dim=-1) + F.normalize(c, dim=-1))
    assert torch.equal(model.encode_image(pictures, mode="InternVL-G"), g)
    assert torch.equal(model.get_image_features(pictures, mode="G"), g)


@torch.no_grad()
def test_logits_are_scaled_cosines_and_the_published_call_gives_the_pair(model):
    pictures, ids = tiny.pixels(), tiny.text_ids(4)
    for mode in ("InternVL-C", "InternVL-G"):
        image, text = model.get_image_features(pictures, mode=mode), model.get_text_features(ids)
        cosines = torch.stack([torch.stack([F.cosine_similarity(i, t, dim=0) for t in text]) for i in image])
        outputs = model(pixel_values=pictures, input_ids=ids, mode=mode)
        torch.testing.assert_close(outputs.logits_per_image, cosines * model.logit_scale.exp(), atol=1e-5, rtol=1e-5)
        per_image, per_text = model(image=pictures, text=ids, mode=mode)
        assert torch.equal(per_image, outputs.logits_per_image)
        assert torch.equal(per_text, outputs.logits_per_text)


def test_return_loss_is_symmetric_infonce(model):
    outputs = model(pixel_values=tiny.pixels(), input_ids=tiny.text_ids(3), return_loss=True)
    logits, by_hand = outputs.logits_per_image, 0.0
    for i in range(3):
        by_hand -= (logits[i, i] - logits[i].logsumexp(0) + logits[i, i] - logits[:, i].logsumexp(0)) / 6
    torch.testing.assert_close(outputs.loss, by_hand)
    outputs.loss.backward()
    assert all(
        p.grad is not None for p in (model.logit_scale, model.text_projection, model.clip_projector.cross_attn.q_bias)
    )
    model.zero_grad()


@torch.no_grad()
def test_matching_sees_picture_and_text_and_no_padding(model):
    pictures, ids = tiny.pixels(), tiny.text_ids(3, 6)
    scores = model.get_matching_logits(pictures, ids)
    assert scores.shape == (3, 2)
    for side in ("left", "right"):
        torch.testing.assert_close(
            model.get_matching_logits(pictures, *padded(ids, side, 0)), scores, atol=1e-5, rtol=1e-5
        )
    assert (model.get_matching_logits(pictures.flip(0), ids) - scores).abs().max() > 1e-3
    assert (model.get_matching_logits(pictures, (ids + 1) % 80) - scores).abs().max() > 1e-3


def test_captions_hold_no_prompt_and_batch_equals_single(model):
    pictures, settings = tiny.pixels(), {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    rows = [tiny.text_ids(1, length, seed=length)[0] for length in (2, 5, 3)]
    batch = model.generate(pixel_values=pictures, **tiny.pad(rows, "left"), **settings)
    assert batch.shape == (3, 6)
    for i, row in enumerate(rows):
        alone = model.generate(pixel_values=pictures[i : i + 1], input_ids=row[None], **settings)
        assert torch.equal(alone[0], batch[i])
    with_scores = model.generate(
        pixel_values=pictures, **tiny.pad(rows, "left"), **settings, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(with_scores.sequences, batch)
    assert len(with_scores.scores) == 6
    beams = model.generate(
        pixel_values=pictures, **tiny.pad(rows, "left"), **settings, num_beams=3, num_return_sequences=2
    )
    assert beams.shape == (6, 6)
    assert model.generate(pixel_values=pictures, **settings).shape == (3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(pixel_values=tiny.pixels()), "needs both `pixel_values` and `input_ids`"),
        (
            lambda m: m(pixel_values=tiny.pixels(), input_ids=tiny.text_ids(), mode="D"),
            r"`mode` must be one of .*, got 'D'",
        ),
        (
            lambda m: m(pixel_values=tiny.pixels(2), input_ids=tiny.text_ids(), return_loss=True),
            "got 2 pictures and 3 texts",
        ),
        (lambda m: m.get_text_features(torch.zeros(1, 4).long()), "a row is all padding"),
        (lambda m: m.generate(input_ids=tiny.text_ids()), "needs `pixel_values`"),
    ],
)
def test_unfitting_input_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
