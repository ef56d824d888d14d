"""Captions: colours agree in gender, wordings repeat by seed, and prompts name one class each."""

import re
from collections import Counter
from random import Random

import pytest

from internvl.synthetic.captions import CAPTION_PROMPTS, LANGUAGES, PAIR_LAYOUTS, caption, language_of, prompts
from internvl.synthetic.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    sample_scene,
    scene_generator,
)
from internvl.synthetic.tokenizer import caption_corpus, train_tokenizer


def scenes(count=12):
    for layout in PAIR_LAYOUTS.values():
        for index in range(count):
            yield sample_scene(scene_generator("train", 3, index), layout, "train")


def one_shape(shape, colour, place=4):
    return Scene(448, 448, (255, 255, 255), (SceneObject("shape", shape, place, (9, 9), 5, colour, COLOURS[colour]),))


@pytest.mark.parametrize("language", LANGUAGES)
def test_tables_have_a_word_for_everything_and_no_word_twice(language):
    words = language_of(language)
    for table, count in ((words.shapes, 7), (words.colours, 8), (words.places, len(PLACES)), (words.digits, 10)):
        assert len(table) == len(set(table)) == count
    assert set(words.feminine) <= set(words.shapes)
    assert bool(words.feminine) == bool(words.feminine_colours)
    assert len(words.numerals) in (0, 10)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_repeat_by_seed_and_vary_in_wording(language):
    scene = one_shape("star", "red")
    first, second = ([caption(scene, language, Random(seed)) for seed in range(60)] for _ in range(2))
    assert first == second
    assert len(set(first)) >= 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_different_scenes_have_different_plain_captions(language):
    told = {
        caption(one_shape(shape, colour, place), language)
        for shape in SHAPES
        for colour in COLOURS
        for place in range(9)
    }
    assert len(told) == 7 * 8 * 9


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_of_many_objects_always_name_every_place(language):
    words = language_of(language)
    for scene in scenes(3):
        if len(scene.objects) > 1:
            text = caption(scene, language, Random(1))
            assert all(words.places[item.place] in text for item in scene.objects)


@pytest.mark.parametrize(
    ("language", "shape", "colour", "expected"),
    [
        ("en", "circle", "orange", "an orange circle"),
        ("it", "star", "red", "una stella rossa"),
        ("it", "circle", "red", "un cerchio rosso"),
        ("it", "cross", "blue", "una croce blu"),
        ("ar", "square", "green", "مربع أخضر"),
        ("ar", "ring", "green", "حلقة خضراء"),
        ("zh", "diamond", "purple", "一个紫色的菱形"),
        ("ja", "star", "yellow", "黄色い星"),
    ],
)
def test_colours_agree_with_their_shape(language, shape, colour, expected):
    assert expected in caption(one_shape(shape, colour), language)


def test_digits_are_written_as_numerals_of_the_language_too():
    assert {"a handwritten 7", "the digit seven"} <= set(prompts("en", "digit", "7"))
    assert any("٧" in text for text in prompts("ar", "digit", "7"))  # noqa: RUF001
    assert any("七" in text for text in prompts("ja", "digit", "7"))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("kind", "values"), [("shape", SHAPES), ("digit", "0123456789"), ("colour", COLOURS)])
def test_no_prompt_belongs_to_two_classes(language, kind, values):
    counts = Counter(text for value in values for text in prompts(language, kind, value))
    assert set(counts.values()) == {1}
    assert all(not re.search(r"[{}]", text) for text in counts)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'en', 'zh', 'ja', 'ar', 'it'"):
        caption(one_shape("star", "red"), "fr")
    with pytest.raises(ValueError, match="'shape', 'digit' or 'colour'"):
        prompts("en", "size", "7")


def test_the_multilingual_tokenizer_gives_captions_back_in_few_tokens():
    tokenizer = train_tokenizer(caption_corpus(num_scenes=100), 1024)
    for language in LANGUAGES:
        text = caption(one_shape("star", "orange"), language)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode()) / 2
    assert set(CAPTION_PROMPTS) == set(LANGUAGES)
