"""Captions of generated scenes in five languages, and prompts of zero-shot classification, from one table of words.

`caption` reads a scene and never the image. A `Language` lists words and patterns; the first of each is the plain
wording, which `caption` takes without a random generator. Colours agree with the gender of the shape, and digits are
written as numerals and as words. Rendered words stay English, as drawn.

Not covered: counting ("three red circles"), since numbers bend nouns differently in each language.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .scenes import COLOURS, LAYOUTS, ONE_TILE, PLACES, SHAPES, Layout, Scene, SceneObject


# Layouts of image-text pairs: of one object, for zero-shot classification, and of several, for retrieval.
PAIR_LAYOUTS = {
    "one_shape": Layout(ONE_TILE, shapes=(1, 1)),
    "one_digit": Layout(ONE_TILE, digits=(1, 1)),
    "few": Layout(ONE_TILE, shapes=(1, 2), digits=(1, 2)),
    **LAYOUTS,
}
# Shares of random captions of one object without place or without colour, and of captions made of clauses.
_PLACELESS, _COLOURLESS, _CLAUSES = 0.5, 0.3, 0.25


@dataclass(frozen=True)
class Language:
    """Words and patterns of a language; of several patterns the first is the plain one.

    Args:
        shapes: One per `SHAPES`.
        feminine: Which of `shapes` are feminine.
        colours: One per `COLOURS`.
        feminine_colours: The same beside a feminine shape; empty where nothing changes.
        places: One per `PLACES`, with the preposition where the patterns have none.
        digits: Words for 0 to 9.
        numerals: Numerals for 0 to 9 besides those of ASCII; may be empty.
        bare_shape: Patterns with `{shape}`.
        shape: Patterns with `{shape}` and `{colour}`.
        digit: Patterns of a handwritten digit, with `{digit}`.
        text: Patterns of a rendered word, small word, number and small number, with `{text}`.
        located: Patterns of a thing at its place, with `{thing}` and `{place}`.
        clause: The same as a clause.
        frames: Patterns around a list of things, with `{things}`.
        separators: What stands between the things of a list, and between clauses.
        empty: Caption of a scene without objects.
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    digits: tuple[str, ...]
    bare_shape: tuple[str, ...]
    shape: tuple[str, ...]
    digit: tuple[str, ...]
    text: tuple[str, str, str, str]
    located: str
    clause: str
    frames: tuple[str, ...]
    separators: tuple[str, str]
    empty: str
    feminine: tuple[str, ...] = ()
    feminine_colours: tuple[str, ...] = ()
    numerals: str = ""

    def shape_names(self, shape: str, colour: str | None = None) -> list[str]:
        """Returns every wording of a shape, with its colour if one is given."""
        word = self.shapes[SHAPES.index(shape)]
        if colour is None:
            return [pattern.format(shape=word) for pattern in self.bare_shape]
        is_feminine = word in self.feminine
        colours = self.feminine_colours if is_feminine and self.feminine_colours else self.colours
        colour_word = colours[tuple(COLOURS).index(colour)]
        return [pattern.format(shape=word, colour=colour_word) for pattern in self.shape]

    def digit_names(self, digit: str) -> list[str]:
        """Returns every wording of a handwritten digit, plain numerals first."""
        forms = (digit, self.digits[int(digit)], *self.numerals[int(digit) :][:1])
        return [pattern.format(digit=form) for pattern in self.digit for form in forms]

    def names_of(self, item: SceneObject) -> list[str]:
        """Returns every wording of an object, without its place."""
        if item.kind == "shape":
            return self.shape_names(item.value, item.colour)
        if item.kind == "digit":
            return self.digit_names(item.value)
        return [self.text[2 * (item.kind == "number") + item.is_small].format(text=item.value)]

    def at_place(self, name: str, place: int) -> str:
        """Places a wording at an index into `PLACES`."""
        return self.located.format(thing=name, place=self.places[place])


LANGUAGES = {
    "en": Language(
        shapes=("circle", "square", "triangle", "star", "cross", "diamond", "ring"),
        colours=("a red", "a green", "a blue", "a yellow", "an orange", "a purple", "a pink", "a brown"),
        places=PLACES,
        digits=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        bare_shape=("a {shape}",),
        shape=("{colour} {shape}",),
        digit=("a handwritten {digit}", "the handwritten digit {digit}", "the digit {digit}"),
        text=("the word {text}", "the small word {text}", "the number {text}", "the small number {text}"),
        located="{thing} at the {place}",
        clause="at the {place} there is {thing}",
        frames=("{things}", "a picture of {things}", "this picture shows {things}"),
        separators=(", ", ", "),
        empty="an empty picture",
    ),
    "zh": Language(
        shapes=("圆形", "正方形", "三角形", "星形", "十字形", "菱形", "圆环"),
        colours=("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "棕色"),
        places=("左上角", "上方", "右上角", "左侧", "中央", "右侧", "左下角", "下方", "右下角"),
        digits=("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
        bare_shape=("一个{shape}", "{shape}"),
        shape=("一个{colour}的{shape}", "{colour}{shape}"),
        digit=("手写数字{digit}", "手写的数字{digit}", "数字{digit}"),
        text=("单词{text}", "小号单词{text}", "印刷的数{text}", "小号印刷的数{text}"),
        located="{place}的{thing}",
        clause="{place}有{thing}",
        frames=("{things}", "一张{things}的图片", "图中有{things}"),
        separators=("、", "，"),  # noqa: RUF001
        empty="一张空白的图片",
    ),
    "ja": Language(
        shapes=("円", "正方形", "三角形", "星", "十字", "ひし形", "輪"),
        colours=("赤い", "緑の", "青い", "黄色い", "オレンジ色の", "紫の", "ピンクの", "茶色い"),
        places=("左上", "上", "右上", "左", "中央", "右", "左下", "下", "右下"),
        digits=("ゼロ", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
        bare_shape=("{shape}",),
        shape=("{colour}{shape}",),
        digit=("手書きの{digit}", "手書きの数字の{digit}", "数字の{digit}"),
        text=("単語{text}", "小さい単語{text}", "印刷の数{text}", "小さい印刷の数{text}"),
        located="{place}の{thing}",
        clause="{place}に{thing}がある",
        frames=("{things}", "{things}の絵", "この絵には{things}がある"),
        separators=("、", "、"),
        empty="何もない絵",
    ),
    "ar": Language(
        shapes=("دائرة", "مربع", "مثلث", "نجمة", "صليب", "معين", "حلقة"),
        feminine=("دائرة", "نجمة", "حلقة"),
        colours=("أحمر", "أخضر", "أزرق", "أصفر", "برتقالي", "بنفسجي", "وردي", "بني"),
        feminine_colours=("حمراء", "خضراء", "زرقاء", "صفراء", "برتقالية", "بنفسجية", "وردية", "بنية"),
        places=(
            "في أعلى اليسار",
            "في الأعلى",
            "في أعلى اليمين",
            "على اليسار",
            "في الوسط",
            "على اليمين",
            "في أسفل اليسار",
            "في الأسفل",
            "في أسفل اليمين",
        ),
        digits=("صفر", "واحد", "اثنان", "ثلاثة", "أربعة", "خمسة", "ستة", "سبعة", "ثمانية", "تسعة"),
        numerals="٠١٢٣٤٥٦٧٨٩",
        bare_shape=("{shape}",),
        shape=("{shape} {colour}",),
        digit=("رقم {digit} مكتوب بخط اليد", "الرقم {digit} بخط اليد", "الرقم {digit}"),
        text=("كلمة {text}", "كلمة صغيرة {text}", "عدد مطبوع {text}", "عدد مطبوع صغير {text}"),
        located="{thing} {place}",
        clause="توجد {place} صورة {thing}",
        frames=("{things}", "صورة فيها {things}", "في هذه الصورة {things}"),
        separators=("، ", "، "),
        empty="صورة فارغة",
    ),
    "it": Language(
        shapes=("un cerchio", "un quadrato", "un triangolo", "una stella", "una croce", "un rombo", "un anello"),
        feminine=("una stella", "una croce"),
        colours=("rosso", "verde", "blu", "giallo", "arancione", "viola", "rosa", "marrone"),
        feminine_colours=("rossa", "verde", "blu", "gialla", "arancione", "viola", "rosa", "marrone"),
        places=(
            "in alto a sinistra",
            "in alto",
            "in alto a destra",
            "a sinistra",
            "al centro",
            "a destra",
            "in basso a sinistra",
            "in basso",
            "in basso a destra",
        ),
        digits=("zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"),
        bare_shape=("{shape}",),
        shape=("{shape} {colour}",),
        digit=("la cifra {digit} scritta a mano", "la cifra manoscritta {digit}", "la cifra {digit}"),
        text=("la parola {text}", "la parola piccola {text}", "il numero {text}", "il numero piccolo {text}"),
        located="{thing} {place}",
        clause="{place} c'è {thing}",
        frames=("{things}", "un'immagine con {things}", "questa immagine mostra {things}"),
        separators=(", ", ", "),
        empty="un'immagine vuota",
    ),
}


# Prompts for captions in stage 2; the paper's is the first.
CAPTION_PROMPTS = {
    "en": "English caption:",
    "zh": "Chinese caption:",
    "ja": "Japanese caption:",
    "ar": "Arabic caption:",
    "it": "Italian caption:",
}


def language_of(code: str) -> Language:
    """Returns the language of a code such as "en"; raises a ValueError for unknown codes."""
    if code not in LANGUAGES:
        raise ValueError(f"`language` must be one of {list(LANGUAGES)}, got {code!r}.")
    return LANGUAGES[code]


def caption(scene: Scene, language: str = "en", rng: Random | None = None) -> str:
    """Writes one sentence about a scene in a language, a key of `LANGUAGES`, in a wording that `rng` chooses.

    Without `rng` it is the plain one, which names every object and its place, row by row. A random caption of a single
    object may omit the place and a shape's colour, as zero-shot prompts do.
    """
    words = language_of(language)
    if not scene.objects:
        return words.empty
    if rng is None:
        plain = [words.at_place(words.names_of(item)[0], item.place) for item in scene.objects]
        return words.frames[0].format(things=words.separators[0].join(plain))
    if len(scene.objects) == 1 and rng.random() < _PLACELESS:
        (item,) = scene.objects
        is_colourless = item.kind == "shape" and rng.random() < _COLOURLESS
        names = words.shape_names(item.value) if is_colourless else words.names_of(item)
        return rng.choice(words.frames).format(things=rng.choice(names))
    named = [(rng.choice(words.names_of(item)), item.place) for item in scene.objects]
    if rng.random() < _CLAUSES:
        clauses = (words.clause.format(thing=name, place=words.places[place]) for name, place in named)
        return words.separators[1].join(clauses)
    things = words.separators[0].join(words.at_place(name, place) for name, place in named)
    return rng.choice(words.frames).format(things=things)


def prompts(language: str, kind: str, value: str) -> list[str]:
    """Returns every prompt that says that an image shows an object of a class.

    Args:
        language: Its code, see `LANGUAGES`.
        kind: "shape", "digit" or "colour" (of any shape).
        value: One of `SHAPES`, a digit, or one of `COLOURS`.

    Returns:
        Prompts without duplicates; they name no place, and those of shapes name no colour.
    """
    words = language_of(language)
    names: Sequence[str]
    if kind == "shape":
        names = words.shape_names(value)
    elif kind == "digit":
        names = words.digit_names(value)
    elif kind == "colour":
        names = [name for shape in SHAPES for name in words.shape_names(shape, value)]
    else:
        raise ValueError(f"`kind` must be 'shape', 'digit' or 'colour', got {kind!r}.")
    return list(dict.fromkeys(frame.format(things=name) for frame in words.frames for name in names))
