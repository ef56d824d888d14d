"""Conversation templates: every published prompt, and the Jinja text against the plain rendering."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from internvl.conversation_internvl import (
    build_query,
    escape_image_tokens,
    get_conversation_template,
    list_conversation_templates,
    with_image_placeholder,
)

from .fixtures_text import make_tokenizer


GOLDEN = json.loads((Path(__file__).parent / "golden" / "conversation" / "templates.json").read_text("utf-8"))
TEXTS = GOLDEN["texts"]
PLAIN_NAMES = ("default", "v1", "vicuna_v1", "llava_v1")
CHAT_NAMES = list(GOLDEN["internvl_chat"])
PUBLISHED = [("internvl_chat", name) for name in CHAT_NAMES] + [
    ("llava", name) for name, record in GOLDEN["llava"].items() if "error" not in record
]
# Name of the case: turns, system message, whether an answer is to follow.
CASES: dict[str, tuple[list[tuple[str, str]], str | None, bool]] = {
    "one_turn": ([("user", "q1")], None, True),
    "two_turns": ([("user", "q1"), ("assistant", "a1"), ("user", "q2")], None, True),
    "training_full_turn": ([("user", "q1"), ("assistant", "a1")], None, False),
    "custom_system": ([("user", "zh")], TEXTS["sysm"], True),
    "empty_system": ([("user", "zh")], "", True),
}
NUM_IMAGE_TOKEN = 2


def name_of(family: str, name: str) -> str:
    return name if family == "internvl_chat" or name in PLAIN_NAMES else f"llava/{name}"


def messages_of(case: str) -> list[dict[str, str]]:
    return [{"role": role, "content": TEXTS[text]} for role, text in CASES[case][0]]


def jinja(template: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    (text,), _ = render_jinja_template(
        [messages], chat_template=template.to_jinja(), add_generation_prompt=add_generation_prompt
    )
    return text


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_prompt_equals_the_published_one(family, name, case):
    template = get_conversation_template(name_of(family, name))
    _, system_message, add_generation_prompt = CASES[case]
    rendered = template.render(messages_of(case), system_message, add_generation_prompt)
    assert rendered == GOLDEN[family][name]["prompts"][case]


def test_every_published_template_is_tested():
    assert {name_of(*pair) for pair in PUBLISHED} | {"internvl"} == set(list_conversation_templates())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", list_conversation_templates())
def test_jinja_equals_render(name, case):
    template = get_conversation_template(name)
    _, system_message, add_generation_prompt = CASES[case]
    messages = messages_of(case)
    with_system = messages if system_message is None else [{"role": "system", "content": system_message}, *messages]
    expected = template.render(messages, system_message, add_generation_prompt)
    assert template.render(with_system, None, add_generation_prompt) == expected
    assert jinja(template, with_system, add_generation_prompt) == expected


@pytest.mark.parametrize("name", list_conversation_templates())
def test_parts_are_rendered_in_order_and_images_as_placeholders(name):
    template = get_conversation_template(name)
    parts = [
        {"type": "text", "text": 'Compare "this" '},
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "with\\n that "},
        {"type": "image"},
        {"type": "text", "text": "{{ 1 + 1 }}"},
    ]
    flat = 'Compare "this" <IMG_CONTEXT>\nwith\\n that <IMG_CONTEXT>\n{{ 1 + 1 }}'
    text_parts = [{"type": "text", "text": "Sys"}, {"type": "text", "text": "tem."}]
    messages = [{"role": "system", "content": text_parts}, {"role": "user", "content": parts}]
    flat_messages = [{"role": "system", "content": "System."}, {"role": "user", "content": flat}]
    assert jinja(template, messages) == template.render(flat_messages)


@pytest.mark.parametrize("name", list_conversation_templates())
def test_generation_markers_hold_what_the_model_writes(name):
    template = get_conversation_template(name)
    dialogue = [("Why?", "Because."), ("And then?", ""), ("So?", " spaced ")]
    messages = [
        message
        for question, answer in dialogue
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=template.to_jinja(), return_assistant_tokens_mask=True
    )
    written = [text[start:end] for start, end in spans]
    assert written == [template.answer_prefix + answer + template.stop for _, answer in dialogue]
    assert all(text[:start].endswith(template.generation_prompt) for start, _ in spans)


def test_own_template_leaves_an_empty_system_block_out():
    template = get_conversation_template("internvl")
    question = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for messages in (question, [{"role": "system", "content": ""}, *question]):
        assert template.render(messages) == expected
        assert jinja(template, messages) == expected
    assert template.render(question, "Be kind.") == "<|im_start|>system\nBe kind.<|im_end|>\n" + expected


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_llava_names_are_found_with_and_without_prefix(name):
    assert get_conversation_template(f"llava/{name}") is get_conversation_template(name)


def test_clashing_names_give_different_templates():
    assert get_conversation_template("Hermes-2") != get_conversation_template("llava/Hermes-2")


@pytest.mark.parametrize("name", ["nonsense", "llava/internvl2_5", "llava/nonsense", ""])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"Unknown conversation template.*internvl_zh.*llava/phi3-chat"):
        get_conversation_template(name)


@pytest.mark.parametrize("name", ["plain", "llava/plain"])
def test_plain_is_refused_because_it_is_no_dialogue(name):
    with pytest.raises(ValueError, match="no conversation template"):
        get_conversation_template(name)


@pytest.mark.parametrize(
    ("messages", "system_message", "match"),
    [
        ([{"role": "system", "content": "a"}], "b", "given twice"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], None, "must be the first"),
        ([{"role": "tool", "content": "a"}], None, "Unknown role `tool`"),
        ([{"role": "user", "content": ["a"]}], None, "must be a string, got list"),
        ([{"role": "user"}], None, "must be a string, got NoneType"),
    ],
)
def test_render_refuses_what_it_cannot_place(messages, system_message, match):
    with pytest.raises(ValueError, match=match):
        get_conversation_template("internvl").render(messages, system_message)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "tool", "content": "a"}, "Unknown role `tool`"),
        ({"role": "user", "content": [{"type": "video"}]}, "pass its frames to"),
    ],
)
def test_jinja_refuses_what_it_cannot_place(message, match):
    with pytest.raises(Exception, match=match):
        jinja(get_conversation_template("internvl"), [message])
    with pytest.raises(Exception, match="must be the first"):
        jinja(
            get_conversation_template("internvl"),
            [{"role": "user", "content": "a"}, {"role": "system", "content": ""}],
        )


# ------------------------------------------------------------------------------------------ the published chat helpers
def query(name: str, question: str, history: Any = None, tiles: Any = None, system_message: str | None = None) -> str:
    return build_query(
        get_conversation_template(name), question, history, tiles, NUM_IMAGE_TOKEN, system_message=system_message
    )


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_chat_queries_equal_the_published_ones(name):
    golden = GOLDEN["internvl_chat"][name]["chat"]
    two = f"Image-1: <image>\nImage-2: <image>\n{TEXTS['zh']}"
    history = [(f"<image>\n{TEXTS['zh']}", TEXTS["a1"])]
    assert query(name, TEXTS["q2"], tiles=[3]) == golden["single_image_no_placeholder"]["query"]
    assert query(name, two, tiles=[2, 3]) == golden["two_images_num_patches"]["query"]
    assert query(name, TEXTS["q2"], history, [3]) == golden["second_turn_history"]["query"]
    assert query(name, TEXTS["zh"]) == golden["text_only"]["query"]
    assert [query(name, TEXTS["zh"], tiles=[1]), query(name, TEXTS["q2"], tiles=[2])] == golden["batch"]["queries"]
    custom = GOLDEN["internvl_chat"][name]["chat_custom_system"]["query"]
    assert query(name, TEXTS["zh"], system_message=TEXTS["sysm"]) == custom


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_remembered_questions_equal_the_published_ones(name):
    golden = GOLDEN["internvl_chat"][name]["chat"]
    assert with_image_placeholder(TEXTS["q2"], None, True) == golden["single_image_no_placeholder"]["history"][0][0]
    two = golden["two_images_num_patches"]["history"][0][0]
    assert with_image_placeholder(two, None, True) == two
    assert with_image_placeholder(TEXTS["q2"], [("a", "b")], True) == golden["second_turn_history"]["history"][1][0]
    assert with_image_placeholder(TEXTS["zh"], None, False) == golden["text_only"]["history"][0][0]


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_stop_string_and_cut_answer_equal_the_published_ones(name):
    template = get_conversation_template(name)
    stop = GOLDEN["internvl_chat"][name]["eos_string_used_by_chat"]
    assert template.stop_strings[0] == stop
    assert template.cut_answer(f" hello {stop} more {stop}") == "hello"
    assert template.cut_answer("hello\n") == "hello"


def test_history_is_not_changed():
    history = [("<image>\nWhat?", "A bus.")]
    query("internvl", "Why?", history, [1])
    assert history == [("<image>\nWhat?", "A bus.")]


def test_images_of_earlier_and_later_turns_keep_their_order():
    text = query("internvl", "And <image>?", [("<image>\nFirst", "ok")], [1, 2])
    spans = [len(piece.split("</img>")[0]) // len("<IMG_CONTEXT>") for piece in text.split("<img>")[1:]]
    assert spans == [NUM_IMAGE_TOKEN, 2 * NUM_IMAGE_TOKEN]


@pytest.mark.parametrize(
    ("question", "tiles", "match"),
    [
        ("<image> and <image>", [1], r"2 `<image>` placeholder\(s\) but 1 image"),
        ("<image>", [1, 2], r"1 `<image>` placeholder\(s\) but 2 image"),
        ("<image>", None, r"1 `<image>` placeholder\(s\) but 0 image"),
    ],
)
def test_query_refuses_placeholders_that_differ_from_images(question, tiles, match):
    with pytest.raises(ValueError, match=match):
        query("internvl", question, None, tiles)


def test_query_escapes_image_tokens_of_users_and_answers():
    history = [("<image>\nWhat is <img>?", "An <image> of </img>.")]
    text = query("internvl", "Say <IMG_CONTEXT>", history, [1], system_message="No <img>!")
    assert text.count("<img>") == text.count("</img>") == 1
    assert text.count("<IMG_CONTEXT>") == NUM_IMAGE_TOKEN
    for escaped in ("What is < img>?", "An < image> of < /img>.", "Say < IMG_CONTEXT>", "No < img>!"):
        assert escaped in text


@pytest.mark.parametrize("token", ["<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>"])
def test_escaping_leaves_no_image_token_and_changes_nothing_else(token):
    assert escape_image_tokens(f"a <{token}> b <imge> < img") == f"a << {token[1:]}> b <imge> < img"
    assert escape_image_tokens(escape_image_tokens(token)) == escape_image_tokens(token)


# ---------------------------------------------------------------------------------------------------------- end tokens
def test_end_token_ids_are_the_stop_strings_the_tokenizer_has():
    tokenizer = make_tokenizer()
    ids = get_conversation_template("Hermes-2").end_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_end|>", "<|endoftext|>", "</s>"]
    assert tokenizer.convert_ids_to_tokens(get_conversation_template("v1").end_token_ids(tokenizer)) == ["</s>"]
    without_turns = make_tokenizer(special_tokens=())
    ids = get_conversation_template("internvl").end_token_ids(without_turns)
    assert without_turns.convert_ids_to_tokens(ids) == ["</s>"]
