"""Dialogue data: every form of a row gives the same tensors, only answers are learned, nothing cuts an image,
packing."""

import base64
import io
import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from internvl.conversation_internvl import get_conversation_template, list_conversation_templates
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.processing_internvl import InternVLProcessor
from internvl.rows.bad_rows import BadRows, TooManyBadRowsError, UnusableRowError
from internvl.training.data.dialogues import DialogueCollator, DialogueDataset, DialogueEncoder, read_dialogue

from . import fixtures_processing
from .fixtures_dialogues import BAD_ROWS, llava
from .fixtures_processing import SEQ
from .fixtures_text import make_image
from .tiny import DECODERS, chat_config, randomize


make_processor = cache(partial(fixtures_processing.make_processor, side=56))
SIZES = {"a.png": (56, 56), "b.png": (168, 56), "c.png": (56, 112)}  # 1, 3 + 1 and 2 + 1 tiles


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(SIZES.items()):
        make_image(*size, seed=seed).save(folder / name)
    return folder


@pytest.fixture
def encoder(images) -> DialogueEncoder:
    return DialogueEncoder(make_processor(), images=images)


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def text(value: str) -> dict:
    return {"type": "text", "text": value}


# One dialogue: two images in the first question, one in the second.
QUESTIONS = ("What is in and in ?", "And in ?")
ANSWERS = ("A bus.", "A cat, on a mat.")


def same_dialogue(images: Path) -> dict[str, dict]:
    """The same dialogue in every form."""
    marked = ("What is in <image>\n and in <image>\n?", "And in <image>\n?")
    names = list(SIZES)
    turns = [*zip(marked, ANSWERS, strict=True)]
    flat = [message for turn in turns for message in turn]
    system = "Be brief."
    roles = ("user", "assistant") * 2
    messages = [{"role": "system", "content": system}]
    messages += [{"role": role, "content": value} for role, value in zip(roles, flat, strict=True)]
    parts = [[text("What is in "), 0, text(" and in "), 1, text("?")], [text("And in "), 2, text("?")]]

    def openai(source) -> dict:
        contents = [
            [part if isinstance(part, dict) else source(names[part]) for part in question] for question in parts
        ]
        messages = [{"role": "system", "content": [text(system)]}]
        for content, answer in zip(contents, ANSWERS, strict=True):
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages}

    def as_bytes(name: str) -> dict:
        return {"bytes": (images / name).read_bytes(), "path": name}

    return {
        "llava": llava(*flat, image=names, system=system),
        "llava with a system message": {
            "conversations": [{"from": "system", "value": system}, *llava(*flat)["conversations"]],
            "image": names,
        },
        "sharegpt": {
            "system": system,
            "conversations": [{"from": role, "value": value} for role, value in zip(roles, flat, strict=True)],
            "images": names,
        },
        "messages and images": {
            "messages": messages,
            "images": [{"path": name, "bytes": None} for name in names],
        },
        "messages and bytes": {
            "messages": messages,
            "images": [as_bytes(name) for name in names],
        },
        "messages with parts, images beside": {
            **openai(lambda name: {"type": "image"}),
            "images": [Image.open(images / name) for name in names],
        },
        "openai": openai(lambda name: {"type": "image_url", "image_url": {"url": data_uri(images / name)}}),
        "openai with paths": openai(lambda name: {"type": "image_url", "image_url": str(images / name)}),
        "parts with images": openai(lambda name: {"type": "image", "image": name}),
        "query and response": {
            "query": marked[1], "response": ANSWERS[1], "history": [list(turns[0])], "images": names, "system": system,
        },
    }  # fmt: skip


def answers_by_offsets(processor: InternVLProcessor, messages: list[dict], tiles: list[int]) -> list[int]:
    """Slow second opinion on labels: the text is put together by hand, and searched for the answers."""
    prompt = processor.apply_chat_template(messages, tokenize=False)
    for count in tiles:
        prompt = prompt.replace("<IMG_CONTEXT>\n", f"<img>{'@' * (SEQ * count)}</img>\n", 1)
    prompt = prompt.replace("@", "<IMG_CONTEXT>")
    spans, position = [], 0
    for message in messages:
        if message["role"] == "assistant":
            opening, answer = "<|im_start|>assistant\n", message["content"][0]["text"] + "<|im_end|>"
            start = prompt.index(opening + answer, position) + len(opening)
            position = start + len(answer)
            spans.append((start, position))
    encoded = processor.tokenizer(prompt, return_offsets_mapping=True)
    return [
        index if any(start < last and first < end for start, end in spans) else -100
        for index, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- the forms
def test_every_form_gives_the_same_tensors(encoder, images):
    rows = same_dialogue(images)
    expected = encoder(rows["llava"])
    assert expected["pixel_values"].shape == (1 + 4 + 3, 3, 56, 56)
    decoded = encoder.processor.tokenizer.decode(expected["input_ids"])
    assert decoded.replace("<IMG_CONTEXT>", "").count("What is in <img></img>\n and in <img></img>\n?") == 1
    assert "Be brief." in decoded
    for name, row in rows.items():
        encoded = encoder(row)
        assert set(encoded) == set(expected)
        for key, value in expected.items():
            assert torch.equal(encoded[key], value), f"{key} of {name}"


def test_images_without_a_place_come_first():
    messages = read_dialogue({"query": "What?", "response": "A bus.", "images": [b"1", b"2"]})
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]


def test_text_only_rows_and_empty_image_columns(encoder):
    rows = [llava("Hello", "Hi"), llava("Hello", "Hi", image=None), llava("Hello", "Hi", image="", images=[])]
    encoded = [encoder(row) for row in rows]
    assert all(set(row) == {"input_ids", "labels"} for row in encoded)
    assert all(torch.equal(row["input_ids"], encoded[0]["input_ids"]) for row in encoded)


def test_image_tokens_in_texts_stay_text(encoder):
    row = llava("<image>\nWhat does <IMG_CONTEXT> mean?", "It is <image>.", image="a.png")
    ids = encoder(row)["input_ids"]
    assert (ids == encoder.processor.image_token_id).sum() == SEQ


def test_parts_that_name_a_image_make_placeholders_plain_text(encoder):
    content = [{"type": "image", "image": "a.png"}, text("Write <image>!")]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]}
    assert "Write < image>!" in encoder.processor.tokenizer.decode(encoder(row)["input_ids"])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_say_what_is_wrong(encoder, name):
    row, match = BAD_ROWS[name]
    with pytest.raises(UnusableRowError, match=match):
        encoder(row)


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("name", list_conversation_templates())
def test_labels_are_the_answers_and_their_stops(images, name):
    encoder = DialogueEncoder(make_processor(name), images=images)
    template = get_conversation_template(name)
    encoded = encoder(same_dialogue(images)["llava"])
    kept = encoded["labels"] != -100
    assert torch.equal(encoded["labels"][kept], encoded["input_ids"][kept])
    runs = torch.where(kept[1:] != kept[:-1])[0].add(1).tolist()
    pieces = torch.tensor_split(encoded["input_ids"], runs)[1::2]
    expected = [template.answer_prefix + answer + template.stop for answer in ANSWERS]
    assert [encoder.processor.tokenizer.decode(piece) for piece in pieces] == expected


def test_labels_equal_a_search_for_the_answers(encoder, images):
    rows = [
        (same_dialogue(images)["llava"], [1, 4, 3]),
        (llava("A bus.", "A bus.", "A bus.", "A bus."), []),  # questions that read like answers
        (llava("<image>\n\nA cat?", "é, 猫.", image="b.png"), [4]),
    ]
    for row, tiles in rows:
        expected = answers_by_offsets(encoder.processor, read_dialogue(row, images), tiles)
        assert encoder(row)["labels"].tolist() == expected


# ----------------------------------------------------------------------------------------------------------- long rows
def test_rows_within_the_limit_are_left_alone(encoder, images):
    row = same_dialogue(images)["llava"]
    whole = encoder(row)
    for rule in ("drop", "cut", "error"):
        limited = DialogueEncoder(encoder.processor, len(whole["input_ids"]), rule, images)(row)
        assert torch.equal(limited["input_ids"], whole["input_ids"])


@pytest.mark.parametrize("length", range(1, 90))
def test_a_cut_never_goes_through_an_image_nor_leaves_nothing_to_learn(images, length):
    row = llava("<image>\nWhat?", "A bus, red.", "And <image>\n?", "A cat on a mat.", image=["a.png", "c.png"])
    whole = DialogueEncoder(make_processor(), images=images)(row)
    ids, labels = whole["input_ids"], whole["labels"]
    is_image = torch.isin(ids, torch.tensor(make_processor().image_token_ids))
    assert len(ids) > 40
    encoder = DialogueEncoder(make_processor(), length, "cut", images)
    if length < len(ids) and (is_image[length:].any() or (labels[:length] == -100).all()):
        with pytest.raises(UnusableRowError, match=r"go through an image|no answer is left"):
            encoder(row)
        return
    cut = encoder(row)
    assert torch.equal(cut["input_ids"], ids[:length])
    assert torch.equal(cut["labels"], labels[:length])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])


def test_long_rows_are_dropped_or_end_the_run(images):
    row = llava("Hello", "A long answer, longer than ten tokens.")
    with pytest.raises(UnusableRowError, match=r"has \d+ tokens, `max_length` is 10"):
        DialogueEncoder(make_processor(), 10)(row)
    with pytest.raises(ValueError, match='lower `max_num`, or set `too_long` to "drop"') as caught:
        DialogueEncoder(make_processor(), 10, "error")(row)
    assert not isinstance(caught.value, UnusableRowError)
    with pytest.raises(ValueError, match="`too_long` must be one of drop, cut, error"):
        DialogueEncoder(make_processor(), 10, "shorten")


def test_settings_reach_the_image_processor(images):
    row = llava("<image>", "a", image="b.png")
    assert len(DialogueEncoder(make_processor(), images=images, max_num=1)(row)["pixel_values"]) == 1


# --------------------------------------------------------------------------------------------------------------- batch
def mixed_rows() -> list[dict]:
    """Unequal tile counts, a text-only row in the middle, several turns."""
    return [
        llava("<image>\nWhat?", "A bus.", image="a.png"),
        llava("Hello", "Hi, how are you?", "Well.", "Fine."),
        llava("<image>\nand <image>\n?", "A cat on a mat.", image=["b.png", "c.png"]),
        llava("Bye", "Bye."),
    ]


def test_batches_are_padded_on_the_right(encoder):
    rows = [encoder(row) for row in mixed_rows()]
    batch = DialogueCollator(encoder)(mixed_rows())
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert torch.equal(batch["input_ids"][number, :length], row["input_ids"])
        assert torch.equal(batch["labels"][number, :length], row["labels"])
        assert (batch["labels"][number, length:] == -100).all()
        assert (batch["input_ids"][number, length:] == encoder.processor.tokenizer.pad_token_id).all()
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))


def test_encoded_rows_and_raw_rows_give_the_same_batch(encoder):
    raw, encoded = (DialogueCollator(encoder)(rows) for rows in (mixed_rows(), [encoder(row) for row in mixed_rows()]))
    assert all(torch.equal(raw[key], encoded[key]) for key in raw)


def test_a_batch_without_images_has_no_pixels(encoder):
    assert "pixel_values" not in DialogueCollator(encoder)([mixed_rows()[1]])


# ------------------------------------------------------------------------------------------------------------- packing
@cache
def chat_model(decoder: str = "llama") -> InternVLChatForConditionalGeneration:
    tokenizer = make_processor().tokenizer
    text_config = {**DECODERS[decoder], "vocab_size": len(tokenizer)}
    image_token_id = make_processor().image_token_id
    return randomize(
        InternVLChatForConditionalGeneration(
            chat_config(decoder, text_config=text_config, image_token_id=image_token_id)
        )
    )


def loss_and_gradients(model, batch, count) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_loss_and_gradients_equal_unpacked(encoder, decoder, attention):
    model = chat_model(decoder)
    model.set_attn_implementation(attention)
    assert model.language_model.config._attn_implementation == attention
    padded, packed = (DialogueCollator(encoder, pack=pack)(mixed_rows()) for pack in (False, True))
    assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
    assert set(packed) == {"input_ids", "labels", "position_ids", "pixel_values", "use_cache"}
    count = int((padded["labels"] != -100).sum())
    assert count == (packed["labels"] != -100).sum()
    expected, expected_gradients = loss_and_gradients(model, padded, count)
    loss, gradients = loss_and_gradients(model, packed, count)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_does_not_see_its_neighbours(encoder, attention):
    model = chat_model()
    model.set_attn_implementation(attention)
    rows = [encoder(row) for row in mixed_rows()]
    logits = []
    for first in (rows[1], {**rows[1], "input_ids": rows[1]["input_ids"].roll(3)}):
        batch = DialogueCollator(encoder, pack=True)([first, rows[3]])
        logits.append(model(**batch).logits[0])
    length = len(rows[1]["input_ids"])
    assert not torch.allclose(logits[0][:length], logits[1][:length])
    torch.testing.assert_close(logits[0][length:], logits[1][length:], rtol=0, atol=0)


@pytest.mark.parametrize("pack", [False, True])
def test_trainer_takes_the_files(tmp_path, encoder, images, pack):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows() * 2))
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=3, learning_rate=3e-3, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(InternVLChatForConditionalGeneration(chat_model().config)).train()
    trainer = Trainer(
        model,
        arguments,
        data_collator=DialogueCollator(encoder, pack=pack),
        train_dataset=DialogueDataset(path, encoder, images),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


# --------------------------------------------------------------------------------------------------------------- files
def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def test_files_are_one_data_set_with_images_beside_them(tmp_path, images):
    for name in SIZES:
        (tmp_path / name).write_bytes((images / name).read_bytes())
    files = [write_rows(tmp_path / "a.json", mixed_rows()[:3]), write_rows(tmp_path / "b.jsonl", mixed_rows()[3:])]
    encoder = DialogueEncoder(make_processor())
    dataset = DialogueDataset(files, encoder)
    assert len(dataset) == 4
    for index, row in enumerate(mixed_rows()):
        assert torch.equal(dataset[index]["input_ids"], encoder(row, images)["input_ids"])
    with pytest.raises(IndexError):
        dataset[4]


def test_an_unusable_row_is_counted_and_the_next_one_takes_its_place(tmp_path, encoder, images):
    rows = [llava("a", "one"), llava("a", ""), llava("<image>", "b", image="z.png"), llava("a", "four")]
    dataset = DialogueDataset(write_rows(tmp_path / "a.jsonl", rows), encoder, images)
    expected = [0, 3, 3, 3]
    for index, row in enumerate(expected):
        assert torch.equal(dataset[index]["input_ids"], encoder(rows[row])["input_ids"])
    assert dataset.bad_rows.broken == 3
    assert set(dataset.bad_rows.reasons) == {"The answer in message * is empty", "The image * is missing"}


def test_too_many_unusable_rows_end_the_run(tmp_path, encoder, images):
    path = write_rows(tmp_path / "a.jsonl", [llava("a", "one"), llava("a", "")])
    dataset = DialogueDataset(path, encoder, images, BadRows(max_rate=0.1, grace=1))
    with pytest.raises(TooManyBadRowsError, match=r"1 of 2 rows are broken.*a\.jsonl:2: The answer"):
        [dataset[0], dataset[1]]


def test_files_without_a_usable_row_are_refused(tmp_path, encoder):
    empty = tmp_path / "a.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"There is no row in .*a\.jsonl"):
        DialogueDataset(empty, encoder)
    with pytest.raises(ValueError, match="None of 1 rows can be used"):
        DialogueDataset(write_rows(tmp_path / "b.jsonl", [llava("a", "")]), encoder)[0]


def test_broken_images_make_a_row_unusable(tmp_path, encoder):
    content = io.BytesIO()
    make_image(64, 64).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue()[:200])
    with pytest.raises(UnusableRowError, match=r"a.png.*cannot be read as an image"):
        encoder(llava("<image>", "b", image="a.png"), tmp_path)
