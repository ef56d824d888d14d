"""InternVL-C and -G: contrastive features, matching, captions; and InternVL-C alone, as stage 1 makes it."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from internvl.modeling_internvl import InternVLModel

from . import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.internvl_model()


@pytest.fixture(scope="module")
def c_alone():
    return tiny.internvl_model(num_query_token=0)


@pytest.fixture(params=["C and G", "C alone"])
def text_model(request, model, c_alone):
    return model if request.param == "C and G" else c_alone


def padded(ids: torch.Tensor, side: str, pad_id: int, amount: int = 3):
    pad, mask = torch.full((len(ids), amount), pad_id), torch.ones_like(ids)
    parts = ([pad, ids], [0 * pad, mask]) if side == "left" else ([ids, pad], [mask, 0 * pad])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


@pytest.mark.parametrize("pad_id", [0, 2, 77])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_text_features(text_model, side, pad_id):
    ids = tiny.summary_ids(3, 6)
    expected = text_model.get_text_features(ids, torch.ones_like(ids))
    got = text_model.get_text_features(*padded(ids, side, pad_id))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_of_a_batch_equal_one_by_one(text_model):
    rows = [tiny.summary_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch = tiny.pad(rows, "left")
    together = text_model.get_text_features(**batch)
    alone = torch.cat([text_model.get_text_features(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_queries", [0, 5])
@torch.no_grad()
def test_the_mask_is_derived_from_the_configured_pad_id(num_queries):
    model = tiny.internvl_model(num_query_token=num_queries)
    ids = tiny.summary_ids(2, 5)
    model.config.qllama_config.pad_token_id = 88
    got = model.get_text_features(padded(ids, "right", 88)[0])
    torch.testing.assert_close(got, model.get_text_features(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_feature_is_the_projected_state_of_the_last_token(model):
    ids = tiny.summary_ids(2, 5)
    states = model.qllama.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.get_text_features(ids), states[:, -1] @ model.text_projection)


@torch.no_grad()
def test_g_is_the_sum_of_two_unit_vectors_and_c_is_one_of_them(model):
    images = tiny.pixels()
    c, g = model.get_image_features(images, mode="InternVL-C"), model.get_image_features(images, mode="InternVL-G")
    queries = model.clip_projector2(model.get_query_features(images))
    torch.testing.assert_close(g, F.normalize(queries, dim=-1) + F.normalize(c, dim=-1))
    assert torch.equal(model.encode_image(images, mode="InternVL-G"), g)
    assert torch.equal(model.get_image_features(images, mode="G"), g)


@torch.no_grad()
def test_logits_are_scaled_cosines_and_the_published_call_gives_the_pair(model):
    images, ids = tiny.pixels(), tiny.summary_ids(4)
    for mode in ("InternVL-C", "InternVL-G"):
        image, text = model.get_image_features(images, mode=mode), model.get_text_features(ids)
        cosines = torch.stack([torch.stack([F.cosine_similarity(i, t, dim=0) for t in text]) for i in image])
        outputs = model(pixel_values=images, input_ids=ids, mode=mode)
        torch.testing.assert_close(outputs.logits_per_image, cosines * model.logit_scale.exp(), atol=1e-5, rtol=1e-5)
        per_image, per_text = model(image=images, text=ids, mode=mode)
        assert torch.equal(per_image, outputs.logits_per_image)
        assert torch.equal(per_text, outputs.logits_per_text)


def test_return_loss_is_symmetric_infonce(model):
    outputs = model(pixel_values=tiny.pixels(), input_ids=tiny.summary_ids(3), return_loss=True)
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
def test_matching_sees_image_and_text_and_no_padding(model):
    images, ids = tiny.pixels(), tiny.summary_ids(3, 6)
    scores = model.get_matching_logits(images, ids)
    assert scores.shape == (3, 2)
    for side in ("left", "right"):
        torch.testing.assert_close(
            model.get_matching_logits(images, *padded(ids, side, 0)), scores, atol=1e-5, rtol=1e-5
        )
    assert (model.get_matching_logits(images.flip(0), ids) - scores).abs().max() > 1e-3
    assert (model.get_matching_logits(images, (ids + 1) % 80) - scores).abs().max() > 1e-3


@torch.no_grad()
def test_texts_of_one_image_share_its_keys_and_values(model):
    images, ids = tiny.pixels(2), tiny.summary_ids(6)
    rows = []
    hook = model.qllama.model.layers[0].cross_attn.k_proj.register_forward_hook(
        lambda m, given, _: rows.append(len(given[0]))
    )
    together = model.get_matching_logits(images, ids)
    copied = model.get_matching_logits(images.repeat_interleave(3, dim=0), ids)
    model.generate(pixel_values=images, num_beams=3, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    hook.remove()
    assert rows == [2, 6, 2]
    torch.testing.assert_close(together, copied, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="got 5 rows for 2 images"):
        model.get_matching_logits(images, ids[:5])


def test_a_checkpoint_of_the_sigmoid_loss_loads_without_a_word_about_its_bias(c_alone, tmp_path):
    c_alone.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for name, expected in (("logit_bias", set()), ("logit_bias_of_another", {"logit_bias_of_another"})):
        save_file({**c_alone.state_dict(), name: torch.tensor(-10.0)}, file, metadata={"format": "pt"})
        _, info = InternVLModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["unexpected_keys"]) == expected


def test_captions_hold_no_prompt_and_batch_equals_single(model):
    images, settings = tiny.pixels(), {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    rows = [tiny.summary_ids(1, length, seed=length)[0] for length in (2, 5, 3)]
    batch = model.generate(pixel_values=images, **tiny.pad(rows, "left"), **settings)
    assert batch.shape == (3, 6)
    for i, row in enumerate(rows):
        alone = model.generate(pixel_values=images[i : i + 1], input_ids=row[None], **settings)
        assert torch.equal(alone[0], batch[i])
    with_scores = model.generate(
        pixel_values=images, **tiny.pad(rows, "left"), **settings, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(with_scores.sequences, batch)
    assert len(with_scores.scores) == 6
    beams = model.generate(
        pixel_values=images, **tiny.pad(rows, "left"), **settings, num_beams=3, num_return_sequences=2
    )
    assert beams.shape == (6, 6)
    assert model.generate(pixel_values=images, **settings).shape == (3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(pixel_values=tiny.pixels()), "needs both `pixel_values` and `input_ids`"),
        (
            lambda m: m(pixel_values=tiny.pixels(), input_ids=tiny.summary_ids(), mode="D"),
            r"`mode` must be one of .*, got 'D'",
        ),
        (
            lambda m: m(pixel_values=tiny.pixels(2), input_ids=tiny.summary_ids(), return_loss=True),
            "got 2 images and 3 texts",
        ),
        (lambda m: m.get_text_features(torch.zeros(1, 4).long()), "a row is all padding"),
        (lambda m: m.generate(input_ids=tiny.summary_ids()), "needs `pixel_values`"),
    ],
)
def test_unfitting_input_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_c_alone_has_no_part_of_the_queries(c_alone, model):
    absent = {name for name, _ in model.named_parameters()} - {name for name, _ in c_alone.named_parameters()}
    of_queries = (
        r"query_tokens|clip_projector2\..*|itm_head\..*|qllama\.lm_head\.weight|"
        r"qllama\.model\.layers\.\d\.cross_attn\..*"
    )
    assert absent
    assert all(re.fullmatch(of_queries, name) for name in absent)
    assert not any(re.fullmatch(of_queries, name) for name, _ in c_alone.named_parameters())


def test_trainer_takes_steps_with_c_alone(tmp_path):
    model = tiny.internvl_model(num_query_token=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, ids = tiny.pixels(4), tiny.summary_ids(4)
    pairs = [{"pixel_values": image, "input_ids": row} for image, row in zip(images, ids, strict=True)]

    def collate(samples: list[dict]) -> dict:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]} | {"return_loss": True}

    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", **settings)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=pairs)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_the_full_model_starts_from_stage_1(c_alone, tmp_path):
    c_alone.save_pretrained(tmp_path)
    full, info = InternVLModel.from_pretrained(tmp_path, num_query_token=3, output_loading_info=True)
    assert full.query_tokens.shape == (1, 3, 24)
    assert not info["unexpected_keys"]
    assert info["missing_keys"] >= {"query_tokens", "itm_head.weight", "qllama.lm_head.weight"}
    for name, value in c_alone.state_dict().items():
        assert torch.equal(full.state_dict()[name], value), name
    with torch.no_grad():
        ids = tiny.summary_ids()
        torch.testing.assert_close(full.eval().get_text_features(ids), c_alone.get_text_features(ids))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.get_image_features(tiny.pixels(), mode="G"), '`mode` "InternVL-G"'),
        (lambda m: m(pixel_values=tiny.pixels(), input_ids=tiny.summary_ids(), mode="G"), '`mode` "InternVL-G"'),
        (lambda m: m.get_query_features(tiny.pixels()), "`get_query_features`"),
        (lambda m: m.get_matching_logits(tiny.pixels(), tiny.summary_ids()), "`get_matching_logits`"),
        (lambda m: m.generate(pixel_values=tiny.pixels()), "`generate`"),
    ],
)
def test_c_alone_says_what_it_lacks(c_alone, call, name):
    with pytest.raises(ValueError, match=f"{name} needs the queries of QLLaMA"):
        call(c_alone)


def test_a_chat_connector_with_queries_refuses_none():
    with pytest.raises(ValueError, match="`connector` 'queries' needs queries"):
        tiny.chat_config(connector="queries", qllama_config={**tiny.QLLAMA, "num_query_token": 0})
