"""Generated scenes: reproducible, split by writer, drawn where they say, and every answer follows from the data."""

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from random import Random

import numpy as np
import pytest

from internvl.synthetic.captions import caption
from internvl.synthetic.digits import FIRST_HELD_OUT, digit_indices, digit_indices_by_label, load_handwritten_digits
from internvl.synthetic.scenes import (
    COLOURS,
    LAYOUTS,
    MAX_COUNT,
    PLACES,
    QUESTION_KINDS,
    SHAPES,
    SMALL_TEXT_SIZE,
    TEXT_JITTER,
    TEXT_STEP,
    TILE_SIZE,
    WORDS,
    choose_questions,
    draw_scene,
    questions_about,
    sample_scene,
    scene_generator,
    text_extent,
)


def scenes(split="train", count=40, seed=5):
    for name, layout in LAYOUTS.items():
        for index in range(count):
            yield name, sample_scene(scene_generator(split, seed, index), layout, split)


@lru_cache(maxsize=32)
def pixels_of(scene):
    return np.asarray(draw_scene(scene)).astype(int)


def ink_of(scene, item):
    """Where the image changes when `item` is taken away: (top, bottom, left, right), inclusive."""
    without = replace(scene, objects=tuple(other for other in scene.objects if other is not item))
    rows, columns = np.nonzero((pixels_of(scene) != pixels_of(without)).any(axis=-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_gives_the_same_scene_image_and_questions(layout):
    def make():
        rng = scene_generator("train", 1, 2)
        scene = sample_scene(rng, LAYOUTS[layout], "train")
        return scene, draw_scene(scene).tobytes(), questions_about(scene, rng)

    assert make() == make()


def test_splits_seeds_and_indices_give_different_scenes():
    keys = [(split, seed, index) for split in ("train", "held_out") for seed in range(3) for index in range(100)]
    drawn = {str(sample_scene(scene_generator(*key), LAYOUTS["mixed"], "train")) for key in keys}
    assert len(drawn) == len(keys)


def test_the_two_splits_of_the_digits_share_nothing_and_cover_the_file():
    train, held_out = set(digit_indices("train")), set(digit_indices("held_out"))
    assert not train & held_out
    assert sorted(train | held_out) == list(range(len(load_handwritten_digits()[1])))
    assert len(held_out) > 0.25 * len(train | held_out)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_show_digits_of_their_split_only_and_true_to_the_label(split):
    labels = load_handwritten_digits()[1]
    digits = [item for _, scene in scenes(split, count=60) for item in scene.digits()]
    assert len(digits) > 100
    for item in digits:
        assert (item.digit_index >= FIRST_HELD_OUT) == (split == "held_out")
        assert str(labels[item.digit_index]) == item.value


def test_held_out_digits_are_not_warped():
    assert {item.warp for _, scene in scenes("held_out", 10) for item in scene.digits()} == {(0.0, 0.0, 1.0)}


def test_digits_by_label_list_every_digit_once():
    for split in ("train", "held_out"):
        listed = [index for indices in digit_indices_by_label(split) for index in indices]
        assert sorted(listed) == list(digit_indices(split))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'held_out', got 'test'"):
        digit_indices("test")


def test_scenes_keep_the_bounds_of_their_layout():
    for name, scene in scenes(count=60):
        layout = LAYOUTS[name]
        assert (scene.width, scene.height) in layout.sizes
        assert len(scene.shapes()) <= min(layout.shapes[1], MAX_COUNT)
        assert layout.digits[0] <= len(scene.digits()) <= layout.digits[1]
        assert max(Counter(item.place for item in scene.objects).values(), default=0) <= layout.lines
        assert [item.place for item in scene.objects] == sorted(item.place for item in scene.objects)


def test_every_count_up_to_the_largest_occurs():
    counts = Counter(len(scene.shapes()) for name, scene in scenes(count=150) if name == "mixed")
    assert set(counts) == set(range(1, MAX_COUNT + 1))


@pytest.mark.parametrize("layout", ["mixed", "reading", "crowd", "digits", "few_tiles"])
def test_each_object_is_drawn_inside_its_ninth_of_the_image(layout):
    for index in range(3):
        scene = sample_scene(scene_generator("held_out", 2, index), LAYOUTS[layout], "held_out")
        for item in scene.objects:
            top, bottom, left, right = ink_of(scene, item)
            middle = ((left + right) / 2, (top + bottom) / 2)
            assert int(middle[0] // (scene.width / 3)) == item.place % 3
            assert int(middle[1] // (scene.height / 3)) == item.place // 3


@pytest.mark.parametrize(("layout", "seen"), [("many_tiles", 20), ("few_tiles", 20), ("page", 200), ("reading", 100)])
def test_text_lies_in_one_tile_of_its_ninth_and_begins_on_the_lattice(layout, seen):
    for index in range(20):
        scene = sample_scene(scene_generator("held_out", 3, index), LAYOUTS[layout], "held_out")
        for item in scene.texts():
            seen -= 1
            width, height = text_extent(item.value, item.size)
            left, top = item.centre[0] - width / 2, item.centre[1] - height / 2
            assert left // TILE_SIZE == (left + width) // TILE_SIZE
            assert top // TILE_SIZE == (top + height) // TILE_SIZE
            assert -1 <= left % TEXT_STEP - 2 <= TEXT_JITTER + 1
            assert abs(item.centre[1] % TEXT_STEP - TEXT_STEP / 2) <= TEXT_JITTER
            assert item.place == int(item.centre[1] // (scene.height / 3)) * 3 + int(
                item.centre[0] // (scene.width / 3)
            )
    assert seen <= 0


def test_small_text_has_its_promised_height_in_large_images_and_too_little_in_one_tile():
    for index in range(5):
        scene = sample_scene(scene_generator("held_out", 3, index), LAYOUTS["many_tiles"], "held_out")
        (item,) = scene.texts()
        top, bottom, left, right = ink_of(scene, item)
        assert item.size == SMALL_TEXT_SIZE
        assert 9 <= bottom - top + 1 <= SMALL_TEXT_SIZE
        assert (bottom - top + 1) * TILE_SIZE / scene.height < 11
        assert (bottom - top + 1) * (right - left + 1) * TILE_SIZE**2 / (scene.width * scene.height) < 150


def test_shapes_have_the_colour_they_are_said_to_have():
    for index in range(10):
        scene = sample_scene(scene_generator("train", 4, index), LAYOUTS["mixed"], "train")
        image = pixels_of(scene)
        for item in scene.shapes():
            top, bottom, left, right = ink_of(scene, item)
            patch = image[top : bottom + 1, left : right + 1].reshape(-1, 3)
            ink = np.median(patch[(patch < 231).any(axis=1)], axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - ink).sum())
            assert nearest == item.colour


def slow_answers(scene, text):  # noqa: C901  (one plain case per phrasing, sharing nothing with the generator)
    """Every answer that the scene's data gives to a question, worked out from the question's words."""
    shapes = [item for item in scene.objects if item.kind == "shape"]
    if match := re.fullmatch(r"(?:What|Which) colour (?:is|does) the (\w+)(?: have)?\?", text):
        return [item.colour for item in shapes if item.value == match[1]]
    if match := re.fullmatch(r"What colour is the shape at the (.+)\?", text):
        return [item.colour for item in shapes if PLACES[item.place] == match[1]]
    if match := re.fullmatch(r"(?:Which shape is|What shape is the) (\w+)(?: object)?\?", text):
        return [item.value for item in shapes if item.colour == match[1]]
    if match := re.fullmatch(r"Which shape is at the (.+)\?", text):
        return [item.value for item in shapes if PLACES[item.place] == match[1]]
    if re.fullmatch(r"How many shapes (are there|do you see)\?", text):
        return [str(len(shapes))]
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", text):
        return [str(len([item for item in shapes if item.colour == match[1]]))]
    if match := re.fullmatch(r"How many (\w+?)(?:es|s) (?:are there|do you see)\?", text):
        name = {"circl": "circle", "squar": "square", "triangl": "triangle"}.get(match[1], match[1])
        return [str(len([item for item in shapes if item.value == name]))]
    if re.fullmatch(r"Where is the (handwritten )?digit\?", text):
        return [PLACES[item.place] for item in scene.objects if item.kind == "digit"]
    if match := re.fullmatch(r"Where is the (?:(\w+) )?(\w+)\?", text):
        return [PLACES[s.place] for s in shapes if s.value == match[2] and match[1] in (None, s.colour)]
    if re.fullmatch(r"Which digit (is handwritten|do you see)\?", text):
        return [item.value for item in scene.objects if item.kind == "digit"]
    if match := re.fullmatch(r"Which digit is at the (.+)\?", text):
        return [item.value for item in scene.objects if item.kind == "digit" and PLACES[item.place] == match[1]]
    texts = [item for item in scene.objects if item.kind in ("word", "number")]
    if match := re.fullmatch(r"What is written in (small|big) letters\?|What does the (small|big) text say\?", text):
        return [item.value for item in texts if item.is_small == ("small" in match.groups())]
    if match := re.fullmatch(r"What is written at the (.+)\?", text):
        at_place = sorted((item for item in texts if PLACES[item.place] == match[1]), key=lambda item: item.centre[1])
        return [" ".join(item.value for item in at_place)]
    raise AssertionError(f"no rule for {text!r}")


def test_every_question_has_exactly_one_answer_and_it_follows_from_the_scene():
    kinds = Counter()
    for _, scene in scenes(count=40):
        for question in questions_about(scene, Random(0)):
            assert slow_answers(scene, question.text) == [question.answer], question
            kinds[question.kind] += 1
    assert set(kinds) == set(QUESTION_KINDS)


def test_chosen_questions_are_different_and_balanced_over_kinds():
    scene = sample_scene(scene_generator("train", 6, 1), LAYOUTS["few_tiles"], "train")
    available = questions_about(scene, Random(0))
    chosen = choose_questions(available, Random(1), 5)
    assert len(set(chosen)) == len(chosen) == 5
    kinds = {question.kind for question in available}
    assert len({question.kind for question in chosen}) == min(5, len(kinds))
    assert set(choose_questions(available, Random(1), 1000)) == set(available)


def test_the_caption_names_every_object_with_its_place():
    for _, scene in scenes(count=10):
        parts = caption(scene).split(", ")
        assert len(parts) == len(scene.objects)
        for part, item in zip(parts, scene.objects, strict=True):
            assert part.endswith(f"{item.value} at the {PLACES[item.place]}")
            assert item.colour in part


def test_names_are_unambiguous():
    assert len(set(WORDS)) == len(WORDS) >= 60
    assert not set(WORDS) & (set(SHAPES) - {"star"} | set(COLOURS))
