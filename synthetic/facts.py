"""What captions of generated scenes state: the objects that they name, read back by the words of `captions`."""

import re
from collections import Counter
from functools import lru_cache

from .captions import LANGUAGES, language_of
from .scenes import COLOURS, NUMBERS, SHAPES, WORDS, Scene, SceneObject


# Kind, value, colour, whether small, and the index of the place.
Fact = tuple[str, str, str, bool, int]


def facts_of(scene: Scene) -> Counter[Fact | None]:
    """Returns what a complete caption of a scene states."""
    return Counter(_fact(item) for item in scene.objects)


def facts_in(text: str, language: str = "en") -> Counter[Fact | None]:
    """Returns what a caption in any wording of `captions` states; None stands for each part not understood."""
    words = language_of(language)
    for frame in sorted(words.frames, key=len, reverse=True):
        before, after = frame.split("{things}")
        if text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
            break
    table = _facts_by_phrase(language)
    parts = re.split("|".join(map(re.escape, words.separators)), text) if text != words.empty else []
    return Counter(table.get(part.strip()) for part in parts)


def _fact(item: SceneObject) -> Fact:
    return item.kind, item.value, item.colour, item.is_small, item.place


@lru_cache(maxsize=len(LANGUAGES))
def _facts_by_phrase(language: str) -> dict[str, Fact]:
    words = language_of(language)
    things = [("shape", shape, colour, False) for shape in SHAPES for colour in COLOURS]
    things += [("digit", str(digit), "", False) for digit in range(10)]
    texts = [("word", word) for word in WORDS] + [("number", str(number)) for number in NUMBERS]
    things += [(kind, text, "", is_small) for kind, text in texts for is_small in (False, True)]
    table: dict[str, Fact] = {}
    for kind, value, colour, is_small in things:
        for place, place_word in enumerate(words.places):
            item = SceneObject(kind, value, place, (0, 0), 0, colour, (0, 0, 0), is_small)
            for name in words.names_of(item):
                table[words.at_place(name, place)] = _fact(item)
                table[words.clause.format(place=place_word, thing=name)] = _fact(item)
    return table
