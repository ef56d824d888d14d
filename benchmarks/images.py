"""Images to tensors: the image processor against the published path, which is Pillow, one tile after the other, and
PyTorch.

Both take the same images and must give the same bytes. Nothing can be faster than resizing alone and writing the
result once, in as many threads: how far ahead of the published path that would be is a row of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor, choose_grid
from internvl.synthetic.textures import as_jpeg

from .harness import Calls, Options, Row, interleave, row_of, speed_row


SIDE = 448
MAX_TILES = 12
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
# Photographs of web data sets and of cameras, screenshots, banners and icons; 1 to 13 tiles each, 292 in all.
SIZES = (
    (640, 480),
    (480, 640),
    (640, 427),
    (500, 375),
    (375, 500),
    (1024, 768),
    (1280, 720),
    (1920, 1080),
    (800, 1200),
    (512, 512),
    (1600, 1200),
    (336, 448),
    (1000, 300),
    (300, 900),
    (224, 224),
    (2048, 1536),
) * 2
LARGE = (1600, 1200)


def draw_images(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """RGB images of soft shapes with a little noise, which are about as large in JPEG as photographs."""
    generator = np.random.default_rng(0)
    images = []
    for width, height in sizes:
        shapes = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        noise = generator.normal(0, 4, (height, width, 3))
        images.append(Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)))
    return images


def published_tiles(image: Image.Image) -> list[Image.Image]:
    """The whole image on its grid, cut into tiles row by row; then the thumbnail, if there is more than one."""
    columns, rows = choose_grid(*image.size, 1, MAX_TILES, SIDE)
    canvas = image.resize((columns * SIDE, rows * SIDE))
    corners = [(x * SIDE, y * SIDE) for y in range(rows) for x in range(columns)]
    tiles = [canvas.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]
    return [*tiles, image.resize((SIDE, SIDE))] if len(tiles) > 1 else tiles


def published_pixels(tile: Image.Image) -> torch.Tensor:
    """torchvision's `Resize`, `ToTensor` and `Normalize` of a tile, step by step as there."""
    tile = tile.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, np.uint8, copy=True)).view(SIDE, SIDE, 3)
    pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)  # (3, H, W)
    return pixels.clone().sub_(MEAN).div_(STD)


def published(images: Sequence[Image.Image | bytes]) -> torch.Tensor:
    """The published path for several images, (T, 3, H, W)."""
    batches = []
    for image in images:
        image = Image.open(BytesIO(image)).convert("RGB") if isinstance(image, bytes) else image
        batches.append(torch.stack([published_pixels(tile) for tile in published_tiles(image)]))
    return torch.cat(batches)


def ours(processor: InternVLImageProcessor, images: Sequence[Image.Image | bytes]) -> torch.Tensor:
    """The image processor's (T, 3, H, W)."""
    return processor(list(images), return_tensors="pt")["pixel_values"]


def num_tiles(image: Image.Image) -> int:
    """Tiles of an image, with the thumbnail."""
    columns, rows = choose_grid(*image.size, 1, MAX_TILES, SIDE)
    return columns * rows + (columns * rows > 1)


def resize_and_write(images: Sequence[Image.Image], threads: int) -> np.ndarray:
    """What no path can leave out: Pillow's part, and one value in each place of the result, in as many threads."""
    counts = [num_tiles(image) for image in images]
    output = np.empty((sum(counts), 3, SIDE, SIDE), dtype=np.float32)
    places = np.split(output, np.cumsum(counts)[:-1])

    def of_one(image: Image.Image, place: np.ndarray) -> None:
        columns, rows = choose_grid(*image.size, 1, MAX_TILES, SIDE)
        image.resize((columns * SIDE, rows * SIDE))
        if columns * rows > 1:
            image.resize((SIDE, SIDE))
        place.fill(1)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(of_one, images, places))
    return output


def with_threads(count: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The call with PyTorch at a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def rows(options: Options) -> Iterator[Row]:
    """Decoded images, in all threads and in one, each with its bound; files, and one image. The work is the CPU's."""
    options = Options("cpu", options.rounds)
    processor = InternVLImageProcessor(max_num=MAX_TILES, size={"height": SIDE, "width": SIDE})
    images, threads = draw_images(SIZES), torch.get_num_threads()
    tiles = check_equal(ours(processor, images), published(images))
    for count in dict.fromkeys((threads, 1)):
        calls: Calls = {
            "ours": partial(with_threads, count, partial(ours, processor, images)),
            "peer": partial(with_threads, count, partial(published, images)),
            "bound": partial(resize_and_write, images, count),
        }
        seconds = interleave(calls, options, warmups=1)
        name = f"{len(images)} decoded images of mixed sizes to tensors, {count} thread(s), against the published path"
        yield row_of(name, seconds, target=2.0 if count == threads else None, tiles=tiles, threads=count)
        yield row_of(f"{name}: resizing and one write of the result alone", seconds, "bound", threads=count)
    files = [as_jpeg(image, 90) for image in images]
    for name, sources, target in (
        (f"{len(files)} JPEG files of mixed sizes to tensors, against the published path", files, 2.0),
        (
            "one decoded image of {} x {} to tensors, against the published path".format(*LARGE),
            draw_images([LARGE]),
            None,
        ),
    ):
        call, peer = partial(ours, processor, sources), partial(published, sources)
        tiles = check_equal(call(), peer())
        yield speed_row(name, call, peer, options, target, warmups=1, tiles=tiles, threads=threads)


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of tiles, if both are the same bytes."""
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise SystemExit("The two paths give different bytes: nothing to compare.")
    return len(found)
