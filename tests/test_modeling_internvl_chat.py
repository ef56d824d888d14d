"""InternVL-Chat: connector, placement of images, generation over turns, the published helpers."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from internvl.generation_internvl_chat import ImageTokenBlocker
from internvl.layers_internvl_chat import pixel_shuffle
from internvl.modeling_internvl_chat import (
    InternVLChatBaseModel,
    InternVLChatForConditionalGeneration,
)

from . import reference, tiny
from .fixtures_processes import run_elsewhere


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
CONNECTORS = ["patches", "queries", "queries_and_patches"]


@pytest.mark.parametrize(("version", "transposed"), [("v2", False), ("v1", True)])
def test_pixel_shuffle_equals_the_slow_reference(version, transposed):
    patches = torch.randn(2, 36, 5)
    for fold in (1, 2, 3):
        expected = torch.stack([reference.pixel_shuffle(row, fold, transposed) for row in patches])
        assert torch.equal(pixel_shuffle(patches, 1 / fold, version), expected)


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_a_tile_gives_the_promised_number_of_features_queries_first(connector):
    model = tiny.chat_model(connector=connector)
    count = {"patches": 4, "queries": 5, "queries_and_patches": 9}[connector]
    assert model.num_image_token == model.config.num_image_token == count
    features = model.extract_feature(tiny.pixels(2))
    assert features.shape == (2, count, 40)
    states = model.vision_model(tiny.pixels(2)).last_hidden_state
    parts = []
    if connector != "patches":
        queries = model.qllama(query_embeds=model.query_tokens.expand(2, -1, -1), vision_hidden_states=states)
        parts.append(model.mlp2(queries.last_hidden_state))
    if connector != "queries":
        parts.append(model.mlp1(pixel_shuffle(states[:, 1:], 0.5, "v2")))
    torch.testing.assert_close(features, torch.cat(parts, dim=1))


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_blocks_above_the_feature_layer_are_run_only_for_the_queries(connector):
    model = tiny.chat_model(connector=connector, select_layer=-3)
    ran = []
    for index, layer in enumerate(model.vision_model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    features = model.extract_feature(tiny.pixels(2))
    assert ran == ([0] if connector == "patches" else [0, 1, 2])
    if connector == "patches":
        states = model.vision_model(tiny.pixels(2), output_hidden_states=True).hidden_states
        torch.testing.assert_close(features, model.mlp1(pixel_shuffle(states[-3][:, 1:], 0.5, "v2")))


@torch.no_grad()
def test_features_stand_where_their_placeholders_are_in_order():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    tiles = iter(model.extract_feature(inputs["pixel_values"]).flatten(0, 1))
    for row in range(3):
        for column in range(inputs["input_ids"].shape[1]):
            if inputs["input_ids"][row, column] == tiny.IMAGE_TOKEN_ID:
                embeds[row, column] = next(tiles)
    expected = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    got = model(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected[real], atol=1e-5, rtol=1e-5)
    assert got.image_hidden_states.shape == (6, 4, 40)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_with_unequal_tile_counts_equals_one_by_one(side):
    model = tiny.chat_model("qwen3")
    tiles = [[2], [], [1, 3]]
    inputs = tiny.chat_inputs(model, tiles, side)
    together, first = model(**inputs).logits, 0
    for i, row in enumerate(tiny.chat_rows(model, tiles)):
        count = sum(tiles[i])
        images = {"pixel_values": inputs["pixel_values"][first : first + count]} if count else {}
        first += count
        alone = model(input_ids=row[None], **images).logits[0]
        torch.testing.assert_close(together[i][inputs["attention_mask"][i].bool()], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", list(tiny.DECODERS))
def test_generated_batch_equals_one_by_one(decoder):
    model = tiny.chat_model(decoder)
    tiles = [[2], [], [1, 3]]
    inputs = tiny.chat_inputs(model, tiles)
    together, first = model.generate(**inputs, **GREEDY), 0
    for i, row in enumerate(tiny.chat_rows(model, tiles)):
        count = sum(tiles[i])
        images = {"pixel_values": inputs["pixel_values"][first : first + count]} if count else {}
        first += count
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **images, **GREEDY)
        assert torch.equal(alone[0, -6:], together[i, -6:])
        assert torch.equal(alone[0, : len(row)], row)


@pytest.mark.parametrize("setting", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_cached_generation_equals_uncached_and_static(setting):
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, **setting))


def test_a_prefill_in_chunks_is_refused_with_images():
    model = tiny.chat_model()
    with pytest.raises(ValueError, match="would cut images apart"):
        model.generate(**tiny.chat_inputs(model), **GREEDY, prefill_chunk_size=4)


def test_beams_keep_the_tiles_of_their_own_sample():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model, [[1, 2], [2]])
    together = model.generate(**inputs, **GREEDY, num_beams=3)
    for i, (row, tiles) in enumerate(
        zip(tiny.chat_rows(model, [[1, 2], [2]]), (slice(0, 3), slice(3, 5)), strict=True)
    ):
        alone = model.generate(
            input_ids=row[None], attention_mask=torch.ones_like(row)[None], pixel_values=inputs["pixel_values"][tiles],
            **GREEDY, num_beams=3,
        )  # fmt: skip
        assert torch.equal(alone[0, -6:], together[i, -6:])
    samples = model.generate(**inputs, **{**GREEDY, "do_sample": True}, num_return_sequences=2)
    assert samples.shape[0] == 4


@pytest.mark.parametrize("give", ["all tiles", "new tiles"])
def test_later_turns_do_not_encode_old_images_again(give):
    model = tiny.chat_model()
    first, second = tiny.chat_rows(model, [[2], [3]])
    cache = DynamicCache(config=model.config.text_config)
    settings = {**GREEDY, "return_dict_in_generate": True}
    images = tiny.pixels(5)
    turn = model.generate(
        input_ids=first[None],
        attention_mask=torch.ones_like(first)[None],
        pixel_values=images[:2],
        past_key_values=cache,
        **settings,
    )
    dialogue = torch.cat([turn.sequences[0], second])[None]
    encoded = []
    model.vision_model.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    later = model.generate(
        input_ids=dialogue,
        attention_mask=torch.ones_like(dialogue),
        pixel_values=images if give == "all tiles" else images[2:],
        past_key_values=turn.past_key_values,
        **settings,
    )
    assert encoded == [3]
    afresh = model.generate(
        input_ids=dialogue, attention_mask=torch.ones_like(dialogue), pixel_values=images, **settings
    )
    assert torch.equal(later.sequences, afresh.sequences)


def test_text_only_generation_never_runs_the_vision_tower():
    model = tiny.chat_model()
    model.vision_model.register_forward_pre_hook(lambda *_: pytest.fail("the vision tower ran"))
    ids = tiny.text_ids()
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY).shape == (3, 13)
    model(input_ids=ids, labels=ids)


def test_a_training_step_without_images_runs_the_tower_once_and_changes_nothing():
    model = tiny.chat_model().train()
    ran = []
    model.vision_model.register_forward_hook(lambda *_: ran.append(1))
    inputs = tiny.chat_inputs(model, tiles=[[], []])
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert ran == [1]
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.vision_model.parameters())
    assert any(parameter.grad.count_nonzero() for parameter in model.language_model.parameters())
    torch.testing.assert_close(model.eval()(**inputs, labels=inputs["input_ids"]).loss, outputs.loss)
    assert ran == [1]


def test_a_process_without_images_does_not_keep_the_others_waiting(on_two):
    for rank, found in enumerate(on_two):
        for (connector, engine), loss in found["text_only_rank"].items():
            model = tiny.chat_model(connector=connector).train()
            inputs = tiny.chat_inputs(model, tiles=[[1], [2]] if rank == 0 else [[], []])
            torch.testing.assert_close(
                loss, model(**inputs, labels=inputs["input_ids"]).loss, msg=f"{connector} {engine}"
            )


def test_a_broken_placeholder_count_names_the_sample_and_both_counts():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    with pytest.raises(
        ValueError, match=r"24 image placeholders but 20 image features.*5 tiles of 4.*\{0: 8, 1: 0, 2: 16\}"
    ):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:5]})
    with pytest.raises(ValueError, match="24 image placeholders but 20 image features"):
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"][:5]}, **GREEDY)
    with pytest.raises(ValueError, match="24 image placeholders but 0 image features"):
        model(input_ids=inputs["input_ids"])
    cut = inputs["input_ids"].clone()
    cut[2, (cut[2] == tiny.IMAGE_TOKEN_ID).nonzero()[-1]] = 5
    with pytest.raises(ValueError, match="Sample 2 has 15 placeholders, no multiple of 4: was it truncated"):
        model(**{**inputs, "input_ids": cut})
    with pytest.raises(ValueError, match="24 image placeholders but 20 image features"):
        model(input_ids=inputs["input_ids"], image_embeds=torch.zeros(3, 12, 40))


def test_images_without_a_known_placeholder_id_are_refused():
    model = tiny.chat_model(image_token_id=None)
    with pytest.raises(ValueError, match=r"`config\.image_token_id` is not set"):
        model(input_ids=tiny.text_ids(), pixel_values=tiny.pixels())
    with pytest.raises(ValueError, match=r"`config\.image_token_id` is not set"):
        model(input_ids=tiny.text_ids(), image_embeds=torch.zeros(3, 4, 40))
    model.img_context_token_id = tiny.IMAGE_TOKEN_ID
    assert model.config.image_token_id == tiny.IMAGE_TOKEN_ID


@torch.no_grad()
def test_flagged_dummy_tiles_and_tile_counts_are_honoured():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    expected = model(**inputs).logits
    images = torch.cat([inputs["pixel_values"], torch.zeros(1, 3, 56, 56)])
    for flags in (torch.tensor([1] * 6 + [0]), torch.tensor([[1]] * 6 + [[0]])):
        assert torch.equal(model(**{**inputs, "pixel_values": images}, image_flags=flags).logits, expected)
    assert torch.equal(model(**inputs, num_patches=torch.tensor([2, 1, 3])).logits, expected)
    with pytest.raises(ValueError, match="`num_patches` sums to 5, got 6 tiles"):
        model(**inputs, num_patches=torch.tensor([2, 3]))


@torch.no_grad()
def test_loss_is_the_mean_over_label_positions_and_counts_accumulated_items():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    outputs = model(**inputs, labels=labels)
    by_hand = []
    for row in range(3):
        for column in range(1, labels.shape[1]):
            if labels[row, column] != -100:
                log_probs = outputs.logits[row, column - 1].log_softmax(-1)
                by_hand.append(-log_probs[labels[row, column]])
    torch.testing.assert_close(outputs.loss, torch.stack(by_hand).mean())
    torch.testing.assert_close(
        model(**inputs, labels=labels, num_items_in_batch=7).loss, torch.stack(by_hand).sum() / 7
    )
    weight = torch.ones_like(labels, dtype=torch.float)
    weighted = model(**inputs, labels=labels, loss_weight=weight.tolist()).loss
    torch.testing.assert_close(weighted, torch.stack(by_hand).sum() / weight[:, 1:].sum())


@torch.no_grad()
def test_packed_texts_stay_apart_under_trainers_setting():
    """Trainer turns off the cache in the outer configuration alone; position ids then say where a text begins."""
    model = tiny.chat_model()
    texts = [torch.arange(5, 11), torch.arange(20, 29)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    apart = torch.cat([model(text[None]).logits[0] for text in texts])
    assert not torch.allclose(model(torch.cat(texts)[None], position_ids=positions).logits[0], apart, atol=1e-5)
    model.config.use_cache = False
    packed = model(torch.cat(texts)[None], position_ids=positions)
    assert packed.past_key_values is None
    torch.testing.assert_close(packed.logits[0], apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_to_keep_computes_only_the_last_logits():
    model = tiny.chat_model("internlm2")
    inputs = tiny.chat_inputs(model)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])


def test_the_placeholder_is_never_generated_and_other_greedy_scores_stay():
    model = tiny.chat_model()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[tiny.IMAGE_TOKEN_ID] = 3 * head.weight[5]  # a decoder that wants nothing but placeholders
        head.weight[5] *= 2
    inputs = tiny.chat_inputs(model)
    assert (model(**inputs).logits.argmax(-1) == tiny.IMAGE_TOKEN_ID).any()
    length = inputs["input_ids"].shape[1]
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert not (model.generate(**inputs, **{**GREEDY, **settings})[:, length:] == tiny.IMAGE_TOKEN_ID).any()
    scores = torch.randn(2, 9)
    scores[0, 4] = 9.0
    scores[1, 4] = -9.0
    blocked = ImageTokenBlocker(4, is_greedy=True)(None, scores)
    assert blocked[0, 4] == -float("inf")
    assert torch.equal(blocked[1], scores[1])


def test_streamed_text_equals_the_final_text():
    from transformers import TextIteratorStreamer

    from .fixtures_text import make_tokenizer

    tokenizer = make_tokenizer()
    model = tiny.chat_model(
        text_config={**tiny.DECODERS["llama"], "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    ids = tokenizer("what is this", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = model.generate(input_ids=ids, streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(output[0, ids.shape[1] :])


def test_use_flash_attn_falls_back_with_one_warning(tmp_path, caplog):
    from transformers.utils import is_flash_attn_2_available

    model = tiny.chat_model()
    model.save_pretrained(tmp_path)
    logging.Logger.warning_once.cache_clear()  # earlier tests may have had the one warning
    again, _ = (type(model).from_pretrained(tmp_path, use_flash_attn=True) for _ in range(2))
    wanted = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    said = [record.levelname for record in caplog.records if "use_flash_attn" in record.message]
    assert said == ["WARNING"] * (wanted == "sdpa")
    assert again.language_model.config._attn_implementation == again.vision_model.config._attn_implementation == wanted
    assert type(model).from_pretrained(tmp_path, use_flash_attn=False).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_flash_attention_is_what_every_part_runs_when_asked_for(version, monkeypatch, tmp_path):
    """A stand-in under the kernel's name in transformers' registry, which is refused without a kernel."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, ran = f"flash_attention_{version}", set()

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None  # nothing is padded here, and flash kernels know no other mask
        ran.add(module)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    model = tiny.chat_model("internlm2", "queries_and_patches")
    rows = tiny.chat_rows(model, [[2]])
    inputs = {"input_ids": rows[0][None], "pixel_values": tiny.pixels(2)}
    expected = model(**inputs).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, stand_in)
    model.config._attn_implementation = name  # the setter of the model looks for an installed package
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert ran == {module for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "config")}
    if not torch.cuda.is_available():
        model.save_pretrained(tmp_path)
        with pytest.raises(ImportError, match=f"FlashAttention{version}"):
            type(model).from_pretrained(tmp_path, attn_implementation=name)


SERVE = """
import sys
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(trust_remote_code=True, device="cpu")
model, processor = manager.load_model_and_processor(sys.argv[1] + "@main")
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(manager.get_model_modality(model, processor).value)
"""


@pytest.mark.slow  # imports everything in a process of its own
def test_transformers_serve_takes_a_folder_with_its_code_for_a_model_of_images_and_text(root, tmp_path):
    assert run_elsewhere(tmp_path, "-c", SERVE, root).splitlines()[-1] == "MULTIMODAL"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector": "both"}, r"`connector` must be one of .*, got 'both'"),
        ({"qllama_config": dict(tiny.QLLAMA)}, "`qllama_config` needs a `connector` with queries"),
        ({"projector_type": "linear"}, "`projector_type` must be one of"),
        ({"ps_version": "v3"}, "`ps_version` must be one of"),
        ({"select_layer": 1.5}, r"`select_layer` \(1\.5\) must lie within the 3 blocks .* whole number"),
        ({"select_layer": "x"}, r"`select_layer` \('x'\) must lie within the 3 blocks"),
        ({"select_layer": -5}, r"`select_layer` \(-5\) must lie within the 3 blocks"),
        ({"downsample_ratio": 0.3}, r"`downsample_ratio` \(0.3\) must be"),
        ({"force_image_size": 60}, r"`force_image_size` \(60\) must be a multiple"),
    ],
)
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.chat_config(**changes)


def test_two_models_of_one_process_keep_their_own_settings():
    first, second = tiny.chat_model(), tiny.chat_model(ps_version="v1")
    before = copy.deepcopy(first.config.to_dict())
    second.generate(**tiny.chat_inputs(second), **GREEDY)
    second.img_context_token_id = 3
    assert first.config.to_dict() == before


@pytest.mark.parametrize(
    ("decoder", "connector"), [("llama", "patches"), ("internlm2", "queries_and_patches"), ("qwen3_moe", "patches")]
)
@torch.no_grad()
def test_the_headless_class_reads_a_chat_checkpoint_and_gives_what_the_head_reads(decoder, connector, tmp_path):
    model = tiny.chat_model(decoder, connector)
    inputs = tiny.chat_inputs(model)
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    base, info = InternVLChatBaseModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    outputs = base.eval()(**inputs)
    assert torch.equal(model.get_output_embeddings()(outputs.last_hidden_state), expected.logits)
    assert torch.equal(outputs.image_hidden_states, expected.image_hidden_states)
    assert base.get_output_embeddings() is None
    assert base.language_model is base.get_decoder()


def test_the_headless_class_saves_the_published_names(tmp_path):
    model = tiny.chat_model("qwen2")
    model.save_pretrained(tmp_path / "chat")
    InternVLChatBaseModel.from_pretrained(tmp_path / "chat").save_pretrained(tmp_path / "base")
    whole, base = (load_file(tmp_path / name / "model.safetensors") for name in ("chat", "base"))
    assert whole.keys() - base.keys() == {"language_model.lm_head.weight"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in base.items())
    auto_map = json.loads((tmp_path / "base" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_internvl_chat.InternVLChatBaseModel"  # of a folder that has no head
    _, info = InternVLChatForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"language_model.lm_head.weight"}
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("decoder", ["llama", "internlm2"])
def test_its_base_model_gives_hidden_states_over_the_same_parameters(decoder):
    model = tiny.chat_model(decoder)
    model.forward = lambda **inputs: pytest.fail("what a trainer puts over forward is not the base model's")
    base, inputs = model.base_model, tiny.chat_inputs(model)
    states = base(**inputs).last_hidden_state
    logits = type(model).forward(model, **inputs).logits
    torch.testing.assert_close(model.get_output_embeddings()(states), logits)
    states.sum().backward()
    assert model.mlp1[1].weight.grad is not None
    assert set(map(id, base.parameters())) < set(map(id, model.parameters()))


def test_the_loss_holds_the_decoders_loss_of_uneven_experts():
    model = tiny.chat_model("qwen3_moe")
    inputs = tiny.chat_inputs(model)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain, routed = model(**inputs), model(**inputs, output_router_logits=True)
    assert plain.aux_loss is None
    assert len(routed.router_logits) == 2
    assert routed.aux_loss > 0
    torch.testing.assert_close(
        routed.loss, plain.loss + model.config.text_config.router_aux_loss_coef * routed.aux_loss
    )


def test_the_kernel_of_the_experts_reaches_the_decoder(tmp_path):
    model = tiny.chat_model("qwen3_moe")
    for name in ("batched_mm", "eager"):
        model.set_experts_implementation({"text_config": name})
        assert model.language_model.config._experts_implementation == name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation={"text_config": "batched_mm"})
    assert again.language_model.config._experts_implementation == "batched_mm"
