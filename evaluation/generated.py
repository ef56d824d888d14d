"""Generated scenes as data of the tasks: held-out labelled images, scenes to caption and search, and questions.

Their handwritten digits are of writers that training never saw.
"""

import re
from dataclasses import dataclass

from PIL import Image

from ..renaming_internvl import renamed_arguments
from ..synthetic.captions import PAIR_LAYOUTS, prompts
from ..synthetic.digits import Split
from ..synthetic.scenes import (
    COLOURS,
    LAYOUTS,
    QUESTION_KINDS,
    SHAPES,
    Question,
    Scene,
    choose_question,
    draw_scene,
    questions_about,
    sample_scene,
    scene_generator,
)


# Classes by kind, and the layout of one object that belongs to one of them.
CLASSES = {"digit": tuple("0123456789"), "shape": SHAPES, "colour": tuple(COLOURS)}
LAYOUT_OF = {"digit": "one_digit", "shape": "one_shape", "colour": "one_shape"}
LAYOUTS_SEARCHED = ("few", "mixed", "crowd")
SMALL_TEXT = "small_text"
EVERYWHERE = ("mixed", "few_tiles", "many_tiles")
LAYOUTS_OF_KIND = {
    "digit": ("digits", *EVERYWHERE),
    "text": ("reading", "mixed"),  # large images have small text only
    SMALL_TEXT: ("many_tiles",),
}


@renamed_arguments(picture="image")
@dataclass(frozen=True)
class LabelledImage:
    """An image and the index of its class in `CLASSES` of its kind."""

    image: Image.Image
    label: int


@renamed_arguments(picture="image")
@dataclass(frozen=True)
class ImageQuestion:
    """An image, a question about it with its answer and kind, and the layout of a generated image."""

    image: Image.Image
    question: Question
    layout: str = ""


def labelled_images(kind: str, count: int, seed: int = 0, split: Split = "held_out") -> list[LabelledImage]:
    """Draws images of one object, of a kind in `CLASSES`; those of a smaller `count` are the first of a larger one."""
    found = []
    for index in range(count):
        rng = scene_generator(split, seed, index)
        scene = sample_scene(rng, PAIR_LAYOUTS[LAYOUT_OF[kind]], split)
        (item,) = scene.objects
        value = item.colour if kind == "colour" else item.value
        found.append(LabelledImage(draw_scene(scene), CLASSES[kind].index(value)))
    return found


def class_prompts(kind: str, language: str) -> list[list[str]]:
    """Returns the prompts of every class of a kind."""
    return [prompts(language, kind, value) for value in CLASSES[kind]]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Draws scenes, interleaved by layout."""
    return [scene_named(scene_name("pairs", seed, index)) for index in range(count)]


def held_out_question(index: int, seed: int = 0) -> ImageQuestion:
    """Draws question number `index`; kinds are interleaved, and so are the layouts within a kind."""
    kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
    layouts = LAYOUTS_OF_KIND.get(kind, EVERYWHERE)
    layout = layouts[index // len(QUESTION_KINDS) % len(layouts)]  # each of them has scenes with such a question
    rng = scene_generator("held_out", seed, index)
    while True:  # until the scene has a question of this kind
        scene = sample_scene(rng, LAYOUTS[layout], "held_out")
        candidates = [question for question in questions_about(scene, rng) if question.kind == kind]
        if candidates:
            return ImageQuestion(draw_scene(scene), choose_question(candidates, rng), layout)


def held_out_questions(count: int, seed: int = 0) -> list[ImageQuestion]:
    """Draws `count` questions, each about another image, balanced over `QUESTION_KINDS`."""
    return [held_out_question(index, seed) for index in range(count)]


def scene_name(kind: str, seed: int, number: int) -> str:
    """The name of a held-out scene: of "pairs" as `held_out_scenes` has them, or of "tiles", of one and of several."""
    return f"generated/{kind}/{seed}/{number}"


def scene_named(name: str) -> Scene:
    """The scene of a name from `scene_name`."""
    _, kind, seed, number = name.split("/")
    layouts = [PAIR_LAYOUTS[name] for name in (EVERYWHERE if kind == "tiles" else LAYOUTS_SEARCHED)]
    rng = scene_generator("held_out", int(seed), int(number))
    return sample_scene(rng, layouts[int(number) % len(layouts)], "held_out")


def image_named(name: str) -> Image.Image | None:
    """Draws the image of a name from `scene_name`, or of a question; None if it is none."""
    if re.fullmatch(r"generated/(pairs|tiles)/\d{1,9}/\d{1,9}", name):
        return draw_scene(scene_named(name))
    if question := re.fullmatch(r"generated/(\d{1,9})/(\d{1,9})(/one_tile)?", name):
        return held_out_question(int(question[2]), int(question[1])).image
    return None
