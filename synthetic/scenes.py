"""Generated scenes: a description as plain data, the image of it, and questions about it.

Three things are kept apart, so that each training stage takes what it needs:

- `sample_scene` draws a `Scene` (data only) from a random generator;
- `draw_scene` renders a scene, and the pixels depend on the scene alone;
- `questions_about`, and `caption` of captions.py, read the scene, never the image.

A scene has nine places (`PLACES`, three by three) with at most one object in each: a coloured shape, a real
handwritten digit, or a rendered word or number. Only a page has two texts at a place, one below the other, and the
answer to a question about the place is both. Shapes and digits grow with the image. Text does not, and lies inside one
448 px tile: in a large image it can be read in its tile only, not in the thumbnail.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .digits import Split, digit_indices_by_label, load_handwritten_digits


TILE_SIZE = 448

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
COLOURS = {
    "red": (214, 36, 36),
    "green": (34, 150, 58),
    "blue": (40, 84, 214),
    "yellow": (240, 208, 30),
    "orange": (244, 130, 24),
    "purple": (134, 52, 168),
    "pink": (246, 138, 190),
    "brown": (124, 76, 40),
}
INKS = ((20, 20, 20), (24, 32, 96), (88, 16, 16), (16, 72, 40))
MAX_COUNT = 6  # of shapes in a scene
NUMBERS = range(10, 100)

# Font sizes in pixels, for images of any size. Ink is about half as high, three quarters with ascenders.
SMALL_TEXT_SIZE = 20
BIG_TEXT_SIZE = 36
# Texts begin at multiples of this many pixels, and their lines are centred within such steps, up to the jitter. A
# small vision tower without convolutions learns to read these in minutes, and text at arbitrary pixels far more
# slowly.
TEXT_STEP = 28
TEXT_JITTER = 2
# Sizes of shapes and digits, and how far they stray from their cell's centre, as shares of its shorter side.
SHAPE_SHARE = (0.5, 0.7)
DIGIT_SHARE = (0.65, 0.8)
CENTRE_JITTER = 0.04

WORDS = tuple(
    "apple baby ball bank bear bed bell bird boat bone book box boy bread bus cake car cat chair clock cloud coat "
    "corn cow cup desk dog door duck ear egg eye farm fire fish flag foot fork frog game girl glass goat gold "
    "hand hat hill home horse ice jar key king kite lake lamp leaf leg lion map milk moon mouse nest nose oven "
    "owl park pear pen pig pot rain rice road rock roof rope rose salt sand sea ship shoe snow soap sock star sun "
    "tent tree van wall wind wolf wood yard zoo".split()
)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Args:
        kind: "shape", "digit" (handwritten), "word" or "number" (both rendered text).
        value: The shape's name, the digit, or the text.
        place: Index into `PLACES`.
        centre: (x, y) in pixels.
        size: Height in pixels of a shape or digit; font size in pixels of a text.
        colour: Name of a shape's colour; empty for other kinds.
        rgb: The colour drawn.
        is_small: Whether it is small text.
        digit_index: Index into the handwritten digits; -1 for other kinds.
        warp: Rotation (radians), shear and width factor of a handwritten digit.
    """

    kind: str
    value: str
    place: int
    centre: tuple[int, int]
    size: int
    colour: str
    rgb: tuple[int, int, int]
    is_small: bool = False
    digit_index: int = -1
    warp: tuple[float, float, float] = (0.0, 0.0, 1.0)

    @property
    def is_text(self) -> bool:
        """Whether this is rendered text."""
        return self.kind in ("word", "number")


@dataclass(frozen=True)
class Scene:
    """An image as data: its size, its background and its objects, ordered by place."""

    width: int
    height: int
    background: tuple[int, int, int]
    objects: tuple[SceneObject, ...]

    def shapes(self) -> list[SceneObject]:
        """Return the shapes."""
        return [item for item in self.objects if item.kind == "shape"]

    def digits(self) -> list[SceneObject]:
        """Return the handwritten digits."""
        return [item for item in self.objects if item.kind == "digit"]

    def texts(self) -> list[SceneObject]:
        """Return the rendered words and numbers."""
        return [item for item in self.objects if item.is_text]


@dataclass(frozen=True)
class Layout:
    """The sizes and contents of a kind of scene.

    Args:
        sizes: (width, height) in pixels, one of which is chosen.
        shapes, digits, big_texts, small_texts: Smallest and largest number of each.
        lines: Objects one below the other at each place.
    """

    sizes: tuple[tuple[int, int], ...]
    shapes: tuple[int, int] = (0, 0)
    digits: tuple[int, int] = (0, 0)
    big_texts: tuple[int, int] = (0, 0)
    small_texts: tuple[int, int] = (0, 0)
    lines: int = 1


ONE_TILE = ((448, 448),)
FEW_TILES = ((896, 448), (448, 896), (896, 896))
MANY_TILES = ((1344, 896), (896, 1344))
LAYOUTS = {
    "mixed": Layout(ONE_TILE, shapes=(1, MAX_COUNT), digits=(0, 2), big_texts=(0, 1), small_texts=(0, 1)),
    "reading": Layout(ONE_TILE, shapes=(0, 1), digits=(0, 1), big_texts=(1, 3), small_texts=(5, 7)),
    "page": Layout(ONE_TILE, small_texts=(14, 18), lines=2),
    "crowd": Layout(ONE_TILE, shapes=(4, MAX_COUNT), digits=(3, 5)),
    "digits": Layout(ONE_TILE, shapes=(0, 3), digits=(4, 6), small_texts=(0, 1)),
    "few_tiles": Layout(FEW_TILES, shapes=(1, MAX_COUNT), digits=(0, 2), small_texts=(1, 1)),
    "many_tiles": Layout(MANY_TILES, shapes=(1, MAX_COUNT), digits=(0, 2), small_texts=(1, 1)),
}


def scene_generator(split: Split, seed: int, index: int) -> Random:
    """Return the random generator of one scene; splits, seeds and indices never share a stream."""
    return Random(f"internvl scenes/{split}/{seed}/{index}")


def sample_scene(rng: Random, layout: Layout, split: Split) -> Scene:
    """Draw a scene's description; the same state of `rng` gives the same scene.

    `split` says whose digits may appear. Digits are warped in training only.
    """
    width, height = rng.choice(layout.sizes)
    num_cells = len(PLACES) * layout.lines
    cells = [_Cell(index, layout.lines, width, height) for index in rng.sample(range(num_cells), num_cells)]
    objects = []
    for _ in range(rng.randint(*layout.digits)):
        objects.append(_sample_digit(rng, cells.pop(), split))
    for is_small, bounds in ((True, layout.small_texts), (False, layout.big_texts)):
        for _ in range(min(rng.randint(*bounds), len(cells))):
            objects.append(_sample_text(rng, cells.pop(), is_small))
    shapes, colours = _sample_palette(rng)
    for _ in range(min(rng.randint(*layout.shapes), len(cells))):
        objects.append(_sample_shape(rng, cells.pop(), rng.choice(shapes), rng.choice(colours)))
    background = (rng.randint(232, 255), rng.randint(232, 255), rng.randint(232, 255))
    in_order = sorted(objects, key=lambda item: (item.place, item.centre[1]))
    return Scene(width, height, background, tuple(in_order))


@dataclass(frozen=True)
class _Cell:
    """Room for one object: cell `index`, row by row, of three columns and `3 * lines` rows over the image."""

    index: int
    lines: int
    width: int
    height: int

    @property
    def place(self) -> int:
        return self.index // 3 // self.lines * 3 + self.index % 3

    @property
    def side(self) -> float:
        """The shorter side, which sizes of shapes and digits follow."""
        return min(self.width / 3, self.height / 3 / self.lines)

    @property
    def centre(self) -> tuple[float, float]:
        return self.width / 3 * (self.index % 3 + 0.5), self.height / 3 / self.lines * (self.index // 3 + 0.5)

    def sample_centre(self, rng: Random) -> tuple[int, int]:
        """Return a centre for a shape or digit, near 3, 8 or 13 sixteenths of the image: whole patches of a tile."""
        stray = self.side * CENTRE_JITTER
        x = self.width * (self.index % 3 * 5 + 3) / 16
        y = self.height * (self.index // 3 * 5 + 3) / 16
        return round(x + rng.uniform(-stray, stray)), round(y + rng.uniform(-stray, stray))

    def sample_text_centre(self, rng: Random, extent: tuple[int, int]) -> tuple[int, int]:
        """Return the centre of a text of width and height `extent` within the cell and within one tile."""
        reach = self.width / 6 - extent[0] / 2, self.height / 6 / self.lines - extent[1] / 2
        columns, rows = (
            range(round(middle - room) // TEXT_STEP - 1, round(middle + room) // TEXT_STEP + 1)
            for middle, room in zip(self.centre, (self.width / 6, self.height / 6 / self.lines), strict=True)
        )
        while True:
            x = rng.choice(columns) * TEXT_STEP + 2 + rng.randint(0, TEXT_JITTER) + extent[0] / 2
            y = rng.choice(rows) * TEXT_STEP + TEXT_STEP / 2 + rng.randint(-TEXT_JITTER, TEXT_JITTER)
            is_inside = abs(x - self.centre[0]) <= reach[0] and abs(y - self.centre[1]) <= reach[1]
            if is_inside and not _crosses_tiles((x, y), extent):
                return round(x), round(y)


def _sample_palette(rng: Random) -> tuple[list[str], list[str]]:
    """Return the shapes and colours of one scene: few of them give high counts, many give unique objects."""
    few = rng.random() < 0.4
    num_shapes = rng.randint(1, 2) if few else len(SHAPES)
    num_colours = rng.randint(1, 2) if rng.random() < 0.3 else len(COLOURS)
    return rng.sample(SHAPES, num_shapes), rng.sample(list(COLOURS), num_colours)


def _sample_shape(rng: Random, cell: _Cell, shape: str, colour: str) -> SceneObject:
    size = round(cell.side * rng.uniform(*SHAPE_SHARE))
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[colour])
    centre = cell.sample_centre(rng)
    return SceneObject("shape", shape, cell.place, centre, size, colour, (red, green, blue))


def _sample_digit(rng: Random, cell: _Cell, split: Split) -> SceneObject:
    label = rng.randrange(10)
    index = rng.choice(digit_indices_by_label(split)[label])
    size = round(cell.side * rng.uniform(*DIGIT_SHARE))
    warp = (0.0, 0.0, 1.0)
    if split == "train":
        warp = (rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25), rng.uniform(0.75, 1.2))
    centre = cell.sample_centre(rng)
    return SceneObject("digit", str(label), cell.place, centre, size, "", rng.choice(INKS), False, index, warp)


def _sample_text(rng: Random, cell: _Cell, is_small: bool) -> SceneObject:
    is_word = rng.random() < 0.6
    value = rng.choice(WORDS) if is_word else str(rng.choice(NUMBERS))
    size = SMALL_TEXT_SIZE if is_small else BIG_TEXT_SIZE
    centre = cell.sample_text_centre(rng, text_extent(value, size))
    return SceneObject(
        "word" if is_word else "number", value, cell.place, centre, size, "", rng.choice(INKS), is_small
    )


def text_extent(text: str, font_size: int) -> tuple[int, int]:
    """Return width and height in pixels of a text, whose height is that of a line for any letters."""
    left, _, right, _ = _font(font_size).getbbox(text, anchor="lm")
    return math.ceil(right - left), font_size


def bounding_box(item: SceneObject) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of an object, in pixels."""
    width, height = text_extent(item.value, item.size) if item.is_text else (item.size, item.size)
    x, y = item.centre
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _crosses_tiles(centre: tuple[float, float], extent: tuple[int, int]) -> bool:
    return any(
        (middle - size / 2) // TILE_SIZE != (middle + size / 2) // TILE_SIZE
        for middle, size in zip(centre, extent, strict=True)
    )


def draw_scene(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of its size; the same scene gives the same pixels."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    for item in scene.objects:
        if item.is_text:
            ImageDraw.Draw(image).text(item.centre, item.value, fill=item.rgb, font=_font(item.size), anchor="mm")
            continue
        mask = _shape_mask(item) if item.kind == "shape" else _digit_mask(item)
        corner = (item.centre[0] - mask.width // 2, item.centre[1] - mask.height // 2)
        image.paste(item.rgb, corner, mask)
    return image


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow carries this font itself, so the same pixels come out on every machine.
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OSError("Drawing scenes needs a Pillow built with FreeType; install the Pillow wheel from PyPI.")
    return font


def _shape_mask(item: SceneObject) -> Image.Image:
    """Return the shape's coverage, smoothed by drawing it three times as large."""
    scale = 3
    size = item.size * scale
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    box = (0, 0, size - 1, size - 1)
    if item.value == "circle":
        draw.ellipse(box, fill=255)
    elif item.value == "ring":
        draw.ellipse(box, outline=255, width=round(size * 0.2))
    else:
        draw.polygon([(x * (size - 1), y * (size - 1)) for x, y in _POLYGONS[item.value]], fill=255)
    return mask.reduce(scale)


def _star_corners() -> list[tuple[float, float]]:
    radii = (0.5, 0.2) * 5
    angles = [math.pi * corner / 5 - math.pi / 2 for corner in range(10)]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_LOW, _HIGH = 0.34, 0.66  # the arms of the cross
_POLYGONS = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.04), (1.0, 0.96), (0.0, 0.96)],
    "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
    "star": _star_corners(),
    "cross": [
        *((_LOW, 0.0), (_HIGH, 0.0), (_HIGH, _LOW), (1.0, _LOW), (1.0, _HIGH), (_HIGH, _HIGH)),
        *((_HIGH, 1.0), (_LOW, 1.0), (_LOW, _HIGH), (0.0, _HIGH), (0.0, _LOW), (_LOW, _LOW)),
    ],
}


def _digit_mask(item: SceneObject) -> Image.Image:
    """Return the digit's ink, enlarged from 8 x 8 pixels and warped around its centre in one resampling."""
    ink = np.zeros((12, 12), dtype=np.uint8)  # two pixels of paper around the digit keep a warped stroke whole
    ink[2:10, 2:10] = np.round(load_handwritten_digits()[0][item.digit_index] * 255)
    rotation, shear, width = item.warp
    size = round(item.size * 12 / 8)
    step = 12 / size
    cos, sin = math.cos(rotation) * step, math.sin(rotation) * step
    # PIL asks for the map from output to input pixels: rotation after shear and width.
    a, b = cos / width, sin + shear * cos
    d, e = -sin / width, cos - shear * sin
    half = size / 2
    matrix = (a, b, 6 - a * half - b * half, d, e, 6 - d * half - e * half)
    return Image.fromarray(ink).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Question:
    """A question about an image, its only correct answer, and its kind (for scenes, one of `QUESTION_KINDS`)."""

    kind: str
    text: str
    answer: str


QUESTION_KINDS = ("colour", "shape", "count", "position", "digit", "text", "small_text")


def questions_about(scene: Scene, rng: Random) -> list[Question]:
    """Return every question that the scene answers unambiguously, grouped by kind in the order of `QUESTION_KINDS`.

    `rng` chooses the phrasings and nothing else.
    """
    makers: tuple[Callable[[Scene], Iterator[tuple[str, tuple[str, ...], str]]], ...] = (
        _colour_questions,
        _shape_questions,
        _count_questions,
        _position_questions,
        _digit_questions,
        _text_questions,
    )
    found = [
        Question(kind, rng.choice(phrasings), answer) for maker in makers for kind, phrasings, answer in maker(scene)
    ]
    return sorted(found, key=lambda question: QUESTION_KINDS.index(question.kind))


def choose_question(questions: Sequence[Question], rng: Random) -> Question:
    """Choose a question such that each of their answers is equally likely (most counts, for example, are 0)."""
    answer = rng.choice(sorted({question.answer for question in questions}))
    return rng.choice([question for question in questions if question.answer == answer])


def choose_questions(questions: Sequence[Question], rng: Random, count: int) -> list[Question]:
    """Choose up to `count` different questions in random order, interleaved by kind."""
    left = {kind: [q for q in questions if q.kind == kind] for kind in QUESTION_KINDS}
    chosen: list[Question] = []
    while any(left.values()) and len(chosen) < count:
        for candidates in filter(None, left.values()):
            chosen.append(choose_question(candidates, rng))
            candidates.remove(chosen[-1])
    rng.shuffle(chosen)
    return chosen[:count]


def _unique(items: list[SceneObject], key: Callable[[SceneObject], object]) -> list[SceneObject]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def _colour_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for item in _unique(scene.shapes(), lambda item: item.value):
        phrasings = (f"What colour is the {item.value}?", f"Which colour does the {item.value} have?")
        yield "colour", phrasings, item.colour
    for item in _unique(scene.shapes(), lambda item: item.place):
        yield "colour", (f"What colour is the shape at the {PLACES[item.place]}?",), item.colour


def _shape_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for item in _unique(scene.shapes(), lambda item: item.colour):
        yield "shape", (f"Which shape is {item.colour}?", f"What shape is the {item.colour} object?"), item.value
    for item in _unique(scene.shapes(), lambda item: item.place):
        yield "shape", (f"Which shape is at the {PLACES[item.place]}?",), item.value


def _count_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    shapes = scene.shapes()
    yield "count", ("How many shapes are there?", "How many shapes do you see?"), str(len(shapes))
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        count = sum(item.value == shape for item in shapes)
        yield "count", (f"How many {plural} are there?", f"How many {plural} do you see?"), str(count)
    for colour in COLOURS:
        count = sum(item.colour == colour for item in shapes)
        yield "count", (f"How many {colour} shapes are there?",), str(count)


def _position_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for item in _unique(scene.shapes(), lambda item: item.value):
        yield "position", (f"Where is the {item.value}?",), PLACES[item.place]
    for item in _unique(scene.shapes(), lambda item: (item.colour, item.value)):
        yield "position", (f"Where is the {item.colour} {item.value}?",), PLACES[item.place]
    if len(scene.digits()) == 1:
        phrasings = ("Where is the handwritten digit?", "Where is the digit?")
        yield "position", phrasings, PLACES[scene.digits()[0].place]


def _digit_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    digits = scene.digits()
    if len(digits) == 1:
        yield "digit", ("Which digit is handwritten?", "Which digit do you see?"), digits[0].value
    for item in _unique(digits, lambda item: item.place):
        yield "digit", (f"Which digit is at the {PLACES[item.place]}?",), item.value


def _text_questions(scene: Scene) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for kind, is_small, size in (("small_text", True, "small"), ("text", False, "big")):
        texts = [item for item in scene.texts() if item.is_small == is_small]
        if len(texts) == 1:  # in large images its place is hard to name, and the question is clear without it
            yield kind, (f"What does the {size} text say?", f"What is written in {size} letters?"), texts[0].value
            continue
        for place in sorted({item.place for item in texts}):
            lines = [item.value for item in texts if item.place == place]
            yield kind, (f"What is written at the {PLACES[place]}?",), " ".join(lines)
