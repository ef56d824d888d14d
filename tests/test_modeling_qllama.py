"""QLLaMA against a slow re-implementation: what attends to what, positions, padding, cache."""

import pytest
import torch
from transformers import GenerationMixin

from internvl import attention_masks_qllama
from internvl.attention_masks_qllama import PackedPasses

from . import reference, tiny


Q, L = 5, 6
PADDING = {
    "left": [False, False, True, True, True, True],
    "right": [True, True, True, True, False, False],
    "none": [True] * L,
}


def inputs(batch: int = 1):
    queries = tiny.pixels(batch, 1, 40, seed=5)[:, :, 0].reshape(batch, 5, 24)
    image = tiny.pixels(batch, 32, 6, seed=6)[:, 0].transpose(1, 2)
    return queries, image, tiny.text_ids(batch, L, seed=7)


@pytest.mark.parametrize("side", list(PADDING))
@pytest.mark.parametrize("mode", ["matching", "contrastive", "generation", "image", "text"])
@torch.no_grad()
def test_equals_the_slow_reference(mode, side):
    model = tiny.qllama_model().double()
    queries, image, ids = inputs()
    queries, image = queries.double(), image.double()
    real = PADDING[side]
    has_queries, has_text = mode != "text", mode != "image"
    outputs = model.model(
        input_ids=ids if has_text else None,
        attention_mask=torch.tensor([real]).long() if has_text else None,
        query_embeds=queries if has_queries else None,
        vision_hidden_states=image if has_queries else None,
        attention_mode=mode,
    )
    rows = ([queries[0]] if has_queries else []) + ([model.model.embed_tokens(ids[0])] if has_text else [])
    x, count = torch.cat(rows), Q * has_queries
    real = [True] * count + real * has_text
    positions = [sum(real[: i + 1]) - 1 for i in range(len(real))]
    seen = reference.visible(mode if has_queries and has_text else "generation", count, len(x), real)
    for layer in model.model.layers:
        x = reference.qllama_layer(layer.state_dict(), x, image[0], count, positions, seen, 4, 10000.0, 1e-6)
    x = reference.rms_norm(x, model.model.norm.weight, 1e-6)
    kept = torch.tensor(real)
    torch.testing.assert_close(
        outputs.last_hidden_state[0][kept], x[kept], atol=1e-5, rtol=1e-5
    )  # norms and angles are fp32


@torch.no_grad()
def test_modes_mixed_within_a_batch_equal_one_by_one():
    model = tiny.qllama_model()
    queries, image, ids = inputs(3)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] * 3 + [0] * 3])
    modes = ["matching", "contrastive", "generation"]
    together = model.model(
        input_ids=ids, attention_mask=mask, query_embeds=queries, vision_hidden_states=image, attention_mode=modes
    ).last_hidden_state
    for i, mode in enumerate(modes):
        one = slice(i, i + 1)
        alone = model.model(
            input_ids=ids[one],
            attention_mask=mask[one],
            query_embeds=queries[one],
            vision_hidden_states=image[one],
            attention_mode=mode,
        ).last_hidden_state
        kept = torch.cat([torch.ones(Q), mask[i]]).bool()
        torch.testing.assert_close(together[i][kept], alone[0][kept], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[2])


PASSES = {
    "stage 2": ("matching", "contrastive", "generation"),
    "retrieval": ("matching", "matching", "contrastive"),
    "images without text": ("generation", "image", "matching"),
    "no text is seen": ("contrastive", "generation"),
}


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_passes_packed_in_a_row_equal_passes_in_separate_rows(name, with_mask):
    model, modes = tiny.qllama_model(), PASSES[name]
    queries, image, _ = inputs(3)
    texts = [tiny.text_ids(3, 0 if mode == "image" else 4 + i, seed=i) for i, mode in enumerate(modes)]
    masks = [torch.ones_like(ids) for ids in texts]
    if with_mask:
        for mask in masks:
            mask[1, :2], mask[2, -2:] = 0, 0
    shared = PackedPasses(modes, tuple(ids.shape[1] for ids in texts), Q)
    num_matching = modes.count("matching")
    assert shared.num_copies == num_matching + 1  # queries that see no text stand there once
    together = model.model(
        input_ids=torch.cat(texts, dim=1),
        attention_mask=torch.cat(masks, dim=1) if with_mask else None,
        query_embeds=queries.repeat(1, shared.num_copies, 1),
        vision_hidden_states=image,
        attention_mode=shared,
    ).last_hidden_state
    for mode, ids, mask, found in zip(modes, texts, masks, shared.split(together), strict=True):
        alone = model.model(
            input_ids=None if mode == "image" else ids,
            attention_mask=mask if with_mask and mode != "image" else None,
            query_embeds=queries,
            vision_hidden_states=image,
            attention_mode=mode,
        ).last_hidden_state
        torch.testing.assert_close(found[0], alone[:, :Q], atol=1e-5, rtol=1e-5)
        kept = mask.bool()
        torch.testing.assert_close(found[1][kept], alone[:, Q:][kept], atol=1e-5, rtol=1e-5)


def rows_projected(model) -> list[int]:
    """Fills up with the rows whose keys the first cross-attention computes."""
    rows: list[int] = []
    model.layers[0].cross_attn.k_proj.register_forward_hook(lambda module, given, _: rows.append(len(given[0])))
    return rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_that_share_an_image_equal_rows_with_a_copy_each_gradients_too(attention):
    model = tiny.qllama_model()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    queries, image, ids = inputs(6)
    rows, found = rows_projected(model.model), []
    for images in (image[:2], image[:2].repeat_interleave(3, dim=0)):
        model.zero_grad()
        outputs = model.model(
            input_ids=ids, query_embeds=queries, vision_hidden_states=images, output_attentions=attention == "eager"
        )
        outputs.last_hidden_state.square().sum().backward()
        weights = outputs.get("cross_attentions", ())
        assert [tuple(w.shape) for w in weights] == [(6, 4, Q, 6)] * 2 * (attention == "eager")
        found.append([outputs.last_hidden_state.detach(), *weights])
        found[-1] += [p.grad.clone() for p in model.model.parameters() if p.grad is not None]
    assert rows == [2, 6]
    for shared, copied in zip(*found, strict=True):
        torch.testing.assert_close(shared, copied, atol=1e-4, rtol=1e-5)


def captions(model, **kwargs):
    queries, image, ids = inputs(3)
    ids = torch.cat([torch.zeros(3, Q, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(ids)
    mask[1, Q : Q + 2] = 0
    return model.generate(
        input_ids=ids, attention_mask=mask, query_embeds=queries, vision_hidden_states=image, do_sample=False,
        max_new_tokens=8, min_new_tokens=8, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "setting", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1, "num_return_sequences": 1}]
)
def test_cached_generation_equals_uncached_and_static(setting):
    model = tiny.qllama_model()
    assert torch.equal(captions(model, **setting), captions(model, use_cache=True))


def test_padding_between_queries_and_text_changes_no_caption():
    model = tiny.qllama_model()
    queries, image, ids = inputs(3)
    row = torch.cat([torch.zeros(Q, dtype=torch.long), ids[1, 2:]])[None]
    alone = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), query_embeds=queries[1:2], vision_hidden_states=image[1:2],
        do_sample=False, max_new_tokens=8, min_new_tokens=8,
    )  # fmt: skip
    assert torch.equal(alone[0, -8:], captions(model)[1, -8:])


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_beams_share_the_keys_and_values_of_their_image(settings, monkeypatch):
    model = tiny.qllama_model()
    rows, beams = rows_projected(model.model), settings.get("num_beams", 1)
    found = captions(model, **settings)
    assert rows == [3]
    monkeypatch.setattr(type(model), "_expand_inputs_for_generation", GenerationMixin._expand_inputs_for_generation)
    assert torch.equal(captions(model, **settings), found)
    assert rows == [3, 3 * beams]  # what the expansion of transformers would compute


def test_cross_attention_sits_in_every_nth_layer():
    for frequency, expected in ((1, [0, 1, 2]), (2, [0, 2]), (3, [0])):
        layers = tiny.qllama_model(cross_attention_frequency=frequency).model.layers
        assert [i for i, layer in enumerate(layers) if layer.cross_attn is not None] == expected


@torch.no_grad()
def test_a_fresh_cross_attention_leaves_the_llama_unchanged():
    from internvl.modeling_qllama import QLlamaForCausalLM

    model = QLlamaForCausalLM(tiny.qllama_model().config).eval()
    queries, image, ids = inputs()
    arguments = {"input_ids": ids, "query_embeds": queries}
    with_image = model(**arguments, vision_hidden_states=image).logits
    torch.testing.assert_close(with_image, model(**arguments).logits)


@torch.no_grad()
def test_flash_and_flex_leave_block_masks_to_sdpa_and_keep_the_rest():
    """Without a flash kernel, a kernel registered under such a name stands for it and records what reaches it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    lengths = []

    def flash_stand_in(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2  # all that a flash kernel understands
        lengths.append(query.shape[2])
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("flash_stand_in", flash_stand_in)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model = tiny.qllama_model()
    queries, image, ids = inputs()
    expected = {}
    for attention in ("sdpa", "flash_stand_in"):
        model.config._attn_implementation = (
            attention  # the setter of the model would look for an installed flash package
        )
        got = {
            mode: model.model(
                input_ids=ids, query_embeds=queries, vision_hidden_states=image, attention_mode=mode
            ).last_hidden_state
            for mode in ("contrastive", "generation")
        }
        blocks = list(lengths)
        got["image"] = model.model(query_embeds=queries, vision_hidden_states=image).last_hidden_state
        got["text"] = model.model(input_ids=ids).last_hidden_state
        expected = expected or got
    for mode, value in got.items():
        torch.testing.assert_close(value, expected[mode], atol=1e-5, rtol=1e-5, msg=mode)
    assert set(blocks) == {Q}  # of the block masks, the cross-attention alone
    assert {L, Q} <= set(lengths[len(blocks) :])  # text alone, queries alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give `input_ids`, `inputs_embeds` or `query_embeds`"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mode": "itm"}, r"must be among .*, got \['itm'\]"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mode": "image"}, "takes queries alone"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mode": ["text"] * 3}, r"one per row \(2\), got 3"),
        ({"input_ids": torch.ones(2, 3).long(), "inputs_embeds": torch.ones(2, 3, 24)}, "only one of"),
        ({"query_embeds": torch.ones(2, 5, 24), "attention_mode": "text"}, "takes text alone"),
        (
            {"query_embeds": torch.ones(3, 5, 24), "vision_hidden_states": torch.ones(2, 6, 32)},
            "got 3 rows for 2 images",
        ),
        (
            {"query_embeds": torch.ones(2, 5, 24), "attention_mode": PackedPasses(("image", "matching"), (0, 0), 5)},
            "describes 10 queries and 0 text positions, got 5 and 0: give 2 copies",
        ),
    ],
)
def test_unfitting_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.qllama_model().model(**arguments)


def test_scaled_rotary_positions_are_refused():
    with pytest.raises(ValueError, match="plain rotary positions"):
        tiny.qllama_model(rope_scaling={"type": "linear", "factor": 2.0})


@torch.no_grad()
def test_former_names_are_read_with_a_warning():
    model, arguments = tiny.qllama_model().model, {"input_ids": inputs()[2], "query_embeds": inputs()[0]}
    expected = model(**arguments, attention_mode="contrastive").last_hidden_state
    with pytest.warns(FutureWarning, match="`visibility` is now called `attention_mode`"):
        found = model(**arguments, visibility="contrastive").last_hidden_state
    assert torch.equal(found, expected)
    with pytest.warns(FutureWarning, match="`Readings` is now called `PackedPasses`"):
        former = attention_masks_qllama.Readings
    with pytest.warns(FutureWarning, match="`patterns` is now called `modes`"):
        assert former(patterns=("text",), text_lengths=(3,), num_queries=0) == PackedPasses(("text",), (3,), 0)
