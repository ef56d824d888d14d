"""Dialogues through the processor: messages, videos, chat templates, assistant masks and labels."""

import base64
import copy
import io
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.conversation_internvl import get_conversation_template, list_conversation_templates
from internvl.messages_internvl import assistant_masks
from internvl.processing_internvl import InternVLProcessor

from .fixtures_processing import SEQ, SQUARE, WIDE, assistant, chat, decoded, make_processor, span, user
from .fixtures_text import make_image


@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    return make_processor()


# ---------------------------------------------------------------------------------------------------------- dialogues
def test_dialogue_without_tokenizing_is_a_string(processor):
    dialogue = [user("What is ", WIDE, "this?")]
    text = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is <IMG_CONTEXT>\nthis?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template([dialogue, dialogue], add_generation_prompt=True) == [text, text]


def test_dialogue_equals_the_call_with_its_prompt(processor):
    dialogue = [user(WIDE, "What?"), assistant("Noise."), user("And ", SQUARE, " this?")]
    features = chat(processor, dialogue, add_generation_prompt=True)
    prompt = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    called = processor(images=[WIDE, SQUARE], text=prompt, return_tensors="pt")
    assert set(features) == set(called)
    assert all(torch.equal(features[name], called[name]) for name in called)


def test_dialogue_returns_ids_unless_a_dict_is_asked_for(processor):
    ids = processor.apply_chat_template([user("Hi")], tokenize=True, return_tensors="pt")
    assert decoded(processor, ids[0]) == "<s><|im_start|>user\nHi<|im_end|>\n"


def test_batch_of_unequal_dialogues_equals_the_single_ones(processor):
    dialogues = [
        [user("No image.")],
        [user(WIDE, "One."), assistant("Yes."), user("Sure?")],
        [{"role": "system", "content": "Be brief."}, user("Three: ", SQUARE, WIDE, " and ", SQUARE)],
    ]
    batch = chat(processor, dialogues, add_generation_prompt=True)
    singles = [chat(processor, dialogue, add_generation_prompt=True) for dialogue in dialogues]
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        assert torch.equal(row[mask.bool()], single["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist())
    tiles = [single["pixel_values"] for single in singles if "pixel_values" in single]
    assert torch.equal(batch["pixel_values"], torch.cat(tiles))


def test_order_of_the_prompt_is_the_order_of_the_message(processor):
    orders = np.random.default_rng(0).integers(0, 3, (20, 6))
    kinds = ["text ", SQUARE, WIDE]
    for order in orders:
        text = decoded(processor, chat(processor, [user(*(kinds[kind] for kind in order))])["input_ids"][0])
        expected = "".join(["text ", span(1) + "\n", span(4) + "\n"][kind] for kind in order)
        assert text == f"<s><|im_start|>user\n{expected}<|im_end|>\n"


def test_images_come_as_path_base64_and_address_form(processor, tmp_path):
    path = tmp_path / "image.png"
    SQUARE.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    parts = [
        {"type": "image", "image": SQUARE},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
    ]
    expected = chat(processor, [{"role": "user", "content": parts[:1]}])
    for part in parts[1:]:
        features = chat(processor, [{"role": "user", "content": [part]}])
        assert torch.equal(features["pixel_values"], expected["pixel_values"])
        assert torch.equal(features["input_ids"], expected["input_ids"])


def test_messages_of_the_caller_are_not_changed(processor):
    buffer = io.BytesIO()
    SQUARE.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    dialogue = [{"role": "user", "content": [image, {"type": "text", "text": "<img>"}, {"type": "text", "text": "b"}]}]
    before = copy.deepcopy(dialogue)
    chat(processor, dialogue)
    assert dialogue == before


def test_settings_may_be_flat_or_nested(processor):
    dialogue = [user(WIDE)]
    for kwargs in (
        {"max_num": 1},
        {"processor_kwargs": {"max_num": 1}},
        {"processor_kwargs": {"images_kwargs": {"max_num": 1}}},
        {"images_kwargs": {"max_num": 1}},
    ):
        assert chat(processor, dialogue, **kwargs)["pixel_values"].shape[0] == 1
    merged = chat(processor, dialogue, max_num=1, processor_kwargs={"return_mm_token_type_ids": True})
    assert merged["pixel_values"].shape[0] == 1
    assert merged["mm_token_type_ids"].sum() == 2 + SEQ


def test_variables_and_other_templates_pass_through(processor):
    jinja = "{{ greeting }} {{ messages[0]['content'] }}"
    message = [{"role": "user", "content": "you"}]
    assert processor.apply_chat_template(message, jinja, greeting="Hello") == "Hello you"
    several = make_processor()
    several.chat_template = {"default": "{{ messages | length }}", "other": "{{ messages | length }} {{ greeting }}"}
    assert several.apply_chat_template(message) == "1"
    assert several.apply_chat_template(message, "other", greeting="x") == "1 x"
    for wrong in ("another", "", 5):  # the name of no template is a text that Jinja takes for one
        with pytest.raises(ValueError, match=r"does not read `messages`.*default, other"):
            several.apply_chat_template(message, wrong)


def test_only_undeclared_variables_belong_to_the_template(processor):
    """Not a word in its text, a comment, a loop's own name or a key."""
    loop = "{% for m in messages %}{{ m.role }}{% endfor %}"
    jinja = "{# padding #}max_num {% set inner = 1 %}" + loop + "{{ messages[0]['content'] }}"
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}], jinja, padding=True)
    features = chat(
        processor, [{"role": "user", "content": "Hi"}], chat_template=jinja, padding="max_length", max_length=64
    )
    assert features["input_ids"].shape == (1, 64)
    for name in ("inner", "m", "role", "enable_thinking"):
        with pytest.raises(ValueError, match=f"`{name}` is no setting"):
            processor.apply_chat_template([{"role": "user", "content": "Hi"}], jinja, **{name: True})
    with pytest.raises(ValueError, match="refuses"):
        processor.apply_chat_template([user("Hi")], "{% for m in messages %}")
    for settings in ({}, {"tokenize": True}, {"tokenize": True, "return_dict": True, "return_labels": True}):
        with pytest.raises(ValueError, match="cannot render"):
            processor.apply_chat_template([user("Hi")], "{{ 'a' + messages[0]['content'] }}", **settings)


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
WITH_TOOLS = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | length }}{% endif %}{% endfor %}"
)


def test_tools_are_rendered_or_refused(processor):
    """Refused by the processor: that a template has the word `tool` in it is read by others as being able to."""
    assert not any("tool" in get_conversation_template(name).to_jinja() for name in list_conversation_templates())
    hi = {"role": "user", "content": "Hi"}
    answer = {"role": "tool", "content": "3"}
    assert "[f]" in processor.apply_chat_template([hi, CALL, answer], WITH_TOOLS, tools=[TOOL])
    assert processor.apply_chat_template([hi, CALL, answer], WITH_TOOLS).endswith("1tool:3")
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for jinja in (None, plain):
        for settings in ({}, {"tokenize": True}, {"tokenize": True, "return_labels": True}):
            with pytest.raises(ValueError, match="`tools` was given"):
                processor.apply_chat_template([hi], jinja, tools=[TOOL], **settings)
            with pytest.raises(ValueError, match=r"(?i)message 1 .*`tool_calls`"):
                processor.apply_chat_template([hi, CALL], jinja, **settings)
    with pytest.raises(ValueError, match="`documents` was given"):
        processor.apply_chat_template([hi], documents=[{"title": "a", "text": "b"}])
    for role in ("tool", "function", "developer", "human"):
        with pytest.raises(ValueError, match=f"Unknown role `{role}` of message 1"):
            processor.apply_chat_template([hi, {"role": role, "content": "3"}])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Hi", "'Hi' (str)"),
        (None, "None (NoneType)"),
        (5, "5 (int)"),
        ({}, "needs a `role`"),
        ({"from": "human", "value": "Hi"}, "'from': 'human'"),
        ({"role": 5, "content": "Hi"}, "'role': 5"),
        ({"role": "user"}, "None (NoneType)"),
        ({"role": "user", "content": None}, "None (NoneType)"),
        ({"role": "user", "content": 5}, "5 (int)"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "(dict)"),
        ({"role": "user", "content": []}, "[] (list)"),
        ({"role": "user", "content": ["x"]}, "'x' (str)"),
        ({"role": "user", "content": [None]}, "None (NoneType)"),
        ({"role": "user", "content": [{}]}, "None (NoneType)"),
        ({"role": "user", "content": [{"type": "text"}]}, "None (NoneType)"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "None (NoneType)"),
        ({"role": "user", "content": [{"type": "text", "text": []}]}, "[] (list)"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "5 (int)"),
        ({"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, "'audio' (str)"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "['text'] (list)"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": 5}]}, "5 (int)"),
        ({"role": "user", "content": [{"type": "image", "image": SQUARE, "path": "a.png"}]}, "`image`, `path`"),
        ({"role": "user", "content": "Hi", "name": "Ann"}, "`name`"),
    ],
)
def test_malformed_messages_are_named(processor, message, shown):
    good = {"role": "user", "content": "Hi"}
    for settings in ({}, {"tokenize": True, "return_labels": True}):
        with pytest.raises(ValueError, match="(?i)message 1 .*" + re.escape(shown)):
            processor.apply_chat_template([good, message], **settings)
        with pytest.raises(ValueError, match="(?i)message 0 of conversation 1 .*" + re.escape(shown)):
            processor.apply_chat_template([[good], [message]], **settings)


@pytest.mark.parametrize(
    "conversation", ["Hi", None, 5, {"role": "user", "content": "Hi"}, [], [[]], [[user("Hi")], 5]]
)
def test_what_is_no_conversation_is_named(processor, conversation):
    with pytest.raises(ValueError, match=r"(?i)conversation.*(must be a list|is empty)"):
        processor.apply_chat_template(conversation)


def test_parts_may_have_the_keys_of_other_parts_without_a_value(processor):
    """As the rows of a data set have them."""
    empty = dict.fromkeys(("text", "image", "url", "path", "image_url"))
    parts = [{**empty, "type": "image", "image": SQUARE}, {**empty, "type": "text", "text": "Hi"}]
    found = chat(processor, [{"role": "user", "content": parts, "tool_calls": None, "name": None}])
    expected = chat(processor, [user(SQUARE, "Hi")])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_placeholder_typed_into_a_message_is_text_and_the_error_says_so(processor):
    message = [{"role": "user", "content": "<image>\nWhat?"}]
    with pytest.raises(ValueError, match=r"sample 0 has 0 and 1 image.*typed into a message.*\{\"type\": \"image\""):
        chat(processor, message, processor_kwargs={"images": [SQUARE]})
    with pytest.raises(ValueError, match=r"sample 0 has 0 and 1 image.*Write one `<IMG_CONTEXT>`"):
        processor(text="What?", images=[SQUARE])


@pytest.mark.parametrize(
    ("part", "dropped"),
    [
        ({"type": "text", "text": "a", "image": SQUARE}, "image"),
        ({"type": "image", "image": SQUARE, "text": "a"}, "text"),
        ({"type": "image", "image": SQUARE, "max_num": 1}, "max_num"),
        ({"type": "image_url", "image_url": "a.png", "video": [SQUARE]}, "video"),
        ({"type": "video", "video": [SQUARE], "fps": 2}, "fps"),
        ({"type": "video", "video": [SQUARE], "url": "a.mp4"}, "video`, `url"),
    ],
)
def test_what_nothing_reads_in_a_part_is_named(processor, part, dropped):
    for settings in ({}, {"tokenize": True}):
        with pytest.raises(ValueError, match=f"Message 0 .*`{dropped}`"):
            processor.apply_chat_template([{"role": "user", "content": [part]}], **settings)


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_an_image_part_has_its_image_under_any_key_of_one(processor, kind, tmp_path):
    path = str(tmp_path / "a.png")
    WIDE.save(path)
    expected = chat(processor, [user(WIDE)])
    for source in ({"image": WIDE}, {"url": path}, {"path": path}, {"image_url": path}, {"image_url": {"url": path}}):
        found = chat(processor, [{"role": "user", "content": [{"type": kind, **source}]}])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_images_beside_messages_take_the_places_that_are_empty_and_replace_none(processor):
    empty = [{"role": "user", "content": [{"type": "image"}]}]
    batch = [empty, [user("Hi")], [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]]
    expected = chat(processor, [user(WIDE)])["pixel_values"]
    buffer = io.BytesIO()
    WIDE.save(buffer, "PNG")
    buffer.seek(0)
    for images in (WIDE, np.asarray(WIDE), torch.tensor(np.asarray(WIDE)), buffer, [WIDE], [[WIDE]]):
        assert torch.equal(chat(processor, empty, images=images)["pixel_values"], expected)
    for images in ([WIDE, SQUARE, SQUARE], [[WIDE], None, [SQUARE, SQUARE]]):
        assert torch.equal(chat(processor, batch, images=images)["pixel_values"][: len(expected)], expected)
    for images in ([WIDE], [WIDE] * 4):
        with pytest.raises(ValueError, match="number of image tokens"):
            chat(processor, batch, images=images)
    for filled in ([user(WIDE)], [[user(WIDE)], empty]):
        with pytest.raises(ValueError, match="messages hold images too"):
            chat(processor, filled, images=[SQUARE])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "contrastive"}, "has no dialogues"),
        ({"mode": "nonsense"}, "`mode` must be"),
        ({"max_num": 1, "processor_kwargs": {"max_num": 2}}, "`max_num` was given twice"),
        ({"processor_kwargs": 5}, "`processor_kwargs` must be a dict"),
        ({"images_kwargs": [1]}, "`images_kwargs` must be a dict"),
        ({"truncation": True, "max_length": -1}, "`max_length` must be"),
        ({"text_kwargs": {"max_length": "5"}}, "`max_length` must be"),
        ({"padding_side": "centre"}, "`padding_side` must be"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be"),
        ({"text_pair": "b"}, "`text_pair` is no setting"),
        ({"return_overflowing_tokens": True}, "`return_overflowing_tokens` is no setting"),
        ({"return_labels": True, "return_dict": False}, "return_dict=True"),
        ({"return_assistant_tokens_mask": True, "tokenize": False}, "tokenize=True"),
    ],
)
def test_settings_of_a_dialogue_that_cannot_be_met_are_named(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        chat(processor, [user("Hi"), assistant("a")], **settings)


@pytest.mark.parametrize(
    "expression",
    [
        "1 / (messages | length - 1)",
        "messages[0].content[0]['x'].y",
        "'{x}'.format(y=messages)",
        "messages | nofilter",
    ],
)
def test_errors_of_a_template_are_its_refusal(processor, expression):
    with pytest.raises(ValueError, match="The chat template"):
        processor.apply_chat_template([user("Hi")], "{{ " + expression + " }}")


@pytest.mark.parametrize("text", [b"a", {"a"}, iter(())])
def test_texts_that_are_none_are_named(processor, text):
    with pytest.raises(ValueError, match=r"`text` (must be|holds no)"):
        processor(text=text, mode="caption")


def test_images_in_bottomless_lists_are_refused(processor):
    images: Any = SQUARE
    for _ in range(5000):
        images = [images]
    for call in (processor, processor.image_processor):
        with pytest.raises(ValueError, match="lists of lists"):
            call(images=images)


def test_final_message_can_be_continued(processor):
    dialogue = [user("Say it."), assistant("It is")]
    text = processor.apply_chat_template(dialogue, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt is")


def test_missing_template_and_empty_dialogue_raise():
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no \\(default\\) chat template"):
        processor.apply_chat_template([user("a")])
    with pytest.raises(ValueError, match="conversation is empty"):
        processor.apply_chat_template([])


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<img>", "</img>", "<image>", "<video>"])
def test_image_tokens_in_texts_are_escaped(processor, token):
    dialogue = [
        {"role": "system", "content": f"sys {token}"},
        {"role": "user", "content": f"str {token}"},
        {"role": "assistant", "content": [{"type": "text", "text": f"part {token}"}]},
        user(SQUARE, "split " + token[:2], token[2:4], token[4:]),
    ]
    features = chat(processor, dialogue)
    row = features["input_ids"][0].tolist()
    for name, count in (("<IMG_CONTEXT>", SEQ), ("<img>", 1), ("</img>", 1)):
        assert row.count(processor.tokenizer.convert_tokens_to_ids(name)) == count
    assert decoded(processor, row).count(f"< {token[1:]}") == 4


# -------------------------------------------------------------------------------------------------------------- videos
def frames_as_array() -> np.ndarray:
    return np.stack([np.asarray(make_image(96, 32, seed)) for seed in range(3)])


@pytest.mark.parametrize("form", ["images", "array", "tensor", "paths"])
def test_frames_are_announced_and_have_one_tile_each(processor, form, tmp_path):
    array = frames_as_array()
    video: Any = array
    if form == "tensor":
        video = torch.from_numpy(array)
    if form in ("images", "paths"):
        video = [Image.fromarray(frame) for frame in array]
    if form == "paths":
        for index, frame in enumerate(video):
            frame.save(tmp_path / f"{index}.png")
        video = [str(tmp_path / f"{index}.png") for index in range(3)]
    message = {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]}
    features = chat(processor, [message])
    expected = "".join(f"Frame{number}: {span(1)}\n" for number in (1, 2, 3))
    assert decoded(processor, features["input_ids"][0]) == f"<s><|im_start|>user\n{expected}What?<|im_end|>\n"
    alone = processor.image_processor(list(array), max_num=1, return_tensors="pt")["pixel_values"]
    assert torch.equal(features["pixel_values"], alone)


def test_prompt_of_a_video_is_the_published_one(processor):
    text = processor.apply_chat_template([user([SQUARE, SQUARE], "What?")])
    assert "Frame1: <IMG_CONTEXT>\nFrame2: <IMG_CONTEXT>\nWhat?" in text


@pytest.mark.parametrize("kwargs", [{}, {"max_num": 2}, {"max_patches": [2]}, {"images_kwargs": {"max_num": 2}}])
def test_images_beside_frames_keep_their_tiles(processor, kwargs):
    features = chat(processor, [user([WIDE, WIDE], WIDE)], return_num_patches=True, **kwargs)
    assert features["num_patches"].tolist() == [1, 1, 3 if kwargs else 4]


def test_too_few_settings_beside_frames_raise(processor):
    with pytest.raises(ValueError, match=r"`max_num` has 1 value\(s\) for 2 image"):
        chat(processor, [user([WIDE], WIDE, WIDE)], max_num=[2])


def test_frames_are_not_sampled_again_without_a_word(processor):
    for kwargs in ({"num_frames": 2}, {"fps": 1.0}, {"processor_kwargs": {"videos_kwargs": {"num_frames": 2}}}):
        with pytest.raises(ValueError, match="all frames in a message are used"):
            chat(processor, [user([SQUARE] * 3)], **kwargs)
        assert "pixel_values" in chat(processor, [user(SQUARE)], **kwargs)


@pytest.mark.parametrize("video", ["film.mp4", [], None, np.zeros((4, 4, 3))])
def test_video_files_are_refused(processor, video):
    with pytest.raises(ValueError, match="must hold its frames"):
        chat(processor, [{"role": "user", "content": [{"type": "video", "video": video}]}])


# ------------------------------------------------------------------------------------------------ masks and labels
def runs(processor: InternVLProcessor, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Texts of the marked stretches of one row."""
    found: list[list[int]] = []
    for index, (token, marked) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if marked:
            if index == 0 or not mask[index - 1]:
                found.append([])
            found[-1].append(token)
    return [processor.tokenizer.decode(run) for run in found]


ANSWERS = [["A red bus.", "", "Two people\nand  a dog ."], ["No."], [" Yes", "Noise: \u00e9\u4e66."]]


def training_dialogues() -> list[list[dict[str, Any]]]:
    first, second, third = ANSWERS
    return [
        [
            user(WIDE, "What is ", SQUARE, "shown?"),
            assistant(first[0]),
            user("Nothing?"),
            assistant(first[1]),
            user("And ", WIDE, "?"),
            {"role": "assistant", "content": [{"type": "text", "text": first[2]}]},
        ],
        [{"role": "system", "content": "Be brief."}, user("Text only"), assistant(second[0])],
        [user([SQUARE, WIDE], "Film?"), assistant(third[0]), user("<IMG_CONTEXT>"), assistant(third[1])],
    ]


@pytest.mark.parametrize("padding_side", [None, "left"])
@pytest.mark.parametrize("name", list_conversation_templates())
def test_masked_tokens_are_the_answers_and_their_stops(name, padding_side):
    processor = make_processor(name)
    template = get_conversation_template(name)
    features = chat(
        processor,
        training_dialogues(),
        return_assistant_tokens_mask=True,
        return_labels=True,
        processor_kwargs={"padding_side": padding_side},
    )
    masks, labels = features["assistant_masks"], features["labels"]
    assert masks.shape == labels.shape == features["input_ids"].shape
    for ids, mask, answers in zip(features["input_ids"], masks, ANSWERS, strict=True):
        expected = [template.answer_prefix + answer + template.stop for answer in answers]
        assert runs(processor, ids, mask) == expected
    assert torch.equal(labels, torch.where(masks.bool(), features["input_ids"], -100))
    assert not masks[features["attention_mask"] == 0].any()


def test_training_pads_on_the_right_and_single_equals_batched(processor):
    dialogues = training_dialogues()
    batch = chat(processor, dialogues, return_labels=True)
    assert batch["attention_mask"][:, 0].all()
    for row, dialogue in enumerate(dialogues):
        single = chat(processor, dialogue, return_labels=True)
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["labels"][row][kept], single["labels"][0])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}


def test_masks_as_lists(processor):
    features = processor.apply_chat_template(
        training_dialogues(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_labels=True
    )
    assert isinstance(features["labels"], list)
    lengths = [[len(row) for row in features[name]] for name in ("input_ids", "assistant_masks", "labels")]
    assert lengths[0] == lengths[1] == lengths[2]


def test_labels_without_an_answer_raise(processor):
    with pytest.raises(ValueError, match="nothing to learn"):
        chat(processor, [user("Hi")], return_labels=True)
    with pytest.raises(ValueError, match="nothing to learn"):
        chat(processor, [user("Hi"), assistant("Ho")], return_labels=True, truncation=True, max_length=3)


def test_masks_cost_linear_time(processor):
    offsets = np.stack([np.arange(200_000), np.arange(200_000) + 1], axis=1)
    spans = [(start, start + 1) for start in range(0, 200_000, 3)]
    replaced = [{"span": (at, at + 1), "new_span": (at, at + 1)} for at in range(0, 200_000, 5)]
    began = time.perf_counter()
    (mask,) = assistant_masks([spans], [offsets], [replaced])
    assert time.perf_counter() - began < 5  # quadratic: hours
    assert mask.tolist() == [int(index % 3 == 0) for index in range(200_000)]


def test_masks_refuse_what_would_misplace_them(processor):
    with pytest.raises(ValueError, match="exclude assistant masks"):
        chat(processor, [user("a"), assistant("b")], return_labels=True, continue_final_message=True)
    jinja = "{% for m in messages %}<image>{% generation %}x{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="for assistant masks it must write"):
        chat(processor, [user("a")], return_labels=True, chat_template=jinja)


def test_half_a_surrogate_pair_in_a_message_is_named(processor):
    for messages in ([user("What \ud83d?")], [{"role": "user", "content": "\udc00"}]):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            processor.apply_chat_template(messages, tokenize=True, return_dict=True)
