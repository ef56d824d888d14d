"""Generated pairs polluted as those of the web are: wrong captions, watermarks, boilerplate, copies of images.

Every row says what is wrong with it in the column `pollution`, which no rule reads. The scores that rules read are as
imperfect as real ones: similarity comes of an InternVL-C, and the score of watermarks errs in one of twenty.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel, ProcessorMixin

from ..evaluation.embeddings import embed_images, embed_texts
from ..extras import extra
from ..synthetic.captions import PAIR_LAYOUTS, caption
from ..synthetic.scenes import draw_scene, sample_scene, scene_generator


with extra("train"):
    import pyarrow
    from pyarrow import parquet

CLEAN = "clean"
# Shares of the pairs; the rest is clean.
POLLUTIONS = {"wrong caption": 0.2, "watermark": 0.15, "boilerplate": 0.15, "copy": 0.1}
LAYOUTS = {"one_shape": 1, "one_digit": 2, "few": 2}
BOILERPLATE = (
    "Add to cart. Free shipping on orders over 50 dollars.",
    "Home > Pictures > Shapes > All results",
    "Page not found. Sign in to go on.",
    "Image not available",
    "<div class='caption'>untitled</div>",
    "IMG_20481234.jpg",
)
MARK = "PREVIEW  shutter.example"
COPIED_IMAGES = 20  # few images, copied again and again
COPY_QUALITIES = (40, 95)  # of JPEG
COPY_SIZES = (0.6, 1.0)
DETECTION_RATE = 0.95  # of watermarks
ROWS_OF_SHARD = 1000


def polluted_pairs(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draws pairs with English captions: `image`, `caption`, `width`, `height`, `watermark`, `pollution`."""
    for index in range(count):
        rng = Random(f"polluted pairs/{seed}/{index}")
        kinds = [*POLLUTIONS, CLEAN]
        kind = rng.choices(kinds, [*POLLUTIONS.values(), 1 - sum(POLLUTIONS.values())])[0]
        number = rng.randrange(COPIED_IMAGES) if kind == "copy" else COPIED_IMAGES + index
        scene = _scene(seed, number)
        # A copy brings the caption of its image along.
        text = caption(scene, "en", Random(f"copied caption/{seed}/{number}") if kind == "copy" else rng)
        if kind == "wrong caption":
            text = caption(_scene(seed, COPIED_IMAGES + count + index), "en", rng)
        elif kind == "boilerplate":
            text = rng.choice(BOILERPLATE)
        image = draw_scene(scene)
        if kind == "watermark":
            image = _marked(image, rng)
        content = _copied(image, rng) if kind == "copy" else _encoded(image, "PNG")
        is_noticed = (kind == "watermark") == (rng.random() < DETECTION_RATE)
        with Image.open(io.BytesIO(content)) as stored:
            width, height = stored.size
        yield {
            "image": content,
            "caption": text,
            "width": width,
            "height": height,
            "watermark": rng.uniform(0.96, 1.0) if is_noticed else rng.uniform(0.0, 0.4),
            "pollution": kind,
        }


def _scene(seed: int, number: int) -> Any:
    rng = scene_generator("train", seed, number)
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    return sample_scene(rng, PAIR_LAYOUTS[layout], "train")


def _marked(image: Image.Image, rng: Random) -> Image.Image:
    """An image under rows of half-transparent text."""
    marks = Image.new("RGBA", image.size)
    drawing, font = ImageDraw.Draw(marks), ImageFont.load_default(size=image.width // 14)
    step = image.height // 4
    for row in range(-1, 5):
        place = (rng.randrange(-image.width // 4, image.width // 8), row * step + rng.randrange(step))
        drawing.text(place, MARK, fill=(90, 90, 90, 130), font=font)
    return Image.alpha_composite(image.convert("RGBA"), marks).convert("RGB")


def _copied(image: Image.Image, rng: Random) -> bytes:
    """Bytes of a copy: another size, another quality."""
    side = round(image.width * rng.uniform(*COPY_SIZES))
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    return _encoded(resized, "JPEG", quality=rng.randint(*COPY_QUALITIES))


def _encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def with_similarity(
    pairs: Sequence[dict[str, Any]], model: PreTrainedModel, processor: ProcessorMixin
) -> list[dict[str, Any]]:
    """Adds the column `similarity`: the cosine of image and caption by an InternVL-C."""
    images = (Image.open(io.BytesIO(pair["image"])).convert("RGB") for pair in pairs)
    cosines = torch.sum(
        embed_images(model, processor, images) * embed_texts(model, processor, [pair["caption"] for pair in pairs]),
        dim=-1,
    )
    return [{**pair, "similarity": value} for pair, value in zip(pairs, cosines.tolist(), strict=True)]


def write_polluted_shards(
    folder: Path, count: int, seed: int, model: PreTrainedModel, processor: ProcessorMixin
) -> list[str]:
    """Writes scored pairs as parquet shards of `ROWS_OF_SHARD`; those that are there already stay.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = polluted_pairs(count, seed)
    files = []
    for number, start in enumerate(range(0, count, ROWS_OF_SHARD)):
        rows = [next(pairs) for _ in range(min(ROWS_OF_SHARD, count - start))]
        file = folder / f"{number:06d}.parquet"
        files.append(str(file))
        if file.is_file():
            continue
        beside = file.with_suffix(".incomplete")
        parquet.write_table(pyarrow.Table.from_pylist(with_similarity(rows, model, processor)), beside)
        beside.replace(file)
    return files
