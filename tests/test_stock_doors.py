"""What transformers offers for any model, on these: each answers as the plain call does, or refuses by name."""

import copy
import json
import re
import threading

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from internvl.configuration_internvl import InternVLChatConfig, InternVLConfig, QLlamaConfig
from internvl.modeling_internvit import InternVisionModel
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny
from .fixtures_text import make_tokenizer


GREEDY = {"max_new_tokens": 6, "do_sample": False}
CONNECTORS = ["patches", "queries_and_patches"]
each_connector = pytest.mark.parametrize("connector", CONNECTORS)


# ---------------------------------------------------------------------------------------------------------- generation
def new_tokens(model, inputs: dict, **settings) -> torch.Tensor:
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :]


@each_connector
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_embeddings_in_place_of_ids_give_the_same_tokens(connector, settings):
    model = tiny.chat_model(connector=connector)
    inputs = tiny.chat_inputs(model)
    expected = new_tokens(model, inputs, **settings)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **others, **{**GREEDY, **settings}), expected)
    both = model.generate(inputs["input_ids"], inputs_embeds=embeds, **others, **{**GREEDY, **settings})
    assert torch.equal(both[:, -expected.shape[1] :], expected)
    placed = embeds.clone()
    placed[inputs["input_ids"] == tiny.IMAGE_TOKEN_ID] = model.extract_feature(inputs["pixel_values"]).flatten(0, 1)
    mask = inputs["attention_mask"]
    assert torch.equal(model.generate(inputs_embeds=placed, attention_mask=mask, **{**GREEDY, **settings}), expected)
    torch.testing.assert_close(
        model(inputs_embeds=embeds, **others).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="image placeholders"):
        model.generate(inputs_embeds=placed, **others)


@each_connector
def test_published_calls_give_the_same_tokens(connector):
    model = tiny.chat_model(connector=connector)
    inputs = tiny.chat_inputs(model)
    images, ids, mask = (inputs[name] for name in ("pixel_values", "input_ids", "attention_mask"))
    expected = model.generate(**inputs, **GREEDY)
    features = model.extract_feature(images)
    assert torch.equal(model.generate(images, ids, mask, **GREEDY), expected)
    assert torch.equal(model.generate(images, ids, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(images, input_ids=ids, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(images, ids, mask, features, **GREEDY), expected)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=mask, visual_features=features, **GREEDY), expected
    )
    seen = model.generate(
        input_ids=ids, attention_mask=mask, visual_features=0 * features, pixel_values=images, **GREEDY
    )
    assert not torch.equal(seen, expected)  # as published: the features given are the ones read
    text = tiny.text_ids()
    assert torch.equal(model.generate(None, text, torch.ones_like(text), **GREEDY), model.generate(text, **GREEDY))
    with pytest.raises(ValueError, match="`pixel_values` by position and by name"):
        model.generate(images, ids, mask, pixel_values=images)
    with pytest.raises(ValueError, match="image placeholders"):
        model.generate(input_ids=ids, attention_mask=mask, visual_features=features[1:])


def prompt_with_a_repeated_image(model) -> dict:
    """A text that comes again before and behind an image, so that prompt lookup drafts placeholders."""
    row, words = tiny.chat_rows(model, [[1, 2]])[0], torch.tensor([5, 6, 7])
    ids = torch.cat([words, row, words])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pixels(3)}


def drafts_of(model, monkeypatch) -> list[torch.Tensor]:
    """The ids of every step of more than one token that the decoder's forward gets from the search."""
    seen, prepare = [], type(model).prepare_inputs_for_generation

    def watch(self, input_ids, **kwargs):
        seen.append(input_ids)
        return prepare(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", watch)
    return seen


@each_connector
@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1}]
)
def test_prompt_lookup_equals_plain_greedy_though_drafts_hold_placeholders(connector, settings, monkeypatch):
    model = tiny.chat_model(connector=connector)
    inputs = prompt_with_a_repeated_image(model)
    expected = model.generate(**inputs, **GREEDY)
    seen = drafts_of(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **GREEDY, **settings), expected)
    length = inputs["input_ids"].shape[1]
    assert any((ids[:, length:] == tiny.IMAGE_TOKEN_ID).any() for ids in seen)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 20])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(chunk):
    model = tiny.chat_model()
    ids, mask = tiny.text_ids(2), torch.ones(2, 7).long()
    mask[0, :3] = 0
    for settings in ({}, {"attention_mask": mask}, {"num_beams": 2}, {"cache_implementation": "static"}):
        expected = model.generate(ids, **GREEDY, **settings)
        assert torch.equal(model.generate(ids, **GREEDY, **settings, prefill_chunk_size=chunk), expected)
    inputs = prompt_with_a_repeated_image(model)
    turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, tiny.text_ids(1)], dim=1)
    expected = model.generate(ids, pixel_values=inputs["pixel_values"], **GREEDY)
    cache = turn.past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("kind", ["chat", "captions"])
def test_a_generation_ends_at_a_stop_string(kind):
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer)}
    if kind == "chat":
        model = tiny.chat_model(text_config={**tiny.DECODERS["llama"], **sizes})
        inputs = tiny.chat_inputs(model, [[1]])
    else:
        model = tiny.internvl_model()
        model.resize_token_embeddings(len(tokenizer))
        inputs = {"pixel_values": tiny.pixels(1), "input_ids": tiny.text_ids(1)}
    given = inputs["input_ids"].shape[1] if kind == "chat" else 0
    letters = [index for index in range(len(tokenizer)) if re.fullmatch("[a-z]+", tokenizer.decode([index]))]
    settings = {**GREEDY, "prefix_allowed_tokens_fn": lambda *_: letters}
    expected = model.generate(**inputs, **settings)[0, given:]
    stop = tokenizer.decode(expected[1])
    found = model.generate(**inputs, **settings, stop_strings=[stop], tokenizer=tokenizer)[0, given:]
    assert len(found) <= 2 < len(expected)
    assert torch.equal(found, expected[: len(found)])


def test_searches_that_cannot_be_right_are_refused_by_name():
    model = tiny.chat_model()
    inputs = prompt_with_a_repeated_image(model)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="`assistant_early_exit` needs"):
        model.generate(**inputs, assistant_early_exit=1)
    for given in (inputs, others):
        with pytest.raises(ValueError, match="`assistant_model` drafts from ids"):
            model.generate(**given, **embeds, assistant_model=model)
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` drafts from ids"):
        model.generate(**inputs, **embeds, generation_config=GenerationConfig(prompt_lookup_num_tokens=3))
    expected = model.generate(**others, **embeds, **GREEDY)
    assert torch.equal(model.generate(**others, **embeds, **GREEDY, prompt_lookup_num_tokens=3), expected)
    with pytest.raises(ValueError, match="`negative_prompt_ids` is read as text"):
        model.generate(**inputs, guidance_scale=1.5, negative_prompt_ids=inputs["input_ids"])


@pytest.mark.parametrize(
    "setting", [{"assistant_early_exit": 1}, {"prefill_chunk_size": 2}, {"position_ids": torch.arange(3)[None]}]
)
def test_captions_refuse_by_name_what_would_overlook_the_queries(setting):
    model = tiny.internvl_model()
    with pytest.raises(ValueError, match=f"captions takes no `{next(iter(setting))}`"):
        model.generate(tiny.pixels(1), tiny.text_ids(1, 3), **setting)
    model.generate(tiny.pixels(1), tiny.text_ids(1, 3), max_new_tokens=1)


def test_prompt_lookup_goes_on_from_a_cache_of_earlier_turns():
    model = tiny.chat_model()
    inputs = prompt_with_a_repeated_image(model)
    expected = model.generate(**inputs, **GREEDY)
    for settings in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = DynamicCache(config=model.config.text_config)
        cut = inputs["input_ids"].shape[1] - 2
        first = {"input_ids": inputs["input_ids"][:, :cut], "attention_mask": inputs["attention_mask"][:, :cut]}
        model(**first, pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True)
        assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache, **settings), expected)


@pytest.mark.parametrize("assistant", ["another chat model", "a chat model of another width", "a language model"])
def test_an_assistant_model_changes_nothing(assistant):
    model, inputs = tiny.chat_model(), None
    if assistant == "another chat model":
        helper = tiny.randomize(tiny.chat_model("qwen2"), seed=3)
    elif assistant == "a chat model of another width":
        helper = tiny.chat_model(text_config={**tiny.DECODERS["llama"], "hidden_size": 24, "head_dim": 6})
    else:
        other = tiny.chat_model(connector="queries")
        with pytest.raises(ValueError, match="takes 5 positions for a tile, this model 4"):
            model.generate(**tiny.chat_inputs(model, [[1, 2]]), assistant_model=other)
        helper = tiny.randomize(AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)), seed=3)
    helper.generation_config.eos_token_id, helper.generation_config.pad_token_id = None, 0
    inputs = tiny.chat_inputs(model, [[1, 2]])
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=helper), model.generate(**inputs, **GREEDY))


def test_an_assistant_that_cannot_draft_is_refused_by_name():
    captions, chat = tiny.internvl_model(), tiny.chat_model()
    images, prompt = tiny.pixels(1), tiny.text_ids(1, 4)
    expected = captions.generate(images, prompt, **GREEDY)
    helper = tiny.randomize(copy.deepcopy(captions.qllama), seed=3)
    assert torch.equal(captions.generate(images, prompt, **GREEDY, assistant_model=helper), expected)
    for unfit in (chat, chat.language_model, captions):
        with pytest.raises(ValueError, match=f"must read queries and images: .*, got {type(unfit).__name__}"):
            captions.generate(images, prompt, **GREEDY, assistant_model=unfit)
    with pytest.raises(ValueError, match="`assistant_model` must generate text from ids, InternVLModel does not"):
        chat.generate(**tiny.chat_inputs(chat, [[1]]), assistant_model=captions)


def test_streamed_captions_hold_words_alone():
    tokenizer = make_tokenizer(add_bos=False)
    config = tiny.internvl_model().config
    config.qllama_config.vocab_size = 400
    model = tiny.randomize(InternVLModel(config))
    prompt = tokenizer(["English caption:"], return_tensors="pt")
    for skip_prompt in (False, True):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt)
        settings = {"pixel_values": tiny.pixels(1), **prompt, "max_new_tokens": 5, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=settings)
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        new = model.generate(**{**settings, "streamer": None})[0]
        expected = tokenizer.decode(new)
        assert streamed == (expected if skip_prompt else "English caption:" + expected)


# ------------------------------------------------------------------------------------------------------------ captions
def test_lengths_of_captions_count_text_alone():
    model = tiny.internvl_model()
    images, prompt = tiny.pixels(2), tiny.text_ids(2, 4)
    free = model.generate(images, prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    cut = model.generate(images, prompt, max_length=10, do_sample=False, eos_token_id=None)
    assert torch.equal(cut, free[:, :6])
    stop = int(free[0, 1])
    for settings in ({"min_length": 10}, {"min_new_tokens": 6}):
        found = model.generate(images, prompt, max_new_tokens=9, do_sample=False, eos_token_id=stop, **settings)
        assert (found[0, :6] != stop).all()
    config = GenerationConfig(max_length=10, do_sample=False)
    assert torch.equal(model.generate(images, prompt, generation_config=config, eos_token_id=None), cut)
    assert config.max_length == 10


def test_one_prompt_serves_several_images_and_other_numbers_are_refused():
    model = tiny.internvl_model()
    images, prompt = tiny.pixels(3), tiny.text_ids(1, 4)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(images, prompt, **settings), model.generate(images, prompt.expand(3, -1), **settings)
    )
    with pytest.raises(ValueError, match=r"2 prompts for 3 images"):
        model.generate(images, tiny.text_ids(2, 4), **settings)
    with pytest.raises(ValueError, match=r"2 prompts for 1 images"):
        model.generate(images[:1], tiny.text_ids(2, 4), **settings)


# -------------------------------------------------------------------------------------------------- losses, evaluation
@each_connector
@pytest.mark.parametrize("train", [False, True])
def test_logits_have_the_shape_that_was_asked_for(connector, train):
    model = tiny.chat_model(connector=connector).train(train)
    inputs = tiny.chat_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels)
    assert outputs.logits.shape == (*labels.shape, 99)
    torch.testing.assert_close(
        outputs.loss, model(**inputs, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum()).loss
    )


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(0)}, {"loss_weight": 0}]
)
def test_a_batch_without_labels_has_loss_0_and_gradients_of_0(extra, train, skips):
    model = tiny.chat_model().train(train)
    model.skips_unlabelled_logits = skips
    inputs = tiny.chat_inputs(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    if "loss_weight" in extra:
        extra = {"loss_weight": torch.zeros(labels.shape)}
    loss = model(**inputs, labels=labels, **extra).loss
    loss.backward()
    assert loss == 0
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert found
    assert all(gradient.count_nonzero() == 0 for gradient in found)


def test_other_models_give_0_without_labels_too():
    qllama, ids = tiny.qllama_model(), tiny.text_ids()
    decoder, classifier = tiny.chat_model("internlm2").language_model, tiny.classifier().train()
    segmenter, images = tiny.segmenter().train(), tiny.pixels(2)
    for model, loss in (
        (qllama, qllama(input_ids=ids, labels=torch.full_like(ids, -100)).loss),
        (decoder, decoder(input_ids=ids, labels=torch.full_like(ids, -100)).loss),
        (classifier, classifier(images, labels=torch.full((2,), -100)).loss),
        (segmenter, segmenter(images, labels=torch.full((2, 8, 8), 255)).loss),
    ):
        loss.backward()
        assert loss == 0
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_labels_that_a_trainer_has_shifted_give_the_same_loss():
    for model in (
        tiny.chat_model(),
        tiny.chat_model("internlm2", "queries_and_patches"),
        tiny.chat_model("qwen3_moe"),
        tiny.qllama_model(),
        tiny.chat_model("internlm2").language_model,
    ):
        inputs = tiny.chat_inputs(model) if hasattr(model, "vision_model") else {"input_ids": tiny.text_ids()}
        labels = inputs["input_ids"]
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        expected = model(**inputs, labels=labels).loss
        for given in ({"labels": labels}, {"labels": shifted}, {}):
            assert torch.equal(model(**inputs, **given, shift_labels=shifted).loss, expected)
        assert model(**inputs, shift_labels=torch.full_like(labels, -100)).loss == 0
        assert model(**inputs).loss is None


def evaluation_in(folder, **settings) -> TrainingArguments:
    settings |= {"per_device_eval_batch_size": 2, "remove_unused_columns": False, "disable_tqdm": True}
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, **settings)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def stacked(rows: list[dict]) -> dict:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if "input_ids" in batch and "pixel_values" in batch and batch["pixel_values"].ndim == 5:
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
    return batch


def chat_rows(model) -> list[dict]:
    ids = torch.cat([tiny.chat_rows(model, [[1]])[0], tiny.text_ids(1, 3)[0]])
    return [{"input_ids": ids, "labels": ids, "pixel_values": tiny.pixels(1, seed=seed)} for seed in range(4)]


EVALUATED = {
    "chat": (tiny.chat_model, chat_rows, (4, None, 99)),
    "chat-full": (lambda: tiny.chat_model("qwen3_moe", "queries_and_patches"), chat_rows, (4, None, 99)),
    "captions": (
        tiny.qllama_model,
        lambda model: [{"input_ids": ids, "labels": ids} for ids in tiny.text_ids(4)],
        (4, 7, 99),
    ),
    "classifier": (
        tiny.classifier,
        lambda model: [{"pixel_values": image, "labels": torch.tensor(1)} for image in tiny.pixels(4)],
        (4, 4),
    ),
    "segmenter": (
        tiny.segmenter,
        lambda model: [{"pixel_values": image, "labels": torch.ones(8, 8).long()} for image in tiny.pixels(4)],
        (4, 5, 4, 4),
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_trainer_hands_metrics_the_logits_alone(name, tmp_path):
    make, rows, shape = EVALUATED[name]
    model, seen = make(), []
    model.config.output_hidden_states = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    trainer = Trainer(
        model,
        evaluation_in(tmp_path),
        data_collator=stacked,
        eval_dataset=Rows(rows(model)),
        compute_metrics=lambda found: (
            seen.append(found) or {"right": float((found.predictions.argmax(-1) >= 0).mean())}
        ),
    )
    assert trainer.evaluate()["eval_right"] == 1
    assert isinstance(seen[0].predictions, np.ndarray)
    assert len(seen[0].predictions.shape) == len(shape)
    assert all(wanted in (None, found) for wanted, found in zip(shape, seen[0].predictions.shape, strict=True))


@pytest.mark.parametrize("kind", ["chat", "captions", "internlm2"])
def test_label_smoothing_of_trainer_compares_each_position_with_the_next_label(kind, tmp_path):
    make, rows, _ = EVALUATED.get(kind, EVALUATED["captions"])
    model = tiny.chat_model("internlm2").language_model if kind == "internlm2" else make()
    batch = stacked(rows(model))
    arguments = evaluation_in(tmp_path, label_smoothing_factor=0.2)
    found = Trainer(model, arguments, data_collator=stacked, eval_dataset=Rows(rows(model))).evaluate()["eval_loss"]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_trainer_hands_metrics_the_similarities_alone(tmp_path):
    class ContrastiveTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs, return_loss=True)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    rows = [
        {"input_ids": ids, "pixel_values": image}
        for ids, image in zip(tiny.summary_ids(4), tiny.pixels(4), strict=True)
    ]
    arguments = evaluation_in(tmp_path, label_names=[])
    trainer = ContrastiveTrainer(tiny.internvl_model(), arguments, data_collator=stacked, eval_dataset=Rows(rows))
    trainer.can_return_loss = True
    found = trainer.predict(Rows(rows))
    assert found.predictions.shape == (4, 2)


# ---------------------------------------------------------------------------------------------------- unknown keywords
def images_and_texts() -> dict:
    return {"pixel_values": tiny.pixels(), "input_ids": tiny.summary_ids()}


CALLS = {
    **{name: lambda name=name, **extra: _call(name, **extra) for name in tiny.MODELS},
    "get_image_features of C/G": lambda **extra: tiny.internvl_model().get_image_features(tiny.pixels(), **extra),
    "get_text_features": lambda **extra: tiny.internvl_model().get_text_features(tiny.summary_ids(), **extra),
    "get_image_features of chat": lambda **extra: tiny.chat_model().get_image_features(tiny.pixels(), **extra),
    "generate of chat": lambda **extra: tiny.chat_model().generate(tiny.text_ids(), max_new_tokens=1, **extra),
    "generate of C/G": lambda **extra: tiny.internvl_model().generate(tiny.pixels(), max_new_tokens=1, **extra),
}


def _call(name: str, **extra):
    make, inputs = tiny.MODELS[name]
    model = make()
    return model(**inputs(model), **extra)


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_keyword_is_refused_and_what_transformers_hands_over_is_taken(name):
    with pytest.raises(ValueError, match="nonsense"):
        CALLS[name](nonsense=3)
    if not name.startswith("generate"):
        with pytest.raises(TypeError, match="output_hiden_states"):
            CALLS[name](output_hiden_states=True)
        taken = {
            "return_dict": True,
            "nonsense": None,
            "token_type_ids": torch.zeros(3, 7).long(),
            "output_attentions": False,
            "attention_instances": {},
        }
        CALLS[name](**taken)


# ----------------------------------------------------------------------------- configurations, tokenizers, other kinds
def test_a_configuration_is_not_changed_by_models_that_share_it(tmp_path):
    vision, qllama = tiny.vision_config(), QLlamaConfig(**{**tiny.QLLAMA, "vision_hidden_size": 77})
    before = (vision.to_dict(), qllama.to_dict())
    shared = InternVLConfig(
        vision_config=vision, qllama_config=qllama, num_query_token=0, clip_embed_dim=12, attn_pool_num_heads=4
    )
    assert (vision.to_dict(), qllama.to_dict()) == before
    assert (shared.num_query_token, shared.qllama_config.vision_hidden_size) == (0, 32)
    config = tiny.chat_config(connector="queries")
    models = [InternVLChatForConditionalGeneration(config) for _ in range(2)]
    before = config.to_dict()
    models[0].save_pretrained(tmp_path)
    models[0](**tiny.chat_inputs(models[0]))
    assert config.to_dict() == before
    assert models[0].config is config


@pytest.mark.parametrize("configured", [tiny.IMAGE_TOKEN_ID, None])
def test_chat_with_another_tokenizer_leaves_configuration_and_tokenizer_as_they_were(configured):
    tokenizer = make_tokenizer()
    decoder = {**tiny.DECODERS["llama"], "vocab_size": len(tokenizer)}
    model = tiny.chat_model(text_config=decoder, image_token_id=configured)
    tokenizer.padding_side = "right"
    expected = model.config.to_dict()
    settings = {"max_new_tokens": 3}
    answers = model.batch_chat(tokenizer, tiny.pixels(2), ["What?", "What is shown in the image?"], settings, [1, 1])
    alone = model.chat(tokenizer, tiny.pixels(2)[:1], "What?", settings)
    assert answers[0] == alone
    assert model.config.to_dict() == expected
    assert tokenizer.padding_side == "right"
    assert model.img_context_token_id == (configured or tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))


def test_a_folder_of_another_kind_is_refused_by_name(tmp_path):
    tiny.internvl_model().save_pretrained(tmp_path / "cg")
    tiny.chat_model().save_pretrained(tmp_path / "chat")
    tiny.vision_model().save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(tiny.chat_config().text_config).save_pretrained(tmp_path / "llama")
    for wrong, right, cls in (
        ("cg", "chat", InternVLChatForConditionalGeneration),
        ("vision", "chat", InternVLChatForConditionalGeneration),
        ("llama", "chat", InternVLChatForConditionalGeneration),
        ("chat", "cg", InternVLModel),
        ("vision", "cg", InternVLModel),
        ("llama", "vision", InternVisionModel),
    ):
        with pytest.raises(
            ValueError, match=rf"{wrong}` holds a model of the kind '\w+', but {cls.__name__} loads '\w+'"
        ):
            cls.from_pretrained(tmp_path / wrong)
        cls.from_pretrained(tmp_path / right)
    InternVisionModel.from_pretrained(tmp_path / "chat")  # its tower
    config = InternVLChatConfig.from_pretrained(tmp_path / "chat")
    with pytest.raises(ValueError, match="InternVLModel loads 'internvl_14b'"):
        InternVLModel.from_pretrained(tmp_path / "cg", config=config)


@pytest.mark.parametrize("task", ["text-generation", "image-text-to-text", "image-classification"])
def test_a_pipeline_of_a_task_that_a_model_has_not_is_refused(task, root):
    """transformers has an `InternVLModel` and an `InternVLConfig` too, which must not be taken for these."""
    assert json.loads((root / "internvl_g" / "config.json").read_text())["architectures"] == ["InternVLModel"]
    with pytest.raises(ValueError, match="AutoModelFor"):
        pipeline(task, model=str(root / "internvl_g"))


@pytest.mark.parametrize("door", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_an_auto_class_that_a_model_does_not_have_refuses_its_configuration(door):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        door.from_config(tiny.internvl_model().config)


def test_get_decoder_gives_the_language_model_without_its_head():
    for name in ("chat-llama", "chat-internlm2", "chat-full"):
        model = tiny.MODELS[name][0]()
        assert model.get_decoder() is model.language_model.model
    assert tiny.MODELS["chat-base"][0]().get_decoder().embed_tokens is not None
    model = tiny.internvl_model()
    assert model.get_decoder() is model.qllama.model
    for name in ("chat-llama", "chat-internlm2", "chat-full", "chat-base", "InternVLModel-G"):
        make, inputs = tiny.MODELS[name]
        model = make()
        expected, other = tiny.main_output(model(**inputs(model))), copy.deepcopy(model.get_decoder())
        model.set_decoder(other)
        assert model.get_decoder() is other
        assert torch.equal(tiny.main_output(model(**inputs(model))), expected)
